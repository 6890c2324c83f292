"""Prompts that closely match training rows: the same words with other punctuation, a shared sequence of words, or a
high similarity. Exact matches are found by ids (`align.data.trained_ids`).

A run keeps the ids of its rows and not their texts. The texts are read again from the run's data, if that has not
changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pyarrow as pa

from align.annotate.store.vote_selection import VoteSelection
from align.core.errors import AlignError
from align.core.types import Conversation, Record
from align.data.dedup.evaluation_overlap import RULES, SLICE_BYTES, OverlapIndex, Prefilter, find_overlapping_texts
from align.data.pairs import VoteSource, read_divided_judgements, read_pairs, split_pairs
from align.data.read.content import list_turns
from align.data.sources import DataSource, build_data_input, read_documents_of_split, read_source_prompts
from align.data.trained_ids import TRAINING_STAGES
from align.run import Artifact, Manifest
from align.run.lineage import iter_artifact_ancestors

USER_ROLES = ("user",)
SPEAKER_ROLES = ("user", "assistant", "tool")


class NearMatch(NamedTuple):
    """A training run with a row that closely matches a prompt, and the rule by which they match.

    Attributes:
        run: the run that trained on the matching row.
        rule: `exact` for equal words; `ngram` for 13 equal words in a row; `near` for a high similarity.
    """

    run: str
    rule: str


class NearMatches(NamedTuple):
    """For each prompt, the evaluated models that were trained on closely matching rows, with the run and the rule of
    the match.

    Attributes:
        matches: for each prompt [N], system name → reason why it counts as nearly trained on.
        unknown: a sentence for each run whose training rows cannot be read again.
    """

    matches: Sequence[Mapping[str, NearMatch]]
    unknown: Sequence[str]


def find_near_matches(
    artifacts: Mapping[str, Artifact], root: Path, store: str, prompts: Sequence[Conversation], similarity: float
) -> NearMatches:
    """Find the evaluation prompts that closely match rows that the evaluated models or their ancestors were trained on.

    Rows are compared by the rules of `align.data.dedup.evaluation_overlap`. All runs that an artifact derives from are
    considered, including those of its reward models and base.

    Args:
        artifacts: system name → its artifact.
        root: the folder of runs.
        store: URL of the annotation store.
        prompts: the prompts [N]. Their user turns are compared with the user turns of a row, and with all of its turns.
        similarity: minimum Jaccard similarity of word trigrams.
    """
    matches: list[dict[str, NearMatch]] = [{} for _ in prompts]
    unknown = list[str]()
    by_run = dict[str, Mapping[int, str]]()
    questions = pa.array([join_turns_of_roles(prompt, USER_ROLES) for prompt in prompts], pa.string())
    for name, artifact in artifacts.items():
        for run, _ in iter_artifact_ancestors(artifact, root):
            if not isinstance(run, Manifest) or run.stage not in TRAINING_STAGES:
                continue  # `collect_trained_questions` reports deleted runs
            if run.digest not in by_run:
                try:
                    by_run[run.digest] = find_near_questions(read_trained_rows(run, store), questions, similarity)
                except (AlignError, AttributeError, KeyError, OSError) as error:
                    by_run[run.digest] = {}
                    problem = f"cannot be read again ({str(error).splitlines()[0].removesuffix('.')})"
                    unknown.append(f"the rows of {run.ref} {problem}: which prompts are similar to them is not known")
            for i, rule in by_run[run.digest].items():
                matches[i].setdefault(name, NearMatch(run.ref, rule))
    return NearMatches(matches, unknown)


def read_trained_rows(manifest: Manifest, store: str) -> Sequence[Record]:
    """Read a run's training rows again from the data that its manifest names, or raise AlignError if the data has
    changed.

    Raises:
        AlignError: the data cannot be read, or has changed.
        KeyError, AttributeError: the manifest lacks the settings of the data.
    """
    data = manifest.config["data"]
    stage = manifest.config["stage"]
    seed = manifest.config["seed"]
    source = replace(DataSource.from_settings(SimpleNamespace(**data)), soft_labels=False)  # only texts are compared
    data_input = manifest.inputs["data"]
    if not data_input.project and build_data_input(source).digest != data_input.digest:
        raise AlignError(f"{data_input.path} has changed since")
    if manifest.stage == "ppo":
        return read_source_prompts(source, "train", seed)
    if manifest.stage not in ("reward", "dpo", "kto"):
        return read_documents_of_split(source, "train", seed)
    selection = VoteSelection.from_settings(SimpleNamespace(**data))
    votes = VoteSource(store, data_input.project or "", selection, data_input.seq if data_input.seq >= 0 else None)
    if manifest.stage == "kto":
        return read_divided_judgements(source, votes, stage["held_out"], seed)[0]
    pairs = read_pairs(source, votes, seed)
    return split_pairs(pairs, source, stage["held_out"], seed)[0]


def find_near_questions(rows: Sequence[Record], questions: pa.Array, similarity: float) -> Mapping[int, str]:
    """Return the index of each question that closely matches a row, mapped to the first of `RULES` that applies, such
    as `ngram`."""
    prefilter = Prefilter(similarity)
    prefilter.count_hashes(questions)
    prefilter.add_evaluation_texts(questions)
    for texts in iter_slices(join_turns_of_roles(row, SPEAKER_ROLES) for row in rows):
        prefilter.match_and_count(texts)
    rule_of_question = dict[int, int]()
    for texts in iter_slices(
        text for row in rows for text in {join_turns_of_roles(row, SPEAKER_ROLES), join_turns_of_roles(row, USER_ROLES)}
    ):
        candidates = texts.filter(pa.array(prefilter.match_without_phrases(texts)))
        if len(candidates):
            matches = find_overlapping_texts(
                OverlapIndex([candidates], threshold=similarity).copy_without_runs(prefilter.phrases), questions
            )
            for i, rule in zip(matches.text.tolist(), matches.rule.tolist(), strict=True):
                rule_of_question[i] = min(rule, rule_of_question.get(i, rule))
    return {i: RULES[rule] for i, rule in sorted(rule_of_question.items())}


def join_turns_of_roles(record: Record, roles: Sequence[str]) -> str:
    """Return the contents of a record's turns with the given roles, joined by line ends. Plain text is returned as a
    whole."""
    if isinstance(record, str):
        return record
    return "\n".join(turn.content for turn in list_turns(record) if turn.role in roles)


def iter_slices(texts: Iterable[str]) -> Iterator[pa.Array]:
    """Yield the texts in order as string arrays of about `SLICE_BYTES` characters each."""
    part = list[str]()
    size = 0
    for text in texts:
        part.append(text)
        size += len(text)
        if size >= SLICE_BYTES:
            yield pa.array(part, pa.string())
            part = []
            size = 0
    if part:
        yield pa.array(part, pa.string())
