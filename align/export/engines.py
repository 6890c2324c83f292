"""Loading of exports with transformers and PEFT, and their logits or reward scores on test prompts.

Each function loads an export as another project would, by transformers' own means.
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

from align.models.fastpath import disable_fast_path
from align.models.load import build_nf4_config, cast_to_fp32, disable_nf4_repacking

Rows = Sequence[Sequence[int]]
"""Token ids, one row per prompt."""

BATCH = 4
"""Number of texts that a reward model scores in one batch."""

VERSION = f"{transformers.__version__}, peft {peft.__version__}"


@dataclass(frozen=True, slots=True)
class ExportPrompts:
    """The tokenized prompts on which an export is compared with the trained model, for a language or a reward model.

    Attributes:
        rows: token ids as training read them.
        is_reward_model: True for a reward model.
        template_rows: of a reward model: token ids of the same texts by the exported chat template.
        pad_id: of a reward model: id of the pad token of the exported tokenizer; None if it has none.
    """

    rows: Rows
    is_reward_model: bool = False
    template_rows: Rows = ()
    pad_id: int | None = None


@torch.no_grad()
def compute_logits(model: Any, rows: Rows) -> list[Tensor]:
    """Compute next-token logits of a language model for each row of token ids, as fp32 tensors [S, V] on the CPU.

    Rows are run one at a time, without padding, and by the engine's own forward functions.
    """
    device = next(model.parameters()).device
    with disable_fast_path(model):
        return [model(input_ids=torch.tensor([list(row)], device=device)).logits[0].float().cpu() for row in rows]


def gather_token_logprobs(logits: Sequence[Tensor], rows: Rows) -> list[list[float]]:
    """Return the log-probability of each token in each row except the row's first token, from next-token logits.

    Args:
        logits: [S, V] for each row.
    """
    all_logprobs = []
    for logits_SV, row in zip(logits, rows, strict=True):
        logprobs = logits_SV[:-1].double().log_softmax(-1).gather(1, torch.tensor(list(row))[1:, None])[:, 0]
        all_logprobs.append(logprobs.tolist())
    return all_logprobs


@torch.no_grad()
def compute_choices(model: Any, rows: Rows, pad_id: int | None) -> list[Tensor]:
    """Return a reward model's scores as logits of pairwise choices: one fp32 tensor [P, 2] on the CPU, in a list.

    See `scores_as_choices`.

    Args:
        pad_id: pad token, with which several rows are scored in one batch; None scores rows one at a time.
    """
    device = next(model.parameters()).device
    old_pad = model.config.get_text_config().pad_token_id
    set_pad_token(model, pad_id)
    scores = []
    size = 1 if pad_id is None else BATCH
    for i in range(0, len(rows), size):
        batch = rows[i : i + size]
        longest = max(map(len, batch))
        ids = [[*row, *[0 if pad_id is None else pad_id] * (longest - len(row))] for row in batch]
        mask = [[1] * len(row) + [0] * (longest - len(row)) for row in batch]
        ids_BS = torch.tensor(ids, device=device)
        mask_BS = torch.tensor(mask, device=device)
        with disable_fast_path(model):
            scores.append(model(input_ids=ids_BS, attention_mask=mask_BS).logits[:, 0].float().cpu())
    set_pad_token(model, old_pad)
    return [scores_as_choices(torch.cat(scores))]


def scores_as_choices(scores_N: Tensor) -> Tensor:
    """Return scores [N] as logits [P, 2] of Bradley-Terry choices, one row for each pair of texts.

    There is also one row for each text beside a text whose score is 0, so that a shift of all scores counts too.
    """
    all_M = torch.cat((scores_N, scores_N.new_zeros(1)))
    first, second = torch.triu_indices(len(all_M), len(all_M), offset=1)
    return torch.stack((all_M[first], all_M[second]), dim=1)


def set_pad_token(model: Any, pad_id: int | None) -> None:
    """Set the pad token id in a model's configurations, in place.

    A sequence classifier in transformers skips this token when it looks for the last token of a text.
    """
    for config in (model.config, model.config.get_text_config()):
        config.pad_token_id = pad_id


def compute_model_logits(folder: Path, prompts: ExportPrompts, device: torch.device) -> list[Tensor]:
    """Load an exported model with transformers, in its stored dtype but computing in fp32, and return its logits on the
    prompts.

    For a reward model these are choices, see `compute_choices`.
    """
    model = load_with_transformers(folder, device, is_reward_model=prompts.is_reward_model)
    if prompts.is_reward_model:
        logits = compute_choices(model, prompts.template_rows, model.config.get_text_config().pad_token_id)
    else:
        logits = compute_logits(model, prompts.rows)
    del model
    free_memory()
    return logits


def compute_adapter_logits(
    base: Path,
    adapter: Path,
    prompts: ExportPrompts,
    device: torch.device,
    dtype: torch.dtype | None = None,
    quantise_to_nf4: bool = False,
) -> list[Tensor]:
    """Load a base with transformers and an adapter with PEFT, computing in fp32, and return their logits on the
    prompts.

    For a reward model these are choices, see `compute_choices`.

    Args:
        dtype: dtype in which the base's weights are read; None keeps the stored one.
        quantise_to_nf4: quantise the base to NF4, from `dtype`.
    """
    head_options = {"num_labels": 1} if prompts.is_reward_model else {}
    model = load_with_transformers(base, device, dtype, quantise_to_nf4, prompts.is_reward_model, **head_options)
    model = PeftModel.from_pretrained(model, str(adapter)).eval()
    logits = (
        compute_choices(model, prompts.template_rows, prompts.pad_id)
        if prompts.is_reward_model
        else compute_logits(model, prompts.rows)
    )
    del model
    free_memory()
    return logits


def free_memory() -> None:
    """Run the garbage collector and empty the CUDA cache, to free the memory of deleted models.

    Patched forward functions are in reference cycles with their modules.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def load_with_transformers(
    folder: Path,
    device: torch.device,
    dtype: torch.dtype | None = None,
    quantise_to_nf4: bool = False,
    is_reward_model: bool = False,
    **options: Any,
) -> Any:
    if quantise_to_nf4:
        options["quantization_config"] = build_nf4_config(torch.float32)
    model_class = AutoModelForSequenceClassification if is_reward_model else AutoModelForCausalLM
    model = model_class.from_pretrained(
        folder, dtype=dtype or "auto", device_map={"": device}, trust_remote_code=False, **options
    )
    disable_nf4_repacking(model)
    return cast_to_fp32(model).eval()
