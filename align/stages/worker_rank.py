"""The entry point of all ranks but the first, which run the stage with the inputs that the first rank broadcasts."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from align import ranks
from align.config.root import Config
from align.core.errors import AlignError, InputError, make_printable, require
from align.core.files import SIZE_LIMIT
from align.run import Manifest, load_artifact, model_digest
from align.run.environment import code_digest
from align.run.files import find_user_error
from align.run.folder import FollowerRun
from align.stages import load_stage

SHARED = "Put it on storage that all machines share, at the same path."


@dataclass(frozen=True, slots=True)
class StartedRun:
    """The message with configuration, manifest and data that the first rank broadcasts as a stage begins.

    Attributes:
        config: the resolved configuration, with its secrets masked.
        folder: absolute path of the run's folder, on storage that all ranks share.
        manifest: the run's manifest at this moment.
        resumed: True if an unfinished run is continued.
        rows: the further arguments of the stage's `run`. The other ranks read no data.
    """

    config: Config
    folder: Path
    manifest: Manifest
    resumed: bool
    rows: tuple[Any, ...]


def follow_first_rank() -> int:
    """Run the stage that the first rank broadcasts on this other rank, and return the exit status.

    Raises:
        AlignError: this rank or another one failed, see `align.ranks.find_first_cause`.
    """
    try:
        with ranks.raise_first_failure():
            return work_on_run()
    except AlignError:
        raise
    except Exception as error:  # the first rank writes the traceback to the log
        if ranks.should_print_error(error):
            message = f"{type(error).__name__}: {make_printable(str(error))}"
            print(f"align: rank {ranks.rank()}: internal error: {message}", file=sys.stderr)
            print("align: the traceback is in the run's log.txt", file=sys.stderr)
        return 1


def work_on_run() -> int:
    """Receive the run from the first rank, verify that code and weights agree, run the stage and return its exit
    status.

    Returns 0 at once if the run is finished already.
    """
    ranks.init_group()
    started: StartedRun | None = ranks.broadcast(None)
    if started is None:  # the run is finished already
        return 0
    config = started.config
    SIZE_LIMIT.megabytes = config.run.max_file_mb
    require_same_code_and_weights(started)
    ranks.record_position("loads")
    try:
        with FollowerRun(started.folder, started.manifest, started.resumed) as run:
            result = load_stage(config.stage.name).run(run, config, *started.rows)
    except AlignError:
        raise
    except Exception as error:
        raise find_user_error(error, config.run.root) or error from error
    return int(result.metrics.get("exit_status", 0))


def require_same_code_and_weights(started: StartedRun) -> None:
    """Raise InputError if this rank's code, base model or adapters have other digests than the first rank's.

    Every rank hashes the adapters, because later it loads exactly the bytes that it hashed. Only one rank of each
    machine compares code and whole models: the others would wait for the same disk, and `load_base` compares the bytes
    that a rank loads with the base's digest in any case.
    """
    manifest = started.manifest
    rank = ranks.rank()
    is_first_of_machine = ranks.local_rank() == 0
    if is_first_of_machine:
        digest = code_digest()
        problem = f"rank {rank} runs other code than rank 0, which has {manifest.code[:12]}"
        require(digest == manifest.code, "align", digest[:12], problem, "Install the same version on every machine.")
        problem = f"rank {rank} does not find the run's folder {started.folder}"
        has_folder = (started.folder / "manifest.json").is_file()
        require(has_folder, "run.root", started.config.run.root, problem, SHARED)
    for name, record in manifest.inputs.items():
        is_adapter = record.whole is False  # None for data, which the first rank reads
        if is_adapter or (is_first_of_machine and record.whole):
            path = Path(record.path)
            require_same_weights(
                name, record.ref, record.digest, lambda path=path: load_artifact(path, str(path)).digest
            )
    if is_first_of_machine and (base := manifest.base):
        compute_digest = partial(model_digest, Path(base.path), "model.path", base.id)
        require_same_weights("model.path", base.id, base.digest, compute_digest)


def require_same_weights(field: str, value: str, expected: str, compute_digest: Callable[[], str]) -> None:
    """Raise InputError if `compute_digest` does not return the first rank's digest, or cannot read the weights."""
    try:
        digest = compute_digest()
    except InputError as error:
        raise type(error)(field, value, f"rank {ranks.rank()}: {error.problem}", SHARED) from error
    problem = f"rank {ranks.rank()} has other weights there ({digest[:12]}) than rank 0 ({expected[:12]})"
    require(digest == expected, field, value, problem, SHARED)
