"""Policy, value, reward and reference on one base: four adapters, two heads, one set of base weights in memory.

A role is entered with `use`. What trains in it is asserted every time, for PEFT's `set_adapter` also changes what
requires a gradient.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from bitsandbytes.nn.modules import Linear4bit
from peft import PeftModel
from torch import Tensor, nn

from align.errors import CorruptFile
from align.models.adapters import SCORE_KEY, attach, lora, read_tensors
from align.models.trunk import hidden_states, response_logprobs
from align.types import Rollout

Role = Literal["policy", "reference", "reward", "value"]
TRAINABLE: tuple[Role, ...] = ("policy", "value")


class Roles:
    """Four roles on one base.

    Args:
        base: a frozen causal language model (NF4 or not).
        init: folder of the adapter that the policy starts from and is measured against; None where the base itself is
            that (`stage=full`).
        reward: folder of the reward model: its adapter and its `score` head.
        fresh: rank and alpha of the policy's adapter where `init` is None.

    Attributes:
        model: the PEFT model that holds all adapters.
        value_head: hidden → value, bias-free, fp32; starts at 0. (Its trunk starts from the reward adapter.)
        score_head: hidden → score, frozen.
    """

    def __init__(self, base: nn.Module, init: Path | None, reward: Path, fresh: tuple[int, int]) -> None:
        if init is None:
            self.model = PeftModel(base, lora(*fresh), "policy")  # pyright: ignore[reportArgumentType]
        else:
            self.model = attach(base, init, "policy", trainable=True)
            attach(self.model, init, "reference")
        attach(self.model, reward, "reward", scored=True)
        attach(self.model, reward, "value", trainable=True, scored=True)
        self._reference_is_base = init is None
        score = read_tensors(reward).get(SCORE_KEY)
        if score is None:
            raise CorruptFile("reward.ref", str(reward), "has no score head", "Train it with stage=reward.")
        device = next(base.parameters()).device
        self.score_head = linear(score).to(device).requires_grad_(False)
        self.value_head = linear(torch.zeros_like(score)).to(device)
        for name, parameter in self.model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float()
        self.model.eval()  # there is no dropout, and evaluation mode keeps it so
        self._weights: dict[Role, dict[str, nn.Parameter]] = {
            role: {n: p for n, p in self.model.named_parameters() if f".{role}." in n} for role in TRAINABLE
        }

    def parameters_of(self, role: Role) -> list[nn.Parameter]:
        """What an optimiser of `role` holds: its adapter, and for the value role its head."""
        head = list(self.value_head.parameters()) if role == "value" else []
        return [*self._weights[role].values(), *head]

    def use(self, role: Role, train: bool = False) -> Any:
        """Enter a role; a context manager. With `train`, its own adapter requires gradients and nothing else does.

        Raises:
            AssertionError: something else would train.
        """
        if role == "reference" and self._reference_is_base:
            for parameter in self.model.parameters():
                parameter.requires_grad_(False)
            return self.model.disable_adapter()
        self.model.set_adapter(role, inference_mode=not train)
        expected = set(self._weights[role]) if train else set()
        trainable = {n for n, p in self.model.named_parameters() if p.requires_grad}
        assert trainable == expected, f"{role}: {sorted(trainable ^ expected)[:4]} should not differ"
        self.value_head.requires_grad_(train and role == "value")
        return nullcontext()

    def logprobs(self, role: Role, rollout: Rollout, temperature: float, train: bool = False) -> tuple[Tensor, Tensor]:
        """log p of each response token under `role`, and the entropies: two [B, T], 0 outside the response mask."""
        with self.use(role, train), torch.set_grad_enabled(train):
            return response_logprobs(self.model, rollout, temperature)

    def values(self, rollout: Rollout, train: bool = False) -> Tensor:
        """V of the state before each response token [B, T]; outside the mask unspecified."""
        with self.use("value", train), torch.set_grad_enabled(train):
            hidden = hidden_states(self.model, rollout.tokens_BS, rollout.mask_BS)[:, rollout.prompt_width - 1 : -1]
            return self.value_head(hidden.float()).squeeze(-1)

    def scores(self, rollout: Rollout) -> Tensor:
        """The reward model's score of each row [B], read at its last real token, which is found by mask."""
        with self.use("reward"), torch.no_grad():
            hidden = hidden_states(self.model, rollout.tokens_BS, rollout.mask_BS)
            return self.score_head(last_real(hidden, rollout.mask_BS).float()).squeeze(-1)

    def quantised_layers(self) -> int:
        """How many linear layers of the base are NF4."""
        return sum(isinstance(m, Linear4bit) for m in self.model.modules())


def linear(weight_OD: Tensor) -> nn.Linear:
    """A bias-free fp32 head with this weight."""
    head = nn.Linear(weight_OD.shape[1], weight_OD.shape[0], bias=False)
    head.weight.data = weight_OD.detach().float().clone()
    return head


def last_real(hidden_BSD: Tensor, mask_BS: Tensor) -> Tensor:
    """The hidden state of each row's last real token [B, D]."""
    columns = torch.arange(mask_BS.shape[1], device=mask_BS.device)
    last_B = torch.where(mask_BS, columns, 0).max(-1).values
    return hidden_BSD[torch.arange(hidden_BSD.shape[0], device=hidden_BSD.device), last_B]
