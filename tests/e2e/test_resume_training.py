"""SFT, full fine-tuning, reward models and DPO that were killed, in any epoch and however often, go on to the bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import disable_caching
from transformers import GPT2Config, GPT2LMHeadModel

from align.__main__ import main
from align.run import file_digest, read_manifest
from align.run.checkpoints import step_of
from align.track import read_rows
from align.trainers import common
from align.trainers.common import Reporter

disable_caching()  # a continued run packs and maps its rows by itself

EPOCHS = 3
PACE = (
    "stage.batch_size=4", "stage.micro_batch=2", "stage.log_every=1", "stage.save_every=1", f"stage.epochs={EPOCHS}",
    "method.r=4", "device=cpu",
)  # fmt: skip


class Killed(Reporter):
    """Ends the process, as far as the stage can tell, at the end of one step: behind its checkpoint or before it."""

    at, behind = 0, True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_save(args, state, control, **kwargs)
        if self.behind and state.global_step == self.at:
            raise KeyboardInterrupt

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.behind and state.global_step == self.at:
            raise KeyboardInterrupt


class Stage:
    """One stage in one root, interrupted or not."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch, *command: str) -> None:
        self.root, self.patch, self.command = root, monkeypatch, command

    def run(self, at: int = 0, behind: bool = True) -> int:
        """The exit status; killed at the end of step `at`, if at all, `behind` its checkpoint or before it."""
        torch.manual_seed(at)  # a run must not depend on what ran before it in this process
        killed = type("Killed", (Killed,), {"at": at, "behind": behind})
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
        return [p.name for p in sorted(found, key=step_of)]

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
    on_pairs = (
        f"init={tiny_model}",
        "data=jsonl",
        f"data.path={pairs}",
        "data.limit=20",
        "stage.held_out=0.2",
        "data.held_out=0.25",
    )
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
    }

    def stage(kind: str, root: str, *more: str) -> Stage:
        return Stage(tmp_path / root, monkeypatch, *commands[kind], *PACE, *more)

    return stage


KINDS = ("sft", "sft, packed", "sft, dropout", "full", "full, packed", "full, dropout", "reward", "dpo")


@pytest.mark.parametrize("kind", ["sft", "reward"])
def test_killed_in_its_second_epoch_it_goes_on_to_the_bit(stages: Callable[..., Stage], kind: str) -> None:
    whole, parts = stages(kind, "whole"), stages(kind, "parts")
    assert whole.run() == 0
    steps = len(read_rows(whole.folder / "metrics.jsonl"))
    at = steps // EPOCHS + 2
    assert parts.run(at) == 130
    assert read_manifest(parts.folder).status == "interrupted"
    assert parts.checkpoints()[-1] == f"checkpoint-{at}"
    assert not list((parts.folder / "checkpoints").rglob("training_args.bin"))
    assert parts.run() == 0
    assert not parts.checkpoints()
    assert parts.outcome() == whole.outcome()


@pytest.mark.parametrize("kind", ["sft", "full", "dpo"])
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
        assert twice.run(second, behind=False) == 130
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


def test_the_model_with_dropout_draws_random_numbers_while_it_trains(
    stages: Callable[..., Stage], with_dropout: Path, tmp_path: Path
) -> None:
    """Else the kinds with dropout say nothing."""
    without = tmp_path / "without"
    shutil.copytree(with_dropout, without)
    config = json.loads((without / "config.json").read_text())
    (without / "config.json").write_text(json.dumps(config | {k: 0.0 for k in config if k.endswith("_pdrop")}))
    losses = []
    for root, model in (("with", with_dropout), ("without", without)):
        stage = stages("full, dropout", root)
        stage.command = tuple(f"model.path={model}" if w.startswith("model.path=") else w for w in stage.command)
        assert stage.run() == 0
        losses.append([row["loss"] for row in read_rows(stage.folder / "metrics.jsonl")])
    assert not set(losses[0]) & set(losses[1])
