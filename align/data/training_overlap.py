"""Prompts that a model was nearly trained on: they ask what a training row asks in other punctuation, share a run of
words with one, or resemble one. Those that it was trained on to the letter are found by ids (`align.data.trained_ids`).

A run keeps the ids of its rows and not their texts. These are read again, from where the run read them, if they are
still what it read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pyarrow as pa

from align.core.errors import AlignError
from align.core.types import Conversation, Record
from align.data.dedup.evaluation_overlap import RULES, SLICE, Index, Prefilter, hits
from align.data.pairs import divided_judgements, divided_pairs, read_pairs
from align.data.read.content import turns
from align.data.sources import DataSource, data_record, documents, prompts
from align.data.trained_ids import TRAINS
from align.run import Artifact, Manifest
from align.run.lineage import iter_artifact_ancestors

USERS = ("user",)
SPEAKERS = ("user", "assistant", "tool")


class Near(NamedTuple):
    """Why a prompt counts as nearly trained on.

    Attributes:
        run: that trained on the row.
        rule: `exact`, the same words; `ngram`, 13 words in a row; `near`, at least so similar.
    """

    run: str
    rule: str


def nearly_trained_on(
    artifacts: Mapping[str, Artifact], root: Path, store: str, asked: Sequence[Conversation], similarity: float
) -> tuple[Sequence[Mapping[str, Near]], Sequence[str]]:
    """Find the prompts that training rows of artifacts come near to, by the rules of
    `align.data.dedup.evaluation_overlap`: of all runs that each came through, those of its reward models and its base
    among them.

    Args:
        artifacts: by the name of the system that they are.
        root: the folder of runs.
        store: URL of the annotation store.
        asked: the prompts [N]; what users say in them is compared, with a row's questions and with all of it.
        similarity: Jaccard's, of runs of three words, from which two texts are near.

    Returns:
        of each prompt the systems that were nearly trained on it [N], and what is not known, a sentence each.
    """
    found: list[dict[str, Near]] = [{} for _ in asked]
    unknown = list[str]()
    by_run = dict[str, Mapping[int, str]]()
    questions = pa.array([spoken(prompt, USERS) for prompt in asked], pa.string())
    for name, artifact in artifacts.items():
        for run, _ in iter_artifact_ancestors(artifact, root):
            if not isinstance(run, Manifest) or run.stage not in TRAINS:
                continue  # of what is gone `seen_by` speaks
            if run.digest not in by_run:
                try:
                    by_run[run.digest] = find_near_questions(trained_rows(run, store), questions, similarity)
                except (AlignError, AttributeError, KeyError, OSError) as error:
                    by_run[run.digest] = {}
                    problem = f"cannot be read again ({str(error).splitlines()[0].removesuffix('.')})"
                    unknown.append(f"the rows of {run.ref} {problem}: which prompts come near them is not known")
            for place, rule in by_run[run.digest].items():
                found[place].setdefault(name, Near(run.ref, rule))
    return found, unknown


def trained_rows(manifest: Manifest, store: str) -> Sequence[Record]:
    """Return what a run was given to train on.

    Raises:
        AlignError: it cannot be read, or is not what it was.
        KeyError, AttributeError: the manifest does not say where it is.
    """
    data, stage, seed = manifest.config["data"], manifest.config["stage"], manifest.config["seed"]
    source = DataSource.of(SimpleNamespace(**data))
    read = manifest.inputs["data"]
    if not read.project and data_record(source).digest != read.digest:
        raise AlignError(f"{read.path} has changed since")
    if manifest.stage == "ppo":
        return prompts(source, "train", seed)
    if manifest.stage not in ("reward", "dpo", "kto"):
        return documents(source, "train", seed)
    simulated = data["allow_simulated"]
    if manifest.stage == "kto":
        return divided_judgements(source, store, read.project or "", simulated, stage["held_out"], seed)[0]
    pairs = read_pairs(source, store, read.project or "", simulated, seed)
    return divided_pairs(pairs, source, stage["held_out"], seed)[0]


def find_near_questions(rows: Sequence[Record], questions: pa.Array, similarity: float) -> Mapping[int, str]:
    """Return the places of questions that rows come near to, and the first rule that holds for each."""
    prefilter = Prefilter(similarity)
    prefilter.measure(questions)
    prefilter.add(questions)
    for texts in slices(spoken(row, SPEAKERS) for row in rows):
        prefilter.tell(texts)
    found = dict[int, int]()
    for texts in slices(text for row in rows for text in {spoken(row, SPEAKERS), spoken(row, USERS)}):
        alike = texts.filter(pa.array(prefilter.maybe(texts)))
        if len(alike):
            near = hits(Index([alike], threshold=similarity).without(prefilter.phrases), questions)
            for place, rule in zip(near.text.tolist(), near.rule.tolist(), strict=True):
                found[place] = min(rule, found.get(place, rule))
    return {place: RULES[rule] for place, rule in sorted(found.items())}


def spoken(record: Record, roles: Sequence[str]) -> str:
    """Return what some roles say in a row; all of plain text."""
    if isinstance(record, str):
        return record
    return "\n".join(turn.content for turn in turns(record) if turn.role in roles)


def slices(texts: Iterable[str]) -> Iterator[pa.Array]:
    """Yield texts, some `SLICE` bytes at a time."""
    part = list[str]()
    size = 0
    for text in texts:
        part.append(text)
        size += len(text)
        if size >= SLICE:
            yield pa.array(part, pa.string())
            part = []
            size = 0
    if part:
        yield pa.array(part, pa.string())
