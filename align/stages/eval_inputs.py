"""What goes into an evaluation: a pair, a suite or a judge."""

from __future__ import annotations

from functools import partial

from align.config.root import Config, plain
from align.config.scorers import reward_spec
from align.config.settings import changed
from align.config.suites import JUDGE
from align.data.sources import data_records
from align.errors import InputError
from align.evals import judges
from align.models.base import base_of
from align.models.start import find, label, started_from
from align.reward.inputs import models_of, read_alike, reward_inputs
from align.stages.eval import check_one_kind, find_suite, read_work
from align.stages.judge import find_inputs, read_examples
from align.stages.rows import source_of, unseen_prompts
from align.stages.starting import Inputs, start

INIT = Config().init


def inputs(config: Config) -> Inputs:
    if config.eval.measures == JUDGE:
        title = "grader" if config.eval.asks else f"judge-{config.reward.name}"
        records = find_inputs(config)
        return Inputs(config, title, None, records, partial(read_examples, config, records))
    check_one_kind(config)
    if config.stage.systems is not None:
        found = find_suite(config)
        config = changed(config, method=changed(config.method, name=found.method))
        return Inputs(config, found.label, found.base, found.records, partial(read_work, config, found))
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
