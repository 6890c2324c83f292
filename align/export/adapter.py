"""A LoRA adapter as every engine reads it: PEFT's own two files at the root of a folder, lowered to plain LoRA."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from align.export.bases import check_base
from align.export.trained import Trained
from align.models.adapters import (
    CONFIG_FILE,
    RETRAIN,
    Factors,
    adapter_config,
)
from align.models.base import named_base
from align.models.load import check_added_tokens, load_tokenizer, save_tokenizer
from align.models.plain_lora import initial_factors, write_plain
from align.run import read_json, write_json


def write_adapter(
    folder: Path,
    source: Path,
    base: Mapping[str, str],
    *,
    tokenizer: PreTrainedTokenizerBase,
    beside: Path | None = None,
    initial: Mapping[str, Factors] | None = None,
) -> None:
    """Write an adapter for deployment: plain LoRA in fp32, a reward model's head beside it, the config that engines
    read, tokenizer and template.

    Args:
        folder: an empty one, of `align.run.atomic.publish`.
        source: a PEFT adapter's folder.
        base: `id`, `revision` and `digest` of the model the adapter was trained on. The digest goes into `base.json`,
            since PEFT warns at keys of `adapter_config.json` that it does not know.
        beside: the base's folder, see `align.models.load.save_tokenizer`.
        initial: see `align.models.plain_lora.convert_to_plain`; needed where `init_lora_weights` is one of
            `REPEATABLE`.

    Raises:
        CorruptFile, MissingArtifact, InputError, StorageError: see `read_adapter`, `check_plain` and `publish`.
    """
    check_base(base)
    write_plain(folder, source, base, initial)
    write_json(folder / "base.json", dict(base))
    save_tokenizer(tokenizer, folder, beside)


def write_lowered(trained: Trained, folder: Path) -> Path:
    """Write the adapter that was trained as plain LoRA into a folder, which may be there.

    Raises:
        InputError: see `write_adapter`; or the adapter was trained with tokens that the base does not have.
    """
    assert trained.adapter is not None, "a whole model has no adapter"
    folder.mkdir(exist_ok=True)
    check_added_tokens(trained.tokenizer, load_tokenizer(trained.base))
    read, initial = adapter_config(trained.adapter, "artifact", alone=True), None
    if isinstance(read.get("init_lora_weights"), str):
        initial = initial_factors(trained.load(trained.method), read)
    write_adapter(
        folder, trained.adapter, named_base(trained.base), tokenizer=trained.tokenizer,
        beside=Path(trained.base.path), initial=initial,
    )  # fmt: skip
    return folder


def rank_of(folder: Path) -> int:
    """Of an adapter that was lowered."""
    return int(read_json(folder / CONFIG_FILE, RETRAIN)["r"])
