"""Where an artifact, or an answer that a server gave, came from: a tree down to votes, data and base weights; and
whether the files of each run are those that it published."""

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
from typing import Any

from align.core.chain import Head
from align.core.errors import AlignError, CorruptFile, InputError, MissingArtifact
from align.core.files import open_binary
from align.registry.formatting import clean, kl_in, method_in, score_in
from align.registry.index import Hashed, Index, stamp_of
from align.registry.record import UNREADABLE, Record, altered_in
from align.report.figure_text import counted, one_line
from align.run.artifacts import check_not_replaced
from align.run.digests import file_digest
from align.run.manifest import read_manifest
from align.run.weights import model_digest

LATER_S = 60.0
"""A file that changed longer than this after its run ended was copied, or is another."""
NAMED = 3
"""Files that are named; further ones are counted."""


@dataclass(frozen=True, slots=True)
class FileCheck:
    """What is known of the published files of a run.

    Attributes:
        whole: False where a file is missing, or is known not to be the one that was published.
        state: what is known, in a clause.
        hashed: the files that were hashed now, by their names in the run's folder.
    """

    whole: bool
    state: str
    hashed: Mapping[str, Hashed]


def hash_file(path: Path) -> Hashed | None:
    """Hash a file as it is. Returns None if it is not there, cannot be read, or changes meanwhile."""
    state = stamp_of(path)
    try:
        digest = file_digest(path)
    except OSError:
        return None
    at = datetime.now(UTC).isoformat(timespec="seconds")
    return Hashed(state, digest, at) if stamp_of(path) == state else None


def check_files(
    folder: Path, outputs: Mapping[str, str], known: Mapping[str, Hashed], finished: str | None, full: bool
) -> FileCheck:
    """Check whether the published files of a run are what its manifest says.

    Args:
        outputs: file → sha256, of the manifest.
        known: the files as they were hashed before.
        finished: when the run ended, ISO 8601.
        full: hash all of them now.
    """
    try:
        check_not_replaced(folder / "artifact", "run")
    except InputError as error:
        return FileCheck(False, error.problem, {})
    hashed = {name: file for name in outputs if full and (file := hash_file(folder / name))}
    missing, changed, unknown = [], [], []
    for name, digest in outputs.items():
        latest = hashed.get(name) if full else known.get(name)
        if not (folder / name).is_file():
            missing.append(name)
        elif latest is not None and (full or latest.state == stamp_of(folder / name)):
            if latest.sha256 != digest:
                changed.append(name)
        else:
            (changed if full else unknown).append(name)
    if missing or changed:
        problems = [
            f"{name_files(names)} {what}" for names, what in ((missing, "missing"), (changed, "changed")) if names
        ]
        return FileCheck(False, "; ".join(problems), hashed)
    files = counted(len(outputs), "file")
    if not outputs:
        state = "no files"
    elif full:
        state = f"{files} hashed now: as published"
    elif unknown:
        later = [name for name in unknown if is_later(folder / name, finished)]
        newer = "all of them" if len(later) == len(outputs) else name_files(later).rpartition(" ")[0]
        copied = f"; {newer} copied or written again after the run" if later else ""
        state = f"{files}, {len(unknown):,} not hashed here yet{copied}"
    else:
        oldest = min(known[name].at for name in outputs)
        state = f"{files}, size and time as when hashed on {oldest[:10]} {oldest[11:16]}"
    return FileCheck(True, state, hashed)


def name_files(names: list[str]) -> str:
    """Return the first names, the number of the others, and the verb."""
    more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
    return f"{', '.join(names[:NAMED])}{more} {'is' if len(names) == 1 else 'are'}"


def is_later(path: Path, finished: str | None) -> bool:
    try:
        ended = datetime.fromisoformat(str(finished))
    except ValueError:
        return False
    return os.stat(path).st_mtime > ended.timestamp() + LATER_S


@dataclass(frozen=True, slots=True)
class Votes:
    """What a store says of the votes that a run read, by pseudonyms.

    Attributes:
        by: pseudonym → how many of its rankings, without those that were retracted or erased since.
        state: whether the ledger is still the one that was read.
        whole: False where it is known to be another.
    """

    by: Mapping[str, int] = field(default_factory=dict)
    state: str = ""
    whole: bool = True


def read_votes(url: str, project: str, head: Head, full: bool) -> Votes:
    """Return the votes of a project up to the row that was the newest when they were read.

    Args:
        url: of the store.
        head: that row; one before the first for what notes none.
        full: walk the whole ledger, and check its hashes and contents.
    """
    from sqlalchemy import select

    from align.annotate.store import Store
    from align.annotate.store.tables import ledger

    try:
        with Store.open(url, create=False) as store, store.reading() as connection:
            rankings = [vote for vote in store.rankings(project) if head.seq < 0 or vote.seq <= head.seq]
            by = Counter(vote.annotator for vote in rankings)
            if head.seq < 0:
                return Votes(by)
            found = connection.execute(select(ledger.c.hash).where(ledger.c.seq == head.seq)).scalar()
            if found != head.hash:
                return Votes(by, f"row {head.seq:,} of its ledger is another one, or gone", whole=False)
            if not full:
                return Votes(by, "the last row that was read is in the ledger")
            store.verify(head)
            return Votes(by, "every row of the ledger and every content hashed now: as written")
    except CorruptFile as error:
        return Votes(state=str(error), whole=False)
    except AlignError as error:
        return Votes(state=f"the store cannot say: {error}")


REQUESTS = "requests.jsonl"
STALE = "stale since "
"""How the fact begins that a run is stale."""
DEEPEST = 100
"""Generations of a tree; whoever wants more asks for the run where it ends."""


@dataclass(frozen=True, slots=True)
class Node:
    """One thing that something came from.

    Attributes:
        kind: `response`, `run`, `gone`, `base`, `file`, `votes` or `annotator`.
        name: of a run `stage:name`.
        digest: that it is known by; empty where there is none.
        facts: what is known of it, a clause each.
        state: whether its files are what they were; empty where nobody can say.
        whole: False where it is gone, or known not to be what it was.
        above: it stands further up in the tree, with all that it came from.
        sources: (what it was read as, what that is).
    """

    kind: str
    name: str
    digest: str = ""
    facts: tuple[str, ...] = ()
    state: str = ""
    whole: bool = True
    above: bool = False
    sources: tuple[tuple[str, Node], ...] = ()

    def as_json(self) -> dict[str, Any]:
        own = {
            "kind": self.kind, "name": self.name, "digest": self.digest, "facts": list(self.facts),
            "state": self.state, "whole": self.whole,
        }  # fmt: skip
        if self.above:
            return own | {"above": True}
        return own | {"sources": [{"as": name, **node.as_json()} for name, node in self.sources]}

    def nodes(self) -> Iterator[Node]:
        """Yield it, and all that it came from, each once."""
        if not self.above:
            yield self
            for _, node in self.sources:
                yield from node.nodes()


Voters = Callable[[str, Head], Votes]
"""Project, and the last row of its ledger that was read → whose votes these were."""


class Tracer:
    """Builds the tree.

    Args:
        index: of the runs.
        voters: asks the annotation store.
        full: hash every published file on the way.
    """

    def __init__(self, index: Index, voters: Voters, full: bool = False) -> None:
        self.index, self.voters, self.full = index, voters, full
        self.seen: set[tuple[str, str]] = set()
        self.depth, self.hashed = 0, dict[str, tuple[str, bool]]()

    def run(self, ref: str, digest: str = "") -> Node:
        """Trace a run, and what it was made from.

        Args:
            digest: that it was read by; empty for what it published.
        """
        record = self.index.record(ref)
        if record is None:
            return Node("gone", ref, digest, state="is gone", whole=False)
        digest = digest or record.get("digest") or ""
        node = Node("run", ref, digest, facts_of(record))
        if (ref, digest) in self.seen:
            return replace(node, above=True)
        self.seen.add((ref, digest))
        if record["status"] == UNREADABLE:
            return replace(node, facts=(), state=str(record["error"]), whole=False)
        folder = self.index.root / record["folder"]
        outputs = read_manifest(folder).outputs
        files = check_files(folder, outputs, self.index.hashed(ref), record["finished"], self.full)
        self.index.note_hashed(ref, files.hashed)
        node = replace(node, state=files.state, whole=files.whole)
        if problem := altered_in(record):
            node = replace(node, state=f"{files.state}; altered: {problem}", whole=False)
        if self.depth == DEEPEST:
            further = Node("gone", f"stage.action=trace artifact={ref} goes on here")
            return replace(node, sources=(("earlier", further),))
        self.depth += 1
        sources = tuple(self.sources(record))
        self.depth -= 1
        return replace(node, sources=sources)

    def sources(self, record: Record) -> Iterator[tuple[str, Node]]:
        """Yield what a run read, its base first, and as what."""
        if base := record.get("base"):
            made = self.index.maker(base["digest"], "")
            yield "base", self.run(made, base["digest"]) if made else self.base(record, base)
        for name, given in record["inputs"].items():
            if name == "base":
                continue
            digest = str(given.get("root") or given["digest"])
            made = self.index.maker(digest, given.get("run", ""))
            via = f" by @{given['alias'].get('name')}" if isinstance(given.get("alias"), Mapping) else ""
            if run := made or given.get("run"):
                yield f"{name}{via}", self.run(run, given["digest"])
            elif given.get("project"):
                yield name, self.votes(given)
            elif given.get("server"):  # it has no weights here that could be hashed
                yield name, Node("server", str(given["path"]), given["digest"])
            elif given.get("path"):
                yield name, self.file(given)

    def base(self, record: Record, base: Mapping[str, Any]) -> Node:
        """Return the node of base weights that no run made."""
        revision = (f"revision {base['revision']}",) if base.get("revision") else ()
        node = Node("base", str(base["id"]), base["digest"], revision)
        noted = read_manifest(self.index.root / record["folder"]).base
        return self.rehash(node, partial(model_digest, Path(noted.path))) if noted else node

    def file(self, given: Mapping[str, Any]) -> Node:
        """Return the node of something that no run made: a file, a corpus, somebody's folder."""
        path = str(given["path"])
        gone = Path(path).is_absolute() and not Path(path).exists()
        node = Node("file", path, given["digest"], state="is not there any more" if gone else "")
        return node if gone else self.rehash(node, partial(data_digest, path))

    def rehash(self, node: Node, digest: Callable[[], str]) -> Node:
        """Return the node with its files hashed again if everything is to be hashed: each file once a trace."""
        if not self.full:
            return node
        if node.digest not in self.hashed:
            try:
                found = digest()
            except (AlignError, OSError) as error:
                self.hashed[node.digest] = (f"cannot be read: {error}", True)
            else:
                same = found == node.digest
                said = "hashed now: as it was read" if same else f"is another than was read ({found[:12]})"
                self.hashed[node.digest] = (said, same)
        state, whole = self.hashed[node.digest]
        return replace(node, state=state, whole=whole)

    def votes(self, given: Mapping[str, Any]) -> Node:
        """Return the node of votes, who gave them, and the runs that sampled the answers."""
        project, seq = str(given["project"]), int(given.get("seq", -1))
        found = self.voters(project, Head(seq, given["digest"]))
        people = [
            ("annotator", Node("annotator", name, facts=(counted(count, "judgement"),)))
            for name, count in sorted(found.by.items(), key=lambda one: (-one[1], one[0]))
        ]
        filled = self.index.filling(project)
        answers = [("answers", self.run(ref)) for ref in filled]
        facts = (f"up to row {seq:,} of its ledger",) if seq >= 0 else ()
        return Node("votes", project, given["digest"], facts, found.state, found.whole, sources=(*people, *answers))


def data_digest(path: str) -> str:
    """Return what a run would know the files of a path by, or the corpus of the built-in model.

    Raises:
        AlignError: there are none.
    """
    from align.data.sources import FILES, DataSource, data_record  # which a question about times alone does not need

    name = path.partition(":")[0]
    corpus = name == "chitchat" and not Path(path).exists()
    return data_record(DataSource(name if corpus else FILES, None if corpus else path)).digest


def facts_of(record: Record) -> tuple[str, ...]:
    """Describe a run in a few clauses."""
    finished, stale = ((record.get(key) or "")[:16].replace("T", " ") for key in ("finished", "stale"))
    known = {
        "": method_in(record), "score ": score_in(record), "KL ": kl_in(record),
        "on ": finished, STALE: stale,
    }  # fmt: skip
    said = tuple(f"{word}{value}" for word, value in known.items() if value not in ("", "–"))
    return said if record["status"] == "done" else (str(record["status"]), *said)


def trace_response(index: Index, tracer: Tracer, id: str) -> Node:
    """Return the tree of an answer that a server of these runs gave.

    Raises:
        MissingArtifact: no server's log has it.
    """
    server, entry = find_request(index.root, id)
    facts = [
        f"{str(entry.get('time', ''))[:19].replace('T', ' ')} by {server}", f"asked for {entry.get('asked')}",
        *([f"tenant {entry['tenant']}"] if entry.get("tenant") else []),
        *([f"arm {entry['arm']}"] if entry.get("arm") else []),
        f"{counted(int(entry.get('completion_tokens') or 0), 'token')}, status {entry.get('status')}",
    ]  # fmt: skip
    adapter, base = str(entry.get("adapter") or ""), str(entry.get("base") or "")
    if adapter:
        made = index.maker(adapter, "")
        gone = Node("gone", "(an adapter that no run here made)", adapter, state="is unknown here", whole=False)
        source = ("adapter", tracer.run(made, adapter) if made else gone)
    else:
        made = index.maker(base, "")
        source = ("base", tracer.run(made, base) if made else Node("base", "(the base by itself)", base))
    return Node("response", id, facts=tuple(map(str, facts)), sources=(source,))


def find_request(root: Path, id: str) -> tuple[str, dict[str, Any]]:
    """Return (server, line of its log) of a request, whose answer has its id with another word in front."""
    number = id.rpartition("-")[2]
    wanted = json.dumps(f"-{number}")[1:].encode()
    for path in sorted(root.glob(f"serve/*/{REQUESTS}"), key=lambda path: path.stat().st_mtime, reverse=True):
        with open_binary(path) as lines:
            for line in lines:
                if wanted in line:
                    with suppress(ValueError):
                        found = json.loads(line)
                        if isinstance(found, dict) and str(found.get("id")).rpartition("-")[2] == number:
                            return f"serve:{path.parent.name}", found
    remedy = "The id of an answer is its `id`, and the header x-request-id. Name the run.root of the server."
    raise MissingArtifact("stage.response", id, f"is in no server's log under {root}", remedy)


def as_lines(nodes: Sequence[Node]) -> Iterator[str]:
    """Yield the trees as text, and below them what is not whole."""
    for node in nodes:
        yield from branch(node, "", "", "")
    every = [one for node in nodes for one in node.nodes()]
    bad = [one for one in every if not one.whole]
    for one in bad:
        yield f"NOT WHOLE: {clean(one.name)}: {one_line(one.state)}"
    if not bad and any("not hashed here yet" in one.state for one in every):
        yield "stage.verify=full hashes every file."


def branch(node: Node, named: str, first: str, rest: str) -> Iterator[str]:
    digest = f" ({node.digest[:12]})" if node.digest else ""
    facts = "".join(f", {clean(fact)}" for fact in node.facts)
    again = " (above)" if node.above else ""
    kind = "" if node.kind in ("run", "annotator") else f"{node.kind} "
    state = f" [{one_line(node.state)}]" if node.state and not node.above else ""
    label = f"{clean(named)}: " if named and named != node.kind else ""
    yield f"{first}{label}{kind}{one_line(node.name)}{digest}{'' if node.above else facts}{state}{again}"
    if not node.above:
        for i, (name, source) in enumerate(node.sources):
            last = i == len(node.sources) - 1
            yield from branch(source, name, f"{rest}{'└─ ' if last else '├─ '}", f"{rest}{'   ' if last else '│  '}")
