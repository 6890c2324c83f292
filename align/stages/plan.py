"""`stage=plan`: predict the memory, GPUs, disk space and time that another stage needs. It makes no run, and loads
weights only if `stage.measure=true`.

    resolve what the stage would start from
    predict the bytes of each role in each phase; the peak is the largest phase
    find the graphics cards on which that fits, and the settings to change for the others
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from align import ranks
from align.config.root import Config
from align.config.scorers import build_reward_spec
from align.config.settings import replace_values
from align.config.training import require_divisible_batch
from align.core.errors import MissingArtifact
from align.core.files import parse_user_path
from align.models.architectures import refuse_unsupported_type
from align.models.base import BASE, BUILT_IN, choose_method, find_adapter_folder, find_base
from align.models.lora import read_saved_settings
from align.planning.gpus import CONTEXT, GB, GPUS, USABLE, Gpu, compute_usable_bytes, find_changes_to_fit
from align.planning.memory import Footprint, Workload, build_workload, predict_disk_bytes, predict_footprint
from align.planning.shapes import Shape, read_shape
from align.report.figure_text import align_columns
from align.reward.inputs import iter_leaf_rewards
from align.run import Artifact, Base, hub_config, model_config, resolve

RESIDENT_FACTOR = 1.5
"""Estimated resident memory of a training process on a CPU, as a multiple of the bytes of its tensors."""
LIBRARIES_GB = 0.7
"""Estimated memory of the libraries that a training process on a CPU loads, in GB."""


@dataclass(frozen=True, slots=True)
class PlannedStart:
    """The base model, the settings and the number of reward models from which a planned run would start.

    Attributes:
        config: the configuration with the resolved method and the settings of the adapter that training continues.
        starts_from_adapter: True if the run starts from an adapter.
        reward_model_count: number of reward models on the policy's base.
        notes: assumptions of the plan, a sentence each.
    """

    config: Config
    base: Base
    starts_from_adapter: bool
    reward_model_count: int
    notes: tuple[str, ...]

    def build_workload(self, shape: Shape, on_gpu: bool) -> Workload:
        return build_workload(
            self.config,
            shape.context,
            ranks=(self.config.devices or 1) if ranks.is_alone() else ranks.world_size(),
            from_adapter=self.starts_from_adapter,
            rewards=self.reward_model_count,
            on_gpu=on_gpu,
        )


def plan(config: Config) -> Iterator[str]:
    """Yield lines of text that predict the memory, GPUs, disk space and time of a training stage, without running it.

    With `stage.measure=true`, each phase runs once for comparison.
    """
    require_divisible_batch(config.stage, config.devices or 1)
    start = find_planned_start(config)
    config = start.config
    shape = read_shape(start.base)
    cuda = config.device.startswith("cuda") or config.stage.card is not None
    # Looked up without torch, whose import takes longer than the whole plan.
    cuda = cuda or (config.device == "auto" and any(Path("/dev").glob("nvidia[0-9]*")))
    work = start.build_workload(shape, cuda)
    prediction = predict_footprint(shape, work)
    yield describe_workload(start, shape, work)
    yield from (f"  {note}" for note in start.notes)
    if work.remote:
        yield "  vLLM's servers take memory of their own: most of a GPU, if rollout.args does not say otherwise"
    yield from format_memory(prediction)
    if config.stage.measure:
        yield from compare_with_measurement(start, work, prediction)
    if not cuda:
        resident = format_bytes(RESIDENT_FACTOR * prediction.peak + LIBRARIES_GB * GB)
        yield f"the process: about {resident} ({RESIDENT_FACTOR} times its tensors, and {LIBRARIES_GB} GB of libraries)"
    yield from describe_gpus(start, shape)
    yield from describe_disk_and_time(start.config, shape, work)


PRINTS: Mapping[str, Callable[[Config], Iterator[str]]] = MappingProxyType({"plan": plan})


def find_planned_start(config: Config) -> PlannedStart:
    """Resolve the artifact of `init=` to a base model and settings; if it does not exist yet, assume them and add a
    note.

    Raises:
        InputError: a model or a reference cannot be read, or the method contradicts the artifact.
    """
    root = config.run.folder
    notes: list[str] = []
    artifact = None if config.init == BASE else find_artifact(config.init, root, "init")
    if artifact is None:
        base = locate_base(config)
        name = "qlora" if config.method.name == "auto" else config.method.name
        from_adapter = config.init != BASE and name != "full" and config.stage.name != "full"
        if config.init != BASE:
            assumed = "an adapter of the settings of method=" if from_adapter else "the base itself"
            notes.append(f"init={config.init} is not there yet: planned from {assumed}")
    else:
        name = choose_method(artifact, config.method.name, "init")
        from_adapter = find_adapter_folder(artifact) is not None
        base = locate_base(config) if config.model.path else (artifact.base or locate_base(config))
        base = replace(base, path=str(artifact.path)) if artifact.whole else base
    method = replace_values(config.method, name=name)
    if artifact is not None and from_adapter:
        saved = read_saved_settings(artifact.path)
        sizes = {key: saved[key] for key, kind in (("r", int), ("targets", list)) if isinstance(saved[key], kind)}
        method = replace_values(method, **sizes)
    config = replace_values(config, method=method)
    rewards = 0
    if config.stage.name == "ppo":
        for field, leaf in iter_leaf_rewards(build_reward_spec(config.reward)):
            if leaf["name"] == "learned":
                model = find_artifact(leaf["ref"], root, field)
                on_base = model is None or model.base is None or not base.digest or model.base.digest == base.digest
                if on_base:
                    rewards += 1
                else:
                    notes.append(f"{field}={leaf['ref']} is on a base of its own, which is not counted")
    return PlannedStart(config, base, from_adapter, rewards, tuple(notes))


def find_artifact(ref: str, root: Path, field: str) -> Artifact | None:
    """Return the artifact for a reference such as `sft:latest`, or None if it does not exist yet."""
    try:
        return resolve(ref, root, None, field)
    except MissingArtifact:
        return None


def locate_base(config: Config) -> Base:
    """Return the base model that `model=` names, downloading only `config.json` of a model on the hub.

    Raises:
        InputError: the model does not exist or its architecture is not supported.
    """
    name = config.model.path or "pocket"
    revision = config.model.revision
    folder = parse_user_path(name, "model.path")
    if name in BUILT_IN or (name.startswith((".", "/", "~")) and not folder.is_dir()):
        return find_base(name, revision)  # raises InputError for a missing folder
    if not folder.is_dir():
        folder = hub_config(name, revision, "model.path")
    refuse_unsupported_type(model_config(folder, "model.path", name), name)
    return Base(name, str(folder.absolute()), revision, "")


def describe_workload(start: PlannedStart, shape: Shape, work: Workload) -> str:
    """Return one line of text about the stage, model, method, dtype and micro-batch of the planned run."""
    rows = {"reward": f"rankings of {work.texts} answers", "dpo": "pairs", "kto": "answers"}.get(work.stage, "rows")
    prompt = f" ({work.prompt} of the prompt)" if work.prompt else ""
    checkpointing = ", activations computed again" if work.recompute else ""
    device = "a GPU" if work.cuda else "a CPU"
    return (
        f"stage={work.stage} on {start.base.id} ({shape.weights / 1e6:,.1f} million weights): method={work.method} in "
        f"{work.dtype} on {device}, {work.micro_batch} {rows} of {work.length} tokens{prompt} at once{checkpointing}"
    )


def format_memory(prediction: Footprint) -> Iterator[str]:
    """Yield the lines of a table with the bytes of each model and buffer in each phase, then totals and peak."""
    rows = [("always", part.role, part.what, format_bytes(part.bytes)) for part in prediction.always]
    for phase in prediction.phases:
        rows += [(phase.name, part.role, part.what, format_bytes(part.bytes)) for part in phase.parts if part.bytes]
    yield from format_table(("when", "role", "what", "bytes"), rows)
    totals = ", ".join(f"{phase.name} {format_bytes(prediction.standing + phase.bytes)}" for phase in prediction.phases)
    yield f"in all: {totals}; the peak is in the {prediction.largest.name}: {format_bytes(prediction.peak)}"


def compare_with_measurement(start: PlannedStart, work: Workload, prediction: Footprint) -> Iterator[str]:
    """Run each phase of a training step once, and yield the lines of a table of predicted and measured peak memory."""
    from align.models.load import choose_device

    config = start.config
    device = choose_device("auto" if config.stage.card is not None else config.device)
    base = find_base(config.model.path, config.model.revision) if not start.base.digest else start.base
    if work.stage == "ppo":
        from align.ppo.measured_update import measure_update

        peaks = measure_update(base, work, device)
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
        peaks = measure_steps(base, work, training, device)
    rows = [
        (
            phase,
            format_bytes(prediction.get_phase_bytes(phase)),
            format_bytes(peak),
            f"{prediction.get_phase_bytes(phase) / peak - 1:+.1%}",
        )
        for phase, peak in peaks.items()
    ]
    yield from format_table(("phase", "predicted", "measured", "off by"), rows)
    peak = max(peaks.values())
    error = f"{prediction.peak / peak - 1:+.1%}"
    yield f"peak: predicted {format_bytes(prediction.peak)}, measured {format_bytes(peak)} ({error})"


def describe_gpus(start: PlannedStart, shape: Shape) -> Iterator[str]:
    """Yield the lines of a table of GPUs that says for each if the run fits, or which settings make it fit."""
    config = start.config
    gpus = GPUS if config.stage.card is None else (Gpu(config.stage.card, "as given"),)
    work = start.build_workload(shape, on_gpu=True)
    peak = predict_footprint(shape, work).peak
    rows = [(f"{gpu.gb:g} GB", gpu.names, describe_fit(shape, work, gpu.gb)) for gpu in gpus]
    margin = f"of a card {CONTEXT:g} GB is CUDA's, and {USABLE:.0%} of the rest usable"
    yield f"on a GPU ({work.dtype}): {format_bytes(peak)}; {margin}"
    yield from format_table(("card", "such as", "does it fit?"), rows)
    is_sharded = work.method == "full" and work.stage != "ppo"
    sharding = "weights, gradients and moments are divided (FSDP2)" if is_sharded else "each holds all of this"
    yield f"on each of {work.ranks} GPUs: {sharding}" if work.ranks > 1 else f"on several GPUs: {sharding}"
    base_bytes = predict_footprint(shape, replace(work, method="qlora")).always[0].bytes  # of the base in 4 bits
    if any(row[-1] == NO_FIT for row in rows) and base_bytes > compute_usable_bytes(24):
        yield f"the base alone takes {format_bytes(base_bytes)}, and align does not divide a base over several cards"


NO_FIT = "no: no setting that could be changed is enough"


def describe_fit(shape: Shape, work: Workload, gb: float) -> str:
    """Return `yes` if the planned run fits a GPU of `gb` GB, else the settings that make it fit, or `NO_FIT`."""
    changes = find_changes_to_fit(shape, work, compute_usable_bytes(gb))
    if changes is None:
        return NO_FIT
    return f"add {' '.join(changes)}" if changes else "yes"


def describe_disk_and_time(config: Config, shape: Shape, work: Workload) -> Iterator[str]:
    """Yield lines about the disk space of the artifact and checkpoints, and the time at `stage.throughput` tokens/s."""
    checkpoints = getattr(config.stage, "checkpoints", 2)
    checkpoint_bytes, artifact_bytes = predict_disk_bytes(shape, work)
    running_bytes = (checkpoints + 1) * checkpoint_bytes
    yield (
        f"on disk: {format_bytes(artifact_bytes)} for the artifact; during the run {format_bytes(running_bytes)} more "
        f"({checkpoints} checkpoints and the one that is written)"
    )
    throughput = config.stage.throughput
    if throughput is None:
        return
    total = ""
    if work.stage == "ppo":
        step = "an update"
        seconds = config.stage.batch_size * work.answer / throughput
        if updates := config.stage.updates:
            total = f", {updates} updates {format_duration(updates * seconds)}"
    else:
        step = "a step"
        seconds = config.stage.batch_size * work.texts * work.length / throughput
    yield f"at {throughput:g} tokens a second: {step} of full rows takes {format_duration(seconds)}{total}"


def format_bytes(count: float) -> str:
    return f"{format_number(count / 1e9)} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


TIME_UNITS = (("years", 31_557_600), ("days", 86_400), ("hours", 3600), ("minutes", 60))
"""Name of each unit of time, and its length in seconds, longest first."""


def format_duration(seconds: float) -> str:
    """Format a duration in the largest unit of time of which it has at least two, such as `2.5 hours`."""
    for unit, unit_seconds in TIME_UNITS:
        if seconds >= 2 * unit_seconds:
            return f"{format_number(seconds / unit_seconds)} {unit}"
    return f"{seconds:.1f} s" if seconds >= 0.1 else f"{seconds:.1g} s"


def format_number(number: float) -> str:
    return f"{number:,.1f}" if number < 1e6 else f"{number:.1e}"


def format_table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> Iterator[str]:
    yield from (f"  {line}" for line in align_columns([columns, *rows]))
