"""The engines that a server may have: align's own, in this process, and vLLM beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from align.core.errors import require
from align.rollout.requests import ServingEngine
from align.run.weights import brings_scores

if TYPE_CHECKING:
    from align.rollout.probes import Probes
    from align.rollout.vllm_engine import Prepare

RANK = 256
STOPPING_S = 10.0
"""How long vLLM has to end."""


@dataclass(frozen=True, slots=True)
class Room:
    """What there is room for.

    Attributes:
        slots: requests that are answered at once.
        reserve: of these, for tenants who have none.
        queue: requests that wait.
        context: tokens of a prompt and its answer; None for as many as the base has.
        resident: adapters in memory.
        max_rank: of an adapter; None for the engine's default.
        prefix_bytes: of earlier prompts' prefixes.
    """

    slots: int
    reserve: int
    queue: int
    context: int | None
    resident: int
    max_rank: int | None
    prefix_bytes: int


class Ready(NamedTuple):
    """An engine, and what a server has to know of it.

    Attributes:
        check: raises InputError where the adapter in a folder cannot be served.
        why: which engine it is, in words.
        vocabulary: rows of the base's embedding.
        generation: the base's generation config.
    """

    engine: ServingEngine
    check: Callable[[Path], object]
    why: str
    vocabulary: int
    generation: Any


def own_engine(model: Any, room: Room) -> Ready:
    """align's: continuous batches where the model is on the fast path, one request after another elsewhere.

    Args:
        model: the base as its adapters know it. It is consumed: the engine may lay out its weights anew.
    """
    from align.models.adapter_files import adaptable, adapter_config, check_targets, read_adapter
    from align.models.bank import lowered
    from align.models.fastpath.mixed import MixedDecoder
    from align.models.fastpath.weights import NotPlainError
    from align.models.load import context_length
    from align.rollout.continuous import ContinuousBatch
    from align.rollout.one_at_a_time import OneAtATime

    context, rank = min(context_length(model), room.context or context_length(model)), room.max_rank or RANK
    known = model.get_input_embeddings().weight.shape[0], model.generation_config
    why = "the model is on a GPU, where batches were never measured"
    if model.device.type == "cpu":
        try:
            decoder = MixedDecoder(model, room.slots, context, room.resident, rank)
        except NotPlainError as error:
            why = f"{model.config.model_type} is not on the fast path ({error})"
        else:
            batch = ContinuousBatch(decoder, context, room.queue, room.prefix_bytes, reserve=room.reserve)
            check = partial(lowered, sites=decoder.bank.sites, max_rank=rank)
            return Ready(batch, check, in_batches(room, decoder.exact), *known)

    layers = adaptable(model)

    def plain(folder: Path) -> None:
        problem = "is a reward model, and those are served on the fast path alone"
        require(not brings_scores(folder), "stage.adapters", folder.name, problem, "Score by it with stage=eval.")
        check_targets(adapter_config(folder), read_adapter(folder).ranks, layers)

    engine = OneAtATime(model, context, room.queue, room.resident)
    return Ready(engine, plain, f"one request at a time: {why}", *known)


def in_batches(room: Room, exact: bool) -> str:
    """Which engine it is; and where this machine's products do not agree, that answers can differ in last bits."""
    said = f"continuous batching of {room.slots} rows, {room.resident} adapters in memory"
    return said if exact else f"{said}; on this machine an answer's last bits can change with its neighbours"


@dataclass(frozen=True, slots=True)
class VllmStart:
    """How vLLM is started.

    Attributes:
        python: that has it.
        base: the folder of the base.
        digest: of the base.
        dtype: that it computes in.
        layers: that adapters may be on, see `align.rollout.vllm_adapters.adaptable_layers`.
        words: further arguments.
        within_s: time that it has.
        log: the file of what it says.
    """

    python: str
    base: Path
    digest: str
    dtype: str
    layers: Sequence[str]
    words: Sequence[str]
    within_s: float
    log: Path


@contextmanager
def vllm_engine(
    start: VllmStart, room: Room, rank: int, prepare: Prepare, must_say: Probes, described: Any
) -> Iterator[Ready]:
    """vLLM, in a process that ends with the block.

    Args:
        rank: of adapters that it makes room for.
        prepare, must_say: see `align.rollout.vllm_engine.VllmEngine`.
        described: the base without its weights, see `align.models.load.describe`.

    Raises:
        InputError: it does not start, or does not serve the base as it is.
    """
    from align.models.load import context_length
    from align.rollout.vllm_adapters import layer_names, servable_rank
    from align.rollout.vllm_engine import VllmEngine
    from align.rollout.vllm_process import VllmProcess, serve_words

    context = min(context_length(described), room.context or context_length(described))
    words = serve_words(
        start.digest, start.dtype, modules=layer_names(start.layers), rank=rank, adapters=room.resident,
        slots=room.slots, context=context, prefixes=room.prefix_bytes > 0,
    )  # fmt: skip
    process, engine = VllmProcess(start.python, start.base, [*words, *start.words], start.log), None
    try:
        process.wait_until_ready(start.within_s)
        engine = VllmEngine(
            process, prepare, must_say, start.digest, start.dtype, context, room.queue, room.slots, room.reserve
        )
        why = f"vLLM in {start.dtype}, {room.slots} requests at once, {room.resident} adapters in a batch"
        vocabulary = int(described.config.get_text_config().vocab_size)
        check = partial(servable_rank, most=rank, layers=start.layers)
        yield Ready(engine, check, why, vocabulary, described.generation_config)
    finally:
        engine.close(STOPPING_S) if engine is not None else process.stop(STOPPING_S)
