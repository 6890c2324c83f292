"""SFT, full fine-tuning, reward models and preference training that were killed resume to the bit, in any epoch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import disable_caching
from transformers import GPT2Config, GPT2LMHeadModel

from align.__main__ import main
from align.run import file_digest, read_manifest
from align.run.checkpoints import parse_step
from align.track import read_rows
from align.trainers import common
from align.trainers.common import HeldOutEvaluation, Reporter

disable_caching()  # a continued run packs and maps its rows by itself

EPOCHS = 3
PACE = (
    "stage.batch_size=4",
    "stage.micro_batch=2",
    "stage.log_every=1",
    "stage.save_every=1",
    f"stage.epochs={EPOCHS}",
    "device=cpu",
)


class Killed(Reporter):
    """Interrupts the stage at the end of one step: before its checkpoint, inside it, or behind it.

    Before it, the held-out loss has been measured; inside it, the checkpoint has no seal yet.
    """

    at = 0
    place = "behind"

    def here(self, state: Any, place: str) -> None:
        if state.global_step == self.at and place == self.place:
            raise KeyboardInterrupt

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.here(state, "before")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.here(state, "inside")
        super().on_save(args, state, control, **kwargs)
        self.here(state, "behind")


class Stage:
    """One stage in one root, interrupted or not."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch, *command: str) -> None:
        self.root = root
        self.patch = monkeypatch
        self.command = command

    def run(self, at: int = 0, place: str = "behind") -> int:
        """Run the stage, killed at the end of step `at` unless that is 0, and return its exit status. See `Killed`."""
        torch.manual_seed(at)  # a run must not depend on what ran before it in this process
        killed = type("Killed", (Killed,), {"at": at, "place": place})
        with self.patch.context() as patch:
            if at:
                patch.setattr(common, "Reporter", killed)
            return main([*self.command, f"run.root={self.root}"])

    @property
    def folder(self) -> Path:
        (run_folder,) = (self.root / self.command[0].removeprefix("stage=")).iterdir()
        return run_folder

    def checkpoints(self) -> list[str]:
        folders = (self.folder / "checkpoints").glob("checkpoint-*")
        return [p.name for p in sorted(folders, key=parse_step)]

    def losses(self) -> dict[int, float]:
        """Return the held-out loss by step."""
        rows = read_rows(self.folder / "metrics.jsonl")
        return {row["step"]: row["held_out_loss"] for row in rows if "held_out_loss" in row}

    def outcome(self) -> dict[str, Any]:
        """Return all that interruptions must not change."""
        manifest = read_manifest(self.folder)
        assert manifest.status == "done"
        figures = {k: v for k, v in manifest.metrics.items() if k != "peak_rss_mb"}
        files = [*self.folder.glob("artifact/*.safetensors"), self.folder / "metrics.jsonl"]
        assert len(files) == 2
        return {"name": self.folder.name, "metrics": figures, **{p.name: file_digest(p) for p in files}}


@pytest.fixture(scope="module")
def with_dropout(tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build a model that draws random numbers while it trains."""
    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=320,
        n_positions=256,
        n_embd=64,
        n_layer=1,
        n_head=2,
        bos_token_id=1,
        eos_token_id=2,
        resid_pdrop=0.2,
        embd_pdrop=0.2,
        attn_pdrop=0.2,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def stages(
    tmp_path: Path, tiny_model: Path, chats: Path, with_dropout: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Stage]:
    """Return a function that sets up a kind of training in its own folder, all on the same few rows."""
    pairs = tmp_path / "pairs.jsonl"
    conversations = [json.loads(line)["messages"] for line in chats.read_text().splitlines()]
    rows = [
        {"prompt": m[:1], "chosen": m[1:], "rejected": [{"role": "assistant", "content": "No."}], "group_id": str(i)}
        for i, m in enumerate(conversations)
    ]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    on_chats = ("model=hub", "data=jsonl", f"data.path={chats}", "data.limit=20", "data.held_out=0.25")
    held_out_words = ("data=jsonl", "data.limit=20", "stage.held_out=0.2", "data.held_out=0.25")
    on_pairs = (f"init={tiny_model}", f"data.path={pairs}", *held_out_words)
    packed = ("stage.packing=true", "data.max_length=96")
    commands = {
        "sft": ("stage=sft", f"model.path={tiny_model}", *on_chats),
        "sft, packed": ("stage=sft", f"model.path={tiny_model}", *on_chats, *packed, "data.limit=40"),
        "sft, dropout": ("stage=sft", "method=lora", f"model.path={with_dropout}", *on_chats),
        "full": ("stage=full", f"model.path={tiny_model}", *on_chats),
        "full, packed": ("stage=full", f"model.path={tiny_model}", *on_chats, *packed, "data.limit=40"),
        "full, dropout": ("stage=full", f"model.path={with_dropout}", *on_chats),
        "reward": ("stage=reward", *on_pairs),
        "dpo": ("stage=dpo", *on_pairs),
        "orpo": ("stage=dpo", *on_pairs, "stage.loss=orpo"),
        "simpo": ("stage=dpo", *on_pairs, "stage.loss=simpo"),
        "cdpo": ("stage=dpo", *on_pairs, "stage.label_smoothing=0.1"),
        "kto": ("stage=kto", *on_pairs),
    }

    def build_stage(kind: str, root: str, *more: str) -> Stage:
        adapter = () if kind.startswith("full") else ("method.r=4",)
        return Stage(tmp_path / root, monkeypatch, *commands[kind], *PACE, *adapter, *more)

    return build_stage


KINDS = (
    "sft",
    "sft, packed",
    "sft, dropout",
    "full",
    "full, packed",
    "full, dropout",
    "reward",
    "dpo",
    "cdpo",
    "orpo",
    "simpo",
    "kto",
)


@pytest.mark.parametrize("kind", ["sft", "reward", "simpo", "kto"])
def test_killed_in_its_second_epoch_it_goes_on_to_the_bit(stages: Callable[..., Stage], kind: str) -> None:
    uninterrupted = stages(kind, "whole")
    resumed = stages(kind, "parts")
    assert uninterrupted.run() == 0
    steps = len(read_rows(uninterrupted.folder / "metrics.jsonl"))
    at = steps // EPOCHS + 2
    assert resumed.run(at) == 130
    assert read_manifest(resumed.folder).status == "interrupted"
    assert resumed.checkpoints()[-1] == f"checkpoint-{at}"
    for foreign in ("training_args.bin", "README.md"):
        assert not list((resumed.folder / "checkpoints").rglob(foreign))
    assert resumed.run() == 0
    assert not resumed.checkpoints()
    assert resumed.outcome() == uninterrupted.outcome()


@pytest.mark.parametrize("kind", ["full", "dpo"])
def test_killed_behind_its_last_step_in_the_middle_of_an_epoch_it_takes_no_further_one(
    stages: Callable[..., Stage], kind: str
) -> None:
    half = "stage.epochs=0.5"
    uninterrupted = stages(kind, "whole", half)
    resumed = stages(kind, "parts", half)
    assert uninterrupted.run() == 0
    last = len(read_rows(uninterrupted.folder / "metrics.jsonl"))
    assert resumed.run(last) == 130
    assert resumed.checkpoints()[-1] == f"checkpoint-{last}"
    assert resumed.run() == 0
    assert resumed.outcome() == uninterrupted.outcome()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_the_first_and_last_step_of_every_epoch_twice_in_a_row(
    stages: Callable[..., Stage], kind: str
) -> None:
    """One run is killed at all of these steps in turn.

    Others are killed on a side of the first epoch's end, and again before another checkpoint is written.
    """
    uninterrupted = stages(kind, "whole")
    assert uninterrupted.run() == 0
    expected = uninterrupted.outcome()
    rows = read_rows(uninterrupted.folder / "metrics.jsonl")
    epoch_steps, remainder = divmod(len(rows), EPOCHS)
    assert (remainder, epoch_steps >= 2) == (0, True)
    edges = [epoch * epoch_steps + step for epoch in range(EPOCHS) for step in (1, epoch_steps)]

    chain = stages(kind, "chain")
    for step in edges:
        assert chain.run(step) == 130
    assert chain.run() == 0
    assert chain.outcome() == expected

    for first, second in ((epoch_steps, epoch_steps + 1), (epoch_steps + 1, 2 * epoch_steps)):
        killed_twice = stages(kind, f"twice-{first}")
        assert killed_twice.run(first) == 130
        assert killed_twice.checkpoints()[-1] == f"checkpoint-{first}"
        assert killed_twice.run(second, "before") == 130
        assert killed_twice.run() == 0
        assert killed_twice.outcome() == expected


def test_a_torn_checkpoint_is_said_and_the_one_before_is_used(
    stages: Callable[..., Stage], capsys: pytest.CaptureFixture[str]
) -> None:
    uninterrupted = stages("sft", "whole")
    torn = stages("sft", "torn")
    assert uninterrupted.run() == 0
    assert torn.run(6) == 130
    assert torn.checkpoints() == ["checkpoint-5", "checkpoint-6"]
    optimiser = torn.folder / "checkpoints" / "checkpoint-6" / "optimizer.pt"
    optimiser.write_bytes(optimiser.read_bytes()[:-100])
    capsys.readouterr()
    assert torn.run() == 0
    stdout = capsys.readouterr().out
    assert "checkpoint-6 cannot be resumed from and is removed" in stdout
    assert "continuing from checkpoint-5" in stdout
    assert torn.outcome() == uninterrupted.outcome()


# Held-out evaluation during training.

EVALUATED = ("stage.eval_every=2", "stage.save_every=3", "stage.epochs=8", "stage.schedule=constant")
UNTIL_IT_RISES = (*EVALUATED, "stage.publish=best", "stage.patience=2")
BEST = 8
LAST = 12
"""The step with the lowest held-out loss, and the step at which patience has run out."""


def build_rising_evaluation(
    loss: Callable[[int], float], every: int | None, publish: str, patience: int | None
) -> HeldOutEvaluation:
    """Return a measurement of the real held-out loss plus a term that is 0 at step BEST and grows away from it, so that
    the curve turns there on every processor."""
    return HeldOutEvaluation(lambda step: loss(step) + 100 * abs(step - BEST), every, publish, patience)


@pytest.fixture
def rising_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "HeldOutEvaluation", build_rising_evaluation)


def run_until_it_rises(stages: Callable[..., Stage], kind: str) -> Stage:
    """Return a run that was not killed and that ended because its patience ran out."""
    uninterrupted = stages(kind, "whole", *UNTIL_IT_RISES)
    assert uninterrupted.run() == 0
    assert list(uninterrupted.losses()) == list(range(2, LAST + 1, 2))
    return uninterrupted


@pytest.mark.usefixtures("rising_losses")
@pytest.mark.parametrize(
    "kind", ["sft", *(pytest.param(k, marks=pytest.mark.slow) for k in ("full, dropout", "reward", "dpo"))]
)
def test_killed_around_its_best_step_and_while_patience_runs(
    stages: Callable[..., Stage], kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    uninterrupted = run_until_it_rises(stages, kind)
    stdout = capsys.readouterr().out
    metrics = read_manifest(uninterrupted.folder).metrics
    assert f"step {BEST} is published, the lowest held-out loss; training ended at step {LAST} of " in stdout
    assert (metrics["published_step"], metrics["steps"], metrics["ended_by"]) == (BEST, LAST, "patience")
    after = metrics.get("loss_after", metrics.get("loss"))
    assert after == uninterrupted.losses()[BEST]  # the published weights were measured at that step
    before_best = (BEST, "before")
    before_last = (LAST, "before")
    saved = 3 * ((BEST - 1) // 3)  # the last regular checkpoint before the best step
    for kills in (
        [
            before_best,
            (BEST, "inside"),
            (BEST, "behind"),
            (BEST + 2, "before"),
            before_last,
            (LAST, "inside"),
            (LAST, "behind"),
        ],
        [(saved, "behind"), before_best, before_last],
    ):
        killed = stages(kind, f"killed-{len(kills)}", *UNTIL_IT_RISES)
        for at, place in kills:
            assert killed.run(at, place) == 130
            assert len(killed.checkpoints()) <= 2 + (place == "inside")
        assert killed.run() == 0
        assert killed.outcome() == uninterrupted.outcome()


@pytest.mark.usefixtures("rising_losses")
def test_the_best_is_kept_until_there_is_a_better_one_and_is_missed_where_it_is_altered(
    stages: Callable[..., Stage], capsys: pytest.CaptureFixture[str]
) -> None:
    uninterrupted = run_until_it_rises(stages, "sft")
    altered = stages("sft", "altered", *UNTIL_IT_RISES)
    assert altered.run(LAST) == 130
    assert altered.checkpoints() == [f"checkpoint-{BEST}", f"checkpoint-{LAST}"]
    weights = altered.folder / "checkpoints" / f"checkpoint-{BEST}" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    capsys.readouterr()
    assert altered.run() == 0
    assert f"checkpoint-{LAST} cannot be resumed from and is removed" in capsys.readouterr().out
    assert altered.outcome() == uninterrupted.outcome()


@pytest.mark.parametrize(
    "kind", ["sft, dropout", "reward", "orpo", "kto", pytest.param("full, dropout", marks=pytest.mark.slow)]
)
def test_whoever_is_measured_trains_on_as_if_nobody_had_asked(
    stages: Callable[..., Stage], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The evaluation changes no bit, even if it draws random numbers."""
    without_evaluation = stages(kind, "alone")
    with_evaluation = stages(kind, "asked", "stage.eval_every=1")
    assert without_evaluation.run() == 0

    def build_drawing_evaluation(loss: Callable[[int], float], *settings: Any) -> HeldOutEvaluation:
        return HeldOutEvaluation(lambda step: loss(step) + 0 * float(torch.rand(1)), *settings)

    monkeypatch.setattr(common, "HeldOutEvaluation", build_drawing_evaluation)
    assert with_evaluation.run() == 0
    rows = [read_rows(stage.folder / "metrics.jsonl") for stage in (without_evaluation, with_evaluation)]
    assert with_evaluation.losses().keys() == {row["step"] for row in rows[0]}
    assert [{k: v for k, v in row.items() if k != "held_out_loss"} for row in rows[1]] == rows[0]
    digests = [
        file_digest(next(stage.folder.glob("artifact/*.safetensors")))
        for stage in (without_evaluation, with_evaluation)
    ]
    assert digests[0] == digests[1]
