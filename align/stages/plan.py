"""What another stage would take, before anything is loaded: memory, GPUs, disk and time. It makes no run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from align import ranks
from align.config.root import Config
from align.config.scorers import build_reward_spec
from align.config.settings import replace_values
from align.config.training import check_ranks
from align.core.errors import MissingArtifact
from align.core.files import parse_user_path
from align.models.architectures import refuse
from align.models.base import BASE, BUILT_IN, adapter_folder, choose_method, find_base
from align.models.lora import saved_settings
from align.planning.gpus import CONTEXT, GB, GPUS, USABLE, Gpu, changes_to_fit, room_on
from align.planning.memory import Footprint, Workload, build_workload, disk_bytes, footprint
from align.planning.shapes import Shape, shape_of
from align.report.figure_text import align_columns
from align.reward.inputs import iter_leaf_rewards
from align.run import Artifact, Base, hub_config, model_config, resolve

RESIDENT_FACTOR = 1.5
"""A process on a CPU holds about so many times the bytes of its tensors."""
LIBRARIES_GB = 0.7
"""GB of libraries in a process on a CPU."""


@dataclass(frozen=True, slots=True)
class PlannedStart:
    """What a plan starts from.

    Attributes:
        config: with the method and the adapter's settings that it goes on with.
        from_adapter: it starts from an adapter.
        rewards: reward models on its base.
        notes: assumptions, a sentence each.
    """

    config: Config
    base: Base
    from_adapter: bool
    rewards: int
    notes: tuple[str, ...]

    def workload(self, shape: Shape, cuda: bool) -> Workload:
        config = self.config
        return build_workload(
            config,
            shape.context,
            ranks=(config.devices or 1) if ranks.is_alone() else ranks.world_size(),
            from_adapter=self.from_adapter,
            rewards=self.rewards,
            cuda=cuda,
        )


def plan(config: Config) -> Iterator[str]:
    """Yield the lines that are printed."""
    check_ranks(config.stage, config.devices or 1)
    start = find_planned_start(config)
    config, shape = start.config, shape_of(start.base)
    cuda = config.device.startswith("cuda") or config.stage.card is not None
    # Asked without torch, whose import takes longer than all the rest.
    cuda = cuda or (config.device == "auto" and any(Path("/dev").glob("nvidia[0-9]*")))
    work = start.workload(shape, cuda)
    found = footprint(shape, work)
    yield heading(start, shape, work)
    yield from (f"  {note}" for note in start.notes)
    if work.remote:
        yield "  vLLM's servers take memory of their own: most of a GPU, if rollout.args does not say otherwise"
    yield from memory(found)
    if config.stage.measure:
        yield from beside(start, work, found)
    if not cuda:
        held = size(RESIDENT_FACTOR * found.peak + LIBRARIES_GB * GB)
        yield f"the process: about {held} ({RESIDENT_FACTOR} times its tensors, and {LIBRARIES_GB} GB of libraries)"
    yield from fits(start, shape)
    yield from disk_and_time(start.config, shape, work)


PRINTS: Mapping[str, Callable[[Config], Iterator[str]]] = MappingProxyType({"plan": plan})


def find_planned_start(config: Config) -> PlannedStart:
    """Return what a run of this configuration would start from: what is there, or what its commands would make.

    Raises:
        InputError: a model or a reference that cannot be read, or a method that contradicts what is there.
    """
    root = config.run.folder
    notes: list[str] = []
    artifact = None if config.init == BASE else find_artifact(config.init, root, "init")
    if artifact is None:
        base = locate_base(config)
        name = "qlora" if config.method.name == "auto" else config.method.name
        from_adapter = config.init != BASE and name != "full" and config.stage.name != "full"
        if config.init != BASE:
            what = "an adapter of the settings of method=" if from_adapter else "the base itself"
            notes.append(f"init={config.init} is not there yet: planned from {what}")
    else:
        name = choose_method(artifact, config.method.name, "init")
        from_adapter = adapter_folder(artifact) is not None
        base = locate_base(config) if config.model.path else (artifact.base or locate_base(config))
        base = replace(base, path=str(artifact.path)) if artifact.whole else base
    method = replace_values(config.method, name=name)
    if artifact is not None and from_adapter:
        saved = saved_settings(artifact.path)
        sizes = {key: saved[key] for key, kind in (("r", int), ("targets", list)) if isinstance(saved[key], kind)}
        method = replace_values(method, **sizes)
    config = replace_values(config, method=method)
    rewards = 0
    if config.stage.name == "ppo":
        for field, leaf in iter_leaf_rewards(build_reward_spec(config.reward)):
            if leaf["name"] == "learned":
                model = find_artifact(leaf["ref"], root, field)
                shares = model is None or model.base is None or not base.digest or model.base.digest == base.digest
                rewards += shares
                notes += [] if shares else [f"{field}={leaf['ref']} is on a base of its own, which is not counted"]
    return PlannedStart(config, base, from_adapter, rewards, tuple(notes))


def find_artifact(ref: str, root: Path, field: str) -> Artifact | None:
    """Return what a reference names. Returns None if it is not there yet."""
    try:
        return resolve(ref, root, None, field)
    except MissingArtifact:
        return None


def locate_base(config: Config) -> Base:
    """Return the base that `model=` names by its `config.json`, without its weights. From the hub nothing else is
    fetched.

    Raises:
        InputError: there is none.
    """
    name, revision = config.model.path or "pocket", config.model.revision
    folder = parse_user_path(name, "model.path")
    if name in BUILT_IN or (name.startswith((".", "/", "~")) and not folder.is_dir()):
        return find_base(name, revision)  # which says what is wrong
    if not folder.is_dir():
        folder = hub_config(name, revision, "model.path")
    refuse(model_config(folder, "model.path", name), name)
    return Base(name, str(folder.absolute()), revision, "")


def heading(start: PlannedStart, shape: Shape, work: Workload) -> str:
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


def beside(start: PlannedStart, work: Workload, found: Footprint) -> Iterator[str]:
    """Yield the phases as they were measured, beside their prediction."""
    from align.models.load import choose_device

    config = start.config
    device = choose_device("auto" if config.stage.card is not None else config.device)
    base = find_base(config.model.path, config.model.revision) if not start.base.digest else start.base
    if work.stage == "ppo":
        from align.ppo.measured_update import measure_update

        counts = measure_update(base, work, device)
    else:
        from align.trainers.common import Training
        from align.trainers.measured_steps import measure_steps

        training = replace(
            Training.from_settings(config.stage, config.seed),
            gradient_checkpointing="true" if work.recompute else "false",
            lr=0.0,
            warmup=0.0,
            max_steps=None,
            schedule="constant",
        )
        counts = measure_steps(base, work, training, device)
    rows = [
        (name, size(found.at(name)), size(count), f"{found.at(name) / count - 1:+.1%}")
        for name, count in counts.items()
    ]
    yield from table(("phase", "predicted", "measured", "off by"), rows)
    most = max(counts.values())
    yield f"peak: predicted {size(found.peak)}, measured {size(most)} ({found.peak / most - 1:+.1%})"


def fits(start: PlannedStart, shape: Shape) -> Iterator[str]:
    """On which cards it fits, and what to add to the line where it does not."""
    config = start.config
    gpus = GPUS if config.stage.card is None else (Gpu(config.stage.card, "as given"),)
    work = start.workload(shape, cuda=True)
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
    yield from (f"  {line}" for line in align_columns([columns, *rows]))
