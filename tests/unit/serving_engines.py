"""Small models of each family, adapters with a visible effect, and requests, for tests of the serving engine."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from decoder_configs import build_llama_like_configs
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_roles import add_noise
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig

from align.models.fastpath import disable_fast_path
from align.models.fastpath.mixed import MixedDecoder
from align.rollout.continuous import ContinuousBatch
from align.rollout.serving_engine import Completion, Output, Request, SamplingParams, ServingEngine, Token

SIZES = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 512,
}
FAMILIES: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(num_key_value_heads=2, tie_word_embeddings=True, **SIZES),
    "llama, a head for each key": LlamaConfig(num_key_value_heads=4, **SIZES),
    "llama, one key for all": LlamaConfig(num_key_value_heads=1, **SIZES),
    **build_llama_like_configs(SIZES),
}
PLAIN_LORA: tuple[dict[str, Any], ...] = (
    {"r": 16},
    {"r": 4, "lora_alpha": 16},
    {"r": 40},
    {"r": 16, "target_modules": ["q_proj", "v_proj"]},
    {"r": 8, "use_rslora": True},
    {"r": 8, "rank_pattern": {"down_proj": 24}, "alpha_pattern": {"q_proj": 5}},
)
"""Settings of adapters, of every rank and kind, that are plain LoRA once they are lowered."""


def build_base_model(config: PreTrainedConfig, dtype: torch.dtype = torch.float32) -> Any:
    """Build a random model whose outputs vary with the input. Every call returns the same weights."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for weight in model.parameters():
        weight.data = (4 * weight if weight.dim() == 2 else weight + 0.1 * torch.randn_like(weight)).to(dtype)
    return model


def save_random_adapter(config: PreTrainedConfig, folder: Path, seed: int = 0, **lora: Any) -> Path:
    """Save a random adapter in PEFT's format."""
    torch.manual_seed(seed + 1)
    settings = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **lora}
    model = get_peft_model(build_base_model(config), LoraConfig(**settings))
    torch.manual_seed(seed + 1)
    add_noise(model, 0.2)
    model.save_pretrained(str(folder))
    return folder


def save_random_adapters(
    config: PreTrainedConfig, root: Path, kinds: Sequence[dict[str, Any]] = PLAIN_LORA
) -> list[Path]:
    return [save_random_adapter(config, root / str(i), i, **kind) for i, kind in enumerate(kinds)]


def build_engine(
    config: PreTrainedConfig, dtype: torch.dtype = torch.float32, slots: int = 8, **options: Any
) -> ContinuousBatch:
    bank = {"resident": options.pop("resident", 8), "max_rank": options.pop("max_rank", 64)}
    decoder = MixedDecoder(build_base_model(config, dtype), slots, options.pop("columns", 512), **bank)
    return ContinuousBatch(decoder, options.pop("context", 512), **options)


def build_sampling_params(max_tokens: int = 8, **changes: Any) -> SamplingParams:
    return replace(SamplingParams(max_tokens, logprobs=0), **changes)


def draw_prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    draw = random.Random(seed)
    return tuple(draw.randrange(6, 320) for _ in range(length))


class OutputRecorder:
    """A listener that records the outputs of a request."""

    def __init__(self) -> None:
        self.outputs: list[Output] = []

    def __call__(self, output: Output) -> None:
        assert self.reason is None, "nothing comes behind the end"
        self.outputs.append(output)

    @property
    def tokens(self) -> list[Token]:
        return [token for output in self.outputs for token in output.tokens]

    @property
    def ids(self) -> list[int]:
        return [token.id for token in self.tokens]

    @property
    def reason(self) -> str | None:
        return self.outputs[-1].finish_reason if self.outputs else None

    @property
    def error(self) -> Exception | None:
        return self.outputs[-1].error if self.outputs else None


def submit_request(engine: ServingEngine, request: Request) -> OutputRecorder:
    listener = OutputRecorder()
    engine.add(request, listener)
    return listener


def add_request(engine: ServingEngine, request: Request) -> tuple[Completion, OutputRecorder]:
    listener = OutputRecorder()
    return engine.add(request, listener), listener


def run_requests(engine: ServingEngine, requests: Sequence[Request], every: int = 0) -> list[OutputRecorder]:
    """Run requests to their ends, with `every` steps between one and the next. Returns their listeners."""
    listeners = []
    remaining = list(requests)
    while remaining:
        listeners.append(submit_request(engine, remaining.pop(0)))
        for _ in range(every):
            engine.step()
    while engine.step():
        pass
    return listeners


def compute_peft_logprobs(config: PreTrainedConfig, folder: Path | None, ids: Sequence[int]) -> Tensor:
    """Compute the log-probability of each token but the first, with transformers and PEFT."""
    model = build_base_model(config)
    if folder is not None:
        model = PeftModel.from_pretrained(model, str(folder)).eval()
    row = torch.tensor([list(ids)])
    with torch.no_grad(), disable_fast_path(model):
        return model(input_ids=row).logits[0, :-1].log_softmax(-1).gather(1, row[0, 1:, None])[:, 0]
