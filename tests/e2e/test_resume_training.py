"""SFT, full fine-tuning, reward models and DPO that were killed, in any epoch and however often, go on to the bit."""

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
    "stage.batch_size=4", "stage.micro_batch=2", "stage.log_every=1", "stage.save_every=1", f"stage.epochs={EPOCHS}",
    "device=cpu",
)  # fmt: skip


class Killed(Reporter):
    """Ends the process, as far as the stage can tell, at the end of one step: before its checkpoint (what is held out
    has been measured), inside it (it has no seal yet), or behind it."""

    at, place = 0, "behind"

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
        self.root, self.patch, self.command = root, monkeypatch, command

    def run(self, at: int = 0, place: str = "behind") -> int:
        """The exit status; killed at the end of step `at`, if at all, see `Killed`."""
        torch.manual_seed(at)  # a run must not depend on what ran before it in this process
        killed = type("Killed", (Killed,), {"at": at, "place": place})
        with self.patch.context() as patch:
            if at:
                patch.setattr(common, "Reporter", killed)
            return main([*self.command, f"run.root={self.root}"])

    @property
    def folder(self) -> Path:
        (found,) = (self.root / self.command[0].removeprefix("stage=")).iterdir()
        return found

    def checkpoints(self) -> list[str]:
        found = (self.folder / "checkpoints").glob("checkpoint-*")
        return [p.name for p in sorted(found, key=parse_step)]

    def losses(self) -> dict[int, float]:
        """Step → held-out loss."""
        rows = read_rows(self.folder / "metrics.jsonl")
        return {row["step"]: row["held_out_loss"] for row in rows if "held_out_loss" in row}

    def outcome(self) -> dict[str, Any]:
        """All that must be the same, whatever happened on the way."""
        manifest = read_manifest(self.folder)
        assert manifest.status == "done"
        figures = {k: v for k, v in manifest.metrics.items() if k != "peak_rss_mb"}
        files = [*self.folder.glob("artifact/*.safetensors"), self.folder / "metrics.jsonl"]
        assert len(files) == 2
        return {"name": self.folder.name, "metrics": figures, **{p.name: file_digest(p) for p in files}}


@pytest.fixture(scope="module")
def with_dropout(tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that draws random numbers while it trains."""
    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=320, n_positions=256, n_embd=64, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2,
        resid_pdrop=0.2, embd_pdrop=0.2, attn_pdrop=0.2,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def stages(
    tmp_path: Path, tiny_model: Path, chats: Path, with_dropout: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Stage]:
    """A kind of training in a folder of its own, all on the same few rows."""
    pairs = tmp_path / "pairs.jsonl"
    asked = [json.loads(line)["messages"] for line in chats.read_text().splitlines()]
    rows = [
        {"prompt": m[:1], "chosen": m[1:], "rejected": [{"role": "assistant", "content": "No."}], "group_id": str(i)}
        for i, m in enumerate(asked)
    ]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    on_chats = ("model=hub", "data=jsonl", f"data.path={chats}", "data.limit=20", "data.held_out=0.25")
    held = ("data=jsonl", "data.limit=20", "stage.held_out=0.2", "data.held_out=0.25")
    on_pairs = (f"init={tiny_model}", f"data.path={pairs}", *held)
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

    def stage(kind: str, root: str, *more: str) -> Stage:
        adapter = () if kind.startswith("full") else ("method.r=4",)
        return Stage(tmp_path / root, monkeypatch, *commands[kind], *PACE, *adapter, *more)

    return stage


KINDS = (
    "sft", "sft, packed", "sft, dropout", "full", "full, packed", "full, dropout",
    "reward", "dpo", "cdpo", "orpo", "simpo", "kto",
)  # fmt: skip


@pytest.mark.parametrize("kind", ["sft", "reward", "simpo", "kto"])
def test_killed_in_its_second_epoch_it_goes_on_to_the_bit(stages: Callable[..., Stage], kind: str) -> None:
    whole, parts = stages(kind, "whole"), stages(kind, "parts")
    assert whole.run() == 0
    steps = len(read_rows(whole.folder / "metrics.jsonl"))
    at = steps // EPOCHS + 2
    assert parts.run(at) == 130
    assert read_manifest(parts.folder).status == "interrupted"
    assert parts.checkpoints()[-1] == f"checkpoint-{at}"
    for foreign in ("training_args.bin", "README.md"):
        assert not list((parts.folder / "checkpoints").rglob(foreign))
    assert parts.run() == 0
    assert not parts.checkpoints()
    assert parts.outcome() == whole.outcome()


@pytest.mark.parametrize("kind", ["full", "dpo"])
def test_killed_behind_its_last_step_in_the_middle_of_an_epoch_it_takes_no_further_one(
    stages: Callable[..., Stage], kind: str
) -> None:
    half = "stage.epochs=0.5"
    whole, parts = stages(kind, "whole", half), stages(kind, "parts", half)
    assert whole.run() == 0
    last = len(read_rows(whole.folder / "metrics.jsonl"))
    assert parts.run(last) == 130
    assert parts.checkpoints()[-1] == f"checkpoint-{last}"
    assert parts.run() == 0
    assert parts.outcome() == whole.outcome()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_the_first_and_last_step_of_every_epoch_twice_in_a_row(
    stages: Callable[..., Stage], kind: str
) -> None:
    """All of them one after another; and at both sides of the first epoch's end, then again before another checkpoint
    is written."""
    whole = stages(kind, "whole")
    assert whole.run() == 0
    expected, rows = whole.outcome(), read_rows(whole.folder / "metrics.jsonl")
    a_epoch, rest = divmod(len(rows), EPOCHS)
    assert (rest, a_epoch >= 2) == (0, True)
    edges = [epoch * a_epoch + step for epoch in range(EPOCHS) for step in (1, a_epoch)]

    chain = stages(kind, "chain")
    for step in edges:
        assert chain.run(step) == 130
    assert chain.run() == 0
    assert chain.outcome() == expected

    for first, second in ((a_epoch, a_epoch + 1), (a_epoch + 1, 2 * a_epoch)):
        twice = stages(kind, f"twice-{first}")
        assert twice.run(first) == 130
        assert twice.checkpoints()[-1] == f"checkpoint-{first}"
        assert twice.run(second, "before") == 130
        assert twice.run() == 0
        assert twice.outcome() == expected


def test_a_torn_checkpoint_is_said_and_the_one_before_is_used(
    stages: Callable[..., Stage], capsys: pytest.CaptureFixture[str]
) -> None:
    whole, torn = stages("sft", "whole"), stages("sft", "torn")
    assert whole.run() == 0
    assert torn.run(6) == 130
    assert torn.checkpoints() == ["checkpoint-5", "checkpoint-6"]
    optimiser = torn.folder / "checkpoints" / "checkpoint-6" / "optimizer.pt"
    optimiser.write_bytes(optimiser.read_bytes()[:-100])
    capsys.readouterr()
    assert torn.run() == 0
    said = capsys.readouterr().out
    assert "checkpoint-6 is torn or altered" in said
    assert "continuing from checkpoint-5" in said
    assert torn.outcome() == whole.outcome()


# Measured while it trains.

EVALUATED = ("stage.eval_every=2", "stage.save_every=3", "stage.epochs=8", "stage.schedule=constant")
UNTIL_IT_RISES = (*EVALUATED, "stage.publish=best", "stage.patience=2")
BEST, LAST = 8, 12
"""The step with the lowest held-out loss, and the step at which patience has run out."""


def rising_evaluation(
    loss: Callable[[int], float], every: int | None, publish: str, patience: int | None
) -> HeldOutEvaluation:
    """Return a measurement of the real held-out loss plus a term that is 0 at step BEST and grows away from it, so that
    the curve turns there on every processor."""
    return HeldOutEvaluation(lambda step: loss(step) + 100 * abs(step - BEST), every, publish, patience)


@pytest.fixture
def rising_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "HeldOutEvaluation", rising_evaluation)


def run_until_it_rises(stages: Callable[..., Stage], kind: str) -> Stage:
    """Return a run that was not killed and that ended because its patience ran out."""
    whole = stages(kind, "whole", *UNTIL_IT_RISES)
    assert whole.run() == 0
    assert list(whole.losses()) == list(range(2, LAST + 1, 2))
    return whole


@pytest.mark.usefixtures("rising_losses")
@pytest.mark.parametrize(
    "kind", ["sft", *(pytest.param(k, marks=pytest.mark.slow) for k in ("full, dropout", "reward", "dpo"))]
)
def test_killed_around_its_best_step_and_while_patience_runs(
    stages: Callable[..., Stage], kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = run_until_it_rises(stages, kind)
    said, metrics = capsys.readouterr().out, read_manifest(whole.folder).metrics
    assert f"step {BEST} is published, the lowest held-out loss; training ended at step {LAST} of " in said
    assert (metrics["published_step"], metrics["steps"], metrics["ended_by"]) == (BEST, LAST, "patience")
    after = metrics.get("loss_after", metrics.get("loss"))
    assert after == whole.losses()[BEST]  # what is published is what was measured then
    between = (BEST, "before")
    ended = (LAST, "before")
    saved = 3 * ((BEST - 1) // 3)  # the last step in front of the best that is saved whatever was measured
    for kills in (
        [between, (BEST, "inside"), (BEST, "behind"), (BEST + 2, "before"), ended, (LAST, "inside"), (LAST, "behind")],
        [(saved, "behind"), between, ended],
    ):
        killed = stages(kind, f"killed-{len(kills)}", *UNTIL_IT_RISES)
        for at, place in kills:
            assert killed.run(at, place) == 130
            assert len(killed.checkpoints()) <= 2 + (place == "inside")
        assert killed.run() == 0
        assert killed.outcome() == whole.outcome()


@pytest.mark.usefixtures("rising_losses")
def test_the_best_is_kept_until_there_is_a_better_one_and_is_missed_where_it_is_altered(
    stages: Callable[..., Stage], capsys: pytest.CaptureFixture[str]
) -> None:
    whole = run_until_it_rises(stages, "sft")
    altered = stages("sft", "altered", *UNTIL_IT_RISES)
    assert altered.run(LAST) == 130
    assert altered.checkpoints() == [f"checkpoint-{BEST}", f"checkpoint-{LAST}"]
    weights = altered.folder / "checkpoints" / f"checkpoint-{BEST}" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    capsys.readouterr()
    assert altered.run() == 0
    assert f"checkpoint-{LAST} is torn or altered" in capsys.readouterr().out
    assert altered.outcome() == whole.outcome()


@pytest.mark.parametrize(
    "kind", ["sft, dropout", "reward", "orpo", "kto", pytest.param("full, dropout", marks=pytest.mark.slow)]
)
def test_whoever_is_measured_trains_on_as_if_nobody_had_asked(
    stages: Callable[..., Stage], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit; and even where asking draws random numbers."""
    alone, asked = stages(kind, "alone"), stages(kind, "asked", "stage.eval_every=1")
    assert alone.run() == 0

    def drawing(loss: Callable[[int], float], *settings: Any) -> HeldOutEvaluation:
        return HeldOutEvaluation(lambda step: loss(step) + 0 * float(torch.rand(1)), *settings)

    monkeypatch.setattr(common, "HeldOutEvaluation", drawing)
    assert asked.run() == 0
    rows = [read_rows(stage.folder / "metrics.jsonl") for stage in (alone, asked)]
    assert asked.losses().keys() == {row["step"] for row in rows[0]}
    assert [{k: v for k, v in row.items() if k != "held_out_loss"} for row in rows[1]] == rows[0]
    tensors = [file_digest(next(stage.folder.glob("artifact/*.safetensors"))) for stage in (alone, asked)]
    assert tensors[0] == tensors[1]
