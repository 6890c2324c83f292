"""What is held out: never trained on before, and its loss measured the same way whatever trained the model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from align.data.chat import IGNORED, Encoded
from align.data.sources import DataSource, data_record
from align.errors import InputError
from align.models.backbone import pad, picked_logprobs
from align.run import Artifact, Input
from align.run.lineage import Gone, manifests_behind


@torch.no_grad()
def held_out_loss(model: Any, rows: Sequence[Encoded], pad_id: int, batch_size: int = 16) -> tuple[float, int]:
    """Mean negative log-likelihood over the trained tokens of `rows`, in nats, and how many tokens that was.

    Rows are batched by length, so little padding is computed; the mean is over tokens, whatever the batches.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    ordered = sorted(rows, key=lambda r: len(r.input_ids))
    for start in range(0, len(ordered), batch_size):
        batch = ordered[start : start + batch_size]
        tokens = pad([r.input_ids for r in batch], pad_id).to(device)
        mask = pad([[1] * len(r.input_ids) for r in batch], 0).bool().to(device)
        picked = (pad([r.labels for r in batch], IGNORED) != IGNORED).to(device)
        picked[:, 0] = False  # nothing stands before a first token
        logprobs, _, _ = picked_logprobs(model, tokens, mask, picked)
        total -= logprobs.sum().item()
        count += int(picked.sum())
    model.train(was_training)
    return total / count, count


def same_split(artifact: Artifact, data: DataSource, root: Path) -> None:
    """Raise where what is held out of the data now was trained on before: the file is the same, the share is not.

    Args:
        artifact: what is measured.
        root: the folder of runs.

    Raises:
        InputError: names the share that the run before had.
    """
    if data.name != "jsonl":
        return  # the corpus has parts of its own
    digest = data_record(data).digest
    for manifest in manifests_behind(artifact, root):
        if isinstance(manifest, Gone):
            print(f"{manifest.ref} is gone: nobody knows whether it was trained on what is held out of data.path now")
            continue
        trained = manifest.config["data"]
        same = manifest.inputs.get("data", Input("")).digest == digest
        if same and trained["held_out"] != data.held_out:
            raise InputError(
                "data.held_out", data.held_out,
                f"{manifest.ref} held out {trained['held_out']} of this file, learned the rest",
                f"Write data.held_out={trained['held_out']}, or give a file of its own to measure on.",
            )  # fmt: skip
