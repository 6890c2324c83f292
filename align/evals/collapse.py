"""Detection of collapsed policies, which give nearly the same answer to every prompt.

A policy that games its reward often ends at one phrase. A judge may prefer that phrase everywhere, so that the win rate
rises; this module looks at the answers alone. Answers are compared in a masked form, without case and punctuation, with
numbers and words taken from the prompt replaced, so that a template filled from the prompt counts as one answer.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any, NamedTuple

from align.core.types import Message
from align.data.ngrams import iter_ngrams, tokenize_words
from align.evals.text import compute_distinct_n, quote_beginning
from align.ops.intervals import Interval, mean_interval, proportion_interval
from align.report.figure_text import format_interval, format_percent

COLLAPSED = "collapsed"
VARIED = "varied"
NOT_MEASURED = "not measured"
MASK = "_"
MIN_PROMPTS = 64
"""Minimum number of distinct prompts to decide whether a policy collapsed."""
MAX_SHARE = 0.10
"""Share of a policy's commonest greedy answer above which the policy counts as collapsed, if its reference has a lower
share."""
MAX_IDENTICAL_SHARE = 0.50
"""Share of one answer, compared word for word, above which the policy counts as collapsed, for any share of the
reference: both models may have collapsed alike."""
MIN_DISTINCT = 0.5
"""Minimum number of distinct greedy answers of a policy, relative to its reference's."""
MAX_SENTENCE_SHARE = 0.30
"""Share of greedy answers with one new sentence from which the policy counts as collapsed."""
OWN_WORD_SHARE = 0.05
"""Share of the answers to prompts without a word above which this word is never masked: the policy uses it by
itself."""
CODE = re.compile(r"^```.*?(?:^```|\Z)", re.MULTILINE | re.DOTALL)
"""Pattern of a fenced code block, whose lines are not counted as sentences."""
SENTENCE_END = re.compile(r"[.!?…。！？\n]+")
UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]")
"""Pattern of a letter of Thai, Lao, Burmese, Khmer, Japanese or Chinese, which have no spaces between words."""
UNSPACED_WORDS = re.compile(f"{UNSPACED.pattern}|[^{UNSPACED.pattern[1:-1]}]+")
BETWEEN_UNSPACED = re.compile(f"(?<={UNSPACED.pattern}) (?={UNSPACED.pattern})")
MIN_ECHO_LENGTH = 0.8
"""Minimum length of a completely masked answer that counts as a repetition of its prompt, relative to the prompt's
number of words."""
PHRASE = 4
"""Number of words in a phrase."""
PHRASE_LETTERS = 8
"""Number of letters in a phrase of a script without spaces."""
MAX_CONSTANTS = 8
"""Number of commonest answers that are tried as a constant answer to every prompt."""
MIN_EQUAL_SCORES = 0.9
"""Share of prompts with equal scores from which a policy counts as scoring like a constant answer."""


@dataclass(frozen=True, slots=True)
class Phrase:
    """A masked sentence or phrase, with the shares of the policy's and of the reference's answers that contain it."""

    text: str
    policy: Interval
    ref: Interval


@dataclass(frozen=True, slots=True)
class Variety:
    """The variety of one model's answers across prompts: number of distinct answers and share of the commonest.

    Attributes:
        answers: number of answers, one to each distinct prompt.
        distinct: number of different masked answers.
        commonest: the answer that is given most often, as its first occurrence is written.
        commonest_share: its share, with Wilson's 95 % interval.
        identical_share: share of the answer that is given most often word for word, without case and punctuation.
        distinct2: share of distinct word pairs over all answers.
    """

    answers: int
    distinct: int
    commonest: str
    commonest_share: Interval
    identical_share: Interval
    distinct2: float


class Collapse(NamedTuple):
    """The verdict on a policy's variety, with reasons: `collapsed` if it gives few different texts, `varied` or `not
    measured`."""

    verdict: str
    reasons: tuple[str, ...]

    @property
    def is_collapsed(self) -> bool:
        return self.verdict == COLLAPSED

    def as_dict(self) -> dict[str, Any]:
        return {"verdict": self.verdict, "reasons": list(self.reasons)}


class SystemAnswers(NamedTuple):
    """The sampled and greedy answers of one model, one of each per prompt.

    Attributes:
        sampled: at the temperature of the run, or from a file.
        greedy: by greedy decoding. None if the system has no such answers.
        no_greedy: why it has none.
    """

    sampled: Sequence[str]
    greedy: Sequence[str] | None = None
    no_greedy: str = ""

    def select(self, rows: Sequence[int]) -> SystemAnswers:
        greedy = None if self.greedy is None else [self.greedy[row] for row in rows]
        return self._replace(sampled=[self.sampled[row] for row in rows], greedy=greedy)

    @property
    def best(self) -> Sequence[str]:
        """The greedy answers, or the sampled ones if none exist."""
        return self.sampled if self.greedy is None else self.greedy


@dataclass(frozen=True, slots=True)
class VarietyComparison:
    """The variety of a policy's and of its reference's answers to the same prompts, with the commonest new sentence and
    phrase."""

    policy: Variety
    ref: Variety | None
    new_sentence: Phrase | None
    new_phrase: Phrase | None

    def as_dict(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if key != "ref" or value}


class Measurement(NamedTuple):
    """A collapse verdict on a policy and the figures behind it. `variety` maps `greedy` and `sampled` to the comparison
    with the reference."""

    collapse: Collapse
    variety: Mapping[str, VarietyComparison]

    def as_dict(self) -> dict[str, Any]:
        variety = {how: comparison.as_dict() for how, comparison in self.variety.items()}
        return {"variety": variety, "collapse": self.collapse.as_dict()}


def measure_collapse(
    prompts: Sequence[str], policy: SystemAnswers, ref: SystemAnswers | None, reference: str = "start"
) -> Measurement:
    """Measure how much a policy's answers vary between distinct prompts, and decide whether it collapsed.

    The verdict is based on greedy answers. For a policy without any, sampled answers can show that it collapsed, but
    not that it did not: answers at temperature 0 vary less.

    Args:
        prompts: one for each answer. Of several answers to one prompt, the first counts.
        ref: answers of the system that the policy is compared with. Without one, only the share of the commonest answer
            is judged.
        reference: the name of that system, for the reasons.

    Raises:
        ValueError: there are no prompts.
    """
    rows = find_distinct_prompts(prompts)
    prompts = [prompts[row] for row in rows]
    policy = policy.select(rows)
    ref = ref.select(rows) if ref else None
    variety = {"sampled": compare_variety(prompts, policy.sampled, ref and ref.sampled)}
    if policy.greedy is None:
        collapse = judge_variety_comparison(variety["sampled"], reference, "answers")
        return Measurement(replace_varied_verdict(collapse, policy.no_greedy), variety)
    variety["greedy"] = compare_variety(prompts, policy.greedy, ref and ref.best)
    return Measurement(judge_variety_comparison(variety["greedy"], reference, "greedy answers"), variety)


def replace_varied_verdict(collapse: Collapse, reason: str) -> Collapse:
    """Replace the verdict `varied` by `not measured`, because the policy has no greedy answers. `reason` says why it
    has none. Other verdicts are returned as they are."""
    if collapse.verdict != VARIED:
        return collapse
    return Collapse(NOT_MEASURED, (f"no answers at temperature 0: {reason}",))


def compare_variety(prompts: Sequence[str], policy: Sequence[str], ref: Sequence[str] | None) -> VarietyComparison:
    """Measure the variety of a policy's and of a reference's answers to the same prompts, and find the commonest new
    sentence and phrase. If `ref` is `None`, only the policy is measured."""
    if ref is None:
        return VarietyComparison(measure_variety(prompts, policy), None, None, None)
    return VarietyComparison(
        measure_variety(prompts, policy),
        measure_variety(prompts, ref),
        find_commonest_new_sentence(prompts, policy, ref),
        find_commonest_new_phrase(prompts, policy, ref),
    )


def judge_variety_comparison(comparison: VarietyComparison, reference: str, answers: str) -> Collapse:
    """Decide from a comparison with the reference whether the policy collapsed to few texts. `answers` names the kind
    of answers in the reasons."""
    ref = comparison.ref
    share = ref.commonest_share.value if ref else 0.0
    name = reference if ref else ""
    return judge_collapse(comparison.policy, ref.distinct if ref else 0, share, comparison.new_sentence, name, answers)


def combine_verdicts(verdicts: Mapping[str, Collapse]) -> Collapse:
    """Combine a model's collapse verdicts on several tasks: `collapsed` if any task has it, else `varied` if any has
    it, else `not measured`.

    Args:
        verdicts: name of a task → the verdict on the answers to it.
    """
    for verdict in (COLLAPSED, VARIED, NOT_MEASURED):
        reasons: dict[str, None] = {}
        for name, collapse in verdicts.items():
            if collapse.verdict == verdict:
                where = f"on {name} " if verdict == COLLAPSED else ""
                reasons |= dict.fromkeys(f"{where}{reason}" for reason in collapse.reasons)
        if verdict in (collapse.verdict for collapse in verdicts.values()):
            return Collapse(verdict, tuple(reasons))
    return Collapse(NOT_MEASURED, ("no task asks for answers",))


def describe_collapse(verdicts: Mapping[str, Collapse]) -> list[str]:
    """Return warning lines about the models that collapsed to few texts, and about the models that could not be
    measured.

    Args:
        verdicts: name of a system → its verdict. The name of a collapsed system is left out if it is the only system.
    """
    collapsed = []
    unmeasured: dict[str, list[str]] = {}
    for name, collapse in verdicts.items():
        reasons = "; ".join(collapse.reasons)
        if collapse.verdict == COLLAPSED:
            collapsed.append(f"{name}: {reasons}" if len(verdicts) > 1 else reasons)
        if collapse.verdict == NOT_MEASURED:
            unmeasured.setdefault(reasons, []).append(name)
    lines = [f"COLLAPSED: {'; '.join(collapsed)}. The win rate below does not count as success."] if collapsed else []
    for reasons, names in unmeasured.items():
        lines.append(f"whether {' or '.join(names)} collapsed is not measured: {reasons}")
    return lines


def describe_new_phrase(collapse: Collapse, phrase: Mapping[str, Any] | None, reference: str) -> list[str]:
    """Return a line about a phrase that is in many greedy answers of a policy and significantly rarer in the
    reference's.

    They are shown for information only: a constant clause in sentences that differ may be the wording of a trained
    answer. Returns nothing if the policy collapsed, or was not measured.

    Args:
        phrase: `new_phrase` of the greedy answers, see `Phrase.as_dict`.
    """
    if collapse.verdict != VARIED or phrase is None or phrase["policy"]["value"] < MAX_SENTENCE_SHARE:
        return []
    shares = f"{phrase['policy']['value']:.0%} of the greedy answers ({reference}: {phrase['ref']['value']:.0%})"
    return [f"the words “{phrase['text']}” are in {shares}"]


def get_prompt_text(messages: Iterable[Message]) -> str:
    """Join the contents of a prompt's messages, except system messages."""
    return " ".join(message.content for message in messages if message.role != "system")


def find_distinct_prompts(prompts: Sequence[str]) -> list[int]:
    """Return the index of the first occurrence of each distinct prompt, ignoring case and spacing."""
    indices: dict[str, int] = {}
    for index, prompt in enumerate(prompts):
        indices.setdefault(" ".join(prompt.casefold().split()), index)
    return list(indices.values())


def split_words(text: str) -> list[str]:
    """Split a text into words in lower case. In a script without spaces, such as Chinese, each letter is a word."""
    parts: list[str] = []
    for word in tokenize_words(text):
        parts += UNSPACED_WORDS.findall(word) if UNSPACED.search(word) else [word]
    return parts


def join_words(sentence: Sequence[str]) -> str:
    """Join words into a text with spaces, but without spaces between letters of a script that has none, such as
    Chinese."""
    return BETWEEN_UNSPACED.sub("", " ".join(sentence))


def mask_answers(prompts: Sequence[str], answers: Sequence[str]) -> list[list[list[str]]]:
    """Split each answer into sentences of lower-case words, and mask words of its prompt and numbers. Returns answers,
    their sentences, and the words of each sentence.

    Numbers become `0`, and words of the prompt become `_`, several in a row one `_`. Two kinds of words are not masked,
    because a constant phrase would otherwise differ between answers whose prompts happen to contain one of its words:
    words in more than 5 % of the answers to prompts without them, and words in more than half of the prompts.
    """
    prompt_words = [set(split_words(prompt)) for prompt in prompts]
    sentences = [
        [sentence for part in SENTENCE_END.split(answer) if (sentence := split_words(part))] for answer in answers
    ]
    answer_counts: Counter[str] = Counter()
    for in_prompt, parts in zip(prompt_words, sentences, strict=True):
        answer_counts.update({word for part in parts for word in part} - in_prompt)
    prompt_counts = Counter(word for in_prompt in prompt_words for word in in_prompt)
    total = len(prompts)
    unmasked = {
        word for word, count in answer_counts.items() if count > OWN_WORD_SHARE * max(1, total - prompt_counts[word])
    }
    unmasked |= {word for word, count in prompt_counts.items() if count > total / 2}
    return [
        [_mask_words(part, in_prompt - unmasked) for part in parts]
        for in_prompt, parts in zip(prompt_words, sentences, strict=True)
    ]


def _mask_words(sentence: Sequence[str], masked_words: set[str]) -> list[str]:
    masked: list[str] = []
    for word in sentence:
        shown_word = MASK if word in masked_words else "0" if word.isdecimal() else word
        if shown_word != MASK or masked[-1:] != [MASK]:
            masked.append(shown_word)
    return masked


def measure_variety(prompts: Sequence[str], answers: Sequence[str]) -> Variety:
    """Measure how much answers vary across distinct prompts: number of distinct answers, share of the commonest, and
    distinct bigrams.

    Raises:
        ValueError: there are no answers.
    """
    keys = [
        build_comparison_key(prompt, answer, parts)
        for prompt, answer, parts in zip(prompts, answers, mask_answers(prompts, answers), strict=True)
    ]
    counts = Counter(keys)
    commonest_key, count = counts.most_common(1)[0] if counts else ("", 0)
    if not count:
        raise ValueError("no answers to measure")
    texts = [" ".join(split_words(answer)) or answer.strip() for answer in answers]
    return Variety(
        answers=len(answers),
        distinct=len(counts),
        commonest=answers[keys.index(commonest_key)],
        commonest_share=proportion_interval([float(key == commonest_key) for key in keys]),
        identical_share=_compute_share(Counter(texts).most_common(1)[0][1], len(texts)),
        distinct2=compute_distinct_n(answers, 2),
    )


def build_comparison_key(prompt: str, answer: str, sentences: Sequence[Sequence[str]]) -> str:
    """Return a key that is equal for answers that count as the same: the masked sentences in sorted order, without
    immediate repetitions of a word.

    For an answer that is masked completely, return its words, so that numbers and quotations from the prompt differ; or
    return the mask if the answer repeats the prompt.
    """
    if any(word not in (MASK, "0") for sentence in sentences for word in sentence):
        return " / ".join(sorted({" ".join(word for word, _ in groupby(sentence)) for sentence in sentences}))
    answer_words = split_words(answer)
    return MASK if len(answer_words) >= MIN_ECHO_LENGTH * len(split_words(prompt)) else " ".join(answer_words)


def find_commonest_new_sentence(prompts: Sequence[str], policy: Sequence[str], ref: Sequence[str]) -> Phrase | None:
    """Find the commonest masked sentence whose share is significantly higher among the policy's answers than among the
    reference's. The intervals of both shares must not overlap.

    Sentences need two words that are not masked, and code contains no sentences. Returns None if there is no such
    sentence.
    """
    sides = [
        [
            {join_words(part) for part in parts if sum(word != MASK for word in part) > 1}
            for parts in mask_answers(prompts, texts)
        ]
        for texts in ([CODE.sub("\n", answer) for answer in answers] for answers in (policy, ref))
    ]
    return _find_commonest_new(*sides)


def find_commonest_new_phrase(prompts: Sequence[str], policy: Sequence[str], ref: Sequence[str]) -> Phrase | None:
    """Find the commonest four words in a row that are significantly more frequent in the policy's answers than in the
    reference's. In a script without spaces the phrase has eight letters. Returns None if there is no such phrase."""
    sides = [
        [{phrase for part in parts for phrase in _iter_phrases(part)} for parts in mask_answers(prompts, answers)]
        for answers in (policy, ref)
    ]
    return _find_commonest_new(*sides)


def _iter_phrases(sentence: Sequence[str]) -> Iterator[str]:
    for phrase in iter_ngrams(sentence, PHRASE):
        if not any(UNSPACED.match(word) for word in phrase):
            yield join_words(phrase)
    for phrase in iter_ngrams(sentence, PHRASE_LETTERS):
        if any(UNSPACED.match(word) for word in phrase):
            yield join_words(phrase)


def judge_against_constant(policy: Interval, constant: str) -> Collapse:
    """Return the verdict `collapsed` unless a policy's scores significantly beat those of the best constant answer. It
    is for closed tasks, where many prompts may have one right answer.

    Args:
        policy: the difference of the policy's score and that of the constant answer, over prompts.
        constant: the answer with the best score if it is given to every prompt.
    """
    if policy.n < MIN_PROMPTS:
        return Collapse(NOT_MEASURED, (f"{policy.n} distinct prompts, {MIN_PROMPTS} are needed",))
    if policy.value > 0 and (policy.low is None or policy.low > 0):  # no interval if all differences are equal
        return Collapse(VARIED, ())
    difference = format_interval(policy.as_dict())
    every = f"{quote_beginning(constant)}, given as the answer to every prompt"
    reason = f"it is not shown to beat {every} (difference {difference})"
    return Collapse(COLLAPSED, (reason,))


def _find_commonest_new(policy: Sequence[set[str]], ref: Sequence[set[str]]) -> Phrase | None:
    counts = Counter(text for texts in policy for text in texts)
    ref_counts = Counter(text for texts in ref for text in texts)
    for text, count in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])):
        share = _compute_share(count, len(policy))
        if not _is_above(share, _compute_share(0, len(ref))):  # texts in fewer answers are not above it either
            return None
        ref_share = _compute_share(ref_counts[text], len(ref))
        if _is_above(share, ref_share):
            return Phrase(text, share, ref_share)
    return None


def _is_above(share: Interval, other: Interval) -> bool:
    assert share.low is not None  # a share always has an interval
    assert other.high is not None
    return share.low > other.high


def _compute_share(count: int, total: int) -> Interval:
    return proportion_interval([1.0] * count + [0.0] * (total - count))


def judge_collapse(
    policy: Variety,
    ref_distinct: int,
    ref_share: float,
    sentence: Phrase | None = None,
    reference: str = "start",
    answers: str = "greedy answers",
) -> Collapse:
    """Decide from the variety of a policy's and its reference's answers whether the policy collapsed to few texts.

    Args:
        ref_distinct: number of different masked answers of the reference. 0 without a reference.
        ref_share: share of the reference's commonest answer. 0 without a reference.
        sentence: see `find_commonest_new_sentence`.
        reference: the name of the reference, for the reasons. Empty without one.
        answers: the name of the policy's answers, for the reasons.

    Returns:
        `not measured` below 64 distinct prompts. `collapsed` if the low end of the commonest answer's share is above 10
        % and above the reference's share; or if one answer is given word for word to more than 50 %; or if the policy
        has less than half of the reference's distinct answers; or if a new sentence is in 30 % of the answers or more.
    """
    if policy.answers < MIN_PROMPTS:
        return Collapse(NOT_MEASURED, (f"{policy.answers} distinct prompts, {MIN_PROMPTS} are needed",))
    reasons = []
    share = policy.commonest_share
    assert share.low is not None
    assert policy.identical_share.low is not None
    if share.low > MAX_SHARE and (share.low > ref_share or policy.identical_share.low > MAX_IDENTICAL_SHARE):
        compared = f" ({reference}: {ref_share:.0%} for its commonest)" if reference else ""
        reasons.append(
            f"{format_percent(share.as_dict())} of its {answers} are alike: "
            f"{quote_beginning(policy.commonest)}{compared}"
        )
    if policy.distinct < MIN_DISTINCT * ref_distinct:
        reasons.append(f"{policy.distinct} different {answers}, where the {reference} has {ref_distinct}")
    if sentence and sentence.policy.value >= MAX_SENTENCE_SHARE:
        reasons.append(
            f"“{sentence.text}” is in {sentence.policy.value:.0%} of its {answers} ({reference}: "
            f"{sentence.ref.value:.0%})"
        )
    return Collapse(COLLAPSED if reasons else VARIED, tuple(reasons))


def judge_closed_task(
    score: Callable[[Sequence[str]], Sequence[float]],
    policy: SystemAnswers,
    ref: SystemAnswers | None,
    best_score: float | None = None,
) -> Collapse:
    """Decide whether a policy collapsed on a closed task, such as a classification, where many prompts may have one
    right answer. It collapsed if it does not significantly beat the best constant answer, and it gives one answer often
    or scores as the constant answer does.

    Constant answers are chosen from the commonest ones of the policy and its reference.

    Args:
        score: scores one answer to each prompt.
        policy, ref: their answers, one to each distinct prompt.
        best_score: the highest score that an answer can have. None if there is no such limit.
    """
    answers = policy.best
    if len(answers) < MIN_PROMPTS:
        return Collapse(NOT_MEASURED, (f"{len(answers)} distinct prompts, {MIN_PROMPTS} are needed",))
    counts = Counter([*answers, *(ref.best if ref else ())])
    constants = [text for text, _ in counts.most_common(MAX_CONSTANTS)]
    scores = {text: list(score([text] * len(answers))) for text in constants}
    constant = max(constants, key=lambda text: sum(scores[text]))
    if best_score is not None and min(scores[constant]) >= best_score:
        return Collapse(NOT_MEASURED, (f"{quote_beginning(constant)} is right for every prompt",))
    policy_scores = list(score(answers))
    collapse = judge_against_constant(
        mean_interval([a - b for a, b in zip(policy_scores, scores[constant], strict=True)]), constant
    )
    if best_score is not None and min(policy_scores) >= best_score:
        collapse = Collapse(VARIED, ())
    if collapse.is_collapsed and not (
        has_majority_answer(answers) or has_scores_of_constant(policy_scores, scores[constant])
    ):
        collapse = Collapse(VARIED, ())
    return replace_varied_verdict(collapse, policy.no_greedy) if policy.greedy is None else collapse


def has_majority_answer(answers: Sequence[str]) -> bool:
    """Return whether one answer, compared without case and punctuation, is given to significantly more than half of the
    prompts."""
    keys = [" ".join(tokenize_words(answer)) or answer.strip() for answer in answers]
    count = Counter(keys).most_common(1)[0][1]
    low = _compute_share(count, len(answers)).low
    assert low is not None
    return low > MAX_IDENTICAL_SHARE


def has_scores_of_constant(policy_scores: Sequence[float], constant_scores: Sequence[float]) -> bool:
    """Return whether a policy's scores equal those of one constant answer on at least 90 % of the prompts. The same has
    to hold for the prompts on which the constant answer does not have its commonest score. Then the policy's answers
    are the constant one in other words."""
    commonest_score = Counter(constant_scores).most_common(1)[0][0]
    equal = [a == b for a, b in zip(policy_scores, constant_scores, strict=True)]
    rare = [same for same, score in zip(equal, constant_scores, strict=True) if score != commonest_score]
    return bool(rare) and all(sum(part) >= MIN_EQUAL_SCORES * len(part) for part in (equal, rare))
