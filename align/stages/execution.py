"""One run of a stage: its inputs are resolved, its folder is opened, it works, and what it made is published."""

from __future__ import annotations

import gc
import logging
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from align import ranks
from align.config.command import command_line
from align.config.root import Config, plain, resolved
from align.config.settings import changed
from align.config.stages import STAGES
from align.core.errors import AlignError, readable
from align.core.redaction import Formatter
from align.core.types import Result
from align.data.read.drops import tallied
from align.data.sets.published import find_data_set
from align.data.sources import MANIFEST, with_rankers
from align.data.trained_ids import write_ids
from align.report import too_few
from align.rollout.engine_process import VLLM, required_interpreter
from align.run import Input, Run, verify_outputs
from align.run.files import find_user_error
from align.stages import load_stage, preload
from align.stages.following import Begun
from align.stages.mirroring import MIRROR, check_installed, mirrored
from align.stages.rows import naming_of
from align.stages.starting import Inputs, fill_rates
from align.track import Tracker, peak_gpu_mb, shortened, watched


def execute(config: Config, opened: Callable[[Path], object] = lambda folder: None) -> int:
    """Resolve, open the run's folder, run the stage, publish. Returns the exit status: 0, or 1 for a fault of ours.

    Args:
        opened: is told the run's folder once it is open.

    Raises:
        AlignError: the user's input, a full disk or an unwritable folder among it.
    """
    try:
        return perform(config, opened)
    except AlignError:
        raise
    except Exception as error:
        if user_error := find_user_error(error, config.run.root):
            raise user_error from error
        raise


def perform(config: Config, opened: Callable[[Path], object]) -> int:
    if not ranks.alone():
        from align.models.load import choose_device

        ranks.join(choose_device(config.device).type, config.ddp_timeout)
    given = config.data.path or ""
    inputs: Inputs = load_stage(config.stage.name).inputs(settled(config))
    config, origin = fill_rates(inputs.config, inputs.base)
    values = plain(config)
    records = with_rankers(called(inputs.records, given), config.run.folder)
    with Run.open(values, records, inputs.base, inputs.label, config.resume, inputs.again) as run:
        opened(run.folder)
        ranks.tell_launcher(ranks.RUN, str(run.folder.absolute()))
        if run.done:
            verify_outputs(run.folder, run.manifest.outputs)
            ranks.from_main(None)
            print("This run is finished already; resume=never makes another.")
            print(run.folder)
            return ends_with(run.manifest.metrics)
        print(first_line(run, config, origin))
        check_installed(config)
        run.begin(resolved(config))
        log = log_to(run)
        try:
            with ranks.together(), mirrored(run, config):
                result = published(run, config, inputs)
        except ranks.RankFailed as failed:
            if failed.trace:
                logging.getLogger("align").error("%s\n%s", failed, failed.trace)
            raise
        except AlignError:
            raise
        except Exception as error:
            if find_user_error(error, config.run.root):
                raise
            logging.getLogger("align").error("%s", traceback.format_exc())
            if ranks.speaks(error):
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
    return ends_with(result.metrics)


def ends_with(metrics: Mapping[str, Any]) -> int:
    """The exit status of a run that was published: 0, or what its metrics say."""
    status = int(metrics.get("exit_status", 0))
    if status:
        ranks.tell_launcher(ranks.SPOKEN, str(status))
    return status


def settled(config: Config) -> Config:
    """The configuration with the data set that `data.path` refers to by its folder: `data:latest` is looked up once.

    Raises:
        InputError: there is none, or no vLLM for `rollout=vllm`.
    """
    if "rollout" in STAGES[config.stage.name].reads and config.rollout.engine == "vllm" and not config.rollout.urls:
        required_interpreter(VLLM, config.rollout.python, "rollout.python")
    if config.data.name != MANIFEST:
        return config
    folder = find_data_set(config.data.path or "", config.run.folder)
    return changed(config, data=changed(config.data, path=str(folder.absolute())))


def called(records: Mapping[str, Input], given: str) -> Mapping[str, Input]:
    """Inputs of a run, a data set among them by the name that it was given by: `data:latest` is one of these now."""
    read = records.get("data")
    if read is None or not given.startswith("data:") or Path(read.path).name != "artifact":
        return records
    return {**records, "data": replace(read, ref=f"data:{Path(read.path).parent.name}")}


def first_line(run: Run, config: Config, origin: str = "") -> str:
    """Return one line about the run: its base, method, data and learning rate.

    Args:
        origin: where the learning rate is from; empty where the command line gave it.
    """
    given, base, lr = run.inputs.get("data"), run.manifest.base, getattr(config.stage, "lr", None)
    rate = None if lr is None else f"{lr:g} ({origin})" if origin else f"{lr:g}"
    data = given and (f"the votes of project {given.project}" if given.project else given.ref or given.path)
    parts = {
        "on": base and f"{base.id} ({base.digest[:12]})", "method": base and config.method.name, "data": data,
        "measured on": config.data.eval_path if data else None, "lr": rate,
        "ranks": ranks.world() if ranks.world() > 1 else None,
        "system prompt": repr(shortened(config.data.system)) if data and config.data.system else None,
    }  # fmt: skip
    said = ", ".join(f"{name} {value}" for name, value in parts.items() if value)
    return f"{'continues ' if run.resumed else ''}{run.manifest.stage}:{run.name}{' ' if said else ''}{said}"


def published(run: Run, config: Config, inputs: Inputs) -> Result:
    """Run a stage and publish what it made; its page says so, from the first moment to the last."""
    from align.report.live import LivePage  # which a run that is finished already does without

    manifest = run.manifest
    page = LivePage(run, command_line(manifest.config, manifest.refs), lambda: computed_on(config))
    page.begun()
    try:
        with tallied() as counts, without_collector():
            rows = inputs.rows()  # first of all: a mistake in one of them costs no seconds
            roots = {}
            if inputs.trains:
                roots = write_ids(run.folder, rows[0], naming_of(config), config.data.system or None)
        if inputs.trains and not roots:
            print("the key of some votes cannot be read from store.url: evaluations will not know these questions")
        preload([config.stage.name])  # the hardware is known once torch is there
        run.note_hardware(computed_on(config))
        with watched(page.advanced):
            ranks.at("loads")
            ranks.from_main(
                Begun(config, run.folder.absolute(), run.manifest, run.resumed, rows) if not ranks.alone() else None
            )
            result: Result = load_stage(config.stage.name).run(run, config, *rows)
        result = replace(result, metrics={**result.metrics, **peak_gpu_mb(), **counts, **roots})
        if "torch" in sys.modules:  # nothing else writes tensors
            from align.models.finite import check_published

            check_published(run.folder / "artifact", result.metrics, getattr(config.stage, "lr", None), config.dtype)
        page.finished(result.metrics, computed_on(config))
        run.publish(result.metrics, computed_on(config))
        return result
    except BaseException as error:
        page.failed((isinstance(error, Exception) and find_user_error(error, config.run.root)) or error)
        raise


def computed_on(config: Config) -> dict[str, Any]:
    """What `device=auto dtype=auto` came to, with the GPU's name and the number of ranks; nothing where nothing was
    computed."""
    if "torch" not in sys.modules:
        return {}
    import torch

    from align.models.load import choose_device, name_of_gpu

    device = choose_device(config.device)
    capability = torch.backends.cpu.get_cpu_capability()
    chosen = "bfloat16" if device.type == "cuda" else "float32"
    dtype = chosen if config.dtype == "auto" else config.dtype
    known = {"device": device.type, "dtype": dtype, "cpu_capability": capability, **name_of_gpu(device)}
    return known | {"world_size": ranks.world()}


def log_to(run: Run) -> logging.Handler:
    """Send every log record and warning of this process to the run's `log.txt`."""
    handler = logging.FileHandler(run.folder / "log.txt", encoding="utf-8")
    handler.setFormatter(Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    return handler


def tracker(run: Run, config: Config, keep_below: int = 0) -> AbstractContextManager[Tracker]:
    """The run's metrics streams, continued after step `keep_below`, and mirrored where `track` names a service."""
    mirror = MIRROR.get()
    if mirror is not None:
        mirror.begin()  # before the first step, whose time is taken
    return nullcontext(Tracker(run.folder, keep_below + 1 if keep_below else 0, mirror))


@contextmanager
def without_collector() -> Iterator[None]:
    """Inside the block no cycles are looked for. A million records have none, and the collector would look at each of
    them some ten times, which takes as long as making them."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
