"""Where an artifact, or an answer that a server gave, came from: a tree down to votes, data and base weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from align.core.chain import Head
from align.core.errors import AlignError, MissingArtifact
from align.core.files import open_binary
from align.registry.index import Index
from align.registry.intact import Intact, looked_at
from align.registry.record import UNREADABLE, Record, altered_in
from align.registry.shown import clean, kl_in, method_in, score_in
from align.registry.voters import Votes
from align.report.words import counted
from align.run.manifest import read_manifest
from align.run.weights import model_digest

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
        """It, and all that it came from, each once."""
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
        """A run, and what it was made from.

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
        found = self.files(record)
        if problem := altered_in(record):
            found = replace(found, whole=False, said=f"{found.said}; altered: {problem}")
        if self.depth == DEEPEST:
            further = Node("gone", f"stage.action=trace artifact={ref} goes on here")
            return replace(node, state=found.said, whole=found.whole, sources=(("earlier", further),))
        self.depth += 1
        sources = tuple(self.sources(record))
        self.depth -= 1
        return replace(node, state=found.said, whole=found.whole, sources=sources)

    def files(self, record: Record) -> Intact:
        folder, run = self.index.root / record["folder"], record["run"]
        manifest = read_manifest(folder)
        found = looked_at(folder, manifest.outputs, self.index.hashed(run), record["finished"], self.full)
        self.index.note_hashed(run, found.hashed)
        return found

    def sources(self, record: Record) -> Iterator[tuple[str, Node]]:
        """What a run read, its base first; not what only tells it apart from another."""
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
        """Base weights that no run made."""
        revision = (f"revision {base['revision']}",) if base.get("revision") else ()
        node = Node("base", str(base["id"]), base["digest"], revision)
        noted = read_manifest(self.index.root / record["folder"]).base
        return self.again(node, partial(model_digest, Path(noted.path))) if noted else node

    def file(self, given: Mapping[str, Any]) -> Node:
        """Something that no run made: a file, a corpus, a folder of somebody's."""
        path = str(given["path"])
        gone = Path(path).is_absolute() and not Path(path).exists()
        node = Node("file", path, given["digest"], state="is not there any more" if gone else "")
        return node if gone else self.again(node, partial(data_digest, path))

    def again(self, node: Node, digest: Callable[[], str]) -> Node:
        """The same, hashed now where everything is to be hashed; once, wherever else it stands."""
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
        """Votes, who gave them, and the runs that sampled what they are about."""
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
    """What a run would know the files of a path by, or the corpus of the built-in model.

    Raises:
        AlignError: there are none.
    """
    from align.data.sources import FILES, DataSource, data_record  # which a question about times alone does not need

    name = path.partition(":")[0]
    corpus = name == "chitchat" and not Path(path).exists()
    return data_record(DataSource(name if corpus else FILES, None if corpus else path)).digest


def facts_of(record: Record) -> tuple[str, ...]:
    """A run in a few clauses."""
    finished, stale = ((record.get(key) or "")[:16].replace("T", " ") for key in ("finished", "stale"))
    known = {
        "": method_in(record), "score ": score_in(record), "KL ": kl_in(record),
        "on ": finished, STALE: stale,
    }  # fmt: skip
    said = tuple(f"{word}{value}" for word, value in known.items() if value not in ("", "–"))
    return said if record["status"] == "done" else (str(record["status"]), *said)


def of_response(index: Index, tracer: Tracer, id: str) -> Node:
    """The tree of an answer that a server of these runs gave.

    Raises:
        MissingArtifact: no server's log has it.
    """
    server, entry = logged(index.root, id)
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


def logged(root: Path, id: str) -> tuple[str, dict[str, Any]]:
    """(server, line of its log) of a request, whose answer has its id with another word in front."""
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
    """The trees for eyes, and below them what is not whole."""
    for node in nodes:
        yield from branch(node, "", "", "")
    every = [one for node in nodes for one in node.nodes()]
    bad = [one for one in every if not one.whole]
    for one in bad:
        yield f"NOT WHOLE: {clean(one.name)}: {clean(one.state, longest=None)}"
    if not bad and any("not hashed here yet" in one.state for one in every):
        yield "stage.verify=full hashes every file."


def branch(node: Node, named: str, first: str, rest: str) -> Iterator[str]:
    digest = f" ({node.digest[:12]})" if node.digest else ""
    facts = "".join(f", {clean(fact)}" for fact in node.facts)
    again = " (above)" if node.above else ""
    kind = "" if node.kind in ("run", "annotator") else f"{node.kind} "
    state = f" [{clean(node.state, longest=None)}]" if node.state and not node.above else ""
    label = f"{clean(named)}: " if named and named != node.kind else ""
    yield f"{first}{label}{kind}{clean(node.name, longest=None)}{digest}{'' if node.above else facts}{state}{again}"
    if not node.above:
        for i, (name, source) in enumerate(node.sources):
            last = i == len(node.sources) - 1
            yield from branch(source, name, f"{rest}{'└─ ' if last else '├─ '}", f"{rest}{'   ' if last else '│  '}")
