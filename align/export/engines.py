"""What an export says when it is loaded back: the next-token logits of an engine, prompt by prompt; of a reward model
its scores.

Each function loads as a stranger would, by the engine's own means and none of ours.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from align.models.fastpath import without_fast_path
from align.models.load import in_fp32, keep_unpacked, nf4

Rows = Sequence[Sequence[int]]
"""Token ids, a prompt each."""

BATCH = 4
"""Texts that a reward model scores together."""

VERSION = f"{transformers.__version__}, peft {peft.__version__}"


@dataclass(frozen=True, slots=True)
class Asked:
    """What a model is asked: to a language model the next token behind each of a prompt's, to a reward model a score.

    Attributes:
        rows: as training read them.
        scores: of a reward model.
        read: the same as others read them, by the exported chat template; of a reward model.
        pad: that the exported tokenizer pads these with, of a reward model; None where it has none.
    """

    rows: Rows
    scores: bool = False
    read: Rows = ()
    pad: int | None = None


@torch.no_grad()
def logits_of(model: Any, rows: Rows) -> list[Tensor]:
    """fp32 logits on the CPU, [S, V] for each row; one row at a time, so that no padding has a say, and by the forwards
    that the engine came with."""
    device = next(model.parameters()).device
    with without_fast_path(model):
        return [model(input_ids=torch.tensor([list(row)], device=device)).logits[0].float().cpu() for row in rows]


def picked(logits: Sequence[Tensor], rows: Rows) -> list[list[float]]:
    """Of each token of a row but the first, its logprob.

    Args:
        logits: [S, V] a row.
    """
    found = []
    for part, row in zip(logits, rows, strict=True):
        logprobs = part[:-1].double().log_softmax(-1).gather(1, torch.tensor(list(row))[1:, None])[:, 0]
        found.append([float(value) for value in logprobs])
    return found


@torch.no_grad()
def choices_of(model: Any, rows: Rows, pad: int | None) -> list[Tensor]:
    """A reward model's scores as choices (see `as_choices`), in fp32 on the CPU: padded rows together where there is a
    token to pad with."""
    device, own = next(model.parameters()).device, model.config.get_text_config().pad_token_id
    set_pad(model, pad)
    scores = []
    size = 1 if pad is None else BATCH
    for i in range(0, len(rows), size):
        part = rows[i : i + size]
        longest = max(map(len, part))
        tokens = [[*row, *[0 if pad is None else pad] * (longest - len(row))] for row in part]
        real = [[1] * len(row) + [0] * (longest - len(row)) for row in part]
        ids, mask = (torch.tensor(given, device=device) for given in (tokens, real))
        with without_fast_path(model):
            scores.append(model(input_ids=ids, attention_mask=mask).logits[:, 0].float().cpu())
    set_pad(model, own)
    return [as_choices(torch.cat(scores))]


def as_choices(scores_N: Tensor) -> Tensor:
    """Scores as the choices that they stand for: logits [P, 2] of which of two texts is the better one (Bradley–Terry),
    for each pair, and for each text beside one whose score is 0: what moves all scores alike would change no pair."""
    all_M = torch.cat((scores_N, scores_N.new_zeros(1)))
    first, second = torch.triu_indices(len(all_M), len(all_M), offset=1)
    return torch.stack((all_M[first], all_M[second]), dim=1)


def set_pad(model: Any, pad: int | None) -> None:
    """The token that transformers passes over when it looks for the last one of a text."""
    for config in (model.config, model.config.get_text_config()):
        config.pad_token_id = pad


def whole_model(folder: Path, asked: Asked, device: torch.device) -> list[Tensor]:
    """transformers on a folder with a model, its weights as they lie there and fp32 sums."""
    model = as_published(folder, device, scores=asked.scores)
    if asked.scores:
        logits = choices_of(model, asked.read, model.config.get_text_config().pad_token_id)
    else:
        logits = logits_of(model, asked.rows)
    del model
    free_memory()
    return logits


def adapter_on(
    base: Path,
    adapter: Path,
    asked: Asked,
    device: torch.device,
    dtype: torch.dtype | None = None,
    quantised: bool = False,
) -> list[Tensor]:
    """transformers and PEFT on a base and an adapter, with fp32 sums.

    Args:
        dtype: what the base's weights are read in; None is how they lie there.
        quantised: to NF4, out of `dtype`.
    """
    one_score = {"num_labels": 1} if asked.scores else {}
    model = as_published(base, device, dtype, quantised, asked.scores, **one_score)
    model = PeftModel.from_pretrained(model, str(adapter)).eval()
    logits = choices_of(model, asked.read, asked.pad) if asked.scores else logits_of(model, asked.rows)
    del model
    free_memory()
    return logits


def free_memory() -> None:
    """Models that nothing refers to any more give their memory back now: the short forwards are bound to modules, in
    circles, and the next model is as large."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def as_published(
    folder: Path, device: torch.device, dtype: torch.dtype | None = None, quantised: bool = False, scores: bool = False,
    **options: Any,
) -> Any:  # fmt: skip
    if quantised:
        options["quantization_config"] = nf4(torch.float32)
    head = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    model = head.from_pretrained(
        folder, dtype=dtype or "auto", device_map={"": device}, trust_remote_code=False, **options
    )
    keep_unpacked(model)
    return in_fp32(model).eval()
