"""Labels, units and explanations of all metrics, for the table of metrics in a run's report.

A metric that is not declared here is shown with the words of its key, and a test reports it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from align.report.figure_text import (
    FEW,
    flatten_metrics,
    format_figure,
    format_interval,
    format_percent,
    is_interval,
    is_number,
    note_small_sample,
)

PERCENT = "%"


@dataclass(frozen=True, slots=True)
class Figure:
    """A row of a report's table of metrics: the metric's keys, label, unit and explanation.

    Attributes:
        keys: dotted keys of a run's metrics. Two keys are the values before and after, shown as `0.1 → 0.2`.
        label: name on the page.
        unit: unit of the number; `%` for a share, empty if the label says it.
        reading: explanation, in a sentence.
        formatter: formats the values of all keys, in place of the usual format.
    """

    keys: tuple[str, ...]
    label: str
    unit: str
    reading: str
    formatter: Callable[..., str] | None = None

    def format_values(self, values: Iterable[Any]) -> str:
        """Format the values of the row's metrics as text, such as `0.1 → 0.2 nats`, with the number of observations."""
        if self.formatter:
            return self.formatter(*values)
        unit = f" {self.unit}" if self.unit not in ("", PERCENT) else ""
        values = list(values)
        last = values[-1]
        n = f" (n={last['n']:,}{note_small_sample(last['n'])})" if is_interval(last) and "n" in last else ""
        return " → ".join(map(self.format_value, values)) + unit + n

    def format_value(self, value: Any) -> str:
        if self.unit == PERCENT:
            return format_percent(value)
        text = format_interval(value, ".4g") if is_interval(value) else format_figure(value)
        return text.replace("-", "−") if is_number(value) or is_interval(value) else text


def _declare_figure(
    keys: str, label: str, unit: str, reading: str, formatter: Callable[..., str] | None = None
) -> Figure:
    """Return a Figure, a row of the table of metrics, with `keys` split at spaces.

    Args:
        keys: its keys, separated by spaces.
    """
    return Figure(tuple(keys.split()), label, unit, reading, formatter)


def _declare_start_and_policy(name: str, label: str, unit: str, reading: str) -> Figure:
    """Return a table row that shows a metric of the initial model and of the policy, `NAME.ref → NAME.policy`."""
    return _declare_figure(f"{name}.ref {name}.policy", label, unit, reading)


def _declare_score_figures(role: str) -> tuple[Figure, ...]:
    """Return the table rows for a judge's scores of the initial model's and the policy's answers.

    Args:
        role: "gold", or "proxy" if the policy was optimised against the judge.
    """
    return (
        _declare_start_and_policy(
            role,
            f"{role.capitalize()} score",
            "",
            "The judge's mean score of the start's and the policy's answers; its scale is the judge's own.",
        ),
        _declare_figure(
            f"{role}.difference",
            f"Gain in {role} score",
            "",
            "Policy less start, prompt by prompt. An interval that holds 0 shows no difference.",
        ),
    )


def _format_risen_word(word: str, before: float, after: float) -> str:
    return f"“{word}”, {format_percent(before)} → {format_percent(after)}" if word else "none"


def _shorten_digest(digest: str) -> str:
    """Return the first 16 digits of a digest and an ellipsis. All 64 would make the table too wide for a phone."""
    return f"{digest[:16]}…"


ENDING = "over the last ten updates, at most half of them"

EMPTY = "They hold no text; with rollout.reasoning=hide, usually because their reasoning was not closed."

FIGURES = (
    _declare_figure(
        "win_rate",
        "Win rate",
        PERCENT,
        "Share of the prompts whose answer the judge scores higher than the "
        "start's, or the second system's, ties counted half; 50 % is no difference.",
    ),
    _declare_figure(
        "difference",
        "Difference of the scores",
        "",
        "The first system's mean score less the second's, on the first task; without scores, wins less losses.",
    ),
    *_declare_score_figures("gold"),
    *_declare_score_figures("proxy"),
    _declare_figure(
        "seen", "Prompts that training saw", "", "Of the prompts of this evaluation; stage.seen=drop leaves them out."
    ),
    _declare_figure(
        "seen_unknown",
        "Training data that could not be checked",
        "",
        "For example deleted runs that the artifact was trained from; the notes of this run list them. At 0 the count "
        "above is complete.",
    ),
    _declare_figure(
        "dropped_seen",
        "Left out because training saw them",
        "prompts",
        "Training saw these questions, with this or another system prompt.",
    ),
    _declare_figure(
        "unseen.win_rate",
        "Win rate on unseen prompts",
        PERCENT,
        "The win rate over the prompts that training did not see.",
    ),
    _declare_figure(
        "unseen.gain",
        "Gain on unseen prompts",
        "",
        "Policy less start in the judge's score, over the prompts that training did not see.",
    ),
    _declare_figure(
        "collapse.verdict",
        "Collapse",
        "",
        "Whether the greedy answers to different prompts are nearly the same. Measured with 64 or more distinct "
        "prompts.",
    ),
    _declare_figure(
        "variety.greedy.ref.distinct variety.greedy.policy.distinct",
        "Different greedy answers",
        "",
        "Compared without case, punctuation, numbers and words of the prompt.",
    ),
    _declare_figure(
        "kl_interval",
        "KL from the start",
        "nats an answer",
        "How far the policy moved: the mean of log π − log π_start over its own answers. 0 is no difference.",
    ),
    _declare_start_and_policy(
        "length", "Answer length", "tokens", "A policy whose answers only grow or shrink may be gaming its reward."
    ),
    _declare_start_and_policy(
        "distinct1",
        "Distinct words",
        PERCENT,
        "Share of different words among all words of the answers; it falls when answers grow alike.",
    ),
    _declare_start_and_policy(
        "distinct2",
        "Distinct pairs of words",
        PERCENT,
        "Share of different pairs among all neighbouring pairs of words.",
    ),
    _declare_start_and_policy(
        "repetition",
        "Repetition",
        PERCENT,
        "Share of an answer's word groups that it has used before; a rise is a policy that repeats itself.",
    ),
    _declare_start_and_policy(
        "eos_rate", "Answers that end by themselves", PERCENT, "The others were cut at rollout.max_new_tokens."
    ),
    _declare_start_and_policy("empty_rate", "Empty answers", PERCENT, EMPTY),
    _declare_figure(
        "most_risen_word.word most_risen_word.ref most_risen_word.policy",
        "Word that rose most",
        "",
        "Share of the answers that hold it, start and policy. One word in most answers is the first sign of a "
        "gamed reward.",
        _format_risen_word,
    ),
    _declare_figure(
        "judge_agreement",
        "Agreement of the judge",
        PERCENT,
        "Share of its verdicts that equal those of people, or of another reference, by prompt.",
    ),
    _declare_figure(
        "accuracy",
        "Accuracy on held-out pairs",
        PERCENT,
        "Share of the pairs whose better answer gets the higher score, by prompt; guessing gives 50 %.",
    ),
    _declare_figure(
        "auc",
        "Wanted above unwanted (AUC)",
        PERCENT,
        "How often the reward of a wanted held-out answer is higher than that of an unwanted one (the area under the "
        "ROC curve); guessing gives 50 %.",
    ),
    _declare_figure(
        "accuracy_noiseless",
        "Accuracy on noiseless labels",
        PERCENT,
        "Accuracy against the order that the simulated annotator has without its noise.",
    ),
    _declare_figure(
        "ceiling",
        "Highest accuracy that the labels allow",
        PERCENT,
        "Share of the noisy labels that agree with the noiseless order. A model cannot be expected to predict more of "
        "them.",
    ),
    _declare_figure(
        "loss_before loss_after",
        "Held-out loss",
        "nats a token",
        "Mean negative log-likelihood of the assistant's tokens, before and after training; lower is better.",
    ),
    _declare_figure(
        "loss_change",
        "Change of the held-out loss",
        "nats a token",
        "After less before, on the same rows. An interval that holds 0 shows no change.",
    ),
    _declare_figure(
        "perplexity_before perplexity_after",
        "Held-out perplexity",
        "",
        "exp of the loss: the number of equally likely tokens that would give this loss.",
    ),
    _declare_figure(
        "loss_before loss",
        "Held-out loss",
        "",
        "The training loss on held-out pairs or answers, at the start and now; lower is better.",
    ),
    _declare_figure(
        "loss", "Held-out loss", "nats a pair", "Bradley–Terry's loss on held-out pairs; guessing gives 0.69."
    ),
    _declare_figure(
        "objective_before objective_after",
        "Objective on held-out prompts",
        "",
        "Score less stage.kl_coef times the KL, of the start and of what is published.",
    ),
    _declare_figure(
        "beats_start",
        "Better than the start",
        "",
        "By the objective. It is measured with one answer to each prompt, so a small difference may be chance.",
    ),
    _declare_figure(
        "held_out_score_before held_out_score_after",
        "Score on held-out prompts",
        "",
        "The objective without its KL penalty.",
    ),
    _declare_figure(
        "published_kl",
        "KL of what is published",
        "nats an answer",
        "How far it moved from the reference, on held-out prompts.",
    ),
    _declare_figure(
        "last_score", "Score", "", f"What training optimises, {ENDING}, standardised as stage.normalise says."
    ),
    _declare_figure("last_kl", "KL from the reference", "nats an answer", f"How far the policy moved, {ENDING}."),
    _declare_figure("last_length", "Answer length", "tokens", f"The mean {ENDING}."),
    _declare_figure(
        "last_eos_rate",
        "Answers that end by themselves",
        PERCENT,
        f"The mean {ENDING}; the others were cut at rollout.max_new_tokens.",
    ),
    _declare_figure("last_empty_rate", "Empty answers", PERCENT, f"The mean {ENDING}. {EMPTY}"),
    _declare_figure(
        "last_entropy",
        "Entropy",
        "nats a token",
        f"Uncertainty about each token, {ENDING}; near 0 every sample of an answer is nearly the same.",
    ),
    _declare_figure(
        "last_equal_groups",
        "Prompts without a learning signal",
        PERCENT,
        f"All answers to such a prompt have the same reward, so no answer is better than another; the mean {ENDING}.",
    ),
    _declare_figure(
        "tripped",
        "Tripwires",
        "",
        "Signs of a gamed reward: thresholds that were crossed for several updates in a row.",
    ),
    _declare_figure(
        "published_update updates",
        "Update that is published",
        "",
        "The best update on held-out prompts, or the last one, and the number of all updates.",
        lambda chosen, updates: f"{chosen} of {updates}",
    ),
    _declare_figure("updates", "Updates", "", "Batches of answers that the policy learned from."),
    _declare_figure(
        "score_mean",
        "Mean raw score of the start",
        "",
        "Mean reward of the reference's answers; it is subtracted from every score.",
    ),
    _declare_figure(
        "score_std",
        "Standard deviation of the raw score",
        "",
        "Over the reference's answers; scores are divided by it.",
    ),
    _declare_figure("quantised_layers", "Layers in NF4", "", "Linear layers of the base that are kept in 4 bits."),
    _declare_figure(
        "reward.one reward.best",
        "Reward, one answer and the best of n",
        "",
        "Measured by the reward that ranks the answers, so it is no evidence of quality.",
    ),
    _declare_figure(
        "gold.one gold.best",
        "Gold, one answer and the best of n",
        "",
        "Measured by stage.gold, which had no part in the ranking.",
    ),
    _declare_figure(
        "tokens.one tokens.best",
        "Answer length, one answer and the best of n",
        "tokens",
        "Longer best answers show that the reward prefers length.",
    ),
    _declare_figure("winners", "Winners", "", "The best answers that ended and hold text: rows for stage=sft."),
    _declare_figure("winner_reward", "Reward of the winners", "", "The mean over the rows for stage=sft."),
    _declare_figure(
        "outranked",
        "Winners despite a better-scored answer",
        "",
        "The better answer was cut or is empty, so the winner is trained on in its place.",
    ),
    _declare_figure("no_winner", "Prompts without a winner", "", "None of their answers ended and holds text."),
    _declare_figure(
        "low_score",
        "Prompts whose best complete answer scores below stage.min_score",
        "",
        "They give neither a winner nor a pair.",
    ),
    _declare_figure("one_score", "Prompts with no answer below the winner's score", "", "They give no pair."),
    _declare_figure("scorer", "Ranked by", "", "The reward that ranked the answers."),
    _declare_figure("measured_by", "Measured by", "", "The reward of stage.gold."),
    _declare_figure("answers", "Answers", "", "Drawn from the policy."),
    _declare_figure(
        "eos_rate", "Answers that end by themselves", PERCENT, "The others were cut at rollout.max_new_tokens."
    ),
    _declare_figure("empty_rate", "Empty answers", PERCENT, EMPTY),
    _declare_figure("all_empty", "Prompts with empty answers alone", "", "They are not handed out to people."),
    _declare_figure(
        "all_equal", "Prompts with equal answers alone", "", "They are not handed out to people, and give no pair."
    ),
    _declare_figure(
        "with_tools",
        "Prompts with tools",
        "",
        "They are not handed out to people, whose page shows no tools, and "
        "give neither winners nor pairs. samples.jsonl has the answers.",
    ),
    _declare_figure("mean_length", "Answer length", "tokens", "Mean over all answers."),
    _declare_figure(
        "kl",
        "KL from the trained model",
        "nats a token",
        "Between the trained model and the export as loaded first, on fixed prompts; 0 is the same model.",
    ),
    _declare_figure(
        "top1",
        "Same most likely token",
        PERCENT,
        "Share of the positions at which the export and the trained model agree on the most likely token.",
    ),
    _declare_figure("max_logprob", "Largest difference of a logprob", "nats", "Over all positions and tokens."),
    _declare_figure("held_out_tokens", "Held-out tokens", "", "Tokens of the assistant in the held-out rows."),
    _declare_figure("trained_weights", "Trained weights", "", "Numbers that training may change."),
    _declare_figure("train_tokens", "Training tokens", "", "All tokens of the rows, in one pass over the data."),
    _declare_figure("steps", "Steps of the optimiser", "", "In the whole run."),
    _declare_figure(
        "published_step", "Step that is published", "", "The last one, or the one with the lowest held-out loss."
    ),
    _declare_figure(
        "ended_by", "Training ended by", "", "The setting: stage.epochs, stage.max_steps or stage.patience."
    ),
    _declare_figure(
        "copied_tensors",
        "Tensors taken over",
        "",
        "LoRA tensors that the reward model copied from its start; 0 if it started with a new adapter.",
    ),
    _declare_figure(
        "simulated_by",
        "Simulated annotators",
        "",
        "Simulated annotators, not people, ranked the pairs that were trained on.",
    ),
    _declare_figure("annotators", "Annotators", "", "Simulated annotators, each with separate noise."),
    _declare_figure("items", "Items", "", "Prompts that were ranked."),
    _declare_figure("rankings", "Rankings", "", "One annotator's order of one prompt's answers."),
    _declare_figure("added", "New in the store", "", "Rankings or rows that were not in the store before."),
    _declare_figure("pairs", "Pairs", "", "Preferences that follow from the rankings."),
    _declare_figure("tie_share", "Ties", PERCENT, "Share of the pairs of answers that share a rank."),
    _declare_figure(
        "agreement",
        "Agreement with the noiseless order",
        PERCENT,
        "Share of the untied pairs that the noise left as they were.",
    ),
    _declare_figure(
        "slope", "Sharpness of the annotator", "", "Change of the log-odds of a preference per unit of sentiment."
    ),
    _declare_figure(
        "done wanted",
        "Rankings given",
        "",
        "Of the rankings that the project asks for.",
        lambda done, wanted: f"{done:,} of {wanted:,}",
    ),
    _declare_figure("read", "Records read", "", "Of all sources, less rows that were refused."),
    _declare_figure(
        "train_distinct", "Different rows to train on", "", "Each counted once where the mixture repeats it."
    ),
    _declare_figure(
        "test_rows", "Rows to measure on", "", "No similar row is trained on, unless stage.contamination.test=false."
    ),
    _declare_figure("dropped_in_cleaning", "Dropped in cleaning", "rows", "By the steps of stage.clean."),
    _declare_figure(
        "dropped_by_score", "Dropped by score", "rows", "Their score is outside of the range that stage.score keeps."
    ),
    _declare_figure(
        "unscored",
        "Without a score",
        "rows",
        "They have nothing to score, or too much for the model's context. They are kept.",
    ),
    _declare_figure(
        "exact_duplicates",
        "Exact duplicates",
        "rows",
        "Their text is that of a row that is kept, except for case and spaces.",
    ),
    _declare_figure(
        "near_duplicates",
        "Near-duplicates",
        "rows",
        "Their 3-grams are nearly the same as those of a row that is kept.",
    ),
    _declare_figure(
        "contaminated", "Like evaluation rows", "rows", "They are similar to rows of stage.contamination.against."
    ),
    _declare_figure("shared_with_test", "Like test rows", "rows", "They are similar to rows to measure on."),
    _declare_figure("unanswered", "Without an answer", "rows", "Supervised training leaves them out."),
    _declare_figure("forgotten", "Rows forgotten", "rows", "Each is replaced by a tombstone."),
    _declare_figure(
        "runs",
        "Runs that trained on them",
        "",
        "Runs under this run.root that trained on the data set, and runs made from their artifacts.",
    ),
    _declare_figure(
        "root", "Fingerprint", "", "Merkle root over the rows and how often each is seen.", formatter=_shorten_digest
    ),
    _declare_figure(
        "ids_root",
        "Fingerprint of the set",
        "",
        "Merkle root over the sorted ids of contents.",
        formatter=_shorten_digest,
    ),
    _declare_figure(
        "data_root",
        "Fingerprint of the training rows",
        "",
        "Merkle root over the content ids of the training rows, in order.",
        formatter=_shorten_digest,
    ),
    _declare_figure(
        "data_ids_root",
        "Fingerprint of the set of training rows",
        "",
        "Merkle root over the sorted content ids; it does not depend on the order of the rows.",
        formatter=_shorten_digest,
    ),
    _declare_figure("rows", "Rows", "", "Rows that were read, written or checked."),
    _declare_figure("seq", "Last row of the ledger", "", "The number of the newest vote that this run read or wrote."),
    _declare_figure(
        "answers_made",
        "Answers made",
        "",
        "Answers that this evaluation generated; all others were taken from the cache.",
    ),
    _declare_figure(
        "likelihoods_made",
        "Log-likelihoods computed",
        "",
        "Log-likelihoods of choices and texts that this evaluation computed; all others were taken from the cache.",
    ),
    _declare_figure("peak_rss_mb", "Peak memory", "MiB", "Peak memory of the process, without GPU memory."),
    _declare_figure(
        "peak_gpu_mb",
        "Peak GPU memory",
        "MiB",
        "Peak of the tensors on the GPU, without what torch reserves beyond them.",
    ),
    _declare_figure(
        "predicted_peak_mb",
        "Predicted peak",
        "MiB",
        "Predicted peak of its tensors; a process on a CPU takes about 1.5 times as much, plus its libraries.",
    ),
)
"""Rows of the table of metrics, in order. A row is shown if a run has all its keys and no earlier row used one."""

SHOWN_ELSEWHERE = (
    "judge",
    "judge_is",
    "judge_notes",
    "dropped",
    "dropped_too_long",
    "dropped_unanswered",
    "prompts",
    "base",
    "base_digest",
    "checks",
    "notes",
    "cut",
    "train_rows",
    "held_out_rows",
    "held_out_pairs",
    "held_out_too_long",
    "held_out_unanswered",
    "held_out_cut",
    "reasoning_lost_last",
    "reasoning_lost_earlier",
    "dropped_in_eval",
    "held_out_dropped",
    "dropped_undecided",
    "loss_by_source",
    "skipped_rows",
    "held_out_prompts",
    "systems",
    "tasks",
    "gates",
    "exit_status",
    "card",
    "reference",
    "decides",
    "why_not",
    "asks",
    "yes",
    "best_of",
    "wanted",
    "unwanted",
    "held_out_answers",
)
"""First parts of the dotted keys of metrics that are not in the table, because other sections of a report show them."""

PARTLY_SHOWN = ("variety", "collapse")
"""First parts of the dotted keys of metrics that are in the table only if FIGURES lists them.

`metrics.json` has the others.
"""

OWN_TABLE_PREFIXES = ("tasks.", "card.")
"""Prefixes of the metrics of a suite and of a judge, whose own tables mark small samples themselves."""

SYNONYMS = {"kl": "kl_interval", "pairs": "held_out_pairs"}
"""Key of a metric → key of a metric with the same value, which is shown instead if a run has it."""


class FigureRow(NamedTuple):
    """A row of a report's table of metrics, formatted as text.

    Attributes:
        label: the name of the figure.
        value: its value with unit and interval.
        explanation: how to read it.
    """

    label: str
    value: str
    explanation: str


def build_figure_table(metrics: Mapping[str, Any]) -> list[FigureRow]:
    """Format a run's metrics as the rows of the report's table, first the declared ones in their order, then the
    others.

    Metrics that other sections show are left out.
    """
    declared = {key for figure in FIGURES for key in figure.keys}
    remaining = {
        key: value
        for key, value in flatten_metrics(metrics)
        if key.partition(".")[0] not in (*SHOWN_ELSEWHERE, "receipt")
        and SYNONYMS.get(key) not in metrics
        and (key.partition(".")[0] not in PARTLY_SHOWN or key in declared)
    }
    rows = []
    for figure in FIGURES:
        if all(key in remaining for key in figure.keys):
            values = [remaining.pop(key) for key in figure.keys]
            rows.append(FigureRow(figure.label, figure.format_values(values), figure.reading))
    for key, value in remaining.items():
        rows.append(FigureRow(_spell_out(key), format_figure(value), f"`{key}` of manifest.json."))
    return rows


def sort_metric_names(names: Iterable[str]) -> list[str]:
    """Sort the dotted keys of metrics in the order of a report's table of metrics.

    The value after training comes before the value before it. Undeclared metrics follow, then counts of rows and the
    like.
    """
    places = {key: (i, -k) for i, figure in reversed([*enumerate(FIGURES)]) for k, key in enumerate(figure.keys)}
    end = len(FIGURES)
    return sorted(names, key=lambda name: places.get(name, (end + (name in SHOWN_ELSEWHERE), 0)))


def describe_small_samples(metrics: Mapping[str, Any]) -> str:
    """Return a sentence that names the metrics with fewer than FEW observations; empty if none exist."""
    labels = {figure.keys: figure.label for figure in FIGURES}
    names = [
        f"{labels.get((key,), _spell_out(key))} ({value['n']})"
        for key, value in flatten_metrics(metrics)
        if is_interval(value)
        and value.get("n", FEW) < FEW
        and SYNONYMS.get(key) not in metrics
        and not key.startswith(OWN_TABLE_PREFIXES)
    ]
    return f"Fewer than {FEW} observations, too few for a reliable interval: {', '.join(names)}." if names else ""


def _spell_out(key: str) -> str:
    words = key.replace("_", " ").replace(".", " ")
    return words[:1].upper() + words[1:]
