"""The policy, value, reward and reference models of PPO as adapters on one base, whose weights are in memory only once.

Without a critic there is no value role. If all weights of the policy train, the policy is a second model, and the other
roles are adapters on the frozen base that it started from. `use` activates a role, and checks which parameters require
gradients.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from bitsandbytes.nn.modules import Linear4bit
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from align.core.errors import CorruptFile
from align.core.types import Rollout
from align.models.adapters import SCORE_KEY, attach_adapter, read_tensors, save_adapter
from align.models.fastpath import install_fast_path
from align.models.fastpath.linear import require_known_adapters
from align.models.forward import (
    compute_hidden_states,
    get_hidden_size,
    score_response,
    select_predicting_states,
    unwrap_model,
)
from align.models.lora import Lora
from align.run import Base
from align.run.weights import VALUE_HEAD_FILE

Role = str
"""Name of a model in PPO: `policy`, `reference`, `value` or `reward`; further reward models are `reward1`,
`reward2`, …"""
TRAINABLE = ("policy", "value")
ADAPTER = re.compile(r"\.lora_\w+\.(\w+)(?:\.|$)")


class ForwardOutput(NamedTuple):
    """Logprobs, entropies and hidden states of a rollout's response tokens, from one forward pass of a role.

    Attributes:
        logprobs_BT: logprob of each response token, 0 outside the mask.
        entropy_BT: entropy of the distribution at each response token in nats, without a gradient.
        states_BTD: the hidden states that predict each response token, detached.
    """

    logprobs_BT: Tensor
    entropy_BT: Tensor
    states_BTD: Tensor


class CachedForward(NamedTuple):
    """The outputs of the policy and of the value role with their autograd graphs. Without a critic, `values_BT` is
    None."""

    output: ForwardOutput
    values_BT: Tensor | None


class Roles:
    """The policy, reference, value and reward models of PPO as adapters on one base model.

    Args:
        base: a frozen causal language model (NF4 or not).
        init: folder of the adapter that the policy starts from, which is also the reference; None if these are the base
            itself (`stage=full`).
        rewards: folders of reward models, each an adapter with its `score` head; empty for other kinds of rewards.
        fresh: LoRA settings of new adapters. No role has dropout.
        value_backbone: the backbone of the value head. `own`: a trained adapter that starts from the reward adapter;
            `policy`: the policy, whose states get no gradient from the head; `frozen`: the reward adapter. Without a
            reward model, the policy's start takes the place of the reward adapter. `none`: there is no value role.
        policy: a second model with the weights of `base`, which are all trained; None if the policy is an adapter.
        autocast: dtype of the second model's computation, if it is not that of its weights.

    Attributes:
        model: the base with all adapters.
        trainable: the roles that train, of `TRAINABLE`.
        value_head: hidden state → value; fp32 without bias, initialised to 0; None without a value role.
        value_backbone: the role whose states the value head reads; empty without a value role.
        score_heads: for each reward model its frozen head, hidden state → score.
        reference_is_base: whether the policy started from the base itself.
    """

    def __init__(
        self,
        base: nn.Module,
        init: Path | None,
        rewards: Sequence[Path],
        fresh: Lora,
        value_backbone: str = "own",
        policy: nn.Module | None = None,
        autocast: torch.dtype | None = None,
    ) -> None:
        assert policy is None or init is None, "the policy is an adapter or a whole model"
        self.model: Any = base
        self.policy = policy
        self.autocast = autocast
        if init is not None:
            self.model = attach_adapter(attach_adapter(self.model, init, "policy", trainable=True), init, "reference")
        elif policy is None:
            self._add("policy", fresh)
        self.device = next(base.parameters()).device
        self.score_heads = []
        for member, folder in enumerate(rewards):
            self.model = attach_adapter(self.model, folder, build_reward_name(member), is_reward_model=True)
            head = build_linear_head(read_score_weight(folder, get_hidden_size(base)))
            self.score_heads.append(head.to(self.device).requires_grad_(False))
        if value_backbone == "own":
            if start := rewards[0] if rewards else init:
                self.model = attach_adapter(self.model, start, "value", trainable=True, is_reward_model=bool(rewards))
            else:
                self._add("value", fresh)
        frozen = "reward" if rewards else "reference"
        self.value_backbone = {"own": "value", "policy": "policy", "frozen": frozen, "none": ""}[value_backbone]
        self.trainable = TRAINABLE if self.value_backbone else TRAINABLE[:1]
        self.reference_is_base = init is None
        self.value_head = None
        if self.value_backbone:
            self.value_head = build_linear_head(torch.zeros(1, get_hidden_size(self.model))).to(self.device)
        for name, parameter in self.model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float()
        self.model.eval()  # there is no dropout, and evaluation mode keeps it so
        self._layers = [m for m in self.model.modules() if isinstance(m, BaseTunerLayer)]
        self._parameters = dict(self.model.named_parameters())
        self._weights: dict[Role, dict[str, nn.Parameter]] = {
            role: {n: p for n, p in self._parameters.items() if find_adapter_name(n) == role} for role in TRAINABLE
        }
        if policy is not None:
            policy.eval()
            self._weights["policy"] = {f"policy: {n}": p for n, p in policy.named_parameters()}
            self._parameters |= self._weights["policy"]

    def _add(self, name: str, fresh: Lora) -> None:
        """Add a new LoRA adapter called `name` to the model, whose initial output is 0."""
        if isinstance(self.model, PeftModel):
            self.model.add_adapter(name, fresh.config(unwrap_model(self.model)))
        else:
            self.model = PeftModel(self.model, fresh.config(self.model), name)
        install_fast_path(self.model)

    def parameters_of(self, role: Role) -> list[nn.Parameter]:
        """Return the trained parameters of a role, including the value role's head."""
        return list(self.get_named_parameters(role).values())

    def get_named_parameters(self, role: Role) -> dict[str, nn.Parameter]:
        """Return the trained parameters of a role by name, in the order of `parameters_of`."""
        parameters = dict(self._weights[role])
        if role == "value" and self.value_head is not None:
            parameters |= {f"value_head.{name}": parameter for name, parameter in self.value_head.named_parameters()}
        return parameters

    def actor(self, role: Role) -> RoleActor:
        """Return an Actor through which rollout engines sample from a role."""
        return RoleActor(self, role)

    @contextmanager
    def use(self, role: Role, train: bool = False) -> Iterator[Any]:
        """Activate a role's adapter and yield its model for the `with` block.

        Args:
            train: whether the role's own weights, and no others, require gradients.
        """
        self._enter(role, train)
        if role != "policy" or self.policy is None:
            yield self.model
            return
        device = next(self.policy.parameters()).device.type
        with torch.autocast(device, self.autocast, enabled=self.autocast is not None):
            yield self.policy

    def _enter(self, role: Role, train: bool) -> None:
        """Activate a role's adapter on every layer; with `train`, only its weights require gradients, and without it
        none. This is faster than PEFT's `set_adapter`, which takes 16 ms at 30 layers."""
        base_alone = role == "reference" and self.reference_is_base
        if not base_alone and (role != "policy" or self.policy is None):
            require_known_adapters([role], getattr(self.model, "peft_config", ()))
        for layer in self._layers:
            layer._active_adapter = [role]
            layer._disable_adapters = base_alone
        if isinstance(self.model, PeftModel) and role in self.model.peft_config:
            self.model.active_adapter = role
        for trainable in TRAINABLE:
            for parameter in self._weights[trainable].values():
                parameter.requires_grad_(train and trainable == role)
        if self.value_head is not None:
            self.value_head.requires_grad_(train and role == "value")
        expected = self._weights[role].keys() if train else set()
        trains = {name for name, parameter in self._parameters.items() if parameter.requires_grad}
        assert trains == expected, f"{role}: {sorted(trains ^ expected)[:4]} should not differ"

    def require_gradients(self, role: Role) -> None:
        """Let only a role's parameters require gradients before its backward pass, even if another role was active
        since its forward pass."""
        if role == "policy" or self.value_backbone == role:
            self._enter(role, train=True)
        if self.value_head is not None:
            self.value_head.requires_grad_(role == "value")

    def logprobs(self, role: Role, rollout: Rollout, temperature: float, train: bool = False) -> ForwardOutput:
        """Compute the logprobs, entropies and hidden states of a rollout's response tokens under a role."""
        with self.use(role, train) as model, torch.set_grad_enabled(train):
            logprobs, entropy, states = score_response(model, rollout, temperature)
            return ForwardOutput(logprobs, entropy, states.detach())

    def values(self, rollout: Rollout, train: bool = False, policy_states_BTD: Tensor | None = None) -> Tensor:
        """Compute the value role's estimates before each response token [B, T]; unspecified outside the response mask.

        Args:
            policy_states_BTD: the policy's hidden states of this rollout, if they were computed. They save a forward
                pass if the value head is on the policy's backbone.
        """
        assert self.value_head is not None, "there is no value role"
        trained = train and self.value_backbone == "value"
        states = policy_states_BTD if self.value_backbone == "policy" else None
        if states is None:
            with self.use(self.value_backbone, trained) as model, torch.set_grad_enabled(trained):
                states = select_predicting_states(
                    compute_hidden_states(model, rollout.tokens_BS, rollout.mask_BS), rollout
                )
        self.value_head.requires_grad_(train)
        with torch.set_grad_enabled(train):
            return self.value_head(states.float()).squeeze(-1)

    def run_cached_forward(self, rollout: Rollout, temperature: float) -> CachedForward:
        """Compute the policy's logprobs and, with a critic, the values of a rollout, with autograd graphs for a later
        backward pass."""
        output = self.logprobs("policy", rollout, temperature, train=True)
        values_BT = None
        if "value" in self.trainable:
            values_BT = self.values(rollout, train=True, policy_states_BTD=output.states_BTD)
        return CachedForward(output, values_BT)

    def estimates(self, rollout: Rollout, temperature: float) -> tuple[Tensor, ...]:
        """Return the logprobs of a rollout's response tokens under policy and reference, and the values if there is a
        value role; each [B, T], without gradients."""
        policy = self.logprobs("policy", rollout, temperature)
        reference = self.logprobs("reference", rollout, temperature)
        logprobs = policy.logprobs_BT, reference.logprobs_BT
        if "value" not in self.trainable:
            return logprobs
        return *logprobs, self.values(rollout, policy_states_BTD=policy.states_BTD)

    def compute_final_values(self, rollout: Rollout) -> Tensor:
        """Return the value role's estimate after the last token of each response [B], to bootstrap responses that were
        cut."""
        assert self.value_head is not None, "there is no value role"
        return self._read_last_state(self.value_backbone, self.value_head, rollout)

    def scores(self, rollout: Rollout, member: int = 0) -> Tensor:
        """Return the score [B] that a reward model gives each row at its last token; `member` is its index."""
        return self._read_last_state(build_reward_name(member), self.score_heads[member], rollout)

    @torch.no_grad()
    def _read_last_state(self, role: Role, head: nn.Linear, rollout: Rollout) -> Tensor:
        """Apply a linear head to a role's hidden state at each row's last token, and return the results [B]."""
        with self.use(role) as model:
            hidden = compute_hidden_states(model, rollout.tokens_BS, rollout.mask_BS)
        return head(select_last_states(hidden, rollout.mask_BS).float()).squeeze(-1)

    def enable_gradient_checkpointing(self) -> None:
        """Enable gradient checkpointing on all models, so that only the input of each layer is kept for the backward
        pass.

        A step takes a third longer, and the memory for activations no longer grows with the depth.
        """
        for model in filter(None, (self.model, self.policy)):
            unwrap_model(model).activation_checkpointing_enable({"use_reentrant": False})
            for module in model.modules():  # transformers checkpoints a layer only if its `training` is True
                if isinstance(module, GradientCheckpointingLayer):
                    module.training = True

    def save(self, role: Role, folder: Path, base: Base, dtype: torch.dtype | None = None) -> None:
        """Save a role's adapter in PEFT's format to `folder`, or a fully trained policy, cast to `dtype` if it is not
        None."""
        if role != "policy" or self.policy is None:
            save_adapter(self.model, folder, base, role)
            return
        policy: Any = self.policy if dtype is None else self.policy.to(dtype)
        policy.save_pretrained(str(folder))

    def save_critic(self, folder: Path, base: Base) -> None:
        """Save the critic to `folder`: its adapter in PEFT's format if it has one, and `value_head.safetensors`."""
        folder.mkdir(parents=True, exist_ok=True)
        if self.value_backbone == "value":
            self.save("value", folder, base)
        assert self.value_head is not None, "there is no value role"
        save_file({"weight": self.value_head.weight.detach().cpu()}, folder / VALUE_HEAD_FILE, {"format": "pt"})
        (folder / VALUE_HEAD_FILE).chmod(0o644)

    def count_quantised_layers(self) -> int:
        """Return the number of the base's linear layers that are quantised to NF4."""
        return sum(isinstance(m, Linear4bit) for m in self.model.modules())


@dataclass(frozen=True)
class RoleActor:
    """A role of PPO with the interface of `align.models.actors.Actor`, through which engines sample."""

    roles: Roles
    role: Role

    @property
    def is_bare_base(self) -> bool:
        return self.role == "reference" and self.roles.reference_is_base

    def use(self) -> AbstractContextManager[Any]:
        return self.roles.use(self.role)

    def save(self, folder: Path, base: Base) -> None:
        self.roles.save(self.role, folder, base)


def find_adapter_name(name: str) -> str | None:
    """Return the name of the adapter to which a parameter with this name belongs, or None for a parameter of the base.

    The name alone would not do: BERT's attention has a module `value`.
    """
    match = ADAPTER.search(name)
    return match[1] if match else None


def build_reward_name(member: int) -> Role:
    return f"reward{member}" if member else "reward"


def read_score_weight(folder: Path, width: int) -> Tensor:
    """Read the weight [1, D] of a reward model's score head from its adapter folder.

    Args:
        width: D of the base.

    Raises:
        CorruptFile: the head is missing, or has another shape.
    """
    weight = read_tensors(folder, "reward.ref").get(SCORE_KEY)
    if weight is not None and weight.shape == (1, width):
        return weight
    problem = "has no score head"
    if weight is not None:
        problem = f"its score head is {list(weight.shape)}, and one score of this base needs [1, {width}]"
    raise CorruptFile("reward.ref", str(folder), problem, "Train it with stage=reward.")


def build_linear_head(weight_OD: Tensor) -> nn.Linear:
    """Build an fp32 linear head without bias, whose weight is a copy of `weight_OD`."""
    head = nn.Linear(weight_OD.shape[1], weight_OD.shape[0], bias=False)
    head.weight.data = weight_OD.detach().float().clone()
    return head


def select_last_states(hidden_BSD: Tensor, mask_BS: Tensor) -> Tensor:
    """Return the hidden state of each row's last unmasked token [B, D]."""
    columns = torch.arange(mask_BS.shape[1], device=mask_BS.device)
    last_B = torch.where(mask_BS, columns, 0).max(-1).values
    return hidden_BSD[torch.arange(hidden_BSD.shape[0], device=hidden_BSD.device), last_B]
