"""Policy, value, reward and reference on one base: four adapters, two heads, one set of base weights in memory.

A role is entered with `use`. What trains in it is asserted every time, for PEFT's `set_adapter` also changes what
requires a gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from bitsandbytes.nn.modules import Linear4bit
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn

from align.errors import CorruptFile
from align.models.adapters import SCORE_KEY, attach, lora, read_tensors, save_adapter
from align.models.lean import make_lean
from align.models.trunk import hidden_size, hidden_states, logprobs_of, states_before
from align.run import Base
from align.types import Rollout

Role = str
"""`policy`, `reference`, `value`, `reward`; further reward models are `reward1`, `reward2`, …"""
TRAINABLE = ("policy", "value")
VALUE_HEAD_FILE = "value_head.safetensors"


class Read(NamedTuple):
    """What one pass of a role over a rollout says.

    Attributes:
        logprobs_BT: log p of each response token, 0 outside the mask.
        entropy_BT: of the distribution that each was drawn from, nats; no gradient.
        states_BTD: the hidden states they come from, detached.
    """

    logprobs_BT: Tensor
    entropy_BT: Tensor
    states_BTD: Tensor


class Held(NamedTuple):
    """What policy and value say of a rollout, with the graphs behind it."""

    read: Read
    values_BT: Tensor


class Roles:
    """Four roles on one base.

    Args:
        base: a frozen causal language model (NF4 or not).
        init: folder of the adapter that the policy starts from and is measured against; None where the base itself is
            that (`stage=full`).
        rewards: folders of reward models, each an adapter and its `score` head; none where the reward is of another
            kind.
        fresh: rank and alpha of the policy's adapter where `init` is None.
        value_trunk: `own`: an adapter of its own under the value head, which starts from the reward adapter and trains;
            `policy`: the head reads the policy's states, and no gradient of its loss reaches them; `frozen`: it reads
            the reward adapter's. Where there is no reward model, the supervised adapter serves in its place.

    Attributes:
        model: the PEFT model that holds all adapters.
        value_head: hidden → value, bias-free, fp32; starts at 0.
        value_trunk: the role whose states it reads.
        score_heads: hidden → score, frozen, one a reward model.
    """

    def __init__(
        self,
        base: nn.Module,
        init: Path | None,
        rewards: Sequence[Path],
        fresh: tuple[int, int],
        value_trunk: str = "own",
    ) -> None:
        if init is None:
            self.model = PeftModel(base, lora(*fresh), "policy")  # pyright: ignore[reportArgumentType]
            make_lean(self.model)
        else:
            self.model = attach(base, init, "policy", trainable=True)
            attach(self.model, init, "reference")
        device = next(base.parameters()).device
        self.score_heads = []
        for member, folder in enumerate(rewards):
            attach(self.model, folder, reward_name(member), scored=True)
            self.score_heads.append(linear(score_weight(folder)).to(device).requires_grad_(False))
        if value_trunk == "own":
            if start := rewards[0] if rewards else init:
                attach(self.model, start, "value", trainable=True, scored=bool(rewards))
            else:
                self.model.add_adapter("value", lora(*fresh))
        frozen = "reward" if rewards else "reference"
        self.value_trunk = {"own": "value", "policy": "policy", "frozen": frozen}[value_trunk]
        self._reference_is_base = init is None
        self.value_head = linear(torch.zeros(1, hidden_size(self.model))).to(device)
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

    def logprobs(self, role: Role, rollout: Rollout, temperature: float, train: bool = False) -> Read:
        """The response tokens under `role`."""
        with self.use(role, train), torch.set_grad_enabled(train):
            states = states_before(self.model, rollout)
            return Read(*logprobs_of(self.model, states, rollout, temperature), states.detach())

    def values(self, rollout: Rollout, train: bool = False, policy_states_BTD: Tensor | None = None) -> Tensor:
        """V of the state before each response token [B, T]; outside the mask unspecified.

        Args:
            policy_states_BTD: the policy's states on this rollout where they are known: a head on the policy's trunk
                needs no pass of its own then.
        """
        trained = train and self.value_trunk == "value"
        states = policy_states_BTD if self.value_trunk == "policy" else None
        if states is None:
            with self.use(self.value_trunk, trained), torch.set_grad_enabled(trained):
                states = states_before(self.model, rollout)
        self.value_head.requires_grad_(train)
        with torch.set_grad_enabled(train):
            return self.value_head(states.float()).squeeze(-1)

    def held(self, rollout: Rollout, temperature: float) -> Held:
        """A pass of policy and value with their graphs, for a backward pass later, whoever plays in between."""
        read = self.logprobs("policy", rollout, temperature, train=True)
        return Held(read, self.values(rollout, train=True, policy_states_BTD=read.states_BTD))

    def trains(self, role: Role) -> None:
        """Let a backward pass reach `role` and nothing else, whoever has played since the forward pass."""
        if role == "policy" or self.value_trunk == role:
            self.use(role, train=True)
        self.value_head.requires_grad_(role == "value")

    def estimates(self, rollout: Rollout, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
        """What a batch is learned from besides its scores: logprobs of policy and reference, values; each [B, T]."""
        own, reference = (self.logprobs(role, rollout, temperature) for role in ("policy", "reference"))
        return own.logprobs_BT, reference.logprobs_BT, self.values(rollout, policy_states_BTD=own.states_BTD)

    def scores(self, rollout: Rollout, member: int = 0) -> Tensor:
        """A reward model's score of each row [B], read at its last real token, which is found by mask."""
        with self.use(reward_name(member)), torch.no_grad():
            hidden = hidden_states(self.model, rollout.tokens_BS, rollout.mask_BS)
            return self.score_heads[member](last_real(hidden, rollout.mask_BS).float()).squeeze(-1)

    def save_critic(self, folder: Path, base: Base) -> None:
        """What gives values: the adapter in PEFT's format where there is one, and `value_head.safetensors`."""
        folder.mkdir(parents=True, exist_ok=True)
        if self.value_trunk == "value":
            save_adapter(self.model, folder, base, "value")
        save_file({"weight": self.value_head.weight.detach().cpu()}, folder / VALUE_HEAD_FILE, {"format": "pt"})
        (folder / VALUE_HEAD_FILE).chmod(0o644)

    def quantised_layers(self) -> int:
        """How many linear layers of the base are NF4."""
        return sum(isinstance(m, Linear4bit) for m in self.model.modules())


def reward_name(member: int) -> Role:
    return f"reward{member}" if member else "reward"


def score_weight(folder: Path) -> Tensor:
    """The weights [1, D] of a reward model's head.

    Raises:
        CorruptFile: it has none.
    """
    weight = read_tensors(folder).get(SCORE_KEY)
    if weight is None:
        raise CorruptFile("reward.ref", str(folder), "has no score head", "Train it with stage=reward.")
    return weight


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
