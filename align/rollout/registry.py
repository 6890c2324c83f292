"""The engines by name. Each engine is one file beside this one, and only this file names them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch

from align import ranks
from align.core.errors import require
from align.data.chat.encode import prompt_room, stop_token_ids
from align.models.load import context_length, describe
from align.rollout.distributed import DistributedEngine
from align.rollout.engine import Engine
from align.run import Base, Run

ENGINES = {
    "hf": "align.rollout.hf:HfEngine",
    "bank": "align.rollout.multi_adapter:BankEngine",
    "vllm": "align.rollout.vllm_sampler:VllmSampler",
}
"""`rollout.engine` → module and class of the engine, which is imported when it is chosen."""


@contextmanager
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
) -> Iterator[Engine]:
    """Open the engine of a run, ready to answer on a base. It is closed in the end, also after an error. On several
    ranks each samples its share.

    Args:
        settings: of the group `rollout`.
        method, dtype: how the learner keeps the base, see `Engine.load`.
        device: that the learner's tensors lie on.
        longest_prompt: tokens of a prompt, at most; the model's context may allow fewer.
        adapter_rank: of the adapters that servers are to expect.
    """
    asks_servers = settings.engine == "vllm"
    server_options: tuple[Any, ...] = ()
    if asks_servers:
        room = prompt_room(context_length(describe(base)), longest_prompt, settings.max_new_tokens)
        context = room + settings.max_new_tokens
        server_options = (tokenizer, settings, device, adapter_rank, context, run.folder.absolute())
    engine: Engine = build_engine(settings, tokenizer, generation_config, *server_options)
    if not ranks.is_alone():
        engine = DistributedEngine(engine, device, settings.batch_size, tokenizer.pad_token_id, asks_servers)
    try:
        engine.load(base, method, dtype)
        yield engine
    finally:
        engine.close()


def build_engine(settings: Any, tokenizer: Any, generation_config: Any, *server_options: Any) -> Engine:
    """Build the engine of `rollout.engine`.

    Args:
        settings: of the group `rollout`.
        generation_config: of the base, which may list more tokens that end an answer than the tokenizer knows.
        server_options: further attributes of `VllmSampler`.

    Raises:
        InputError: there is no token that ends an answer.
    """
    stops = stop_token_ids(tokenizer, generation_config)
    problem = "no token ends an answer, by the tokenizer, generation config or template"
    require(bool(stops), "eos_token", None, problem, "Name eos_token in the model's tokenizer_config.json.")
    module, _, class_name = ENGINES[settings.engine].partition(":")
    sizes = settings.max_new_tokens, settings.temperature, settings.batch_size
    return getattr(import_module(module), class_name)(stops, tokenizer.pad_token_id, *sizes, *server_options)
