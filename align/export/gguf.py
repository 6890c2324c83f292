"""A base and an adapter, or a whole model, as GGUF, which llama.cpp, Ollama and what is built on them read.

The base is written once for all adapters of it, into `bases/` beside the runs, and linked into each export, so that an
export is whole wherever it is copied to.
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
from align.data.chat.fixed_prompts import fixed_texts
from align.data.chat.tokens import special_ids
from align.export.bases import plain_base
from align.export.converters import convert_adapter, convert_model, digest_of
from align.export.engines import free_memory
from align.export.trained import Trained
from align.models.adapters import WEIGHTS_FILE
from align.models.base import named_base
from align.models.load import name_of, save_tokenizer
from align.ops.finite import not_finite
from align.rollout.engine_process import LLAMA_CPP, SETTINGS, Answer, ask, version_in
from align.run import file_digest, json_digest, read_json, write_json
from align.run.atomic import publish, scratch_folder
from align.run.weights import ABOUT

ADAPTER = "adapter-f16.gguf"
F16, F32 = "f16", "f32"
PIECES = "tokenizer.model"
"""SentencePiece's own file."""
LARGEST = torch.finfo(torch.float16).max
"""Of an f16."""


def base_file(weights: str, whole: bool = False) -> str:
    """Of a base beside an adapter, or of a whole model."""
    return f"{'model' if whole else 'base'}-{weights}.gguf"


def variants_in(folder: Path) -> dict[str, Path]:
    """Weights → the file of a base, or of a whole model, in an export."""
    found = sorted([*folder.glob("base-*.gguf"), *folder.glob("model-*.gguf")], reverse=True)
    return {path.stem.partition("-")[2]: path for path in found}


@dataclass(frozen=True, slots=True)
class Source:
    """What a base in GGUF is made of.

    Attributes:
        named: `id`, `revision` and `digest` of the base, and whatever else its weights depend on.
        kind: `nf4-dequantised` or `original`.
        load: gives the model with plain weights in fp32.
        folder: that its tokenizer came from.
        tokenizer: with the chat template that was trained with.
        converters: see `align.export.converters.converters_in`.
    """

    named: Mapping[str, str]
    kind: str
    load: Callable[[], PreTrainedModel]
    folder: Path
    tokenizer: PreTrainedTokenizerBase
    converters: Path

    def convert(self, target: Path, weights: str) -> None:
        """One GGUF file.

        Raises:
            InputError: a weight is too large for f16; or the converter does not know the model, see `convert_model`.
        """
        name = Path(self.named["id"]).name
        with scratch_folder(target) as work:
            plain = work / name
            model = self.load()
            if weights == F16:
                check_range(model)
            model.save_pretrained(plain)
            del model
            free_memory()
            save_tokenizer(self.tokenizer, plain, self.folder)
            tell_converter(plain, self.tokenizer)
            convert_model(self.converters, plain, target, name, weights)

    def key(self, *more: Any) -> str:
        """What a file depends on, as a digest: weights, vocabulary, template and converter."""
        tokenizer = self.tokenizer
        reads = [
            tokenizer.chat_template,
            sorted(tokenizer.get_vocab().items()),
            str(sorted(tokenizer.special_tokens_map.items())),
        ]
        pieces = self.folder / PIECES
        reads.append(file_digest(pieces) if pieces.is_file() else "")
        reads += [added] if (added := added_tokens(tokenizer)) else []
        return json_digest([dict(self.named), self.kind, reads, digest_of(self.converters), *more])[:12]


def gguf_source(trained: Trained, into: str, converters: Path) -> Source:
    """The base of what was trained, as `into`: `nf4-dequantised` or `original`; a whole model is its own."""
    named = named_base(trained.base) | {"quantised_from": name_of(trained.dtype)}
    return Source(
        named, into, lambda: plain_base(trained, into), Path(trained.origin.path), trained.tokenizer, converters
    )  # fmt: skip


def tell_converter(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """What llama.cpp's converter reads of a tokenizer, and transformers does not write.

    llama.cpp puts a BOS in front of every prompt unless it is told not to, whether or not there was one in training:
    what the chat template writes is the truth. Tokens that were added to a SentencePiece model are not in its file.
    """
    bos = str(tokenizer.bos_token or "")
    starts = bool(bos) and all(text.startswith(bos) for text, _ in fixed_texts(tokenizer))
    path = folder / "tokenizer_config.json"
    told: dict[str, Any] = {"add_bos_token": starts}
    if (folder / PIECES).is_file() and (added := added_tokens(tokenizer)):
        told["added_tokens_decoder"] = added
    write_json(path, read_json(path, "Export again.") | told)


def added_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, dict[str, Any]]:
    """Tokens behind the vocabulary that the tokenizer was made with, by id."""
    known = tokenizer.added_tokens_decoder.items()
    return {
        str(id): {"content": token.content, "special": token.special}
        for id, token in sorted(known)
        if id >= tokenizer.vocab_size
    }


def gguf_bases(root: Path, source: Source, quantised: Sequence[str], python: str | None) -> list[Path]:
    """The base in `root` as GGUF files, each in a folder of its own and written where it is not there yet.

    Args:
        quantised: in which fewer bits it shall be there too, such as `q8_0`.
        python: the one that has llama.cpp, which makes these of the f16; None leaves them out.

    Raises:
        InputError: see `Source.convert`.
        CorruptFile: what is there is not what was written.
    """
    whole = cached_file(root, source, F16, lambda target: source.convert(target, F16))
    if python is None:
        return [whole]

    def in_fewer(target: Path, weights: str) -> None:
        ask(LLAMA_CPP, python, SETTINGS[LLAMA_CPP], quantise=[str(whole), str(target), weights])

    made_by = version_in(LLAMA_CPP, python, SETTINGS[LLAMA_CPP])
    return [whole, *(cached_file(root, source, bits, partial(in_fewer, weights=bits), made_by) for bits in quantised)]


def cached_file(root: Path, source: Source, weights: str, write: Callable[[Path], None], made_by: str = "") -> Path:
    """A file that is known by its sha256."""
    file = base_file(weights)
    folder = root / f"{Path(source.named['id']).name}-{source.kind}-gguf-{weights}-{source.key(weights, made_by)}"
    if not (folder / ABOUT).is_file():
        with publish(folder, replace=ABOUT) as part:
            write(part / file)
            write_json(part / ABOUT, {**source.named, "kind": source.kind, "sha256": file_digest(part / file)})
        return folder / file
    remedy = f"Remove {folder} and do this again; exports that share the file have to be made again too."
    if not (folder / file).is_file() or file_digest(folder / file) != read_json(folder / ABOUT, remedy).get("sha256"):
        raise CorruptFile("base", f"{folder.name}/{file}", "is not the file that was written", remedy)
    return folder / file


def check_range(model: PreTrainedModel) -> None:
    for name, parameter in model.named_parameters():
        check_f16(name, parameter)


def check_f16(name: str, tensor: Tensor) -> None:
    if not_finite(tensor, torch.float16):
        problem = f"{name} holds a weight that f16 cannot"
        raise InputError("export", "gguf", problem, "Export it as export=merged.")


def write_gguf(folder: Path, bases: Sequence[Path], adapter: Path, source: Source) -> None:
    """An adapter as GGUF, and the base's files beside it.

    Args:
        bases: of `gguf_bases`.
        adapter: a folder with a plain LoRA, of `align.export.adapter.write_adapter`.
    """
    for path in bases:
        linked(path, folder / path.name)
    for name, tensor in load_file(adapter / WEIGHTS_FILE).items():
        check_f16(f"{name} of the adapter", tensor)
    convert_adapter(source.converters, adapter, source.folder, folder / ADAPTER, F16)
    for path in adapter.iterdir():  # tokenizer, template, base.json: for whoever renders the chat outside the engine
        if path.suffix != ".safetensors" and path.name != "adapter_config.json":
            shutil.copyfile(path, folder / path.name)


def write_whole_gguf(folder: Path, files: Sequence[Path], trained: Trained) -> None:
    """A whole model as GGUF, with its tokenizer, template and `base.json`, as `write_gguf` has them.

    Args:
        files: of `gguf_bases`.
    """
    for path in files:
        linked(path, folder / path.name.replace("base-", "model-", 1))
    write_json(folder / ABOUT, named_base(trained.origin))
    save_tokenizer(trained.tokenizer, folder, Path(trained.origin.path))


def linked(source: Path, target: Path) -> None:
    """The same file under another name; a copy where the file system has no such thing."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP):
            raise
        shutil.copyfile(source, target)


def check_reading(tokenizer: Any, prompts: Sequence[tuple[str, Sequence[int]]], answer: Answer) -> None:
    """llama.cpp reads text as the model was trained to: special tokens one by one, the prompts, and the template.

    Args:
        prompts: each as text and as the token ids it was trained as.
        answer: to `texts_of` the same.

    Raises:
        InputError: it does not.
    """
    remedy = "Export it as export=merged."
    special = special_tokens(tokenizer)
    read = answer.output["tokens"]
    for (text, id), ids in zip(special, read[: len(special)], strict=True):
        if list(ids) != [id]:
            raise InputError("tokenizer", text, f"is token {id}, and {list(ids)} in llama.cpp", remedy)
    for (text, ids), found in zip(prompts, read[len(special) :], strict=True):
        if list(found) != list(ids):
            at = next((i for i, pair in enumerate(zip(ids, found, strict=False)) if pair[0] != pair[1]), len(ids))
            problem = f"llama.cpp cuts it into other tokens, from the {at + 1}th on"
            raise InputError("tokenizer", text[:60], problem, remedy)
    starts = {list(ids[:1]) == [tokenizer.bos_token_id] for _, ids in prompts}
    if answer.output["begins_with_bos"] and starts != {True}:
        problem = "llama.cpp puts it in front of every prompt, and training did not"
        raise InputError("bos_token", tokenizer.bos_token, problem, remedy)
    if answer.output["template"] != tokenizer.chat_template:
        raise InputError("chat_template", answer.output["template"][:60], "is another in the GGUF file", remedy)
    for kind in ("bos", "eos"):
        wanted = getattr(tokenizer, f"{kind}_token_id")
        if wanted is not None and answer.output[kind] != wanted:
            problem = f"is token {wanted}, and {answer.output[kind]} in llama.cpp"
            raise InputError(f"{kind}_token", tokenizer.convert_ids_to_tokens(wanted), problem, remedy)


def texts_of(tokenizer: Any, prompts: Sequence[tuple[str, Sequence[int]]]) -> list[str]:
    """What llama.cpp is asked to cut into tokens, for `check_reading`."""
    return [text for text, _ in (*special_tokens(tokenizer), *prompts)]


def special_tokens(tokenizer: Any) -> list[tuple[str, int]]:
    """Each that is matched as a whole, with its id."""
    ids = sorted(special_ids(tokenizer) | tokenizer.added_tokens_decoder.keys())
    return [(tokenizer.convert_ids_to_tokens(id), id) for id in ids]
