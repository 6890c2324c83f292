"""DPO on our pairs: its loss, its reference, and the weights that it moves."""

from __future__ import annotations

import json
import math
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from test_trainers import arguments
from transformers import TrainerCallback

from align import trainers
from align.__main__ import main
from align.config.compose import build_config, compose_tree
from align.config.identity import select_identity
from align.config.root import to_plain_dict
from align.core.errors import InputError
from align.core.types import Message, Preference
from align.data.pairs import TokenizedPair
from align.evals.held_out import compute_pair_logprobs
from align.models.actors import ModelActor
from align.models.adapters import add_new_adapter, attach_adapter, save_adapter
from align.models.base import read_base
from align.models.load import load_base
from align.models.lora import Lora
from align.run import Base, read_manifest
from align.stages.dpo import require_answer_tokens
from align.track import read_rows
from align.trainers.common import train
from align.trainers.dpo import REFERENCE, build_dpo_trainer

pytestmark = pytest.mark.usefixtures("blank_plots")

PAIRS = [
    TokenizedPair([1, 40, 41, 50, 51, 2], [1, 40, 41, 60, 2], 3, 3),
    TokenizedPair([1, 42, 50, 2], [1, 42, 60, 61, 62, 2], 2, 2),
    TokenizedPair([1, 43, 44, 45, 50, 52, 53], [1, 43, 44, 45, 60, 2], 4, 4),
    TokenizedPair([1, 46, 47, 50, 51, 2], [1, 46, 47, 63, 60, 61, 2], 3, 3),
]


class Seen(TrainerCallback):
    """A callback that keeps the rows that the trainer logs."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:
            self.rows.append(logs)


@pytest.fixture
def base(tiny_model: Path) -> Base:
    return read_base(tiny_model, "tiny")


@pytest.fixture
def adapter(base: Base, tmp_path: Path) -> Path:
    """A supervised adapter that changes the base's logits."""
    torch.manual_seed(3)
    model = add_new_adapter(load_base(base, "qlora", torch.device("cpu"), torch.float32), Lora(4, 8))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    save_adapter(model, tmp_path / "init", base)
    return tmp_path / "init"


def train_policy(
    base: Base, adapter: Path, tokenizer: Any, output: Path, steps: int = 12, **loss_settings: Any
) -> tuple[Any, Seen]:
    model = attach_adapter(
        load_base(base, "qlora", torch.device("cpu"), torch.float32), adapter, "default", trainable=True
    )
    log = Seen()
    settings = {"beta": 0.5, "loss": "sigmoid", **loss_settings}
    training_arguments = arguments(output, steps, lr=5e-3)
    train(partial(build_dpo_trainer, model, tokenizer, PAIRS, training_arguments, **settings), model, log)
    return model, log


def select_adapter_tensors(model: Any, name: str) -> dict[str, torch.Tensor]:
    return {n.replace(f".{name}.", "."): p.detach() for n, p in model.named_parameters() if f".{name}." in n}


def compute_margin_gains(model: Any, by_token: bool = False) -> torch.Tensor:
    """Return each pair's log-probability margin of the policy minus that of its reference."""

    def compute_margins(name: str) -> torch.Tensor:
        with ModelActor(model, name).use():
            chosen, rejected = compute_pair_logprobs(model.eval(), PAIRS, 0, by_token).unbind(-1)
        return chosen - rejected

    return compute_margins("default") - compute_margins(REFERENCE)


def test_it_starts_at_log_2_and_learns_the_order(base: Base, adapter: Path, tiny_tokenizer: Any, tmp_path: Path):
    model, log = train_policy(base, adapter, tiny_tokenizer, tmp_path / "out")
    assert log.rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)  # before the first step π is π_ref
    assert log.rows[-1]["loss"] < 0.3
    assert (compute_margin_gains(model) > 0).all()


def test_the_reference_is_the_supervised_adapter_and_stays_it(
    base: Base, adapter: Path, tiny_tokenizer: Any, tmp_path: Path
):
    model, _ = train_policy(base, adapter, tiny_tokenizer, tmp_path / "out")
    start_model = PeftModel.from_pretrained(load_base(base, "qlora", torch.device("cpu"), torch.float32), str(adapter))
    start = select_adapter_tensors(start_model, "default")
    reference = select_adapter_tensors(model, REFERENCE)
    moved = select_adapter_tensors(model, "default")
    assert start.keys() == reference.keys() == moved.keys()
    assert all(torch.equal(start[name], reference[name]) for name in start)
    assert all(not torch.equal(start[name], moved[name]) for name in start)
    assert {p.dtype for p in moved.values()} == {torch.float32}


def test_the_stage_publishes_an_adapter_that_others_go_on_with(
    tiny_model: Path, chats: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    pairs = tmp_path / "pairs.jsonl"
    root = tmp_path / "runs"
    rejected = [{"role": "assistant", "content": "No."}]
    lines = chats.read_text(encoding="utf-8").splitlines()
    rows = [
        {"prompt": m[:1], "chosen": m[1:], "rejected": rejected}
        for m in (json.loads(line)["messages"] for line in lines)
    ]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data_args = ["data=jsonl", f"data.path={pairs}", "data.held_out=0.2", f"run.root={root}"]
    train_args = [
        "stage=dpo",
        f"init={tiny_model}",
        "stage.lr=5e-3",
        "stage.epochs=4",
        "stage.log_every=1",
        "run.name=d",
    ]
    assert main([*train_args, *data_args]) == 0
    metrics = read_manifest(root / "dpo" / "d").metrics
    assert metrics["accuracy"]["value"] == 1
    assert metrics["loss"] < metrics["loss_before"]
    assert {"loss", "accuracy", "margin", "chosen_logprob"} <= read_rows(root / "dpo" / "d" / "metrics.jsonl")[0].keys()
    eval_args = ["stage=eval", "artifact=dpo:d", "rollout.max_new_tokens=4", "stage.prompts=4", *data_args]
    assert main(eval_args) == 0, capfd.readouterr().err
    assert main(["stage=export", "artifact=dpo:latest", f"run.root={root}"]) == 0, capfd.readouterr().err


@pytest.mark.parametrize("loss", ["orpo", "simpo"])
def test_a_loss_without_a_reference_makes_a_policy_that_others_go_on_with(
    tiny_model: Path, chats: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], loss: str
):
    pairs = tmp_path / "pairs.jsonl"
    root = tmp_path / "runs"
    conversations = [json.loads(line)["messages"] for line in chats.read_text(encoding="utf-8").splitlines()]
    rows = [
        {"prompt": m[:1], "chosen": m[1:2], "rejected": [{"role": "assistant", "content": "No."}]}
        for m in conversations
    ]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    train_args = [
        "stage=dpo",
        f"init={tiny_model}",
        "stage.lr=5e-3",
        "stage.epochs=4",
        "run.name=d",
        f"stage.loss={loss}",
    ]
    data_args = ["data=jsonl", f"data.path={pairs}", f"run.root={root}", "stage.log_every=1", "stage.eval_every=4"]
    assert main([*train_args, *data_args, "stage.gradient_checkpointing=true"]) == 0, capfd.readouterr().err
    out = capfd.readouterr().out
    metrics = read_manifest(root / "dpo" / "d").metrics
    assert "no reference is kept: the loss reads the policy alone, once a batch" in out
    assert metrics["accuracy"]["value"] == 1  # compared with the start, as with every loss
    assert metrics["loss"] < metrics["loss_before"]
    log_rows = read_rows(root / "dpo" / "d" / "metrics.jsonl")
    assert {"loss", "accuracy", "margin", "chosen_token_logprob"} <= log_rows[0].keys()
    assert log_rows[-1]["held_out_loss"] == metrics["loss"]
    assert main(["stage=export", "artifact=dpo:latest", f"run.root={root}"]) == 0, capfd.readouterr().err


def select_stage_identity(*words: str) -> dict[str, Any]:
    return select_identity(
        "dpo", to_plain_dict(build_config(compose_tree(["stage=dpo", *words]))), ["init", "data", "base"]
    )["stage"]


def test_a_setting_spelled_out_at_its_default_makes_no_other_run():
    assert select_stage_identity()["beta"] == 0.1
    assert (
        select_stage_identity()
        == select_stage_identity("stage.beta=0.1")
        == select_stage_identity("stage.label_smoothing=0")
    )
    assert select_stage_identity("stage.loss=simpo")["beta"] == 2.0
    assert select_stage_identity("stage.loss=simpo") != select_stage_identity(
        "stage.loss=simpo", "stage.simpo_gamma=0.5"
    )


def test_a_loss_that_trl_lacks_is_refused_before_anything_is_loaded(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(trainers, "EXPERIMENTAL", {"orpo": "gone"})
    assert main(["stage=dpo", "stage.loss=orpo", f"init={tiny_model}", "data=jsonl", "data.path=no.jsonl"]) == 2
    stderr = capfd.readouterr().err
    assert f"stage.loss=orpo: is trained by trl.experimental.gone, which TRL {version('trl')} does not have" in stderr
    assert "pip install 'trl==1.16.*'" in stderr


def test_a_mean_over_the_tokens_of_an_answer_without_any_is_refused():
    turn = (Message("assistant", "Yes."),)
    pref = Preference((Message("user", "Hi"),), turn, (Message("assistant", ""),), id="p7")
    require_answer_tokens("simpo", [(pref, TokenizedPair([1, 2, 3], [1, 2, 4], 2, 2))])
    with pytest.raises(InputError, match=r"stage\.loss=simpo: .* an answer of pair p7 has none"):
        require_answer_tokens("simpo", [(pref, TokenizedPair([1, 2, 3], [1, 2], 2, 2))])


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("stage.beta=0", "stage.beta"),
        ("method=full", "an adapter"),
        ("data=chitchat", "preference pairs"),
        ("stage.loss=ipo stage.label_smoothing=0.1", "stage.label_smoothing=0.1: is not read by stage.loss=ipo"),
        ("stage.simpo_gamma=2", "Drop it, or use stage.loss=simpo"),
    ],
)
def test_what_cannot_be_is_refused(word: str, told: str, capfd: pytest.CaptureFixture[str]):
    assert main(["stage=dpo", *word.split()]) == 2
    assert told in capfd.readouterr().err
