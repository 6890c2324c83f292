"""One program on several ranks (SPMD): this process's rank, and messages between the ranks.

Every rank runs the same stage on the same rows. Each computes its share of the chunks (`select_own_share`), the results
are gathered (`gather_shares`), gradients are summed, and everything else is computed on every rank alike. Only the
first rank, `main`, writes. In a process that is alone every function returns at once, and torch.distributed is not
imported.

The first rank that fails writes its error to the store that all ranks share (`find_first_cause`). The others end
silently with its exit status.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from align.core.errors import AlignError, InputError, make_printable, require

if TYPE_CHECKING:
    from torch import Tensor


class RankFailed(AlignError):
    """Exception of a rank that ends because another rank failed first and has reported its error.

    Attributes:
        exit_status: of that rank.
        trace: its traceback, if the error is a fault of align's.
    """

    def __init__(self, message: str, status: int, trace: str = "") -> None:
        super().__init__(message)
        self.exit_status = status
        self.trace = trace


class RankLost(AlignError):
    """Exception about another rank that ended without reporting an error, or that does not answer.

    Attributes:
        late: whether it does not answer; else it ended.
    """

    def __init__(self, message: str, late: bool) -> None:
        super().__init__(message)
        self.late = late


class Failure(NamedTuple):
    """The number, exit status and error of the first rank that failed.

    Attributes:
        status: its exit status.
        message: its error.
        trace: its traceback, if the error is a fault of align's.
    """

    rank: int
    status: int
    message: str
    trace: str = ""


LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""Environment variables that torch's launchers set for each rank."""


def is_launched() -> bool:
    """Return whether all environment variables are set that torch's launcher sets for a rank."""
    return all(name in os.environ for name in LAUNCHED)


def read_launched_world_size() -> int:
    """Return the number of ranks from `WORLD_SIZE` if torch's launcher started this process, else 1.

    Raises:
        InputError: a variable has a value that no launcher sets.
    """
    if not is_launched():
        return 1
    size = read_launcher_number("WORLD_SIZE", 1)
    read_launcher_number("RANK", 0, size - 1)
    read_launcher_number("LOCAL_RANK", 0, size - 1)
    read_launcher_number("MASTER_PORT", 1, 65_535)
    return size


def read_launcher_number(name: str, minimum: int, maximum: int | None = None) -> int:
    """Return an integer from an environment variable that a launcher sets for each rank.

    Raises:
        InputError: the variable is not a number in this range.
    """
    text = os.environ[name]
    is_valid = text.isdecimal() and int(text) >= minimum and (maximum is None or int(text) <= maximum)
    problem = f"is no number from {minimum}" + ("" if maximum is None else f" to {maximum}")
    require(is_valid, name, text, problem, "Start the command by devices=N or torchrun, which set it, or unset it.")
    return int(text)


__all__ = ["RankFailed", "RankLost", "is_launched", "read_launched_world_size"]

T = TypeVar("T")

NOTES = "ALIGN_RANK_NOTES"
"""Environment variable with the folder in which a rank that `devices=` started leaves notes for its launcher."""
SPOKEN = "spoken"
"""Name of the note with the exit status of the rank that printed the error."""
LOST = "lost"
"""Name of the note with the message about a rank that ended without reporting an error."""
RUN = "run"
"""Name of the note with the path of the run's folder."""
INTERRUPTED = 130
QUIET = {"TORCH_CPP_LOG_LEVEL": "FATAL", "TORCH_SHOW_CPP_STACKTRACES": "0"}
"""Environment variables that keep torch's C++ code from printing long traces when another rank closes its
connections."""
FAILED = "failed"
"""Key of the first failed rank's error in the store that all ranks share."""
GROUP_SETTINGS = "group"
"""Key in the store of the arguments that the first rank gave `init_group`."""
CLOSED = (
    "Connection closed",
    "Connection reset",
    "Connection was likely closed",
    "Broken pipe",
    "remote process exited",
    "unhandled system error",
)
"""Parts of error messages of gloo and NCCL about a rank that ended."""
LATE = ("imed out", "imeout")
"""Parts of error messages of gloo and NCCL about a rank that does not answer."""
POLL_S = 0.1
READ_S = 3.0
"""Seconds that a rank which failed before `init_group` waits until the others have read its error."""
BUCKET = 1 << 24
"""Maximum number of gradient elements in one all-reduce."""


@dataclass(frozen=True)
class RankInfo:
    """The rank of this process, the world size and the store that all ranks share.

    Attributes:
        rank: its number, from 0.
        world: number of ranks.
        local_rank: its number on this machine.
        store: torch's key-value store, which all ranks share.
    """

    rank: int
    world: int
    local_rank: int
    store: Any


_here: RankInfo | None = None
_control: Any = None  # the process group for Python objects; None is the default one
_position = "starts"


def rank() -> int:
    """Return the rank of this process, from 0; 0 without a launcher."""
    return _here.rank if _here else 0


def world_size() -> int:
    """Return the number of ranks; 1 without a launcher."""
    return _here.world if _here else 1


def local_rank() -> int:
    """Return the rank of this process among those on its machine, from 0."""
    return _here.local_rank if _here else 0


def is_alone() -> bool:
    """Return whether this process runs alone, without other ranks."""
    return _here is None


def is_main() -> bool:
    """Return whether this is rank 0, the only one that writes files."""
    return rank() == 0


def connect() -> None:
    """Connect to the key-value store that all ranks share, if a launcher started this process. On other ranks than the
    first, stdout is discarded from then on."""
    global _here
    if _here or not is_launched():
        return
    read_launched_world_size()  # checks the variables
    os.environ |= {name: value for name, value in QUIET.items() if name not in os.environ}  # before torch looks
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    store, number, world = next(iter(rendezvous("env://")))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # of torchrun's --max-restarts
    _here = RankInfo(number, world, int(os.environ["LOCAL_RANK"]), PrefixStore(f"align/{attempt}", store))
    record_position("starts")
    if number:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # only the first rank prints
        logging.getLogger().addHandler(logging.NullHandler())


def init_group(device: str = "", timeout_s: float = 0.0) -> None:
    """Initialize torch's process group with the arguments of the first rank, which the others read from the store. Does
    nothing in a process without other ranks.

    Args:
        device: kind of device that the ranks compute on, `cpu` or `cuda`.
        timeout_s: seconds that a rank waits for the others.

    Raises:
        InputError: this machine has fewer GPUs than ranks.
    """
    global _control
    if _here is None:
        return
    import torch
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore

    if is_main():
        _here.store.set(GROUP_SETTINGS, json.dumps([device, timeout_s]))
    while not _here.store.check([GROUP_SETTINGS]):  # `get` would block signals, and miss a failure
        if _here.store.check([FAILED]):
            raise AlignError("rank 0 failed")  # `find_first_cause` reads its error
        time.sleep(POLL_S)
    device, timeout_s = json.loads(_here.store.get(GROUP_SETTINGS))
    if device == "cuda":
        gpu_count = torch.cuda.device_count()
        if _here.local_rank >= gpu_count:
            raise InputError(
                "devices",
                os.environ.get("LOCAL_WORLD_SIZE", ""),
                f"this machine has {gpu_count} GPUs, and a rank needs one of its own",
                f"Use devices={gpu_count}.",
            )
        torch.cuda.set_device(_here.local_rank)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
        timeout=timedelta(seconds=timeout_s),
        store=PrefixStore("group", _here.store),
        rank=_here.rank,
        world_size=_here.world,
    )
    _control = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s)) if device == "cuda" else None


def destroy_group() -> None:
    """Destroy torch's process group at the end of a successful run, if there is one."""
    if _here is not None:
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()


# Messages between ranks. Every rank has to call the same function.


def broadcast(value: T) -> T:
    """Return the first rank's `value` on every rank. It must be picklable."""
    if _here is None:
        return value
    import torch.distributed as dist

    values = [value]
    with publish_waiting("for the first rank"):
        dist.broadcast_object_list(values, src=0, group=_control)
    return values[0]


def barrier() -> None:
    """Block until every rank has called this function."""
    broadcast(None)


def select_own_share(items: Sequence[T]) -> Sequence[T]:
    """Return every W-th of `items`, starting at this rank's number, where W is the world size."""
    return items if _here is None else items[_here.rank :: _here.world]


def gather_shares(own: Sequence[T], count: int) -> Sequence[T]:
    """Collect each rank's results for its share of `count` items, and return all of them in the order of the items, on
    every rank. Undoes the division by `select_own_share`.

    Args:
        own: this rank's results, with tensors on the CPU.
    """
    if _here is None:
        return own
    import torch.distributed as dist

    parts: list[Any] = [None] * _here.world
    with publish_waiting("for the shares of the others"):
        dist.all_gather_object(parts, list(own), group=_control)
    results: list[Any] = [None] * count
    for number, part in enumerate(parts):
        results[number :: _here.world] = part
    return results


def gather_all(value: T) -> list[T]:
    """Return the `value` of every rank as a list indexed by rank, on every rank."""
    return list(gather_shares([value], world_size()))


def sum_gradients(parameters: Iterable[Tensor]) -> None:
    """Replace the gradient of each parameter by its sum over all ranks. A missing gradient counts as zero; where every
    rank lacks it, it stays None."""
    if _here is None:
        return
    import torch
    import torch.distributed as dist

    all_parameters = list(parameters)
    with publish_waiting("for the gradients of the others"), torch.no_grad():
        has_gradient = torch.tensor(
            [p.grad is not None for p in all_parameters], dtype=torch.int32, device=all_parameters[0].device
        )
        dist.all_reduce(has_gradient, dist.ReduceOp.MAX)
        with_gradient = [p for p, flag in zip(all_parameters, has_gradient.tolist(), strict=True) if flag]
        for bucket in split_into_buckets(with_gradient):
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
            flat = torch.cat([grad.reshape(-1) for grad in grads])
            dist.all_reduce(flat)
            for p, part in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
                p.grad = part.view_as(p).clone()


def split_into_buckets(parameters: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Yield lists of consecutive parameters of one dtype with at most `BUCKET` elements in total, or with a single
    larger one."""
    bucket: list[Tensor] = []
    elements = 0
    for parameter in parameters:
        elements += parameter.numel()
        if bucket and (elements > BUCKET or bucket[0].dtype != parameter.dtype):
            yield bucket
            bucket = []
            elements = parameter.numel()
        bucket.append(parameter)
    if bucket:
        yield bucket


# The position of each rank in its work, and the end of all ranks when one fails.


def record_position(where: str) -> None:
    """Publish a short text about this rank's current work, for error messages about a rank that does not answer."""
    global _position
    if _here is None:
        return
    _position = where
    publish_position(where)


@contextmanager
def publish_waiting(what: str) -> Iterator[None]:
    """Publish that this rank waits for other ranks while the `with` block runs, for error messages about a missing
    rank."""
    publish_position(f"{_position}, waits {what}")
    yield
    publish_position(_position)


def publish_position(where: str) -> None:
    """Write a text about this rank's current work to the store that all ranks share, with the time, and to the
    launcher's notes."""
    assert _here is not None
    _here.store.set(f"at/{_here.rank}", json.dumps([time.time(), where]))
    write_launcher_note(f"rank-{_here.rank}", where)


def write_launcher_note(name: str, text: str) -> None:
    """Write `text` to the file `name` in the launcher's notes folder, if align's launcher started this rank. The write
    is atomic, and an OSError is ignored."""
    if folder := os.environ.get(NOTES):
        with suppress(OSError):
            part = Path(folder, f".{name}")
            part.write_text(text, encoding="utf-8")
            part.replace(Path(folder, name))


def describe_positions() -> str:
    """Return a text with the last known work of each rank, and the seconds since it began."""
    assert _here is not None
    positions = []
    now = time.time()
    for number in range(_here.world):
        key = f"at/{number}"
        published_at, where = json.loads(_here.store.get(key)) if _here.store.check([key]) else (now, "has not started")
        positions.append(f"rank {number}: {where} (since {max(0.0, now - published_at):.0f} s)")
    return "; ".join(positions)


def find_first_cause(error: BaseException) -> BaseException:
    """Return the exception that this rank must end with: its own if it failed first, else one about the first rank that
    failed."""
    if _here is None or isinstance(error, RankFailed):
        return error
    own_error = to_rank_lost(error) or error
    first = record_first_failure(own_error)
    if first.rank == _here.rank:
        return own_error
    if first.status == INTERRUPTED:
        return own_error if isinstance(own_error, KeyboardInterrupt) else KeyboardInterrupt()
    return RankFailed(f"rank {first.rank}: {first.message}", first.status, first.trace)


def record_first_failure(error: BaseException) -> Failure:
    """Record this rank's error in the shared store unless another rank failed before, and return the first failure."""
    assert _here is not None
    interrupted = isinstance(error, KeyboardInterrupt)
    status = INTERRUPTED if interrupted else getattr(error, "exit_status", 1)
    is_fault = not interrupted and not isinstance(error, AlignError)
    message = "interrupted" if interrupted else make_printable(repr(error) if is_fault else str(error))
    trace = make_printable("".join(traceback.format_exception(error))) if is_fault else ""
    own_failure = Failure(_here.rank, status, message, trace)
    try:
        first = Failure(*json.loads(_here.store.compare_set(FAILED, "", json.dumps(own_failure))))
        _here.store.set(f"heard/{_here.rank}", "")
        return first
    except Exception:  # the store ended with the launcher
        return own_failure


def wait_until_read() -> None:
    """Wait up to `READ_S` seconds until the other ranks have read this rank's error, if it failed before `init_group`.

    The store may end with this process.
    """
    import torch.distributed as dist

    if _here is not None and not dist.is_initialized():
        with suppress(Exception):
            _here.store.wait([f"heard/{number}" for number in range(_here.world)], timedelta(seconds=READ_S))


def to_rank_lost(error: BaseException) -> RankLost | None:
    """Return a RankLost for an error of gloo or NCCL about a rank that ended or does not answer, and None for any other
    error."""
    if not isinstance(error, RuntimeError):
        return None
    text = str(error)
    is_late = any(fragment in text for fragment in LATE)
    if not is_late and not any(fragment in text for fragment in CLOSED):
        return None
    with suppress(Exception):
        where = describe_positions()
        what = "a rank did not answer in time (ddp_timeout)" if is_late else "a rank ended without reporting an error"
        return RankLost(f"{what}. {where}. Run the same command again to continue", is_late)
    return RankLost("the other ranks are gone. Run the same command again to continue", is_late)


@contextmanager
def raise_first_failure() -> Iterator[None]:
    """Replace an exception in the `with` block with the error of the rank that failed first, if that is another one."""
    try:
        yield
    except BaseException as error:
        first = find_first_cause(error)
        if first is error:
            raise
        raise first from error


def should_print_error(error: BaseException) -> bool:
    """Return whether this rank must print `error`, so that only one of all ranks and the launcher prints the cause of a
    failure. If the launcher prints it, the text is left for it in a note.

    About a rank that ended and about an interruption, align's launcher prints the message if it started the ranks.
    """
    if _here is None:
        return True
    has_launcher = NOTES in os.environ
    if isinstance(error, RankFailed) or record_first_failure(error).rank != _here.rank:
        return False
    if has_launcher and isinstance(error, KeyboardInterrupt):
        return False
    if has_launcher and isinstance(error, RankLost) and not error.late:
        write_launcher_note(LOST, str(error))
        return False
    write_launcher_note(SPOKEN, str(getattr(error, "exit_status", 1)))
    return True
