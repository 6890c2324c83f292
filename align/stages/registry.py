"""`stage=registry`: list, compare, trace and replay runs, promote artifacts to aliases, and delete data.

Each action prints lines and makes no run.
"""

from __future__ import annotations

import difflib
import json
import shutil
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import nullcontext
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align import mirrors
from align.config.addresses import LOOPBACK, build_server_urls, list_tls_warnings
from align.config.command import format_command_line, iter_command_words
from align.config.registry import FORGETS, GARBAGE, RegistryConfig
from align.config.root import Config, find_store_url
from align.config.stages import WITH_RUNS
from align.core.aliases import parse_aliases
from align.core.chain import ChainHead
from align.core.errors import NOT_PASSED, MissingArtifact, require
from align.core.files import parse_user_path
from align.core.outputs import refuse_foreign_file
from align.core.redaction import MASK
from align.registry.formatting import USUAL, as_csv, as_json, as_object, as_table, get_value, iter_details
from align.registry.index import Index, query_index
from align.registry.query import find_path, find_runs
from align.registry.record import Record, get_number
from align.report.figure_text import escape_unprintable, pluralize
from align.report.page import is_sealed
from align.run.alias_log import SIGN, Change, read_alias_log
from align.run.artifacts import SERVES_AS_SFT, find_alias_change
from align.run.manifest import Manifest

if TYPE_CHECKING:  # each action imports its modules itself: all of them take a tenth of a second
    from align.registry import garbage, trace
    from align.registry.trace import Votes

TABLE_LIMIT = 100
"""Default maximum number of runs in a table, if `stage.limit` is not set."""
NO_LIMIT = 2**62
GATES = "gates"
"""Name of the folder in `run.root` with the gates that decide promotions."""
OWN_GATES = "conf/gates"
"""Default folder of the gates that decide promotions, relative to the working folder."""
READABLE = "!=unreadable"
"""Condition on a run's status that excludes runs with an unreadable manifest."""


def list_runs(config: Config) -> Iterator[str]:
    """Yield the lines of a table, JSON or CSV with the runs under `run.root` that match the filter `stage.where`."""
    stage: RegistryConfig = config.stage
    is_table = stage.format == "table"
    keys = [key for key in stage.columns if not (is_table and key in USUAL)]

    def query(index: Index) -> tuple[list[Record], int, int, str]:
        conditions = (stage.where or {}).items()
        records, count = find_runs(index, conditions, get_sort_keys(stage), get_limit(stage), keys)
        return records, count, len(index.unnamed), index.aliases_error

    records, count, unnamed, aliases_error = query_index(require_root(config), query)
    if not is_table:
        yield from {"json": as_json, "csv": as_csv}[stage.format](records, stage.columns)
        return
    if records:
        yield from as_table(records, stage.columns, datetime.now(UTC))
    else:
        yield "no run matches" if stage.where else "no runs yet"
    if len(records) < count:
        yield f"{len(records):,} of {pluralize(count, 'run')}: stage.limit=N shows more."
    if unnamed:
        yield f"{pluralize(unnamed, 'folder')} left out: their names are not UTF-8"
    if aliases_error:
        yield f"aliases left out: {aliases_error}"


def get_limit(stage: RegistryConfig) -> int:
    """Return the maximum number of runs to list: `stage.limit`, or by default 100 in a table and no limit otherwise."""
    return stage.limit or (TABLE_LIMIT if stage.format == "table" else NO_LIMIT)


def get_sort_keys(stage: RegistryConfig) -> list[str]:
    return [stage.sort] if isinstance(stage.sort, str) else list(stage.sort)


def compare_runs(config: Config) -> Iterable[str]:
    """Yield the lines of a comparison of several runs: their metrics and the settings in which they differ.

    Writes a page with curves to `stage.html`, if it is set.
    """
    from align.registry import comparison

    stage = config.stage
    root = require_root(config)
    if stage.html:  # before anything is printed
        refuse_foreign_file(parse_user_path(stage.html, "stage.html"), "stage.html", is_sealed)

    def query(index: Index) -> tuple[list[Record], int]:
        refs = stage.runs or (stage.sweep and comparison.list_sweep_runs(root, stage.sweep))
        if refs:
            for key in stage.columns:
                find_path(index, "stage.columns", key, allow_object=True)
            records = [find_run(index, ref, "stage.runs") for ref in refs]
            unique = {record["run"]: record for record in records}
            has_duplicate = len(unique) < len(refs)
            require(not has_duplicate, "stage.runs", list(stage.runs), "names a run twice", "Name each once.")
            return records, len(records)
        where = {"status": READABLE, **stage.where}
        return find_runs(index, where.items(), get_sort_keys(stage), get_limit(stage), stage.columns)

    records, count = query_index(root, query)
    if not records:
        raise MissingArtifact("stage.where", stage.where, "matches no run", "Ask with stage.action=list.")
    for key in stage.columns:
        is_figure = any(get_number(get_value(record, key)) is not None for record in records)
        remedy = "Name figures, such as metrics.loss_after."
        require(is_figure, "stage.columns", key, "is no figure of these runs", remedy)
    side_by_side = comparison.compare(root, records, stage.columns)
    if stage.format == "table":
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        yield from comparison.as_lines(side_by_side, width)
        if len(records) < count:
            yield f"{len(records):,} of {pluralize(count, 'run')}: stage.limit=N compares more."
    elif stage.format == "json":
        yield to_json(comparison.as_objects(side_by_side))
    else:
        yield comparison.as_csv(side_by_side)
    if stage.html:
        from align.registry.comparison_page import build_page  # matplotlib takes a second

        path = parse_user_path(stage.html, "stage.html")
        remedy = f"Make {path.parent} first."
        require(path.parent.is_dir(), "stage.html", str(path), "is in a folder that does not exist", remedy)
        require(not path.is_dir(), "stage.html", str(path), "is a folder", "Name a file in it.")
        page = build_page(side_by_side, root).write(path, "stage.html")
        if stage.format == "table":
            yield f"curves and plots: {page}"


def show_run(config: Config) -> Iterable[str]:
    """Return the lines to print about the manifest of the run `stage.run`, as a table, JSON or CSV."""
    stage: RegistryConfig = config.stage
    record = query_index(require_root(config), lambda index: find_run(index, str(stage.run)))
    if stage.format == "table":
        return iter_details(record)
    return as_object(record, stage.columns) if stage.format == "json" else as_csv([record], stage.columns)


def diff_runs(config: Config) -> Iterable[str]:
    """Return the lines to print about the settings and inputs in which the two runs `stage.runs` differ."""
    from align.registry import differences

    stage = config.stage
    root = require_root(config)
    first, second = query_index(root, lambda index: [find_run(index, ref, "stage.runs") for ref in stage.runs])
    diff = differences.find_differences((root / first["folder"], root / second["folder"]), (first, second))
    return differences.as_lines(diff) if stage.format == "table" else [to_json(diff)]


def find_run(index: Index, ref: str, field: str = "stage.run") -> Record:
    """Return the record of a run in the index of runs, for a reference such as `sft:latest`.

    Args:
        ref: `STAGE:NAME`, `STAGE:latest`, an alias or a run's folder.

    Raises:
        MissingArtifact: there is no such run. The message has the most similar name.
        InputError: an alias has several artifacts.
    """
    if ref.startswith(SIGN):
        arms = find_alias_change(ref, index.root, field).arms
        first = arms[0]
        require(len(arms) == 1, field, ref, "points at several artifacts", f"Name one of them: {first.ref}.")
        ref = index.maker(first.digest, first.ref) or first.ref
    stage, _, name = ref.partition(":")
    folder = parse_user_path(ref, field).absolute()
    if folder.is_dir() and folder.parent.parent == index.root.absolute():
        stage = folder.parent.name
        name = folder.name
    elif name == "latest" and stage in WITH_RUNS and index.names():
        conditions = {"stage": SERVES_AS_SFT if stage == "sft" else stage, "status": "done"}
        newest, _ = find_runs(index, conditions.items(), ["-published", "-finished"], 1)
        if newest:
            stage = newest[0]["stage"]
            name = newest[0]["name"]
    if record := index.record(f"{stage}:{name}"):
        return record
    names = index.names()
    similar = difflib.get_close_matches(f"{stage}:{name}", names, n=1)
    similar = similar or [candidate for candidate in names if candidate.endswith(f":{ref}")]
    remedy = f"Did you mean {escape_unprintable(similar[0])}? " if similar else ""
    remedy += "`python -m align stage=registry` lists the runs."
    raise MissingArtifact(field, ref, f"is no run under {index.root}", remedy)


def trace_origins(config: Config) -> Iterable[str]:
    """Return the lines of a tree of the runs, data and votes that an artifact or a served response was made from."""
    from align.registry import trace
    from align.registry.trace import read_votes

    stage = config.stage
    root = require_root(config)
    full = stage.verify == "full"

    def read_project_votes(project: str, head: ChainHead) -> Votes:
        return read_votes(find_store_url(config), project, head, full)

    def query(index: Index) -> list[trace.TraceNode]:
        tracer = trace.Tracer(index, read_project_votes, full)
        if stage.response:
            return [trace.trace_response(index, tracer, stage.response)]
        if not config.artifact.startswith(SIGN):
            return [tracer.run(find_run(index, config.artifact, "artifact")["run"])]
        arms = find_alias_change(config.artifact, root, "artifact").arms
        return [tracer.run(index.maker(arm.digest, arm.ref) or arm.ref, arm.digest) for arm in arms]

    nodes = query_index(root, query)
    if stage.format == "json":
        return [to_json([node.as_json() for node in nodes])]
    return trace.as_lines(nodes)


def replay_run(config: Config) -> Generator[str, None, int]:
    """Repeat a training run in a temporary folder, compare its metrics with the recorded ones, and yield the report.

    Returns the exit status: 0 if they are the same.
    """
    from align.registry import replay

    stage = config.stage
    root = require_root(config)
    record = query_index(root, lambda index: find_run(index, str(stage.run)))
    is_table = stage.format == "table"
    report_progress = partial(print, flush=True) if is_table else str
    store_url = make_url_absolute(find_store_url(config))
    result = replay.replay(root, record, stage.steps, store_url, iter_command_words, report_progress)
    yield from replay.as_lines(result) if is_table else [to_json(result)]
    return 0 if result["same"] else NOT_PASSED


def make_url_absolute(url: str) -> str:
    """Return a database URL with the path of a SQLite file made absolute, and any other URL unchanged."""
    path = url.removeprefix("sqlite:///")
    return f"sqlite:///{Path(path).absolute()}" if path != url else url


def promote_artifact(config: Config) -> Iterable[str]:
    """Point the alias `stage.alias` to an artifact, or to several with traffic shares, if the gates allow it.

    Appends a line to the alias log. Returns the lines to print.
    """
    from align.registry import promotion
    from align.registry.gates import read_gates

    require_tracking_service(config)
    stage = config.stage
    root = require_root(config)
    alias = str(stage.alias)
    shares = {config.artifact: 1.0} if stage.arms is None else stage.arms
    arms = parse_aliases({alias: shares}, "stage.arms")[alias]
    gates = read_gates([root / GATES, parse_user_path(stage.gates or OWN_GATES, "stage.gates")])
    change, lines = promotion.promote(root, alias, arms, gates, who=stage.who, why=stage.why, override=stage.override)
    return chain(lines, mirror_alias(config, root, change))


def retire_alias(config: Config) -> Iterable[str]:
    """Retire the alias `stage.alias`: append a line to the alias log, after which it refers to nothing.

    Returns the lines to print.
    """
    from align.registry import promotion

    require_tracking_service(config)
    stage: RegistryConfig = config.stage
    root = require_root(config)
    change, lines = promotion.retire(root, str(stage.alias), who=stage.who, why=str(stage.why))
    return chain(lines, mirror_alias(config, root, change))


def show_history(config: Config) -> Iterable[str]:
    """Return lines on all changes of one alias or of all aliases, or on their targets at the time `stage.as_of`."""
    from align.registry import promotion

    stage = config.stage
    root = require_root(config)
    log = read_alias_log(root)
    aliases = {change.alias for change in log.changes}
    if stage.alias is not None and stage.alias not in aliases:
        remedy = f"The aliases are {', '.join(sorted(aliases)) or '(none yet)'}."
        raise MissingArtifact("stage.alias", stage.alias, f"is no alias under {root}", remedy)
    query_index(root, lambda index: promotion.require_complete_log(index, log))
    as_of = None if stage.as_of is None else parse_time(stage.as_of)
    if as_of is not None:
        last_changes = {
            alias: change for alias, change in log.get_current_changes(as_of).items() if stage.alias in (None, alias)
        }
        changes = [*last_changes.values()]
        lines = promotion.iter_alias_lines(last_changes)
    else:
        changes = [change for change in log.changes if stage.alias in (None, change.alias)]
        lines = promotion.iter_history_lines(log, stage.alias)
    if stage.format == "json":
        return [to_json([change.as_json() for change in changes])]
    return lines if changes else ["no alias pointed at an artifact then" if as_of else "no aliases yet"]


def collect_garbage(config: Config) -> Iterable[str]:
    """List files in run folders that no run or alias needs any more, and delete them if `stage.apply=true`.

    Returns the lines to print.
    """
    from align.registry import garbage, promotion

    stage = config.stage
    root = require_root(config)
    log = read_alias_log(root)

    def query(index: Index) -> list[garbage.Piece]:
        # With a truncated log, files that an alias needs would count as garbage.
        promotion.require_complete_log(index, log)
        return garbage.find_garbage(index, log, stage.days)

    kinds = stage.kinds or [kind for kind in GARBAGE if not stage.apply or kind != "artifacts"]
    pieces = [piece for piece in query_index(root, query) if piece.kind in kinds]
    removed = dict[str, bool]() if stage.apply else None
    if removed is not None:
        for piece, is_removed in garbage.remove_pieces(root, pieces, stage.who or promotion.get_user()):
            removed[piece.path] = is_removed
    if stage.format == "json":
        return [to_json(garbage.as_objects(pieces, removed))]
    return garbage.as_lines(pieces, removed)


def forget_data(config: Config) -> Iterator[str]:
    """List the runs and data sets that contain the data to forget, and erase it if `stage.apply=true`.

    Yields the lines to print. Runs that were trained on the data are then marked as stale.
    """
    from align.registry import forget_selection, forgetting, promotion  # they import pyarrow

    stage = config.stage
    root = require_root(config)
    store_url = make_url_absolute(find_store_url(config))
    kind = next(key for key in FORGETS if getattr(stage, key) is not None)
    selector = forget_selection.Selector(kind, str(getattr(stage, kind)), config.project)
    url_setting = str(config.store.url or "")
    # The plan prints commands, which must not hold a password.
    store_argument = f"store.url={url_setting}" if url_setting and MASK not in url_setting else ""
    is_table = stage.format == "table"
    with forgetting.hold_forget_lock(root) if stage.apply else nullcontext():
        plan = forgetting.make_plan(root, selector, store_url, iter_command_words, store_argument)
        executed = None
        if is_table:
            yield from forgetting.as_lines(plan)
        if stage.apply:
            executed = []
            for line in forgetting.execute_plan(plan, stage.who or promotion.get_user()):
                executed.append(line)
                if is_table:
                    yield line
        elif is_table:
            yield "Nothing was erased: stage.apply=true erases it, and marks these runs stale."
    if stage.format == "json":
        yield to_json(forgetting.as_object(plan, executed))


def to_json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)


def parse_time(text: str) -> datetime:
    """Parse an ISO 8601 time, in UTC if it has no time zone; a date alone means the last moment of that day."""
    moment = datetime.fromisoformat(text)
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    is_date = len(text) == len("2026-11-01")
    return moment + timedelta(days=1) - timedelta(microseconds=1) if is_date else moment


def rebuild_index(config: Config) -> Iterable[str]:
    """Rebuild the database that indexes all runs from their folders, and yield a line with the number of runs."""
    start_time = time.monotonic()
    with Index(require_root(config), rebuild=True) as index:
        place = "in memory, since its file cannot be written" if index.path is None else str(index.path)
        yield f"{index.changed:,} runs in {time.monotonic() - start_time:.1f} s; {place}"


def serve_page(config: Config) -> Iterator[str]:
    """Serve a read-only web page of all runs until the process is interrupted, and print its link. Yields nothing."""
    from align.registry.page.server import build_registry_application  # FastAPI takes a second to import
    from align.registry.trace import read_votes
    from align.web.key_link import KeyAuthenticator, OpenAuthenticator, load_or_create_key
    from align.web.server import serve_app

    stage = config.stage
    root = require_root(config)
    url, other_origins = build_server_urls(stage.host, stage.port, stage.url)

    def read_project_votes(project: str, head: ChainHead) -> Votes:
        return read_votes(find_store_url(config), project, head, verify_ledger=False)

    if stage.host in LOOPBACK and stage.url is None:
        authenticator = OpenAuthenticator()
        links = [f"open {url}"]
    else:
        key = load_or_create_key(root / "registry.key")
        # SameSite=Lax, so that links in mails and bookmarks work. This is safe, since the page changes nothing.
        attributes = f"SameSite=Lax; Max-Age=31536000{'; Secure' if url.startswith('https:') else ''}"
        authenticator = KeyAuthenticator(key, OpenAuthenticator.visitor, f"align_registry_{stage.port}", attributes)
        links = [f"open {url}/?key={key}", *list_tls_warnings(url)]
    links.append("the page is read-only; Ctrl+C ends it")
    query_index(root, lambda index: None)  # rebuilds an outdated index before the first visitor waits for it
    app = build_registry_application(root, read_project_votes, format_run_command, authenticator, [url, *other_origins])
    serve_app(app, stage.host, stage.port, lambda: print(*links, sep="\n", flush=True))
    yield from ()


def format_run_command(manifest: Manifest) -> str:
    """Return the command line that repeats a run, from the configuration and the inputs in its manifest."""
    return format_command_line(manifest.config, manifest.refs)


def require_root(config: Config) -> Path:
    """Return the folder of all runs, `run.root`, or raise InputError if it does not exist."""
    root = config.run.folder
    require(root.is_dir(), "run.root", config.run.root, "is no folder", "Name the folder that holds your runs.")
    return root


PRINTS: dict[str, Callable[[Config], Iterable[str]]] = {
    "list": list_runs,
    "show": show_run,
    "compare": compare_runs,
    "diff": diff_runs,
    "trace": trace_origins,
    "replay": replay_run,
    "promote": promote_artifact,
    "retire": retire_alias,
    "history": show_history,
    "forget": forget_data,
    "gc": collect_garbage,
    "rebuild": rebuild_index,
    "serve": serve_page,
}
"""Value of `stage.action` → function that yields the lines to print. A generator may return an exit status."""


def require_tracking_service(config: Config) -> None:
    """Raise InputError if the package of the tracking service `track` (MLflow or W&B) is not installed."""
    if config.track.name != "none":
        mirrors.require_installed(config.track.name)


def mirror_alias(config: Config, root: Path, change: Change) -> Iterable[str]:
    """Set or remove an alias at the tracking service of `track` (MLflow or W&B), if any, and yield lines about it.

    An alias of several artifacts, which no service has, is removed there.
    """
    service = config.track.name
    if service == "none":
        return
    artifact = None
    if len(change.arms) == 1:
        arm = change.arms[0]
        folder = root.joinpath(*arm.ref.split(":", 1)) / "artifact"
        artifact = mirrors.Artifact(arm.ref, "model", arm.digest, folder, {})
    elif change.arms:
        yield f"track={service}: no service has an alias of several artifacts; the alias is removed there"
    yield mirrors.set_alias(service, config.track.project, root, change.alias, artifact)
