"""The parts of a report that depend on the stage: training curves, training rows, samples and tables."""

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
from typing import Any

from align.ops.calibration import CalibrationBin, bin_predictions
from align.report.figure_text import format_figure, is_number, pluralize
from align.report.page import Report
from align.report.run_view import RunView


@dataclass(frozen=True, slots=True)
class Curve:
    """The definition of a training curve in a report: a plot of one or more metrics over the steps of a run.

    Attributes:
        title: title of the plot.
        unit: label of the y axis.
        lines: key of a row of the metrics stream → label in the legend.
        span: the smallest range of the y axis, so that noise in a constant metric does not look like a trend.
        reading: caption, which says how to read the plot.
        within: range of values that the metrics can have.
        smooth: False for a value that is set and not measured.
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
    "Gradient norm",
    "norm",
    {"grad_norm": "norm"},
    1.0,
    "Before clipping. A rise by a factor of ten or more is a sign of divergence.",
    POSITIVE,
)
PAIR_LOSS = Curve("Loss", "nats a pair", LOSSES, 0.3, "Guessing gives 0.69; lower is better.", POSITIVE)
DIRECT_LOSS = Curve(
    "Loss", "loss of a pair", LOSSES, 0.3, "Lower is better; with stage.loss=sigmoid guessing gives 0.69.", POSITIVE
)
PAIR_ACCURACY = Curve(
    "Accuracy in training",
    "share of the pairs",
    {"accuracy": "pairs"},
    0.3,
    "On the pairs of the training batches; the held-out accuracy is at the top of the page. Guessing gives 0.5.",
    SHARE,
)
MARGIN = Curve("Margin", "score", {"margin": "margin"}, 0.5, "Score of the better answer less the worse one's.")
GAIN = Curve("Margin", "nats", {"margin": "margin"}, 0.5, "What the better answer gained on the worse one.")
LOGPROBS = Curve(
    "Logprobs of the answers",
    "nats an answer",
    {"chosen_logprob": "better answer", "rejected_logprob": "worse answer"},
    10.0,
    "Both may fall, as long as that of the worse answer falls faster.",
)
TOKEN_LOGPROBS = Curve(
    "Logprobs of the answers' tokens",
    "nats a token",
    {"chosen_token_logprob": "better answer", "rejected_token_logprob": "worse answer"},
    0.5,
    "Both may fall, as long as that of the worse answer falls faster.",
)
LABEL_LOSS = Curve(
    "Loss", "KTO's loss", LOSSES, 0.2, "0.5 at the start, times the weights of the labels; lower is better.", POSITIVE
)
REWARDS = Curve(
    "Rewards of the answers",
    "beta times nats",
    {"wanted_reward": "wanted", "unwanted_reward": "unwanted"},
    0.5,
    "Relative to the start; the reward of wanted answers should rise above that of unwanted ones.",
)
KL_ESTIMATE = Curve(
    "KL from the start, estimated",
    "nats an answer",
    {"kl": "KL"},
    1.0,
    "What rewards are compared with: the reward of answers to other prompts, at least 0.",
    POSITIVE,
)
SCORE = Curve(
    "Score",
    "score",
    {"score": "score"},
    0.5,
    "What training optimises, standardised and less the penalty for answers that do not end.",
)
KL = Curve(
    "KL from the reference",
    "nats an answer",
    {"kl": "KL"},
    2.0,
    "How far the policy has moved; stage.kl_coef is the weight of its penalty.",
    POSITIVE,
)
HELD_OUT = Curve(
    "Held-out prompts",
    "score",
    {"held_out_score": "score", "held_out_objective": "score minus the KL penalty"},
    0.5,
    "On prompts that nothing trains on, the start's at update 0; the best objective behind it is published.",
)
LENGTH = Curve("Answer length", "tokens", {"length": "length"}, 4.0, "Mean of each update.", POSITIVE)
ENDED = Curve(
    "Answers that end by themselves",
    "share",
    {"eos_rate": "ended"},
    0.2,
    "The others were cut at rollout.max_new_tokens.",
    SHARE,
)
ENTROPY = Curve(
    "Entropy",
    "nats a token",
    {"entropy": "entropy"},
    0.5,
    "Near 0 every sample of an answer is nearly the same.",
    POSITIVE,
)
EXPLAINED = Curve(
    "Explained variance",
    "share",
    {"explained_variance": "explained variance"},
    0.5,
    "How well the value model predicts the returns: 1 is perfect, 0 is no better than their mean.",
    (-math.inf, 1.0),
)
EQUAL = Curve(
    "Prompts without a learning signal",
    "share",
    {"equal_groups": "all answers have the same reward"},
    0.2,
    "They do not show which answer is better; with stage.max_draws above 1 other prompts replace them.",
    SHARE,
)
CLIPPED = Curve(
    "Steps that were clipped",
    "share of the tokens",
    {"clip_fraction": "clipped"},
    0.1,
    "Much above 0.3 the steps are too large.",
    SHARE,
)
APPROX_KL = Curve(
    "KL of one update", "nats a token", {"approx_kl": "KL"}, 0.01, "How far each update moves the policy.", POSITIVE
)
SIGNS = Curve(
    "Signs of a gamed reward",
    "",
    {"score_length_correlation": "score follows length", "repetition": "repetition", "disagreement": "disagreement"},
    0.5,
    "None is a problem near 0.",
)
EMPTY = Curve(
    "Empty answers",
    "share",
    {"empty_rate": "empty"},
    0.2,
    "They hold no text; with rollout.reasoning=hide, usually because their reasoning was not closed.",
    SHARE,
)
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
"""Name of a stage → unit in which it counts its progress. Other stages count steps."""


TABLES = "stage_tables.html"
SAMPLES = "samples.html"
SHOWN_PAIRS = 3
"""Number of held-out pairs in each list on a report."""
SHOWN_PROMPTS = 6
"""Number of prompts whose sampled answers a report shows."""
SHOWN_GREEDY_ANSWERS = 6
"""Number of prompts whose greedy answers an evaluation's report shows first."""
ROWS_LEGEND = (
    "The first rows, decoded from the token ids that the model reads. **Underlined** is what the loss is taken on, "
    "a frame is around special tokens."
)
TRAINED_ON_LEGENDS = {
    "sft": ROWS_LEGEND,
    "full": ROWS_LEGEND,
    "dpo": ROWS_LEGEND.replace("rows", "pair").replace("the loss is taken on", "the loss compares"),
    "kto": ROWS_LEGEND.replace("rows", "answer that was wanted and the first that was not").replace(
        "is taken on", "reads"
    ),
    "reward": ROWS_LEGEND.replace("rows", "pair").replace(
        "what the loss is taken on", "the token where the score is read"
    ),
}
SIDE_LABELS = {"chosen": "Preferred", "rejected": "Not preferred"}
RELIABILITY_CAPTION = (
    "Calibration: on the dashed line, predicted probabilities equal the observed shares; the numbers "
    "count pairs, the whiskers are 95 % intervals over prompts."
)


def add_curves(report: Report, view: RunView, deadline: float = math.inf) -> None:
    """Append a plot to the report of each of the stage's training curves that has at least two points.

    Args:
        deadline: time of `time.perf_counter` after which no further curve is drawn.
    """
    for curve in CURVES.get(view.manifest.stage, ()):
        if time.perf_counter() > deadline:
            return
        counts = {key: len(list_points(view, key)) for key in curve.lines}
        lines = {key: curve.lines[key] for key, count in counts.items() if count}
        # The held-out losses before and after training add two points to the loss.
        if max(counts.values()) > 1 or (lines and curve is LOSS and "loss_after" in view.metrics):
            add_curve(report, view, curve, lines)


def list_points(view: RunView, key: str) -> list[tuple[float, float]]:
    """Return the (step, value) points of a metric from the rows of the run's `metrics.jsonl` that have it."""
    return [(row["step"], row[key]) for row in view.rows if is_number(row.get(key))]


def add_latest_figures(report: Report, view: RunView) -> None:
    """Append a table to the report with the first and the newest value of each training metric, if there are any."""
    unit = UNITS.get(view.manifest.stage, "step")
    rows = []
    for curve in CURVES.get(view.manifest.stage, ()):
        for key, label in curve.lines.items():
            if points := list_points(view, key):
                name = curve.title if len(curve.lines) == 1 else f"{curve.title}, {label}"
                if curve.unit and curve.unit not in curve.title.lower():
                    name = f"{name} ({curve.unit})"
                values = [
                    f"{format_figure(float(value))} at {unit} {step:,}" for step, value in (points[0], points[-1])
                ]
                rows.append((name, *values))
    if rows:
        report.table(("figure", "first", "newest"), rows, "Figures so far")


def add_curve(report: Report, view: RunView, curve: Curve, lines: Mapping[str, str]) -> None:
    from align.report.plots import collect_points, draw_curves, get_block_size, get_smoothing_window

    unit = UNITS.get(view.manifest.stage, "step")
    rows = view.rows
    marks: list[tuple[float, float]] = []
    if curve is LOSS and "loss_after" in view.metrics:
        before = view.metrics["loss_before"]
        after = view.metrics["loss_after"]
        if "held_out_loss" in lines:  # the curve starts with the loss before training
            rows = [{"step": 0, "held_out_loss": before}, *rows]
        else:
            marks = [(0, before), (view.metrics.get("published_step", view.metrics["steps"]), after)]
    points = {label: collect_points(rows, key) for key, label in lines.items()}
    n_points = max(map(len, points.values()))
    block_size = get_block_size(n_points)
    window = get_smoothing_window(math.ceil(n_points / block_size))
    caption = curve.reading
    if window > 1 and curve.smooth:
        faint = "each logged value" if block_size == 1 else f"the mean of {block_size} logged values"
        caption += f" Faint: {faint}; bold: the mean of {window * block_size} around it."
    if marks:
        points["held out"] = marks
    descriptions = "; ".join(describe_line(label, line, unit) for label, line in points.items())
    draw = partial(
        draw_curves,
        rows,
        lines,
        curve.unit,
        curve.title,
        "prompts answered" if unit == "prompt" else unit,
        curve.span,
        curve.within,
        marks,
        "held out, before and after",
        curve.smooth,
    )
    report.draw(draw, caption, f"{curve.title} over {unit}s. {descriptions}.")


def describe_line(label: str, points: Sequence[tuple[float, float]], unit: str) -> str:
    """Return a phrase with the first and the last point of a line, for the alt text of its plot."""
    first_step, first_value = points[0]
    last_step, last_value = points[-1]
    if len(points) == 1:
        return f"{label}: {first_value:.3g} at {unit} {first_step:g}"
    return f"{label}: from {first_value:.3g} at {unit} {first_step:g} to {last_value:.3g} at {unit} {last_step:g}"


def add_training_rows(report: Report, view: RunView) -> None:
    """Append the tokens of the first training rows to the report, with marks on the tokens under the loss.

    They are read from `trained_on.jsonl`. Adds nothing if the file is missing.
    """
    rows = view.read_stream("trained_on.jsonl")
    if not rows:
        return
    report.heading("What the loss is taken on").text(TRAINED_ON_LEGENDS[view.manifest.stage])
    for row in rows:
        name = SIDE_LABELS.get(row["what"], row["what"].capitalize())
        caption = f"{name}: {pluralize(row['tokens'], 'token')}, {row['trained']:,} of them underlined"
        report.add("tokens", caption, row["parts"])


def add_held_out_pairs(report: Report, view: RunView) -> None:
    """Append the scores of the held-out pairs in `held_out.jsonl` to the report: histograms, calibration and examples.

    The examples are the pairs with the widest margins, judged right and judged wrong.
    """
    pairs = view.read_stream("held_out.jsonl")
    if not pairs:
        return
    from align.report.plots import draw_histogram_pair, draw_reliability

    if "score_chosen" in pairs[0]:
        better, worse = ([pair[f"score_{side}"] for pair in pairs] for side in ("chosen", "rejected"))
        title = "Scores of held-out answers"
        report.draw(
            lambda: draw_histogram_pair(better, worse, ("better answer", "worse answer"), "score", title),
            "The less the two overlap, the better the two kinds are separated.",
            f"Histograms of the scores of {len(pairs)} better and worse answers.",
        )
    if all("log_odds" in pair for pair in pairs):
        bins = compute_reliability_bins(pairs)
        description = "; ".join(f"predicted {b.predicted:.2f}, observed {b.observed:.2f} of {b.count}" for b in bins)
        report.draw(
            lambda: draw_reliability(bins, "Calibration on held-out pairs"),
            RELIABILITY_CAPTION,
            f"Predicted against observed shares. {description}.",
        )
    ordered = sorted(pairs, key=lambda pair: pair["margin"])
    right = [pair for pair in reversed(ordered) if pair["margin"] > 0]
    wrong = [pair for pair in ordered if pair["margin"] <= 0]
    for title, judged_pairs in (
        ("Judged right, by the widest margin", right),
        ("Judged wrong, by the widest margin", wrong),
    ):
        widest: dict[str, Mapping[str, Any]] = {}  # one pair per prompt
        for pair in judged_pairs:
            widest.setdefault(json.dumps(pair["prompt"]), pair)
        if judged_pairs:
            report.add("pairs", title, list(widest.values())[:SHOWN_PAIRS], template=SAMPLES)


def add_labelled_answers(report: Report, view: RunView) -> None:
    """Append the held-out answers of KTO to the report: histograms of their rewards, and the highest and lowest ones.

    A KTO run may hold out preference pairs instead; then these are added.
    """
    answers = view.read_stream("held_out.jsonl")
    if not answers or "reward" not in answers[0]:
        add_held_out_pairs(report, view)
        return
    from align.report.plots import draw_histogram_pair

    wanted_rewards = [answer["reward"] for answer in answers if answer["label"] is True]
    unwanted_rewards = [answer["reward"] for answer in answers if answer["label"] is False]
    if wanted_rewards and unwanted_rewards:
        report.draw(
            lambda: draw_histogram_pair(
                wanted_rewards, unwanted_rewards, ("wanted", "unwanted"), "nats", "Rewards of held-out answers"
            ),
            "The less the two overlap, the better the two kinds are separated.",
            f"Histograms of the rewards of {len(wanted_rewards)} wanted and {len(unwanted_rewards)} unwanted answers.",
        )
    ordered = sorted(answers, key=lambda answer: -answer["reward"])
    report.add("labelled", "Raised the most", ordered[:SHOWN_PAIRS], template=SAMPLES)
    report.add("labelled", "Lowered the most", ordered[::-1][:SHOWN_PAIRS], template=SAMPLES)


def compute_reliability_bins(pairs: Sequence[Mapping[str, Any]]) -> list[CalibrationBin]:
    """Compute the bins of a reliability diagram from the predicted log-odds that the chosen answer of each pair wins.

    Which answer counts as the first is decided by a hash of the pair's id. With the chosen one always first, every
    outcome would be 1.

    Args:
        pairs: each with `id`, `group` and `log_odds`, the log-odds that the chosen answer wins.
    """
    predicted = []
    outcomes = []
    for pair in pairs:
        is_flipped = hashlib.sha256(pair["id"].encode()).digest()[0] % 2 == 1
        log_odds = pair["log_odds"]
        predicted.append(1 / (1 + math.exp(min(log_odds if is_flipped else -log_odds, 700.0))))
        outcomes.append(0.0 if is_flipped else 1.0)
    return bin_predictions(predicted, outcomes, [pair["group"] for pair in pairs])


def add_held_out_answers(report: Report, view: RunView) -> None:
    """Append the policy's answers to the held-out prompts in `samples.jsonl`, by prompt and update, to the report."""
    if prompts := group_by_prompt(view.read_stream("samples.jsonl")):
        report.add("held_out", prompts, template=SAMPLES)


def add_best_of_answers(report: Report, view: RunView) -> None:
    """Append a table of the mean reward of best-of-n for each n to the report, and ranked answers to the first prompts.

    Of each prompt, the best, the first and the worst answer are shown.
    """
    if lines := view.metrics.get("best_of"):
        report.add("best_of", lines, template=TABLES)
    if prompts := list(islice(view.iter_stream("samples.jsonl"), SHOWN_PROMPTS)):
        report.add("ranked", prompts, template=SAMPLES)


def add_sampled_answers(report: Report, view: RunView) -> None:
    """Append the sampled answers to the first prompts to the report; for best-of-n, the ranked ones."""
    if view.settings.get("best_of") is not None:
        add_best_of_answers(report, view)
        return
    rows = view.read_stream("samples.jsonl")[: SHOWN_PROMPTS * view.settings["candidates"]]
    if rows:
        report.add("sampled", group_by_prompt(rows), template=SAMPLES)


def group_by_prompt(rows: Iterable[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Group the rows of `samples.jsonl` into one list per prompt, compared with all its turns."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(json.dumps(row["prompt"]), []).append(row)
    return list(groups.values())


def add_greedy_answers(report: Report, view: RunView) -> None:
    """Append the greedy answers before and after training to the first held-out prompts to the report.

    An evaluation on few prompts has no such answers.
    """
    samples = view.iter_stream("artifact/samples.jsonl")
    with_both = (sample for sample in samples if {"greedy_ref", "greedy_policy"} <= sample.keys())
    if examples := list(islice(with_both, SHOWN_GREEDY_ANSWERS)):
        report.add("greedy", examples, template=SAMPLES)


def add_comparison_with_start(report: Report, view: RunView) -> None:
    """Append histograms of the scores and lengths of answers before and after training to the report, and examples."""
    samples = view.read_stream("artifact/samples.jsonl")
    if not samples:
        return
    from align.report.plots import draw_histogram_pair

    role = view.metrics["judge_is"]
    labels = ("start", "policy")
    for key, xlabel, name in (("score", f"{role} score", f"{role} score"), ("length", "tokens", "length")):
        start = [sample[f"{key}_ref"] for sample in samples]
        policy = [sample[f"{key}_policy"] for sample in samples]
        title = f"{name.capitalize()} of the answers"
        report.draw(
            partial(draw_histogram_pair, start, policy, labels, xlabel, title),
            f"How the {name} of the answers lies, before and after.",
            f"Histograms of the {name}: start with mean {fmean(start):.3g}, policy with mean {fmean(policy):.3g}.",
        )
    report.add("compared", samples[: view.settings["shown"]], role, template=SAMPLES)


def add_export_checks(report: Report, view: RunView) -> None:
    """Append a table of the checks that an export passed or failed to the report."""
    report.add("receipt", view.metrics.get("checks", ()), template=TABLES)


def add_verification_checks(report: Report, view: RunView) -> None:
    """Append the checks of PPO by `stage=verify` with their errors to the report, and the bias of each estimator."""
    if anchors := view.read_json("artifact/anchors.json"):
        report.add("anchors", anchors, template=TABLES)
    if angles := view.read_json("artifact/estimators.json"):
        report.add("estimators", angles, template=TABLES)


def add_losses_by_source(report: Report, view: RunView) -> None:
    """Append a table of the held-out loss of each source of a data set to the report, if there are several."""
    if losses := view.metrics.get("loss_by_source"):
        report.add("loss_by_source", losses, template=TABLES)


SECTIONS: Mapping[str, Callable[[Report, RunView], None]] = {
    "sft": add_losses_by_source,
    "full": add_losses_by_source,
    "sample": add_sampled_answers,
    "reward": add_held_out_pairs,
    "dpo": add_held_out_pairs,
    "kto": add_labelled_answers,
    "ppo": add_held_out_answers,
    "eval": add_comparison_with_start,
    "export": add_export_checks,
    "verify": add_verification_checks,
}
"""Stage → function that adds its sections to the end of a report."""


def iter_notes(view: RunView) -> Iterator[str]:
    """Yield the notes for the top of a run's report: those recorded in its metrics, and one if its annotators were
    simulated."""
    for key in ("judge_notes", "notes"):
        yield from view.metrics.get(key, ())
    if view.manifest.stage == "annotate" and view.settings["action"] == "simulate":
        yield (
            "A simulated annotator ranks by a reward with Bradley–Terry noise, so that near ties come out at random "
            "and clear cases do not. Every record says `source: simulated`."
        )
