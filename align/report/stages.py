"""What each stage's page shows beside its verdict, its origins and its figures: curves, and what was said."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from statistics import fmean
from typing import TYPE_CHECKING, Any

from align.ops.calibration import CalibrationBin, bin_predictions
from align.report.figure_text import counted, format_figure, is_number
from align.report.page import Report
from align.report.run_view import RunView

if TYPE_CHECKING:
    pass


@dataclass(frozen=True, slots=True)
class Curve:
    """A plot over a run's steps.

    Attributes:
        title: what is seen, in words.
        unit: at the axis.
        lines: key of a row of the metrics stream → what the legend calls it.
        span: the smallest range that the axis covers, so that noise looks like noise.
        reading: how to read it, below the plot.
        within: what the figure can be.
        smooth: False for what was set, and is no measurement.
    """

    title: str
    unit: str
    lines: Mapping[str, str]
    span: float
    reading: str
    within: tuple[float, float] = (-math.inf, math.inf)
    smooth: bool = True


SHARE = (0.0, 1.0)
POSITIVE = (0.0, math.inf)

LOSSES = {"loss": "training", "held_out_loss": "held out"}
LOSS = Curve("Loss", "nats a token", LOSSES, 0.5, "Lower is better.", POSITIVE)
RATE = Curve("Learning rate", "learning rate", {"lr": "rate"}, 0.0, "As it was scheduled.", POSITIVE, smooth=False)
GRADIENT = Curve(
    "Gradient norm", "norm", {"grad_norm": "norm"}, 1.0,
    "Before clipping. A rise by a factor of ten or more is training coming apart.", POSITIVE,
)  # fmt: skip
PAIR_LOSS = Curve("Loss", "nats a pair", LOSSES, 0.3, "A coin has 0.69; lower is better.", POSITIVE)
DIRECT_LOSS = Curve(
    "Loss", "loss of a pair", LOSSES, 0.3, "Lower is better; with stage.loss=sigmoid a coin has 0.69.", POSITIVE
)
PAIR_ACCURACY = Curve(
    "Accuracy in training", "share of the pairs", {"accuracy": "pairs"}, 0.3,
    "On the pairs that it trains on; the held-out share stands at the top. A coin has 0.5.", SHARE,
)  # fmt: skip
MARGIN = Curve("Margin", "score", {"margin": "margin"}, 0.5, "Score of the better answer less the worse one's.")
GAIN = Curve("Margin", "nats", {"margin": "margin"}, 0.5, "What the better answer gained on the worse one.")
LOGPROBS = Curve(
    "Logprobs of the answers", "nats an answer",
    {"chosen_logprob": "better answer", "rejected_logprob": "worse answer"}, 10.0,
    "Both may fall; what counts is that the worse one's falls faster.",
)  # fmt: skip
TOKEN_LOGPROBS = Curve(
    "Logprobs of the answers' tokens", "nats a token",
    {"chosen_token_logprob": "better answer", "rejected_token_logprob": "worse answer"}, 0.5,
    "Both may fall; what counts is that the worse one's falls faster.",
)  # fmt: skip
LABEL_LOSS = Curve(
    "Loss", "KTO's loss", LOSSES, 0.2, "0.5 at the start, times the weights of the labels; lower is better.", POSITIVE
)
REWARDS = Curve(
    "Rewards of the answers", "beta times nats", {"wanted_reward": "wanted", "unwanted_reward": "unwanted"}, 0.5,
    "Beside the start; what is wanted is to rise above what is not.",
)  # fmt: skip
KL_ESTIMATE = Curve(
    "KL from the start, estimated", "nats an answer", {"kl": "KL"}, 1.0,
    "What rewards are compared with: the reward of answers to other prompts, at least 0.", POSITIVE,
)  # fmt: skip
SCORE = Curve(
    "Score", "score", {"score": "score"}, 0.5,
    "What training optimises, standardised and less the penalty for answers that do not end.",
)  # fmt: skip
KL = Curve(
    "KL from the reference", "nats an answer", {"kl": "KL"}, 2.0,
    "How far the policy has moved; the price of it is stage.kl_coef.", POSITIVE,
)  # fmt: skip
HELD_OUT = Curve(
    "Held-out prompts", "score", {"held_out_score": "score", "held_out_objective": "score less the price of KL"}, 0.5,
    "On prompts that nothing trains on, the start's at update 0; the best objective behind it is published.",
)  # fmt: skip
LENGTH = Curve("Answer length", "tokens", {"length": "length"}, 4.0, "Mean of each update.", POSITIVE)
ENDED = Curve(
    "Answers that end by themselves", "share", {"eos_rate": "ended"}, 0.2,
    "The others were cut at rollout.max_new_tokens.", SHARE,
)  # fmt: skip
ENTROPY = Curve(
    "Entropy", "nats a token", {"entropy": "entropy"}, 0.5,
    "Near 0 the policy says the same whatever is drawn.", POSITIVE,
)  # fmt: skip
EXPLAINED = Curve(
    "Explained variance", "share", {"explained_variance": "explained variance"}, 0.5,
    "How well the value foresees the returns: 1 is perfect, 0 is no better than their mean.", (-math.inf, 1.0),
)  # fmt: skip
EQUAL = Curve(
    "Prompts that tell nothing", "share", {"equal_groups": "all answers earn the same"}, 0.2,
    "They do not say which answer is better; stage.max_draws asks others in their place.", SHARE,
)  # fmt: skip
CLIPPED = Curve(
    "Steps that were clipped", "share of the tokens", {"clip_fraction": "clipped"}, 0.1,
    "Much above 0.3 the steps are too large.", SHARE,
)  # fmt: skip
APPROX_KL = Curve(
    "KL of one update", "nats a token", {"approx_kl": "KL"}, 0.01, "How far each update moves the policy.", POSITIVE
)
SIGNS = Curve(
    "Signs of a gamed reward", "",
    {"score_length_correlation": "score follows length", "repetition": "repetition", "disagreement": "disagreement"},
    0.5, "Each is harmless near 0.",
)  # fmt: skip
EMPTY = Curve(
    "Empty answers", "share", {"empty_rate": "empty"}, 0.2,
    "They leave nothing to judge; with rollout.reasoning=hide, because their reasoning was never closed.", SHARE,
)  # fmt: skip
SAMPLED_LENGTH = Curve(
    "Answer length", "tokens", {"mean_length": "length"}, 4.0, "Mean over prompts answered together.", POSITIVE
)

CURVES: Mapping[str, tuple[Curve, ...]] = {
    "sft": (LOSS, RATE, GRADIENT),
    "full": (LOSS, RATE, GRADIENT),
    "reward": (PAIR_LOSS, PAIR_ACCURACY, MARGIN, RATE, GRADIENT),
    "dpo": (DIRECT_LOSS, PAIR_ACCURACY, LOGPROBS, TOKEN_LOGPROBS, GAIN, RATE, GRADIENT),
    "kto": (LABEL_LOSS, REWARDS, KL_ESTIMATE, RATE, GRADIENT),
    "ppo": (SCORE, KL, HELD_OUT, LENGTH, ENDED, EMPTY, ENTROPY, EXPLAINED, EQUAL, CLIPPED, APPROX_KL, SIGNS),
    "sample": (SAMPLED_LENGTH, ENDED),
}
UNITS = {"ppo": "update", "sample": "prompt", "data": "row"}
"""What a stage counts by; the others count steps."""


TABLES = "stage_tables.html"
SAMPLES = "samples.html"
SHOWN_PAIRS = 3
"""Held-out pairs of each kind that a page shows."""
SHOWN_PROMPTS = 6
"""Prompts whose sampled answers a page shows."""
ROWS = (
    "The first rows, decoded from the token ids that the model reads. **Underlined** is what the loss is taken on, "
    "a frame is around special tokens."
)
TRAINED_ON = {
    "sft": ROWS,
    "full": ROWS,
    "dpo": ROWS.replace("rows", "pair").replace("the loss is taken on", "the loss compares"),
    "kto": ROWS.replace("rows", "answer that was wanted and the first that was not").replace("is taken on", "reads"),
    "reward": ROWS.replace("rows", "pair").replace("what the loss is taken on", "the token where the score is read"),
}
SIDES = {"chosen": "Preferred", "rejected": "Not preferred"}
RELIABILITY = (
    "Does the model know how sure it may be? Points on the dashed line are right as often as they say; the numbers "
    "count pairs, the whiskers are 95 % intervals over prompts."
)


def add_curves(report: Report, seen: RunView, until: float = math.inf) -> None:
    """Add the stage's curves, those that its metrics stream has something for. One point is no curve.

    Args:
        until: a time of `time.perf_counter`, from which on no further one is begun.
    """
    for curve in CURVES.get(seen.manifest.stage, ()):
        if time.perf_counter() > until:
            return
        found = {key: len(list_points(seen, key)) for key in curve.lines}
        lines = {key: curve.lines[key] for key, count in found.items() if count}
        if max(found.values()) > 1 or (lines and curve is LOSS and "loss_after" in seen.metrics):
            add_curve(report, seen, curve, lines)


def list_points(seen: RunView, key: str) -> list[tuple[float, float]]:
    """Return (step, value) of the rows of the metrics stream that have a figure."""
    return [(row["step"], row[key]) for row in seen.rows if is_number(row.get(key))]


def add_latest_figures(report: Report, seen: RunView) -> None:
    """Add what the curves show, in numbers: the first and the newest. They are there before the curves are drawn."""
    unit, found = UNITS.get(seen.manifest.stage, "step"), []
    for curve in CURVES.get(seen.manifest.stage, ()):
        for key, label in curve.lines.items():
            if points := list_points(seen, key):
                name = curve.title if len(curve.lines) == 1 else f"{curve.title}, {label}"
                figures = [f"{format_figure(float(y))} at {unit} {x:,}" for x, y in (points[0], points[-1])]
                named = not curve.unit or curve.unit in curve.title.lower()
                found.append((name if named else f"{name} ({curve.unit})", *figures))
    if found:
        report.table(("figure", "first", "newest"), found, "Figures so far")


def add_curve(report: Report, seen: RunView, curve: Curve, lines: Mapping[str, str]) -> None:
    from align.report.plots import curves, points_of, together, window

    unit = UNITS.get(seen.manifest.stage, "step")
    rows, marks = seen.rows, list[tuple[float, float]]()
    if curve is LOSS and "loss_after" in seen.metrics:
        before, after = seen.metrics["loss_before"], seen.metrics["loss_after"]
        if "held_out_loss" in lines:  # one curve from the start on
            rows = [{"step": 0, "held_out_loss": before}, *rows]
        else:
            marks = [(0, before), (seen.metrics.get("published_step", seen.metrics["steps"]), after)]
    points = {label: points_of(rows, key) for key, label in lines.items()}
    drawn = max(map(len, points.values()))
    size = together(drawn)
    wide = window(math.ceil(drawn / size))
    one = "each logged value" if size == 1 else f"the mean of {size} logged values"
    faint = f" Faint: {one}; bold: the mean of {wide * size} around it." if wide > 1 and curve.smooth else ""
    points |= {"held out": marks} if marks else {}
    said = "; ".join(describe_line(label, found, unit) for label, found in points.items())
    alt = f"{curve.title} over {unit}s. {said}."
    xlabel = unit if unit != "prompt" else "prompts answered"

    looks = curve.unit, curve.title, xlabel, curve.span, curve.within, marks, "held out, before and after", curve.smooth
    report.draw(partial(curves, rows, lines, *looks), f"{curve.reading}{faint}", alt)


def describe_line(label: str, points: Sequence[tuple[float, float]], unit: str) -> str:
    """Describe a line for readers who cannot see it."""
    (first, before), (last, after) = points[0], points[-1]
    if len(points) == 1:
        return f"{label}: {before:.3g} at {unit} {first:g}"
    return f"{label}: from {before:.3g} at {unit} {first:g} to {after:.3g} at {unit} {last:g}"


# What was said.


def add_trained_on(report: Report, seen: RunView) -> None:
    """Add the first rows as they are trained on."""
    rows = seen.evidence("trained_on.jsonl")
    if not rows:
        return
    report.heading("What is trained on").text(TRAINED_ON[seen.manifest.stage])
    for row in rows:
        name = SIDES.get(row["what"], row["what"].capitalize())
        caption = f"{name}: {counted(row['tokens'], 'token')}, {row['trained']:,} of them underlined"
        report.add("tokens", caption, row["parts"])


def add_pairs(report: Report, seen: RunView) -> None:
    """Add held-out pairs: how their scores lie, whether probabilities are calibrated, the best and the worst judged."""
    pairs = seen.evidence("held_out.jsonl")
    if not pairs:
        return
    from align.report.plots import histogram_pair, reliability

    if "score_chosen" in pairs[0]:
        better, worse = ([pair[f"score_{side}"] for pair in pairs] for side in ("chosen", "rejected"))
        title = "Scores of held-out answers"
        report.draw(
            lambda: histogram_pair(better, worse, ("better answer", "worse answer"), "score", title),
            "The less the two overlap, the better they are told apart.",
            f"Histograms of the scores of {len(pairs)} better and worse answers.",
        )
    if all("log_odds" in pair for pair in pairs):
        bins = reliability_bins(pairs)
        said = "; ".join(f"predicted {b.predicted:.2f}, observed {b.observed:.2f} of {b.count}" for b in bins)
        report.draw(
            lambda: reliability(bins, "Calibration on held-out pairs"),
            RELIABILITY,
            f"Predicted against observed shares. {said}.",
        )
    ordered = sorted(pairs, key=lambda pair: pair["margin"])
    right = [pair for pair in reversed(ordered) if pair["margin"] > 0]
    wrong = [pair for pair in ordered if pair["margin"] <= 0]
    for title, found in (("Judged right, by the widest margin", right), ("Judged wrong, by the widest margin", wrong)):
        widest: dict[str, Mapping[str, Any]] = {}  # of each prompt
        for pair in found:
            widest.setdefault(json.dumps(pair["prompt"]), pair)
        if found:
            report.add("pairs", title, list(widest.values())[:SHOWN_PAIRS], template=SAMPLES)


def add_labelled_answers(report: Report, seen: RunView) -> None:
    """Add held-out pairs; or answers with a label: how their rewards lie, and those that were judged best and worst."""
    answers = seen.evidence("held_out.jsonl")
    if not answers or "reward" not in answers[0]:
        add_pairs(report, seen)
        return
    from align.report.plots import histogram_pair

    wanted, others = ([one["reward"] for one in answers if one["label"] is label] for label in (True, False))
    if wanted and others:
        report.draw(
            lambda: histogram_pair(wanted, others, ("wanted", "unwanted"), "nats", "Rewards of held-out answers"),
            "The less the two overlap, the better they are told apart.",
            f"Histograms of the rewards of {len(wanted)} wanted and {len(others)} unwanted answers.",
        )
    ordered = sorted(answers, key=lambda one: -one["reward"])
    for title, found in (("Raised the most", ordered), ("Lowered the most", ordered[::-1])):
        report.add("labelled", title, found[:SHOWN_PAIRS], template=SAMPLES)


def reliability_bins(pairs: Sequence[Mapping[str, Any]]) -> list[CalibrationBin]:
    """Calibration of P(first wins), each pair's first chosen by a hash of its id: with the chosen always first, every
    outcome would be 1.

    Args:
        pairs: each with `id`, `group` and `log_odds`, those that the chosen answer wins.
    """
    predicted, outcomes = [], []
    for pair in pairs:
        flipped = hashlib.sha256(pair["id"].encode()).digest()[0] % 2 == 1
        odds = pair["log_odds"]
        predicted.append(1 / (1 + math.exp(min(odds if flipped else -odds, 700.0))))
        outcomes.append(0.0 if flipped else 1.0)
    return bin_predictions(predicted, outcomes, [pair["group"] for pair in pairs])


def add_held_out_answers(report: Report, seen: RunView) -> None:
    """Add the answers to the fixed held-out prompts as training went on."""
    if prompts := by_conversation(seen.evidence("samples.jsonl")):
        report.add("held_out", prompts, template=SAMPLES)


def add_best_of(report: Report, seen: RunView) -> None:
    """Add what each n is worth, and the best, the first and the worst answer to the first prompts."""
    if lines := seen.metrics.get("best_of"):
        report.add("best_of", lines, template=TABLES)
    if prompts := list(islice(seen.each("samples.jsonl"), SHOWN_PROMPTS)):
        report.add("ranked", prompts, template=SAMPLES)


def add_samples(report: Report, seen: RunView) -> None:
    """Add the answers to the first prompts."""
    if seen.settings.get("best_of") is not None:
        add_best_of(report, seen)
        return
    rows = seen.evidence("samples.jsonl")[: SHOWN_PROMPTS * seen.settings["candidates"]]
    if rows:
        report.add("sampled", by_conversation(rows), template=SAMPLES)


def by_conversation(rows: Iterable[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Return lines of `samples.jsonl`, those together that were asked the same from the first turn on."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(json.dumps(row["prompt"]), []).append(row)
    return list(found.values())


def add_comparison(report: Report, seen: RunView) -> None:
    """Add how scores and lengths lie, and answers side by side."""
    samples = seen.evidence("artifact/samples.jsonl")
    if not samples:
        return
    from align.report.plots import histogram_pair

    role, names = seen.metrics["judge_is"], ("start", "policy")
    for key, xlabel, what in (("score", f"{role} score", f"{role} score"), ("length", "tokens", "length")):
        start, policy = ([sample[f"{key}_{of}"] for sample in samples] for of in ("ref", "policy"))
        title = f"{what.capitalize()} of the answers"
        report.draw(
            partial(histogram_pair, start, policy, names, xlabel, title),
            f"How the {what} of the answers lies, before and after.",
            f"Histograms of the {what}: start with mean {fmean(start):.3g}, policy with mean {fmean(policy):.3g}.",
        )
    report.add("compared", samples[: seen.settings["shown"]], role, template=SAMPLES)


def add_receipt(report: Report, seen: RunView) -> None:
    """Add the checks of an export."""
    report.add("receipt", seen.metrics.get("checks", ()), template=TABLES)


def add_anchors(report: Report, seen: RunView) -> None:
    """Add the facts that make PPO right, and how well each holds."""
    if anchors := seen.json("artifact/anchors.json"):
        report.add("anchors", anchors, template=TABLES)
    if angles := seen.json("artifact/estimators.json"):
        report.add("estimators", angles, template=TABLES)


def add_losses_by_source(report: Report, seen: RunView) -> None:
    """Add the held-out loss of each source of a data set."""
    if losses := seen.metrics.get("loss_by_source"):
        report.add("loss_by_source", losses, template=TABLES)


SECTIONS: Mapping[str, Callable[[Report, RunView], None]] = {
    "sft": add_losses_by_source,
    "full": add_losses_by_source,
    "sample": add_samples,
    "reward": add_pairs,
    "dpo": add_pairs,
    "kto": add_labelled_answers,
    "ppo": add_held_out_answers,
    "eval": add_comparison,
    "export": add_receipt,
    "verify": add_anchors,
}


def iter_notes(seen: RunView) -> Iterator[str]:
    """Yield what a reader has to know before the figures."""
    for key in ("judge_notes", "notes"):
        yield from seen.metrics.get(key, ())
    if seen.manifest.stage == "annotate" and seen.settings["action"] == "simulate":
        yield (
            "A simulated annotator ranks by a sentiment score with Bradley–Terry noise, so that near ties come out at "
            "random and clear cases do not. Every record says `source: simulated`."
        )
