"""Each stage that computes, with `device=cuda` and two pretended cards.

Where a tensor of the card meets one of the host, `simulate_card` fails as CUDA would.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from simulated_gpu import CARD, MixedDevices, OnCard, simulate_card

from align.__main__ import main
from align.models import forward, roles
from align.run import read_manifest
from align.stages import preload
from align.track import read_rows

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card, for which benchmarks/gpu.sh is made"),
]


FP32 = ("dtype=float32",)
"""Trainers in bf16 need autocast, which the pretended card lacks."""
WITH_TORCH = ("sft", "dpo", "kto", "reward", "ppo", "eval")


class Cards:
    """Commands on the card, all in one `run.root`."""

    def __init__(self, root: Path, data: list[str], pairs: list[str]) -> None:
        self.root = root
        self.data = data
        self.pairs = pairs

    def run(self, stage: str, *words: str, device: str = "cuda") -> Path:
        """Run a stage that must succeed, and return the run's folder."""
        name = f"{stage}-{device}"
        arguments = [f"stage={stage}", f"device={device}", f"run.root={self.root}", f"run.name={name}", *FP32, *words]
        with simulate_card() if device == "cuda" else nullcontext():
            assert main([*arguments, "rollout.max_new_tokens=4"]) == 0, self.log(stage)
        return self.root / stage / name

    def log(self, stage: str) -> str:
        return "".join(path.read_text(encoding="utf-8")[-3000:] for path in self.root.glob(f"{stage}/*/log.txt"))


TRL = ("stage.optimiser=adamw", "stage.batch_size=4", "stage.micro_batch=2", "stage.epochs=1")
"""bitsandbytes has its optimisers in kernels for CUDA alone."""
PAIRS = ("stage.held_out=0.3", *TRL)
SUPERVISED = ("stage.eval_size=2", "stage.lr=1e-2", "stage.log_every=1", *TRL, "stage.max_steps=2")


@pytest.fixture(scope="module")
def cards(tiny_model: Path, chats: Path, tmp_path_factory: pytest.TempPathFactory) -> Cards:
    """Build pairs of answers, and train an adapter and a reward model on the card."""
    preload(WITH_TORCH)  # before there is a card: PEFT looks for kernels as it is imported
    root = tmp_path_factory.mktemp("cards") / "runs"
    turns = [json.loads(line)["messages"] for line in chats.read_text(encoding="utf-8").splitlines()[:12]]
    worse = [{"role": "assistant", "content": "No."}]
    rows = [{"chosen": turn[:2], "rejected": [*turn[:1], *worse]} for turn in turns]
    file = root.with_name("pairs.jsonl")
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = ["data=jsonl", f"data.path={chats}", "data.held_out=0.25", "data.max_length=128"]
    cards = Cards(root, data, ["data=jsonl", f"data.path={file}", "data.held_out=0", *PAIRS])
    cards.run("sft", *data, *SUPERVISED, "model=hub", f"model.path={tiny_model}", "method=lora")
    cards.run("reward", *cards.pairs, "method=lora")
    return cards


STARTS = ("init=sft:sft-cuda", "reward.ref=reward:reward-cuda")
PPO = ("stage.updates=1", "stage.batch_size=4", "stage.micro_batch=2", "stage.normalise_on=4", *STARTS)
STAGES = {
    "dpo": ("stage.eval_every=1", "stage.publish=best"),
    "kto": ("stage.eval_every=1", "stage.publish=best"),
    "ppo": (*PPO, "stage.eval_every=1", "stage.eval_prompts=2", "stage.shown=2", "dtype=auto"),
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_runs_on_a_card(cards: Cards, stage: str):
    data = cards.pairs if stage in ("dpo", "kto") else cards.data
    manifest = read_manifest(cards.run(stage, *data, *STAGES[stage], "method=lora"))
    assert manifest.hardware["device"] == "cuda"
    assert manifest.hardware["gpu"] == "a pretended card"
    assert manifest.hardware["dtype"] == ("bfloat16" if stage == "ppo" else "float32")
    assert manifest.metrics["peak_gpu_mb"] == 1.0
    if stage == "ppo":
        cards.run("eval", *cards.data, "stage.prompts=2", "method=lora")


def test_a_sampler_on_the_cpu_serves_a_learner_on_the_card(cards: Cards):
    folder = cards.run("ppo", *cards.data, *PPO, "rollout.engine=bank", "method=lora", "run.name=bank")
    assert read_rows(folder.with_name("bank") / "metrics.jsonl")[0]["sampler_kl"] < 1e-6


@pytest.mark.parametrize("method", ["qlora", "full"])
def test_a_method_trains_on_a_card_what_it_trains_on_a_cpu(cards: Cards, method: str, tiny_model: Path):
    """There are two cards: the batch stays as it is, and nothing is copied to the second."""
    stage = "full" if method == "full" else "sft"
    words = [*cards.data, *SUPERVISED, "model=hub", f"model.path={tiny_model}"]
    words += [] if method == "full" else [f"method={method}"]
    on_card, on_cpu = (
        read_rows(
            cards.run(stage, *words, f"run.name={method}-{device}", device=device).with_name(f"{method}-{device}")
            / "metrics.jsonl"
        )
        for device in ("cuda", "cpu")
    )
    assert len(on_card) == len(on_cpu) > 0
    for card_row, cpu_row in zip(on_card, on_cpu, strict=True):
        assert card_row["loss"] == pytest.approx(cpu_row["loss"], rel=1e-4)
        assert card_row["grad_norm"] == pytest.approx(cpu_row["grad_norm"], rel=1e-3)


@pytest.fixture
def card() -> Iterator[None]:
    with simulate_card():
        yield


def test_the_card_refuses_what_cuda_refuses_and_nothing_else(card: None):
    on_card = torch.arange(3.0, device="cuda")
    on_host = torch.arange(3.0)
    refused = [
        lambda: on_card + on_host,
        lambda: on_host + on_card,
        lambda: on_card.sum() * on_host,
        lambda: torch.cat([on_card, on_host]),
        lambda: on_host[torch.tensor([0], device="cuda")],
        lambda: on_host.sum().add_(on_card.sum()),
        lambda: torch.where(on_card > 1, on_card, on_host),
        lambda: on_card.index_add_(0, torch.tensor([0]), on_card[:1]),
    ]
    for operation in refused:
        with pytest.raises(MixedDevices):
            operation()
    with pytest.raises(TypeError, match="numpy"):
        on_card.numpy()
    allowed = [
        on_card * 2,
        on_card + on_host.sum(),
        on_card[torch.tensor([0, 2])],
        on_card[on_card > 0],
        on_card.clone().copy_(on_host),
        on_host.to("cuda"),
        torch.where(on_card > 1, on_card, 0.0),
        torch.zeros_like(on_card),
        on_card.new_ones(2),
    ]
    assert all(type(tensor) is OnCard and tensor.device == CARD for tensor in allowed)
    assert type(on_card.cpu()) is torch.Tensor
    assert on_card[on_card > 0].tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("module", "name", "forgets"),
    [
        (forward, "scatter_tokens", lambda values, mask: torch.zeros(mask.shape).masked_scatter(mask, values)),
        (
            roles,
            "select_last_states",
            lambda hidden, mask: hidden[torch.arange(len(mask)), mask.sum(-1).cpu() - 1].cpu(),
        ),
    ],
)
def test_a_forgotten_device_ends_ppo(cards: Cards, monkeypatch: pytest.MonkeyPatch, module, name, forgets):
    monkeypatch.setattr(module, name, forgets)
    words = ["stage=ppo", *cards.data, *PPO, "method=lora", "device=cuda", f"run.root={cards.root}", f"run.name={name}"]
    with simulate_card():
        assert main([*words, "rollout.max_new_tokens=4"]) == 1
    assert "MixedDevices" in (cards.root / "ppo" / name / "log.txt").read_text(encoding="utf-8")
