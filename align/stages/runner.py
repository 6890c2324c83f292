"""The runner of stages: resolve the inputs, open the run's folder, run the stage, publish its outputs.

The modules of the stages import from here what they share: their inputs (`StageInputs`, `resolve_stage_start`), the
rollout engine, the annotation store and the metrics streams.
"""

from __future__ import annotations

import gc
import hashlib
import logging
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from align import ranks
from align.annotate.store import Store
from align.annotate.store.ledger import require_known_project
from align.annotate.store.preference_pairs import LoadPairs, load_preferences
from align.annotate.store.vote_selection import VoteSelection, find_pseudonyms, read_pseudonyms
from align.config.command import format_command_line, format_hydra_value
from align.config.groups import ALL_LINEAR
from align.config.rates import find_default_rate, find_size_class
from align.config.root import PARTS, Config, find_store_url, format_config, to_plain_dict
from align.config.settings import replace_values
from align.config.stages import STAGES
from align.config.training import require_held_out_rows
from align.core.errors import AlignError, InputError, make_printable, require
from align.core.redaction import RedactingFormatter, mask_secrets
from align.core.types import StageResult
from align.data.pairs import VoteSource, build_pair_inputs
from align.data.read.drops import collect_drop_counts
from align.data.sets.published import find_data_set
from align.data.sources import MANIFEST, DataSource, add_rankers
from align.data.trained_ids import choose_id_scheme, write_trained_ids
from align.mirrors import Artifact as MirroredArtifact
from align.mirrors import GuardedMirror, MirroredRun, open_mirror, require_installed
from align.models.base import build_run_label, resolve_start
from align.models.lora import read_saved_settings
from align.report.figure_labels import describe_small_samples
from align.report.figure_text import pluralize
from align.rollout.engine_process import VLLM, require_interpreter
from align.run import Artifact, Base, Input, Run, load_artifact, verify_outputs
from align.run.files import find_user_error
from align.run.weights import count_weights, is_reward_adapter
from align.stages import load_stage, preload
from align.stages.worker_rank import StartedRun
from align.track import Tracker, get_peak_gpu_mb, get_peak_memory, truncate_text, watch_progress

if TYPE_CHECKING:
    import torch

MIRROR: ContextVar[GuardedMirror | None] = ContextVar("MIRROR", default=None)


# Inputs


@dataclass(frozen=True, slots=True)
class StageInputs:
    """The inputs of a stage, such as its base model and data, resolved before the run has a name and without torch.

    So a finished run returns at once, and an invalid row is reported at once.

    Attributes:
        config: the configuration, with the settings that follow from the inputs, such as an adapter's method.
        label: the readable part of the run's derived name.
        base: the base weights; None for a stage without a model.
        records: the inputs of the run's manifest, by name.
        rows: reads the data. Its results are passed to the stage's `run` after the run and the configuration.
        again: see `align.run.Run.open`.
        trains: True if the stage trains on the first result of `rows`.
    """

    config: Config
    label: str
    base: Base | None
    records: dict[str, Input] = field(default_factory=dict)
    rows: Callable[[], tuple[Any, ...]] = tuple
    again: bool = False
    trains: bool = False


class StageStart(NamedTuple):
    """The adapter or model that a stage starts from, its base weights and the configuration that follows from it.

    Attributes:
        artifact: the adapter or whole model.
        base: the base weights that it belongs to.
        config: the configuration with the artifact's method and system prompt.
    """

    artifact: Artifact
    base: Base
    config: Config


def resolve_stage_start(config: Config, ref: str | None = None, field: str = "init") -> StageStart:
    """Resolve the reference to the adapter or model that a stage starts from, and copy its method into the
    configuration.

    The system prompt that it was trained with is copied too, unless `data.system` is set.

    Args:
        ref: reference of the artifact; None for the configuration's `field`.

    Raises:
        InputError: the artifact is a reward model and the stage is no export, or it is an adapter and method=full.
    """
    ref = ref if ref is not None else str(getattr(config, field))
    root = config.run.folder
    model = config.model
    start = resolve_start(ref, root, path=model.path, revision=model.revision, method=config.method.name, field=field)
    artifact = start.artifact
    if config.stage.name != "export" and not artifact.whole and is_reward_adapter(artifact.path):
        remedy = "Name an adapter of stage=sft, stage=dpo, stage=kto or stage=ppo."
        raise InputError(field, ref, "is a reward model, and no policy", remedy)
    method = replace_values(config.method, name=start.method)
    if field == "init" and not artifact.whole:
        if start.method != "full":
            method = merge_adapter_settings(method, artifact)
        elif config.stage.name != "sample":  # sampling does not train
            remedy = "Start from a whole model (init=full:latest, base, a folder or hub:ID), or drop method=."
            raise InputError("method", "full", f"{artifact.ref} is an adapter", remedy)
    system = artifact.manifest.config["data"].get("system") if artifact.manifest else None
    if config.data.system is None and system:  # a policy is used with the system prompt that it was trained with
        config = replace_values(config, data=replace_values(config.data, system=system))
    return StageStart(artifact, start.base, replace_values(config, method=method))


def build_judgement_inputs(
    config: Config, divide: Callable[..., tuple[Any, Any]], load_soft_pairs: LoadPairs
) -> StageInputs:
    """Resolve the inputs of a stage that trains on preference pairs (chosen, rejected) or on answers with a label.

    Args:
        divide: reads the records and returns the training and the held-out ones, see `align.data.pairs`.
        load_soft_pairs: `load_soft_preferences`. The stages pass it, because most stages need no model of annotators.
    """
    artifact, base, config = resolve_stage_start(config)
    source = DataSource.from_settings(config.data)
    store = find_store_url(config)
    inputs = build_pair_inputs(source, store, config.project)
    last_row = inputs["data"].seq if inputs["data"].seq >= 0 else None
    load_pairs = load_soft_pairs if config.data.soft_labels else load_preferences
    votes = VoteSource(store, config.project, VoteSelection.from_settings(config.data), last_row, load_pairs)

    def rows() -> tuple[Any, Any]:
        train_records, held_out_records = divide(source, votes, config.stage.held_out, config.seed)
        require_held_out_rows(config.stage.eval_every, len(held_out_records), "stage.held_out")
        return train_records, held_out_records

    records = {"init": artifact.as_input(), **inputs}
    return StageInputs(config, build_run_label(base, config.method.name), base, records, rows, trains=True)


def merge_adapter_settings(method: Any, adapter: Artifact) -> Any:
    """Return `method` with the LoRA rank, alpha, target modules and so on of the adapter that training continues.

    A setting that has another type in an adapter of another program keeps its default.

    Raises:
        InputError: the command line has other settings than the adapter.
    """
    saved = read_saved_settings(adapter.path)
    why = f"{adapter.ref} is an adapter already, and keeps its own settings"
    method.refuse_others(saved, why, "Drop it, or start from a whole model.")
    settings = {key: value for key, value in saved.items() if type(value) is type(getattr(method, key))}
    recorded = adapter.manifest.config["method"].get("targets") if adapter.manifest else None
    # A saved adapter lists its layers. If its run was configured with `all-linear`, so is this one.
    targets = ALL_LINEAR if recorded == ALL_LINEAR else saved["targets"]
    targets = targets if isinstance(targets, list) and targets else ALL_LINEAR
    return replace_values(method, **{**settings, "targets": targets})


def load_input_artifact(run: Run, name: str = "init") -> Artifact:
    """Return the adapter or model that the run's manifest lists as the input `name`, with its files verified."""
    record = run.inputs[name]
    return load_artifact(Path(record.path), record.ref)


def load_start(run: Run, config: Config) -> tuple[Artifact, Any]:
    """Return the artifact of `init=` and its tokenizer, with the configured chat template set. Loads no weights."""
    from align.data.chat.template import set_chat_template
    from align.models.load import load_own_tokenizer

    artifact = load_input_artifact(run)
    tokenizer = load_own_tokenizer(artifact, run.base)
    set_chat_template(tokenizer, config.data.template, config.data.template_kwargs)
    return artifact, tokenizer


class TrainingSetup(NamedTuple):
    """The initial artifact, its tokenizer, and the device, dtype and maximum row length for training.

    Attributes:
        artifact: the artifact of `init=`.
        tokenizer: its tokenizer, with the configured chat template.
        device: the device to train on.
        dtype: the dtype of the computation.
        max_length: maximum length of a row in tokens.
    """

    artifact: Artifact
    tokenizer: Any
    device: torch.device
    dtype: torch.dtype
    max_length: int


def load_training_setup(run: Run, config: Config) -> TrainingSetup:
    """Load the tokenizer of `init=`, and choose device, dtype and maximum row length for training. Loads no weights."""
    from align.models.load import choose_device, choose_dtype, get_context_length, read_configurations

    artifact, tokenizer = load_start(run, config)
    device = choose_device(config.device)
    max_length = min(config.data.max_length, get_context_length(read_configurations(run.base)))
    return TrainingSetup(artifact, tokenizer, device, choose_dtype(config.dtype, device), max_length)


def open_rollout_engine(
    run: Run, config: Config, base: Base, method: str, tokenizer: Any, generation_config: Any
) -> AbstractContextManager[Any]:
    """Open the rollout engine of `rollout=` on a base model, transformers or vLLM, as a context manager that closes it.

    Args:
        method: method by which the base is loaded, see `align.models.base.choose_frozen_method`.
    """
    from align.models.load import choose_device, choose_dtype
    from align.rollout.registry import open_engine

    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    return open_engine(
        run,
        config.rollout,
        base,
        method,
        dtype,
        device,
        tokenizer,
        generation_config,
        config.data.max_length,
        config.method.r,
    )


def collect_memory_metrics(run: Run, config: Config, longest_row: int, **sizes: int) -> dict[str, float]:
    """Return the peak memory that this process used so far, and the peak that `stage=plan` predicts, as metrics.

    Args:
        longest_row, sizes: see `align.planning.memory.predict_peak`.
    """
    from align.planning.memory import predict_peak

    return {**get_peak_memory(), **predict_peak(run, longest_row, config, **sizes)}


class ConfigWithRates(NamedTuple):
    """A configuration with its learning rates set, and a phrase on the origin of `stage.lr`.

    Attributes:
        config: the configuration.
        rate_origin: the origin of `stage.lr` in words; empty if the command line sets the rate or the stage has none.
    """

    config: Config
    rate_origin: str


def fill_learning_rates(config: Config, base: Base | None) -> ConfigWithRates:
    """Return the configuration with unset learning rates replaced by the default for the size of the base model.

    Args:
        base: the base weights; None for a stage without a model.
    """
    weights = None if base is None else count_weights(Path(base.path))
    method = config.method.name
    if config.method.lr is None:
        stage = "full" if method == "full" else "sft"
        config = replace_values(
            config, method=replace_values(config.method, lr=find_default_rate(stage, method, weights))
        )
    rates = {"lr": find_default_rate(config.stage.name, method, weights)}
    if config.stage.name in ("ppo", "verify"):
        rates["value_lr"] = find_default_rate("value", method, weights)
    defaults = {key: rate for key, rate in rates.items() if rate is not None and getattr(config.stage, key) is None}
    if not defaults:
        return ConfigWithRates(config, "")
    config = replace_values(config, stage=replace_values(config.stage, **defaults))
    rate_origin = f"default for {find_size_class(weights).title}" if "lr" in defaults else ""
    return ConfigWithRates(config, rate_origin)


def open_store(config: Config, create: bool = True) -> Store:
    """Open the annotation store `store.url`, a database of prompts, answers and votes.

    Args:
        create: create the store if it does not exist. An action that only reads passes False.
    """
    if create and config.store.url is None:
        config.run.folder.mkdir(parents=True, exist_ok=True)
    return Store.open(find_store_url(config), create_if_missing=create)


def format_annotate_command(config: Config, project: str, *settings: str) -> str:
    """Return the command line of `stage=annotate` for a project of the store that a run uses.

    A store URL with a password is left out: it is set in the environment instead.

    Args:
        settings: further words, such as `stage.action=export`.
    """
    words = ["python", "-m", "align", "stage=annotate", f"project={format_hydra_value(project)}", *settings]
    if config.run.root != Config().run.root:
        words.append(f"run.root={format_hydra_value(config.run.root)}")
    url = config.store.url
    if url and mask_secrets(url) == url:
        words.append(f"store.url={format_hydra_value(url)}")
    return shlex.join(words)


def resolve_data_set(config: Config) -> Config:
    """Return the configuration with a reference to a published data set, such as `data:latest`, replaced by its folder.

    So the reference is resolved only once.

    Raises:
        InputError: the data set does not exist.
    """
    if config.data.name != MANIFEST:
        return config
    folder = find_data_set(config.data.path or "", config.run.folder)
    return replace_values(config, data=replace_values(config.data, path=str(folder.absolute())))


def hide_annotator_names(config: Config) -> Config:
    """Return the configuration with pseudonyms in place of names in `data.annotators` and `data.exclude_annotators`,
    because nothing that a run writes may contain a name.

    Raises:
        InputError: the project has no such annotator, or votes of several projects are read.
    """
    data = config.data
    if not data.annotators and not data.exclude_annotators:
        return config
    sources = getattr(config.stage, "sources", None) or []
    projects = {source["annotations"] for source in sources if isinstance(source, Mapping) and "annotations" in source}
    projects = projects or {config.project}
    problem = f"names annotators of one project, and {pluralize(len(projects), 'project')} are read"
    remedy = "Make a data set of each project."
    setting = "data.annotators" if data.annotators else "data.exclude_annotators"
    require(len(projects) == 1, setting, [*data.annotators, *data.exclude_annotators], problem, remedy)
    (project,) = projects
    hidden = {}
    with Store.open(find_store_url(config), create_if_missing=False) as store, store.reading() as connection:
        require_known_project(connection, project)
        pseudonyms = read_pseudonyms(connection, project)
    for key in ("annotators", "exclude_annotators"):
        hidden[key] = sorted(find_pseudonyms(pseudonyms, project, f"data.{key}", getattr(data, key)))
    return replace_values(config, data=replace_values(data, **hidden))


# The run


def execute_run(config: Config, on_open: Callable[[Path], object] = lambda folder: None) -> int:
    """Run the stage of a configuration, publish its outputs, and return the exit status: 1 for an internal error.

    A run that is finished already is not repeated.

    Args:
        on_open: called with the run's folder after it was opened.

    Raises:
        AlignError: an error that the user can correct, a full disk and an unwritable folder included.
    """
    try:
        return open_and_run(config, on_open)
    except AlignError:
        raise
    except Exception as error:
        if user_error := find_user_error(error, config.run.root):
            raise user_error from error
        raise


def open_and_run(config: Config, on_open: Callable[[Path], object]) -> int:
    if not ranks.is_alone():
        from align.models.load import choose_device

        ranks.init_group(choose_device(config.device).type, config.ddp_timeout)
    data_ref = config.data.path or ""
    stage_module = load_stage(config.stage.name)
    if "rollout" in STAGES[config.stage.name].reads and config.rollout.engine == "vllm" and not config.rollout.urls:
        require_interpreter(VLLM, config.rollout.python, "rollout.python")
    inputs: StageInputs = stage_module.inputs(hide_annotator_names(resolve_data_set(config)))
    config, rate_origin = fill_learning_rates(inputs.config, inputs.base)
    records = inputs.records
    data = records.get("data")
    if data is not None and data_ref.startswith("data:") and Path(data.path).name == "artifact":
        records = {**records, "data": replace(data, ref=f"data:{Path(data.path).parent.name}")}
    records = add_rankers(records, config.run.folder)
    with Run.open(to_plain_dict(config), records, inputs.base, inputs.label, config.resume, inputs.again) as run:
        on_open(run.folder)
        ranks.write_launcher_note(ranks.RUN, str(run.folder.absolute()))
        if run.done:
            verify_outputs(run.folder, run.manifest.outputs)
            ranks.broadcast(None)
            print("This run is finished already; resume=never makes another.")
            print(run.folder)
            return report_exit_status(run.manifest.metrics)
        print(describe_run(run, config, rate_origin))
        if config.track.name != "none":
            require_installed(config.track.name)
        run.begin(format_config(config))
        log_handler = attach_run_log(run)
        try:
            with ranks.raise_first_failure(), mirror_run(run, config):
                result = run_stage(run, config, inputs)
        except ranks.RankFailed as error:
            if error.trace:
                logging.getLogger("align").error("%s\n%s", error, error.trace)
            raise
        except AlignError:
            raise
        except Exception as error:
            if find_user_error(error, config.run.root):
                raise
            logging.getLogger("align").error("%s", traceback.format_exc())
            if ranks.should_print_error(error):
                print(f"align: internal error: {type(error).__name__}: {make_printable(str(error))}", file=sys.stderr)
                print(f"align: the traceback is in {run.folder / 'log.txt'}", file=sys.stderr)
            run.fail(error)
            return 1
        finally:
            logging.getLogger().removeHandler(log_handler)
            log_handler.close()
        for line in (*result.summary, describe_small_samples(result.metrics)):
            if line:
                print(line)
        print(run.folder)
    return report_exit_status(result.metrics)


def report_exit_status(metrics: Mapping[str, Any]) -> int:
    """Return `exit_status` from a run's metrics, 0 by default, and notify the process launcher if it is not 0."""
    status = int(metrics.get("exit_status", 0))
    if status:
        ranks.write_launcher_note(ranks.SPOKEN, str(status))
    return status


def describe_run(run: Run, config: Config, rate_origin: str) -> str:
    """Return one line about a run for the console: its name, base model, method, data and learning rate.

    Args:
        rate_origin: origin of the learning rate in words; empty if the command line sets it.
    """
    record = run.inputs.get("data")
    base = run.manifest.base
    lr = getattr(config.stage, "lr", None)
    rate = None if lr is None else f"{lr:g} ({rate_origin})" if rate_origin else f"{lr:g}"
    data = record and (f"the votes of project {record.project}" if record.project else record.ref or record.path)
    parts = {
        "on": base and f"{base.id} ({base.digest[:12]})",
        "method": base and config.method.name,
        "data": data,
        "measured on": config.data.eval_path if data else None,
        "lr": rate,
        "ranks": ranks.world_size() if ranks.world_size() > 1 else None,
        "system prompt": repr(truncate_text(config.data.system)) if data and config.data.system else None,
    }
    described = ", ".join(f"{name} {value}" for name, value in parts.items() if value)
    name = f"{'continues ' if run.resumed else ''}{run.manifest.stage}:{run.name}"
    return f"{name} {described}" if described else name


def run_stage(run: Run, config: Config, inputs: StageInputs) -> StageResult:
    """Read the data, run a stage in the run's folder, update `report.html` meanwhile, and publish artifact and metrics.

    With several ranks, the data is broadcast to the others.
    """
    from align.report.live import LivePage  # imported late: a run that is finished already has no live page

    manifest = run.manifest
    page = LivePage(run, format_command_line(manifest.config, manifest.refs), lambda: describe_hardware(config))
    page.write_first()
    try:
        with collect_drop_counts() as counts, pause_garbage_collector():
            rows = inputs.rows()  # before torch is imported, so that a wrong row is reported at once
            id_metrics = {}
            if inputs.trains:
                naming = choose_id_scheme(DataSource.from_settings(config.data), find_store_url(config), config.project)
                id_metrics = write_trained_ids(run.folder, rows[0], naming, config.data.system or None)
        if inputs.trains and not id_metrics:
            print(
                "the key of some votes cannot be read from store.url, so evaluations cannot tell that these "
                "questions were trained on"
            )
        preload([config.stage.name])  # imports torch, which detects the hardware
        run.record_hardware(describe_hardware(config))
        with watch_progress(page.update):
            ranks.record_position("loads")
            started = StartedRun(config, run.folder.absolute(), run.manifest, run.resumed, rows)
            ranks.broadcast(None if ranks.is_alone() else started)
            result: StageResult = load_stage(config.stage.name).run(run, config, *rows)
        result = replace(result, metrics={**result.metrics, **get_peak_gpu_mb(), **counts, **id_metrics})
        if "torch" in sys.modules:  # a stage without torch writes no tensors
            from align.models.finite_checks import require_finite_results

            require_finite_results(
                run.folder / "artifact", result.metrics, getattr(config.stage, "lr", None), config.dtype
            )
        page.write_finished(result.metrics, describe_hardware(config))
        run.publish(result.metrics, describe_hardware(config))
        return result
    except BaseException as error:
        page.write_failed((isinstance(error, Exception) and find_user_error(error, config.run.root)) or error)
        raise


def describe_hardware(config: Config) -> dict[str, Any]:
    """Return the resolved device and dtype, the GPU's name and the number of ranks, for the manifest's `hardware`.

    Returns an empty dict before torch is imported.
    """
    if "torch" not in sys.modules:
        return {}
    import torch

    from align.models.load import choose_device, describe_gpu

    device = choose_device(config.device)
    default_dtype = "bfloat16" if device.type == "cuda" else "float32"
    return {
        "device": device.type,
        "dtype": default_dtype if config.dtype == "auto" else config.dtype,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        **describe_gpu(device),
        "world_size": ranks.world_size(),
    }


def attach_run_log(run: Run) -> logging.Handler:
    """Write all log records from level INFO to the run's `log.txt`, secrets redacted, and return the handler.

    The caller removes the handler.
    """
    handler = logging.FileHandler(run.folder / "log.txt", encoding="utf-8")
    handler.setFormatter(RedactingFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    return handler


@contextmanager
def pause_garbage_collector() -> Iterator[None]:
    """Pause Python's cyclic garbage collector during the block, to read millions of records in half the time.

    They have no reference cycles, and the collector would visit each about ten times, which takes as long as reading
    them.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


# Metrics


def open_tracker(run: Run, keep_below: int = 0) -> AbstractContextManager[Tracker]:
    """Return a context manager with the Tracker that writes a run's `metrics.jsonl` and `samples.jsonl`.

    It mirrors them to the service of `track` if there is one.

    Args:
        keep_below: last step whose rows a resumed run keeps; 0 for a new run, which has no rows yet.
    """
    mirror = MIRROR.get()
    if mirror is not None:
        mirror.begin()  # takes time, and so comes before the first step, which is timed
    return nullcontext(Tracker(run.folder, keep_below + 1 if keep_below else 0, mirror))


# Mirrors of a run at a tracking service, see `align.mirrors`


@contextmanager
def mirror_run(run: Run, config: Config) -> Iterator[None]:
    """Send a run's settings, metrics and artifact to MLflow or W&B, as `track` says, while the block runs.

    With `track=none` nothing is sent. If the block raises, the run is marked as failed there.
    """
    if config.track.name == "none":
        yield
        return
    manifest = run.manifest
    unread = {*PARTS} - {"stage", *STAGES[manifest.stage].reads}
    settings = {key: value for key, value in to_plain_dict(config).items() if key not in unread}
    inputs = {}
    for name, record in run.inputs.items():
        ref = f"{record.stage}:{record.name}" if record.stage else record.ref
        path = Path(record.path) if record.path else None
        inputs[name] = MirroredArtifact(ref, name, str(record.details.get("root") or record.digest), path, {})
    # A resumed run keeps its id; a new run of the same name gets another one.
    first_started = manifest.times.get("first_started", manifest.times["started"])
    id = hashlib.sha256(f"{manifest.ref} {first_started}".encode()).hexdigest()[:16]
    root = run.folder.parent.parent
    mirror = open_mirror(
        config.track.name,
        MirroredRun(config.track.project, manifest.ref, id, root, run.folder, settings, inputs, run.resumed),
    )
    token = MIRROR.set(mirror)
    try:
        yield
    except BaseException:
        mirror.finish({}, failed=True)
        raise
    finally:
        MIRROR.reset(token)
    artifact = build_mirrored_artifact(run)
    if artifact is not None:
        mirror.publish(artifact)
    mirror.finish(run.manifest.metrics, failed=False)


def build_mirrored_artifact(run: Run) -> MirroredArtifact | None:
    """Build the record of a run's model or data set for the tracking service, or return None if it made neither."""
    manifest = run.manifest
    data_root = manifest.metrics.get("root") if manifest.stage == "data" else None
    digest = manifest.digest or data_root
    if not digest:
        return None
    facts: dict[str, Any] = {
        "base": manifest.base and {"id": manifest.base.id, "digest": manifest.base.digest},
        "inputs": {name: record.digest for name, record in manifest.inputs.items()},
        "files": {name: value for name, value in manifest.outputs.items() if name.startswith("artifact/")},
    }
    kind = "data" if data_root else "model"
    return MirroredArtifact(manifest.ref, kind, digest, run.folder / "artifact", facts)
