"""What each figure is called, in which unit it is, and how it is read: declared here, once.

A figure that nobody declared is shown under its key's own words; a test finds it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from align.report.figure_text import FEW, few, flattened, format_figure, in_words, is_interval, is_number, percent

PERCENT = "%"


@dataclass(frozen=True, slots=True)
class Figure:
    """A row of the table of figures.

    Attributes:
        keys: dotted names in a run's metrics; of two, the second is what the first became.
        label: what it is called.
        unit: what its number counts; `%` of a share; empty where the label says it.
        reading: how to read it, in a sentence.
        shown: writes it out, in place of the usual way.
    """

    keys: tuple[str, ...]
    label: str
    unit: str
    reading: str
    shown: Callable[..., str] | None = None

    def text(self, values: Iterable[Any]) -> str:
        if self.shown:
            return self.shown(*values)
        unit = f" {self.unit}" if self.unit not in ("", PERCENT) else ""
        *before, last = values
        n = f" (n={last['n']:,}{few(last['n'])})" if is_interval(last) and "n" in last else ""
        return " → ".join(map(self.number, (*before, last))) + unit + n

    def number(self, value: Any) -> str:
        if self.unit == PERCENT:
            return percent(value)
        text = in_words(value, ".4g") if is_interval(value) else format_figure(value)
        return text.replace("-", "−") if is_number(value) or is_interval(value) else text


def _figure(keys: str, label: str, unit: str, reading: str, shown: Callable[..., str] | None = None) -> Figure:
    return Figure(tuple(keys.split()), label, unit, reading, shown)


def _before_after(name: str, label: str, unit: str, reading: str) -> Figure:
    return _figure(f"{name}.ref {name}.policy", label, unit, reading)


def _scores(role: str) -> tuple[Figure, ...]:
    """Rows of the judge's scores, which are called what the judge is to the policy."""
    return (
        _before_after(role, f"{role.capitalize()} score", "", "The judge's mean score of the start's and the policy's "
        "answers; its scale is the judge's own."),
        _figure(f"{role}.difference", f"Gain in {role} score", "", "Policy less start, prompt by prompt. An interval "
        "that holds 0 shows no difference."),
    )  # fmt: skip


def _risen(word: str, before: float, after: float) -> str:
    return f"“{word}”, {percent(before)} → {percent(after)}" if word else "none"


def _digits(digest: str) -> str:
    """The beginning of a digest: all of its 64 digits would stretch a table beyond a phone."""
    return f"{digest[:16]}…"


ENDING = "over the last ten updates, at most half of them"

EMPTY = "They leave nothing to judge; with rollout.reasoning=hide, because their reasoning was never closed."

FIGURES = (
    _figure("win_rate", "Win rate", PERCENT, "Share of the prompts whose answer the judge scores higher than the "
            "start's, or the second system's, ties counted half; 50 % is no difference."),
    _figure("difference", "Difference of the scores", "", "The first system's mean score less the second's, on the "
            "first task; without scores, wins less losses."),
    *_scores("gold"), *_scores("proxy"),
    _figure("seen", "Prompts that training saw", "", "Of those that were asked; stage.seen=drop leaves them out."),
    _figure("seen_unknown", "Reasons not to know what training saw", "", "Runs behind it that are gone, and the like: "
    "its notes name them. At 0 the count above is all."),
    _figure("dropped_seen", "Left out as seen", "prompts", "Training saw these questions, under whatever system "
            "prompt."),
    _figure("unseen.win_rate", "Win rate on unseen prompts", PERCENT, "The same over the prompts that training did not "
            "see."),
    _figure("unseen.gain", "Gain on unseen prompts", "", "Policy less start in the judge's score, over these."),
    _figure("collapse.verdict", "Collapse", "", "Whether the greedy answers are nearly the same whatever is "
            "asked. Decided from 64 distinct prompts on."),
    _figure("variety.greedy.ref.distinct variety.greedy.policy.distinct", "Different greedy answers", "", "Compared "
            "without case, punctuation, numbers and words of the prompt."),
    _figure("kl_interval", "KL from the start", "nats an answer", "How far the policy moved: the log of how much "
            "likelier it finds its answers than the start does. Small is close."),
    _before_after("length", "Answer length", "tokens", "A policy whose answers only grow or shrink may be gaming its "
                  "reward."),
    _before_after("distinct1", "Distinct words", PERCENT, "Share of different words among all words of the answers; it "
                  "falls when answers grow alike."),
    _before_after("distinct2", "Distinct pairs of words", PERCENT, "The same of neighbouring pairs of words."),
    _before_after("repetition", "Repetition", PERCENT, "Share of an answer's word groups that it has used before; a "
                  "rise is a policy that repeats itself."),
    _before_after("eos_rate", "Answers that end by themselves", PERCENT, "The others were cut at "
                  "rollout.max_new_tokens."),
    _before_after("empty_rate", "Empty answers", PERCENT, EMPTY),
    _figure("most_risen_word.word most_risen_word.ref most_risen_word.policy", "Word that rose most", "",
            "Share of the answers that hold it, start and policy. One word in most answers is the first sign of a "
            "gamed reward.", _risen),
    _figure("judge_agreement", "Agreement of the judge", PERCENT, "Share of its verdicts that are those of people, or "
            "of whoever it was compared with, by prompt."),
    _figure("accuracy", "Accuracy on held-out pairs", PERCENT, "Share of the pairs whose better answer gets the higher "
            "score, by prompt; a coin has 50 %."),
    _figure("auc", "Wanted above unwanted", PERCENT, "How often a held-out answer that was wanted gained more on the "
            "start than one that was not (the area under the ROC curve); a coin has 50 %."),
    _figure("accuracy_noiseless", "Accuracy without the labels' noise", PERCENT, "The same against the order that the "
            "simulated annotator had before its noise."),
    _figure("ceiling", "Ceiling of the labels", PERCENT, "How often the noisy labels agree with that order: more than "
            "this share of them cannot be learned."),
    _figure("loss_before loss_after", "Held-out loss", "nats a token", "Mean negative log-likelihood of the "
            "assistant's tokens, before and after training; lower is better."),
    _figure("loss_change", "Change of the held-out loss", "nats a token", "After less before, on the same rows. An "
            "interval that holds 0 shows no change."),
    _figure("perplexity_before perplexity_after", "Held-out perplexity", "", "exp of the loss: among how many equally "
            "likely tokens the model is torn."),
    _figure("loss_before loss", "Held-out loss", "", "The training loss on held-out pairs or answers, at the start and "
            "now; lower is better."),
    _figure("loss", "Held-out loss", "nats a pair", "Bradley–Terry's loss on held-out pairs; a coin has 0.69."),
    _figure("objective_before objective_after", "Objective on held-out prompts", "", "Score less stage.kl_coef times "
            "the KL, of the start and of what is published."),
    _figure("beats_start", "Better than the start", "", "By the objective. It is of one answer to each prompt, so that "
            "a small difference may be chance."),
    _figure("held_out_score_before held_out_score_after", "Score on held-out prompts", "", "The same without the price "
            "of KL."),
    _figure("published_kl", "KL of what is published", "nats an answer", "How far it moved from the reference, on "
            "held-out prompts."),
    _figure("last_score", "Score", "", f"What training optimises, {ENDING}, standardised as stage.normalise says."),
    _figure("last_kl", "KL from the reference", "nats an answer", f"How far the policy moved, {ENDING}."),
    _figure("last_length", "Answer length", "tokens", f"The mean {ENDING}."),
    _figure("last_eos_rate", "Answers that end by themselves", PERCENT, f"The mean {ENDING}; the others were cut at "
            "rollout.max_new_tokens."),
    _figure("last_empty_rate", "Empty answers", PERCENT, f"The mean {ENDING}. {EMPTY}"),
    _figure("last_entropy", "Entropy", "nats a token", f"How open the choice of each token is, {ENDING}; near 0 the "
            "policy says the same whatever is drawn."),
    _figure("last_equal_groups", "Prompts that tell nothing", PERCENT, f"All their answers earned the same; the mean "
            f"{ENDING}. They do not say which answer is better."),
    _figure("tripped", "Tripwires", "", "Signs of a gamed reward that were crossed for several updates in a row."),
    _figure("published_update updates", "Update that is published", "", "The best one on held-out prompts, or the "
            "last; of so many.", lambda chosen, updates: f"{chosen} of {updates}"),
    _figure("updates", "Updates", "", "Batches of answers that the policy learned from."),
    _figure("score_mean", "Mean raw score of the start", "", "What the reward gives the reference's answers; it is "
            "taken off every score."),
    _figure("score_std", "Spread of the raw score", "", "The standard deviation of the same, by which scores are "
            "divided."),
    _figure("quantised_layers", "Layers in NF4", "", "Linear layers of the base that are kept in 4 bits."),
    _figure("reward.one reward.best", "Reward, one answer and the best of n", "", "By what ranks the answers: no "
            "evidence of quality."),
    _figure("gold.one gold.best", "Gold, one answer and the best of n", "", "By stage.gold, which ranked nothing."),
    _figure("tokens.one tokens.best", "Answer length, one answer and the best of n", "tokens", "A reward that likes "
            "length shows here."),
    _figure("winners", "Winners", "", "The best answers that ended and hold text: rows for stage=sft."),
    _figure("winner_reward", "Reward of the winners", "", "The mean over the rows for stage=sft."),
    _figure("outranked", "Winners with a better answer beside them", "", "That one was cut or is empty, and is not "
            "imitated."),
    _figure("no_winner", "Prompts without a winner", "", "None of their answers ended and holds text."),
    _figure("one_score", "Prompts with no answer below the winner's score", "", "They give no pair."),
    _figure("scorer", "Ranked by", "", "The reward that ranked the answers."),
    _figure("measured_by", "Measured by", "", "The reward of stage.gold."),
    _figure("answers", "Answers", "", "Drawn from the policy."),
    _figure("eos_rate", "Answers that end by themselves", PERCENT, "The others were cut at rollout.max_new_tokens."),
    _figure("empty_rate", "Empty answers", PERCENT, EMPTY),
    _figure("all_empty", "Prompts with empty answers alone", "", "They are not handed out to people."),
    _figure("all_equal", "Prompts with equal answers alone", "", "Nobody is handed them, and they give no pair."),
    _figure("with_tools", "Prompts with tools", "", "They are not handed out to people, whose page shows no tools, and "
            "give neither winners nor pairs. samples.jsonl has the answers."),
    _figure("mean_length", "Answer length", "tokens", "Mean over all answers."),
    _figure("kl", "KL from what was trained", "nats a token", "Of the export as it is loaded first, on fixed prompts; "
            "0 is the same model."),
    _figure("top1", "Same most likely token", PERCENT, "Share of the positions where the export and what was trained "
            "agree on it."),
    _figure("max_logprob", "Largest difference of a logprob", "nats", "Over all positions and tokens."),
    _figure("held_out_tokens", "Held-out tokens", "", "Tokens of the assistant in them."),
    _figure("trained_weights", "Trained weights", "", "Numbers that training may change."),
    _figure("train_tokens", "Training tokens", "", "All tokens of the rows, in one pass over the data."),
    _figure("steps", "Steps of the optimiser", "", "In the whole run."),
    _figure("published_step", "Step that is published", "", "The last one, or the one with the lowest held-out loss."),
    _figure("ended_by", "Training ended by", "", "The setting: stage.epochs, stage.max_steps or stage.patience."),
    _figure("copied_tensors", "Tensors taken over", "", "LoRA tensors that the reward model took from its start; 0 "
            "where it began afresh."),
    _figure("simulated_by", "Simulated annotators", "", "What stood in for people in the pairs that were learned "
            "from."),
    _figure("prioritised", "Items put in order", "", "Items of the annotation queue, the least certain first."),
    _figure("annotators", "Annotators", "", "Simulated ones, each with noise of its own."),
    _figure("items", "Items", "", "Prompts that were ranked."),
    _figure("rankings", "Rankings", "", "One annotator's order of one prompt's answers."),
    _figure("added", "New in the store", "", "Those that were not there before."),
    _figure("pairs", "Pairs", "", "Preferences that follow from the rankings."),
    _figure("tie_share", "Ties", PERCENT, "Pairs of answers that stand equal."),
    _figure("agreement", "Agreement with the noiseless order", PERCENT, "Share of the untied pairs that the noise left "
            "as they were."),
    _figure("slope", "Sharpness of the annotator", "", "By how much a difference in sentiment moves the odds."),
    _figure("done wanted", "Rankings given", "", "Of those that the project wants.",
            lambda done, wanted: f"{done:,} of {wanted:,}"),
    _figure("read", "Records read", "", "Of all sources, less rows that were refused."),
    _figure("train_distinct", "Different rows to train on", "", "Each counted once where the mixture repeats it."),
    _figure("test_rows", "Rows to measure on", "", "Nothing like them is trained on, unless "
            "stage.contamination.test=false."),
    _figure("dropped_in_cleaning", "Dropped in cleaning", "rows", "By the steps of stage.clean."),
    _figure("dropped_by_score", "Dropped by score", "rows", "Outside of what stage.score keeps."),
    _figure("unscored", "Without a score", "rows", "They have nothing to score, or too much for the model's context. "
            "They are kept."),
    _figure("exact_duplicates", "Exact duplicates", "rows", "Their text is that of a row that stays, but for case and "
            "spaces."),
    _figure("near_duplicates", "Near-duplicates", "rows", "Their 3-grams are nearly those of a row that stays."),
    _figure("contaminated", "Like evaluation rows", "rows", "They would give stage.contamination.against away."),
    _figure("shared_with_test", "Like test rows", "rows", "They would give the rows to measure on away."),
    _figure("unanswered", "Without an answer", "rows", "Supervised training leaves them out."),
    _figure("forgotten", "Rows forgotten", "rows", "A tombstone stands in the place of each."),
    _figure("runs", "Runs that trained on them", "", "Those under this run.root, and what was made from these."),
    _figure("root", "Fingerprint", "", "Merkle root over the rows and how often each is seen.", shown=_digits),
    _figure("ids_root", "Fingerprint of the set", "", "Merkle root over the sorted ids of contents.", shown=_digits),
    _figure("data_root", "Fingerprint of the training rows", "", "Merkle root over the content ids of what was given, "
            "in order.", shown=_digits),
    _figure("data_ids_root", "Fingerprint of their set", "", "Merkle root over the sorted ids, in whatever order.",
            shown=_digits),
    _figure("rows", "Rows", "", "Rows that were read, written or checked."),
    _figure("seq", "Last row of the ledger", "", "The number of the newest vote that is in it."),
    _figure("answers_made", "Answers made", "", "Those that this evaluation generated; others were made before."),
    _figure("likelihoods_made", "Log-likelihoods computed", "", "Of choices and texts, by this evaluation; others were "
            "computed before."),
    _figure("peak_rss_mb", "Peak memory", "MiB", "The most that the process held, a GPU's memory left out."),
    _figure("peak_gpu_mb", "Peak GPU memory", "MiB", "The most that its tensors took there, torch's reserve left out."),
    _figure("predicted_peak_mb", "Predicted peak", "MiB", "What its tensors were predicted to take at the most; a "
            "process on a CPU holds about 1.5 times as much, and its libraries."),
)  # fmt: skip
"""Rows in their order. A row stands where all its keys are there and none was used by a row before it."""

ELSEWHERE = (
    "judge", "judge_is", "judge_notes", "dropped", "dropped_too_long", "dropped_unanswered", "prompts", "base",
    "base_digest", "checks",
    "notes", "cut", "train_rows", "held_out_rows", "held_out_pairs", "held_out_too_long", "held_out_unanswered",
    "held_out_cut", "reasoning_lost_last", "reasoning_lost_earlier", "dropped_in_eval", "held_out_dropped",
    "dropped_undecided", "loss_by_source", "skipped_rows", "held_out_prompts", "systems", "tasks", "gates",
    "exit_status", "card", "reference", "decides", "why_not", "asks", "yes", "best_of",
    "wanted", "unwanted", "held_out_answers",
)  # fmt: skip
"""Keys that a page shows in another place."""

IN_FILE = ("variety", "collapse")
"""Keys of which a page shows those that FIGURES names; `metrics.json` has the others."""

TASKS = ("tasks.", "card.")
"""How the figures of a suite and of a judge's card begin, which say themselves how few items there are."""

TWICE = {"kl": "kl_interval", "pairs": "held_out_pairs"}
"""Keys that say the same as another, where that is there."""


def table_of(metrics: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Label, value and reading of every figure of a run; nothing blank, and nothing twice."""
    explained = {key for figure in FIGURES for key in figure.keys}
    left = {
        key: value
        for key, value in flattened(metrics)
        if key.partition(".")[0] not in (*ELSEWHERE, "receipt")
        and TWICE.get(key) not in metrics
        and (key.partition(".")[0] not in IN_FILE or key in explained)
    }
    found = []
    for figure in FIGURES:
        if all(key in left for key in figure.keys):
            found.append((figure.label, figure.text([left.pop(key) for key in figure.keys]), figure.reading))
    return found + [(_spelt(key), format_figure(value), f"`{key}` of manifest.json.") for key, value in left.items()]


def by_weight(names: Iterable[str]) -> list[str]:
    """Names of metrics, what a page shows first in front. Of a figure that became another one, what it became is first;
    counts of rows and the like are last."""
    places = {key: (i, -k) for i, figure in reversed([*enumerate(FIGURES)]) for k, key in enumerate(figure.keys)}
    last = len(FIGURES)
    return sorted(names, key=lambda name: places.get(name, (last + (name in ELSEWHERE), 0)))


def describe_scarce(metrics: Mapping[str, Any]) -> str:
    """Return a sentence that names the figures with few observations behind them; empty if there are none."""
    labels = {figure.keys: figure.label for figure in FIGURES}
    names = [
        f"{labels.get((key,), _spelt(key))} ({value['n']})"
        for key, value in flattened(metrics)
        if is_interval(value)
        and value.get("n", FEW) < FEW
        and TWICE.get(key) not in metrics
        and not key.startswith(TASKS)
    ]
    return f"Fewer than {FEW} observations, so that the interval says little: {', '.join(names)}." if names else ""


def _spelt(key: str) -> str:
    words = key.replace("_", " ").replace(".", " ")
    return words[:1].upper() + words[1:]
