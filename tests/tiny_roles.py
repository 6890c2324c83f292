"""Artifacts for tests of roles and of PPO: a base, a supervised adapter and a reward model with distinct outputs.

A new adapter and a new head are zero, and the distribution of a random model with small weights is almost uniform. A
test with these would not notice swapped roles.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from align.core.types import Rollout
from align.models.adapters import add_new_adapter, save_adapter
from align.models.load import load_base, load_classifier
from align.models.lora import Lora
from align.models.roles import Roles
from align.run import Base, model_digest

CPU = torch.device("cpu")
FP32 = torch.float32
PAD = 0
EOS = 2
STOPS = tuple(range(100, 150))
PROMPTS = [[1, 40, 41, 42, 43, 44, 45], [1, 50], [1, 60, 61, 62], [1, 50, 51], [1, 70, 71], [1, 52, 80, 81]]


@dataclass(frozen=True)
class UnchangedModelActor:
    """An actor that uses a model with the adapters that are active on it."""

    model: Any
    is_bare_base: bool = True

    @contextmanager
    def use(self) -> Iterator[Any]:
        yield self.model

    def save(self, folder: Path, base: Base) -> None:
        raise AssertionError("a base without an adapter has no trained weights")


class World(NamedTuple):
    """The saved artifacts: a base, a supervised adapter and a reward model."""

    base: Base
    init: Path
    reward: Path

    def load(self, method: str = "qlora") -> Any:
        return load_base(self.base, method, CPU, FP32)

    def roles(self, method: str = "qlora", fresh: bool = False, backbone: str = "own") -> Roles:
        torch.manual_seed(0)
        roles = Roles(self.load(method), None if fresh else self.init, [self.reward], Lora(4, 8), backbone)
        if roles.value_head is not None:
            with torch.no_grad():  # a head of zeros would pass no gradient to the value adapter
                roles.value_head.weight.copy_(0.1 * torch.randn(roles.value_head.weight.shape))
        return roles


def make_world(folder: Path, tiny_model: Path, tokenizer: Any) -> World:
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.mul_(6)
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    world = World(
        Base("tiny", str(folder / "base"), None, model_digest(folder / "base")), folder / "init", folder / "reward"
    )
    torch.manual_seed(1)
    for path, classifier in ((world.init, False), (world.reward, True)):
        model = load_classifier(world.base, "qlora", CPU, FP32) if classifier else world.load()
        model = add_new_adapter(model, Lora(4, 8), is_reward_model=classifier)
        add_noise(model)
        save_adapter(model, path, world.base)
    return world


@torch.no_grad()
def add_noise(model: Any, size: float = 0.1) -> None:
    """Add noise to all trainable parameters."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(size * torch.randn(parameter.shape))


def build_ragged_rollout(rows: int = 6, seed: int = 0, prompt_width: int = 5, width: int = 7) -> Rollout:
    """Build a rollout of random tokens, with prompts of 1 to `prompt_width` and responses of 1 to `width` tokens. At
    least one row has the longest prompt, and at least one the longest response."""
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(1, prompt_width + 1, (rows, 1), generator=generator)
    lengths = torch.randint(1, width + 1, (rows, 1), generator=generator)
    prompts[0] = prompt_width
    lengths[-1] = width
    mask = torch.cat([torch.arange(prompt_width).flip(0) < prompts, torch.arange(width) < lengths], dim=1)
    tokens = torch.randint(6, 320, mask.shape, generator=generator)
    return Rollout(torch.where(mask, tokens, PAD), mask, prompt_width, torch.rand(rows, generator=generator) < 0.5)
