"""Exports as GGUF, the file format of llama.cpp and Ollama: a base model and an adapter, or a whole model.

The base is written once for all its adapters, into `bases/` beside the runs, and hard-linked into each export, so that
an export can be copied as a whole.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from align.core.errors import CorruptFile, InputError
from align.data.chat.fixed_prompts import render_fixed_prompts
from align.data.chat.tokens import get_special_token_ids
from align.export.bases import load_plain_base
from align.export.converters import compute_converter_digest, convert_adapter, convert_model
from align.export.engines import free_memory
from align.export.trained_model import TrainedModel
from align.models.adapters import WEIGHTS_FILE
from align.models.base import to_public_base
from align.models.load import get_dtype_name, save_tokenizer
from align.ops.finite import count_not_finite
from align.rollout.engine_process import LLAMA_CPP, SETTINGS, EngineResponse, read_engine_version, run_engine_script
from align.run import file_digest, json_digest, read_json, write_json
from align.run.atomic import publish_folder, scratch_folder
from align.run.weights import ABOUT

ADAPTER = "adapter-f16.gguf"
F16 = "f16"
F32 = "f32"
PIECES = "tokenizer.model"
"""Name of the file with a SentencePiece model."""
LARGEST = torch.finfo(torch.float16).max
"""Largest finite number in float16."""


def build_gguf_file_name(weights: str, is_whole_model: bool = False) -> str:
    """Return the GGUF file name for a weight type such as `f16`: `base-f16.gguf`, or `model-f16.gguf` for a whole
    model."""
    return f"{'model' if is_whole_model else 'base'}-{weights}.gguf"


def find_variants(folder: Path) -> dict[str, Path]:
    """Return a mapping from weight type, such as `q8_0`, to the path of each GGUF base or whole model in an export's
    folder."""
    files = sorted([*folder.glob("base-*.gguf"), *folder.glob("model-*.gguf")], reverse=True)
    return {path.stem.partition("-")[2]: path for path in files}


@dataclass(frozen=True, slots=True)
class GgufSource:
    """The model that a GGUF file is converted from, with its tokenizer and the converters.

    Attributes:
        public_base: `id`, `revision` and `digest` of the base, and other values that its weights depend on.
        kind: `nf4-dequantised` or `original`.
        load: return the model with plain weights in fp32.
        folder: folder of its original tokenizer.
        tokenizer: tokenizer with the chat template of training.
        converters: see `align.export.converters.find_converters`.
    """

    public_base: Mapping[str, str]
    kind: str
    load: Callable[[], PreTrainedModel]
    folder: Path
    tokenizer: PreTrainedTokenizerBase
    converters: Path

    def convert(self, target: Path, weights: str) -> None:
        """Load the model in fp32 and convert it to a GGUF file at `target` with llama.cpp's converter.

        Raises:
            InputError: A weight is too large for f16, or the converter does not support the model, see `convert_model`.
        """
        name = Path(self.public_base["id"]).name
        with scratch_folder(target) as scratch:
            plain = scratch / name
            model = self.load()
            if weights == F16:
                require_f16_model(model)
            model.save_pretrained(plain)
            del model
            free_memory()
            save_tokenizer(self.tokenizer, plain, self.folder)
            add_converter_settings(plain, self.tokenizer)
            convert_model(self.converters, plain, target, name, weights)

    def compute_cache_key(self, *more: Any) -> str:
        """Return the first 12 hex digits of a digest of everything that a GGUF file depends on, such as weights and
        vocabulary."""
        tokenizer = self.tokenizer
        pieces = self.folder / PIECES
        vocabulary: list[Any] = [
            tokenizer.chat_template,
            sorted(tokenizer.get_vocab().items()),
            str(sorted(tokenizer.special_tokens_map.items())),
            file_digest(pieces) if pieces.is_file() else "",
        ]
        if new_tokens := list_added_tokens(tokenizer):
            vocabulary.append(new_tokens)
        return json_digest(
            [dict(self.public_base), self.kind, vocabulary, compute_converter_digest(self.converters), *more]
        )[:12]


def build_gguf_source(trained: TrainedModel, base_weights: str, converters: Path) -> GgufSource:
    """Return the GgufSource of a trained model's base, with its NF4 weights dequantised or with its original weights.

    A whole model is its own base.
    """
    base = to_public_base(trained.base) | {"quantised_from": get_dtype_name(trained.dtype)}
    folder = Path(trained.origin.path)
    return GgufSource(
        base, base_weights, lambda: load_plain_base(trained, base_weights), folder, trained.tokenizer, converters
    )


def add_converter_settings(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Add `add_bos_token` and added tokens to an exported `tokenizer_config.json`, for llama.cpp's converter.

    By default llama.cpp puts a BOS token before every prompt, even if there was none in training: it is set to what the
    chat template writes. Tokens that were added to a SentencePiece model are not in its file.
    """
    bos = str(tokenizer.bos_token or "")
    begins_with_bos = bool(bos) and all(text.startswith(bos) for text, _ in render_fixed_prompts(tokenizer))
    path = folder / "tokenizer_config.json"
    settings: dict[str, Any] = {"add_bos_token": begins_with_bos}
    if (folder / PIECES).is_file() and (new_tokens := list_added_tokens(tokenizer)):
        settings["added_tokens_decoder"] = new_tokens
    write_json(path, read_json(path, "Export again.") | settings)


def list_added_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, dict[str, Any]]:
    """Return a mapping from token id, as text, to content and `special` flag of each token added to a tokenizer's
    vocabulary."""
    tokens = tokenizer.added_tokens_decoder.items()
    return {
        str(id): {"content": token.content, "special": token.special}
        for id, token in sorted(tokens)
        if id >= tokenizer.vocab_size
    }


def write_missing_bases(root: Path, source: GgufSource, quantised: Sequence[str], python: str | None) -> list[Path]:
    """Write the base model as GGUF files in f16 and in the quantised variants, unless they exist in `root`, and return
    their paths.

    Each file has a folder of its own.

    Args:
        quantised: further variants in fewer bits, such as `q8_0`.
        python: the Python that has llama.cpp, which makes these variants from f16; None leaves them out.

    Raises:
        InputError: As `GgufSource.convert`.
        CorruptFile: A file differs from the one that was written.
    """
    full_file = write_or_verify_cached_file(root, source, F16, lambda target: source.convert(target, F16))
    if python is None:
        return [full_file]

    def quantise(target: Path, weights: str) -> None:
        run_engine_script(LLAMA_CPP, python, SETTINGS[LLAMA_CPP], quantise=[str(full_file), str(target), weights])

    version = read_engine_version(LLAMA_CPP, python, SETTINGS[LLAMA_CPP])
    files = [full_file]
    for weights in quantised:
        files.append(write_or_verify_cached_file(root, source, weights, partial(quantise, weights=weights), version))
    return files


def write_or_verify_cached_file(
    root: Path, source: GgufSource, weights: str, write: Callable[[Path], None], version: str = ""
) -> Path:
    """Return a GGUF file from its cache folder in `root`, after writing it if it is missing or else verifying its
    SHA-256.

    The folder's name has a digest of everything that the file depends on.

    Raises:
        CorruptFile: The file differs from the one that was written.
    """
    file = build_gguf_file_name(weights)
    name = Path(source.public_base["id"]).name
    folder = root / f"{name}-{source.kind}-gguf-{weights}-{source.compute_cache_key(weights, version)}"
    if not (folder / ABOUT).is_file():
        with publish_folder(folder, replace=ABOUT) as scratch:
            write(scratch / file)
            write_json(
                scratch / ABOUT, {**source.public_base, "kind": source.kind, "sha256": file_digest(scratch / file)}
            )
        return folder / file
    remedy = f"Remove {folder} and do this again; exports that share the file have to be made again too."
    if not (folder / file).is_file() or file_digest(folder / file) != read_json(folder / ABOUT, remedy).get("sha256"):
        raise CorruptFile("base", f"{folder.name}/{file}", "is not the file that was written", remedy)
    return folder / file


def require_f16_model(model: PreTrainedModel) -> None:
    for name, parameter in model.named_parameters():
        require_f16_tensor(name, parameter)


def require_f16_tensor(name: str, tensor: Tensor) -> None:
    if count_not_finite(tensor, torch.float16):
        problem = f"{name} has a weight beyond the range of f16"
        raise InputError("export", "gguf", problem, "Export it as export=merged.")


def write_adapter_as_gguf(folder: Path, bases: Sequence[Path], adapter: Path, source: GgufSource) -> None:
    """Convert an adapter to GGUF in f16 in an export's folder, and link or copy the base's GGUF files and the tokenizer
    beside it.

    Args:
        bases: files from `write_missing_bases`.
        adapter: folder of a plain LoRA, from `align.export.adapter.write_adapter`.
    """
    for path in bases:
        link_or_copy_file(path, folder / path.name)
    for name, tensor in load_file(adapter / WEIGHTS_FILE).items():
        require_f16_tensor(f"{name} of the adapter", tensor)
    convert_adapter(source.converters, adapter, source.folder, folder / ADAPTER, F16)
    for path in adapter.iterdir():  # tokenizer, template, base.json: for programs that render the chat themselves
        if path.suffix != ".safetensors" and path.name != "adapter_config.json":
            shutil.copyfile(path, folder / path.name)


def write_whole_model_as_gguf(folder: Path, files: Sequence[Path], trained: TrainedModel) -> None:
    """Link or copy a whole model's GGUF files into an export's folder, and write its tokenizer, template and
    `base.json`.

    Args:
        files: files from `write_missing_bases`.
    """
    for path in files:
        link_or_copy_file(path, folder / path.name.replace("base-", "model-", 1))
    write_json(folder / ABOUT, to_public_base(trained.origin))
    save_tokenizer(trained.tokenizer, folder, Path(trained.origin.path))


def link_or_copy_file(source: Path, target: Path) -> None:
    """Create a hard link to a file, or copy the file if the file system does not support the link."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP):
            raise
        shutil.copyfile(source, target)


def require_same_token_ids(
    tokenizer: Any, prompts: Sequence[tuple[str, Sequence[int]]], response: EngineResponse
) -> None:
    """Raise InputError unless llama.cpp gives special tokens and prompts the same ids as training, with the same chat
    template.

    Args:
        prompts: text and training token ids of each.
        response: llama.cpp's answer about `list_special_tokens_and_prompts` of the same prompts.

    Raises:
        InputError: It does not.
    """
    remedy = "Export it as export=merged."
    special = list_special_tokens(tokenizer)
    engine_ids = response.output["tokens"]
    for (text, id), ids in zip(special, engine_ids[: len(special)], strict=True):
        if list(ids) != [id]:
            raise InputError("tokenizer", text, f"is token {id}, and {list(ids)} in llama.cpp", remedy)
    for (text, trained_ids), ids in zip(prompts, engine_ids[len(special) :], strict=True):
        if list(ids) != list(trained_ids):
            pairs = enumerate(zip(trained_ids, ids, strict=False))
            at = next((i for i, (trained_id, id) in pairs if trained_id != id), len(trained_ids))
            problem = f"llama.cpp cuts it into other tokens, from the {at + 1}th on"
            raise InputError("tokenizer", text[:60], problem, remedy)
    begin_with_bos = all(list(ids[:1]) == [tokenizer.bos_token_id] for _, ids in prompts)
    if response.output["begins_with_bos"] and not begin_with_bos:
        problem = "llama.cpp puts it in front of every prompt, and training did not"
        raise InputError("bos_token", tokenizer.bos_token, problem, remedy)
    if response.output["template"] != tokenizer.chat_template:
        raise InputError("chat_template", response.output["template"][:60], "is another in the GGUF file", remedy)
    for kind in ("bos", "eos"):
        token_id = getattr(tokenizer, f"{kind}_token_id")
        if token_id is not None and response.output[kind] != token_id:
            problem = f"is token {token_id}, and {response.output[kind]} in llama.cpp"
            raise InputError(f"{kind}_token", tokenizer.convert_ids_to_tokens(token_id), problem, remedy)


def list_special_tokens_and_prompts(tokenizer: Any, prompts: Sequence[tuple[str, Sequence[int]]]) -> list[str]:
    """Return the texts for llama.cpp to tokenize in `require_same_token_ids`: all special tokens, then the prompts."""
    return [text for text, _ in (*list_special_tokens(tokenizer), *prompts)]


def list_special_tokens(tokenizer: Any) -> list[tuple[str, int]]:
    """Return (text, id) of each special or added token of a tokenizer, sorted by id."""
    ids = sorted(get_special_token_ids(tokenizer) | tokenizer.added_tokens_decoder.keys())
    return [(tokenizer.convert_ids_to_tokens(id), id) for id in ids]
