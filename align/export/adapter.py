"""Writing of LoRA adapters for deployment: PEFT's two files at the root of a folder, as plain LoRA that every engine
reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from align.export.bases import require_findable_base
from align.export.trained_model import TrainedModel
from align.models.adapters import (
    CONFIG_FILE,
    RETRAIN,
    Factors,
    read_adapter_config,
)
from align.models.base import to_public_base
from align.models.load import load_tokenizer, refuse_added_tokens, save_tokenizer
from align.models.plain_lora import compute_initial_factors, write_plain_lora
from align.run import read_json, write_json


def write_adapter(
    folder: Path,
    source: Path,
    base: Mapping[str, str],
    *,
    tokenizer: PreTrainedTokenizerBase,
    base_folder: Path | None = None,
    initial_factors: Mapping[str, Factors] | None = None,
) -> None:
    """Write an adapter as plain LoRA in fp32 with its `base.json`, tokenizer and chat template to an empty folder.

    A reward model's score head is written too.

    Args:
        folder: an empty folder, from `align.run.atomic.publish_folder`.
        source: folder of a PEFT adapter.
        base: `id`, `revision` and `digest` of the model the adapter was trained on, written to `base.json`: PEFT warns
            about unknown keys in `adapter_config.json`.
        base_folder: the base's folder, see `align.models.load.save_tokenizer`.
        initial_factors: see `align.models.plain_lora.convert_to_plain_lora`; needed if `init_lora_weights` is one of
            `REPEATABLE`.

    Raises:
        CorruptFile, MissingArtifact, InputError, StorageError: As `read_adapter`, `refuse_unsupported_adapter` and
            `publish_folder`.
    """
    require_findable_base(base)
    write_plain_lora(folder, source, base, initial_factors)
    write_json(folder / "base.json", dict(base))
    save_tokenizer(tokenizer, folder, base_folder)


def write_as_plain_lora(trained: TrainedModel, folder: Path) -> Path:
    """Write a trained model's adapter with `write_adapter` to a folder, which is created if missing, and return the
    folder.

    Raises:
        InputError: As `write_adapter`, or the adapter was trained with tokens that the base does not have.
    """
    assert trained.adapter is not None, "a whole model has no adapter"
    folder.mkdir(exist_ok=True)
    refuse_added_tokens(trained.tokenizer, load_tokenizer(trained.base))
    config = read_adapter_config(trained.adapter, "artifact", is_only_adapter=True)
    initial = None
    if isinstance(config.get("init_lora_weights"), str):
        initial = compute_initial_factors(trained.load(trained.method), config)
    write_adapter(
        folder,
        trained.adapter,
        to_public_base(trained.base),
        tokenizer=trained.tokenizer,
        base_folder=Path(trained.base.path),
        initial_factors=initial,
    )
    return folder


def read_plain_lora_rank(folder: Path) -> int:
    """Return the rank in the `adapter_config.json` of an adapter that `write_as_plain_lora` wrote."""
    return int(read_json(folder / CONFIG_FILE, RETRAIN)["r"])
