"""The engines of `stage=serve`: align's own on the base as its adapters know it, and vLLM beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from align.config.root import Config
from align.config.serve import ServeConfig
from align.errors import require
from align.rollout.requests import ServingEngine
from align.run import Run
from align.run.weights import brings_scores
from align.serve.opening import Opened

SHARED = 8
"""One slot in so many is for tenants who have none."""
RANK = 256
"""Of adapters that there is room for, unless said."""


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


@contextmanager
def own_engine(run: Run, config: Config, found: Opened) -> Iterator[Ready]:
    """align's, in this process."""
    model = servable(config, found)
    vocabulary, generation = model.get_input_embeddings().weight.shape[0], model.generation_config
    engine, check, why = engine_for(config, model)
    del model  # the engine may have laid out its weights anew
    yield Ready(engine, check, why, vocabulary, generation)


def servable(config: Config, found: Opened) -> Any:
    """The base as its adapters know it: of NF4 the weights that the codes stand for, in fp32."""
    import torch

    from align.models.dequantised import dequantised
    from align.models.load import choose_device, choose_dtype, load_base
    from align.models.start import frozen_as

    device, base = choose_device(config.device), found.portfolio.base
    if found.portfolio.method != "qlora":
        return load_base(base, frozen_as(found.portfolio.method), device, choose_dtype(config.dtype, device))
    quantised = choose_dtype(trained_in(config, found), device)
    return dequantised(load_base(base, "qlora", device, quantised), torch.float32)


def trained_in(config: Config, found: Opened) -> str:
    """The dtype that NF4 was quantised out of.

    Raises:
        InputError: adapters were trained on codes that differ.
    """
    trained = {artifact.dtype for artifact in found.artifacts.values() if artifact.dtype} - {"auto"}
    require(
        len(trained) < 2, "stage.adapters", sorted(trained),
        "were trained on NF4 codes of a base in different dtypes, which differ", "Serve them by a server each.",
    )  # fmt: skip
    return next(iter(trained), config.dtype)


def engine_for(config: Config, model: Any) -> tuple[Any, Callable[[Path], object], str]:
    """The engine that serves a model, what it asks of an adapter before it takes it, and why it is this engine. The
    model is consumed."""
    from align.models.adapter_files import adaptable, adapter_config, check_targets, read_adapter
    from align.models.bank import lowered
    from align.models.fastpath.mixed import MixedDecoder
    from align.models.fastpath.weights import NotPlainError
    from align.models.load import context_length
    from align.rollout.continuous import ContinuousBatch
    from align.rollout.one_at_a_time import OneAtATime

    stage: ServeConfig = config.stage
    context = min(context_length(model), stage.max_length or context_length(model))
    why, rank = "the model is on a GPU, where batches were never measured", stage.max_rank or RANK
    if model.device.type == "cpu":
        try:
            decoder = MixedDecoder(model, stage.slots, context, stage.resident, rank)
        except NotPlainError as error:
            why = f"{model.config.model_type} is not on the fast path ({error})"
        else:
            prefixes = stage.prefix_cache_mb * 2**20
            batch = ContinuousBatch(decoder, context, stage.queue, prefixes, reserve=reserve(stage))
            return batch, partial(lowered, sites=decoder.bank.sites, max_rank=rank), in_batches(stage, decoder.exact)

    layers = adaptable(model)

    def plain(folder: Path) -> None:
        problem = "is a reward model, and those are served on the fast path alone"
        require(not brings_scores(folder), "stage.adapters", folder.name, problem, "Score by it with stage=eval.")
        check_targets(adapter_config(folder), read_adapter(folder).ranks, layers)

    return OneAtATime(model, context, stage.queue, stage.resident), plain, f"one request at a time: {why}"


def in_batches(stage: ServeConfig, exact: bool) -> str:
    """Which engine it is; and where this machine's products do not agree, that answers can differ in last bits."""
    said = f"continuous batching of {stage.slots} rows, {stage.resident} adapters in memory"
    return said if exact else f"{said}; on this machine an answer's last bits can change with its neighbours"


def reserve(stage: ServeConfig) -> int:
    return stage.slots // SHARED if stage.keys is not None else 0


@contextmanager
def vllm_engine(run: Run, config: Config, found: Opened) -> Iterator[Ready]:
    """vLLM, in a process beside this one. What it must say by the base and by each adapter is found before it starts,
    so that the memory of that is free again."""
    from align.export.for_vllm import ForVllm, room_for, servable_rank, vocabulary_of
    from align.models.load import DTYPES, choose_device, choose_dtype, context_length, describe, load_tokenizer
    from align.rollout.engine_process import VLLM, engine_version, required_interpreter
    from align.rollout.vllm_engine import VllmEngine
    from align.rollout.vllm_process import VllmProcess, serve_words

    stage, portfolio = config.stage, found.portfolio
    base, device = portfolio.base, choose_device(config.device)
    python = required_interpreter(VLLM, config.serve.python, "serve.python")
    adapters = {version.digest: version.folder for version in portfolio.versions().values()}
    rank = room_for([*adapters.values()], stage.max_rank)
    for_vllm = ForVllm(
        base, portfolio.method, device, choose_dtype(trained_in(config, found), device), load_tokenizer(base),
        run.folder.absolute() / "vllm",
    )  # fmt: skip
    folder = for_vllm.base_folder(Path(config.run.root).expanduser() / "bases", DTYPES[config.serve.dtype])
    must_say = for_vllm.learn(adapters)
    words = serve_words(
        base.digest, config.serve.dtype, rank=rank, adapters=stage.resident, slots=stage.slots,
        context=stage.max_length, prefixes=stage.prefix_cache_mb > 0,
    )  # fmt: skip
    said = context_length(describe(base))
    version = engine_version(VLLM, python, "serve.python")
    print(f"starting vLLM {version}; what it says is in {run.folder}/vllm.log", flush=True)
    process = VllmProcess(python, folder, [*words, *config.serve.words], run.folder / "vllm.log")
    engine = None
    try:
        process.wait_until_ready(config.serve.start_s)
        engine = VllmEngine(
            process, for_vllm, must_say, base.digest, config.serve.dtype, min(said, stage.max_length or said),
            stage.queue, stage.slots, reserve(stage),
        )  # fmt: skip
        why = f"vLLM in {config.serve.dtype}, {stage.slots} requests at once, {stage.resident} adapters in a batch"
        check = partial(servable_rank, most=rank)
        yield Ready(engine, check, why, vocabulary_of(base), describe(base).generation_config)
    finally:
        engine.close(STOPPING_S) if engine is not None else process.stop(STOPPING_S)


STOPPING_S = 10.0
ENGINES = {"align": own_engine, "vllm": vllm_engine}
