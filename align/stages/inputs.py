"""What goes into each stage: found before its run has a name, and read before torch is imported. One function a stage.

A run that is finished already is answered from here, and so is a mistake in a row: neither waits for torch.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from align.aliases import parsed_aliases
from align.config.annotate import AnnotateConfig
from align.config.compose import plain
from align.config.data import FORGET, NOT_KEPT, REWARD, DataStageConfig
from align.config.root import Config, store_url
from align.config.scorers import LearnedReward, reward_spec
from align.config.serve import ServeConfig
from align.config.settings import changed
from align.config.suites import JUDGE
from align.config.training import held_out_for
from align.data.clean.steps import steps_of
from align.data.pairs import pairs_records
from align.data.sets.evaluations import FIELD as AGAINST
from align.data.sets.evaluations import parsed_sets
from align.data.sets.forget import asked_for
from align.data.sets.mix import shares
from align.data.sets.sides import seconds
from align.data.sets.source import Source, by_name, parsed_sources, standing
from align.data.sources import (
    data_records,
    divided_documents,
    files_record,
    held_out_sources,
)
from align.errors import InputError, require
from align.evals import judges
from align.export.askable import check_askable, check_stranger, engines_asked, kinds_of
from align.export.converters import converters_in
from align.files import check_readable, has_file, user_path
from align.functions import defined, load_function
from align.functions import source_of as source_of_function
from align.models.base import base_of, find_base
from align.models.start import BASE, find, label, started_from
from align.redaction import masked, unmarked
from align.reward.inputs import check_rows, models_of, read_alike, reward_inputs
from align.rollout.engine_process import LLAMA_CPP, VLLM
from align.run import Base, Input, file_digest, json_digest
from align.run.environment import code_digest, package_versions
from align.run.lineage import evaluated_by
from align.run.signing import PrivateKey, PublicKey, private_key, public_key
from align.run.weights import brings_scores
from align.serve.startup import opened
from align.serve.tenants import read_key_file
from align.stages.best_of_inputs import best_of_inputs
from align.stages.judge import find_inputs, read_examples
from align.stages.rows import (
    judgements_of,
    open_store,
    pairs_of,
    prompts_of,
    prompts_of_both,
    source_of,
    unseen_prompts,
)
from align.stages.starting import start, starting_point
from align.stages.suite_inputs import check_one_kind, found_suite, work_of
from align.trainers.available import check_trainer

INIT = Config().init
LONGEST_LABEL = 60
"""Characters of sources' names in a run's name."""


def nothing() -> tuple[()]:
    return ()


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a stage starts from, resolved once, before the run has a name.

    Attributes:
        config: with what they decide: the method that an adapter belongs to.
        label: the readable part of the run's derived name.
        base: the base weights.
        records: name → what goes in, as the manifest will hold it.
        rows: reads the data. What it returns is handed to the stage's `run`, behind the run and its configuration.
        again: see `align.run.Run.open`.
        trains: what `rows` returns first is trained on.
    """

    config: Config
    label: str
    base: Base | None
    records: dict[str, Input] = field(default_factory=dict)
    rows: Callable[[], tuple[Any, ...]] = nothing
    again: bool = False
    trains: bool = False


def sft(config: Config) -> Inputs:
    if config.init == BASE:
        base = find_base(config.model.path, config.model.revision)
        chosen = "qlora" if config.method.name == "auto" else config.method.name
        config = changed(config, method=changed(config.method, name=chosen))
        records = {"base": Input(base.digest, ref=base.id)}
    else:
        artifact, base, config = starting_point(config)
        records = {"init": artifact.as_input()}

    def rows() -> tuple[Any, ...]:
        train, test = divided_documents(source_of(config), config.seed)
        held_out_for(config.stage.eval_every, len(test), "data.held_out")
        sources = held_out_sources(source_of(config), config.seed)
        return train, test[: config.stage.eval_size], sources[: config.stage.eval_size]

    records |= data_records(source_of(config))
    return Inputs(config, label(base, config.method.name), base, records, rows, trains=True)


def sample(config: Config) -> Inputs:
    artifact, base, config = start(config)
    records = {"init": artifact.as_input(), **data_records(source_of(config))}
    records |= best_of_inputs(config, artifact, base) if config.stage.best_of else {}

    def rows() -> tuple[Any, ...]:
        (found,) = prompts_of(config, "train", config.stage.prompts)
        if config.stage.gold is not None:
            check_rows(reward_spec(config.stage.measured_by()), found)
        return (found,)

    return Inputs(config, label(base, config.method.name), base, records, rows)


def annotate(config: Config) -> Inputs:
    stage: AnnotateConfig = config.stage
    label = f"{config.project}-{stage.action}"
    if stage.action == "simulate":
        # What is to be judged is the input, not what has been judged already: a continued run is the same run.
        with open_store(config, create=False) as store:
            items = json_digest([item.id for item in store.items(config.project)])
        return Inputs(config, label, None, {"items": Input(items, project=config.project)})
    read = {"guidelines": stage.guidelines} | ({} if stage.action == "backup" else {"path": stage.path})
    for name, given in read.items():
        there = given is None or has_file(user_path(given, f"stage.{name}"), f"stage.{name}")
        require(there, f"stage.{name}", given, "there is no such file", "Check the path.")
    if stage.action == "export":  # the run reads the project, as a run of stage=reward does: an erasure concerns it
        with open_store(config, create=False) as store:
            head = store.head(config.project)
        return Inputs(config, label, None, {"annotations": Input(head.hash, project=config.project, seq=head.seq)})
    # From here on people have no name: what the run writes down must not say whom it concerned.
    if stage.annotator is not None and stage.action in ("erase", "invite"):
        from align.annotate.accounts import Accounts  # needs the extra [annotate], unlike the other stages

        with open_store(config, create=False) as store:
            accounts = Accounts(store)
            known = accounts.pseudonym if stage.action == "erase" else accounts.handle
            config = changed(config, stage=changed(stage, annotator=known(config.project, stage.annotator)))
    # The others look at a store that changes, or change it: asked again, each is done again.
    return Inputs(config, label, None, {"asked": Input(secrets.token_hex(8))})


def reward(config: Config) -> Inputs:
    found = judged(config, pairs_of)
    if config.stage.prioritise:  # what it writes to: the same votes in another store are another run
        found.records["queue"] = Input(json_digest([unmarked(masked(store_url(config))), config.project]))
    return found


def dpo(config: Config) -> Inputs:
    check_trainer(config.stage.loss)
    return judged(config, pairs_of)


def judged(config: Config, rows: Callable[[Config], tuple[Any, ...]]) -> Inputs:
    """A stage that learns from judgements: pairs, or answers with a label."""
    artifact, base, config = start(config)
    records = {"init": artifact.as_input(), **pairs_records(source_of(config), store_url(config), config.project)}
    return Inputs(config, label(base, config.method.name), base, records, partial(rows, config), trains=True)


def ppo(config: Config) -> Inputs:
    artifact, base, config = starting_point(config)
    root = config.run.folder
    rewards = reward_inputs(reward_spec(config.reward), root, base, artifact, config.method.name)
    read_alike(models_of(rewards), config.rollout.reasoning)
    records = {"init": artifact.as_input(), **data_records(source_of(config)), **rewards}

    def rows() -> tuple[Any, ...]:
        if config.data.eval_path and config.stage.eval_every:
            return prompts_of_both(config)
        return *prompts_of(config, "train"), []

    return Inputs(config, label(base, config.method.name), base, records, rows, trains=True)


def evaluate(config: Config) -> Inputs:
    if config.eval.measures == JUDGE:
        title = "grader" if config.eval.asks else f"judge-{config.reward.name}"
        records = find_inputs(config)
        return Inputs(config, title, None, records, partial(read_examples, config, records))
    check_one_kind(config)
    if config.stage.systems is not None:
        found = found_suite(config)
        config = changed(config, method=changed(config.method, name=found.method))
        return Inputs(config, found.label, found.base, found.records, partial(work_of, config, found))
    untold = config.method.name == "auto"
    artifact, base, config = start(config, config.artifact, "artifact")
    if untold and artifact.whole:  # it is measured as it is
        config = changed(config, method=changed(config.method, name="full"))
    root = config.run.folder
    named = config.init != INIT or artifact.manifest is None
    asked = find(config.init, root, config.model.path, config.model.revision, "init") if named else None
    reference = started_from(artifact, asked, root)
    data = data_records(source_of(config))
    judge = reward_inputs(reward_spec(config.reward), root, base)
    read_alike(models_of(judge), config.rollout.reasoning)
    reward = plain(config)["reward"]
    title = judges.title(reward, judge)
    of = judges.standing_of(artifact, judges.identities(reward, judge), root)
    judges.independent(of, title, artifact.ref, config.stage.allow_proxy)
    records = {"artifact": artifact.as_input(), **data, **judge}
    if reference is not None:
        if not artifact.whole and base_of(reference, "init").digest != base.digest:
            raise InputError("init", reference.ref, f"is on another base than {artifact.ref}", "Name one on this base.")
        records["init"] = reference.as_input()
    rows = partial(unseen_prompts, config, artifact, root)
    return Inputs(config, label(base, config.method.name), base, records, rows)


def export(config: Config) -> Inputs:
    method = config.method.name  # as it was given: `start` settles `auto`
    artifact, base, config = start(config, config.artifact, "artifact")
    kinds = kinds_of(config.export.name, artifact)
    if artifact.whole:
        problem = f"{artifact.ref} is a whole model, and no adapter by a method"
        require(method in ("auto", "full"), "method", method, problem, "Drop method=.")
        config = changed(config, method=changed(config.method, name="full"))
    elif not artifact.manifest:
        check_stranger(artifact, base, method)
    records = {"artifact": artifact.as_input()}
    if (evaluation := evaluated_by(artifact.as_input(), config.run.folder)) is not None:
        # It stands in the card: another evaluation is another export.
        records["evaluation"] = Input(json_digest(dict(evaluation.metrics)))
    kind, where = config.export.name, {LLAMA_CPP: config.export.llama_cpp, VLLM: config.export.vllm}
    asked = engines_asked(kind, where, brings_scores(artifact.path))
    records["engines"] = Input(json_digest(asked), details=asked)  # one that was installed since is asked
    if kind != "check":
        check_askable(kind, config.export.require, asked, where)
    if "gguf" in kinds:
        converters_in(config.export.converters)
    if kind == "check":
        records["asked"] = Input(secrets.token_hex(8))  # each time anew
    signer = None if config.export.sign is None else private_key(config.export.sign, "export.sign")
    trusted = trusted_key(config)
    records |= signed_by(signer or trusted)
    return Inputs(config, f"{label(base, config.method.name)}-{kind}", base, records, lambda: (signer, trusted))


def serve(config: Config) -> Inputs:
    stage: ServeConfig = config.stage
    if stage.keys is not None:
        read_key_file(user_path(stage.keys, "stage.keys"))  # a mistake in it costs no seconds
    signer = trusted_key(config)
    found = opened(
        parsed_aliases(stage.adapters, "stage.adapters"), config.run.folder,
        path=config.model.path, revision=config.model.revision, method=config.method.name,
        roots=[user_path(root, "stage.roots").absolute() for root in stage.roots], signer=signer,
    )  # fmt: skip
    base, method = found.portfolio.base, found.portfolio.method
    config = changed(config, method=changed(config.method, name=method))
    records = {"base": Input(base.digest, ref=base.id), **signed_by(signer)}
    records |= {f"adapters.{ref}": artifact.as_input() for ref, artifact in found.artifacts.items()}
    return Inputs(config, label(base, method), base, records, lambda: (found,), again=True)


def trusted_key(config: Config) -> PublicKey | None:
    """Whose signature is asked for; None where nobody's is."""
    return None if config.export.verify is None else public_key(config.export.verify, "export.verify")


def signed_by(key: PrivateKey | PublicKey | None) -> dict[str, Input]:
    """What a manifest says of a key: its fingerprint."""
    return {} if key is None else {"signer": Input(key.fingerprint)}


def verify(config: Config) -> Inputs:
    artifact, base, config = starting_point(config)
    untold = config.init == BASE and config.reward == LearnedReward()
    root = config.run.folder
    rewards = {} if untold else reward_inputs(reward_spec(config.reward), root, base, artifact, config.method.name)
    read_alike(models_of(rewards), config.rollout.reasoning)
    read = {"code": Input(json_digest([package_versions(), code_digest()])), "init": artifact.as_input(), **rewards}
    return Inputs(config, label(base, config.method.name), base, read)


def path_source(config: Config) -> Mapping[str, Any]:
    """Return `data.path` as a source of a data set."""
    data = config.data
    source = {"path": data.path, "columns": data.columns, "metadata": data.metadata}
    return {key: value for key, value in source.items() if value is not None}


def data(config: Config) -> Inputs:
    stage: DataStageConfig = config.stage
    if stage.action == FORGET:
        return forgetting(config)
    store, simulated = store_url(config), config.data.allow_simulated
    sources = [source.opened(store, simulated) for source in parsed_sources(stage.sources or [path_source(config)])]
    check_sources(stage, sources)
    records = {f"sources.{source.name}": source.record() for source in sources}
    for i, one in enumerate(parsed_sets(stage.contamination.against)):
        records[f"against.{i}"] = files_record(one.path, f"{AGAINST}[{i}]")
    for i, spec in enumerate(stage.named("fn")):  # the same name may be another function by now
        field = "stage.clean, fn"
        places = [f"{file_digest(file)}:{name}" for file, name in defined(load_function(spec, field))]
        source = source_of_function(spec, field)
        records[f"clean.fn.{i}"] = Input(file_digest(source) if source else spec, ref=spec, details={"defined": places})
    for i, path in enumerate(stage.named("patterns")):
        there = user_path(path, "stage.clean, patterns")
        check_readable(there, "stage.clean, patterns")
        records[f"clean.patterns.{i}"] = Input(file_digest(there), path=path)
    if stage.score.by == REWARD:
        records |= reward_inputs(reward_spec(config.reward), config.run.folder, None)
    base = None
    if config.model.path is not None:  # it counts tokens, scores rows, and renders those that the report shows
        base = find_base(config.model.path, config.model.revision)
        records["base"] = Input(base.digest, ref=base.id)
    name = "-".join(source.name for source in sources)[:LONGEST_LABEL]
    return Inputs(config, name, base, records, lambda: (sources,))


def check_sources(stage: DataStageConfig, sources: list[Source]) -> None:
    """Raises: InputError: a setting contradicts the sources, or names what there is not. Nothing was read yet."""
    by_name(sources, stage.duplicates.prefer, "stage.duplicates.prefer")
    shares([1.0] * len(sources), [source.weight for source in sources], stage.mix.temperature)
    steps_of(stage.clean, "stage.clean", count_tokens=(lambda _: 0) if stage.counts_tokens else None)
    if stage.split.since is not None:
        seconds(stage.split.since, "stage.split.since")


def forgetting(config: Config) -> Inputs:
    """A data set, and some of its rows. Nothing of the run says which: an id can be guessed from a short text."""
    task, record = asked_for(Path(config.data.path or ""), config.stage.forget, partial(standing, store_url(config)))
    config = changed(config, stage=changed(config.stage, forget=NOT_KEPT))
    return Inputs(config, f"{task.name}-forget", None, {"data": record}, lambda: (task,))


OF: Mapping[str, Callable[[Config], Inputs]] = MappingProxyType({
    "data": data, "sft": sft, "full": sft, "sample": sample, "annotate": annotate, "reward": reward, "ppo": ppo,
    "dpo": dpo, "kto": partial(judged, rows=judgements_of), "eval": evaluate, "export": export, "serve": serve,
    "verify": verify,
})  # fmt: skip
"""Stage → what goes into it."""
