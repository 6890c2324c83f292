"""No tensor is made without a device that its caller chose. The syntax tree is checked, because CI has no GPU."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from serving_engines import FAMILIES, OutputRecorder, build_base_model, build_sampling_params, draw_prompt
from simulated_gpu import CARD, OnCard, move_to_card, simulate_card
from torch import Tensor

from align.core.types import Rollout
from align.models.fastpath import disable_fast_path
from align.models.load import ALLOCATOR, choose_device
from align.ops.gae import gae
from align.ops.logprobs import GPU_LOGITS, LOGITS, choose_chunk_rows
from align.rollout.one_at_a_time import OneAtATime
from align.rollout.serving_engine import Request
from align.trainers.common import clear_paged_flag

ROOT = Path(__file__).resolve().parents[2]
MAKES = {
    "arange",
    "as_tensor",
    "empty",
    "eye",
    "frombuffer",
    "from_numpy",
    "full",
    "linspace",
    "logspace",
    "normal",
    "ones",
    "rand",
    "randint",
    "randn",
    "randperm",
    "tensor",
    "zeros",
}
ON_THE_CPU = {
    "align/models/fastpath": "taken by models on a CPU alone (`install_fast_path`)",
    "align/models/fastpath/adapter_bank.py": "the weights of engines that are lowered for a CPU (`MixedDecoder`)",
    "align/models/cpu_memory.py": "a CPU's pages",
    "align/ppo/verify": "arithmetic that is checked by itself, and indices, which CUDA takes from the host",
    "align/rollout/serving_engine.py": "logits come from engines on a CPU, or are moved there (`OneAtATime`)",
    "align/rollout/engine_process.py": "logits that an engine's process sends as arrays",
    "reward/rules.py": "no model: whoever asks for scores moves them (`Workers.score`)",
    "reward/function.py": "no model: whoever asks for scores moves them (`Workers.score`)",
    "reward/check.py": "no model: whoever asks for scores moves them (`Workers.score`)",
    "align/trainers/multi_rank.py: build_epoch_order": "numbers of rows, which become a list",
    "align/ppo/rollouts.py: choose_prompt_indices": "numbers of prompts, which become a list",
    "align/ppo/update.py: split_minibatches": "numbers of rows, by a generator of the CPU; they are indices",
    "align/models/forward.py: pad_rows": "rows of ids on their way; every caller moves them to its model",
    "align/models/forward.py: rollout_from_answers": "moved in the line behind it",
    "align/models/roles.py: __init__": "the weight of a head, which `.to(device)` moves with it",
    "align/models/probe.py: draw_random_rows": "moved to the embedding's device behind the draw",
    "align/trainers/reward.py: collate_rankings": "a collator's batch: the trainer moves it",
    "align/rollout/hf.py: generate": "lengths, orders and draws of all rows: indices, moved by `_generate_batch`",
    "align/rollout/engine.py: build_rollout": "of engines with own models; who learns moves it (`Rollout.to`)",
    "align/rollout/distributed.py: generate": "lengths and orders; rollouts travel between ranks by the CPU",
    "align/trainers/dpo.py: collate_pairs": "a collator's batch: the trainer moves it",
    "align/trainers/kto.py: collate_answers": "a collator's batch: the trainer moves it",
    "align/stages/reward.py: compute_pair_scores": "an index into scores on the CPU (`score_rows`)",
    "reward/learned.py: score_rows": "scores on the CPU, as it says; what is put there is moved",
    "align/export/engines.py: gather_token_logprobs": "beside logits on the CPU",
    "align/ppo/monitor.py: measure": "becomes a list",
}
"""Module, folder, or function in a module → the reason why its tensors belong on the CPU."""


class Makes(ast.NodeVisitor):
    """A visitor that records each call that makes a tensor and names no device: place and line."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.inside = [""]
        self.found = list[tuple[str, int]]()
        self.moved = set[int]()

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self.inside.append(node.name)
        self.generic_visit(node)
        self.inside.pop()

    def visit_Call(self, node: ast.Call) -> None:
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        owner = node.func.value if isinstance(node.func, ast.Attribute) else None
        if name in ("to", "cpu") and isinstance(owner, ast.Call):
            self.moved.add(id(owner))  # outer calls are visited before inner ones
        is_torch_function = isinstance(owner, ast.Name) and owner.id == "torch"
        makes_tensor = name in MAKES if is_torch_function else owner is None and name == "tensor"
        has_device = id(node) in self.moved or any(keyword.arg == "device" for keyword in node.keywords)
        if makes_tensor and not has_device:
            self.found.append((f"{self.file}: {self.inside[-1]}", node.lineno))
        self.generic_visit(node)


def find_tensors_without_device(source: str, file: str) -> list[tuple[str, int]]:
    visitor = Makes(file)
    visitor.visit(ast.parse(source))
    return visitor.found


def iter_tensors_without_device() -> Iterator[tuple[str, int]]:
    for path in sorted([*(ROOT / "align").rglob("*.py"), *(ROOT / "reward").rglob("*.py")]):
        yield from find_tensors_without_device(path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix())


def find_exception(place: str) -> str | None:
    file = place.partition(": ")[0]
    folders = [parent.as_posix() for parent in Path(file).parents]
    return next((key for key in (place, file, *folders) if key in ON_THE_CPU), None)


def test_every_tensor_has_a_device_that_its_caller_chose():
    assert not [f"{place}, line {line}" for place, line in iter_tensors_without_device() if not find_exception(place)]


def test_every_exception_excuses_something():
    assert ON_THE_CPU.keys() == {find_exception(place) for place, _ in iter_tensors_without_device()} - {None}


def test_the_reader_sees_what_is_forgotten():
    source = (
        "def f(x):\n    a = torch.zeros(3)\n    return torch.ones(2, device=x.device) + torch.arange(3).to(x.device)"
    )
    assert find_tensors_without_device(source, "f.py") == [("f.py: f", 2)]


def test_gae_on_a_card_is_that_of_the_cpu_to_the_bit():
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 5, 7, generator=generator)
    mask = torch.arange(7) < torch.randint(1, 8, (5, 1), generator=generator)
    expected = gae(rewards, values, mask, 0.99, 0.95, torch.ones(5))
    with simulate_card():
        cuda_inputs = [x.to("cuda") for x in (rewards, values, mask)]
        estimates = gae(*cuda_inputs, 0.99, 0.95, torch.ones(5, device="cuda"))
        assert all(x.device == CARD for x in estimates)
        assert all(torch.equal(x.cpu(), y) for x, y in zip(estimates, expected, strict=True))


def test_a_rollout_moves_whole():
    tokens = torch.ones(2, 3, dtype=torch.long)
    rollout = Rollout(tokens, tokens.bool(), 1, torch.tensor([True, False]), torch.zeros(2, 2))
    with simulate_card():
        moved = rollout.to("cuda")
        parts = (moved.tokens_BS, moved.mask_BS, moved.ended_B, moved.logprobs_BT)
        assert all(isinstance(part, OnCard) for part in parts)
        assert moved.to("cpu").tokens_BS.tolist() == tokens.tolist()


def test_chunks_of_logits_go_by_the_device():
    assert choose_chunk_rows(4096, torch.device("cpu")) == LOGITS // 4096
    assert choose_chunk_rows(4096, CARD) == GPU_LOGITS // 4096


@pytest.mark.parametrize(("set_by_user", "left"), [({}, "expandable_segments:True"), ({ALLOCATOR[1]: "x:1"}, None)])
def test_a_cuda_device_has_its_number(monkeypatch: pytest.MonkeyPatch, set_by_user: dict[str, str], left: str | None):
    devices: list[Any] = []
    for name in ALLOCATOR:
        monkeypatch.delenv(name, raising=False)
    for name, value in set_by_user.items():
        monkeypatch.setenv(name, value)
    with simulate_card() as environment:
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
        monkeypatch.setattr(torch.cuda, "set_device", devices.append)
        assert choose_device("cuda") == choose_device("auto") == choose_device("cuda:1") == torch.device("cuda:1")
        assert devices == [torch.device("cuda:1")] * 3
        assert environment.get(ALLOCATOR[0]) == left


def test_moments_on_a_card_are_not_paged():
    with simulate_card():
        cuda_moment = torch.zeros(2, device="cuda")
        cpu_moment = torch.zeros(2)
        moments: dict[str, Tensor] = {"state1": cuda_moment, "state2": cpu_moment}
        for moment in moments.values():
            moment.is_paged = True  # pyright: ignore[reportAttributeAccessIssue]
        clear_paged_flag(SimpleNamespace(state={0: moments}))
        assert [getattr(m, "is_paged", None) for m in (cuda_moment, cpu_moment)] == [False, True]


def test_an_engine_that_answers_one_at_a_time_says_on_a_card_what_it_says_on_a_cpu():
    def generate_ids() -> list[int]:
        engine = OneAtATime(model, 512)
        listener = OutputRecorder()
        engine.add(Request(draw_prompt(5), replace(build_sampling_params(4), prompt_logprobs=1)), listener)
        while engine.step():
            pass
        return listener.ids

    model = build_base_model(FAMILIES["llama"])
    with disable_fast_path(model):
        expected_ids = generate_ids()
        with simulate_card():
            move_to_card(model)
            assert generate_ids() == expected_ids
    assert len(expected_ids) == 4
