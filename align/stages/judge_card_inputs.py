"""What goes into the card of a judge (`eval=judge`): found before its run has a name, read before torch is imported."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from align.config.root import Config, store_url
from align.config.scorers import reward_spec
from align.config.settings import Settings, defaults_of
from align.config.training import of_pairs
from align.data.pairs import drawn, pairs_records, prepared, read_verdicts
from align.data.tally import tally
from align.data.trained_ids import seen_by
from align.errors import InputError, require
from align.evals import judges
from align.evals.endpoint import api_key
from align.evals.known_pairs import KnownPair, known_pairs, unlearned
from align.evals.llm_judge import LLMJudge, parsed_judge
from align.report.words import counted
from align.reward.inputs import models_of, read_alike, reward_inputs
from align.run import Artifact, Input
from align.stages.rows import SEEN, key_of, source_of
from align.types import Preference

LEARNS_VERDICTS = ("reward", "dpo", "kto")
"""Stages that learn from pairs: what they saw says nothing of how a judge does elsewhere. Who imitated an answer
has learned no verdict."""
APPLY = {"eval": ("name", "measures", "asks"), "stage": ("judge", "level"), "model": (), "method": (), "rollout": ()}
"""Group → its settings that apply to a judge, of the groups that evaluations of systems read."""
ROOT = ("artifact", "init")


class KnownPairs(NamedTuple):
    """
    Attributes:
        judge: `reward` for the scorer of `reward=`, or a language model.
        pairs: that no reward model of the judge learned from.
        reference: whose verdicts they are, for people.
        left_out: pairs that the judge learned from.
        notes: what is not known of its training, a sentence each.
    """

    judge: Literal["reward"] | LLMJudge
    pairs: Sequence[KnownPair]
    reference: str
    left_out: int
    notes: Sequence[str]


def check_judge_alone(config: Config) -> None:
    """Raises: InputError: a setting is of systems, which are not asked here, or the data has no pairs."""
    check_alone(config)
    of_pairs(config.data, True)


def check_alone(config: Config) -> None:
    """Raises: InputError: a setting is of systems, which are not asked here, or of data to train on."""
    for key, value in given(config):
        problem = "is of systems that answer, and eval=judge measures the judge on answers that are there"
        raise InputError(key, value, problem, "Drop it.")
    problem = "is measured on beside what is trained on, and nothing is trained here"
    require(config.data.eval_path is None, "data.eval_path", config.data.eval_path, problem, "Name it as data.path.")


def given(config: Config) -> Iterator[tuple[str, Any]]:
    """The settings that somebody gave and that do not apply, with their values."""
    base = Config()
    yield from ((key, getattr(config, key)) for key in ROOT if getattr(config, key) != getattr(base, key))
    if config.method.name != base.method.name:
        yield "method", config.method.name
    for group, apply in APPLY.items():
        settings: Settings = getattr(config, group)
        for name, default in defaults_of(type(settings)).items():
            if name not in apply and getattr(settings, name) != default:
                yield f"{group}.{name}", getattr(settings, name)


def judge_inputs(config: Config) -> dict[str, Input]:
    """The pairs and the judge, as inputs of the run.

    Raises:
        InputError: the judge is none, or reads reasoning that it was never shown.
        MissingArtifact: a reward model is not there.
    """
    check_judge_alone(config)
    llm = judge_in(config)
    pairs = pairs_records(source_of(config), store_url(config), config.project)
    if isinstance(llm, LLMJudge):
        return {**pairs, "judge": llm.endpoint.record(llm.identity)}
    judge = reward_inputs(reward_spec(config.reward), config.run.folder, None)
    read_alike(models_of(judge), config.data.reasoning, "data.reasoning")
    return {**pairs, **judge}


def judge_in(config: Config) -> Literal["reward"] | LLMJudge:
    """Who is measured. Raises: InputError: `stage.judge` names nobody, or people."""
    judge, problem = parsed_judge(config.stage.judge), "are whom a judge is measured against"
    if judge == "people":
        raise InputError("stage.judge", judge, problem, "Name a judge, and the people's project: data=annotations.")
    return judge


def known_pairs_of(config: Config, records: dict[str, Input]) -> tuple[KnownPairs]:
    """The pairs that the judge is measured on.

    Raises:
        InputError: there are none, the judge learned from all of them, or their verdicts are its own.
    """
    source, root = source_of(config), config.run.folder
    decided, tied = read_verdicts(source, store_url(config), config.project, config.data.allow_simulated)
    judge = judge_in(config)
    if isinstance(judge, LLMJudge):
        api_key(judge.endpoint)
    else:
        check_not_its_own(config, records, [*decided, *tied])
    decided, tied = ([prepared(pref, source) for pref in side] for side in (decided, tied))
    pairs = known_pairs(decided, tied, config.seed)
    models: Sequence[Artifact] = models_of(records)
    seen = [
        seen_by(model, root, partial(key_of, config), config.data.system or None, LEARNS_VERDICTS) for model in models
    ]
    kept = unlearned(pairs, seen)
    left_out = len(pairs) - len(kept)
    problem = f"has nothing to measure on: the judge learned from the prompts of all {counted(len(pairs), 'pair')}"
    require(bool(kept), "data", config.data.path or config.project, problem, "Give pairs that were held out.")
    tally(SEEN, left_out)
    if left_out:
        print(f"{counted(left_out, 'pair')} of {len(pairs):,} left out: the judge learned from their prompts")
    notes = [*dict.fromkeys(sentence for one in seen for sentence in one.unknown)]
    notes += [f"nobody here knows what {judge.title} was trained on"] if isinstance(judge, LLMJudge) else []
    some = drawn(kept, config.data.limit, config.seed)
    return (KnownPairs(judge, some, reference_of(config, [*decided, *tied]), left_out, notes),)


def check_not_its_own(config: Config, records: dict[str, Input], prefs: Sequence[Preference]) -> None:
    """Raises: InputError: the judge, or a part of it, stood in for people in these verdicts."""
    own = judges.identities(reward_spec(config.reward), records) & {pref.scorer for pref in prefs if pref.scorer}
    problem = f"made verdicts of {config.data.path or config.project} itself, and would agree with itself"
    require(not own, "reward", ", ".join(sorted(own)), problem, "Measure it on people's verdicts, or on others'.")


def name_of_data(config: Config) -> str:
    """The name of a file, or of the run that made a data set."""
    path = Path(config.data.path or "")
    return (path.parent if path.name == "artifact" else path).name or config.data.name


def reference_of(config: Config, prefs: Sequence[Preference]) -> str:
    """Whose verdicts they are: people, or the scorers that stood in for them; of a file it is the file."""
    if config.data.name != "annotations":
        return name_of_data(config)
    simulated = sorted({pref.scorer or "a scorer" for pref in prefs if pref.source == "simulated"})
    people = ["people"] if any(pref.source != "simulated" for pref in prefs) else []
    return " and ".join([*people, *(f"a simulated annotator ({name})" for name in simulated)])
