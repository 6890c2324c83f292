"""Run one command on N ranks of this machine (`devices=N`) with torch's elastic launcher.

Ranks on several machines are started by `torchrun`, or by this command on each of them with torchrun's own variables
in the environment (`PET_NNODES`, `PET_NODE_RANK`, `PET_MASTER_ADDR`, `PET_MASTER_PORT`, `PET_RDZV_…`).
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align import ranks
from align.config.stages import STAGES
from align.config.training import require_divisible_batch
from align.core.errors import AlignError, InputError, require
from align.core.files import read_text
from align.ranks import INTERRUPTED, LOST, NOTES, QUIET, RUN, SPOKEN
from align.run.folder import record_killed_run

if TYPE_CHECKING:
    from align.config.root import Config

LINGER_S = 2
"""Seconds that ranks on other machines get to read the cause of a failure from the store of this process."""
SHUTDOWN_S = 10
"""Seconds that ranks get to end by themselves after one has failed or the command is interrupted."""
NODES = "PET_NNODES"
THREADS = "OMP_NUM_THREADS"


def is_multi_machine() -> bool:
    """Return whether torchrun's variable `PET_NNODES` asks for more than one machine."""
    return os.environ.get(NODES, "1") not in ("1", "1:1")


def require_machine_settings() -> None:
    """Raise InputError unless torchrun's environment variables hold a valid number of machines and, for several, a
    rendezvous address."""
    nodes = os.environ.get(NODES, "1")
    endpoint = os.environ.get("PET_RDZV_ENDPOINT", "")
    is_number = re.fullmatch(r"[1-9]\d*(:[1-9]\d*)?", nodes) is not None
    require(is_number, NODES, nodes, "is no number of machines", "Write PET_NNODES=2.")
    if not is_multi_machine():
        return
    if os.environ.get("PET_RDZV_BACKEND", "static") == "static" and not endpoint:
        names = ("PET_MASTER_ADDR", "PET_MASTER_PORT", "PET_NODE_RANK")
        missing = [name for name in names if name not in os.environ]
        require(
            not missing,
            missing[0] if missing else "",
            "(not set)",
            f"no rendezvous address is set for {nodes} machines",
            "Set PET_RDZV_BACKEND=c10d and PET_RDZV_ENDPOINT=HOST:PORT, the same on each of them.",
        )
        return
    require(
        re.fullmatch(r"[^\s:]+:\d+|\[[^\s\]]+\]:\d+", endpoint) is not None,
        "PET_RDZV_ENDPOINT",
        endpoint or "(not set)",
        "is no HOST:PORT for the rendezvous of the machines",
        "Write PET_RDZV_ENDPOINT=HOST:29400, the same on each of them.",
    )


def needs_ranks(config: Config) -> bool:
    """Return True if a run needs several ranks and no launcher has started them yet. A rank itself launches none.

    Raises:
        InputError: the stage works in one process only, or its settings do not fit the number of ranks.
    """
    launched = ranks.read_launched_world_size()
    if launched == 1:
        require_machine_settings()
        world = config.devices or 1
        starts_ranks = is_multi_machine() or world > 1
    else:
        world = launched
        starts_ranks = False
        on_this_machine = int(os.environ.get("LOCAL_WORLD_SIZE", launched))
        problem = f"a launcher has started {on_this_machine} ranks on this machine"
        require(config.devices in (None, on_this_machine), "devices", config.devices, problem, "Leave it out.")
    name = config.stage.name
    problem = f"works in one process, and {world} ranks are to run it"
    require(not (starts_ranks or launched > 1) or STAGES[name].spreads, "stage", name, problem, "Start it alone.")
    require_divisible_batch(config.stage, world)
    fits = world == 1 or config.device in ("auto", "cpu", "cuda")
    require(fits, "device", config.device, f"is one device, and {world} ranks have one each", "Use device=cuda.")
    return starts_ranks


def launch_ranks(words: Sequence[str], devices: int) -> int:
    """Run one command line on several ranks with torch's elastic launcher and return the exit status.

    Args:
        words: the arguments of `python -m align`.
        devices: number of ranks on this machine.
    """
    os.environ |= {name: value for name, value in QUIET.items() if name not in os.environ}  # before torch looks
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.launcher.api import elastic_launch
    from torch.distributed.run import config_from_args, get_args_parser

    logging.disable(logging.CRITICAL)  # torch's launcher writes many lines for an error that we report in one
    with tempfile.TemporaryDirectory(prefix="align-ranks-") as notes:
        threads = str(max(1, len(os.sched_getaffinity(0)) // devices))
        os.environ |= {THREADS: os.environ.get(THREADS) or threads, NOTES: notes}
        options = [f"--nproc-per-node={devices}", f"--shutdown-timeout={SHUTDOWN_S}", f"--log-dir={notes}"]
        if not is_multi_machine():
            options += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", f"--rdzv-id={secrets.token_hex(8)}"]
        config, command, arguments = config_from_args(get_args_parser().parse_args([*options, "-m", "align", *words]))
        try:
            elastic_launch(config, command)(*arguments)
        except ChildFailedError as error:
            if is_multi_machine():
                time.sleep(LINGER_S)
            return report_failed_ranks(error.failures, Path(notes))
        except (RendezvousError, DistError) as error:
            raise InputError(
                "PET_RDZV_ENDPOINT",
                os.environ.get("PET_RDZV_ENDPOINT", os.environ.get("PET_MASTER_ADDR", "")),
                f"the machines did not reach each other there ({type(error).__name__})",
                "Start the same command on each of them, and see that all reach this address.",
            ) from error
        except SignalException:
            print("align: interrupted; run the same command again to continue", file=sys.stderr)
            return INTERRUPTED
        finally:
            os.environ.pop(NOTES, None)
            logging.disable(logging.NOTSET)
    return 0


def report_failed_ranks(failures: Mapping[int, Any], notes: Path) -> int:
    """Return the exit status of a command whose ranks failed, and print the cause unless a rank has printed it.

    A rank that failed by itself has printed its error. For a rank that was killed, its last position is printed.

    Args:
        failures: rank → torch's record of its failure.
        notes: the folder of the ranks' notes.
    """
    if spoken := read_note(notes, SPOKEN):
        return int(spoken)
    killed = {rank: failure for rank, failure in failures.items() if failure.exitcode < 0}
    for rank, failure in sorted(killed.items(), key=lambda item: item[1].exitcode == -signal.SIGTERM):
        number = -failure.exitcode
        name = signal.Signals(number).name if number in {*signal.Signals} else f"signal {number}"
        position = read_note(notes, f"rank-{rank}") or "before it started"
        message = f"rank {rank} died ({name}); its last position: {position}"
        print(f"align: {message}. Run the same command again to continue", file=sys.stderr)
        if folder := read_note(notes, RUN):
            with suppress(AlignError, OSError):
                record_killed_run(Path(folder), message)
        return 1
    if lost := read_note(notes, LOST):
        print(f"align: {lost}", file=sys.stderr)
        return 1
    statuses = [failure.exitcode for failure in failures.values()]
    if INTERRUPTED in statuses:
        print("align: interrupted; run the same command again to continue", file=sys.stderr)
    return next((status for status in (2, INTERRUPTED) if status in statuses), 1)


def read_note(notes: Path, name: str) -> str:
    with suppress(OSError):
        return read_text(notes / name, name)
    return ""
