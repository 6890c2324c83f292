"""What each stage's page shows beside its verdict, its origins and its figures: curves, and what was said."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

from align.ops.calibration import Bin, calibration_bins
from align.report.curves import CURVES, LOSS, UNITS, Curve
from align.report.figure_text import counted, format_figure, in_words, is_number, percent, signed
from align.report.page import Part, Report, Said
from align.report.run_view import RunView

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
BEST_OF = (
    "The mean reward of the answer that the reward ranks first among n: over all subsets of n of the answers to a "
    "prompt, with intervals over prompts. The KL from the policy is a bound, ln n − (n−1)/n, and was not measured."
)
ANGLES = (
    "The angle between the gradient of J and an estimator's mean gradient over every batch of two answers to a small "
    "problem. 0° is unbiased. docs/estimators.md explains the others."
)
RELIABILITY = (
    "Does the model know how sure it may be? Points on the dashed line are right as often as they say; the numbers "
    "count pairs, the whiskers are 95 % intervals over prompts."
)


def draw(report: Report, seen: RunView, until: float = math.inf) -> None:
    """The stage's curves, those that its metrics stream has something for. One point is no curve.

    Args:
        until: a time of `time.perf_counter`, from which on no further one is begun.
    """
    for curve in CURVES.get(seen.manifest.stage, ()):
        if time.perf_counter() > until:
            return
        found = {key: len(logged(seen, key)) for key in curve.lines}
        lines = {key: curve.lines[key] for key, count in found.items() if count}
        if max(found.values()) > 1 or (lines and curve is LOSS and "loss_after" in seen.metrics):
            plot(report, seen, curve, lines)


def logged(seen: RunView, key: str) -> list[tuple[float, float]]:
    """(step, value) of the rows of the metrics stream that have a figure."""
    return [(row["step"], row[key]) for row in seen.rows if is_number(row.get(key))]


def figures_so_far(report: Report, seen: RunView) -> None:
    """What the curves show, in numbers: the first and the newest. It costs nothing, so it is there before they are."""
    unit, found = UNITS.get(seen.manifest.stage, "step"), []
    for curve in CURVES.get(seen.manifest.stage, ()):
        for key, label in curve.lines.items():
            if points := logged(seen, key):
                name = curve.title if len(curve.lines) == 1 else f"{curve.title}, {label}"
                figures = [f"{format_figure(float(y))} at {unit} {x:,}" for x, y in (points[0], points[-1])]
                named = not curve.unit or curve.unit in curve.title.lower()
                found.append((name if named else f"{name} ({curve.unit})", *figures))
    if found:
        report.table(("figure", "first", "newest"), found, "Figures so far")


def plot(report: Report, seen: RunView, curve: Curve, lines: Mapping[str, str]) -> None:
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
    said = "; ".join(course(label, found, unit) for label, found in points.items())
    alt = f"{curve.title} over {unit}s. {said}."
    xlabel = unit if unit != "prompt" else "prompts answered"

    def build_figure() -> Figure:
        return curves(
            rows,
            lines,
            curve.unit,
            curve.title,
            xlabel,
            curve.span,
            curve.within,
            marks,
            "held out, before and after",
            curve.smooth,
        )

    report.draw(build_figure, f"{curve.reading}{faint}", alt)


def course(label: str, points: Sequence[tuple[float, float]], unit: str) -> str:
    """A line in words, for whoever cannot see it."""
    (first, before), (last, after) = points[0], points[-1]
    if len(points) == 1:
        return f"{label}: {before:.3g} at {unit} {first:g}"
    return f"{label}: from {before:.3g} at {unit} {first:g} to {after:.3g} at {unit} {last:g}"


# What was said.


def trained_on_shown(report: Report, seen: RunView) -> None:
    """The first rows as they are trained on."""
    rows = seen.evidence("trained_on.jsonl")
    if not rows:
        return
    report.heading("What is trained on").text(TRAINED_ON[seen.manifest.stage])
    for row in rows:
        name = SIDES.get(row["what"], row["what"].capitalize())
        caption = f"{name}: {counted(row['tokens'], 'token')}, {row['trained']:,} of them underlined"
        report.tokens(caption, [Part(**part) for part in row["parts"]])


def pairs_shown(report: Report, seen: RunView) -> None:
    """Held-out pairs: how their scores lie, whether probabilities mean what they say, and the best and worst judged."""
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
            report.heading(title)
        for pair in list(widest.values())[:SHOWN_PAIRS]:
            report.side_by_side(pair["prompt"], [labelled(pair, "chosen"), labelled(pair, "rejected")])


def labelled_shown(report: Report, seen: RunView) -> None:
    """Held-out pairs; or answers with a label: how their rewards lie, and those that were judged best and worst."""
    answers = seen.evidence("held_out.jsonl")
    if not answers or "reward" not in answers[0]:
        pairs_shown(report, seen)
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
        report.heading(title)
        for one in found[:SHOWN_PAIRS]:
            label = "Wanted" if one["label"] else "Unwanted"
            report.side_by_side(one["prompt"], [Said(f"{label}, reward {signed(one['reward'])} nats", one["answer"])])


def labelled(pair: Mapping[str, Any], side: str) -> Said:
    what = "Preferred" if side == "chosen" else "Not preferred"
    if f"score_{side}" in pair:
        return Said(f"{what}, score {signed(pair[f'score_{side}'])}", pair[side])
    return Said(f"{what}, margin {signed(pair['margin'])}" if side == "chosen" else what, pair[side])


def reliability_bins(pairs: Sequence[Mapping[str, Any]]) -> list[Bin]:
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
    return calibration_bins(predicted, outcomes, [pair["group"] for pair in pairs])


def answers_shown(report: Report, seen: RunView) -> None:
    """The fixed held-out prompts' answers as training went on."""
    shown = by_conversation(seen.evidence("samples.jsonl"))
    if shown:
        report.heading("Held-out prompts as training went on")
    for rows in shown:
        report.transcript(
            rows[0]["prompt"], [said(row, f"{when(row['step'])}, score {signed(row['score'])}") for row in rows]
        )


def when(step: int) -> str:
    return f"Update {step}" if step else "The start"


def best_of_shown(report: Report, seen: RunView) -> None:
    """What each n is worth, and the best, the first and the worst answer to the first prompts."""
    if lines := seen.metrics.get("best_of"):
        measured = [name for name in ("reward", "gold") if name in lines[0]]
        report.heading("Best of n").text(BEST_OF)
        heads = ["n", *(name.capitalize() for name in measured), "Tokens", "KL at most, nats"]
        rows = [
            [line["n"], *(in_words(line[name]) for name in measured), f"{line['tokens']:.1f}",
             f"{line['kl_bound']:.2f}"] for line in lines
        ]  # fmt: skip
        report.table(heads, rows, "best of n")
    prompts = list(islice(seen.each("samples.jsonl"), SHOWN_PROMPTS))
    if prompts:
        report.heading("The first prompts")
    for row in prompts:
        ordered = sorted(row["answers"], key=lambda answer: -answer["score"])
        shown = {"Best": ordered[0], "First drawn": row["answers"][0], "Worst": ordered[-1]}
        labels = [f"{what}, {signed(a['score'])}{'' if a['ended'] else ', cut'}" for what, a in shown.items()]
        report.side_by_side(row["prompt"], list(map(said, shown.values(), labels)))


def sampled_shown(report: Report, seen: RunView) -> None:
    """The answers to the first prompts."""
    if seen.settings.get("best_of") is not None:
        best_of_shown(report, seen)
        return
    rows = seen.evidence("samples.jsonl")[: SHOWN_PROMPTS * seen.settings["candidates"]]
    if rows:
        report.heading("The first prompts")
    for answers in by_conversation(rows):
        marked = [said(row, "Ended by itself" if row["ended"] else "Cut") for row in answers]
        report.side_by_side(answers[0]["prompt"], marked)


def by_conversation(rows: Iterable[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Lines of `samples.jsonl`, those together that were asked the same from the first turn on."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(json.dumps(row["prompt"]), []).append(row)
    return list(found.values())


def said(row: Mapping[str, Any], label: str) -> Said:
    return Said(label, row["answer"], row.get("reasoning", ""))


def comparison_shown(report: Report, seen: RunView) -> None:
    """How scores and lengths lie, and answers side by side."""
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
            f"Histograms of the {what}: start with mean {average(start):.3g}, policy with mean {average(policy):.3g}.",
        )
    report.heading("Answers side by side")
    for sample in samples[: seen.settings["shown"]]:
        sides = [
            Said(f"{who}, {role} score {signed(sample[f'score_{of}'])}", sample[of], sample.get(f"reasoning_{of}", ""))
            for who, of in (("Start", "ref"), ("Policy", "policy"))
        ]
        report.side_by_side(sample["prompt"], sides)


def average(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def receipt_shown(report: Report, seen: RunView) -> None:
    """The checks of an export."""
    report.text(
        "What was exported, loaded back as anyone would load it, beside the model that was trained, on the same "
        "prompts, token by token. Differences in nats. An engine that was **not checked** may say anything."
    )
    rows = [receipt_row(check) for check in seen.metrics.get("checks", ())]
    heads = ("engine", "verdict", "what", "base", "weights", "largest difference", "KL", "same top token")
    report.table(heads, rows, "The receipt")


def receipt_row(check: Mapping[str, Any]) -> tuple[str, ...]:
    found, bound = check["found"], check["bound"]
    figures = ("–",) * 3
    if found:
        figures = f"{found['max_logprob']:.2g}", f"{found['kl']:.2g}", percent(found["top1"])
    most = f" ({bound[0]} ≤ {bound[1]:g})" if bound else ""
    note = f": {check['note']}" if check["note"] else ""
    engine = f"{check['engine']} {check['version']}".strip()
    about = (check[key] or "–" for key in ("what", "base", "weights"))
    return (engine, check["verdict"] + most + note, *about, *figures)


def anchors_shown(report: Report, seen: RunView) -> None:
    """The facts that make PPO right, and how well each holds."""
    rows = [
        (a["name"], "holds" if a["holds"] else "FAILS", a["claim"], f"{a['measured']:.1e}", f"{a['tolerance']:g}")
        for a in seen.listed("artifact/anchors.json")
    ]
    if rows:
        report.table(("fact", "verdict", "what must be true", "off by", "may be"), rows, "Facts about PPO")
    if angles := seen.mapping("artifact/estimators.json"):
        report.heading("How far each estimator is from unbiased").text(ANGLES)
        rows = [(name, f"{found['angle']:.2f}°") for name, found in angles.items()]
        report.table(("estimator, mean of the loss", "angle"), rows, "estimators")


def sources_shown(report: Report, seen: RunView) -> None:
    """The held-out loss of each source of a data set."""
    rows = [
        (name, found["change"]["n"], f"{found['before']:.3f}", f"{found['after']:.3f}", in_words(found["change"]))
        for name, found in seen.metrics.get("loss_by_source", {}).items()
    ]
    if rows:
        report.table(("source", "rows", "before", "after", "change"), rows, "Held-out loss by source, nats a token")


SHOWN: Mapping[str, Callable[[Report, RunView], None]] = {
    "reward": pairs_shown, "dpo": pairs_shown, "kto": labelled_shown, "sample": sampled_shown, "ppo": answers_shown,
    "eval": comparison_shown,
    "sft": sources_shown, "full": sources_shown, "export": receipt_shown, "verify": anchors_shown,
}  # fmt: skip


def notes(seen: RunView) -> Iterator[str]:
    """What a reader has to know before the figures."""
    for key in ("judge_notes", "notes"):
        yield from seen.metrics.get(key, ())
    if seen.manifest.stage == "annotate" and seen.settings["action"] == "simulate":
        yield (
            "A simulated annotator ranks by a sentiment score with Bradley–Terry noise, so that near ties come out at "
            "random and clear cases do not. Every record says `source: simulated`."
        )
