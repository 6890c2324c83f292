"""The engine of `rollout`, for the stages that sample."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch

from align.config.root import Config
from align.data.chat.encode import prompt_room
from align.models.load import choose_device, choose_dtype, context_length, describe, name_of
from align.rollout.engine import Engine
from align.rollout.engine_process import WITHIN, Servers
from align.rollout.registry import loaded_engine
from align.run import Base, Run


def engine_for(
    run: Run, config: Config, base: Base, method: str, dtype: torch.dtype, tokenizer: Any, generation_config: Any
) -> AbstractContextManager[Engine]:
    """See `align.rollout.registry.loaded_engine`."""
    rollout = config.rollout
    sizes = rollout.max_new_tokens, rollout.temperature, rollout.batch_size, choose_device(config.device)
    servers = servers_of(run, config, base) if rollout.engine == "vllm" else None
    return loaded_engine(rollout.engine, base, method, dtype, tokenizer, generation_config, *sizes, servers)


def servers_of(run: Run, config: Config, base: Base) -> Servers:
    rollout = config.rollout
    room = prompt_room(context_length(describe(base)), config.data.max_length, rollout.max_new_tokens)
    dtype = "" if rollout.dtype == "auto" else rollout.dtype
    device, bases = str(choose_device(config.device)), config.run.folder / "bases"
    return Servers(
        rollout.python, tuple(url.rstrip("/") for url in rollout.urls), rollout.replicas, tuple(rollout.words), dtype,
        device, rollout.start_s, config.method.r, room + rollout.max_new_tokens, bases,
        run.folder.absolute() / "vllm", run.folder.absolute(),
    )  # fmt: skip


def allowed_gap(config: Config) -> float:
    """How far the logprobs of what vLLM draws may lie from the learner's on the mean: its dtype's, or the learner's."""
    learner = name_of(choose_dtype(config.dtype, choose_device(config.device)))
    dtypes = [learner] if config.rollout.dtype == "auto" else [learner, config.rollout.dtype]
    return config.rollout.max_gap or max(WITHIN[dtype] for dtype in dtypes)
