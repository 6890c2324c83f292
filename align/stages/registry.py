"""What is known of the runs: questions that are answered from the folders, and make none."""

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
from align.config.addresses import LOOPBACK, list_origins, warn_without_tls
from align.config.command import format_command_line, iter_words
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
from align.report.figure_text import counted, one_line
from align.report.page import is_sealed
from align.run.alias_log import SIGN, Change, read_log
from align.run.artifacts import SERVES_AS_SFT, find_alias_change
from align.run.manifest import Manifest

if TYPE_CHECKING:  # a question imports what answers it: all of that takes a tenth of a second
    from align.registry import garbage, trace
    from align.registry.trace import Votes

IN_A_TABLE = 100
"""Runs that a table has unless told."""
ALL = 2**62
GATES, OWN_GATES = "gates", "conf/gates"
"""Folders of gates: beside the runs, and in the working folder."""
READABLE = "!=unreadable"


def list_runs(config: Config) -> Iterator[str]:
    stage: RegistryConfig = config.stage
    table = stage.format == "table"
    keys = [key for key in stage.columns if not (table and key in USUAL)]

    def answer(index: Index) -> tuple[list[Record], int, int, str]:
        found = find_runs(index, (stage.where or {}).items(), sort_keys(stage), limit_of(stage), keys)
        return *found, len(index.unnamed), index.aliases_error

    records, count, unnamed, aliases_error = query_index(root_of(config), answer)
    if not table:
        yield from {"json": as_json, "csv": as_csv}[stage.format](records, stage.columns)
        return
    if records:
        yield from as_table(records, stage.columns, datetime.now(UTC))
    else:
        yield "no run meets this" if stage.where else "no runs yet"
    if len(records) < count:
        yield f"{len(records):,} of {counted(count, 'run')}: stage.limit=N shows more."
    if unnamed:
        yield f"{counted(unnamed, 'folder')} left out: no name in UTF-8"
    if aliases_error:
        yield f"aliases left out: {aliases_error}"


def limit_of(stage: RegistryConfig) -> int:
    return stage.limit or (IN_A_TABLE if stage.format == "table" else ALL)


def sort_keys(stage: RegistryConfig) -> list[str]:
    return [stage.sort] if isinstance(stage.sort, str) else list(stage.sort)


def compare_runs(config: Config) -> Iterable[str]:
    from align.registry import comparison

    stage, root = config.stage, root_of(config)
    if stage.html:  # before anything is printed
        refuse_foreign_file(parse_user_path(stage.html, "stage.html"), "stage.html", is_sealed)

    def answer(index: Index) -> tuple[list[Record], int]:
        if wanted := stage.runs or (stage.sweep and comparison.list_sweep_runs(root, stage.sweep)):
            for key in stage.columns:
                find_path(index, "stage.columns", key, whole=True)
            runs = {record["run"]: record for given in wanted for record in [find_run(index, given, "stage.runs")]}
            twice = len(runs) < len(wanted)
            require(not twice, "stage.runs", list(stage.runs), "names a run twice", "Name each once.")
            return [*runs.values()], len(runs)
        where = {"status": READABLE, **stage.where}
        return find_runs(index, where.items(), sort_keys(stage), limit_of(stage), stage.columns)

    records, count = query_index(root, answer)
    if not records:
        raise MissingArtifact("stage.where", stage.where, "is met by no run", "Ask with stage.action=list.")
    for key in stage.columns:
        figures = any(get_number(get_value(record, key)) is not None for record in records)
        remedy = "Name figures, such as metrics.loss_after."
        require(figures, "stage.columns", key, "is no figure of these runs", remedy)
    side_by_side = comparison.compare(root, records, stage.columns)
    if stage.format == "table":
        yield from comparison.as_lines(
            side_by_side, shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        )
        if len(records) < count:
            yield f"{len(records):,} of {counted(count, 'run')}: stage.limit=N compares more."
    else:
        is_json = stage.format == "json"
        yield to_json(comparison.as_objects(side_by_side)) if is_json else comparison.as_csv(side_by_side)
    if stage.html:
        from align.registry.comparison_page import build_page  # matplotlib takes a second

        path = parse_user_path(stage.html, "stage.html")
        remedy = f"Make {path.parent} first."
        require(path.parent.is_dir(), "stage.html", str(path), "is in no folder that is there", remedy)
        require(not path.is_dir(), "stage.html", str(path), "is a folder", "Name a file in it.")
        page = build_page(side_by_side, root).write(path, "stage.html")
        if stage.format == "table":
            yield f"curves and plots: {page}"


def show_run(config: Config) -> Iterable[str]:
    stage: RegistryConfig = config.stage
    record = query_index(root_of(config), lambda index: find_run(index, str(stage.run)))
    if stage.format == "table":
        return iter_details(record)
    return as_object(record, stage.columns) if stage.format == "json" else as_csv([record], stage.columns)


def diff_runs(config: Config) -> Iterable[str]:
    from align.registry import differences

    stage, root = config.stage, root_of(config)
    one, other = query_index(root, lambda index: [find_run(index, given, "stage.runs") for given in stage.runs])
    found = differences.find_differences((root / one["folder"], root / other["folder"]), (one, other))
    return differences.as_lines(found) if stage.format == "table" else [to_json(found)]


def find_run(index: Index, given: str, field: str = "stage.run") -> Record:
    """The record of `STAGE:NAME`, `STAGE:latest` or a run's folder.

    Raises:
        MissingArtifact: there is none; the message has the nearest name.
    """
    if given.startswith(SIGN):
        first, *others = find_alias_change(given, index.root, field).arms
        require(not others, field, given, "means several artifacts", f"Name one of them: {first.ref}.")
        given = index.maker(first.digest, first.ref) or first.ref
    stage, _, name = given.partition(":")
    folder = parse_user_path(given, field).absolute()
    if folder.is_dir() and folder.parent.parent == index.root.absolute():
        stage, name = folder.parent.name, folder.name
    elif name == "latest" and stage in WITH_RUNS and index.names():
        done = {"stage": SERVES_AS_SFT if stage == "sft" else stage, "status": "done"}
        newest, _ = find_runs(index, done.items(), ["-published", "-finished"], 1)
        stage, name = (newest[0]["stage"], newest[0]["name"]) if newest else (stage, name)
    if record := index.record(f"{stage}:{name}"):
        return record
    names = index.names()
    close = difflib.get_close_matches(f"{stage}:{name}", names, n=1) or [
        one for one in names if one.endswith(f":{given}")
    ]
    remedy = f"Did you mean {one_line(close[0])}? " if close else ""
    remedy += "`python -m align stage=registry` lists the runs."
    raise MissingArtifact(field, given, f"is no run under {index.root}", remedy)


def trace_origins(config: Config) -> Iterable[str]:
    from align.registry import trace
    from align.registry.trace import read_votes

    stage, root = config.stage, root_of(config)
    full = stage.verify == "full"

    def voters(project: str, head: ChainHead) -> Votes:
        return read_votes(find_store_url(config), project, head, full)

    def answer(index: Index) -> list[trace.TraceNode]:
        tracer = trace.Tracer(index, voters, full)
        if stage.response:
            return [trace.trace_response(index, tracer, stage.response)]
        if not config.artifact.startswith(SIGN):
            return [tracer.run(find_run(index, config.artifact, "artifact")["run"])]
        arms = find_alias_change(config.artifact, root, "artifact").arms
        return [tracer.run(index.maker(arm.digest, arm.ref) or arm.ref, arm.digest) for arm in arms]

    nodes = query_index(root, answer)
    if stage.format == "json":
        return [to_json([node.as_json() for node in nodes])]
    return trace.as_lines(nodes)


def replay_run(config: Config) -> Generator[str, None, int]:
    from align.registry import replay

    stage, root = config.stage, root_of(config)
    record = query_index(root, lambda index: find_run(index, str(stage.run)))
    is_table = stage.format == "table"
    say = partial(print, flush=True) if is_table else str
    result = replay.replay(root, record, stage.steps, absolute(find_store_url(config)), iter_words, say)
    yield from replay.as_lines(result) if is_table else [to_json(result)]
    return 0 if result["same"] else NOT_PASSED


def absolute(url: str) -> str:
    """The URL of a store, found from any working folder."""
    place = url.removeprefix("sqlite:///")
    return f"sqlite:///{Path(place).absolute()}" if place != url else url


def promote_artifact(config: Config) -> Iterable[str]:
    from align.registry import promotion
    from align.registry.gates import read_gates

    require_service(config)
    stage, root = config.stage, root_of(config)
    arms = {config.artifact: 1.0} if stage.arms is None else stage.arms
    written = parse_aliases({stage.alias: arms}, "stage.arms")[stage.alias]
    gates = read_gates([root / GATES, parse_user_path(stage.gates or OWN_GATES, "stage.gates")])
    change, lines = promotion.promote(
        root, stage.alias, written, gates, who=stage.who, why=stage.why, override=stage.override
    )
    return chain(lines, mirror_alias(config, root, change))


def retire_alias(config: Config) -> Iterable[str]:
    from align.registry import promotion

    require_service(config)
    stage: RegistryConfig = config.stage
    root = root_of(config)
    change, lines = promotion.retire(root, str(stage.alias), who=stage.who, why=str(stage.why))
    return chain(lines, mirror_alias(config, root, change))


def show_history(config: Config) -> Iterable[str]:
    from align.registry import promotion

    stage, root = config.stage, root_of(config)
    log = read_log(root)
    known = {change.alias for change in log.changes}
    if stage.alias is not None and stage.alias not in known:
        remedy = f"The aliases are {', '.join(sorted(known)) or '(none yet)'}."
        raise MissingArtifact("stage.alias", stage.alias, f"is no alias under {root}", remedy)
    query_index(root, lambda index: promotion.check_not_cut(index, log))
    at = None if stage.as_of is None else moment_of(stage.as_of)
    if at is not None:
        standing = {name: one for name, one in log.standing(at).items() if stage.alias in (None, name)}
        changes, lines = [*standing.values()], promotion.as_meanings(standing)
    else:
        changes = [change for change in log.changes if stage.alias in (None, change.alias)]
        lines = promotion.as_history(log, stage.alias)
    if stage.format == "json":
        return [to_json([change.as_json() for change in changes])]
    return lines if changes else ["no alias meant anything then" if at else "no aliases yet"]


def collect_garbage(config: Config) -> Iterable[str]:
    from align.registry import garbage, promotion

    stage, root = config.stage, root_of(config)
    log = read_log(root)

    def answer(index: Index) -> list[garbage.Piece]:
        promotion.check_not_cut(index, log)  # or what an alias needs may be called garbage
        return garbage.find_garbage(index, log, stage.days)

    wanted = stage.kinds or [kind for kind in GARBAGE if not stage.apply or kind != "artifacts"]
    pieces, taken = [piece for piece in query_index(root, answer) if piece.kind in wanted], None
    if stage.apply:
        taken = {
            piece.path: gone for piece, gone in garbage.remove_pieces(root, pieces, stage.who or promotion.get_user())
        }
    if stage.format == "json":
        return [to_json(garbage.as_objects(pieces, taken))]
    return garbage.as_lines(pieces, taken)


def forget(config: Config) -> Iterator[str]:
    from align.registry import forget_selection, forgetting, promotion  # which read Parquet

    stage, root, url = config.stage, root_of(config), absolute(find_store_url(config))
    kind = next(key for key in FORGETS if getattr(stage, key) is not None)
    wanted = forget_selection.Selector(kind, str(getattr(stage, kind)), config.project)
    given = str(config.store.url or "")
    store = f"store.url={given}" if given and MASK not in given else ""  # with a password it goes into no command
    with forgetting.hold_forget_lock(root) if stage.apply else nullcontext():
        plan, done = forgetting.make_plan(root, wanted, url, iter_words, store), None
        if stage.format == "table":
            yield from forgetting.as_lines(plan)
        if stage.apply:
            done = []
            for line in forgetting.execute_plan(plan, stage.who or promotion.get_user()):
                done.append(line)
                if stage.format == "table":
                    yield line
        elif stage.format == "table":
            yield "Nothing was erased: stage.apply=true erases it, and marks these runs stale."
    if stage.format == "json":
        yield to_json(forgetting.as_object(plan, done))


def to_json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)


def moment_of(text: str) -> datetime:
    """A time in ISO 8601, in UTC unless it says otherwise; of a day alone, its end."""
    at = datetime.fromisoformat(text)
    at = at if at.tzinfo else at.replace(tzinfo=UTC)
    return at + timedelta(days=1) - timedelta(microseconds=1) if len(text) == len("2026-11-01") else at


def rebuild_index(config: Config) -> Iterable[str]:
    began = time.monotonic()
    with Index(root_of(config), rebuild=True) as index:
        where = "in memory: it cannot be written there" if index.path is None else str(index.path)
        yield f"{index.changed:,} runs in {time.monotonic() - began:.1f} s; {where}"


def serve_page(config: Config) -> Iterator[str]:
    from align.registry.page.server import application  # FastAPI takes a second to import
    from align.registry.trace import read_votes
    from align.web.key_link import Anybody, KeyAuthenticator, key_in
    from align.web.server import serve

    stage, root = config.stage, root_of(config)
    url, others = list_origins(stage.host, stage.port, stage.url)

    def voters(project: str, head: ChainHead) -> Votes:
        return read_votes(find_store_url(config), project, head, full=False)

    if stage.host in LOOPBACK and stage.url is None:
        authenticator, links = Anybody(), [f"open {url}"]
    else:
        key = key_in(root / "registry.key")
        # An address that somebody was sent leads in, as a bookmark does: the page changes nothing.
        kept = f"SameSite=Lax; Max-Age=31536000{'; Secure' if url.startswith('https:') else ''}"
        authenticator = KeyAuthenticator(key, Anybody.visitor, f"align_registry_{stage.port}", kept)
        links = [f"open {url}/?key={key}", *warn_without_tls(url)]
    links.append("it shows what is there, and changes nothing; Ctrl+C ends it")
    query_index(root, lambda index: None)  # an index that has to be made anew is made before anybody waits for it
    app = application(root, voters, line_of, authenticator, [url, *others])
    serve(app, stage.host, stage.port, lambda: print(*links, sep="\n", flush=True))
    yield from ()


def line_of(manifest: Manifest) -> str:
    """Return the command that makes a run again."""
    return format_command_line(manifest.config, manifest.refs)


def root_of(config: Config) -> Path:
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
    "forget": forget,
    "gc": collect_garbage,
    "rebuild": rebuild_index,
    "serve": serve_page,
}
"""By `stage.action`: the lines that it prints. A generator may return an exit status."""


def require_service(config: Config) -> None:
    """Raise InputError if the package of the service that `track` names is missing."""
    if config.track.name != "none":
        mirrors.require_installed(config.track.name)


def mirror_alias(config: Config, root: Path, change: Change) -> Iterable[str]:
    """Set an alias at the service of `track`, if any, once the log has it. Returns lines about the result."""
    service = config.track.name
    if service == "none":
        return
    one = change.arms[0] if len(change.arms) == 1 else None
    if len(change.arms) > 1:
        yield f"track={service}: no service has an alias of several artifacts; it is taken away"
    folder = one and root.joinpath(*one.ref.split(":", 1)) / "artifact"
    made = one and mirrors.Artifact(one.ref, "model", one.digest, folder, {})
    yield mirrors.set_alias(service, config.track.project, root, change.alias, made)
