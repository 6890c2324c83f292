"""The reward model on TRL's RewardTrainer, with whole rankings as our own token rows."""

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
from align.models.forward import pad
from align.trainers.common import build_trainer
from align.trainers.multi_rank import TokenRowsTrainer

FIGURES = {"loss": "loss", "accuracy": "accuracy", "margin": "margin", "grad_norm": "grad_norm", "learning_rate": "lr"}


@dataclass(frozen=True, slots=True)
class Ranking:
    """Answers judged against each other, by one person or several: each text once, however many pairs it stands in.

    Attributes:
        texts: token rows, each ending where the score is read.
        pairs: (better, worse), as places in `texts`.
    """

    texts: list[list[int]]
    pairs: list[tuple[int, int]]


def group_rankings(pairs: Iterable[tuple[str, TokenizedPair]]) -> list[Ranking]:
    """Group pairs by the ranking that they came from, in order of their first pair.

    Args:
        pairs: each with its ranking's id.
    """
    groups: dict[str, tuple[dict[tuple[int, ...], int], list[tuple[int, int]]]] = {}
    for group, pair in pairs:
        places, judged = groups.setdefault(group, ({}, []))
        better, worse = (places.setdefault(tuple(ids), len(places)) for ids in (pair.chosen_ids, pair.rejected_ids))
        judged.append((better, worse))
    return [Ranking([list(ids) for ids in places], judged) for places, judged in groups.values()]


def score_head(model: Any) -> nn.Module:
    """Return the trained copy of the `score` head inside a PEFT model.

    Raises:
        AssertionError: PEFT does not train one, and the reward would be the random projection it started as.
    """
    wrapper = model.get_base_model().score
    trained = getattr(wrapper, "modules_to_save", None)
    assert trained is not None, "PEFT neither trains nor saves the score head"
    head = trained["default"]
    assert type(head) is nn.Linear, "the score head is quantised"
    assert head.weight.requires_grad, "the score head is frozen"
    return head


def copy_adapter_weights(model: Any, adapter: Path | None) -> int:
    """Copy the LoRA tensors of a supervised adapter into the reward model's; the head starts at 0.

    Returns:
        the number of tensors copied.

    Raises:
        InputError: the two adapters do not have the same shape.
    """
    nn.init.zeros_(score_head(model).weight)  # pyright: ignore[reportArgumentType]
    if adapter is None:
        return 0
    own = {name_in_file(n): p for n, p in model.named_parameters() if "lora_" in n}
    tensors = {k: v for k, v in read_tensors(adapter).items() if "lora_" in k}
    if own.keys() != tensors.keys() or any(own[k].shape != tensors[k].shape for k in own):
        difference = next(iter(sorted(own.keys() ^ tensors.keys())), "another rank")
        problem = f"its tensors do not fit a reward model ({difference})"
        remedy = "Train the SFT adapter on all linear layers of the same base."
        raise InputError("init", str(adapter), problem, remedy)
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)
    return len(tensors)


def name_in_file(parameter: str) -> str:
    """Return the name under which PEFT saves a parameter of the adapter `default`."""
    return parameter.replace(".default", "").replace("lora_magnitude_vector.weight", "lora_magnitude_vector")


def reward_trainer(model: Any, tokenizer: Any, judged: Sequence[Ranking], arguments: dict[str, Any]) -> RewardTrainer:
    """Build the trainer of Bradley–Terry's loss over rankings, with the weights of `collate_rankings`."""
    dataset = Dataset.from_dict(
        {
            "texts": [r.texts for r in judged],
            "pairs": [r.pairs for r in judged],
            "length": [max(map(len, r.texts)) for r in judged],
        }
    )
    settings = RewardConfig(**arguments, max_length=None, disable_dropout=True)
    padder = copy.deepcopy(tokenizer)  # rows are padded by it, nothing else
    filler = filler_id(judged, tokenizer.pad_token_id)
    padder.pad_token = tokenizer.convert_ids_to_tokens(filler)
    collate = partial(collate_rankings, filler=filler, judgements=mean_judgements(judged))
    return build_trainer(RankingTrainer, model, settings, dataset, padder, collate)


class RankingTrainer(TokenRowsTrainer, RewardTrainer):
    """TRL's trainer on rankings in place of pairs: an answer that stands in K − 1 pairs is read once, not K − 1
    times (Ouyang et al., InstructGPT, 2022, section 3.5)."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
        gap = pair_gaps(outputs.logits.float().squeeze(-1), inputs["pairs"])
        loss = ranking_loss(gap, inputs["weights"])
        self._metrics["train"]["accuracy"].append(float((gap > 0).float().mean()))
        self._metrics["train"]["margin"].append(float(gap.detach().mean()))
        return (loss, outputs) if return_outputs else loss


def mean_judgements(judged: Sequence[Ranking]) -> float:
    """Return the mean number of judgements a ranking: 1 where one person ordered all its texts, less with ties, more
    with several people."""
    return sum(len(r.pairs) / math.comb(len(r.texts), 2) for r in judged) / len(judged)


def collate_rankings(rows: Sequence[dict[str, Any]], filler: int, judgements: float) -> dict[str, Tensor]:
    """Return a batch of rankings: B texts [B, S] padded on the right, `pairs` [M, 2] as rows of them, and `weights`
    [M].

    A judgement of K texts spreads the weight of one over K(K − 1)/2 pairs, so that one of nine answers does not
    outweigh 36 of two. Divided by `judgements`, the mean a ranking, the loss stays in nats a pair.
    """
    texts = [ids for row in rows for ids in row["texts"]]
    first = 0
    pairs = []
    weights = []
    for row in rows:
        count = len(row["texts"])
        pairs += [(first + better, first + worse) for better, worse in row["pairs"]]
        weights += [1 / (math.comb(count, 2) * len(rows) * judgements)] * len(row["pairs"])
        first += count
    return {
        "input_ids": pad(texts, filler),
        "attention_mask": pad([[1] * len(ids) for ids in texts], 0),
        "pairs": torch.tensor(pairs),
        "weights": torch.tensor(weights),
    }


def pair_gaps(scores_B: Tensor, pairs_M2: Tensor) -> Tensor:
    """Return the score of the better text of each pair minus that of the worse [M]."""
    return scores_B[pairs_M2[:, 0]] - scores_B[pairs_M2[:, 1]]


def ranking_loss(gap_M: Tensor, weights_M: Tensor) -> Tensor:
    """Return Bradley–Terry's −log σ(gap), summed with weights."""
    return -(weights_M * logsigmoid(gap_M)).sum()


def filler_id(judged: Sequence[Ranking], pad_id: int) -> int:
    """Return a token for padding that no row ends with, `pad_id` if possible.

    transformers takes the score at the last token that is not the pad token. Where EOS is that too, an answer would be
    read one token early. The padding itself is masked, so that any other token serves.
    """
    ends = {ids[-1] for ranking in judged for ids in ranking.texts}
    return next(i for i in (pad_id, *range(len(ends) + 1)) if i not in ends)
