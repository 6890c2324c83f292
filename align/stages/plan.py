"""What another stage would take, before anything is loaded: memory, cards, disk and time. It makes no run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType

from align.config.root import Config
from align.config.training import check_ranks
from align.models.base import find_base
from align.planning.disk import disk_bytes
from align.planning.gpus import CONTEXT, GB, GPUS, USABLE, Gpu, changes_to_fit, room_on
from align.planning.memory import footprint
from align.planning.shapes import Shape, shape_of
from align.planning.workload import Footprint, Workload
from align.stages.footprint import Planned, gpu_here, planned, workload_of

RESIDENT, LIBRARIES = 1.5, 0.7
"""A process on a CPU holds about so many times the bytes of its tensors, and GB of libraries besides."""


def plan(config: Config) -> Iterator[str]:
    """The lines that are printed."""
    check_ranks(config.stage, config.devices or 1)
    start = planned(config)
    config, shape = start.config, shape_of(start.base)
    cuda = config.device.startswith("cuda") or config.stage.card is not None
    cuda = cuda or (config.device == "auto" and gpu_here())
    work = workload_of(config, shape, start.from_adapter, start.rewards, cuda)
    found = footprint(shape, work)
    yield heading(start, shape, work)
    yield from (f"  {note}" for note in start.notes)
    if work.remote:
        yield "  vLLM's servers take memory of their own: most of a GPU, if rollout.args does not say otherwise"
    yield from memory(found)
    if config.stage.measure:
        yield from beside(start, work, found)
    if not cuda:
        held = size(RESIDENT * found.peak + LIBRARIES * GB)
        yield f"the process: about {held} ({RESIDENT} times its tensors, and {LIBRARIES} GB of libraries)"
    yield from fits(start, shape)
    yield from disk_and_time(start.config, shape, work)


PRINTS: Mapping[str, Callable[[Config], Iterator[str]]] = MappingProxyType({"plan": plan})


def heading(start: Planned, shape: Shape, work: Workload) -> str:
    rows = {"reward": f"rankings of {work.texts} answers", "dpo": "pairs", "kto": "answers"}.get(work.stage, "rows")
    of = f" ({work.prompt} of the prompt)" if work.prompt else ""
    layers = ", activations computed again" if work.recompute else ""
    where = "a GPU" if work.cuda else "a CPU"
    return (
        f"stage={work.stage} on {start.base.id} ({shape.weights / 1e6:,.1f} million weights): method={work.method} in "
        f"{work.dtype} on {where}, {work.micro_batch} {rows} of {work.length} tokens{of} at once{layers}"
    )


def memory(found: Footprint) -> Iterator[str]:
    """Each role's part, each phase's, and where the peak is."""
    rows = [("always", part.role, part.what, size(part.bytes)) for part in found.always]
    for phase in found.phases:
        rows += [(phase.name, part.role, part.what, size(part.bytes)) for part in phase.parts if part.bytes]
    yield from table(("when", "role", "what", "bytes"), rows)
    each = ", ".join(f"{phase.name} {size(found.standing + phase.bytes)}" for phase in found.phases)
    yield f"in all: {each}; the peak is in the {found.largest.name}: {size(found.peak)}"


def beside(start: Planned, work: Workload, found: Footprint) -> Iterator[str]:
    """The phases as they were measured, beside their prediction."""
    from align.models.load import choose_device
    from align.stages.measuring import measured, training_of

    config = start.config
    device = choose_device("auto" if config.stage.card is not None else config.device)
    base = find_base(config.model.path, config.model.revision) if not start.base.digest else start.base
    counts = measured(base, work, training_of(work, config), device)
    rows = [
        (name, size(found.at(name)), size(count), f"{found.at(name) / count - 1:+.1%}")
        for name, count in counts.items()
    ]
    yield from table(("phase", "predicted", "measured", "off by"), rows)
    most = max(counts.values())
    yield f"peak: predicted {size(found.peak)}, measured {size(most)} ({found.peak / most - 1:+.1%})"


def fits(start: Planned, shape: Shape) -> Iterator[str]:
    """On which cards it fits, and what to add to the line where it does not."""
    config = start.config
    gpus = GPUS if config.stage.card is None else (Gpu(config.stage.card, "as given"),)
    work = workload_of(config, shape, start.from_adapter, start.rewards, cuda=True)
    need = footprint(shape, work).peak
    rows = [(f"{gpu.gb:g} GB", gpu.names, verdict(shape, work, gpu.gb)) for gpu in gpus]
    margin = f"of a card {CONTEXT:g} GB is CUDA's, and {USABLE:.0%} of the rest usable"
    yield f"on a GPU ({work.dtype}): {size(need)}; {margin}"
    yield from table(("card", "such as", "does it fit?"), rows)
    sharded = work.method == "full" and work.stage != "ppo"
    shared = "weights, gradients and moments are divided (FSDP2)" if sharded else "each holds all of this"
    yield f"on each of {work.ranks} GPUs: {shared}" if work.ranks > 1 else f"on several GPUs: {shared}"
    if any(row[-1] == NOTHING for row in rows) and base_alone(shape, work) > room_on(24):
        alone = size(base_alone(shape, work))
        yield f"the base alone takes {alone}, and align does not divide a base over several cards"


NOTHING = "no: nothing that can be changed here is enough"


def verdict(shape: Shape, work: Workload, gb: float) -> str:
    words = changes_to_fit(shape, work, room_on(gb))
    if words is None:
        return NOTHING
    return f"add {' '.join(words)}" if words else "yes"


def base_alone(shape: Shape, work: Workload) -> float:
    """Bytes of the base in 4 bits, which every rank holds."""
    return footprint(shape, replace(work, method="qlora")).always[0].bytes


def disk_and_time(config: Config, shape: Shape, work: Workload) -> Iterator[str]:
    kept = getattr(config.stage, "checkpoints", 2)
    checkpoint, artifact = disk_bytes(shape, work)
    yield (
        f"on disk: {size(artifact)} when it is done; while it runs {size((kept + 1) * checkpoint)} more "
        f"({kept} checkpoints and the one that is written)"
    )
    if (speed := config.stage.throughput) is None:
        return
    if work.stage == "ppo":
        tokens, what, steps = config.stage.batch_size * work.answer, "an update", config.stage.updates
    else:
        tokens, what, steps = config.stage.batch_size * work.texts * work.length, "a step", None
    seconds = tokens / speed
    whole = f", {steps} updates {span(steps * seconds)}" if steps else ""
    yield f"at {speed:g} tokens a second: {what} of full rows takes {span(seconds)}{whole}"


def size(count: float) -> str:
    """Bytes in words."""
    return f"{digits(count / 1e9)} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


TIMES = (("years", 31_557_600), ("days", 86_400), ("hours", 3600), ("minutes", 60))


def span(seconds: float) -> str:
    """A time in words: the largest unit of which it has two."""
    for unit, length in TIMES:
        if seconds >= 2 * length:
            return f"{digits(seconds / length)} {unit}"
    return f"{seconds:.1f} s" if seconds >= 0.1 else f"{seconds:.1g} s"


def digits(number: float) -> str:
    """A number of a few digits, however large it is."""
    return f"{number:,.1f}" if number < 1e6 else f"{number:.1e}"


def table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(len(row[i]) for row in (columns, *rows)) for i in range(len(columns))]
    for row in (columns, *rows):
        yield "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
