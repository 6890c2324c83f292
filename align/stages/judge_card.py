"""The card of a judge (`eval=judge`): the judge of `reward=` on pairs with a known verdict."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from align import ranks
from align.config.root import Config
from align.config.scorers import reward_spec
from align.errors import InputError
from align.evals.card_gate import FILE, MIN_AGREEMENT, SCHEMA, read_card, shortfall
from align.evals.judge_card import LONGER, SHORTER, card_figures
from align.evals.judge_identity import JudgeIdentity, identity_of
from align.evals.known_pairs import KnownPair, pairs_digest
from align.evals.llm_judge import LLMJudge, verdicts_by_llm
from align.evals.llm_words import errors_in_words
from align.evals.pair_accuracy import pref_text, write_held_out
from align.evals.stats import win_rate
from align.evals.verdicts import FIRST, SECOND, Pair
from align.models.finite import diverged
from align.models.load import choose_device, choose_dtype
from align.ops.calibration import log_odds as odds_of
from align.report import in_words
from align.report.words import calibration_in_words, counted
from align.reward.build import build, on_its_own_base
from align.reward.combined import comparable
from align.reward.inputs import models_of
from align.run import Run, write_json
from align.run.files import write_text
from align.stages.judge_card_inputs import KnownPairs
from align.stages.scores import fits_all
from align.stages.suite_answers import answer_store
from align.track import peak_rss_mb
from align.types import Result, Rollout


class Said(NamedTuple):
    """What a judge says of pairs.

    Attributes:
        pairs: those that it can read.
        verdicts: 1 where it finds the first answer better, 0 the second, ½ for a tie [n].
        swapped: the same with the second answer shown first; None of a judge that sees no order.
        scores: of the first and the second answers [n, 2]; None of a judge that compares answers.
        log_odds: that the first answer is the better one, in nats [n]; None where the judge says nothing of odds.
        errors: why there is no verdict in both orders, empty where there is [n]; None of a judge that always gives one.
        notes: what is to be said of the verdicts.
    """

    pairs: Sequence[KnownPair]
    verdicts: Sequence[float]
    swapped: Sequence[float] | None = None
    scores: torch.Tensor | None = None
    log_odds: Sequence[float | None] | None = None
    errors: Sequence[str] | None = None
    notes: Sequence[str] = ()


def run(run: Run, config: Config, known: KnownPairs) -> Result:
    judge = identity_of(known.judge, reward_spec(config.reward), run.inputs)
    assert judge is not None, "people are nobody's to measure"
    if isinstance(known.judge, LLMJudge):
        said = by_llm(config, known.judge, known.pairs)
    else:
        said = by_scorer(run, config, known.pairs)
    failed = None if said.errors is None else [bool(error) for error in said.errors]
    figures = card_figures(said.pairs, said.verdicts, said.swapped, said.log_odds, config.stage.level, failed)
    path = run.artifact / FILE
    write_json(path, card_of(judge, known, said, figures, config.stage.level))
    write_text(run.artifact / "verdicts.jsonl", "".join(f"{json.dumps(row)}\n" for row in evidence(said)))
    write_pairs(run, said)
    why = shortfall(read_card(path))
    too_long, notes = len(known.pairs) - len(said.pairs), [*known.notes, *said.notes]
    metrics = {
        "judge": judge.title, "reference": known.reference, "judge_agreement": figures["agreement"]["raw"],
        "card": figures, "decides": not why, "why_not": why, "dropped_too_long": too_long,
        "judge_notes": notes, "peak_rss_mb": peak_rss_mb(),
    }  # fmt: skip
    left = [f"{counted(too_long, 'pair')} longer than a reward model's context, and left out"] if too_long else []
    return Result(metrics, (*in_lines(metrics), *left, *notes))


def by_llm(config: Config, judge: LLMJudge, pairs: Sequence[KnownPair]) -> Said:
    """The verdicts of a language model, in both orders. The first rank asks it."""
    asked = [Pair(pair.item.id, pair.item.prompt, pref_text(pair.first), pref_text(pair.second)) for pair in pairs]
    store = answer_store(config)
    verdicts = ranks.from_main(verdicts_by_llm(judge, asked, store) if ranks.is_main() else [])
    found = {(one.prompt, one.order): one for one in verdicts}
    both = [(found[pair.item.id, FIRST], found[pair.item.id, SECOND]) for pair in pairs]
    first, second = ([each[order].verdict for each in both] for order in (0, 1))
    odds = [log_odds([one.p for one in each if one.p is not None]) for each in both]
    errors = [one.error or other.error for one, other in both]
    why = [one.error for one in verdicts]
    notes = errors_in_words(why, f"verdicts by {judge.title}", "wrong", "its card says nothing")
    return Said(pairs, first, second, log_odds=odds, errors=errors, notes=notes)


def log_odds(p: Sequence[float]) -> float | None:
    """Of the mean of what a judge says in both orders; None where it says nothing in one of them."""
    if len(p) < 2:
        return None
    return odds_of(sum(p) / len(p))


def by_scorer(run: Run, config: Config, pairs: Sequence[KnownPair]) -> Said:
    """The verdicts of `reward=`: the higher score is the better answer. The scorer's learned parts are brought to one
    scale on the second answers.

    Raises:
        InputError: no pair fits a reward model's context, or a score is no number.
    """
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    models = [on_its_own_base(model, device, dtype, 32) for model in models_of(run.inputs)]
    read = [pair for pair in pairs if all(fits_all(models, side) for side in pair.conversations)]
    if not read:
        raise too_long(config, pairs)
    sides = [[pair.conversations[side] for pair in read] for side in (0, 1)]
    cut = [ended(pair.ended[side] for pair in read) for side in (0, 1)]
    scorer = comparable(build(reward_spec(config.reward), iter(models)), sides[1], cut[1])
    scores_N2 = torch.stack([scorer.score(*each).double() for each in zip(sides, cut, strict=True)], dim=1)
    if not scores_N2.isfinite().all():
        raise diverged("the score of an answer is no number", None, config.dtype)
    first, second = scores_N2.T.tolist()
    # Bradley-Terry's odds are what a reward model was trained to give; units of other scorers say nothing of odds.
    odds = (scores_N2[:, 0] - scores_N2[:, 1]).tolist() if config.reward.name == "learned" else None
    return Said(read, win_rate(first, second).tolist(), scores=scores_N2, log_odds=odds)


def too_long(config: Config, pairs: Sequence[KnownPair]) -> InputError:
    problem = f"are {counted(len(pairs), 'pair')}, each longer than a reward model's context"
    return InputError("data", config.data.path or config.project, problem, "Give shorter pairs, or name another judge.")


def ended(whole: Iterable[bool]) -> Rollout:
    """Which answers ended by themselves, for scorers that read no tokens of a rollout but want to know."""
    flags = torch.tensor([*whole], dtype=torch.bool, device="cpu")
    tokens = torch.zeros(len(flags), 2, dtype=torch.int64, device="cpu")
    return Rollout(tokens, tokens == 0, 1, flags)


def card_of(
    judge: JudgeIdentity, known: KnownPairs, said: Said, figures: Mapping[str, Any], level: float
) -> dict[str, Any]:
    """The layout of `card.json`."""
    about = {"digest": pairs_digest(said.pairs), "pairs": len(said.pairs), "left_out": known.left_out}
    return {
        "schema_version": SCHEMA, "judge": judge.as_dict(), "reference": known.reference, "data": about, "level": level,
        **figures,
    }  # fmt: skip


def evidence(said: Said) -> Iterator[dict[str, Any]]:
    """A line for each pair, without its texts: they stand in the data."""
    for i, pair in enumerate(said.pairs):
        first, second = pair.lengths
        row = {
            "id": pair.item.id, "cluster": pair.item.cluster, "source": pair.item.category, "reference": pair.verdict,
            "votes": pair.votes, "verdict": said.verdicts[i], "characters": [first, second],
        }  # fmt: skip
        row |= {"swapped": said.swapped[i]} if said.swapped is not None else {}
        row |= {"error": said.errors[i]} if said.errors is not None and said.errors[i] else {}
        yield row | ({"scores": said.scores[i].tolist()} if said.scores is not None else {})


def write_pairs(run: Run, said: Said) -> None:
    """`held_out.jsonl` of the pairs that were decided, as a run of `stage=reward` writes it: the page shows those on
    which the judge is right or wrong by the widest margin. Nothing of a judge without scores."""
    rows = [i for i, pair in enumerate(said.pairs) if not pair.tied]
    if said.scores is None or not rows:
        return
    better = torch.tensor([[0, 1] if said.pairs[i].verdict == 1 else [1, 0] for i in rows], device="cpu")
    scores_M2 = said.scores[rows].gather(1, better)
    prefs = [said.pairs[i].as_preference() for i in rows]
    odds = 1.0 if said.log_odds is not None else None
    write_held_out(run.folder / "held_out.jsonl", prefs, scores_M2[:, 0] - scores_M2[:, 1], scores_M2, odds)


def in_lines(metrics: Mapping[str, Any]) -> Iterator[str]:
    """The card in words, what it decides first."""
    card, why = metrics["card"], metrics["why_not"]
    may = f"enough to decide gates ({MIN_AGREEMENT:g})" if not why else f"too little to decide gates: {why}"
    agreed, verdicts = in_words(metrics["judge_agreement"], ".2f"), card["agreement"]["verdicts"]
    yield f"{metrics['judge']} agrees with {metrics['reference']} on {agreed} of {counted(verdicts, 'verdict')}, {may}"
    if "accuracy" in card:
        by = {key: found for key, found in card["by_length"].items() if key in (LONGER, SHORTER)}
        where = ", ".join(f"{in_words(found, '.2f')} where it is the {key} one" for key, found in by.items())
        right = f"it prefers the better answer in {in_words(card['accuracy'], '.2f')} of the pairs that have one"
        yield f"{right}{f'; {where}' if where else ''}"
    if card["swap"]:
        consistent, first = (in_words(card["swap"][key], ".2f") for key in ("consistency", "shown_first"))
        yield f"{consistent} of its verdicts survive a swap; the answer that is shown first wins {first}"
    if card["errors"]:
        pairs = counted(card["errors"], "pair")
        yield f"it gives no verdict, or one in one order alone, on {pairs}: counted as wrong"
    for n, found in card.get("best_of", {}).items():
        yield f"it finds the best of {n} answers in {in_words(found, '.2f')} of {counted(found['n'], 'prompt')}"
    if "calibration" in card:
        yield calibration_in_words(card["calibration"])
    if "between_people" in card:
        yield f"people agree with each other on {in_words(card['between_people'], '.2f')} of such pairs"
