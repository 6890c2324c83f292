"""Preference pairs and feedback for training: read from files, a data set or the annotation store, divided by prompt,
and tokenised."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from align.annotate.store import Store
from align.annotate.store.preference_pairs import LoadPairs, load_human_verdicts, load_preferences
from align.annotate.store.vote_selection import VoteSelection
from align.core.errors import InputError, require
from align.core.types import Conversation, Feedback, Message, Preference
from align.data.chat.encode import count_prompt_tokens, encode_for_reward_model, is_surely_too_long
from align.data.read.column_rules import ColumnRules
from align.data.read.content import FEEDBACK, PREFERENCES, join_answer
from align.data.read.drops import BadRows
from align.data.read.records import iter_valid_groups, read_feedback, read_preferences
from align.data.read.shapes import find_shape
from align.data.sets.published import load_data_set
from align.data.sources import FILES, MANIFEST, DataSource, build_data_inputs, prepare_record
from align.data.split import (
    Judged,
    TrainTest,
    compute_question_key,
    exclude_test_questions,
    select_held_out_keys,
    split_by_group,
)
from align.run import Input

T = TypeVar("T")
Judgements = Sequence[Preference] | Sequence[Feedback]


@dataclass(frozen=True, slots=True)
class TokenizedPair:
    """A prompt with its chosen and with its rejected answer, as token ids.

    Attributes:
        chosen_ids, rejected_ids: prompt and answer, each ending where a score is read.
        chosen_start, rejected_start: index of the first token of the answer.
        label: probability that the chosen answer is better, 1 without soft labels and label smoothing.
    """

    chosen_ids: list[int]
    rejected_ids: list[int]
    chosen_start: int = 0
    rejected_start: int = 0
    label: float = 1.0


@dataclass(frozen=True, slots=True)
class TokenizedAnswer:
    """A prompt and its answer as token ids, with the label that says whether the answer is desirable (for KTO).

    Attributes:
        ids: prompt and answer.
        start: index of the first token of the answer.
        wanted: the label.
        weight: of its loss.
    """

    ids: list[int]
    start: int
    wanted: bool
    weight: float = 1.0

    @property
    def prompt(self) -> list[int]:
        return self.ids[: self.start]


class RecordKind(NamedTuple):
    """A kind of records, preference pairs or feedback, with the function that reads a file of them.

    Attributes:
        kind: see `align.data.read.content.get_record_kind`.
        noun: `pairs` or `answers`, for messages.
        read_file: function of (path, setting, whether to skip refused rows, column rules) that returns the records of a
            file.
    """

    kind: str
    noun: str
    read_file: Callable[[str, str, bool, ColumnRules], list[Any]]


PAIR_KIND = RecordKind(PREFERENCES, "pairs", read_preferences)
ANSWER_KIND = RecordKind(FEEDBACK, "answers", read_feedback)


@dataclass(frozen=True, slots=True)
class VoteSource:
    """The votes of an annotation project that pairs are made of. Only the source `annotations` reads them.

    Attributes:
        url: URL of the annotation store.
        selection: the annotators whose votes count.
        through: number of the last row of the ledger that counts; None for all.
        load_pairs: function of the store, project, selection and `through` that returns the preference pairs:
            `load_preferences`, or `load_soft_preferences` for pairs with posteriors.
    """

    url: str = field(repr=False)
    project: str
    selection: VoteSelection
    through: int | None = None
    load_pairs: LoadPairs = load_preferences


def build_pair_inputs(data: DataSource, store: str, project: str) -> dict[str, Input]:
    """Return the data inputs for the manifest of a run on pairs: the head of the annotation project's ledger, or the
    digests of the data files.

    Args:
        data: the source.
        store: URL of the annotation store.
        project: project of the votes.
    """
    if data.name != "annotations":
        return build_data_inputs(data)
    with Store.open(store, create_if_missing=False) as votes:
        head = votes.head(project)
    return {"data": Input(head.hash, project=project, seq=head.seq)}


def read_split_records(data: DataSource, split: str, kind: RecordKind, alternative: str = "") -> list[Any]:
    """Return the records of one split of a published data set, or raise InputError if it holds another kind of records.

    Args:
        data: the source.
        split: `train` or `test`.
        kind: the kind that the stage reads.
        alternative: second half of the remedy if the split is empty.

    Raises:
        InputError: the data set holds another kind, or no records to measure on.
    """
    rows = load_data_set(Path(data.path or ""))
    problem = f"holds {rows.kind}, but this stage reads {kind.kind}"
    remedy = f"Name a data set that was made of {kind.noun}."
    require(rows.kind == kind.kind, "data.path", data.path, problem, remedy)
    records = rows.load_records(split)
    noun = kind.noun.removesuffix("s")
    remedy = f"Make it with data.held_out above 0{alternative}."
    require(split == "train" or bool(records), "data.path", data.path, f"has no {noun} to measure on", remedy)
    return records


def read_pairs(data: DataSource, votes: VoteSource, seed: int = 0) -> list[Preference]:
    """Return the preference pairs to train on, from the annotation store, a file, or the train split of a data set. At
    most `data.limit` pairs are sampled."""
    if data.name == "annotations":
        with Store.open(votes.url, create_if_missing=False) as store:
            pairs = votes.load_pairs(store, votes.project, votes.selection, votes.through)
        return sample_records(pairs, data.limit, seed)
    return sample_records(read_records(data, "train", PAIR_KIND), data.limit, seed)


def read_records(data: DataSource, split: str, kind: RecordKind) -> list[Any]:
    """Return all records of a file, or the records of one split of a data set. A file has no splits, so that `split` is
    ignored."""
    if data.name == MANIFEST:
        return read_split_records(data, split, kind)
    return kind.read_file(data.path or "", "data.path", data.skip_bad_rows, data.rules)


class JudgedPairs(NamedTuple):
    """Pairs with a known verdict, divided into pairs with a preferred answer and pairs whose answers people called
    equal."""

    decided: list[Preference]
    tied: list[Preference]


def read_judged_pairs(data: DataSource, votes: VoteSource) -> JudgedPairs:
    """Return the decided and the tied pairs to measure a judge on, from the annotation store, a file, or the test split
    of a data set. Files and data sets have no tied pairs.

    Raises:
        InputError: there are no pairs.
    """
    if data.name == "annotations":
        with Store.open(votes.url, create_if_missing=False) as store:
            return JudgedPairs(*load_human_verdicts(store, votes.project, votes.selection, votes.through))
    return JudgedPairs(read_records(data, "test", PAIR_KIND), [])


def read_held_out_feedback(data: DataSource) -> list[Feedback]:
    """Return all feedback of a file, or the test split's feedback of a data set, with the settings for system prompt
    and reasoning applied.

    Raises:
        InputError: there is no feedback, or a row is something else.
        CorruptFile: a file is cut or damaged.
    """
    return [prepare_record(answer, data) for answer in read_records(data, "test", ANSWER_KIND)]


def sample_records(records: list[T], limit: int | None, seed: int) -> list[T]:
    """Return a random sample of `limit` records in their original order, or all records if there are not more or
    `limit` is `None`."""
    if limit is None or limit >= len(records):
        return records
    return [records[i] for i in sorted(random.Random(seed).sample(range(len(records)), limit))]


def split_pairs(
    prefs: Sequence[Judged], data: DataSource, held_out: float, seed: int, kind: RecordKind = PAIR_KIND
) -> TrainTest[Judged]:
    """Divide pairs or feedback into a train and a test split that share no prompt and no ranking. If `data.eval_path`
    is set, its records are the test split. A data set has fixed splits. For a file, records with questions that
    `stage=eval` will ask are moved to the test split.

    Raises:
        InputError: no record is left to train on.
    """
    noun = kind.noun.removesuffix("s")
    if data.name == MANIFEST and not data.eval_path:  # it has fixed splits
        test = read_split_records(data, "test", kind, alternative=f", or name {kind.noun} in data.eval_path")
        return TrainTest(list(prefs), sample_records(test, data.limit, seed))
    if data.eval_path:
        test = sample_records(
            kind.read_file(data.eval_path, "data.eval_path", data.skip_bad_rows, data.rules), data.limit, seed
        )
        train = exclude_test_questions(prefs, test, kind.noun)
        problem = f"has all questions of {data.path}, which leaves no {noun} to train on"
        require(bool(train), "data.eval_path", data.eval_path, problem, f"Give other {kind.noun} to measure on.")
        return TrainTest(train, test)
    train, test = split_by_group(prefs, held_out, seed)
    if data.name == FILES:
        held_out_keys = select_held_out_keys([*map(compute_question_key, prefs)], data.held_out)
        test += [pref for pref in train if compute_question_key(pref) in held_out_keys]
        train = [pref for pref in train if compute_question_key(pref) not in held_out_keys]
        require(bool(train), "data.held_out", data.held_out, f"leaves no {noun} to train on", "Lower it.")
    return TrainTest(train, test)


def read_divided_preferences(data: DataSource, votes: VoteSource, held_out: float, seed: int) -> TrainTest[Preference]:
    """Read the source's preference pairs, and divide them into a train and a test split that share no prompt, see
    `split_pairs`."""
    splits = split_pairs(read_pairs(data, votes, seed), data, held_out, seed)
    return TrainTest(*([prepare_record(pref, data) for pref in split] for split in splits))


def read_divided_judgements(
    data: DataSource, votes: VoteSource, held_out: float, seed: int
) -> TrainTest[Preference] | TrainTest[Feedback]:
    """Read the source's feedback, or its preference pairs if it has no labels, and divide the records into a train and
    a test split. See `split_pairs`. Raises InputError if the labels of the feedback to train on do not vary."""
    if not has_labels(data):
        return read_divided_preferences(data, votes, held_out, seed)
    problem = f"is about preference pairs, and {data.path} holds labelled answers"
    require(not data.soft_labels, "data.soft_labels", True, problem, "Drop it, or give pairs with a posterior.")
    answers = sample_records(read_records(data, "train", ANSWER_KIND), data.limit, seed)
    splits = split_pairs(answers, data, held_out, seed, ANSWER_KIND)
    check_labels_vary([answer.label for answer in splits.train], [answer.prompt for answer in splits.train], data.path)
    return TrainTest(*([prepare_record(answer, data) for answer in split] for split in splits))


def has_labels(data: DataSource) -> bool:
    """Return whether the source is read as feedback, which has labels, instead of preference pairs. For a file, the
    first row with a shape decides: any shape except a pair's counts as feedback, so that a wrong label is reported as
    such. If no row has a shape, a column `label` decides."""
    if data.name == MANIFEST:
        return load_data_set(Path(data.path or "")).kind == FEEDBACK
    if data.name != FILES:
        return False
    has_label_column = False
    for group in iter_valid_groups(data.path or "", "data.path", BadRows(skips=True), data.rules):
        if shape := find_shape(group[0].data):
            return shape.kind != PREFERENCES
        has_label_column = has_label_column or "label" in group[0].data
    return has_label_column


def check_labels_vary(labels: Sequence[bool], prompts: Sequence[Any], path: str | None) -> None:
    """Raise InputError if all answers to train on with KTO have the same label, or the same prompt.

    Args:
        labels: label of each answer.
        prompts: prompt of each answer.
        path: the file, for errors.
    """
    desirable_count = sum(labels)
    if desirable_count in (0, len(labels)):
        common, missing_label = ("wanted", "false") if desirable_count else ("unwanted", "true")
        problem = f"labels all {len(labels)} answers to train on as {common}: KTO learns from both kinds"
        remedy = f"Add answers with label {missing_label}; stage=sft imitates answers."
        raise InputError("data.path", path, problem, remedy)
    problem = "has answers to one prompt alone to train on, and KTO compares them with answers to others"
    require(any(prompt != prompts[0] for prompt in prompts), "data.path", path, problem, "Give more prompts.")


class EncodedPairs(NamedTuple):
    """The pairs that are short enough, with their token ids, and the number of pairs that were left out.

    Attributes:
        pairs: each pair that is short enough.
        too_long: number of pairs that were left out for their length.
    """

    pairs: list[tuple[Preference, TokenizedPair]]
    too_long: int


class EncodedPairSplits(NamedTuple):
    """The pairs of the train and of the test split with their token ids, and their counts for the run's metrics.

    Attributes:
        train, test: the pairs of each split.
        counts: metric name → number of pairs, encoded or left out.
    """

    train: list[tuple[Preference, TokenizedPair]]
    test: list[tuple[Preference, TokenizedPair]]
    counts: dict[str, int]


def encode_pair_splits(
    tokenizer: Any, splits: Sequence[Sequence[Preference]], stop_token_ids: tuple[int, ...], max_length: int
) -> EncodedPairSplits:
    """Tokenise the pairs of the train and of the test split, leave out pairs of more than `max_length` tokens, and
    count both. See `encode_pairs`. The counts are for the run's metrics.

    Args:
        splits: the pairs to train on, and those to measure on.
    """
    (train, dropped), (test, dropped_test) = (
        encode_pairs(tokenizer, prefs, stop_token_ids, max_length) for prefs in splits
    )
    counts = {"pairs": len(train), "held_out_pairs": len(test), "dropped": dropped, "held_out_dropped": dropped_test}
    return EncodedPairSplits(train, test, counts)


def encode_pairs(
    tokenizer: Any, prefs: Sequence[Preference], stop_token_ids: tuple[int, ...], max_length: int
) -> EncodedPairs:
    """Tokenise preference pairs, except for pairs with more than `max_length` tokens in the prompt and one answer, and
    count the excluded pairs.

    Args:
        tokenizer: of the model.
        prefs: the pairs.
        stop_token_ids: ids of the tokens that end an answer.
        max_length: maximum tokens of prompt and answer.

    Raises:
        InputError: all pairs are too long, or an answer is not one assistant turn.
    """
    encoded = []
    cache: dict[tuple[Any, ...], JudgedAnswer] = {}  # an answer may be in many pairs

    def encode(pref: Preference, answer_name: str) -> JudgedAnswer:
        answer = getattr(pref, answer_name)
        ended = getattr(pref, f"{answer_name}_ended")
        key = (pref.prompt, pref.tools, answer, ended)
        if key not in cache:
            cache[key] = encode_judged_answer(
                tokenizer, Conversation(pref.prompt, pref.id, pref.tools), answer, ended, stop_token_ids
            )
        return cache[key]

    for pref in prefs:
        if any(
            is_surely_too_long(tokenizer, join_answer(pref, answer), max_length)
            for answer in (pref.chosen, pref.rejected)
        ):
            continue
        chosen_ids, chosen_start = encode(pref, "chosen")
        rejected_ids, rejected_start = encode(pref, "rejected")
        if max(len(chosen_ids), len(rejected_ids)) <= max_length:
            label = 1.0 if pref.posterior is None else pref.posterior
            encoded.append((pref, TokenizedPair(chosen_ids, rejected_ids, chosen_start, rejected_start, label)))
    return EncodedPairs(encoded, count_too_long(prefs, encoded, max_length, "pairs"))


class EncodedAnswers(NamedTuple):
    """The answers with labels that are short enough, with their token ids, and the number of answers that were left
    out.

    Attributes:
        answers: each answer that is short enough.
        too_long: number of answers that were left out for their length.
    """

    answers: list[tuple[Feedback, TokenizedAnswer]]
    too_long: int


def encode_answers(
    tokenizer: Any, answers: Sequence[Feedback], stop_token_ids: tuple[int, ...], max_length: int
) -> EncodedAnswers:
    """Tokenise answers with a label (KTO), except for answers with more than `max_length` tokens including the prompt,
    and count the excluded ones.

    Raises:
        InputError: all answers are too long.
    """
    encoded = []
    for answer in answers:
        if is_surely_too_long(tokenizer, join_answer(answer, answer.completion), max_length):
            continue
        prompt = Conversation(answer.prompt, answer.id, answer.tools)
        ids, start = encode_judged_answer(tokenizer, prompt, answer.completion, True, stop_token_ids)
        if len(ids) <= max_length:
            encoded.append((answer, TokenizedAnswer(ids, start, answer.label)))
    return EncodedAnswers(encoded, count_too_long(answers, encoded, max_length, "answers"))


def count_too_long(records: Sequence[Any], encoded: Sequence[Any], max_length: int, noun: str) -> int:
    """Return the number of records that were left out of `encoded` as too long, or raise InputError if all were."""
    problem = f"all {len(records)} {noun} are longer"
    require(bool(encoded), "data.max_length", max_length, problem, f"Raise it, or give shorter {noun}.")
    return len(records) - len(encoded)


class JudgedAnswer(NamedTuple):
    """Token ids of a prompt and its answer, up to the token where a reward model reads the score.

    Attributes:
        answer_start: index of the first token of the answer.
    """

    ids: list[int]
    answer_start: int


def encode_judged_answer(
    tokenizer: Any,
    context: Conversation,
    turns: Sequence[Message],
    has_end_token: bool,
    stop_token_ids: tuple[int, ...],
) -> JudgedAnswer:
    """Return the token ids of a prompt and its answer as a reward model scores them, and the index of the answer's
    first token.

    Args:
        tokenizer: of the model.
        context: the conversation up to where the answer is due.
        turns: the answer, with tool turns before its last turn.
        has_end_token, stop_token_ids: see `encode_for_reward_model`.
    """
    *earlier_turns, last_turn = turns
    prompt = replace(context, messages=(*context.messages, *earlier_turns))
    ids = encode_for_reward_model(tokenizer, prompt, replace(last_turn, trained=True), has_end_token, stop_token_ids)
    return JudgedAnswer(ids, count_prompt_tokens(tokenizer, prompt, ids))


def smooth_labels(pairs: Sequence[TokenizedPair], label_smoothing: float) -> list[TokenizedPair]:
    """Return pairs with the labels that they have if a share `label_smoothing` of labels is swapped."""
    return [
        replace(pair, label=(1 - label_smoothing) * pair.label + label_smoothing * (1 - pair.label)) for pair in pairs
    ]


def iter_labelled_answers(pairs: Sequence[TokenizedPair]) -> Iterator[TokenizedAnswer]:
    """Yield both answers of each pair as labelled answers for KTO: the chosen one as desirable, the rejected one as
    undesirable, or the reverse if the pair's label is below 0.5.

    Both have the weight |2 · label − 1|. This is the expected loss of answers that are desirable with the probability
    `label` (rejected: 1 − `label`), except for a constant, because the losses of both kinds of one answer add up to a
    constant if both kinds have the same weight.
    """
    for pair in pairs:
        is_chosen_better = pair.label >= 0.5
        weight = abs(2 * pair.label - 1)
        yield TokenizedAnswer(pair.chosen_ids, pair.chosen_start, is_chosen_better, weight)
        yield TokenizedAnswer(pair.rejected_ids, pair.rejected_start, not is_chosen_better, weight)


def choose_mismatched_answers(batch: Sequence[int], rows: Sequence[TokenizedAnswer]) -> list[list[int]]:
    """Return for each row of a batch the token ids of an answer to another prompt, for KTO's KL estimate. As in TRL, it
    is the answer of the row before it, and for the first row that of the last; rows with the same prompt are skipped.
    If the batch has no other prompt, the answer comes from the rest of the data.

    Args:
        batch: indices into `rows`.
        rows: all rows, of more than one prompt.
    """
    answers = []
    for i, index in enumerate(batch):
        batch_candidates = [*reversed(batch[:i]), *reversed(batch[i + 1 :])]
        data_candidates = ((index - step) % len(rows) for step in range(1, len(rows)))
        mismatch = next(
            mismatch
            for candidates in (batch_candidates, data_candidates)
            for mismatch in candidates
            if rows[mismatch].prompt != rows[index].prompt
        )
        answers.append(rows[mismatch].ids[rows[mismatch].start :])
    return answers
