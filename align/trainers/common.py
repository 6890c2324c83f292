"""Training by TRL's trainers: settings, the function that fits a model, adapters in fp32, the metrics stream, and
checkpoints.

Each further trainer of TRL is a module beside this one: a class with the mixin `MultiRankTrainer`, a function that
builds it from our rows and the keyword arguments of `Training.arguments`, and `FIGURES`, the names of its logs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.training_args import ParallelMode

from align import ranks
from align.core.errors import InputError, require
from align.models.adapters import add_new_adapter, attach_adapter
from align.models.base import find_adapter_folder
from align.models.finite_checks import build_divergence_error, describe_non_finite, require_finite_tensors
from align.models.forward import get_route
from align.models.load import choose_checkpointing, load_base
from align.models.lora import Lora
from align.models.sharded import is_sharded
from align.run import Artifact, Base, Run
from align.run.checkpoints import (
    is_intact,
    parse_step,
    remove_old_checkpoints,
    remove_unusable_and_find_newest,
    seal_checkpoint,
    sibling_checkpoint,
)
from align.track import Progress, Tracker, show_progress
from align.trainers.multi_rank import as_single_process

datasets.disable_progress_bars()

CHECKPOINTS = 2
"""Number of checkpoints to keep, including the best one if its weights are published."""
RETRY = "Remove it and run the same command again."


@dataclass(frozen=True, slots=True)
class Training:
    """The optimisation settings that SFT, reward, DPO and KTO share, under the names of their config groups.

    Attributes:
        max_steps: number of optimiser steps; None to train for `epochs`.
        warmup: share of the steps over which the learning rate rises.
        save_every: steps between checkpoints.
        gradient_checkpointing: `auto`, `true` or `false`, see `choose_checkpointing`.
    """

    lr: float
    epochs: float
    batch_size: int
    micro_batch: int
    warmup: float
    schedule: str
    max_grad_norm: float
    save_every: int
    gradient_checkpointing: str
    seed: int
    weight_decay: float = 0.0
    max_steps: int | None = None
    optimiser: str = "auto"
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999

    @classmethod
    def from_settings(cls, settings: Any, seed: int) -> Training:
        """Build the optimisation settings from a stage's configuration. Missing settings have their defaults."""
        names = [field.name for field in fields(cls) if hasattr(settings, field.name)]
        values: dict[str, Any] = {name: getattr(settings, name) for name in names}
        values["seed"] = seed
        return cls(**values)

    def steps(self, rows: int) -> int:
        """Return the number of optimiser steps for training on `rows` rows: `max_steps`, or those of `epochs`."""
        return self.max_steps or max(1, math.ceil(math.ceil(rows / self.batch_size) * self.epochs))

    def arguments(
        self, output: Path, device: torch.device, dtype: torch.dtype, steps: int, model_is_sharded: bool = False
    ) -> dict[str, Any]:
        """Return the keyword arguments of transformers' TrainingArguments that all of TRL's configs share.

        Every precision switch is explicit, because TRL's defaults differ from transformers'.

        Args:
            steps: number of optimiser steps of the run.
            model_is_sharded: whether the weights are sharded over ranks.
        """
        on_cuda = device.type == "cuda"
        return {
            "output_dir": str(output),
            "learning_rate": self.lr,
            "num_train_epochs": self.epochs,
            "max_steps": self.max_steps or -1,
            "per_device_train_batch_size": self.micro_batch,
            "per_device_eval_batch_size": self.micro_batch,
            "gradient_accumulation_steps": self.batch_size // self.micro_batch,
            "warmup_steps": int(steps * self.warmup),
            "lr_scheduler_type": self.schedule,
            "max_grad_norm": self.max_grad_norm,
            "weight_decay": self.weight_decay,
            "optim": choose_optimiser(self.optimiser, device, model_is_sharded),
            "adam_beta1": self.adam_beta1,
            "adam_beta2": self.adam_beta2,
            "bf16": dtype == torch.bfloat16,
            "fp16": on_cuda and dtype == torch.float16,
            "use_cpu": not on_cuda,
            "activation_checkpointing": choose_checkpointing(self.gradient_checkpointing, device),
            "save_strategy": "steps",
            "save_steps": self.save_every,
            "save_total_limit": None,  # `Reporter` removes old checkpoints after it has sealed the new one
            "logging_strategy": "steps",
            "logging_steps": 1,
            "logging_nan_inf_filter": False,
            "eval_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "seed": self.seed,
            "data_seed": self.seed,
            "dataloader_num_workers": 0,
            "dataloader_pin_memory": on_cuda,
            "remove_unused_columns": False,  # the sampler needs `length`, which is no argument of the model
        }


def choose_optimiser(requested: str, device: torch.device, model_is_sharded: bool = False) -> str:
    """Return the value of transformers' `optim`; for `auto` it is paged 8-bit AdamW on a GPU, and AdamW on a CPU or
    with shards.

    Args:
        requested: setting; `auto` means paged 8-bit AdamW on a GPU, and plain AdamW on a CPU or with shards.
        model_is_sharded: see `Training.arguments`.

    Raises:
        InputError: the optimiser needs a GPU, or does not support sharded weights.
    """
    default = "paged_adamw_8bit" if device.type == "cuda" and not model_is_sharded else "adamw"
    optimiser = default if requested == "auto" else requested
    problem = "updates whole weights, of which each rank has a part"
    remedy = "Use adamw, or leave it out."
    require(not model_is_sharded or optimiser == "adamw", "stage.optimiser", requested, problem, remedy)
    problem = "keeps its moments in 8 bits by a kernel for cuda"
    require(device.type == "cuda" or "8bit" not in optimiser, "stage.optimiser", requested, problem, remedy)
    return "adamw_torch" if optimiser == "adamw" else optimiser


class FitResult(NamedTuple):
    """The result of training: the published step and figures for the manifest.

    Attributes:
        published_step: the step whose weights the model has now.
        figures: figures for the manifest: the run's `steps`, `published_step`, the setting that ended training
            (`epochs`, `max_steps` or `patience`), and the number of trained weights.
        summary: a line about the published step and the reason for the end; empty if the held-out loss was not measured
            during training.
    """

    published_step: int
    figures: dict[str, Any]
    summary: str


def fit(
    make_trainer: Callable[[dict[str, Any]], Trainer],
    model: nn.Module,
    settings: Any,
    seed: int,
    rows: int,
    run: Run,
    compute_held_out_loss: Callable[[int], float],
    *,
    device: torch.device,
    dtype: torch.dtype,
    track: Callable[[Run, int], AbstractContextManager[Tracker]],
    figure_names: Mapping[str, str],
) -> FitResult:
    """Train a model in place, from the run's newest checkpoint if there is one, and log metrics and progress.
    Afterwards the model has the weights to be published.

    Args:
        make_trainer: builds the trainer around `model` from the keyword arguments that TRL's configs have in common.
        settings: the stage's settings: those of `Training`, `eval_every`, `publish`, `patience`, and `log_every`, the
            steps between rows of `metrics.jsonl`.
        rows: number of rows of an epoch.
        compute_held_out_loss: see `HeldOutEvaluation`.
        track: opens the run's metrics stream after a given step.
        figure_names: the trainer's name of a figure → our name.
    """
    training = Training.from_settings(settings, seed)
    evaluation = HeldOutEvaluation(compute_held_out_loss, settings.eval_every, settings.publish, settings.patience)
    steps = training.steps(rows)
    arguments = training.arguments(run.checkpoints, device, dtype, steps, is_sharded(model))
    checkpoint = remove_unusable_and_find_newest(run, is_usable=evaluation.can_resume_from)
    resumed_step = parse_step(checkpoint)
    has_ended = resumed_step >= steps or (
        checkpoint is not None and evaluation.is_exhausted(load_trainer_state(checkpoint))
    )
    with track(run, resumed_step) as stream, show_progress(run.manifest.stage, steps, resumed_step) as bar:
        reporter = Reporter(stream, bar, settings.log_every, figure_names, evaluation)
        callbacks = (evaluation, reporter)
        trainer, trained = train(
            partial(make_trainer, arguments), model, *callbacks, checkpoint=checkpoint, has_ended=has_ended
        )
    last_step = trainer.state.global_step
    published_step = evaluation.find_published_step(trainer.state)
    ranks.barrier()  # the first rank has written the last checkpoint, and removed others
    if published_step != last_step:
        load_weights(trainer, run.shared / "checkpoints" / f"checkpoint-{published_step}")
    ended_by = "patience" if last_step < steps else "max_steps" if training.max_steps else "epochs"
    manifest_figures = {
        "steps": last_step,
        "published_step": published_step,
        "ended_by": ended_by,
        "trained_weights": trained,
    }
    return FitResult(published_step, manifest_figures, evaluation.describe(trainer.state, steps))


def train(
    make_trainer: Callable[[], Trainer],
    model: nn.Module,
    *callbacks: TrainerCallback,
    checkpoint: Path | None = None,
    has_ended: bool = False,
) -> tuple[Trainer, int]:
    """Build the trainer around `model`, and train its trainable weights in fp32, from `checkpoint` if there is one.
    TRL's output is suppressed.

    Args:
        has_ended: whether training had ended at `checkpoint`. Its weights are then loaded, because a Trainer would take
            one more step: it checks only after a step whether that was the last.

    Returns:
        The trainer, whose state is that of the end, and the number of trained weights.
    """
    # TRL rounds the weights of a quantised model's adapter when the trainer is built.
    quantised = getattr(model, "is_loaded_in_4bit", False)
    start = {name: p.detach().clone() for name, p in get_trainable_parameters(model).items() if quantised}
    with restore_configurations_afterwards(model):
        with as_single_process():
            trainer = make_trainer()
        trainer.remove_callback(PrinterCallback)  # it prints every step as a dict
        for callback in (*callbacks, FiniteGuard()):
            trainer.add_callback(callback)
        trained = cast_trainable_to_fp32(model, start)
        if checkpoint and has_ended:
            load_weights(trainer, checkpoint)
            trainer.state = load_trainer_state(checkpoint)
        else:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    return trainer, trained


def build_trainer(
    kind: Callable[..., Any],
    model: nn.Module,
    settings: TrainingArguments,
    rows: datasets.Dataset,
    tokenizer: Any,
    collate: Callable[..., Any] | None = None,
) -> Any:
    """Build a TRL trainer of the class `kind` that uses only the GPU of its model.

    In a process that sees several GPUs, transformers would use the first one, multiply the batch by their number and
    copy the model to each (`DataParallel`), which TRL's SFTTrainer refuses.

    Args:
        collate: collates rows to a batch; None for the trainer's own collator.
    """
    device = next(model.parameters()).device
    if device.type == "cuda" and settings.parallel_mode != ParallelMode.DISTRIBUTED:
        vars(settings).update(
            _setup_devices=device,  # the cached property behind `settings.device`
            _n_gpu=1,
        )
        torch.cuda.set_device(device)  # accelerate uses `cuda` without an index
    return kind(model=model, args=settings, train_dataset=rows, processing_class=tokenizer, data_collator=collate)


@contextmanager
def restore_configurations_afterwards(model: nn.Module) -> Iterator[None]:
    """Restore a model's `config` and `generation_config` when the `with` block ends. A trainer changes them (no cache,
    the tokenizer's pad and end tokens), and a fully trained model is published with them."""
    candidates = (getattr(m, name, None) for m in model.modules() for name in ("config", "generation_config"))
    configs = {id(config): config for config in candidates if hasattr(config, "to_dict")}.values()
    saved = [(config, dict(vars(config))) for config in configs]
    try:
        yield
    finally:
        for config, values in saved:
            vars(config).clear()
            vars(config).update(values)


def add_trained_adapter(model: nn.Module, adapter: Path | None, lora: Lora, seed: int) -> Any:
    """Add the LoRA adapter that will be trained, `default`, to a model, either new or loaded from a folder.

    Args:
        adapter: folder of the saved adapter that it starts from; None for a new one.
        lora: settings of a new one.
    """
    torch.manual_seed(seed)  # a fresh adapter's lora_A is random
    if adapter is None:
        return add_new_adapter(model, lora)
    return attach_adapter(model, adapter, "default", trainable=True)


def load_referenced_policy(
    base: Base,
    method: str,
    start: Artifact,
    lora: Lora,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
    stage: str,
    has_reference: bool,
) -> Any:
    """Load the policy of a preference loss with its trainable adapter, and print the memory cost of its reference.

    Args:
        start: the artifact that it starts from.
        has_reference: whether the loss compares the policy with its start.

    Raises:
        InputError: TRL would compute other logits than the model's own.
    """
    model = load_base(base, method, device, dtype)
    problem = f"type {model.config.model_type} computes its logits by more than a linear head on hidden states"
    problem += f", which TRL's {stage.upper()} reads"
    require(get_route(model).has_separate_head, "stage", stage, problem, "Use stage=reward and stage=ppo.")
    model = add_trained_adapter(model, find_adapter_folder(start), lora, seed)
    size = sum(p.numel() * p.element_size() for p in get_trainable_parameters(model).values())
    if has_reference:
        print(
            f"the start is kept as the reference: a second adapter of {size / 1e6:,.1f} MB, and a second pass over "
            "each batch"
        )
    else:
        print("no reference is kept: the loss reads the policy alone, once a batch")
    return model


def load_weights(trainer: Trainer, checkpoint: Path) -> None:
    """Load the weights of a checkpoint into the trainer's model in place, and check that the trainable ones are finite.

    Raises:
        CorruptFile: a weight is not finite.
    """
    trainer._load_from_checkpoint(str(checkpoint))
    assert isinstance(trainer.model, nn.Module)
    require_finite_tensors(get_trainable_parameters(trainer.model).items(), "checkpoint", checkpoint.name, RETRY)


def load_trainer_state(checkpoint: Path) -> TrainerState:
    """Read the state of transformers' Trainer from a checkpoint's `trainer_state.json`."""
    return TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))


def get_trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def cast_trainable_to_fp32(model: nn.Module, start: Mapping[str, Tensor]) -> int:
    """Cast the trainable weights to fp32 in place, and restore the values in `start` by name. Returns the number of
    trainable weights.

    On a 4-bit base TRL casts them to bf16 when the trainer is built. Small updates would then vanish (at lr 1e-5 only
    8 % of `lora_A` changed in 20 steps), and a loaded adapter would start rounded.
    """
    trainable = get_trainable_parameters(model)
    assert trainable, "nothing is trainable"
    for name, parameter in trainable.items():
        parameter.data = start.get(name, parameter.data).float()
    return sum(parameter.numel() for parameter in trainable.values())


class HeldOutEvaluation(TrainerCallback):
    """A callback that measures the held-out loss during training, and stops training early if the loss does not
    improve.

    The result is stored in the Trainer's state (`best_metric`, `best_global_step`), which every checkpoint contains.
    The best weights are saved as a checkpoint at the measured step: there is no other copy of them.

    Args:
        loss: number of steps taken → held-out loss of the present model. Raises InputError if it is not finite.
        every: steps between two measurements; the last step is always measured. None to measure nothing.
        publish: `best` or `last`.
        patience: number of measurements without a lower loss after which training stops; None for never.

    Attributes:
        losses: step → held-out loss measured by this process.
    """

    def __init__(
        self, loss: Callable[[int], float], every: int | None = None, publish: str = "last", patience: int | None = None
    ) -> None:
        self.loss = loss
        self.every = every
        self.publish = publish
        self.patience = patience
        self.losses: dict[int, float] = {}

    def find_published_step(self, state: TrainerState) -> int:
        """Return the step whose weights would be published: the step with the lowest held-out loss if `publish` is
        `best`, else the last."""
        return (state.best_global_step if self.publish == "best" else None) or state.global_step

    def is_exhausted(self, state: TrainerState) -> bool:
        """Return whether the last `patience` measurements brought no lower held-out loss, so that training stops."""
        if not (self.every and self.patience and state.best_global_step):
            return False
        return state.global_step // self.every - state.best_global_step // self.every >= self.patience

    def can_resume_from(self, checkpoint: Path) -> bool:
        """Return whether a checkpoint is intact, and also the checkpoint of the best weights, to which its state
        refers."""
        if not is_intact(checkpoint):
            return False
        best = sibling_checkpoint(checkpoint, self.find_published_step(load_trainer_state(checkpoint)))
        return best == checkpoint or is_intact(best)

    def describe(self, state: TrainerState, planned: int) -> str:
        """Describe the published step and the reason for the end of training. Returns an empty string if nothing was
        measured.

        Args:
            planned: planned number of steps.
        """
        if not self.every:
            return ""
        choice = "the lowest held-out loss" if self.publish == "best" else "the last"
        text = f"step {self.find_published_step(state)} is published, {choice}"
        if state.global_step < planned:
            text += f"; training ended at step {state.global_step} of {planned}, "
            text += f"after {self.patience} measurements without a lower one"
        return text

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        step = state.global_step
        if not self.every or (step % self.every and step < state.max_steps):
            return
        # The measurement must not change training: neither the random state, nor the mode, by which TRL groups figures.
        with torch.random.fork_rng([args.device] if args.device.type == "cuda" else []):
            loss = self.losses[step] = self.loss(step)
        model.train()
        if state.best_metric is None or loss < state.best_metric:
            state.best_metric = loss
            state.best_global_step = step
            control.should_save |= self.publish == "best"
        elif self.is_exhausted(state):
            control.should_training_stop = control.should_save = True


class FiniteGuard(TrainerCallback):
    """A callback that stops training before a step whose loss or gradient is not finite, and rejects a checkpoint with
    such values. It raises InputError.

    Under `fp16` a scaled gradient may overflow: the scaler then skips the step and lowers its scale, so that only the
    loss is checked.
    """

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        if state.global_step:
            clear_paged_flag(optimizer)
            tensors = {**get_trainable_parameters(model), **dict(iter_optimiser_state(optimizer))}
            require_finite_tensors(tensors.items(), "checkpoint", f"checkpoint-{state.global_step}", RETRY)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        gradients = [p.grad for p in get_trainable_parameters(model).values() if p.grad is not None]
        if not args.fp16 and not math.isfinite(float(nn.utils.get_total_norm(gradients))):
            raise self.error(state.global_step + 1, "the gradient is not finite", args, model)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Any = None,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        for name in ("loss",) if args.fp16 else ("loss", "grad_norm"):
            if name in (logs or {}) and not math.isfinite(logs[name]):
                raise self.error(state.global_step, f"{name} is {logs[name]}", args, model)

    def error(self, step: int, problem: str, args: TrainingArguments, model: nn.Module) -> InputError:
        dtype = "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32"
        problem = f"step {step}: {problem}{describe_non_finite(get_trainable_parameters(model))}: the run has diverged"
        return build_divergence_error(problem, args.learning_rate, dtype)


def clear_paged_flag(optimiser: Any) -> None:
    """Set `is_paged` to False, in place, on optimiser moments that lie in the GPU's own memory.

    A checkpoint of bitsandbytes' paged optimisers stores this flag, and a moment that is loaded directly to the GPU
    keeps it: the library would then ask CUDA to move pages that do not exist, and crash.
    """
    for _, moment in iter_optimiser_state(optimiser):
        if moment.device.type == "cuda" and getattr(moment, "is_paged", False):
            moment.is_paged = False  # pyright: ignore[reportAttributeAccessIssue]


def iter_optimiser_state(optimiser: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield (name for error messages, tensor) for each tensor in an optimiser's state."""
    inner = getattr(optimiser, "optimizer", optimiser)  # accelerate wraps it
    for index, moments in enumerate(inner.state.values()):
        for name, value in moments.items():
            if isinstance(value, Tensor):
                yield f"the optimiser's {name} of parameter {index}", value


class Reporter(TrainerCallback):
    """A callback that writes a Trainer's logs to the run's metrics stream, seals each checkpoint with its hashes, and
    removes old ones.

    Args:
        every: number of steps between rows of `metrics.jsonl`.
        names: the Trainer's name of a figure → our name; the first two are shown with the progress bar.
        evaluation: the callback that measures the held-out loss.
    """

    def __init__(
        self, track: Tracker, bar: Progress, every: int, names: Mapping[str, str], evaluation: HeldOutEvaluation
    ) -> None:
        self.track = track
        self.bar = bar
        self.every = every
        self.names = names
        self.evaluation = evaluation

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        figures = {ours: logs[theirs] for theirs, ours in self.names.items() if theirs in (logs or {})}
        if not figures:
            return
        step = state.global_step
        losses = self.evaluation.losses
        bar_figures = dict(list(figures.items())[:2])
        if losses:
            bar_figures["held_out_loss"] = losses[max(losses)]
        if step in losses:
            figures["held_out_loss"] = losses[step]
        self.track.log_step(step, figures)
        if step in losses or step % self.every == 0 or step in (1, state.max_steps):  # a short run has a beginning too
            self.track.log(step, figures)
        self.bar.advance(step, **bar_figures)  # after the row is written: a watcher of the bar may read it

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not ranks.is_main():
            return
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        for foreign in ("training_args.bin", "README.md"):  # an unused pickle, and TRL's model card
            (folder / foreign).unlink(missing_ok=True)
        seal_checkpoint(folder)
        remove_old_checkpoints(
            folder.parent, CHECKPOINTS, sibling_checkpoint(folder, self.evaluation.find_published_step(state))
        )
