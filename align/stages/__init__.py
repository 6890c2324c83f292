"""One module a stage: `inputs(config)` names what goes in, `run(run, config)` tells the story."""

from __future__ import annotations

import importlib
import logging
import sys
import traceback
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from align.config.compose import plain
from align.config.root import Config
from align.config.settings import changed
from align.config.stages import STAGES
from align.data.sources import DataSource
from align.errors import AlignError, InputError, readable
from align.models.start import start_from
from align.redaction import Formatter
from align.report import too_few
from align.run import Artifact, Base, Input, Run, out_of_memory, storage_error, verify_outputs
from align.track import Tracker
from annotate.store import Store


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a stage starts from, resolved once, before the run has a name.

    Attributes:
        config: with what they decide: the method that an adapter belongs to.
        label: the readable part of the run's derived name.
        base: the base weights.
        records: name → what goes in, as the manifest will hold it.
    """

    config: Config
    label: str
    base: Base | None
    records: dict[str, Input] = field(default_factory=dict)


def execute(config: Config) -> int:
    """Resolve, open the run's folder, run the stage, publish. Returns the exit status: 0, or 1 for a fault of ours.

    Raises:
        AlignError: the user's input, a full disk or an unwritable folder among it.
    """
    try:
        return perform(config)
    except AlignError:
        raise
    except Exception as error:
        if blamed := blame(error, config):
            raise blamed from error
        raise


def perform(config: Config) -> int:
    module = importlib.import_module(f"align.stages.{STAGES[config.stage.name].module}")
    inputs: Inputs = module.inputs(config)
    config = inputs.config
    values = plain(config)
    with Run.open(values, inputs.records, inputs.base, inputs.label, config.resume) as run:
        if run.done:
            verify_outputs(run.folder, run.manifest.outputs)
            print("This run is finished already; resume=never makes another.")
            print(run.folder)
            return 0
        run.begin(yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
        log = log_to(run)
        try:
            result = module.run(run, config)
            if "torch" in sys.modules:  # nothing else writes tensors
                from align.models.finite import check_published

                check_published(
                    run.folder / "artifact", result.metrics, getattr(config.stage, "lr", None), config.dtype
                )
            run.publish(result.metrics, computed_on(config))
        except AlignError:
            raise
        except Exception as error:
            if blame(error, config):
                raise
            logging.getLogger("align").error("%s", traceback.format_exc())
            print(f"align: a fault of ours: {type(error).__name__}: {readable(str(error))}", file=sys.stderr)
            print(f"align: the traceback is in {run.folder / 'log.txt'}", file=sys.stderr)
            run.fail(error)
            return 1
        finally:
            logging.getLogger().removeHandler(log)
            log.close()
        for line in (*result.summary, too_few(result.metrics)):
            if line:
                print(line)
        print(run.folder)
    return 0


def computed_on(config: Config) -> dict[str, str]:
    """What `device=auto dtype=auto` came to; nothing where nothing was computed."""
    if "torch" not in sys.modules:
        return {}
    from align.models.load import choose_device

    device = choose_device(config.device).type
    chosen = "bfloat16" if device == "cuda" else "float32"
    return {"device": device, "dtype": chosen if config.dtype == "auto" else config.dtype}


def blame(error: Exception, config: Config) -> InputError | None:
    """An unexpected error as the user's own, where it is one: too little memory, a full or a locked disk."""
    if out_of_memory(error):
        return InputError(
            "memory", type(error).__name__, "the device has too little for this run",
            "Lower stage.micro_batch, rollout.batch_size or data.max_length, or use method=qlora; stage=export holds a "
            "model in fp32: give it device=cpu.",
        )  # fmt: skip
    return storage_error(error, config.run.root)


def log_to(run: Run) -> logging.Handler:
    """Send every log record and warning of this process to the run's `log.txt`."""
    handler = logging.FileHandler(run.folder / "log.txt", encoding="utf-8")
    handler.setFormatter(Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    return handler


def start(config: Config, ref: str | None = None, field: str = "init") -> tuple[Artifact, Base, Config]:
    """What a stage starts from, see `align.models.start.start_from`; and the configuration with the method that this
    belongs to.

    Args:
        ref: the reference; None for what the configuration has as `field`.
    """
    ref = ref if ref is not None else str(getattr(config, field))
    root, model = Path(config.run.root).expanduser(), config.model
    found = start_from(ref, root, path=model.path, revision=model.revision, method=config.method.name, field=field)
    return found.artifact, found.base, changed(config, method=changed(config.method, name=found.method))


def source_of(config: Config) -> DataSource:
    """Where the rows of `data=` come from."""
    data = config.data
    return DataSource(data.name, data.path, data.part, data.held_out, data.limit)


def tracker(run: Run, config: Config, keep_below: int = 0) -> AbstractContextManager[Tracker]:
    """The run's metrics streams, continued after step `keep_below`, mirrored to wandb where `track=wandb`."""
    mirror = None
    if config.track.name == "wandb":
        name = f"{run.manifest.stage}/{run.name}"
        mirror = {"project": config.track.project, "name": name, "config": plain(config)}
    return closing(Tracker(run.folder, keep_below + 1 if keep_below else 0, mirror))


def store_url(config: Config) -> str:
    """Where the annotation store is: `store.url`, or a SQLite file among the runs."""
    return config.store.url or f"sqlite:///{Path(config.run.root).expanduser() / 'annotations.db'}"


def open_store(config: Config, create: bool = True) -> Store:
    """The annotation store. A reader never makes an empty one."""
    if create and config.store.url is None:
        Path(config.run.root).expanduser().mkdir(parents=True, exist_ok=True)
    return Store.open(store_url(config), create=create)
