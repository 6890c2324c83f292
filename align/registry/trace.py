"""Traces: the lineage of an artifact, or of a server's response, as a tree down to votes, data and base weights.

Each run in the tree is checked: its files must be the files that it published.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from align.core.chain import ChainHead
from align.core.errors import AlignError, CorruptFile, InputError, MissingArtifact
from align.core.files import open_binary
from align.data.generated_tasks import TASKS, TASKS_VERSION, compute_tasks_digest
from align.registry.formatting import clean_text, format_kl, format_method, format_score
from align.registry.index import FileHash, Index, read_stamp
from align.registry.record import UNREADABLE, Record, describe_alteration
from align.report.figure_text import escape_unprintable, pluralize
from align.run.artifacts import require_not_replaced
from align.run.digests import file_digest
from align.run.manifest import read_manifest
from align.run.weights import model_digest

LATER_S = 60.0
"""Seconds after the end of a run; a published file that changed later than this was copied or replaced."""
NAMED = 3
"""Largest number of files that a message names; it only counts further ones."""


@dataclass(frozen=True, slots=True)
class FileCheck:
    """The result of comparing a run's published files with the digests in its manifest.

    Attributes:
        whole: False if a file is missing or known to differ from the published one.
        state: the result as a clause.
        hashed: file name → hash, of the files that were hashed now.
    """

    whole: bool
    state: str
    hashed: Mapping[str, FileHash]


def hash_file(path: Path) -> FileHash | None:
    """Hash a file, and return the digest with the file's size and times, or None if the file is missing or unreadable.

    Returns None as well if the file changes during the hashing.
    """
    state = read_stamp(path)
    try:
        digest = file_digest(path)
    except OSError:
        return None
    time = datetime.now(UTC).isoformat(timespec="seconds")
    return FileHash(state, digest, time) if read_stamp(path) == state else None


def check_files(
    folder: Path, outputs: Mapping[str, str], earlier: Mapping[str, FileHash], finished: str | None, rehash_all: bool
) -> FileCheck:
    """Compare the published files of a run with the digests in its manifest, and return the result as a clause.

    A file that was hashed before counts as unchanged while its size and times are the same. Others are unknown, unless
    all files are hashed now.

    Args:
        outputs: file → SHA-256, from the manifest.
        earlier: earlier hashes of the files.
        finished: when the run ended, ISO 8601.
        rehash_all: hash all files now.
    """
    try:
        require_not_replaced(folder / "artifact", "run")
    except InputError as error:
        return FileCheck(False, error.problem, {})
    hashed = {name: file_hash for name in outputs if rehash_all and (file_hash := hash_file(folder / name))}
    missing: list[str] = []
    changed: list[str] = []
    unknown: list[str] = []
    for name, digest in outputs.items():
        latest = hashed.get(name) if rehash_all else earlier.get(name)
        if not (folder / name).is_file():
            missing.append(name)
        elif latest is not None and (rehash_all or latest.state == read_stamp(folder / name)):
            if latest.sha256 != digest:
                changed.append(name)
        else:
            (changed if rehash_all else unknown).append(name)
    if missing or changed:
        problems = []
        if missing:
            problems.append(f"{format_file_names(missing)} missing")
        if changed:
            problems.append(f"{format_file_names(changed)} changed")
        return FileCheck(False, "; ".join(problems), hashed)
    files = pluralize(len(outputs), "file")
    if not outputs:
        state = "no files"
    elif rehash_all:
        state = f"{files} hashed now: as published"
    elif unknown:
        later = [name for name in unknown if is_changed_after(folder / name, finished)]
        newer = "all of them" if len(later) == len(outputs) else format_file_names(later).rpartition(" ")[0]
        copied = f"; {newer} copied or written again after the run" if later else ""
        state = f"{files}, {len(unknown):,} not hashed here yet{copied}"
    else:
        oldest = min(earlier[name].at for name in outputs)
        state = f"{files}, size and time as when hashed on {oldest[:10]} {oldest[11:16]}"
    return FileCheck(True, state, hashed)


def format_file_names(names: Sequence[str]) -> str:
    """Return up to three file names, the number of further ones and a verb, such as `a.json and 2 more are`."""
    more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
    return f"{', '.join(names[:NAMED])}{more} {'is' if len(names) == 1 else 'are'}"


def is_changed_after(path: Path, finished: str | None) -> bool:
    """Return whether a file was modified more than `LATER_S` seconds after its run ended.

    Args:
        finished: when the run ended, ISO 8601. Returns False if it is missing or malformed.
    """
    try:
        end = datetime.fromisoformat(str(finished))
    except ValueError:
        return False
    return os.stat(path).st_mtime > end.timestamp() + LATER_S


@dataclass(frozen=True, slots=True)
class Votes:
    """The number of votes per annotator that a run read, counted in the annotation store now, and the state of its
    ledger.

    Attributes:
        by: annotator's pseudonym → number of rankings that were not retracted or erased since, without annotators who
            were in quarantine when the run read the project.
        state: whether the ledger is still the one that was read, as a clause.
        whole: False if it is known to differ.
    """

    by: Mapping[str, int] = field(default_factory=dict)
    state: str = ""
    whole: bool = True


def read_votes(url: str, project: str, head: ChainHead, verify_ledger: bool) -> Votes:
    """Count each annotator's rankings in a project, up to the last ledger row that a run read, and check this row's
    hash.

    An unreadable or corrupt store does not raise: it is reported in `state`.

    Args:
        url: URL of the store.
        head: that row; before the first row if the run recorded none.
        verify_ledger: verify the hashes and contents of the whole ledger.
    """
    from sqlalchemy import select

    from align.annotate.store import Store
    from align.annotate.store.ledger import read_quarantined
    from align.annotate.store.tables import ledger

    try:
        with Store.open(url, create_if_missing=False) as store, store.reading() as connection:
            last_row = head.seq if head.seq >= 0 else None
            quarantined = read_quarantined(connection, project, last_row)
            rankings = [vote for vote in store.rankings(project) if last_row is None or vote.seq <= last_row]
            counts = Counter(vote.annotator for vote in rankings if vote.annotator not in quarantined)
            if head.seq < 0:
                return Votes(counts)
            row_hash = connection.execute(select(ledger.c.hash).where(ledger.c.seq == head.seq)).scalar()
            if row_hash != head.hash:
                return Votes(counts, f"row {head.seq:,} of its ledger was changed or removed", whole=False)
            if not verify_ledger:
                return Votes(counts, "the last row that was read is in the ledger")
            store.verify(head)
            return Votes(counts, "every row of the ledger and every content hashed now: as written")
    except CorruptFile as error:
        return Votes(state=str(error), whole=False)
    except AlignError as error:
        return Votes(state=f"the store cannot be read: {error}")


REQUESTS = "requests.jsonl"
STALE = "stale since "
"""Prefix of the text that says since when a run is stale, because data that it read was deleted."""
DEEPEST = 100
"""Maximum depth of a trace."""


@dataclass(frozen=True, slots=True)
class TraceNode:
    """One node of a trace, such as a run, a data file, votes or base weights, with the result of its check and its
    sources.

    Attributes:
        kind: `response`, `run`, `gone`, `base`, `file`, `votes`, `server` or `annotator`.
        name: its name; `stage:name` of a run.
        digest: digest that it was read by; may be empty.
        facts: what is known of it, one clause each.
        state: whether its files are unchanged; empty if unknown.
        whole: False if it is gone or known to have changed.
        above: True if its sources are listed at its first place in the tree.
        sources: (name of the input, node) of what it was made from.
    """

    kind: str
    name: str
    digest: str = ""
    facts: tuple[str, ...] = ()
    state: str = ""
    whole: bool = True
    above: bool = False
    sources: tuple[tuple[str, TraceNode], ...] = ()

    def as_json(self) -> dict[str, Any]:
        values = {
            "kind": self.kind,
            "name": self.name,
            "digest": self.digest,
            "facts": list(self.facts),
            "state": self.state,
            "whole": self.whole,
        }
        if self.above:
            return values | {"above": True}
        return values | {"sources": [{"as": name, **node.as_json()} for name, node in self.sources]}

    def nodes(self) -> Iterator[TraceNode]:
        """Yield the node and all its ancestors in the trace, each once."""
        if not self.above:
            yield self
            for _, node in self.sources:
                yield from node.nodes()


VoteReader = Callable[[str, ChainHead], Votes]
"""A function that returns the votes of a project, up to the last ledger row that a run read."""


class Tracer:
    """Builder of traces, the trees of everything that a run was made from.

    A run that occurs twice has its sources only at its first place.

    Args:
        index: index of the runs.
        vote_reader: reads votes from the annotation store.
        rehash_all: hash every published file on the way.
    """

    def __init__(self, index: Index, vote_reader: VoteReader, rehash_all: bool = False) -> None:
        self.index = index
        self.vote_reader = vote_reader
        self.rehash_all = rehash_all
        self.visited: set[tuple[str, str]] = set()
        self.depth = 0
        self.hashed: dict[str, tuple[str, bool]] = {}  # digest → state as a clause, whether it is unchanged

    def run(self, ref: str, digest: str = "") -> TraceNode:
        """Return the trace of a run: its node with the check of its files, and the nodes of its ancestors as sources.

        A run that no longer exists becomes a node of the kind `gone`.

        Args:
            digest: digest that it was read by; empty for the one that it published.
        """
        record = self.index.record(ref)
        if record is None:
            return TraceNode("gone", ref, digest, state="is gone", whole=False)
        digest = digest or record.get("digest") or ""
        node = TraceNode("run", ref, digest, describe_run(record))
        if (ref, digest) in self.visited:
            return replace(node, above=True)
        self.visited.add((ref, digest))
        if record["status"] == UNREADABLE:
            return replace(node, facts=(), state=str(record["error"]), whole=False)
        folder = self.index.root / record["folder"]
        outputs = read_manifest(folder).outputs
        files = check_files(folder, outputs, self.index.get_hashes(ref), record["finished"], self.rehash_all)
        self.index.store_hashes(ref, files.hashed)
        node = replace(node, state=files.state, whole=files.whole)
        if problem := describe_alteration(record):
            node = replace(node, state=f"{files.state}; altered: {problem}", whole=False)
        if self.depth == DEEPEST:
            cut_off = TraceNode("gone", f"continued by stage.action=trace artifact={ref}")
            return replace(node, sources=(("earlier", cut_off),))
        self.depth += 1
        sources = tuple(self.iter_sources(record))
        self.depth -= 1
        return replace(node, sources=sources)

    def iter_sources(self, record: Record) -> Iterator[tuple[str, TraceNode]]:
        """Yield (input name, node) for each input of a run, with its base model first."""
        if base := record.get("base"):
            maker = self.index.maker(base["digest"], "")
            yield "base", self.run(maker, base["digest"]) if maker else self.make_base_node(record, base)
        for name, input in record["inputs"].items():
            if name == "base":
                continue
            digest = str(input.get("root") or input["digest"])
            alias = f" by @{input['alias'].get('name')}" if isinstance(input.get("alias"), Mapping) else ""
            if run := self.index.maker(digest, input.get("run", "")) or input.get("run"):
                yield f"{name}{alias}", self.run(run, input["digest"])
            elif input.get("project"):
                yield name, self.make_votes_node(input)
            elif input.get("server"):  # its weights are not here
                yield name, TraceNode("server", str(input["path"]), input["digest"])
            elif TASKS in input:
                node = TraceNode(
                    "generated", str(input["path"]), input["digest"], (f"reasoning-gym {input[TASKS_VERSION]}",)
                )
                yield name, self.rehash_if_full(node, partial(compute_tasks_digest, input[TASKS]))
            elif input.get("path"):
                yield name, self.make_file_node(input)

    def make_base_node(self, record: Record, base: Mapping[str, Any]) -> TraceNode:
        """Return the node of a base model that no run here made, with its weights hashed again if `rehash_all`.

        Args:
            record: record of the run on this base.
            base: `base` of that record.
        """
        revision = (f"revision {base['revision']}",) if base.get("revision") else ()
        node = TraceNode("base", str(base["id"]), base["digest"], revision)
        recorded = read_manifest(self.index.root / record["folder"]).base
        return self.rehash_if_full(node, partial(model_digest, Path(recorded.path))) if recorded else node

    def make_file_node(self, input: Mapping[str, Any]) -> TraceNode:
        """Return the node of a data file or built-in corpus that no run here made, hashed again if `rehash_all`."""
        path = str(input["path"])
        if Path(path).is_absolute() and not Path(path).exists():
            return TraceNode("file", path, input["digest"], state="is not there any more")
        return self.rehash_if_full(TraceNode("file", path, input["digest"]), partial(compute_data_digest, path))

    def rehash_if_full(self, node: TraceNode, compute_digest: Callable[[], str]) -> TraceNode:
        """Return a node with the result of hashing its files again if `rehash_all` is set, otherwise the node as it is.

        Each file is hashed once per trace.
        """
        if not self.rehash_all:
            return node
        if node.digest not in self.hashed:
            try:
                new_digest = compute_digest()
            except (AlignError, OSError) as error:
                self.hashed[node.digest] = (f"cannot be read: {error}", True)
            else:
                is_same = new_digest == node.digest
                state = "hashed now: as it was read" if is_same else f"differs from what was read ({new_digest[:12]})"
                self.hashed[node.digest] = (state, is_same)
        state, whole = self.hashed[node.digest]
        return replace(node, state=state, whole=whole)

    def make_votes_node(self, input: Mapping[str, Any]) -> TraceNode:
        """Return the node of a project's votes, with its annotators and the runs that sampled the answers as
        sources."""
        project = str(input["project"])
        seq = int(input.get("seq", -1))
        votes = self.vote_reader(project, ChainHead(seq, input["digest"]))
        annotators = [
            ("annotator", TraceNode("annotator", name, facts=(pluralize(count, "judgement"),)))
            for name, count in sorted(votes.by.items(), key=lambda item: (-item[1], item[0]))
        ]
        answers = [("answers", self.run(ref)) for ref in self.index.list_sampling_runs(project)]
        facts = (f"up to row {seq:,} of its ledger",) if seq >= 0 else ()
        sources = (*annotators, *answers)
        return TraceNode("votes", project, input["digest"], facts, votes.state, votes.whole, sources=sources)


def compute_data_digest(path: str) -> str:
    """Return the digest that a run's manifest records for data files at `path`, or for the built-in corpus `chitchat`.

    Raises:
        AlignError: There are no such files.
    """
    from align.data.sources import (  # slow to import, and needed for a full check only
        FILES,
        DataSource,
        build_data_input,
    )

    name = path.partition(":")[0]
    is_corpus = name == "chitchat" and not Path(path).exists()
    return build_data_input(DataSource(name if is_corpus else FILES, None if is_corpus else path)).digest


def describe_run(record: Record) -> tuple[str, ...]:
    """Return short texts about a run: its status unless it is done, method, score, KL, end time and stale mark."""
    values = {
        "": format_method(record),
        "score ": format_score(record),
        "KL ": format_kl(record),
        "on ": (record.get("finished") or "")[:16].replace("T", " "),
        STALE: (record.get("stale") or "")[:16].replace("T", " "),
    }
    facts = tuple(f"{prefix}{value}" for prefix, value in values.items() if value not in ("", "–"))
    return facts if record["status"] == "done" else (str(record["status"]), *facts)


def trace_response(index: Index, tracer: Tracer, id: str) -> TraceNode:
    """Return the trace of a server's response by its id: the logged request, and the weights that answered it.

    Args:
        id: id of the response.

    Raises:
        MissingArtifact: It is in no server's log.
    """
    server, entry = find_logged_request(index.root, id)
    facts = [
        f"{str(entry.get('time', ''))[:19].replace('T', ' ')} by {server}",
        f"asked for {entry.get('asked')}",
        *(f"{key} {entry[key]}" for key in ("tenant", "arm") if entry.get(key)),
        f"{pluralize(int(entry.get('completion_tokens') or 0), 'token')}, status {entry.get('status')}",
    ]
    kind = "adapter" if entry.get("adapter") else "base"
    digest = str(entry.get(kind) or "")
    if maker := index.maker(digest, ""):
        node = tracer.run(maker, digest)
    elif kind == "adapter":
        node = TraceNode(
            "gone", "(an adapter that no run under this run.root made)", digest, state="is unknown here", whole=False
        )
    else:
        node = TraceNode("base", "(the base by itself)", digest)
    return TraceNode("response", id, facts=tuple(facts), sources=((kind, node),))


class LoggedRequest(NamedTuple):
    """A request from a server's log, with the server's name.

    Attributes:
        server: `serve:name` of the server's run.
        entry: the line of its log, parsed.
    """

    server: str
    entry: dict[str, Any]


def find_logged_request(root: Path, id: str) -> LoggedRequest:
    """Return the logged request with a response's id from the servers' logs under `root`, or raise MissingArtifact.

    The newest log is searched first.

    The number behind the last hyphen counts, as a response and its request have the same one.

    Raises:
        MissingArtifact: No log has it.
    """
    number = id.rpartition("-")[2]
    id_end = json.dumps(f"-{number}")[1:].encode()
    for path in sorted(root.glob(f"serve/*/{REQUESTS}"), key=lambda path: path.stat().st_mtime, reverse=True):
        with open_binary(path) as lines:
            for line in lines:
                if id_end in line:
                    with suppress(ValueError):
                        entry = json.loads(line)
                        if isinstance(entry, dict) and str(entry.get("id")).rpartition("-")[2] == number:
                            return LoggedRequest(f"serve:{path.parent.name}", entry)
    remedy = "The id of an answer is its `id`, and the header x-request-id. Name the run.root of the server."
    raise MissingArtifact("stage.response", id, f"is in no server's log under {root}", remedy)


def as_lines(nodes: Sequence[TraceNode]) -> Iterator[str]:
    """Yield traces as indented lines of text, followed by one line for each node that is gone or has changed."""
    for node in nodes:
        yield from iter_branch(node, "", "", "")
    all_nodes = [inner for node in nodes for inner in node.nodes()]
    broken = [node for node in all_nodes if not node.whole]
    for node in broken:
        yield f"NOT WHOLE: {clean_text(node.name)}: {escape_unprintable(node.state)}"
    if not broken and any("not hashed here yet" in node.state for node in all_nodes):
        yield "stage.verify=full hashes every file."


def iter_branch(node: TraceNode, input_name: str, first_prefix: str, prefix: str) -> Iterator[str]:
    """Yield a trace node and its sources as lines of text, drawn as a tree with branches such as `├─`.

    Args:
        first_prefix: branches drawn before the node's own line.
        prefix: branches drawn before the lines of its sources.
    """
    label = f"{clean_text(input_name)}: " if input_name and input_name != node.kind else ""
    kind = "" if node.kind in ("run", "annotator") else f"{node.kind} "
    digest = f" ({node.digest[:12]})" if node.digest else ""
    line = f"{first_prefix}{label}{kind}{escape_unprintable(node.name)}{digest}"
    if node.above:
        yield f"{line} (above)"
        return
    facts = "".join(f", {clean_text(fact)}" for fact in node.facts)
    state = f" [{escape_unprintable(node.state)}]" if node.state else ""
    yield f"{line}{facts}{state}"
    for i, (name, source) in enumerate(node.sources):
        is_last = i == len(node.sources) - 1
        yield from iter_branch(
            source, name, f"{prefix}{'└─ ' if is_last else '├─ '}", f"{prefix}{'   ' if is_last else '│  '}"
        )
