"""Policy, value, reward and reference on one base: four adapters, two heads, one set of base weights in memory. Where
the advantages need no critic, nobody has the value role.

Where every weight of the policy trains, it is a second model, and the others share the frozen one it started from. A
role is entered with `use`; what trains in it is asserted every time.
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
from align.models.adapter_files import SCORE_KEY, read_tensors
from align.models.adapters import attach, save_adapter
from align.models.backbone import base_model, hidden_size, hidden_states, read_response, states_before
from align.models.fastpath import use_fast_path
from align.models.fastpath.lora import require_known
from align.models.lora import Lora
from align.run import Base
from align.run.weights import VALUE_HEAD_FILE

Role = str
"""`policy`, `reference`, `value`, `reward`; further reward models are `reward1`, `reward2`, …"""
TRAINABLE = ("policy", "value")
ADAPTER = re.compile(r"\.lora_\w+\.(\w+)(?:\.|$)")


class ForwardOutput(NamedTuple):
    """What one pass of a role over a rollout says.

    Attributes:
        logprobs_BT: log p of each response token, 0 outside the mask.
        entropy_BT: of the distribution that each was drawn from, nats; no gradient.
        states_BTD: the hidden states they come from, detached.
    """

    logprobs_BT: Tensor
    entropy_BT: Tensor
    states_BTD: Tensor


class CachedForward(NamedTuple):
    """What policy and, where there is one, value say of a rollout, with the graphs behind it."""

    output: ForwardOutput
    values_BT: Tensor | None


class Roles:
    """Four roles on one base.

    Args:
        base: a frozen causal language model (NF4 or not).
        init: folder of the adapter that the policy starts from and is measured against; None where the base itself is
            that (`stage=full`).
        rewards: folders of reward models, each an adapter and its `score` head; none where the reward is of another
            kind.
        fresh: how adapters are made that start from nothing. Nobody here has dropout.
        value_backbone: `own`: an adapter of its own under the value head, which starts from the reward adapter and
            trains; `policy`: the head reads the policy's states, and no gradient of its loss reaches them; `frozen`: it
            reads the reward adapter's. Where there is no reward model, what the policy starts from serves in its place.
            `none`: nobody has the role.
        policy: a second model with the weights of `base`, all of which train, where the policy is no adapter.
        autocast: the dtype that the second model computes in, if not that of its weights.

    Attributes:
        model: the model that holds all adapters.
        trainable: the roles that train, of `TRAINABLE`.
        value_head: hidden → value, bias-free, fp32; starts at 0. None where nobody values.
        value_backbone: the role whose states it reads; empty where nobody values.
        score_heads: hidden → score, frozen, one a reward model.
        reference_is_base: the policy started from the base as it is.
        device: that everybody here computes on.
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
        assert policy is None or init is None, "an adapter's policy is no whole model"
        self.model: Any = base
        self.policy, self.autocast = policy, autocast
        if init is not None:
            self.model = attach(attach(self.model, init, "policy", trainable=True), init, "reference")
        elif policy is None:
            self._add("policy", fresh)
        self.device = next(base.parameters()).device
        self.score_heads = []
        for member, folder in enumerate(rewards):
            self.model = attach(self.model, folder, reward_name(member), scored=True)
            self.score_heads.append(
                linear_head(score_weight(folder, hidden_size(base))).to(self.device).requires_grad_(False)
            )
        if value_backbone == "own":
            if start := rewards[0] if rewards else init:
                self.model = attach(self.model, start, "value", trainable=True, scored=bool(rewards))
            else:
                self._add("value", fresh)
        frozen = "reward" if rewards else "reference"
        self.value_backbone = {"own": "value", "policy": "policy", "frozen": frozen, "none": ""}[value_backbone]
        self.trainable = TRAINABLE if self.value_backbone else TRAINABLE[:1]
        self.reference_is_base = init is None
        no_value = torch.zeros(1, hidden_size(self.model))
        self.value_head = linear_head(no_value).to(self.device) if self.value_backbone else None
        for name, parameter in self.model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float()
        self.model.eval()  # there is no dropout, and evaluation mode keeps it so
        self._layers = [m for m in self.model.modules() if isinstance(m, BaseTunerLayer)]
        self._parameters = dict(self.model.named_parameters())
        self._weights: dict[Role, dict[str, nn.Parameter]] = {
            role: {n: p for n, p in self._parameters.items() if adapter_in(n) == role} for role in TRAINABLE
        }
        if policy is not None:
            policy.eval()
            self._weights["policy"] = {f"policy: {n}": p for n, p in policy.named_parameters()}
            self._parameters |= self._weights["policy"]

    def _add(self, name: str, fresh: Lora) -> None:
        """An adapter that changes nothing yet."""
        if isinstance(self.model, PeftModel):
            self.model.add_adapter(name, fresh.config(base_model(self.model)))
        else:
            self.model = PeftModel(self.model, fresh.config(self.model), name)
        use_fast_path(self.model)

    def parameters_of(self, role: Role) -> list[nn.Parameter]:
        """What an optimiser of `role` holds: its weights, and for the value role its head."""
        return list(self.named_parameters_of(role).values())

    def named_parameters_of(self, role: Role) -> dict[str, nn.Parameter]:
        """The same by their names, in the same order."""
        valued = self.value_head if role == "value" else None
        head = {} if valued is None else {f"value_head.{n}": p for n, p in valued.named_parameters()}
        return {**self._weights[role], **head}

    def actor(self, role: Role) -> RoleActor:
        """The role as somebody who answers prompts."""
        return RoleActor(self, role)

    @contextmanager
    def use(self, role: Role, train: bool = False) -> Iterator[Any]:
        """The model that plays `role`. With `train`, the role's own weights require gradients and nothing else does.

        Raises:
            AssertionError: something else would train.
        """
        self._enter(role, train)
        if role != "policy" or self.policy is None:
            yield self.model
            return
        device = next(self.policy.parameters()).device.type
        with torch.autocast(device, self.autocast, enabled=self.autocast is not None):
            yield self.policy

    def _enter(self, role: Role, train: bool) -> None:
        """Make a role's adapter the active one, which PEFT's `set_adapter` would do in 16 ms at 30 layers."""
        base_alone = role == "reference" and self.reference_is_base
        if not base_alone and (role != "policy" or self.policy is None):
            require_known([role], getattr(self.model, "peft_config", ()))
        for layer in self._layers:
            layer._active_adapter, layer._disable_adapters = [role], base_alone
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

    def trains(self, role: Role) -> None:
        """Let a backward pass reach `role` and nothing else, whoever has played since the forward pass."""
        if role == "policy" or self.value_backbone == role:
            self._enter(role, train=True)
        if self.value_head is not None:
            self.value_head.requires_grad_(role == "value")

    def logprobs(self, role: Role, rollout: Rollout, temperature: float, train: bool = False) -> ForwardOutput:
        """The response tokens under `role`."""
        with self.use(role, train) as model, torch.set_grad_enabled(train):
            logprobs, entropy, states = read_response(model, rollout, temperature)
            return ForwardOutput(logprobs, entropy, states.detach())

    def values(self, rollout: Rollout, train: bool = False, policy_states_BTD: Tensor | None = None) -> Tensor:
        """V of the state before each response token [B, T]; outside the mask unspecified.

        Args:
            policy_states_BTD: the policy's states on this rollout where they are known: a head on the policy's backbone
                needs no pass of its own then.
        """
        assert self.value_head is not None, "nobody has the value role"
        trained = train and self.value_backbone == "value"
        states = policy_states_BTD if self.value_backbone == "policy" else None
        if states is None:
            with self.use(self.value_backbone, trained) as model, torch.set_grad_enabled(trained):
                states = states_before(model, rollout)
        self.value_head.requires_grad_(train)
        with torch.set_grad_enabled(train):
            return self.value_head(states.float()).squeeze(-1)

    def cached_forward(self, rollout: Rollout, temperature: float) -> CachedForward:
        """A pass of policy and value with their graphs, for a backward pass later, whoever plays in between."""
        output, values = self.logprobs("policy", rollout, temperature, train=True), None
        if "value" in self.trainable:
            values = self.values(rollout, train=True, policy_states_BTD=output.states_BTD)
        return CachedForward(output, values)

    def estimates(self, rollout: Rollout, temperature: float) -> tuple[Tensor, ...]:
        """What a batch is learned from besides its scores: logprobs of policy and reference, and values where somebody
        has that role; each [B, T]."""
        own, reference = (self.logprobs(role, rollout, temperature) for role in ("policy", "reference"))
        told = own.logprobs_BT, reference.logprobs_BT
        return (*told, self.values(rollout, policy_states_BTD=own.states_BTD)) if "value" in self.trainable else told

    def values_behind(self, rollout: Rollout) -> Tensor:
        """V of the state behind each response [B]: what is yet to come where it was cut."""
        assert self.value_head is not None, "nobody has the value role"
        return self._at_the_end(self.value_backbone, self.value_head, rollout)

    def scores(self, rollout: Rollout, member: int = 0) -> Tensor:
        """A reward model's score of each row [B], read at its last real token, which is found by mask."""
        return self._at_the_end(reward_name(member), self.score_heads[member], rollout)

    @torch.no_grad()
    def _at_the_end(self, role: Role, head: nn.Linear, rollout: Rollout) -> Tensor:
        """What a head makes of a role's state at each row's last token [B]."""
        with self.use(role) as model:
            hidden = hidden_states(model, rollout.tokens_BS, rollout.mask_BS)
        return head(last_real(hidden, rollout.mask_BS).float()).squeeze(-1)

    def recompute_layers(self) -> None:
        """Keep no more of a pass with a gradient than the input of each layer; the backward pass makes the rest again.
        A third more time, for memory that no longer grows with the depth."""
        for model in filter(None, (self.model, self.policy)):
            base_model(model).activation_checkpointing_enable({"use_reentrant": False})
            for module in model.modules():  # transformers looks at this flag of the layer, and only of it
                if isinstance(module, GradientCheckpointingLayer):
                    module.training = True

    def save_policy(self, folder: Path, base: Base, dtype: torch.dtype) -> None:
        """The adapter in PEFT's format, or the whole model in `dtype`."""
        if self.policy is None:
            save_adapter(self.model, folder, base, "policy")
        else:
            self.policy.to(dtype).save_pretrained(str(folder))  # pyright: ignore[reportCallIssue]

    def save_critic(self, folder: Path, base: Base) -> None:
        """What gives values: the adapter in PEFT's format where there is one, and `value_head.safetensors`."""
        folder.mkdir(parents=True, exist_ok=True)
        if self.value_backbone == "value":
            save_adapter(self.model, folder, base, "value")
        assert self.value_head is not None, "nobody has the value role"
        save_file({"weight": self.value_head.weight.detach().cpu()}, folder / VALUE_HEAD_FILE, {"format": "pt"})
        (folder / VALUE_HEAD_FILE).chmod(0o644)

    def quantised_layers(self) -> int:
        """How many linear layers of the base are NF4."""
        return sum(isinstance(m, Linear4bit) for m in self.model.modules())


@dataclass(frozen=True)
class RoleActor:
    """See `align.models.actor.Actor`."""

    roles: Roles
    role: Role

    @property
    def base_alone(self) -> bool:
        return self.role == "reference" and self.roles.reference_is_base

    def use(self) -> AbstractContextManager[Any]:
        return self.roles.use(self.role)

    def save(self, folder: Path, base: Base) -> None:
        if self.role == "policy" and self.roles.policy is not None:
            self.roles.policy.save_pretrained(str(folder))  # pyright: ignore[reportCallIssue]
        else:
            save_adapter(self.roles.model, folder, base, self.role)


def adapter_in(name: str) -> str | None:
    """The adapter that a parameter is of. A module may be called `value` too, as attention in BERT's line is."""
    found = ADAPTER.search(name)
    return found[1] if found else None


def reward_name(member: int) -> Role:
    return f"reward{member}" if member else "reward"


def score_weight(folder: Path, width: int) -> Tensor:
    """The weights [1, D] of a reward model's head.

    Args:
        width: D, of the base.

    Raises:
        CorruptFile: it has none, or one of another shape.
    """
    weight = read_tensors(folder, "reward.ref").get(SCORE_KEY)
    if weight is None:
        raise CorruptFile("reward.ref", str(folder), "has no score head", "Train it with stage=reward.")
    if weight.shape != (1, width):
        problem = f"its score head is {list(weight.shape)}, and one score of this base needs [1, {width}]"
        raise CorruptFile("reward.ref", str(folder), problem, "Train it with stage=reward.")
    return weight


def linear_head(weight_OD: Tensor) -> nn.Linear:
    """A bias-free fp32 head with this weight."""
    head = nn.Linear(weight_OD.shape[1], weight_OD.shape[0], bias=False)
    head.weight.data = weight_OD.detach().float().clone()
    return head


def last_real(hidden_BSD: Tensor, mask_BS: Tensor) -> Tensor:
    """The hidden state of each row's last real token [B, D]."""
    columns = torch.arange(mask_BS.shape[1], device=mask_BS.device)
    last_B = torch.where(mask_BS, columns, 0).max(-1).values
    return hidden_BSD[torch.arange(hidden_BSD.shape[0], device=hidden_BSD.device), last_B]
