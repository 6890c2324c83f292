"""Loading of base models, in full precision or in NF4, and of their tokenizers; the choice of device and dtype.

On CPUs with AVX512-BF16, bitsandbytes repacks a `Linear4bit` at its first evaluation forward, after which gradients and
`dequantize()` are wrong. `disable_nf4_repacking` prevents this for every model that is loaded here.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from bitsandbytes.nn.modules import Linear4bit
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
)
from transformers import logging as transformers_logging
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME

from align.core.errors import AlignError, CorruptFile, InputError, require
from align.core.files import require_readable_folder
from align.models.adapters import abbreviate_names
from align.models.architectures import refuse_half_precision
from align.models.base import BUILT_IN
from align.models.cpu_memory import keep_freed_memory, limit_kernel_cache
from align.models.fastpath import install_fast_path
from align.models.finite_checks import require_finite_file
from align.models.forward import get_route
from align.models.probe import require_consistent_logits
from align.ops.linear import has_bf16_products
from align.run import (
    Artifact,
    Base,
    is_out_of_memory,
    link_files,
    list_unhashed_files,
    model_config,
    model_files,
    read_json,
    write_json,
)
from align.run.digests import match_files, require_same_bytes
from align.run.weights import TOKENIZER, read_header, weight_files

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""Environment variable of torch's allocator, and its former name."""
LOCAL_KEYS = ("name_or_path", "vocab_file", "tokenizer_file", "is_local", "local_files_only")
"""Keys of a tokenizer's configuration that hold paths of this machine, and are therefore not saved."""

KNOWN_BUFFERS = re.compile(
    r"(^|\.)(rotary_emb\.(inv_freq|original_inv_freq|cos_cached|sin_cached)|masked_bias|causal_mask|position_ids)$"
)
"""Pattern of constants that older versions of transformers saved with the weights, and that models compute
themselves."""

BESIDE_TOKENIZER = ("tokenizer.model", "generation_config.json")
"""Files beside a tokenizer that its `save_pretrained` does not write: SentencePiece's model, which llama.cpp's
converter reads, and the sampling defaults."""
OWN_TOKENIZER = "Train with the base's own tokenizer."

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()


def choose_device(device: str) -> torch.device:
    """Return the torch device that the setting `device` names; `auto` is CUDA if there is a GPU, else the CPU.

    A CUDA device is returned with its index, and becomes the current device of this process. Without an index it is the
    current one, which a launcher may have set. Expandable segments are enabled, because rows of varying lengths
    fragment the memory; torch reads their variable at the first allocation. A value set by the user is kept.

    Raises:
        InputError: torch does not know the device, or this machine does not have it.
    """

    def refuse(problem: str, remedy: str = "Use auto, cpu, cuda or cuda:0.") -> InputError:
        return InputError("device", device, problem, remedy)

    has_cuda = device != "cpu" and torch.cuda.is_available()  # not called for "cpu": it initialises the driver
    try:
        selected = torch.device(("cuda" if has_cuda else "cpu") if device == "auto" else device)
    except RuntimeError as error:
        raise refuse("is no device") from error
    if selected.type not in ("cpu", "cuda"):
        raise refuse("is not supported here")
    if selected.type == "cuda" and not has_cuda:
        raise refuse("torch sees no CUDA device", "Use device=auto or device=cpu.")
    last = torch.cuda.device_count() - 1 if selected.type == "cuda" else 0
    if (selected.index or 0) > last:
        raise refuse(f"there is no such device, the last is {selected.type}:{last}", "Use auto.")
    if selected.type == "cpu":
        return selected
    if not any(name in os.environ for name in ALLOCATOR):
        os.environ[ALLOCATOR[0]] = "expandable_segments:True"
    selected = torch.device("cuda", torch.cuda.current_device() if selected.index is None else selected.index)
    torch.cuda.set_device(selected)
    return selected


def describe_gpu(device: torch.device) -> dict[str, str]:
    """Return the GPU's name as `gpu` for a run's manifest, or an empty dictionary for a CPU, which is recorded
    elsewhere."""
    return {"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Return the dtype of the computation; `auto` is bf16 on CUDA and fp32 on a CPU.

    Prints a warning if the processor has no bf16 instructions: with AVX2 alone, a square product in bf16 took 110 times
    as long as in fp32.
    """
    if dtype == "bfloat16" and device.type == "cpu" and not has_bf16_products():
        print("dtype=bfloat16: this processor has no bf16 arithmetic; dtype=float32 is many times faster on it")
    if dtype != "auto":
        return DTYPES[dtype]
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def get_dtype_name(dtype: torch.dtype) -> str:
    """Return a torch dtype's name without `torch.`, such as `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def choose_checkpointing(requested: str, device: torch.device) -> bool:
    """Return whether to use gradient checkpointing; `auto` means on a GPU only."""
    return device.type == "cuda" if requested == "auto" else requested == "true"


def build_nf4_config(compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """Return the bitsandbytes configuration of NF4 with double quantisation (Dettmers et al., QLoRA, 2023)."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def disable_nf4_repacking(model: torch.nn.Module) -> None:
    """Prevent bitsandbytes from repacking the `Linear4bit` weights of a model on CPUs, after which gradients and
    `dequantize()` are wrong."""
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def cast_to_fp32(model: Any) -> Any:
    """Make a model compute in fp32, in place, and return it. NF4 codes are kept, and all other weights are cast to
    fp32."""
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.compute_dtype = torch.float32
            weight: Any = module.weight
            weight.quant_state.dtype = torch.float32
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    return model


def load_base(
    base: Base,
    method: str,
    device: torch.device,
    dtype: torch.dtype,
    model_class: type = AutoModelForCausalLM,
    **options: Any,
) -> Any:
    """Load a base model in evaluation mode, with every weight frozen unless `method` is `full`.

    Args:
        method: `qlora` quantises the linear layers to NF4; `lora` keeps them in `dtype`; `full` in fp32.
        model_class: the auto class, for causal language modeling or sequence classification.
        options: further arguments of `from_pretrained`.

    Raises:
        CorruptFile: the weights are truncated, incomplete or not finite.
        InputError: the architecture is unknown, the weights do not fit the configuration, a weight exceeds the range of
            `dtype`, the format of the weights is not read (see `align.run.weights`), or the probe fails.
    """
    if device.type == "cpu":
        keep_freed_memory()
        limit_kernel_cache()
    if method == "qlora":
        options["quantization_config"] = build_nf4_config(dtype)
    weights_dtype = torch.float32 if method == "full" else dtype
    refuse_half_precision(model_config(Path(base.path), displayed=base.id), get_dtype_name(dtype), base.id)
    files = model_files(Path(base.path), displayed=base.id)
    for path in files:
        if path.suffix == ".safetensors":  # the file is checked, because NF4 turns nan into a number
            require_finite_file(path, "model.path", base.id, "Download or save the model again.", weights_dtype)
    with convert_errors(partial(build_load_error, base)):
        with require_same_bytes(files, "model.path", base.id, base.digest), link_files(files) as folder:
            model, loaded = model_class.from_pretrained(
                str(folder),
                output_loading_info=True,
                dtype=weights_dtype,
                device_map={"": device},
                trust_remote_code=False,
                use_safetensors=True,
                **options,
            )
    model.name_or_path = model.config.name_or_path = base.path  # PEFT looks for a configuration there
    require_configured_tensors(base, model_class, loaded["missing_keys"], loaded["unexpected_keys"])
    disable_nf4_repacking(model)
    model.requires_grad_(method == "full")
    install_fast_path(model)
    model.eval()
    route = get_route(model)
    if not route.has_fast_path:
        print_once(f"{base.id}: takes the plain path, which is slower and gives the same results ({route.why})")
    if base.id not in BUILT_IN:  # the table of architectures does not compare the numbers of a configuration
        require_consistent_logits(model, base)
    return model


@contextmanager
def convert_errors(explain: Callable[[Exception], InputError]) -> Iterator[None]:
    """Convert an exception of a library in the `with` block to the InputError that `explain` returns. A wrong value in
    a file may raise anything. AlignError and out-of-memory errors pass unchanged."""
    try:
        yield
    except AlignError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise explain(error) from error


def require_configured_tensors(
    base: Base, model_class: type, missing: Collection[str], unexpected: Collection[str]
) -> None:
    """Raise CorruptFile unless a base model's files have exactly the tensors that its configuration asks for.

    Transformers initialises missing weights at random and ignores unexpected ones. Its lists leave out tied tensors and
    those that the model's class ignores by name, such as DeepSeek-V3's layer that predicts several tokens. A classifier
    that is loaded from a language model has no language head, and a new head of its own.

    Args:
        model_class: the auto class that loaded it.
        missing, unexpected: from transformers' loading report.

    Raises:
        CorruptFile: a tensor is missing or unexpected.
    """
    head_tensors: set[str] = set()
    if model_class is not AutoModelForCausalLM:
        missing = [name for name in missing if not name.startswith("score.")]
        head_tensors = find_head_names(base, unexpected)
    if missing:
        problem = f"its weights are incomplete ({min(missing)} is missing)"
        raise CorruptFile("model.path", base.id, problem, "Download or save them again.")
    unknown = sorted(name for name in unexpected if name not in head_tensors and not KNOWN_BUFFERS.search(name))
    if unknown:
        problem = f"its weights have tensors that {CONFIG_NAME} does not ask for ({abbreviate_names(unknown)})"
        remedy = f"Correct {CONFIG_NAME} (the number of layers, the type), or save the model again without them."
        raise CorruptFile("model.path", base.id, problem, remedy)


def find_head_names(base: Base, names: Collection[str]) -> set[str]:
    """Return the tensor names among `names` that are the language head in a base model's files. These are tensors
    outside of the backbone that have the shape of one there.

    Some checkpoints name the head differently than the class: GPT-NeoX's is `embed_out` in files and `lm_head` in
    memory.
    """
    model = build_skeleton(base) if names else None
    if model is None:
        return set()
    backbone = f"{model.base_model_prefix}."
    parameters = model.named_parameters(remove_duplicate=False)  # a tied head has the name of the embedding too
    shapes = {tuple(tensor.shape) for name, tensor in parameters if not name.startswith(backbone)}
    stored = {
        name: tuple(tensor.get("shape", ()))
        for path in weight_files(Path(base.path))
        for name, tensor in read_header(path).items()
        if name in names and isinstance(tensor, dict)
    }
    return {name for name, shape in stored.items() if shape in shapes and not name.startswith(backbone)}


@cache
def print_once(line: str) -> None:
    print(line)


def load_classifier(base: Base, method: str, device: torch.device, dtype: torch.dtype) -> Any:
    """Load a base model with a scalar `score` head instead of the language head, for a reward model."""
    return load_base(base, method, device, dtype, AutoModelForSequenceClassification, num_labels=1)


def build_load_error(base: Base, error: Exception) -> InputError:
    """Return the error for a base model that failed to load: CorruptFile for broken safetensors, else InputError."""
    summary = summarize_error(error)[:200]
    if type(error).__name__ == "SafetensorError" or "safetensors" in summary.lower() or "header" in summary.lower():
        return CorruptFile(
            "model.path", base.id, f"its weights are corrupt ({summary})", "Download or save them again."
        )
    return InputError(
        "model.path", base.id, f"does not load ({summary})", "Use a causal language model that transformers knows."
    )


def summarize_error(error: Exception) -> str:
    """Return the type and the first line of an exception, joined by a colon."""
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])


def load_own_tokenizer(artifact: Artifact, base: Base) -> Any:
    """Load the tokenizer that an artifact was trained with, or its base model's if the artifact has none. See
    `load_tokenizer`."""
    has_tokenizer = (artifact.path / "tokenizer_config.json").is_file()
    return load_tokenizer(base, artifact.path if has_tokenizer else None)


def load_tokenizer(base: Base, folder: Path | None = None) -> Any:
    """Load the tokenizer of a base model or of `folder`, and set a pad token if it has none.

    If the model has none, the unknown token or EOS becomes the pad token. Padding is always masked, so that a shared id
    does no harm.

    Args:
        folder: folder of the tokenizer; by default that of the weights.

    Raises:
        InputError: there is no tokenizer, it reads files that no digest covers, or has tokens without an embedding.
    """
    place = folder or Path(base.path)
    put_there = "Put tokenizer files beside the weights."
    require_readable_folder(place, "model.path", put_there)

    def refuse(problem: str, remedy: str) -> InputError:
        return InputError("model.path", base.id, problem, remedy)

    def explain(error: Exception) -> InputError:
        return refuse(f"its tokenizer does not load ({summarize_error(error)[:160]})", put_there)

    with convert_errors(explain), require_same_bytes(match_files(place, TOKENIZER), "model.path", base.id):
        tokenizer = AutoTokenizer.from_pretrained(str(place), trust_remote_code=False)
    if hidden := list_unhashed_files(place, tokenizer.vocab_files_names.values()):
        problem = (
            f"its tokenizer is read from files that are not covered by the model's digest ({', '.join(hidden)} "
            f"in {place})"
        )
        raise refuse(problem, "Save the tokenizer as tokenizer.json with chat_template.jinja, and remove the others.")
    longest = tokenizer.model_max_length
    is_number = isinstance(longest, int | float)
    require(is_number, "tokenizer_config.json, model_max_length", longest, "is no number of tokens", "Correct it.")
    if isinstance(tokenizer.chat_template, dict):
        tokenizer.chat_template = tokenizer.chat_template.get("default")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    require_vocabulary_fits(tokenizer, base, str(place))
    return tokenizer


def require_vocabulary_fits(tokenizer: Any, base: Base, source: str) -> None:
    """Raise InputError unless every token of a tokenizer has a row in the base model's embedding.

    A special token that is never written may have none: it is in no template, the tokenizer adds it to no row, and
    contents never contain special tokens (`align.data.chat.tokens`). Gemma 3's text models have such a token, for
    images.

    Raises:
        InputError: the id of a token is beyond the embedding.
    """
    config = model_config(Path(base.path), displayed=base.id)
    text = config.get("text_config")
    rows = config.get("vocab_size") or (text.get("vocab_size") if isinstance(text, dict) else None)
    named = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id, tokenizer.pad_token_id)
    special = ((id, token.content) for id, token in tokenizer.added_tokens_decoder.items() if token.special)
    unwritten = {id for id, text in special if id not in named and text not in str(tokenizer.chat_template)}
    ids = ((id, token) for token, id in tokenizer.get_vocab().items() if id not in unwritten)
    last, token = max(ids, default=(-1, ""))
    if isinstance(rows, int) and last >= rows:
        problem = f"the tokenizer in {source} has {last + 1} ids, the last {token!r}, and the embedding {rows} rows"
        remedy = f"Drop the added tokens, or save the model after model.resize_token_embeddings({last + 1})."
        raise InputError("model.path", base.id, problem, remedy)


def refuse_added_tokens(tokenizer: Any, base: Any) -> None:
    """Raise InputError if an adapter's tokenizer has tokens that its base's does not have, because adapters hold no
    embeddings.

    Raises:
        InputError: tokens were added.
    """
    if added := sorted(tokenizer.get_vocab().keys() - base.get_vocab().keys()):
        problem = f"{len(added)} tokens were added to the base's: vLLM and llama.cpp have no embedding for them"
        raise InputError("tokenizer", added[0], problem, OWN_TOKENIZER)


def save_tokenizer(tokenizer: Any, folder: Path, base_folder: Path | None = None) -> None:
    """Save a tokenizer to `folder` without the local paths that it was read from, so that equal runs write equal bytes.

    Args:
        base_folder: the folder of the base, for the files of `BESIDE_TOKENIZER`.
    """
    tokenizer.save_pretrained(str(folder))
    path = folder / "tokenizer_config.json"
    config = read_json(path, OWN_TOKENIZER)
    write_json(path, {k: v for k, v in config.items() if k not in LOCAL_KEYS})
    for name in BESIDE_TOKENIZER:
        if base_folder is not None and (base_folder / name).is_file() and not (folder / name).exists():
            shutil.copyfile(base_folder / name, folder / name)


class BaseConfigurations(NamedTuple):
    """The model configuration and the generation configuration of a base model."""

    config: Any
    generation_config: GenerationConfig


def read_configurations(base: Base) -> BaseConfigurations:
    """Read the model and generation configurations of a base model with transformers, without its weights.

    Raises:
        InputError: transformers cannot read them.
    """
    with convert_errors(partial(build_load_error, base)):
        with link_files(model_files(Path(base.path), displayed=base.id)) as folder:
            config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
            has_generation_config = (folder / GENERATION_CONFIG_NAME).is_file()
            file = (
                GENERATION_CONFIG_NAME if has_generation_config else CONFIG_NAME
            )  # as in transformers, whose model classes have defaults
            generation = GenerationConfig.from_pretrained(
                str(folder), file, _from_model_config=not has_generation_config
            )
    return BaseConfigurations(config, generation)


def build_skeleton(base: Base) -> Any:
    """Build the modules of a base model on the meta device, without weights. Returns None if that fails; loading will
    then report the error.

    Raises:
        InputError: see `read_configurations`.
    """
    config = read_configurations(base).config
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception:  # a wrong value may raise anything
        return None


def require_packing_support(base: Base) -> None:
    """Raise InputError unless several rows may be packed into one on a base model, before its weights are loaded.

    Passes if the modules cannot be built: loading will then report the error.

    Raises:
        InputError: packing was not proven for this architecture.
    """
    model = build_skeleton(base)
    if model is None:
        return
    route = get_route(model)
    reason = f"type {model.config.model_type} does not tell packed rows apart by their positions"
    reason = reason if route.is_measured else route.why
    problem = f"rows are packed on models that were proven to tell them apart, and {reason}"
    remedy = "Drop it; docs/architectures.md lists what was proven."
    require(route.can_pack, "stage.packing", True, problem, remedy)


def get_context_length(model: Any) -> int:
    """Return the maximum number of positions in a model's context, from its configuration.

    With LongRoPE (Ding et al., 2024) it is the original one: beyond it the model uses other factors for the whole row,
    so that tokens that were already sampled get other logprobs.

    Args:
        model: a model or a `BaseConfigurations`.

    Raises:
        InputError: the configuration has no such number.
    """
    config = model.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    positions = getattr(config, "max_position_embeddings", 0) or 2048
    if not isinstance(positions, int) or positions < 1:
        raise InputError("config.json, max_position_embeddings", positions, "is no number of positions", "Correct it.")
    rope = getattr(config, "rope_parameters", None) or {}
    by_layer_kind = [kind for kind in rope.values() if isinstance(kind, dict)]
    originals = [
        kind.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
        for kind in (rope, *by_layer_kind)
        if kind.get("rope_type") == "longrope"
    ]
    return min([positions, *(original for original in originals if isinstance(original, int) and original > 0)])
