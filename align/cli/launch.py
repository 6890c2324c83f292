"""`devices=N`: one command on N ranks of this machine, started and watched by torch's elastic launcher.

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
from align.config.training import check_ranks
from align.core.errors import AlignError, InputError, require
from align.core.files import read_text
from align.ranks import INTERRUPTED, LOST, NOTES, QUIET, RUN, SPOKEN
from align.run.folder import ended

if TYPE_CHECKING:
    from align.config.root import Config

LINGER_S = 2
SHUTDOWN_S = 10
"""How long ranks have to end by themselves when one has failed or the command is interrupted."""
NODES = "PET_NNODES"
THREADS = "OMP_NUM_THREADS"


def several_machines() -> bool:
    """Whether the environment says that ranks on other machines belong to this command."""
    return os.environ.get(NODES, "1") not in ("1", "1:1")


def check_machines() -> None:
    """Raises InputError where torchrun's variables do not say which machines there are, and where they meet."""
    nodes, endpoint = os.environ.get(NODES, "1"), os.environ.get("PET_RDZV_ENDPOINT", "")
    numbers = re.fullmatch(r"[1-9]\d*(:[1-9]\d*)?", nodes) is not None
    require(numbers, NODES, nodes, "is no number of machines", "Write PET_NNODES=2.")
    if not several_machines():
        return
    place = re.fullmatch(r"[^\s:]+:\d+|\[[^\s\]]+\]:\d+", endpoint) is not None
    if os.environ.get("PET_RDZV_BACKEND", "static") == "static" and not endpoint:
        names = ("PET_MASTER_ADDR", "PET_MASTER_PORT", "PET_NODE_RANK")
        missing = [name for name in names if name not in os.environ]
        require(
            not missing, missing[0] if missing else "", "(not set)", f"nothing says where {nodes} machines meet",
            "Set PET_RDZV_BACKEND=c10d and PET_RDZV_ENDPOINT=HOST:PORT, the same on each of them.",
        )  # fmt: skip
        return
    require(
        place, "PET_RDZV_ENDPOINT", endpoint or "(not set)", "is no HOST:PORT at which the machines can meet",
        "Write PET_RDZV_ENDPOINT=HOST:29400, the same on each of them.",
    )  # fmt: skip


def ranks_wanted(config: Config) -> bool:
    """Whether a run is to be started on several ranks. One of them is on several already.

    Raises:
        InputError: the stage works in one process, or its settings do not fit on so many.
    """
    here = ranks.launched_world_size()
    if here == 1:
        check_machines()
        world, several = config.devices or 1, several_machines() or (config.devices or 1) > 1
    else:
        world, several = here, False
        there = int(os.environ.get("LOCAL_WORLD_SIZE", here))
        problem = f"a launcher has started {there} ranks on this machine"
        require(config.devices in (None, there), "devices", config.devices, problem, "Leave it out.")
    name = config.stage.name
    problem = f"works in one process, and {world} ranks are to run it"
    require(not (several or here > 1) or STAGES[name].spreads, "stage", name, problem, "Start it alone.")
    check_ranks(config.stage, world)
    one = world == 1 or config.device in ("auto", "cpu", "cuda")
    require(one, "device", config.device, f"is one device, and {world} ranks have one each", "Use device=cuda.")
    return several


def launch(words: Sequence[str], devices: int) -> int:
    """Run one command line on so many ranks; returns its exit status.

    Args:
        words: what follows `python -m align`.
    """
    os.environ |= {name: value for name, value in QUIET.items() if name not in os.environ}  # before torch looks
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.launcher.api import elastic_launch
    from torch.distributed.run import config_from_args, get_args_parser

    logging.disable(logging.CRITICAL)  # torch's launcher tells in many lines what we say in one
    with tempfile.TemporaryDirectory(prefix="align-ranks-") as notes:
        threads = str(max(1, len(os.sched_getaffinity(0)) // devices))
        os.environ |= {THREADS: os.environ.get(THREADS) or threads, NOTES: notes}
        alone = ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", f"--rdzv-id={secrets.token_hex(8)}"]
        given = [f"--nproc-per-node={devices}", f"--shutdown-timeout={SHUTDOWN_S}", f"--log-dir={notes}"]
        given += [] if several_machines() else alone
        config, command, arguments = config_from_args(get_args_parser().parse_args([*given, "-m", "align", *words]))
        try:
            elastic_launch(config, command)(*arguments)
        except ChildFailedError as error:
            if several_machines():
                time.sleep(LINGER_S)  # the others ask the store, which is this process's, why
            return status_of(error.failures, Path(notes))
        except (RendezvousError, DistError) as error:
            raise InputError(
                "PET_RDZV_ENDPOINT", os.environ.get("PET_RDZV_ENDPOINT", os.environ.get("PET_MASTER_ADDR", "")),
                f"the machines did not meet there ({type(error).__name__})",
                "Start the same command on each of them, and see that all reach this address.",
            ) from error  # fmt: skip
        except SignalException:
            print("align: interrupted; run the same command again to continue", file=sys.stderr)
            return INTERRUPTED
        finally:
            os.environ.pop(NOTES, None)
            logging.disable(logging.NOTSET)
    return 0


def status_of(failures: Mapping[int, Any], notes: Path) -> int:
    """The exit status of a command some of whose ranks ended otherwise than well. A rank that ended by itself has said
    why; of one that was killed this says where it stood.

    Args:
        failures: rank → how it ended, by torch's launcher.
    """
    if spoken := noted(notes, SPOKEN):
        return int(spoken)
    killed = {rank: failure for rank, failure in failures.items() if failure.exitcode < 0}
    for rank, failure in sorted(killed.items(), key=lambda item: item[1].exitcode == -signal.SIGTERM):
        known = -failure.exitcode in {*signal.Signals}
        how = signal.Signals(-failure.exitcode).name if known else f"signal {-failure.exitcode}"
        where = noted(notes, f"rank-{rank}") or "before it started"
        what = f"rank {rank} died ({how}); it stood at: {where}"
        print(f"align: {what}. Run the same command again to continue", file=sys.stderr)
        if folder := noted(notes, RUN):
            with suppress(AlignError, OSError):
                ended(Path(folder), what)
        return 1
    if lost := noted(notes, LOST):
        print(f"align: {lost}", file=sys.stderr)
        return 1
    statuses = [failure.exitcode for failure in failures.values()]
    if INTERRUPTED in statuses:
        print("align: interrupted; run the same command again to continue", file=sys.stderr)
    return next((status for status in (2, INTERRUPTED) if status in statuses), 1)


def noted(notes: Path, name: str) -> str:
    with suppress(OSError):
        return read_text(notes / name, name)
    return ""
