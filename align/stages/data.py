"""`stage=data`: build one data set from many sources, or remove rows from a data set (`stage.action=forget`).

read and clean the sources into temporary files (the spool)
score the rows and drop those outside the cuts
drop rows that are like rows of evaluations (decontamination), duplicates, and rows beyond a source's cap
divide into a training and a test side; drop training rows that are like test rows
mix the sources of the training side by weight
publish the data set with its report
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from align.annotate.posteriors import load_soft_preferences
from align.annotate.store.preference_pairs import load_preferences
from align.annotate.store.vote_selection import VoteSelection
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
from align.core.files import parse_user_path, require_readable
from align.core.functions import find_definitions, load_function
from align.core.functions import find_module_file as source_of_function
from align.core.types import StageResult
from align.data.chat.encode import count_document_tokens
from align.data.chat.template import set_chat_template
from align.data.chat.training_view import render_tokens
from align.data.clean.cleaner import Cleaner
from align.data.clean.outcome import Step
from align.data.clean.quality import CountTokens
from align.data.clean.steps import create_steps
from align.data.dedup.evaluation_overlap import OverlapMatches
from align.data.dedup.near_duplicates import Duplicates
from align.data.read.content import DOCUMENTS, FEEDBACK
from align.data.read.files import compute_read_share
from align.data.sets.contamination import LeakFinder, drop_templated_leaks, find_split_leaks
from align.data.sets.duplicates import (
    NO_DUPLICATES,
    concatenate_duplicates,
    find_cluster_heads,
    find_exact_duplicates,
    find_near_duplicates,
    label_clusters,
    rank_rows,
)
from align.data.sets.evaluations import FIELD as AGAINST
from align.data.sets.evaluations import parse_evaluation_sets, read_evaluation_sets
from align.data.sets.forget import (
    RowRemoval,
    delete_replaced_data_set,
    iter_replaced_roots,
    lock_data_set,
    plan_row_removal,
    rewrite_without_rows,
)
from align.data.sets.gather import FactOptions, SourceImport
from align.data.sets.mix import (
    Funnel,
    Mixture,
    compute_draw_keys,
    compute_mixture,
    compute_target_shares,
    select_over_caps,
)
from align.data.sets.parallel import DaftRunner, TaskRunner, in_process_runner, write_parts_in_workers
from align.data.sets.published import RowSelection, load_data_set, write_data_set
from align.data.sets.report import (
    DROPPED,
    ExampleWriter,
    StepLoss,
    build_data_set_metrics,
    build_length_histograms,
    count_duplicates_and_leaks,
    count_hits_by_set,
    describe_sources,
    find_read_losses,
    list_cleaning_examples,
)
from align.data.sets.score_cuts import PIECE, count_scored, mask_outside_cuts, score_spool, summarize_scores
from align.data.sets.score_cuts import load_records as read_rows
from align.data.sets.source import Source, detect_row_shapes, load_active_votes, parse_sources, rank_by_name
from align.data.sets.splits import (
    assign_units,
    extend_to_units,
    is_written_since,
    label_groups,
    parse_split_column,
    parse_timestamp,
    select_held_out,
)
from align.data.sets.spool import Spool, SpoolRows
from align.data.sources import build_files_input
from align.models.base import find_base
from align.report.data_set_page import format_shapes, iter_summary_lines, list_drop_warning_lines
from align.report.figure_text import pluralize
from align.report.reading_progress import create_progress_printer, create_reading_progress, print_start
from align.reward.inputs import load_reward_artifacts, resolve_reward_inputs
from align.run import Input, Run, atomic, file_digest
from align.run.artifacts import read_replacement, require_not_replaced
from align.run.folder import utc_now
from align.run.lineage import find_users
from align.stages.runner import StageInputs, open_tracker
from align.track import show_progress

MAX_LABEL_LENGTH = 60
"""Maximum number of characters that the sources' names may take in the derived name of a run."""


def inputs(config: Config) -> StageInputs:
    """Resolve the sources, evaluation sets, functions and models of a new data set, or the rows to forget."""
    stage: DataStageConfig = config.stage
    if stage.action == FORGET:
        return resolve_forget_inputs(config)
    path_source = {"path": config.data.path, "columns": config.data.columns, "metadata": config.data.metadata}
    entries = stage.sources or [{key: value for key, value in path_source.items() if value is not None}]
    selection = VoteSelection.from_settings(config.data)
    store = find_store_url(config)
    load_pairs = load_soft_preferences if config.data.soft_labels else load_preferences
    sources = [source.resolve(store, selection, load_pairs) for source in parse_sources(entries)]
    # Each call checks a setting against the sources before any data is read.
    rank_by_name(sources, stage.duplicates.prefer, "stage.duplicates.prefer")
    compute_target_shares([1.0] * len(sources), [source.weight for source in sources], stage.mix.temperature)
    create_steps(stage.clean, "stage.clean", count_tokens=(lambda _: 0) if stage.counts_tokens else None)
    if stage.split.since is not None:
        parse_timestamp(stage.split.since, "stage.split.since")
    records = {f"sources.{source.name}": source.build_input() for source in sources}
    for i, evaluation_set in enumerate(parse_evaluation_sets(stage.contamination.against)):
        records[f"against.{i}"] = build_files_input(evaluation_set.path, f"{AGAINST}[{i}]")
    for i, spec in enumerate(stage.list_step_arguments("fn")):
        field = "stage.clean, fn"
        # Digests of the files, since a name may refer to another function later.
        definitions = [f"{file_digest(file)}:{name}" for file, name in find_definitions(load_function(spec, field))]
        module_file = source_of_function(spec, field)
        digest = file_digest(module_file) if module_file else spec
        records[f"clean.fn.{i}"] = Input(digest, ref=spec, details={"defined": definitions})
    for i, path in enumerate(stage.list_step_arguments("patterns")):
        patterns_file = parse_user_path(path, "stage.clean, patterns")
        require_readable(patterns_file, "stage.clean, patterns")
        records[f"clean.patterns.{i}"] = Input(file_digest(patterns_file), path=path)
    if stage.score.by == REWARD:
        records |= resolve_reward_inputs(build_reward_spec(config.reward), config.run.folder, None)
    base = None
    if config.model.path is not None:  # used to count tokens, to score rows and to render the report's examples
        base = find_base(config.model.path, config.model.revision)
        records["base"] = Input(base.digest, ref=base.id)
    name = "-".join(source.name for source in sources)[:MAX_LABEL_LENGTH]
    return StageInputs(config, name, base, records, lambda: (sources,))


def resolve_forget_inputs(config: Config) -> StageInputs:
    """Return the inputs of `stage.action=forget`: the published data set and the rows to remove from it.

    The ids of the rows are removed from the configuration, because the id of a short text can be guessed.
    """
    data_path = Path(config.data.path or "")
    task, record = plan_row_removal(data_path, config.stage.forget, partial(load_active_votes, find_store_url(config)))
    config = replace_values(config, stage=replace_values(config.stage, forget=NOT_KEPT))
    return StageInputs(config, f"{task.name}-forget", None, {"data": record}, lambda: (task,))


def run(run: Run, config: Config, sources_or_task: list[Source] | RowRemoval) -> StageResult:
    if isinstance(sources_or_task, RowRemoval):
        return republish_without_rows(run, config, sources_or_task)
    return build_data_set(run, config, sources_or_task)


def build_data_set(run: Run, config: Config, sources: list[Source]) -> StageResult:
    """Read, clean, score, deduplicate, split and mix the rows of all sources, and publish them as a data set."""
    stage: DataStageConfig = config.stage
    names = [source.name for source in sources]
    source_ranks = rank_by_name(sources, stage.duplicates.prefer, "stage.duplicates.prefer")
    engine = (
        in_process_runner if stage.engine == EMBEDDED else DaftRunner(stage.engine == RAY, stage.workers, stage.ray)
    )
    shapes = [detect_row_shapes(source) for source in sources]
    for source, shape in zip(sources, shapes, strict=True):
        if shape["shapes"]:
            print(format_shapes(source.name, shape), flush=True)
    evaluation_sets = parse_evaluation_sets(stage.contamination.against)
    evaluations = LeakFinder(read_evaluation_sets(evaluation_sets), stage.contamination.near)
    evaluation_paths = [evaluation_set.path for evaluation_set in evaluation_sets]
    tokenizer = load_base_tokenizer(run, config)
    token_counter = None if tokenizer is None else partial(count_document_tokens, tokenizer)
    steps = create_steps(stage.clean, "stage.clean", count_tokens=token_counter)
    kind, read_counts = gather_sources(run, config, sources, steps, token_counter, engine)
    rows = SpoolRows(Spool(run.checkpoints), kind, names)
    hide_personal = Cleaner(steps).mask_personal_data
    funnel = Funnel(rows.load_numbers("source").astype(np.int64), names)
    funnel.record_step("after_cleaning")
    examples = ExampleWriter(run.folder, rows, funnel.source, hide_personal)
    losses = list[StepLoss]()

    def add_losses(new_losses: Iterable[StepLoss]) -> None:
        for loss in new_losses:
            losses.append(loss)
            print("\n".join(list_drop_warning_lines(loss)), flush=True)

    funnel.watch = lambda step: add_losses(examples.find_losses(funnel, step))
    add_losses(find_read_losses(names, read_counts, hide_personal))
    row_scores = drop_by_score(run, config, rows, funnel)
    with discard_spool_if_refused(run):
        random_order = compute_draw_keys(rows.load_first_bits("content_id"), config.seed)
        evaluation_leaks = evaluations.find_leaks(rows, funnel.kept)
        drop_unless_reporting(funnel, "after_decontamination", evaluation_leaks.text, stage.contamination)
        duplicates = drop_duplicate_rows(rows, funnel, rank_rows(funnel.source, source_ranks), stage, engine)
        caps = [source.cap for source in sources]
        funnel.drop("after_caps", select_over_caps(funnel.kept, funnel.source, random_order, caps))
        is_test = choose_test_rows(rows, funnel, duplicates, config)
        test_leaks = find_leaks_between_splits(rows, funnel, is_test, stage)
        drop_unless_reporting(funnel, "after_test_decontamination", test_leaks.text, stage.contamination)
        mix = stage.mix
        size = np.ones(len(is_test), np.int64) if mix.by == "rows" else rows.load_numbers(mix.by).astype(np.int64)
        train = compute_mixture(
            funnel.kept & ~is_test,
            funnel.source,
            size,
            random_order,
            names,
            weights=[source.weight for source in sources],
            total=mix.total,
            repeat=mix.repeat,
            temperature=mix.temperature,
        )
        require_remaining_rows(config, funnel, is_test, train, evaluation_leaks, test_leaks)

    times = np.where(funnel.kept & is_test, 1, train.times).astype(np.int32)  # only the training side is mixed
    is_published = times > 0
    selection = RowSelection(
        times, is_test, duplicates.dropped, find_cluster_heads(duplicates), row_scores.scores if row_scores else None
    )
    evidence = count_hits_by_set(evaluation_paths, evaluation_leaks) + count_hits_by_set(["the test split"], test_leaks)
    description = {
        **describe_sources(sources, run.inputs, shapes, read_counts, funnel, is_test, train),
        "evaluations": evidence,
        "found": count_duplicates_and_leaks(duplicates, evaluation_leaks, test_leaks),
        **(row_scores.summary if row_scores else {}),
        "lengths": build_length_histograms(
            rows.load_numbers("characters")[is_published], funnel.source[is_published], names
        ),
        "losses": [{key: loss[key] for key in ("source", "step", "removed", "of")} for loss in losses],
    }
    target = run.folder / "artifact"
    shutil.rmtree(target, ignore_errors=True)
    print_start("publishes", int(times.sum()))
    with atomic.publish_folder(target) as folder:
        data = write_data_set(folder, rows, selection, description)
    evaluation_examples = examples.describe_leaks(evaluation_leaks, evaluation_paths)
    test_examples = examples.describe_leaks(test_leaks, ["the test split"])
    examples.write(DROPPED, list_cleaning_examples(names, read_counts) + evaluation_examples + test_examples)
    examples.write_duplicates(duplicates, selection.heads)
    examples.write_rows(is_published & ~is_test, partial(render_tokens, tokenizer))
    if row_scores:
        examples.write_scores(row_scores.scores, row_scores.is_dropped)
    with open_tracker(run) as track:
        for step, (name, counts) in enumerate(funnel.steps.items(), start=1):
            track.log(step, {"name": name, "rows": sum(counts)})
    return StageResult(build_data_set_metrics(data), tuple(iter_summary_lines(data, to_plain_dict(config)["stage"])))


@contextmanager
def discard_spool_if_refused(run: Run) -> Iterator[None]:
    """Delete the run's temporary rows if the block raises InputError because of the data, and raise it again.

    A resumed run would fail with them again. They stay if the disk is full or workers are missing.
    """
    try:
        yield
    except InputError as error:
        if not isinstance(error, StorageError) and not error.field.startswith(("stage.engine", "stage.ray")):
            shutil.rmtree(run.checkpoints)
        raise


def require_remaining_rows(
    config: Config,
    funnel: Funnel,
    is_test: np.ndarray,
    train: Mixture,
    evaluation_leaks: OverlapMatches,
    test_leaks: OverlapMatches,
) -> None:
    """Raise InputError if the filters left no row at all, or no training row although not all rows are held out."""
    field = "stage.sources"
    names = ", ".join(funnel.names)
    removes = config.stage.contamination.action == "remove"
    if removes and len(evaluation_leaks.text) and not any(funnel.steps["after_decontamination"]):
        problem = "leave no row: all are like rows of stage.contamination.against"
        raise InputError(field, names, problem, "Write stage.contamination.action=report, and look at its report.")
    require(bool(funnel.kept.any()), field, names, "leave no row", "Look at the settings that leave rows out.")
    if config.data.held_out == 1 or train.times.any():
        return
    if removes and len(test_leaks.text) and not (funnel.kept & ~is_test).any():
        problem = "leave no row to train on: all training rows are similar to test rows"
        raise InputError(field, names, problem, "Write stage.contamination.test=false, or another data.held_out.")
    raise InputError(field, names, "leave no row to train on", "Look at the report of a run with data.held_out=1.")


class GatheredSources(NamedTuple):
    """The record type of the rows read from all sources, and the row counts of each source.

    Attributes:
        kind: the kind of the records, such as conversations or preference pairs.
        counts: for each source, its numbers of rows read, cleaned and left out.
    """

    kind: str
    counts: Sequence[Mapping[str, Any]]


def gather_sources(
    run: Run,
    config: Config,
    sources: Sequence[Source],
    steps: Sequence[tuple[str, Step]],
    token_counter: CountTokens | None,
    engine: TaskRunner,
) -> GatheredSources:
    """Read and clean the rows of every source, and write them to temporary files (the spool) in the run's folder.

    Raises:
        InputError: a row is invalid, sources are of different kinds, or one is empty after cleaning.
    """
    stage: DataStageConfig = config.stage
    options = FactOptions(
        stage.duplicates.over,
        stage.duplicates.near is not None,
        stage.split.read.get("split", ""),
        stage.split.read.get("time", ""),
        token_counter if stage.mix.by == "tokens" else None,
    )
    spool = Spool(run.checkpoints)
    skip_bad_rows = config.data.on_bad_row == "skip"
    with discard_spool_if_refused(run):
        kind = sources[0].detect_kind()
    imports = [
        SourceImport(spool, source, number, steps, options, kind, skip_bad_rows)
        for number, source in enumerate(sources)
    ]
    if engine is not in_process_runner:
        report = create_progress_printer(
            lambda parts, total, seconds: f"{parts:,} of {total:,} parts made in {seconds:.0f} s"
        )
        write_parts_in_workers(engine, imports, report)
    with discard_spool_if_refused(run):
        read_counts = [
            gathering.run(
                create_reading_progress(gathering.source.name, partial(compute_read_share, gathering.source.files))
            )
            for gathering in imports
        ]
    return GatheredSources(kind, read_counts)


class RowScores(NamedTuple):
    """The scores of all rows, which of the rows are dropped for their score, and a summary.

    Attributes:
        scores: float64 (N), nan for a row without a score.
        is_dropped: bool (N), True for rows outside the cuts.
        summary: the scores' entry in `data.json`.
    """

    scores: np.ndarray
    is_dropped: np.ndarray
    summary: dict[str, Any]


class TitledScores(NamedTuple):
    """The scores of all rows, and the name of the model or reward that gave them.

    Attributes:
        scores: float64 (N), nan for a row without a score.
        scorer_title: the scorer's name for people.
    """

    scores: np.ndarray
    scorer_title: str


def score_all_rows(run: Run, config: Config, rows: SpoolRows) -> TitledScores:
    """Compute a score for every row: a model's loss on it, or the reward of `reward=`, as `stage.score.by` says.

    Models are loaded here and freed on return.

    Raises:
        InputError: the rows are labelled answers, no row can be scored, or a score is not finite.
    """
    from align.evals.judges.identity import get_scorer_title
    from align.evals.row_scores import load_loss_scorer, load_reward_scorer
    from align.models.finite_checks import build_divergence_error
    from align.models.load import choose_device, choose_dtype

    settings: ScoreConfig = config.stage.score
    is_loss = settings.by == LOSS
    title = run.base.id if is_loss else get_scorer_title(to_plain_dict(config)["reward"], run.inputs)
    problem = "scores rows to imitate, but these rows are labelled answers, some of them unwanted"
    require(rows.kind != FEEDBACK, "stage.score.by", settings.by, problem, "Drop it.")
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    if is_loss:
        score = load_loss_scorer(
            run.base,
            config.data.template,
            config.data.template_kwargs,
            device,
            dtype,
            settings.max_length,
            settings.batch_size,
        )
    else:
        first_rows = read_rows(rows, np.arange(min(PIECE, rows.count)))
        models = load_reward_artifacts(run.inputs)
        score = load_reward_scorer(
            build_reward_spec(config.reward), models, first_rows, device, dtype, settings.batch_size
        )

    def score_finite(records: Sequence[Any]) -> np.ndarray:
        scores = score(records)
        if np.isinf(scores).any():
            raise build_divergence_error(f"the {settings.by} of a row by {title} is not finite", None, config.dtype)
        return scores

    print(f"scores {pluralize(rows.count, 'row')} by the {settings.by} of {title}", flush=True)
    with show_progress("score", rows.count, count_scored(rows)) as bar:
        scores = score_spool(rows, score_finite, bar.advance)
    missing = "no text and no answer that is trained on" if is_loss else "no answer behind a question"
    problem = f"finds nothing to score: there is {missing}, or none fits into the model's context"
    require(not np.isnan(scores).all(), "stage.score.by", settings.by, problem, "Drop it, or score by the other.")
    return TitledScores(scores, title)


def drop_by_score(run: Run, config: Config, rows: SpoolRows, funnel: Funnel) -> RowScores | None:
    """Score all rows, drop rows outside the bounds of `stage.score` from `funnel`, and return the scores.

    Returns None if `stage.score.by` is not set.
    """
    settings: ScoreConfig = config.stage.score
    if settings.by is None:
        return None
    scores, scorer = score_all_rows(run, config, rows)
    is_dropped = mask_outside_cuts(
        scores,
        rows.load_first_bits("content_id"),
        funnel.source,
        settings.keep,
        settings.within,
        settings.least,
        settings.most,
    )
    funnel.drop("after_score", is_dropped)
    summary = {
        "scorer": scorer,
        **{key: getattr(settings, key) for key in ("by", "within", "least", "most")},
        "keep": list(settings.keep),
        **summarize_scores(scores, is_dropped, funnel.source, funnel.names),
    }
    return RowScores(scores, is_dropped, {"scores": summary})


def load_base_tokenizer(run: Run, config: Config) -> Any | None:
    """Load the tokenizer of `model=` with the configured chat template, or return None if no model is configured.

    It counts tokens and renders rows for the report.
    """
    if run.manifest.base is None:
        return None
    from align.models.load import load_tokenizer

    tokenizer = load_tokenizer(run.base)
    set_chat_template(tokenizer, config.data.template, config.data.template_kwargs)
    return tokenizer


def drop_duplicate_rows(
    rows: SpoolRows, funnel: Funnel, order: np.ndarray, stage: DataStageConfig, engine: TaskRunner
) -> Duplicates:
    """Find exact and near duplicates among the remaining rows, and drop all but one of each cluster from `funnel`.

    With `stage.duplicates.action=report` they are only counted.

    Args:
        order: order of preference of the rows: the first one of a cluster stays.
    """
    settings = stage.duplicates
    found_by_step = [NO_DUPLICATES]
    print_start("looks for duplicates among", int(funnel.kept.sum()))
    if settings.exact:
        exact = find_exact_duplicates(rows, funnel.kept, order, funnel.source, settings.among)
        found_by_step.append(exact)
        drop_unless_reporting(funnel, "after_exact_dedup", exact.dropped, settings)
    if settings.near is not None and rows.kind == DOCUMENTS:
        is_compared = funnel.kept.copy()
        is_compared[found_by_step[-1].dropped] = False  # exact duplicates stay in the funnel if only reported
        near = find_near_duplicates(
            rows, is_compared, order, funnel.source, threshold=settings.near, among=settings.among, runner=engine
        )
        found_by_step.append(near)
        drop_unless_reporting(funnel, "after_near_dedup", near.dropped, settings)
    return concatenate_duplicates(found_by_step)


def drop_unless_reporting(
    funnel: Funnel, step: str, rows: np.ndarray, settings: DuplicatesConfig | ContaminationConfig
) -> None:
    """Drop the rows with these indices from `funnel` if `settings.action` is `remove`; otherwise drop none.

    The row counts of the step are recorded either way.
    """
    funnel.drop(step, rows if settings.action == "remove" else rows[:0])


def choose_test_rows(rows: SpoolRows, funnel: Funnel, duplicates: Duplicates, config: Config) -> np.ndarray:
    """Return a mask of the rows in the test split, bool (N), which keeps related rows in the same split.

    Related rows have the same question, are of the same group or in one cluster of duplicates.
    """
    split = config.stage.split
    numbers = np.flatnonzero(funnel.kept)
    is_test = np.zeros(len(funnel.kept), bool)

    def iter_links() -> Iterator[np.ndarray]:  # a generator, so that only one array of N labels is in memory
        yield label_groups(rows.load_text_column("group"), funnel.source)[numbers]
        yield label_clusters(duplicates, len(is_test))[numbers]

    links = (labels for labels in iter_links() if (labels >= 0).any())
    row_units = assign_units(rows.load_first_bits("question")[numbers], *links)
    if split.by == "question":
        is_test[numbers] = select_held_out(row_units, config.data.held_out)
        return is_test
    values = rows.load_text_column("time" if split.by == "time" else "split").take(numbers).to_pylist()
    column = next(iter(split.read.values()))
    is_test_value = (
        is_written_since(values, split.since, column) if split.by == "time" else parse_split_column(values, column)
    )
    is_test[numbers] = extend_to_units(row_units, is_test_value)
    return is_test


def find_leaks_between_splits(
    rows: SpoolRows, funnel: Funnel, is_test: np.ndarray, stage: DataStageConfig
) -> OverlapMatches:
    """Find the training rows that contain the text of a test row or are its near duplicates."""
    is_measured = funnel.kept & is_test & stage.contamination.test
    near = stage.contamination.near
    if near and rows.kind == DOCUMENTS and stage.duplicates.finds_all(near):
        near = None  # near-duplicates were dropped already
    leaks = find_split_leaks(rows, is_measured, funnel.kept & ~is_test, near)
    if near is None or rows.kind != DOCUMENTS:
        return leaks
    return drop_templated_leaks(leaks, rows, is_measured, near, finds_all=near >= SURE)


def republish_without_rows(run: Run, config: Config, task: RowRemoval) -> StageResult:
    """Publish a copy of a data set without the rows to forget, then delete the files of the old data set.

    Lists the runs that were trained on the old one.
    """
    artifact = run.folder / "artifact"
    with lock_data_set(task.old):
        replacement = read_replacement(task.old, "data.path")
        if replacement is None:
            old_data_set = load_data_set(task.old)
            at = utc_now()
            shutil.rmtree(artifact, ignore_errors=True)  # of an attempt that was interrupted
            with atomic.publish_folder(artifact) as folder:
                rewrite_without_rows(folder, old_data_set, task.masks, task.reason, at)
            replacement = {
                "by": run.manifest.ref,
                "folder": str(run.folder.absolute()),
                "reason": task.reason,
                "at": at,
                "root": old_data_set.data["root"],
                "digest": run.inputs["data"].digest,
            }
        elif replacement["by"] != run.manifest.ref:
            require_not_replaced(task.old, "data.path")
        data = load_data_set(artifact).data
        delete_replaced_data_set(task.old, replacement)
    roots = {*iter_replaced_roots(data)}
    users, unreadable = find_users(config.run.folder, lambda record: record.details.get("root") in roots)
    users = [name for name in users if not name.startswith("data/")]
    count = data["replaces"]["count"]
    lines = [f"{pluralize(count, 'row')} forgotten; root {data['root'][:12]} replaces {replacement['root'][:12]}"]
    lines.append(f"data:{task.name} is removed, with its report and examples")
    lines.append(
        "runs that trained on it, or on an artifact made from it:"
        if users
        else "no run under run.root names it as its data"
    )
    lines += users
    if unreadable:
        lines += ["runs that cannot be read; check them yourself:", *unreadable]
    return StageResult({**build_data_set_metrics(data), "forgotten": count, "runs": users}, tuple(lines))
