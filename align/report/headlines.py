"""What came of a run, in a sentence or two that need no code beside them: with its interval, and saying so where
nothing was shown."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from align.ops.intervals import t_quantile
from align.report.figure_text import FEW, NO_BREAK, counted, format_figure, from_to, in_words, is_bounded, percent
from align.report.run_view import RunView, load_own_page
from align.track import last_updates, select_updates

MOSTLY_CUT = 0.5
"""The share of answers cut at the length limit from which on a verdict says so."""


def verdict_of(seen: RunView) -> str:
    """Return the verdict on a finished run."""
    own_page = load_own_page(seen)
    return own_page.summarize(seen) if own_page else VERDICTS[seen.manifest.stage](seen)


def trained(seen: RunView) -> str:
    metrics = seen.metrics
    if "loss_after" not in metrics:
        return "Nothing was held out, so that nothing says how well it learned."
    before, after, rows = metrics["loss_before"], metrics["loss_after"], metrics["held_out_rows"]
    change = metrics.get("loss_change")
    by = f", by {in_words(absolute(change), '.2f')}," if change and is_bounded(change) else ""
    sentences = [
        f"Held-out loss {from_to(before, after)} nats a token{by} over {counted(rows, 'row')}.",
        unsure(change, 0.0, "0: no change was shown"), scarce(rows, "row"),
    ]  # fmt: skip
    return joined(sentences)


def absolute(change: Mapping[str, Any]) -> dict[str, Any]:
    """A change without its sign, for behind *by*."""
    if change["value"] >= 0:
        return dict(change)
    return {**change, "value": -change["value"], "low": -change["high"], "high": -change["low"]}


def judged(seen: RunView) -> str:
    metrics, dpo = seen.metrics, seen.manifest.stage in ("dpo", "kto")
    right = metrics["accuracy"]
    what = "Beside its start, the policy raised the better answer in" if dpo else "The better answer scores higher in"
    simulated = metrics.get("simulated_by")
    who = f" (ranked by a simulated annotator, {', '.join(simulated)})" if simulated else ""
    ceiling = metrics.get("ceiling")
    sentences = [
        f"{what} {percent(right)} of the held-out pairs of {counted(right['n'], 'prompt')}{who}; a coin has 50 %.",
        unsure(right, 0.5, "50 %: no more than a coin would do was shown"), scarce(right["n"], "prompt"),
        f"The noise in the labels leaves {percent(ceiling['value'])} to reach." if ceiling else "",
    ]  # fmt: skip
    return joined(sentences)


def labelled(seen: RunView) -> str:
    """KTO's: of held-out pairs, or of answers with a label."""
    if "accuracy" in seen.metrics:
        return judged(seen)
    above = seen.metrics.get("auc")
    if above is None:
        return "The held-out answers have one label, so that nothing says whether it tells wanted from unwanted ones."
    sentences = [
        f"Beside its start, the policy raised a wanted answer above an unwanted one in {percent(above)} of the cases.",
        f"The held-out answers are to {counted(above['n'], 'prompt')}; a coin has 50 %.",
        unsure(above, 0.5, "50 %: no more than a coin would do was shown"), scarce(above["n"], "prompt"),
    ]  # fmt: skip
    return joined(sentences)


def optimised(seen: RunView) -> str:
    updates, metrics = select_updates(seen.rows), seen.metrics
    first, last = updates[:1], last_updates(updates)
    before, after = (mean(part, "score") for part in (first, last))
    by = gain(first, last, seen.settings["batch_size"] // (seen.settings.get("group_size") or 1))
    size = f", by {in_words(absolute(by), '.2f')}" if is_bounded(by) else ""
    tripped, cut = metrics.get("tripped"), 1 - metrics["last_eos_rate"]
    measured = published(seen)
    moved = "" if measured else f", and the policy moved {metrics['last_kl']:.1f} nats an answer from its start"
    where = "In training the" if measured else "The"
    sentences = [
        measured,
        f"{where} score of the reward {from_to(before, after)}{size}{moved}.",
        unsure(by, 0.0, "0: no change was shown"), scarce(seen.settings["batch_size"] * len(last), "answer"),
        f"{percent(cut)} of the answers were cut at {seen.config['rollout']['max_new_tokens']:,} tokens."
        if cut >= MOSTLY_CUT else "",
        f"{percent(metrics['last_empty_rate'])} of them are empty to whoever judges."
        if metrics.get("last_empty_rate", 0.0) >= MOSTLY_CUT else "",
        f"Signs of a gamed reward: {', '.join(name.replace('_', ' ') for name in tripped)}." if tripped else "",
        "The score is what training optimises; stage=eval says whether the answers are better.",
    ]  # fmt: skip
    return joined(sentences)


def published(seen: RunView) -> str:
    """The policy that PPO publishes beside its start, on prompts that it was not trained on; empty where it was not
    measured on any."""
    metrics = seen.metrics
    if "objective_after" not in metrics:
        return ""
    before, after, last = metrics["objective_before"], metrics["objective_after"], seen.settings["publish"] == "last"
    where = f"on {counted(metrics['held_out_prompts'], 'held-out prompt')}"
    what = f"pdate {metrics['published_update']:,} of {metrics['updates']:,}, which is published,"
    far = f"It lies {metrics['published_kl']:.1f} nats an answer from the start."
    if metrics["beats_start"]:
        return f"U{what} raised the score less the price of KL {where} from {before:.2f} to {after:.2f}. {far}"
    none = "The last update does not beat the start" if last else "No update that was measured beats the start"
    return f"{none} {where}: u{what} has a score less the price of KL of {after:.2f}, the start {before:.2f}. {far}"


def gain(first: Sequence[Mapping[str, Any]], last: Sequence[Mapping[str, Any]], size: int) -> dict[str, Any]:
    """The difference of two means of scores with its 95 % interval, from the spread inside each batch of `size` prompts
    (Welch's, with Satterthwaite's degrees of freedom). Answers to one prompt are one piece of evidence."""
    value = mean(last, "score") - mean(first, "score")
    if first == last or size < 2 or not all(map(spread, (*first, *last))):
        return {"value": value, "low": None, "high": None}
    parts = [spread(row) ** 2 / (size - 1) / len(part) ** 2 for part in (first, last) for row in part]
    freedom = sum(parts) ** 2 / sum(part**2 / (size - 1) for part in parts)
    half = t_quantile(freedom) * math.sqrt(sum(parts))
    return {"value": value, "low": value - half, "high": value + half}


def spread(row: Mapping[str, Any]) -> float:
    """The standard deviation of the scores of an update's prompts; 0 where nobody knows it."""
    return row.get("prompt_score_std") or row.get("score_std") or 0.0


def mean(rows: Sequence[Mapping[str, Any]], key: str) -> float:
    return sum(row[key] for row in rows) / len(rows)


def compared(seen: RunView) -> str:
    metrics = seen.metrics
    won, judge = metrics["win_rate"], metrics["judge"]
    by = "VADER's sentiment" if judge == "vader" else judge
    proxy = ", a proxy that it was optimised against," if metrics["judge_is"] == "proxy" else ","
    seen_too = metrics.get("seen")  # stage.seen=report
    asked = f"{counted(won['n'], 'prompt')}, {seen_too:,} of which training saw," if seen_too else ""
    against = f"{asked or counted(won['n'], 'held-out prompt')} against what it started from"
    collapse = metrics["collapse"]  # see `align.evals.collapse`
    collapsed = collapse["verdict"] == "collapsed"
    sentences = [
        f"The policy collapsed: {'; '.join(collapse['reasons'])}." if collapsed else "",
        f"The policy wins {percent(won)} of {against}, by {by}{proxy} and moved {metrics['kl']:.1f} nats from it.",
        "It loses more often than it wins." if won["high"] < 0.5 else "",
        unsure(won, 0.5, "50 %: no difference was shown"), scarce(won["n"], "prompt"),
    ]  # fmt: skip
    return joined(sentences)


def best_of(seen: RunView) -> str:
    """What best-of-n gained by the reward that ranked, and by the one that only measured."""
    metrics, n = seen.metrics, seen.settings["best_of"]
    gold = metrics.get("gold")
    by_gold = f" By {metrics['measured_by']}, which ranked nothing: {_rise(gold)}." if gold else ""
    what = f"{counted(metrics['answers'], 'answer')} to {counted(metrics['prompts'], 'prompt')}"
    rows = f"{counted(metrics['winners'], 'winner')} and {counted(metrics['pairs'], 'pair')}"
    return (
        f"{what}, ranked by {metrics['scorer']}: the mean reward goes from {_rise(metrics['reward'])} at the best of "
        f"{n}.{by_gold} They give {rows}."
    )


def _rise(of: Mapping[str, Any]) -> str:
    return f"{of['one']['value']:.3g} of one answer to {of['best']['value']:.3g}"


def sampled(seen: RunView) -> str:
    if seen.settings.get("best_of") is not None:
        return best_of(seen)
    metrics = seen.metrics
    cut = 1 - metrics["eos_rate"]
    longest = seen.config["rollout"]["max_new_tokens"]
    ends = "every one ended by itself" if cut == 0 else f"{percent(cut)} of them were cut at {longest:,} tokens"
    back = metrics["all_empty"] + metrics["all_equal"]
    what = f"{counted(metrics['answers'], 'answer')} to {counted(metrics['prompts'], 'prompt')}"
    sentences = [
        f"{what} in project {seen.config['project']}: {metrics['mean_length']:.1f} tokens long on average, {ends}.",
        f"{percent(metrics['empty_rate'])} of them are empty." if metrics["empty_rate"] else "",
        f"The answers to {counted(back, 'prompt')} are not handed out: all empty, or all equal." if back else "",
    ]  # fmt: skip
    return joined(sentences)


def exported(seen: RunView) -> str:
    metrics, checks, artifact = seen.metrics, seen.metrics["checks"], seen.manifest.inputs.get("artifact")
    bound = [check for check in checks if check["bound"] and check["verdict"] != "not checked"]
    missed = [check["name"] for check in bound if check["verdict"] != "pass"]
    unasked = sorted({check["engine"] for check in checks if check["verdict"] == "not checked"})
    if not bound:
        found = "No engine was there to load the export back, so that nothing says whether it is what was trained."
    else:
        each = "choice between two texts" if artifact and artifact.stage == "reward" else "token"
        shipped = next((check for check in bound if check.get("shipped", True)), bound[0])
        before = metrics.get("kl_before_cast")
        found = (
            f"{'The export is not all' if missed else 'The export is'} what was trained: {shipped['engine']} loaded "
            f"its files back ({shipped['weights']}), and on fixed prompts they lie {format_figure(metrics['kl'])} nats "
            f"a {each} (KL) from the trained model."
            + ("" if before is None else f" Before its weights were cast it was {format_figure(before)}.")
        )
    kept = f"All {len(bound)} checks kept their bounds." if len(bound) > 1 else ""
    sentences = [
        found, f"Bounds missed, and let pass by export.accept: {', '.join(missed)}." if missed else kept,
        f"Not checked, or not everything there: {', '.join(unasked)}; the receipt says why." if unasked else "",
    ]  # fmt: skip
    return joined(sentences)


def verified(seen: RunView) -> str:
    anchors = seen.json("artifact/anchors.json")
    base, method = seen.manifest.base, seen.config["method"]["name"]
    failed = [anchor["name"] for anchor in anchors if not anchor["holds"]]
    where = f"{base.id if base else 'this base'} with method {method}"
    if failed:
        return f"{len(failed)} of {len(anchors)} facts about PPO do not hold on {where}: {', '.join(failed)}."
    return f"All {len(anchors)} facts that make PPO right hold on {where}."


def annotated(seen: RunView) -> str:
    metrics, action = seen.metrics, seen.settings["action"]
    project = f"project {seen.config['project']}"
    match action:
        case "simulate":
            who = counted(metrics["annotators"], "simulated annotator")
            what = f"{counted(metrics['rankings'], 'ranking')} of {counted(metrics['items'], 'item')}"
            pairs = counted(metrics["pairs"], "pair")
            return f"{who} gave {what} in {project}, {pairs} in all. They stand in for people, and are none."
        case "serve":
            return (
                f"People gave {counted(metrics['rankings'], 'ranking')} in {project}; "
                f"{metrics['done']:,} of {metrics['wanted']:,} are done."
            )
    return DONE[action].format(project=project)


def served(seen: RunView) -> str:
    requests, tokens = seen.metrics.get("requests", 0), seen.metrics.get("completion_tokens", 0)
    return f"The server answered {counted(requests, 'request')} with {counted(tokens, 'token')}."


DONE = {
    "invite": "An invitation to {project} was made; its link was printed, and is not written down.",
    "import": "Prompts and answers of a file are in {project}.", "configure": "The settings of {project} were changed.",
    "export": "The votes of {project} lie in this run's artifact.",
    "verify": "Every row of {project}'s ledger is what was written.", "backup": "The store was copied into one file.",
    "restore": "The store was restored from a backup.",
    "erase": "What was to be erased from {project} is gone; a row of the ledger says so.",
}  # fmt: skip

VERDICTS: Mapping[str, Callable[[RunView], str]] = {
    "sft": trained, "full": trained, "reward": judged, "dpo": judged, "kto": labelled, "ppo": optimised,
    "eval": compared, "sample": sampled, "export": exported, "verify": verified, "annotate": annotated,
    "serve": served,
}  # fmt: skip


def unsure(found: Mapping[str, Any] | None, nothing: float, what: str) -> str:
    """What is to be said where an interval holds the value that stands for nothing; `what` names it, and says so."""
    if found and is_bounded(found) and found["low"] <= nothing <= found["high"]:
        return f"The interval holds {what}."
    return ""


def scarce(n: int, what: str) -> str:
    return f"Fewer than {FEW} {what}s stand behind this, so that it says little." if n < FEW else ""


def joined(sentences: Sequence[str]) -> str:
    """Sentences one behind the other, those that are empty left out, in the signs of print."""
    text = " ".join(filter(None, sentences)).replace(" %", f"{NO_BREAK}%")
    return re.sub(r"(?<![\w.])-(?=\d)", "−", text)
