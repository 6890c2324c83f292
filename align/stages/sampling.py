"""Which engine answers prompts. An engine is one file of `align/rollout`; this is the one place that names them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from align.config.root import Config
from align.data.chat import stop_token_ids
from align.errors import require
from align.models.finite import diverged
from align.rollout.engine import Engine, NotFinite
from align.rollout.hf import HfEngine


@contextmanager
def speaking(who: str, lr: float | None, dtype: str) -> Iterator[None]:
    """Around an engine's work: a model that has no distribution to draw from, as the user's error.

    Args:
        who: the model, as the user knows it.
        lr, dtype: see `align.models.finite.diverged`.
    """
    try:
        yield
    except NotFinite as error:
        raise diverged(f"{who}, answers nothing: {error}", lr, dtype) from error


def engine_of(config: Config, tokenizer: Any, generation_config: Any) -> Engine:
    """The engine of `rollout.engine`.

    Args:
        generation_config: of the base, which may list more tokens that end an answer than the tokenizer knows.

    Raises:
        InputError: there is no token that ends an answer.
    """
    rollout, stops = config.rollout, stop_token_ids(tokenizer, generation_config)
    require(
        bool(stops), "eos_token", None, "no token ends an answer, by the tokenizer, generation config or template",
        "Name eos_token in the model's tokenizer_config.json.",
    )  # fmt: skip
    match rollout.engine:
        case "hf":
            sizes = (rollout.max_new_tokens, rollout.temperature, rollout.batch_size)
            return HfEngine(stops, tokenizer.pad_token_id, *sizes)
    raise ValueError(rollout.engine)
