"""A base and an adapter as GGUF, which llama.cpp, Ollama and what is built on them read.

The base is written once for all adapters of it, into `bases/` beside the runs, and linked into each export, so that an
export is whole wherever it is copied to.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from align.errors import CorruptFile, InputError
from align.export.bases import ABOUT
from align.export.converters import convert_adapter, convert_model
from align.export.engines import freed
from align.export.folder import publish, read_json, write_tokenizer
from align.export.foreign import LLAMA_CPP, Answer, ask
from align.run import file_digest, json_digest, write_json

ADAPTER = "adapter-f16.gguf"
F16, F32 = "f16", "f32"
LARGEST = 65504.0
"""Of an f16."""


def base_file(weights: str) -> str:
    return f"base-{weights}.gguf"


@dataclass(frozen=True, slots=True)
class Source:
    """What a base in GGUF is made of.

    Attributes:
        named: `id`, `revision` and `digest` of the base, and whatever else its weights depend on.
        kind: `nf4-dequantised` or `original`.
        load: gives the model with plain weights in fp32.
        folder: that it came from.
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
        with tempfile.TemporaryDirectory(dir=target.parent) as work:
            plain = Path(work) / name
            model = self.load()
            if weights == F16:
                check_range(model)
            model.save_pretrained(plain)
            del model
            freed()
            write_tokenizer(plain, self.tokenizer, self.folder)
            convert_model(self.converters, plain, target, name, weights)


def gguf_beside(root: Path, source: Source, quantised: Sequence[str], python: str | None) -> Path:
    """The folder in `root` with a base as GGUF, in f16 and in fewer bits, written where it is not there yet.

    Args:
        quantised: such as `q8_0`.
        python: the one that has llama.cpp, which makes these; None leaves them out.

    Raises:
        InputError: see `Source.convert`.
        CorruptFile: what is there is not what was written.
    """
    variants = list(quantised) if python else []
    tokenizer = source.tokenizer
    vocabulary = sorted(tokenizer.get_vocab().items())
    which = json_digest([dict(source.named), source.kind, variants, tokenizer.chat_template, vocabulary])
    folder = root / f"{Path(source.named['id']).name}-{source.kind}-gguf-{which[:12]}"
    if not (folder / ABOUT).is_file():
        with publish(folder, replace=True) as part:
            source.convert(part / base_file(F16), F16)
            for weights in variants:
                made = [str(part / base_file(F16)), str(part / base_file(weights)), weights]
                ask(LLAMA_CPP, str(python), quantise=made)
            files = {path.name: file_digest(path) for path in sorted(part.glob("*.gguf"))}
            write_json(part / ABOUT, {**source.named, "kind": source.kind, "files": files})
    remedy = f"Remove {folder}, and export again with resume=never."
    for name, digest in read_json(folder / ABOUT, remedy)["files"].items():
        if not (folder / name).is_file() or file_digest(folder / name) != digest:
            raise CorruptFile("base", f"{folder.name}/{name}", "is not the file that was written", remedy)
    return folder


def check_range(model: PreTrainedModel) -> None:
    for name, parameter in model.named_parameters():
        if float(parameter.detach().abs().max()) > LARGEST:
            problem = f"{name} holds a weight that f16 cannot"
            raise InputError("export", "gguf", problem, "Export it as export=merged.")


def write_gguf(folder: Path, beside: Path, adapter: Path, source: Source) -> None:
    """The adapter as GGUF, and the base's files beside it.

    Args:
        beside: of `gguf_beside`.
        adapter: a folder with a plain LoRA, of `align.export.adapter.write_adapter`.
    """
    for path in sorted(beside.glob("*.gguf")):
        linked(path, folder / path.name)
    convert_adapter(source.converters, adapter, source.folder, folder / ADAPTER, F16)
    for path in adapter.iterdir():  # tokenizer, template, base.json: for whoever renders the chat outside the engine
        if path.suffix != ".safetensors" and path.name != "adapter_config.json":
            shutil.copyfile(path, folder / path.name)


def linked(source: Path, target: Path) -> None:
    """The same file under another name; a copy where the file system cannot."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def check_reading(tokenizer: Any, prompts: Sequence[tuple[str, Sequence[int]]], answer: Answer) -> None:
    """llama.cpp reads text as the model was trained to: special tokens one by one, the prompts, and the template.

    Args:
        prompts: each as text and as the token ids it was trained as.
        answer: to `texts_of` the same.

    Raises:
        InputError: it does not.
    """
    remedy = "Export it as export=adapter or export=merged."
    special = special_tokens(tokenizer)
    read = answer.said["tokens"]
    for (text, id), ids in zip(special, read[: len(special)], strict=True):
        if list(ids) != [id]:
            raise InputError("tokenizer", text, f"is token {id}, and {list(ids)} in llama.cpp", remedy)
    for (text, ids), found in zip(prompts, read[len(special) :], strict=True):
        if list(found) != list(ids):
            at = next((i for i, pair in enumerate(zip(ids, found, strict=False)) if pair[0] != pair[1]), len(ids))
            problem = f"llama.cpp cuts it into other tokens, from the {at + 1}th on"
            raise InputError("tokenizer", text[:60], problem, remedy)
    if answer.said["template"] != tokenizer.chat_template:
        raise InputError("chat_template", answer.said["template"][:60], "is another in the GGUF file", remedy)
    for kind in ("bos", "eos"):
        wanted = getattr(tokenizer, f"{kind}_token_id")
        if wanted is not None and answer.said[kind] != wanted:
            problem = f"is token {wanted}, and {answer.said[kind]} in llama.cpp"
            raise InputError(f"{kind}_token", tokenizer.convert_ids_to_tokens(wanted), problem, remedy)


def texts_of(tokenizer: Any, prompts: Sequence[tuple[str, Sequence[int]]]) -> list[str]:
    """What llama.cpp is asked to cut into tokens, for `check_reading`."""
    return [text for text, _ in (*special_tokens(tokenizer), *prompts)]


def special_tokens(tokenizer: Any) -> list[tuple[str, int]]:
    added = tokenizer.get_added_vocab() | dict(
        zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
    )
    return sorted(added.items(), key=lambda pair: pair[1])
