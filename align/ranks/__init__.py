"""One program on several ranks (SPMD): who this process is among them, and what they tell each other.

Every rank runs the same stage on the same rows. Work is dealt by chunks (`dealt`), what each rank found is gathered
(`gathered`), gradients are summed, and all else is computed on every rank alike. Only the first rank, `main`, writes.
A process that is alone returns from each function at once, and imports nothing of torch's for it.

The first rank that fails says so in the store that all share (`cause`); the others end with its status, in silence.
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

from align.core.errors import AlignError, InputError, readable, require

if TYPE_CHECKING:
    from torch import Tensor


class RankFailed(AlignError):
    """Another rank failed first, and has said why.

    Attributes:
        trace: its traceback, where that was a fault of ours.
    """

    def __init__(self, message: str, status: int, trace: str = "") -> None:
        super().__init__(message)
        self.exit_status, self.trace = status, trace


class RankLost(AlignError):
    """Another rank is gone without a word, or does not answer.

    Attributes:
        late: it does not answer.
    """

    def __init__(self, message: str, late: bool) -> None:
        super().__init__(message)
        self.late = late


class Failure(NamedTuple):
    """The first rank that failed: its number, its exit status and why; the traceback of a fault of ours."""

    rank: int
    status: int
    said: str
    trace: str = ""


LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What torch's launchers tell each rank, in its environment."""


def told() -> bool:
    """Whether torch's launcher has started this process."""
    return all(name in os.environ for name in LAUNCHED)


def launched() -> int:
    """How many ranks torch's launcher has started; 1 where none did.

    Raises:
        InputError: what stands in its place in the environment is nothing that a launcher sets.
    """
    if not told():
        return 1
    world = number_in("WORLD_SIZE", 1)
    number_in("RANK", 0, world - 1)
    number_in("LOCAL_RANK", 0, world - 1)
    number_in("MASTER_PORT", 1, 65_535)
    return world


def number_in(name: str, least: int, most: int | None = None) -> int:
    """A number that a launcher sets in the environment. Raises: InputError: it is another."""
    text = os.environ[name]
    right = text.isdecimal() and int(text) >= least and (most is None or int(text) <= most)
    problem = f"is no number from {least}" + ("" if most is None else f" to {most}")
    require(right, name, text, problem, "Start the command by devices=N or torchrun, which set it, or unset it.")
    return int(text)


__all__ = ["RankFailed", "RankLost", "launched", "told"]

T = TypeVar("T")

NOTES = "ALIGN_RANK_NOTES"
"""In the environment of a rank that `devices=` started: a folder in which it notes where it stands."""
SPOKEN, LOST, RUN = "spoken", "lost", "run"
"""Notes there: the exit status of the rank that said why all of them end; what one says of a rank that is gone; the
run's folder."""
INTERRUPTED = 130
QUIET = {"TORCH_CPP_LOG_LEVEL": "FATAL", "TORCH_SHOW_CPP_STACKTRACES": "0"}
"""A rank that ends takes its connections along, of which the others' C++ would write pages."""
FAILED, TOLD = "failed", "told"
CLOSED = (
    "Connection closed", "Connection reset", "Connection was likely closed", "Broken pipe", "remote process exited",
    "unhandled system error",
)  # fmt: skip
LATE = ("imed out", "imeout")
"""What gloo's and NCCL's errors say where another rank is gone, and where it does not answer."""
LOOK_S, HEARD_S = 0.1, 3.0
BUCKET = 1 << 24
"""Elements that are summed at once."""


@dataclass(frozen=True)
class Here:
    """This process among the others.

    Attributes:
        rank, world: its number, from 0, and how many there are.
        local_rank: its number on this machine.
        store: torch's key-value store that all ranks share.
    """

    rank: int
    world: int
    local_rank: int
    store: Any


_here: Here | None = None
_control: Any = None  # the group of processes that objects go through; None is the default one
_stage = "starts"


def rank() -> int:
    """The number of this process, from 0."""
    return _here.rank if _here else 0


def world() -> int:
    """How many there are."""
    return _here.world if _here else 1


def local_rank() -> int:
    """The number of this process among those of its machine."""
    return _here.local_rank if _here else 0


def alone() -> bool:
    """Whether there is no other rank."""
    return _here is None


def is_main() -> bool:
    """Whether this rank writes."""
    return rank() == 0


def meet() -> None:
    """Connect to the other ranks' store, where a launcher has started several."""
    global _here
    if _here or not told():
        return
    launched()  # which refuses what no launcher says
    os.environ |= {name: value for name, value in QUIET.items() if name not in os.environ}  # before torch looks
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    store, number, world = next(iter(rendezvous("env://")))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # of torchrun's --max-restarts
    _here = Here(number, world, int(os.environ["LOCAL_RANK"]), PrefixStore(f"align/{attempt}", store))
    at("starts")
    if number:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # the first rank prints it all
        logging.getLogger().addHandler(logging.NullHandler())


def join(device: str = "", timeout_s: float = 0.0) -> None:
    """Form the group of processes that work together.

    Args:
        device: the kind, `cpu` or `cuda`, that they compute on; the first rank tells the others.
        timeout_s: how long a rank waits for the others before it ends; likewise.

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
        _here.store.set(TOLD, json.dumps([device, timeout_s]))
    while not _here.store.check([TOLD]):  # a bare `get` would hear neither a signal nor that the first rank has failed
        if _here.store.check([FAILED]):
            raise AlignError("rank 0 failed")  # `cause` knows why
        time.sleep(LOOK_S)
    device, timeout_s = json.loads(_here.store.get(TOLD))
    if device == "cuda":
        there = torch.cuda.device_count()
        if _here.local_rank >= there:
            raise InputError(
                "devices", os.environ.get("LOCAL_WORLD_SIZE", ""), f"this machine has {there} GPUs, and a rank needs "
                "one of its own", f"Use devices={there}.",
            )  # fmt: skip
        torch.cuda.set_device(_here.local_rank)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", timeout=timedelta(seconds=timeout_s),
        store=PrefixStore("group", _here.store), rank=_here.rank, world_size=_here.world,
    )  # fmt: skip
    _control = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s)) if device == "cuda" else None


def leave() -> None:
    """Let go of the group, at the end of a run that went well."""
    if _here is not None:
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()


# What they tell each other. Every rank has to call the same function.


def from_main(value: T) -> T:
    """The first rank's `value`, on every rank."""
    if _here is None:
        return value
    import torch.distributed as dist

    held = [value]
    with waiting("for the first rank"):
        dist.broadcast_object_list(held, src=0, group=_control)
    return held[0]


def wait() -> None:
    """Until every rank is here."""
    from_main(None)


def dealt(items: Sequence[T]) -> Sequence[T]:
    """This rank's share of `items`: each W-th, beginning with its own number."""
    return items if _here is None else items[_here.rank :: _here.world]


def gathered(mine: Sequence[T], count: int) -> Sequence[T]:
    """What every rank found for its share of `count` items, in the order of the items. Tensors are on the CPU."""
    if _here is None:
        return mine
    import torch.distributed as dist

    parts: list[Any] = [None] * _here.world
    with waiting("for the shares of the others"):
        dist.all_gather_object(parts, list(mine), group=_control)
    found: list[Any] = [None] * count
    for number, part in enumerate(parts):
        found[number :: _here.world] = part
    return found


def of_all(value: T) -> list[T]:
    """Every rank's `value`, by rank."""
    return list(gathered([value], world()))


def sum_gradients(parameters: Iterable[Tensor]) -> None:
    """Put the sum of all ranks' gradients into each rank's. A parameter that has none anywhere stays without."""
    if _here is None:
        return
    import torch
    import torch.distributed as dist

    every = list(parameters)
    with waiting("for the gradients of the others"), torch.no_grad():
        there = torch.tensor([p.grad is not None for p in every], dtype=torch.int32, device=every[0].device)
        dist.all_reduce(there, dist.ReduceOp.MAX)
        held = [p for p, some in zip(every, there.tolist(), strict=True) if some]
        for bucket in in_buckets(held):
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
            flat = torch.cat([grad.reshape(-1) for grad in grads])
            dist.all_reduce(flat)
            for p, part in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
                p.grad = part.view_as(p).clone()


def in_buckets(parameters: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Parameters of one dtype, about as many as are worth a message, in their order."""
    bucket: list[Tensor] = []
    elements = 0
    for parameter in parameters:
        elements += parameter.numel()
        if bucket and (elements > BUCKET or bucket[0].dtype != parameter.dtype):
            yield bucket
            bucket, elements = [], parameter.numel()
        bucket.append(parameter)
    if bucket:
        yield bucket


# Where each stands, and what becomes of all when one of them fails.


def at(where: str) -> None:
    """Note where this rank stands, for whoever asks once it answers no more."""
    global _stage
    if _here is None:
        return
    _stage = where
    note(where)


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Around a message to the others: noted, so that a rank that never comes can be told from those that wait."""
    note(f"{_stage}, waits {what}")
    yield
    note(_stage)


def note(where: str) -> None:
    """Tell the store, and the launcher."""
    assert _here is not None
    _here.store.set(f"at/{_here.rank}", json.dumps([time.time(), where]))
    tell_launcher(f"rank-{_here.rank}", where)


def tell_launcher(name: str, text: str) -> None:
    """Write a note for the launcher of ours, where it started this rank; whole, whenever this rank is killed."""
    if folder := os.environ.get(NOTES):
        with suppress(OSError):
            part = Path(folder, f".{name}")
            part.write_text(text, encoding="utf-8")
            part.replace(Path(folder, name))


def standing() -> str:
    """Where each rank was seen last."""
    assert _here is not None
    said, now = [], time.time()
    for number in range(_here.world):
        key = f"at/{number}"
        seen, where = json.loads(_here.store.get(key)) if _here.store.check([key]) else (now, "has not started")
        said.append(f"rank {number}: {where} (since {max(0.0, now - seen):.0f} s)")
    return "; ".join(said)


def cause(error: BaseException) -> BaseException:
    """What this rank ends with: `error`, where it is the first of all ranks that fails; else what that one said."""
    if _here is None or isinstance(error, RankFailed):
        return error
    found = lost(error) or error
    first = first_failure(found)
    if first.rank == _here.rank:
        return found
    if first.status == INTERRUPTED:
        return found if isinstance(found, KeyboardInterrupt) else KeyboardInterrupt()
    return RankFailed(f"rank {first.rank}: {first.said}", first.status, first.trace)


def first_failure(error: BaseException) -> Failure:
    """That of this rank, unless another was faster."""
    assert _here is not None
    interrupted = isinstance(error, KeyboardInterrupt)
    status = INTERRUPTED if interrupted else getattr(error, "exit_status", 1)
    ours = not interrupted and not isinstance(error, AlignError)
    said = "interrupted" if interrupted else readable(repr(error) if ours else str(error))
    trace = readable("".join(traceback.format_exception(error))) if ours else ""
    mine = Failure(_here.rank, status, said, trace)
    try:
        first = Failure(*json.loads(_here.store.compare_set(FAILED, "", json.dumps(mine))))
        _here.store.set(f"heard/{_here.rank}", "")
        return first
    except Exception:  # the store has gone with the launcher
        return mine


def until_heard() -> None:
    """Give the others the time to ask why this rank failed, where it failed before they worked together: the store may
    end with it."""
    import torch.distributed as dist

    if _here is not None and not dist.is_initialized():
        with suppress(Exception):
            _here.store.wait([f"heard/{number}" for number in range(_here.world)], timedelta(seconds=HEARD_S))


def lost(error: BaseException) -> RankLost | None:
    """The error of a message to another rank, as what it means; None of any other error."""
    if not isinstance(error, RuntimeError):
        return None
    text = str(error)
    late = any(words in text for words in LATE)
    if not late and not any(words in text for words in CLOSED):
        return None
    with suppress(Exception):
        where = standing()
        what = "a rank did not answer in time (ddp_timeout)" if late else "a rank ended without a word"
        return RankLost(f"{what}. {where}. Run the same command again to continue", late)
    return RankLost("the other ranks are gone. Run the same command again to continue", late)


@contextmanager
def together() -> Iterator[None]:
    """What fails inside is what the first rank that failed says."""
    try:
        yield
    except BaseException as error:
        first = cause(error)
        if first is error:
            raise
        raise first from error


def speaks(error: BaseException) -> bool:
    """Whether this rank prints `error`: of all of them one does. Of a rank that is gone and of an interruption its
    launcher speaks, where that is ours."""
    if _here is None:
        return True
    ours = NOTES in os.environ
    if isinstance(error, RankFailed) or first_failure(error).rank != _here.rank:
        return False
    if ours and isinstance(error, KeyboardInterrupt):
        return False
    if ours and isinstance(error, RankLost) and not error.late:
        tell_launcher(LOST, str(error))
        return False
    tell_launcher(SPOKEN, str(getattr(error, "exit_status", 1)))
    return True
