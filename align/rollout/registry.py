"""The engines by name. Each engine is one file beside this one, and only this file names them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib import import_module
from typing import Any

import torch

from align import ranks
from align.core.errors import require
from align.data.chat.encode import prompt_room, stop_token_ids
from align.models.load import context_length, describe
from align.rollout.distributed import DistributedEngine, FirstRankEngine
from align.rollout.engine import Engine
from align.rollout.engine_process import Servers
from align.run import Base, Run

ENGINES = {
    "hf": "align.rollout.hf:HfEngine",
    "bank": "align.rollout.multi_adapter:BankEngine",
    "vllm": "align.rollout.vllm_sampler:VllmSampler",
}
"""`rollout.engine` → module and class of the engine, which is imported when it is chosen."""


def open_engine(
    run: Run,
    settings: Any,
    base: Base,
    method: str,
    dtype: torch.dtype,
    device: torch.device,
    tokenizer: Any,
    generation_config: Any,
    longest_prompt: int,
    adapter_rank: int,
) -> AbstractContextManager[Engine]:
    """Open the engine of a run on a base, see `loaded_engine`.

    Args:
        settings: of the group `rollout`.
        longest_prompt: tokens of a prompt, at most; the model's context may allow fewer.
        adapter_rank: of the adapters that servers are to expect.
    """
    servers = None
    if settings.engine == "vllm":
        room = prompt_room(context_length(describe(base)), longest_prompt, settings.max_new_tokens)
        servers = Servers(
            python=settings.python,
            urls=tuple(url.rstrip("/") for url in settings.urls),
            replicas=settings.replicas,
            words=tuple(settings.words),
            dtype="" if settings.dtype == "auto" else settings.dtype,
            device=str(device),
            start_s=settings.start_s,
            rank=adapter_rank,
            context=room + settings.max_new_tokens,
            bases=run.folder.parent.parent / "bases",
            folder=run.folder.absolute() / "vllm",
            logs=run.folder.absolute(),
        )
    sizes = settings.max_new_tokens, settings.temperature, settings.batch_size
    return loaded_engine(settings.engine, base, method, dtype, tokenizer, generation_config, *sizes, device, servers)


@contextmanager
def loaded_engine(
    name: str, base: Base, method: str, dtype: torch.dtype, tokenizer: Any, generation_config: Any,
    max_new_tokens: int, temperature: float, batch_size: int, device: torch.device, servers: Servers | None = None,
) -> Iterator[Engine]:  # fmt: skip
    """The engine of `rollout.engine`, ready to answer on a base; closed in the end, whatever happens. On several ranks
    each samples its share.

    Args:
        method, dtype: how the learner keeps the base, see `Engine.load`.
        generation_config, servers: see `engine_of`.
        device: that the learner's tensors lie on.
    """
    engine: Engine = engine_of(name, tokenizer, generation_config, max_new_tokens, temperature, batch_size, servers)
    if not ranks.is_alone():
        several = FirstRankEngine(engine, device) if servers else None
        engine = several or DistributedEngine(engine, device, batch_size, tokenizer.pad_token_id)
    try:
        engine.load(base, method, dtype)
        yield engine
    finally:
        engine.close()


def engine_of(
    name: str, tokenizer: Any, generation_config: Any, max_new_tokens: int, temperature: float, batch_size: int,
    servers: Servers | None = None,
) -> Engine:  # fmt: skip
    """The engine of `rollout.engine`.

    Args:
        generation_config: of the base, which may list more tokens that end an answer than the tokenizer knows.
        servers: that answer, for `vllm`.

    Raises:
        InputError: there is no token that ends an answer.
    """
    stops = stop_token_ids(tokenizer, generation_config)
    require(
        bool(stops), "eos_token", None, "no token ends an answer, by the tokenizer, generation config or template",
        "Name eos_token in the model's tokenizer_config.json.",
    )  # fmt: skip
    module, _, class_name = ENGINES[name].partition(":")
    engine = getattr(import_module(module), class_name)
    sizes = max_new_tokens, temperature, batch_size
    of_servers = () if servers is None else (tokenizer, servers)
    return engine(stops, tokenizer.pad_token_id, *sizes, *of_servers)
