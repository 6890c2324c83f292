"""Reward models by TRL's RewardTrainer, on whole rankings that are tokenized already."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from trl.trainer.reward_config import RewardConfig
from trl.trainer.reward_trainer import RewardTrainer

from align.core.errors import InputError
from align.data.pairs import TokenizedPair
from align.models.adapters import read_tensors
from align.models.forward import pad_rows
from align.trainers.common import build_trainer
from align.trainers.multi_rank import TokenRowsTrainer

FIGURES = {"loss": "loss", "accuracy": "accuracy", "margin": "margin", "grad_norm": "grad_norm", "learning_rate": "lr"}


@dataclass(frozen=True, slots=True)
class Ranking:
    """Tokenized answers to one prompt, with the pairs in which people compared them. Each text is stored once, even if
    it is in several pairs.

    Attributes:
        texts: token rows, which end where the score is read.
        pairs: (better, worse) as indices of `texts`.
        labels: probability of each pair that the text called better is better.
    """

    texts: list[list[int]]
    pairs: list[tuple[int, int]]
    labels: list[float]


def group_rankings(pairs: Iterable[tuple[str, TokenizedPair]]) -> list[Ranking]:
    """Group tokenized pairs by the id of their ranking, and return one Ranking per id, in order of first appearance.

    Args:
        pairs: pairs with the id of their ranking.
    """
    pairs_of_group: dict[str, list[TokenizedPair]] = {}
    for group, pair in pairs:
        pairs_of_group.setdefault(group, []).append(pair)
    return [build_ranking(pairs) for pairs in pairs_of_group.values()]


def build_ranking(pairs: Sequence[TokenizedPair]) -> Ranking:
    """Return the pairs of one ranking as a Ranking, in which each text is stored once."""
    texts = list(dict.fromkeys(tuple(ids) for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids)))
    place_of_text = {ids: place for place, ids in enumerate(texts)}
    return Ranking(
        texts=[list(ids) for ids in texts],
        pairs=[(place_of_text[tuple(pair.chosen_ids)], place_of_text[tuple(pair.rejected_ids)]) for pair in pairs],
        labels=[pair.label for pair in pairs],
    )


def find_score_head(model: Any) -> nn.Module:
    """Return the trainable copy of a PEFT reward model's `score` head.

    Raises:
        AssertionError: PEFT does not train the head, so that scores would stay a random projection.
    """
    wrapper = model.get_base_model().score
    trained = getattr(wrapper, "modules_to_save", None)
    assert trained is not None, "PEFT neither trains nor saves the score head"
    head = trained["default"]
    assert type(head) is nn.Linear, "the score head is quantised"
    assert head.weight.requires_grad, "the score head is frozen"
    return head


def copy_adapter_weights(model: Any, adapter: Path | None) -> int:
    """Copy the LoRA tensors of a supervised adapter into the reward model's adapter in place, and set the score head to
    0.

    Args:
        adapter: folder of the supervised adapter; None to copy nothing.

    Returns:
        The number of copied tensors.

    Raises:
        InputError: the two adapters do not have the same shape.
    """
    nn.init.zeros_(find_score_head(model).weight)  # pyright: ignore[reportArgumentType]
    if adapter is None:
        return 0
    parameters = {to_saved_name(n): p for n, p in model.named_parameters() if "lora_" in n}
    tensors = {k: v for k, v in read_tensors(adapter).items() if "lora_" in k}
    if parameters.keys() != tensors.keys() or any(parameters[k].shape != tensors[k].shape for k in parameters):
        difference = next(iter(sorted(parameters.keys() ^ tensors.keys())), "another rank")
        problem = f"its tensors do not fit a reward model ({difference})"
        remedy = "Train the SFT adapter on all linear layers of the same base."
        raise InputError("init", str(adapter), problem, remedy)
    with torch.no_grad():
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)
    return len(tensors)


def to_saved_name(parameter: str) -> str:
    """Return the name under which PEFT saves a parameter of the adapter `default`."""
    return parameter.replace(".default", "").replace("lora_magnitude_vector.weight", "lora_magnitude_vector")


def build_reward_trainer(
    model: Any, tokenizer: Any, rankings: Sequence[Ranking], arguments: dict[str, Any]
) -> RewardTrainer:
    """Build TRL's reward trainer with the Bradley–Terry loss over rankings, weighted as in `collate_rankings`."""
    dataset = Dataset.from_dict(
        {
            "texts": [r.texts for r in rankings],
            "pairs": [r.pairs for r in rankings],
            "labels": [r.labels for r in rankings],
            "length": [max(map(len, r.texts)) for r in rankings],
        }
    )
    settings = RewardConfig(**arguments, max_length=None, disable_dropout=True)
    padder = copy.deepcopy(tokenizer)  # used for its pad token only
    filler = choose_filler_id(rankings, tokenizer.pad_token_id)
    padder.pad_token = tokenizer.convert_ids_to_tokens(filler)
    collate = partial(collate_rankings, filler=filler, mean_judgements=compute_mean_judgements(rankings))
    return build_trainer(RankingTrainer, model, settings, dataset, padder, collate)


class RankingTrainer(TokenRowsTrainer, RewardTrainer):
    """TRL's RewardTrainer on rankings in place of pairs, with one forward pass per answer. In pairs, an answer of K
    would be computed K − 1 times (Ouyang et al., InstructGPT, 2022, section 3.5)."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
        gap = compute_pair_gaps(outputs.logits.float().squeeze(-1), inputs["pairs"])
        loss = (inputs["weights"] * compute_pair_losses(gap, inputs["pair_labels"])).sum()
        self._metrics["train"]["accuracy"].append(float((gap > 0).float().mean()))
        self._metrics["train"]["margin"].append(float(gap.detach().mean()))
        return (loss, outputs) if return_outputs else loss


def compute_mean_judgements(rankings: Sequence[Ranking]) -> float:
    """Return the number of compared pairs per possible pair of a ranking's texts, averaged over rankings. It is 1 if
    one person ordered all texts, less with ties, more with several people."""
    return sum(len(r.pairs) / math.comb(len(r.texts), 2) for r in rankings) / len(rankings)


def collate_rankings(rows: Sequence[dict[str, Any]], filler: int, mean_judgements: float) -> dict[str, Tensor]:
    """Collate rankings to B right-padded texts [B, S], `pairs` [M, 2] as row indices (better, worse), their soft labels
    `pair_labels` [M], and loss weights `weights` [M].

    A judgement of K texts has the weight of one, divided over its K(K − 1)/2 pairs, so that a ranking of nine answers
    does not outweigh 36 rankings of two. Division by `mean_judgements`, the mean per ranking, keeps the loss in nats
    per pair.
    """
    texts = [ids for row in rows for ids in row["texts"]]
    first = 0
    pairs = []
    weights = []
    for row in rows:
        count = len(row["texts"])
        pairs += [(first + better, first + worse) for better, worse in row["pairs"]]
        weights += [1 / (math.comb(count, 2) * len(rows) * mean_judgements)] * len(row["pairs"])
        first += count
    return {
        "input_ids": pad_rows(texts, filler),
        "attention_mask": pad_rows([[1] * len(ids) for ids in texts], 0),
        "pairs": torch.tensor(pairs),
        "pair_labels": torch.tensor([label for row in rows for label in row["labels"]]),
        "weights": torch.tensor(weights),
    }


def compute_pair_gaps(scores_B: Tensor, pairs_M2: Tensor) -> Tensor:
    """Return the score of the better text minus that of the worse one, for each pair [M]."""
    return scores_B[pairs_M2[:, 0]] - scores_B[pairs_M2[:, 1]]


def compute_pair_losses(gap_M: Tensor, labels_M: Tensor) -> Tensor:
    """Return each pair's Bradley–Terry loss −p log σ(gap) − (1 − p) log σ(−gap), [M], in nats.

    Args:
        labels_M: p, the probability that the text called better is better.
    """
    return -(labels_M * logsigmoid(gap_M) + (1 - labels_M) * logsigmoid(-gap_M))


def choose_filler_id(rankings: Sequence[Ranking], pad_id: int) -> int:
    """Return a token id for padding that is not the last token of any row; `pad_id` if possible.

    transformers reads the score at the last token that is not the pad token. If EOS is also the pad token, an answer
    would be scored one token too early. Padding is masked, so that any other token will do.
    """
    ends = {ids[-1] for ranking in rankings for ids in ranking.texts}
    return next(i for i in (pad_id, *range(len(ends) + 1)) if i not in ends)
