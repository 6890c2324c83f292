"""What TRL's trainers share here: settings, one way to fit a model, fp32 adapters, one metrics stream, checkpoints that
can be trusted.

A further trainer of TRL's is a file beside this one: a class mixed with `Dealt`, a function that builds it from
our rows and the keyword arguments of `Training.arguments`, and `FIGURES`, the names of what it logs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.training_args import ParallelMode

from align import ranks
from align.core.errors import require
from align.models.adapters import attach, with_new_adapter
from align.models.finite import check_tensors
from align.models.load import choose_checkpointing, load_base
from align.models.lora import Lora
from align.models.plain_path import route_of
from align.models.sharded import is_sharded
from align.models.start import adapter_folder
from align.run import Artifact, Base, Run
from align.run.checkpoints import beside, newest_checkpoint, remove_old, seal, step_of
from align.track import Progress, Tracker, progress
from align.trainers.callbacks import ANEW, Evaluation, Measuring, NanGuard, state_in, trained_in
from align.trainers.dealt import counted_as_one

datasets.disable_progress_bars()

CHECKPOINTS = 2
"""So many are kept; one of them is the best where that is published."""


@dataclass(frozen=True, slots=True)
class Training:
    """How a trainer trains: the settings that SFT, reward, DPO and KTO share, by the names of their configurations.

    Attributes:
        max_steps: ends before the epochs do; None where they decide.
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
    def of(cls, settings: Any, seed: int) -> Training:
        """From whatever has settings of these names; those that it lacks keep their defaults."""
        names = (f.name for f in fields(cls) if f.name != "seed")
        return cls(seed=seed, **{name: getattr(settings, name) for name in names if hasattr(settings, name)})

    def steps(self, rows: int) -> int:
        """Optimiser steps of a whole run over so many rows."""
        return self.max_steps or max(1, math.ceil(math.ceil(rows / self.batch_size) * self.epochs))

    def arguments(
        self, output: Path, device: torch.device, dtype: torch.dtype, steps: int, shards: bool = False
    ) -> dict[str, Any]:
        """The keyword arguments that TRL's configs have in common; every precision switch is said aloud, for TRL's own
        defaults differ from transformers'.

        Args:
            steps: of the whole run.
            shards: each rank has a part of every weight.
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
            "optim": choose_optimiser(self.optimiser, device, shards),
            "adam_beta1": self.adam_beta1,
            "adam_beta2": self.adam_beta2,
            "bf16": dtype == torch.bfloat16,
            "fp16": on_cuda and dtype == torch.float16,
            "use_cpu": not on_cuda,
            "activation_checkpointing": choose_checkpointing(self.gradient_checkpointing, device),
            "save_strategy": "steps",
            "save_steps": self.save_every,
            "save_total_limit": None,  # the old ones go once the new one is sealed, see `Reporter`
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
            "remove_unused_columns": False,  # the sampler reads `length`, which no model knows
        }


def choose_optimiser(requested: str, device: torch.device, shards: bool = False) -> str:
    """The name that transformers has for an optimiser.

    Args:
        requested: `auto` takes the one that needs the least of a GPU's memory, and plain AdamW elsewhere.
        shards: see `Training.arguments`.

    Raises:
        InputError: it needs a GPU, and there is none; or whole weights, and there are parts.
    """
    least = "paged_adamw_8bit" if device.type == "cuda" and not shards else "adamw"
    chosen = least if requested == "auto" else requested
    require(
        not shards or chosen == "adamw", "stage.optimiser", requested,
        "updates whole weights, of which each rank has a part", "Use adamw, or leave it out.",
    )  # fmt: skip
    require(
        device.type == "cuda" or "8bit" not in chosen, "stage.optimiser", requested,
        "keeps its moments in 8 bits by a kernel for cuda", "Use adamw, or leave it out.",
    )  # fmt: skip
    return "adamw_torch" if chosen == "adamw" else chosen


@dataclass(frozen=True, slots=True)
class FitResult:
    """What training came to.

    Attributes:
        steps: of the optimiser, in the whole run.
        published_step: the step whose weights the model has now.
        ended_by: the setting that ended training: `epochs`, `max_steps` or `patience`.
        trained_weights: how many weights were trained.
        said: which step is published and why training ended, in words; empty where nothing was measured on the way.
    """

    steps: int
    published_step: int
    ended_by: str
    trained_weights: int
    said: str

    @property
    def figures(self) -> dict[str, Any]:
        """For the manifest."""
        return {key: getattr(self, key) for key in ("steps", "published_step", "ended_by", "trained_weights")}


def fit(
    make: Callable[[dict[str, Any]], Trainer],
    model: nn.Module,
    settings: Any,
    seed: int,
    rows: int,
    run: Run,
    held_out_loss: Callable[[int], float],
    *,
    device: torch.device,
    dtype: torch.dtype,
    track: Callable[[int], AbstractContextManager[Tracker]],
    figures: Mapping[str, str],
) -> FitResult:
    """Train `model` in place, from the run's newest checkpoint if there is one, with its metrics and its progress. In
    the end it has the weights that are to be published.

    Args:
        make: builds the trainer around `model`, given the keyword arguments that TRL's configs have in common.
        settings: of the stage: those of `Training`, those of `Measuring.by`, and `log_every`, the steps between rows
            of `metrics.jsonl`.
        rows: of an epoch.
        held_out_loss: see `Measuring.loss`.
        track: opens the run's metrics stream after a step.
        figures: the trainer's name of a figure → ours.
    """
    training = Training.of(settings, seed)
    measuring = Measuring.by(held_out_loss, settings)
    steps = training.steps(rows)
    arguments = training.arguments(run.checkpoints, device, dtype, steps, is_sharded(model))
    checkpoint = newest_checkpoint(run, whole=measuring.whole)
    done = step_of(checkpoint)
    ended = done >= steps or (checkpoint is not None and measuring.exhausted(state_in(checkpoint)))
    with track(done) as stream, progress(run.manifest.stage, steps, done) as bar:
        evaluation = Evaluation(measuring)
        reporter = Reporter(stream, bar, settings.log_every, figures, evaluation)
        callbacks = evaluation, reporter
        trainer, trained = train(partial(make, arguments), model, *callbacks, checkpoint=checkpoint, ended=ended)
    state = trainer.state
    published = measuring.published(state)
    ranks.barrier()  # the first rank has written the last checkpoint, and removed others
    if published != state.global_step:
        put_back(trainer, run.shared / "checkpoints" / f"checkpoint-{published}")
    ended_by = "patience" if state.global_step < steps else "max_steps" if training.max_steps else "epochs"
    return FitResult(state.global_step, published, ended_by, trained, measuring.in_words(state, steps))


def train(
    make: Callable[[], Trainer], model: nn.Module, *callbacks: TrainerCallback,
    checkpoint: Path | None = None, ended: bool = False,
) -> tuple[Trainer, int]:  # fmt: skip
    """Build the trainer around `model` and train, quietly and in fp32, from `checkpoint` where there is one.

    Args:
        ended: training had ended at `checkpoint`, whose weights are the result. A Trainer would take one more step: it
            looks behind a step whether that was the last.

    Returns:
        the trainer, in whose state training ended, and the number of trained weights.
    """
    start = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad and quantised(model)}
    with configuration_kept(model):
        with counted_as_one():
            trainer = make()
        trainer.remove_callback(PrinterCallback)  # it prints every step as a dict; the run has a stream and a bar
        guard = NanGuard("bfloat16" if trainer.args.bf16 else "float16" if trainer.args.fp16 else "float32")
        for callback in (*callbacks, guard):
            trainer.add_callback(callback)
        trained = trainable_in_fp32(model, start)
        if checkpoint and ended:
            put_back(trainer, checkpoint)
            trainer.state = state_in(checkpoint)
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
    """Build one of TRL's trainers on the GPU that its model lies on.

    By itself a process that sees several GPUs takes the first, multiplies the batch by their number and copies the
    model to each (`DataParallel`), which TRL's SFTTrainer refuses.

    Args:
        collate: makes a batch of rows; None for the trainer's own.
    """
    device = next(model.parameters()).device
    if device.type == "cuda" and settings.parallel_mode != ParallelMode.DISTRIBUTED:
        vars(settings).update(_setup_devices=device, _n_gpu=1)  # the former is what `settings.device` found and keeps
        torch.cuda.set_device(device)  # accelerate says `cuda`
    return kind(model=model, args=settings, train_dataset=rows, processing_class=tokenizer, data_collator=collate)


@contextmanager
def configuration_kept(model: nn.Module) -> Iterator[None]:
    """A trainer writes what it trains with into the model's configuration (no cache, the tokenizer's pad and end
    tokens). Afterwards the model says of itself what it said before: a whole model is published with it."""
    held = (getattr(m, name, None) for m in model.modules() for name in ("config", "generation_config"))
    kept = [(config, dict(vars(config))) for config in {id(c): c for c in held if hasattr(c, "to_dict")}.values()]
    try:
        yield
    finally:
        for config, said in kept:
            vars(config).clear()
            vars(config).update(said)


def put_trained_adapter(model: nn.Module, adapter: Path | None, lora: Lora, seed: int) -> Any:
    """Put the adapter that trains, `default`, on a model.

    Args:
        adapter: the saved one that it starts from; None for a fresh one.
        lora: the settings of a fresh one.
    """
    torch.manual_seed(seed)  # a fresh adapter's lora_A is random
    if adapter is None:
        return with_new_adapter(model, lora)
    return attach(model, adapter, "default", trainable=True)


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
    """Load the model whose adapter a loss on judgements trains, and print what its reference costs.

    Args:
        start: the artifact that it starts from.
        has_reference: the loss compares it with its start.

    Raises:
        InputError: TRL would read other logits than the model's.
    """
    model = load_base(base, method, device, dtype)
    trl_name = stage.upper()
    problem = f"type {model.config.model_type} has logits that are more than a head on hidden states"
    remedy = "Use stage=reward and stage=ppo."
    require(route_of(model).halves, "stage", stage, f"{problem}, which TRL's {trl_name} reads", remedy)
    model = put_trained_adapter(model, adapter_folder(start), lora, seed)
    if has_reference:
        size = sum(p.numel() * p.element_size() for p in trained_in(model).values())
        print(
            f"the start is kept as the reference: a second adapter of {size / 1e6:,.1f} MB, and a second pass over "
            "each batch"
        )
    else:
        print("no reference is kept: the loss reads the policy alone, once a batch")
    return model


def put_back(trainer: Trainer, checkpoint: Path) -> None:
    """Give the trainer's model the weights that it had at `checkpoint`.

    Raises:
        CorruptFile: one of them is not finite.
    """
    trainer._load_from_checkpoint(str(checkpoint))
    assert isinstance(trainer.model, nn.Module)
    check_tensors(trained_in(trainer.model).items(), "checkpoint", checkpoint.name, ANEW)


def quantised(model: nn.Module) -> bool:
    return bool(getattr(model, "is_loaded_in_4bit", False))


def trainable_in_fp32(model: nn.Module, start: Mapping[str, Tensor]) -> int:
    """Cast every trainable weight to fp32, give it back its value in `start`, and return how many there are.

    TRL casts them to bf16 on a 4-bit base as the trainer is built. Small updates then vanish (at lr 1e-5 only 8 % of
    `lora_A` moved in 20 steps), and an adapter that was copied in starts rounded.
    """
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert trainable, "nothing is trainable"
    for name, parameter in trainable.items():
        parameter.data = start[name].float() if name in start else parameter.data.float()
    return sum(p.numel() for p in trainable.values())


class Reporter(TrainerCallback):
    """Carries what a Trainer logs to the run's one metrics stream, and seals each checkpoint with its hashes; then the
    old ones go.

    Args:
        every: how many steps between rows of `metrics.jsonl`.
        names: the Trainer's name of a figure → ours; the first two are shown beside the progress bar.
        evaluation: has the held-out loss of a step that is to be logged.
    """

    def __init__(
        self, track: Tracker, bar: Progress, every: int, names: Mapping[str, str], evaluation: Evaluation
    ) -> None:
        self.track, self.bar, self.every, self.names, self.evaluation = track, bar, every, names, evaluation

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        figures = {ours: logs[theirs] for theirs, ours in self.names.items() if theirs in (logs or {})}
        if not figures:
            return
        step, losses = state.global_step, self.evaluation.losses
        shown = dict(list(figures.items())[:2])
        if losses:
            shown["held_out_loss"] = losses[max(losses)]
        measured = {"held_out_loss": losses[step]} if step in losses else {}
        self.track.log_step(step, figures | measured)
        if measured or step % self.every == 0 or step in (1, state.max_steps):  # a short run has a beginning too
            self.track.log(step, figures | measured)
        self.bar.advance(step, **shown)  # whoever watches finds the row

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not ranks.is_main():
            return
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        for foreign in ("training_args.bin", "README.md"):  # a pickle that nothing here reads, and a card of no export
            (folder / foreign).unlink(missing_ok=True)
        seal(folder)
        remove_old(folder.parent, CHECKPOINTS, beside(folder, self.evaluation.measuring.published(state)))
