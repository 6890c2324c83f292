"""One data set from many sources: read, cleaned, without duplicates and what gives evaluations away, divided, mixed."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from align.config.data import (
    EMBEDDED,
    FORGET,
    LOSS,
    NOT_KEPT,
    RAY,
    REWARD,
    SURE,
    ContaminationConfig,
    DataStageConfig,
    DuplicatesConfig,
    ScoreConfig,
)
from align.config.root import Config, find_store_url, to_plain_dict
from align.config.scorers import build_reward_spec
from align.config.settings import replace_values
from align.core.errors import InputError, StorageError, require
from align.core.files import check_readable, parse_user_path
from align.core.functions import find_definitions, load_function
from align.core.functions import find_module_file as source_of_function
from align.core.types import StageResult
from align.data.chat.encode import token_count
from align.data.chat.template import use_template
from align.data.chat.training_view import render_tokens
from align.data.clean.cleaner import Cleaner
from align.data.clean.outcome import Step
from align.data.clean.quality import CountTokens
from align.data.clean.steps import steps_of
from align.data.dedup.evaluation_overlap import Matches
from align.data.dedup.near_duplicates import Duplicates
from align.data.read.content import DOCUMENTS, FEEDBACK
from align.data.read.files import compute_read_share
from align.data.sets.contamination import Evaluations, drop_templated, leaks_of
from align.data.sets.duplicates import (
    NO_DUPLICATES,
    clusters,
    copies,
    duplicate_labels,
    joined,
    near_duplicates,
    preference,
)
from align.data.sets.evaluations import FIELD as AGAINST
from align.data.sets.evaluations import parsed_sets, read_sets
from align.data.sets.forget import Forgetting, alone_on, asked_for, forget, retire, roots_before
from align.data.sets.gather import Gathering, Wanted
from align.data.sets.mix import Funnel, Mixed, draws, mixture, over_caps, shares
from align.data.sets.parallel import DaftRunner, TaskRunner, embedded, make_ahead
from align.data.sets.published import Chosen, data_set, publish
from align.data.sets.report import (
    DROPPED,
    Examples,
    Loss,
    account_of,
    cleaned_away,
    find_read_losses,
    found_in,
    found_of,
    lengths,
    metrics_of,
)
from align.data.sets.score_cuts import PIECE, account_of_scores, outside, scored, scored_before
from align.data.sets.score_cuts import read as read_rows
from align.data.sets.sides import (
    group_labels,
    held_back,
    named_sides,
    seconds,
    units,
    whole_units,
    written_since,
)
from align.data.sets.source import Source, by_name, parsed_sources, recognised, standing
from align.data.sets.spool import Rows, Spool
from align.data.sources import build_files_input
from align.models.base import find_base
from align.report.data_set_page import loss_lines, shapes_line, summary_lines
from align.report.figure_text import counted
from align.report.reading_progress import begins, reading, seldom
from align.reward.inputs import load_reward_artifacts, reward_inputs
from align.run import Input, Run, atomic, file_digest
from align.run.artifacts import check_not_replaced, read_replacement
from align.run.folder import utc_now
from align.run.lineage import find_users
from align.stages.runner import Inputs, open_tracker
from align.track import show_progress

LONGEST_LABEL = 60
"""Characters of sources' names in a run's name."""


def inputs(config: Config) -> Inputs:
    stage: DataStageConfig = config.stage
    if stage.action == FORGET:
        return forgetting(config)
    path_source = {"path": config.data.path, "columns": config.data.columns, "metadata": config.data.metadata}
    given = stage.sources or [{key: value for key, value in path_source.items() if value is not None}]
    sources = [source.opened(find_store_url(config), config.data.allow_simulated) for source in parsed_sources(given)]
    # Settings that contradict the sources, or name what there is not, are refused before anything is read.
    by_name(sources, stage.duplicates.prefer, "stage.duplicates.prefer")
    shares([1.0] * len(sources), [source.weight for source in sources], stage.mix.temperature)
    steps_of(stage.clean, "stage.clean", count_tokens=(lambda _: 0) if stage.counts_tokens else None)
    if stage.split.since is not None:
        seconds(stage.split.since, "stage.split.since")
    records = {f"sources.{source.name}": source.record() for source in sources}
    for i, evaluation_set in enumerate(parsed_sets(stage.contamination.against)):
        records[f"against.{i}"] = build_files_input(evaluation_set.path, f"{AGAINST}[{i}]")
    for i, spec in enumerate(stage.find_arguments("fn")):  # the same name may be another function by now
        field = "stage.clean, fn"
        places = [f"{file_digest(file)}:{name}" for file, name in find_definitions(load_function(spec, field))]
        source = source_of_function(spec, field)
        records[f"clean.fn.{i}"] = Input(file_digest(source) if source else spec, ref=spec, details={"defined": places})
    for i, path in enumerate(stage.find_arguments("patterns")):
        there = parse_user_path(path, "stage.clean, patterns")
        check_readable(there, "stage.clean, patterns")
        records[f"clean.patterns.{i}"] = Input(file_digest(there), path=path)
    if stage.score.by == REWARD:
        records |= reward_inputs(build_reward_spec(config.reward), config.run.folder, None)
    base = None
    if config.model.path is not None:  # it counts tokens, scores rows, and renders those that the report shows
        base = find_base(config.model.path, config.model.revision)
        records["base"] = Input(base.digest, ref=base.id)
    name = "-".join(source.name for source in sources)[:LONGEST_LABEL]
    return Inputs(config, name, base, records, lambda: (sources,))


def forgetting(config: Config) -> Inputs:
    """Return the inputs of `stage.action=forget`: a data set, and some of its rows. Nothing of the run says which rows:
    an id can be guessed from a short text."""
    task, record = asked_for(
        Path(config.data.path or ""), config.stage.forget, partial(standing, find_store_url(config))
    )
    config = replace_values(config, stage=replace_values(config.stage, forget=NOT_KEPT))
    return Inputs(config, f"{task.name}-forget", None, {"data": record}, lambda: (task,))


def run(run: Run, config: Config, given: Any) -> StageResult:
    return forgotten(run, config, given) if config.stage.action == FORGET else data_set_of(run, config, given)


def data_set_of(run: Run, config: Config, sources: list[Source]) -> StageResult:
    """Read, clean, score, compare, divide, mix and publish, in this order."""
    stage: DataStageConfig = config.stage
    names = [source.name for source in sources]
    ranks = by_name(sources, stage.duplicates.prefer, "stage.duplicates.prefer")
    engine = embedded if stage.engine == EMBEDDED else DaftRunner(stage.engine == RAY, stage.workers, stage.ray)
    shapes = [recognised(source) for source in sources]
    for source, found in zip(sources, shapes, strict=True):
        if found["shapes"]:
            print(shapes_line(source.name, found), flush=True)
    sets = parsed_sets(stage.contamination.against)
    evaluations = Evaluations(read_sets(sets), stage.contamination.near)
    against = [evaluation_set.path for evaluation_set in sets]
    tokenizer = tokenizer_of(run, config)
    count = None if tokenizer is None else partial(token_count, tokenizer)
    steps = steps_of(stage.clean, "stage.clean", count_tokens=count)
    kind, accounts = gathered(run, config, sources, steps, count, engine)
    rows = Rows(Spool(run.checkpoints), kind, names)
    hide = Cleaner(steps).hidden
    funnel = Funnel(rows.numbers("source").astype(np.int64), names)
    funnel.note("after_cleaning")
    examples = Examples(run.folder, rows, funnel.source, hide)
    losses = list[Loss]()

    def add_losses(found: Iterable[Loss]) -> None:
        for loss in found:
            losses.append(loss)
            print("\n".join(loss_lines(loss)), flush=True)

    funnel.watch = lambda step: add_losses(examples.find_losses(funnel, step))
    add_losses(find_read_losses(names, accounts, hide))
    scored = by_score(run, config, rows, funnel)
    with nothing_to_go_on_from(run):
        draw = draws(rows.first_bits("content_id"), config.seed)
        given_away = evaluations.leaks(rows, funnel.kept)
        without(funnel, "after_decontamination", given_away.text, stage.contamination)
        duplicates = without_duplicates(rows, funnel, preference(funnel.source, ranks), stage, engine)
        funnel.drop("after_caps", over_caps(funnel.kept, funnel.source, draw, [source.cap for source in sources]))
        test = divided(rows, funnel, duplicates, config)
        leaks = shared_sides(rows, funnel, test, stage)
        without(funnel, "after_test_decontamination", leaks.text, stage.contamination)
        mix = stage.mix
        size = np.ones(len(test), np.int64) if mix.by == "rows" else rows.numbers(mix.by).astype(np.int64)
        train = mixture(
            funnel.kept & ~test,
            funnel.source,
            size,
            draw,
            names,
            weights=[source.weight for source in sources],
            total=mix.total,
            repeat=mix.repeat,
            temperature=mix.temperature,
        )
        check_some(config, funnel, test, train, given_away, leaks)

    times = np.where(funnel.kept & test, 1, train.times).astype(np.int32)  # the test side is as it is
    written = times > 0
    scores = scored.scores if scored else None
    chosen = Chosen(times, test, duplicates.dropped, clusters(duplicates), scores)
    evidence = found_in(against, given_away) + found_in(["the test split"], leaks)
    said = {
        **account_of(sources, run.inputs, shapes, accounts, funnel, test, train),
        "evaluations": evidence,
        "found": found_of(duplicates, given_away, leaks),
        **(scored.said if scored else {}),
        "lengths": lengths(rows.numbers("characters")[written], funnel.source[written], names),
        "losses": [{key: loss[key] for key in ("source", "step", "removed", "of")} for loss in losses],
    }
    shutil.rmtree(target := run.folder / "artifact", ignore_errors=True)
    begins("publishes", int(times.sum()))
    with atomic.publish_folder(target) as folder:
        data = publish(folder, rows, chosen, said)
    gone = examples.leaked(given_away, against) + examples.leaked(leaks, ["the test split"])
    examples.write(DROPPED, cleaned_away(names, accounts) + gone)
    examples.write_duplicates(duplicates, chosen.heads)
    examples.write_rows(written & ~test, partial(render_tokens, tokenizer))
    if scored:
        examples.write_scores(scored.scores, scored.out)
    with open_tracker(run) as track:
        for step, (name, left) in enumerate(funnel.steps.items(), start=1):
            track.log(step, {"name": name, "rows": sum(left)})
    return StageResult(metrics_of(data), tuple(summary_lines(data, to_plain_dict(config)["stage"])))


@contextmanager
def nothing_to_go_on_from(run: Run) -> Iterator[None]:
    """Remove the spool if rows are refused in the block: the same command would refuse them again. It stays if the disk
    is full or workers cannot be had."""
    try:
        yield
    except InputError as error:
        if not isinstance(error, StorageError) and not error.field.startswith(("stage.engine", "stage.ray")):
            shutil.rmtree(run.checkpoints)
        raise


def check_some(
    config: Config, funnel: Funnel, test: np.ndarray, train: Mixed, given_away: Matches, leaks: Matches
) -> None:
    """Raise InputError if no row is left, or none to train on."""
    at = "stage.sources"
    given = ", ".join(funnel.names)
    removes = config.stage.contamination.action == "remove"
    if removes and len(given_away.text) and not any(funnel.steps["after_decontamination"]):
        problem = "leave no row: all are like rows of stage.contamination.against"
        raise InputError(at, given, problem, "Write stage.contamination.action=report, and look at its report.")
    require(bool(funnel.kept.any()), at, given, "leave no row", "Look at the settings that leave rows out.")
    if config.data.held_out == 1 or train.times.any():
        return
    if removes and len(leaks.text) and not (funnel.kept & ~test).any():
        problem = "leave no row to train on: all that could be are like rows to measure on"
        raise InputError(at, given, problem, "Write stage.contamination.test=false, or another data.held_out.")
    raise InputError(at, given, "leave no row to train on", "Look at the report of a run with data.held_out=1.")


def gathered(
    run: Run,
    config: Config,
    sources: Sequence[Source],
    steps: Sequence[tuple[str, Step]],
    count: CountTokens | None,
    engine: TaskRunner,
) -> tuple[str, Sequence[Mapping[str, Any]]]:
    """Read, clean and write every source into the run's spool. Returns the kind of their records, and an account each.

    Raises:
        InputError: rows are refused, sources are of different kinds, or one is empty after cleaning.
    """
    stage: DataStageConfig = config.stage
    wanted = Wanted(
        stage.duplicates.over,
        stage.duplicates.near is not None,
        stage.split.read.get("split", ""),
        stage.split.read.get("time", ""),
        count if stage.mix.by == "tokens" else None,
    )
    spool = Spool(run.checkpoints)
    skips = config.data.on_bad_row == "skip"
    with nothing_to_go_on_from(run):
        kind = sources[0].kind()
    gatherings = [Gathering(spool, source, number, steps, wanted, kind, skips) for number, source in enumerate(sources)]
    if engine is not embedded:
        make_ahead(engine, gatherings, seldom(lambda made, of, s: f"{made:,} of {of:,} parts made in {s:.0f} s"))
    with nothing_to_go_on_from(run):
        accounts = [
            gathering.run(reading(gathering.source.name, partial(compute_read_share, gathering.source.files)))
            for gathering in gatherings
        ]
    return kind, accounts


class Scored(NamedTuple):
    """The rows' scores, float64 (N); which are left out by them, bool (N); and what `data.json` says of both."""

    scores: np.ndarray
    out: np.ndarray
    said: dict[str, Any]


def score_rows(run: Run, config: Config, rows: Rows) -> tuple[np.ndarray, str]:
    """Return the score of each row by `stage.score.by`, float64 (N) and nan for none, and the scorer's name for people.
    Models are loaded here, and are gone when the rows are scored.

    Raises:
        InputError: the rows are answers with a label, none of them can be scored, or a score is not finite.
    """
    from align.evals.judges.identity import scorer_title
    from align.evals.row_scores import load_loss, load_reward
    from align.models.finite_checks import diverged
    from align.models.load import choose_device, choose_dtype

    settings: ScoreConfig = config.stage.score
    is_loss = settings.by == LOSS
    title = run.base.id if is_loss else scorer_title(to_plain_dict(config)["reward"], run.inputs)
    problem = "scores what is to be imitated, and the rows are answers with a label, of which some are not wanted"
    require(rows.kind != FEEDBACK, "stage.score.by", settings.by, problem, "Drop it.")
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    if is_loss:
        template = config.data.template, config.data.template_kwargs
        score = load_loss(run.base, *template, device, dtype, settings.max_length, settings.batch_size)
    else:
        first = read_rows(rows, np.arange(min(PIECE, rows.count)))
        models = load_reward_artifacts(run.inputs)
        score = load_reward(build_reward_spec(config.reward), models, first, device, dtype, settings.batch_size)

    def score_finite(records: Sequence[Any]) -> np.ndarray:
        scores = score(records)
        if np.isinf(scores).any():
            raise diverged(f"the {settings.by} of a row by {title} is no number", None, config.dtype)
        return scores

    print(f"scores {counted(rows.count, 'row')} by the {settings.by} of {title}", flush=True)
    with show_progress("score", rows.count, scored_before(rows)) as bar:
        scores = scored(rows, score_finite, bar.advance)
    what = "no text and no answer that is trained on" if is_loss else "no answer behind a question"
    problem = f"finds nothing to score: there is {what}, or none that the model's context holds"
    require(not np.isnan(scores).all(), "stage.score.by", settings.by, problem, "Drop it, or score by the other.")
    return scores, title


def by_score(run: Run, config: Config, rows: Rows, funnel: Funnel) -> Scored | None:
    """Score the rows, and leave out those outside of what is asked for. Returns None if no scores are asked for."""
    asked: ScoreConfig = config.stage.score
    if asked.by is None:
        return None
    scores, scorer = score_rows(run, config, rows)
    out = outside(
        scores, rows.first_bits("content_id"), funnel.source, asked.keep, asked.within, asked.least, asked.most
    )
    funnel.drop("after_score", out)
    how = {key: getattr(asked, key) for key in ("by", "within", "least", "most")} | {"keep": list(asked.keep)}
    found = account_of_scores(scores, out, funnel.source, funnel.names)
    return Scored(scores, out, {"scores": {"scorer": scorer, **how, **found}})


def tokenizer_of(run: Run, config: Config) -> Any | None:
    """Load the tokenizer of `model=`, which counts tokens and renders rows for the report. Returns None without a
    model."""
    if run.manifest.base is None:
        return None
    from align.models.load import load_tokenizer

    tokenizer = load_tokenizer(run.base)
    use_template(tokenizer, config.data.template, config.data.template_kwargs)
    return tokenizer


def without_duplicates(
    rows: Rows, funnel: Funnel, order: np.ndarray, stage: DataStageConfig, engine: TaskRunner
) -> Duplicates:
    """Find the duplicates of rows that stay, and leave them out of the funnel unless they are only to be reported."""
    asked = stage.duplicates
    found = [NO_DUPLICATES]
    begins("looks for duplicates among", int(funnel.kept.sum()))
    if asked.exact:
        found.append(copies(rows, funnel.kept, order, funnel.source, asked.among))
        without(funnel, "after_exact_dedup", found[-1].dropped, asked)
    if asked.near is not None and rows.kind == DOCUMENTS:
        alone = funnel.kept.copy()
        alone[found[-1].dropped] = False  # also where copies are only reported
        near = near_duplicates(
            rows, alone, order, funnel.source, threshold=asked.near, among=asked.among, engine=engine
        )
        found.append(near)
        without(funnel, "after_near_dedup", near.dropped, asked)
    return joined(found)


def without(funnel: Funnel, step: str, rows: np.ndarray, asked: DuplicatesConfig | ContaminationConfig) -> None:
    """Leave rows out of the funnel, unless they are only to be reported."""
    funnel.drop(step, rows if asked.action == "remove" else rows[:0])


def divided(rows: Rows, funnel: Funnel, duplicates: Duplicates, config: Config) -> np.ndarray:
    """Return whether each row is measured on, bool (N). Rows that belong together are on one side."""
    split = config.stage.split
    numbers = np.flatnonzero(funnel.kept)
    test = np.zeros(len(funnel.kept), bool)

    def links() -> Iterator[np.ndarray]:  # one after another: each is as long as the rows are many
        yield group_labels(rows.column("group"), funnel.source)[numbers]
        yield duplicate_labels(duplicates, len(test))[numbers]

    of = units(rows.first_bits("question")[numbers], *(labels for labels in links() if (labels >= 0).any()))
    if split.by == "question":
        test[numbers] = held_back(of, config.data.held_out)
        return test
    values = rows.column("time" if split.by == "time" else "split").take(numbers).to_pylist()
    column = next(iter(split.read.values()))
    is_test = written_since(values, split.since, column) if split.by == "time" else named_sides(values, column)
    test[numbers] = whole_units(of, is_test)
    return test


def shared_sides(rows: Rows, funnel: Funnel, test: np.ndarray, stage: DataStageConfig) -> Matches:
    """Find the rows to train on that give away rows to measure on."""
    measured = funnel.kept & test & stage.contamination.test
    near = stage.contamination.near
    if near and rows.kind == DOCUMENTS and stage.duplicates.finds_all(near):
        near = None  # of rows that are nearly the same, one alone was kept
    leaks = leaks_of(rows, measured, funnel.kept & ~test, near)
    if near is None or rows.kind != DOCUMENTS:
        return leaks
    return drop_templated(leaks, rows, measured, near, finds_all=near >= SURE)


def forgotten(run: Run, config: Config, given: Forgetting) -> StageResult:
    """Write the data set again without some rows, and only then take the old one away."""
    artifact = run.folder / "artifact"
    with alone_on(given.old):
        said = read_replacement(given.old, "data.path")
        if said is None:
            found = data_set(given.old)
            at = utc_now()
            shutil.rmtree(artifact, ignore_errors=True)  # of an attempt that was cut off
            with atomic.publish_folder(artifact) as folder:
                forget(folder, found, given.masks, given.reason, at)
            said = {
                "by": run.manifest.ref,
                "folder": str(run.folder.absolute()),
                "reason": given.reason,
                "at": at,
                "root": found.data["root"],
                "digest": run.inputs["data"].digest,
            }
        elif said["by"] != run.manifest.ref:
            check_not_replaced(given.old, "data.path")
        data = data_set(artifact).data
        retire(given.old, said)
    roots = {*roots_before(data)}
    used, unread = find_users(config.run.folder, lambda read: read.details.get("root") in roots)
    used = [name for name in used if not name.startswith("data/")]
    count = data["replaces"]["count"]
    lines = [f"{counted(count, 'row')} forgotten; root {data['root'][:12]} replaces {said['root'][:12]}"]
    lines.append(f"data:{given.name} is removed, with its report and examples")
    lines.append(
        "runs that trained on it, or on what was made from it:" if used else "no run here names it as its data"
    )
    lines += used
    lines += ["runs that cannot be read, so look yourself:", *unread] if unread else []
    return StageResult({**metrics_of(data), "forgotten": count, "runs": used}, tuple(lines))
