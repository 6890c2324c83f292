"""Label, unit and explanation of every metric in the table of figures of a report.

A metric that is not declared here is shown with the words of its key, and a test reports it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

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
    """A row of the table of figures.

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
        """Format the values of all keys, with the unit and the number of observations."""
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


def _define(keys: str, label: str, unit: str, reading: str, formatter: Callable[..., str] | None = None) -> Figure:
    """Create a figure.

    Args:
        keys: its keys, separated by spaces.
    """
    return Figure(tuple(keys.split()), label, unit, reading, formatter)


def _define_change(name: str, label: str, unit: str, reading: str) -> Figure:
    """Create a figure of the start and the policy."""
    return _define(f"{name}.ref {name}.policy", label, unit, reading)


def _define_scores(role: str) -> tuple[Figure, ...]:
    """Create the figures of a judge's scores.

    Args:
        role: "gold", or "proxy" if the policy was optimised against the judge.
    """
    return (
        _define_change(
            role,
            f"{role.capitalize()} score",
            "",
            "The judge's mean score of the start's and the policy's answers; its scale is the judge's own.",
        ),
        _define(
            f"{role}.difference",
            f"Gain in {role} score",
            "",
            "Policy less start, prompt by prompt. An interval that holds 0 shows no difference.",
        ),
    )


def _format_risen_word(word: str, before: float, after: float) -> str:
    return f"“{word}”, {format_percent(before)} → {format_percent(after)}" if word else "none"


def _shorten_digest(digest: str) -> str:
    """Return the beginning of a digest. All of its 64 digits would make the table too wide for a phone."""
    return f"{digest[:16]}…"


ENDING = "over the last ten updates, at most half of them"

EMPTY = "They leave nothing to judge; with rollout.reasoning=hide, because their reasoning was never closed."

FIGURES = (
    _define(
        "win_rate",
        "Win rate",
        PERCENT,
        "Share of the prompts whose answer the judge scores higher than the "
        "start's, or the second system's, ties counted half; 50 % is no difference.",
    ),
    _define(
        "difference",
        "Difference of the scores",
        "",
        "The first system's mean score less the second's, on the first task; without scores, wins less losses.",
    ),
    *_define_scores("gold"),
    *_define_scores("proxy"),
    _define("seen", "Prompts that training saw", "", "Of those that were asked; stage.seen=drop leaves them out."),
    _define(
        "seen_unknown",
        "Reasons not to know what training saw",
        "",
        "Runs behind it that are gone, and the like: its notes name them. At 0 the count above is all.",
    ),
    _define(
        "dropped_seen", "Left out as seen", "prompts", "Training saw these questions, under whatever system prompt."
    ),
    _define(
        "unseen.win_rate", "Win rate on unseen prompts", PERCENT, "The same over the prompts that training did not see."
    ),
    _define("unseen.gain", "Gain on unseen prompts", "", "Policy less start in the judge's score, over these."),
    _define(
        "collapse.verdict",
        "Collapse",
        "",
        "Whether the greedy answers are nearly the same whatever is asked. Decided from 64 distinct prompts on.",
    ),
    _define(
        "variety.greedy.ref.distinct variety.greedy.policy.distinct",
        "Different greedy answers",
        "",
        "Compared without case, punctuation, numbers and words of the prompt.",
    ),
    _define(
        "kl_interval",
        "KL from the start",
        "nats an answer",
        "How far the policy moved: the log of how much "
        "likelier it finds its answers than the start does. Small is close.",
    ),
    _define_change(
        "length", "Answer length", "tokens", "A policy whose answers only grow or shrink may be gaming its reward."
    ),
    _define_change(
        "distinct1",
        "Distinct words",
        PERCENT,
        "Share of different words among all words of the answers; it falls when answers grow alike.",
    ),
    _define_change("distinct2", "Distinct pairs of words", PERCENT, "The same of neighbouring pairs of words."),
    _define_change(
        "repetition",
        "Repetition",
        PERCENT,
        "Share of an answer's word groups that it has used before; a rise is a policy that repeats itself.",
    ),
    _define_change(
        "eos_rate", "Answers that end by themselves", PERCENT, "The others were cut at rollout.max_new_tokens."
    ),
    _define_change("empty_rate", "Empty answers", PERCENT, EMPTY),
    _define(
        "most_risen_word.word most_risen_word.ref most_risen_word.policy",
        "Word that rose most",
        "",
        "Share of the answers that hold it, start and policy. One word in most answers is the first sign of a "
        "gamed reward.",
        _format_risen_word,
    ),
    _define(
        "judge_agreement",
        "Agreement of the judge",
        PERCENT,
        "Share of its verdicts that are those of people, or of another reference, by prompt.",
    ),
    _define(
        "accuracy",
        "Accuracy on held-out pairs",
        PERCENT,
        "Share of the pairs whose better answer gets the higher score, by prompt; a coin has 50 %.",
    ),
    _define(
        "auc",
        "Wanted above unwanted",
        PERCENT,
        "How often a held-out answer that was wanted gained more on the "
        "start than one that was not (the area under the ROC curve); a coin has 50 %.",
    ),
    _define(
        "accuracy_noiseless",
        "Accuracy without the labels' noise",
        PERCENT,
        "The same against the order that the simulated annotator had before its noise.",
    ),
    _define(
        "ceiling",
        "Ceiling of the labels",
        PERCENT,
        "How often the noisy labels agree with that order: more than this share of them cannot be learned.",
    ),
    _define(
        "loss_before loss_after",
        "Held-out loss",
        "nats a token",
        "Mean negative log-likelihood of the assistant's tokens, before and after training; lower is better.",
    ),
    _define(
        "loss_change",
        "Change of the held-out loss",
        "nats a token",
        "After less before, on the same rows. An interval that holds 0 shows no change.",
    ),
    _define(
        "perplexity_before perplexity_after",
        "Held-out perplexity",
        "",
        "exp of the loss: the number of equally likely tokens that would give this loss.",
    ),
    _define(
        "loss_before loss",
        "Held-out loss",
        "",
        "The training loss on held-out pairs or answers, at the start and now; lower is better.",
    ),
    _define("loss", "Held-out loss", "nats a pair", "Bradley–Terry's loss on held-out pairs; a coin has 0.69."),
    _define(
        "objective_before objective_after",
        "Objective on held-out prompts",
        "",
        "Score less stage.kl_coef times the KL, of the start and of what is published.",
    ),
    _define(
        "beats_start",
        "Better than the start",
        "",
        "By the objective. It is of one answer to each prompt, so that a small difference may be chance.",
    ),
    _define(
        "held_out_score_before held_out_score_after",
        "Score on held-out prompts",
        "",
        "The same without the price of KL.",
    ),
    _define(
        "published_kl",
        "KL of what is published",
        "nats an answer",
        "How far it moved from the reference, on held-out prompts.",
    ),
    _define("last_score", "Score", "", f"What training optimises, {ENDING}, standardised as stage.normalise says."),
    _define("last_kl", "KL from the reference", "nats an answer", f"How far the policy moved, {ENDING}."),
    _define("last_length", "Answer length", "tokens", f"The mean {ENDING}."),
    _define(
        "last_eos_rate",
        "Answers that end by themselves",
        PERCENT,
        f"The mean {ENDING}; the others were cut at rollout.max_new_tokens.",
    ),
    _define("last_empty_rate", "Empty answers", PERCENT, f"The mean {ENDING}. {EMPTY}"),
    _define(
        "last_entropy",
        "Entropy",
        "nats a token",
        f"How open the choice of each token is, {ENDING}; near 0 the policy says the same whatever is drawn.",
    ),
    _define(
        "last_equal_groups",
        "Prompts that tell nothing",
        PERCENT,
        f"All their answers earned the same; the mean {ENDING}. They do not say which answer is better.",
    ),
    _define("tripped", "Tripwires", "", "Signs of a gamed reward that were crossed for several updates in a row."),
    _define(
        "published_update updates",
        "Update that is published",
        "",
        "The best one on held-out prompts, or the last; of so many.",
        lambda chosen, updates: f"{chosen} of {updates}",
    ),
    _define("updates", "Updates", "", "Batches of answers that the policy learned from."),
    _define(
        "score_mean",
        "Mean raw score of the start",
        "",
        "What the reward gives the reference's answers; it is taken off every score.",
    ),
    _define(
        "score_std", "Spread of the raw score", "", "The standard deviation of the same, by which scores are divided."
    ),
    _define("quantised_layers", "Layers in NF4", "", "Linear layers of the base that are kept in 4 bits."),
    _define(
        "reward.one reward.best",
        "Reward, one answer and the best of n",
        "",
        "By what ranks the answers: no evidence of quality.",
    ),
    _define("gold.one gold.best", "Gold, one answer and the best of n", "", "By stage.gold, which ranked nothing."),
    _define(
        "tokens.one tokens.best",
        "Answer length, one answer and the best of n",
        "tokens",
        "A reward that likes length shows here.",
    ),
    _define("winners", "Winners", "", "The best answers that ended and hold text: rows for stage=sft."),
    _define("winner_reward", "Reward of the winners", "", "The mean over the rows for stage=sft."),
    _define(
        "outranked",
        "Winners with a better answer beside them",
        "",
        "That one was cut or is empty, and is not imitated.",
    ),
    _define("no_winner", "Prompts without a winner", "", "None of their answers ended and holds text."),
    _define("one_score", "Prompts with no answer below the winner's score", "", "They give no pair."),
    _define("scorer", "Ranked by", "", "The reward that ranked the answers."),
    _define("measured_by", "Measured by", "", "The reward of stage.gold."),
    _define("answers", "Answers", "", "Drawn from the policy."),
    _define("eos_rate", "Answers that end by themselves", PERCENT, "The others were cut at rollout.max_new_tokens."),
    _define("empty_rate", "Empty answers", PERCENT, EMPTY),
    _define("all_empty", "Prompts with empty answers alone", "", "They are not handed out to people."),
    _define(
        "all_equal", "Prompts with equal answers alone", "", "They are not handed out to people, and give no pair."
    ),
    _define(
        "with_tools",
        "Prompts with tools",
        "",
        "They are not handed out to people, whose page shows no tools, and "
        "give neither winners nor pairs. samples.jsonl has the answers.",
    ),
    _define("mean_length", "Answer length", "tokens", "Mean over all answers."),
    _define(
        "kl",
        "KL from what was trained",
        "nats a token",
        "Of the export as it is loaded first, on fixed prompts; 0 is the same model.",
    ),
    _define(
        "top1",
        "Same most likely token",
        PERCENT,
        "Share of the positions where the export and what was trained agree on it.",
    ),
    _define("max_logprob", "Largest difference of a logprob", "nats", "Over all positions and tokens."),
    _define("held_out_tokens", "Held-out tokens", "", "Tokens of the assistant in them."),
    _define("trained_weights", "Trained weights", "", "Numbers that training may change."),
    _define("train_tokens", "Training tokens", "", "All tokens of the rows, in one pass over the data."),
    _define("steps", "Steps of the optimiser", "", "In the whole run."),
    _define("published_step", "Step that is published", "", "The last one, or the one with the lowest held-out loss."),
    _define("ended_by", "Training ended by", "", "The setting: stage.epochs, stage.max_steps or stage.patience."),
    _define(
        "copied_tensors",
        "Tensors taken over",
        "",
        "LoRA tensors that the reward model took from its start; 0 where it began afresh.",
    ),
    _define(
        "simulated_by", "Simulated annotators", "", "What stood in for people in the pairs that were learned from."
    ),
    _define("prioritised", "Items put in order", "", "Items of the annotation queue, the least certain first."),
    _define("annotators", "Annotators", "", "Simulated ones, each with noise of its own."),
    _define("items", "Items", "", "Prompts that were ranked."),
    _define("rankings", "Rankings", "", "One annotator's order of one prompt's answers."),
    _define("added", "New in the store", "", "Those that were not there before."),
    _define("pairs", "Pairs", "", "Preferences that follow from the rankings."),
    _define("tie_share", "Ties", PERCENT, "Pairs of answers that stand equal."),
    _define(
        "agreement",
        "Agreement with the noiseless order",
        PERCENT,
        "Share of the untied pairs that the noise left as they were.",
    ),
    _define("slope", "Sharpness of the annotator", "", "By how much a difference in sentiment moves the odds."),
    _define(
        "done wanted",
        "Rankings given",
        "",
        "Of those that the project wants.",
        lambda done, wanted: f"{done:,} of {wanted:,}",
    ),
    _define("read", "Records read", "", "Of all sources, less rows that were refused."),
    _define("train_distinct", "Different rows to train on", "", "Each counted once where the mixture repeats it."),
    _define(
        "test_rows", "Rows to measure on", "", "Nothing like them is trained on, unless stage.contamination.test=false."
    ),
    _define("dropped_in_cleaning", "Dropped in cleaning", "rows", "By the steps of stage.clean."),
    _define("dropped_by_score", "Dropped by score", "rows", "Outside of what stage.score keeps."),
    _define(
        "unscored",
        "Without a score",
        "rows",
        "They have nothing to score, or too much for the model's context. They are kept.",
    ),
    _define(
        "exact_duplicates",
        "Exact duplicates",
        "rows",
        "Their text is that of a row that stays, but for case and spaces.",
    ),
    _define("near_duplicates", "Near-duplicates", "rows", "Their 3-grams are nearly those of a row that stays."),
    _define("contaminated", "Like evaluation rows", "rows", "They are similar to rows of stage.contamination.against."),
    _define("shared_with_test", "Like test rows", "rows", "They are similar to rows to measure on."),
    _define("unanswered", "Without an answer", "rows", "Supervised training leaves them out."),
    _define("forgotten", "Rows forgotten", "rows", "A tombstone stands in the place of each."),
    _define("runs", "Runs that trained on them", "", "Those under this run.root, and what was made from these."),
    _define(
        "root", "Fingerprint", "", "Merkle root over the rows and how often each is seen.", formatter=_shorten_digest
    ),
    _define(
        "ids_root",
        "Fingerprint of the set",
        "",
        "Merkle root over the sorted ids of contents.",
        formatter=_shorten_digest,
    ),
    _define(
        "data_root",
        "Fingerprint of the training rows",
        "",
        "Merkle root over the content ids of what was given, in order.",
        formatter=_shorten_digest,
    ),
    _define(
        "data_ids_root",
        "Fingerprint of their set",
        "",
        "Merkle root over the sorted ids, in whatever order.",
        formatter=_shorten_digest,
    ),
    _define("rows", "Rows", "", "Rows that were read, written or checked."),
    _define("seq", "Last row of the ledger", "", "The number of the newest vote that is in it."),
    _define(
        "answers_made", "Answers made", "", "Those that this evaluation generated; others were taken from the cache."
    ),
    _define(
        "likelihoods_made",
        "Log-likelihoods computed",
        "",
        "Of choices and texts, by this evaluation; others were computed before.",
    ),
    _define("peak_rss_mb", "Peak memory", "MiB", "The most that the process held, a GPU's memory left out."),
    _define("peak_gpu_mb", "Peak GPU memory", "MiB", "The most that its tensors took there, torch's reserve left out."),
    _define(
        "predicted_peak_mb",
        "Predicted peak",
        "MiB",
        "What its tensors were predicted to take at the most; a "
        "process on a CPU holds about 1.5 times as much, and its libraries.",
    ),
)
"""Rows in the order of the page. A row is shown if a run has all its keys and no earlier row has used one of them."""

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
"""First parts of keys that other sections of a page show."""

PARTLY_SHOWN = ("variety", "collapse")
"""First parts of keys of which a page shows only the keys in FIGURES. `metrics.json` has the others."""

OWN_TABLE_PREFIXES = ("tasks.", "card.")
"""Prefixes of figures of a suite and of a judge's card, whose tables mark small samples themselves."""

SYNONYMS = {"kl": "kl_interval", "pairs": "held_out_pairs"}
"""Key → key of the same value, which is shown instead if a run has it."""


def build_figure_table(metrics: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return (label, value, explanation) of every figure of a run."""
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
            rows.append((figure.label, figure.format_values(values), figure.reading))
    for key, value in remaining.items():
        rows.append((_spell_out(key), format_figure(value), f"`{key}` of manifest.json."))
    return rows


def sort_metric_names(names: Iterable[str]) -> list[str]:
    """Sort names of metrics in the order of the table of figures.

    The value after training comes before the value before it. Undeclared metrics follow, then counts of rows and the
    like.
    """
    places = {key: (i, -k) for i, figure in reversed([*enumerate(FIGURES)]) for k, key in enumerate(figure.keys)}
    end = len(FIGURES)
    return sorted(names, key=lambda name: places.get(name, (end + (name in SHOWN_ELSEWHERE), 0)))


def describe_small_samples(metrics: Mapping[str, Any]) -> str:
    """Return a sentence that names the figures with fewer than FEW observations, or an empty string."""
    labels = {figure.keys: figure.label for figure in FIGURES}
    names = [
        f"{labels.get((key,), _spell_out(key))} ({value['n']})"
        for key, value in flatten_metrics(metrics)
        if is_interval(value)
        and value.get("n", FEW) < FEW
        and SYNONYMS.get(key) not in metrics
        and not key.startswith(OWN_TABLE_PREFIXES)
    ]
    return f"Fewer than {FEW} observations, so that the interval says little: {', '.join(names)}." if names else ""


def _spell_out(key: str) -> str:
    words = key.replace("_", " ").replace(".", " ")
    return words[:1].upper() + words[1:]
