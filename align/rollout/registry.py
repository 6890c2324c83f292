"""The registry of rollout engines, and the construction of a run's engine.

Each engine is a module beside this one, and only this module names them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch

from align import ranks
from align.core.errors import require
from align.data.chat.encode import compute_max_prompt_tokens, find_stop_token_ids
from align.models.load import get_context_length, read_configurations
from align.rollout.distributed import DistributedEngine
from align.rollout.engine import Engine
from align.run import Base, Run

ENGINES = {
    "hf": "align.rollout.hf:HfEngine",
    "bank": "align.rollout.multi_adapter:BankEngine",
    "vllm": "align.rollout.vllm_sampler:VllmSampler",
}
"""Value of `rollout.engine` → module and class of the engine, which is imported when it is chosen."""


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
    """Yield the rollout engine of a run with the base model loaded, and close it at the end of the block.

    On several ranks each rank samples a share.

    Args:
        settings: the config group `rollout`.
        method, dtype: the learner's precision of the base, see `Engine.load`.
        device: device of the learner's tensors.
        longest_prompt: maximum tokens of a prompt; the model's context may allow fewer.
        adapter_rank: maximum rank of the adapters, for servers.
    """
    asks_servers = settings.engine == "vllm"
    server_options: tuple[Any, ...] = ()
    if asks_servers:
        room = compute_max_prompt_tokens(
            get_context_length(read_configurations(base)), longest_prompt, settings.max_new_tokens
        )
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
    """Build the rollout engine that `settings.engine` names, with no base model loaded.

    Args:
        settings: the config group `rollout`.
        generation_config: that of the base, which may list more stop tokens than the tokenizer.
        server_options: further attributes of `VllmSampler`.

    Raises:
        InputError: the model has no stop token.
    """
    stops = find_stop_token_ids(tokenizer, generation_config)
    problem = "no token ends an answer, by the tokenizer, generation config or template"
    require(bool(stops), "eos_token", None, problem, "Name eos_token in the model's tokenizer_config.json.")
    module, _, class_name = ENGINES[settings.engine].partition(":")
    sizes = settings.max_new_tokens, settings.temperature, settings.batch_size
    return getattr(import_module(module), class_name)(stops, tokenizer.pad_token_id, *sizes, *server_options)
