"""The summary of a finished run in a few sentences, for the top of its report.

Results come with their intervals, and a sentence says so if an interval includes no difference.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from align.ops.intervals import t_quantile
from align.report.figure_text import (
    FEW,
    NO_BREAK,
    describe_change,
    format_figure,
    format_interval,
    format_percent,
    is_bounded,
    pluralize,
)
from align.report.run_view import RunView, load_page_sections
from align.track import last_updates, select_updates

MOSTLY_CUT = 0.5
"""Minimum share of truncated or empty answers at which the summary mentions them."""


def summarize_run(view: RunView) -> str:
    """Return a summary in a few sentences of a finished run of any stage, for the top of its report."""
    sections = load_page_sections(view)
    return sections.summarize(view) if sections else SUMMARIZERS[view.manifest.stage](view)


def summarize_sft_run(view: RunView) -> str:
    metrics = view.metrics
    if "loss_after" not in metrics:
        return "No rows were held out (data.held_out), so it was not measured how well it learned."
    rows = metrics["held_out_rows"]
    loss_change = metrics.get("loss_change")
    size = ""
    if loss_change and is_bounded(loss_change):
        size = f", by {format_interval(take_absolute_change(loss_change), '.2f')},"
    change = describe_change(metrics["loss_before"], metrics["loss_after"])
    sentences = [
        f"Held-out loss {change} nats a token{size} over {pluralize(rows, 'row')}.",
        describe_inconclusive(loss_change, 0.0, "0: no change was shown"),
        describe_small_sample(rows, "row"),
    ]
    return join_sentences(sentences)


def take_absolute_change(change: Mapping[str, Any]) -> dict[str, Any]:
    """Return a change with its interval; if the value is negative, negate it and its bounds."""
    if change["value"] >= 0:
        return dict(change)
    return {**change, "value": -change["value"], "low": -change["high"], "high": -change["low"]}


def summarize_preference_run(view: RunView) -> str:
    """Return sentences on the held-out accuracy of a reward model, or of a policy trained on preference pairs."""
    metrics = view.metrics
    accuracy = metrics["accuracy"]
    subject = "The better answer scores higher in"
    if view.manifest.stage in ("dpo", "kto"):
        subject = "Compared with its start, the policy raised the better answer in"
    annotators = metrics.get("simulated_by")
    ranked_by = f" (ranked by a simulated annotator, {', '.join(annotators)})" if annotators else ""
    pairs = f"the held-out pairs of {pluralize(accuracy['n'], 'prompt')}{ranked_by}"
    ceiling = metrics.get("ceiling")
    sentences = [
        f"{subject} {format_percent(accuracy)} of {pairs}; guessing gives 50 %.",
        describe_inconclusive(accuracy, 0.5, "50 %: it was not shown to be better than guessing"),
        describe_small_sample(accuracy["n"], "prompt"),
        f"The noise in the labels limits it to {format_percent(ceiling['value'])}." if ceiling else "",
    ]
    return join_sentences(sentences)


def summarize_kto_run(view: RunView) -> str:
    """Return sentences on a KTO run: its accuracy on held-out pairs, or its AUC on held-out labelled answers."""
    if "accuracy" in view.metrics:
        return summarize_preference_run(view)
    auc = view.metrics.get("auc")
    if auc is None:
        return "All held-out answers have one label, so wanted and unwanted answers could not be compared."
    cases = f"{format_percent(auc)} of the cases"
    sentences = [
        f"Compared with its start, the policy raised a wanted answer more than an unwanted one in {cases}.",
        f"The held-out answers are to {pluralize(auc['n'], 'prompt')}; guessing gives 50 %.",
        describe_inconclusive(auc, 0.5, "50 %: it was not shown to be better than guessing"),
        describe_small_sample(auc["n"], "prompt"),
    ]
    return join_sentences(sentences)


def summarize_ppo_run(view: RunView) -> str:
    updates = select_updates(view.rows)
    metrics = view.metrics
    first = updates[:1]
    last = last_updates(updates)
    change = describe_change(compute_mean(first, "score"), compute_mean(last, "score"))
    prompts_per_update = view.settings["batch_size"] // (view.settings.get("group_size") or 1)
    score_gain = estimate_score_gain(first, last, prompts_per_update)
    size = f", by {format_interval(take_absolute_change(score_gain), '.2f')}" if is_bounded(score_gain) else ""
    held_out = describe_published_policy(view)
    subject = "In training the" if held_out else "The"
    moved = "" if held_out else f", and the policy moved {metrics['last_kl']:.1f} nats an answer from its start"
    truncated = ""
    cut_share = 1 - metrics["last_eos_rate"]
    if cut_share >= MOSTLY_CUT:
        max_tokens = view.config["rollout"]["max_new_tokens"]
        truncated = f"{format_percent(cut_share)} of the answers were cut at {max_tokens:,} tokens."
    empty = ""
    if metrics.get("last_empty_rate", 0.0) >= MOSTLY_CUT:
        empty = f"{format_percent(metrics['last_empty_rate'])} of the answers hold no text to judge."
    tripwires = metrics.get("tripped")
    sentences = [
        held_out,
        f"{subject} score of the reward {change}{size}{moved}.",
        describe_inconclusive(score_gain, 0.0, "0: no change was shown"),
        describe_small_sample(view.settings["batch_size"] * len(last), "answer"),
        truncated,
        empty,
        f"Signs of a gamed reward: {', '.join(name.replace('_', ' ') for name in tripwires)}." if tripwires else "",
        "The score is what training optimises; stage=eval says whether the answers are better.",
    ]
    return join_sentences(sentences)


def describe_published_policy(view: RunView) -> str:
    """Return sentences comparing PPO's published policy with the initial one on held-out prompts, if there are any.

    Otherwise returns an empty text.
    """
    metrics = view.metrics
    if "objective_after" not in metrics:
        return ""
    before = metrics["objective_before"]
    after = metrics["objective_after"]
    prompts = f"on {pluralize(metrics['held_out_prompts'], 'held-out prompt')}"
    update = f"pdate {metrics['published_update']:,} of {metrics['updates']:,}, which is published,"
    distance = f"Its KL from the start is {metrics['published_kl']:.1f} nats an answer."
    if metrics["beats_start"]:
        change = f"from {before:.2f} to {after:.2f}"
        return f"U{update} raised the score minus its KL penalty {prompts} {change}. {distance}"
    failure = "No update that was measured beats the start"
    if view.settings["publish"] == "last":
        failure = "The last update does not beat the start"
    scores = f"a score minus its KL penalty of {after:.2f}, the start {before:.2f}"
    return f"{failure} {prompts}: u{update} has {scores}. {distance}"


def estimate_score_gain(
    first: Sequence[Mapping[str, Any]], last: Sequence[Mapping[str, Any]], prompts_per_update: int
) -> dict[str, Any]:
    """Estimate the change of PPO's mean score from the first to the last updates, with a 95 % Welch–Satterthwaite
    interval.

    The interval comes from the spread of the scores inside each update. All answers to one prompt count as one
    observation. Bounds of None say that the spread is unknown, or that both sides are the same update.

    Args:
        first, last: rows of the metrics stream, one per update.
        prompts_per_update: number of prompts in the batch of each update.
    """
    value = compute_mean(last, "score") - compute_mean(first, "score")
    if first == last or prompts_per_update < 2 or not all(map(get_score_std, (*first, *last))):
        return {"value": value, "low": None, "high": None}
    degrees = prompts_per_update - 1
    variances = [get_score_std(row) ** 2 / degrees / len(rows) ** 2 for rows in (first, last) for row in rows]
    freedom = sum(variances) ** 2 / sum(variance**2 / degrees for variance in variances)
    half_width = t_quantile(freedom) * math.sqrt(sum(variances))
    return {"value": value, "low": value - half_width, "high": value + half_width}


def get_score_std(row: Mapping[str, Any]) -> float:
    """Return the standard deviation of the scores from a row of `metrics.jsonl`, or 0 if it is unknown."""
    return row.get("prompt_score_std") or row.get("score_std") or 0.0


def compute_mean(rows: Sequence[Mapping[str, Any]], key: str) -> float:
    return sum(row[key] for row in rows) / len(rows)


def summarize_eval_run(view: RunView) -> str:
    """Return sentences on a policy's win rate against the model it was trained from; a collapse is mentioned first."""
    metrics = view.metrics
    win_rate = metrics["win_rate"]
    judge = "VADER's sentiment" if metrics["judge"] == "vader" else metrics["judge"]
    proxy = ", a proxy that it was optimised against," if metrics["judge_is"] == "proxy" else ","
    prompts = pluralize(win_rate["n"], "held-out prompt")
    seen_in_training = metrics.get("seen")  # with stage.seen=report
    if seen_in_training:
        prompts = f"{pluralize(win_rate['n'], 'prompt')}, {seen_in_training:,} of which training saw,"
    wins = f"{format_percent(win_rate)} of {prompts} against what it started from"
    collapse = metrics["collapse"]
    collapsed = ""
    if collapse["verdict"] == "collapsed":
        collapsed = f"The policy collapsed: {'; '.join(collapse['reasons'])}."
    sentences = [
        collapsed,
        f"The policy wins {wins}, by {judge}{proxy} and moved {metrics['kl']:.1f} nats from it.",
        "It loses more often than it wins." if win_rate["high"] < 0.5 else "",
        describe_inconclusive(win_rate, 0.5, "50 %: no difference was shown"),
        describe_small_sample(win_rate["n"], "prompt"),
    ]
    return join_sentences(sentences)


def summarize_sampling_run(view: RunView) -> str:
    if view.settings.get("best_of") is not None:
        return summarize_best_of_run(view)
    metrics = view.metrics
    ending = "every one ended by itself"
    cut_share = 1 - metrics["eos_rate"]
    if cut_share != 0:
        max_tokens = view.config["rollout"]["max_new_tokens"]
        ending = f"{format_percent(cut_share)} of them were cut at {max_tokens:,} tokens"
    answers = f"{pluralize(metrics['answers'], 'answer')} to {pluralize(metrics['prompts'], 'prompt')}"
    length = f"{metrics['mean_length']:.1f} tokens long on average"
    withheld = metrics["all_empty"] + metrics["all_equal"]
    sentences = [
        f"{answers} in project {view.config['project']}: {length}, {ending}.",
        f"{format_percent(metrics['empty_rate'])} of them are empty." if metrics["empty_rate"] else "",
        f"The answers to {pluralize(withheld, 'prompt')} are not handed out: all empty, or all equal."
        if withheld
        else "",
    ]
    return join_sentences(sentences)


def summarize_best_of_run(view: RunView) -> str:
    """Return sentences on the gain in mean reward from best-of-n sampling, also by the gold reward if there is one."""
    metrics = view.metrics
    answers = f"{pluralize(metrics['answers'], 'answer')} to {pluralize(metrics['prompts'], 'prompt')}"
    rows = f"{pluralize(metrics['winners'], 'winner')} and {pluralize(metrics['pairs'], 'pair')}"
    gold = ""
    if metrics.get("gold"):
        gain = describe_best_of_gain(metrics["gold"])
        gold = f" By {metrics['measured_by']}, which had no part in the ranking: {gain}."
    return (
        f"{answers}, ranked by {metrics['scorer']}: the mean reward goes from "
        f"{describe_best_of_gain(metrics['reward'])} at the best of {view.settings['best_of']}.{gold} "
        f"This makes {rows}."
    )


def describe_best_of_gain(means: Mapping[str, Any]) -> str:
    return f"{means['one']['value']:.3g} for one answer to {means['best']['value']:.3g}"


def summarize_export_run(view: RunView) -> str:
    """Return sentences on the KL divergence of an exported model from the trained one, and on failed checks.

    Missing engines are named too.
    """
    metrics = view.metrics
    checks = metrics["checks"]
    done_checks = [check for check in checks if check["bound"] and check["verdict"] != "not checked"]
    missed = [check["name"] for check in done_checks if check["verdict"] != "pass"]
    unchecked_engines = sorted({check["engine"] for check in checks if check["verdict"] == "not checked"})
    artifact = view.manifest.inputs.get("artifact")
    if not done_checks:
        result = "No engine was available to load the export, so it is not known whether it equals the trained model."
    else:
        unit = "choice between two texts" if artifact and artifact.stage == "reward" else "token"
        check = next((check for check in done_checks if check.get("shipped", True)), done_checks[0])
        kl_before_cast = metrics.get("kl_before_cast")
        result = (
            f"{'The export differs from' if missed else 'The export is'} the trained model: {check['engine']} "
            f"loaded its files back ({check['weights']}), and on fixed prompts they lie "
            f"{format_figure(metrics['kl'])} nats "
            f"a {unit} (KL) from the trained model."
        )
        if kl_before_cast is not None:
            result += f" Before the weights were cast, this distance was {format_figure(kl_before_cast)}."
    bounds = ""
    if missed:
        bounds = f"Bounds missed, and accepted by export.accept: {', '.join(missed)}."
    elif len(done_checks) > 1:
        bounds = f"All {len(done_checks)} checks kept their bounds."
    unchecked = ""
    if unchecked_engines:
        unchecked = f"Not checked, or only in part: {', '.join(unchecked_engines)}; the receipt says why."
    return join_sentences([result, bounds, unchecked])


def summarize_verification_run(view: RunView) -> str:
    anchors = view.read_json("artifact/anchors.json")
    base = view.manifest.base
    model = f"{base.id if base else 'this base'} with method {view.config['method']['name']}"
    failed = [anchor["name"] for anchor in anchors if not anchor["holds"]]
    if failed:
        return f"{len(failed)} of {len(anchors)} checks of PPO fail on {model}: {', '.join(failed)}."
    return f"All {len(anchors)} checks of PPO pass on {model}."


def summarize_annotation_run(view: RunView) -> str:
    metrics = view.metrics
    action = view.settings["action"]
    project = view.config["project"]
    match action:
        case "simulate":
            annotators = pluralize(metrics["annotators"], "simulated annotator")
            rankings = f"{pluralize(metrics['rankings'], 'ranking')} of {pluralize(metrics['items'], 'item')}"
            pairs = pluralize(metrics["pairs"], "pair")
            return (
                f"{annotators} gave {rankings} in project {project}, {pairs} in all. These are simulations, not people."
            )
        case "serve":
            return (
                f"People gave {pluralize(metrics['rankings'], 'ranking')} in project {project}; "
                f"{metrics['done']:,} of {metrics['wanted']:,} are done."
            )
    return ANNOTATION_SUMMARIES[action].format(project=f"project {project}")


def summarize_server_run(view: RunView) -> str:
    requests = view.metrics.get("requests", 0)
    tokens = view.metrics.get("completion_tokens", 0)
    return f"The server answered {pluralize(requests, 'request')} with {pluralize(tokens, 'token')}."


ANNOTATION_SUMMARIES = {
    "invite": "An invitation to {project} was made; its link was printed, and is stored nowhere.",
    "import": "Prompts and answers of a file are in {project}.",
    "configure": "The settings of {project} were changed.",
    "export": "The votes of {project} lie in this run's artifact.",
    "verify": "Every row of {project}'s ledger is unchanged.",
    "backup": "The store was copied into one file.",
    "restore": "The store was restored from a backup.",
    "assess": "The annotators of {project} were assessed by their rankings.",
    "quarantine": "An annotator of {project} is in quarantine: their votes stay and do not count.",
    "release": "An annotator of {project} is released from quarantine: their votes count again.",
    "erase": "The requested data of {project} was erased; a row of the ledger records it.",
}
"""Action of `stage=annotate` → template of the summary, with a placeholder for the project."""

SUMMARIZERS: Mapping[str, Callable[[RunView], str]] = {
    "sft": summarize_sft_run,
    "full": summarize_sft_run,
    "reward": summarize_preference_run,
    "dpo": summarize_preference_run,
    "kto": summarize_kto_run,
    "ppo": summarize_ppo_run,
    "eval": summarize_eval_run,
    "sample": summarize_sampling_run,
    "export": summarize_export_run,
    "verify": summarize_verification_run,
    "annotate": summarize_annotation_run,
    "serve": summarize_server_run,
}
"""Name of a stage → function that returns the summary of its finished run."""


def describe_inconclusive(interval: Mapping[str, Any] | None, no_effect_value: float, meaning: str) -> str:
    """Return a sentence that the result is inconclusive if `interval` includes the no-effect value, else an empty
    string.

    Args:
        no_effect_value: the value that means no effect.
        meaning: the end of the sentence, such as "0: no change was shown".
    """
    if interval and is_bounded(interval) and interval["low"] <= no_effect_value <= interval["high"]:
        return f"The interval holds {meaning}."
    return ""


def describe_small_sample(n: int, noun: str) -> str:
    """Return a warning sentence if there are fewer than FEW observations, otherwise an empty string."""
    return f"Fewer than {FEW} {noun}s were measured: too few for a reliable result." if n < FEW else ""


def join_sentences(sentences: Sequence[str]) -> str:
    """Join the sentences that are not empty, with no-break spaces before % and typographic minus signs."""
    text = " ".join(filter(None, sentences)).replace(" %", f"{NO_BREAK}%")
    return re.sub(r"(?<![\w.])-(?=\d)", "−", text)
