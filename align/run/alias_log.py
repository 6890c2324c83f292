"""Aliases of a folder of runs: what `@production` means, and who changed it, when and why.

`aliases.jsonl` in that folder has one change a line, in a chain of hashes (`align.core.chain`), which shows whether a
line was altered or removed. The file is only ever appended to. The beginning of a line behind the last line break is a
change that was cut off before it was reported.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from align.core.chain import GENESIS, Head, advance, canonical, link_hash
from align.core.errors import CorruptFile, InputError, RunConflict, half_character, require_schema_version
from align.core.files import check_readable, has_file, open_binary, open_regular, problem_of
from align.run.manifest import HeldManifest, parse_held_manifests

FILE = "aliases.jsonl"
SIGN = "@"
"""What a reference to an alias begins with."""
SCHEMA = 1
LINE_START = b'{"alias":'
"""How every line begins: its keys are in order."""
REMEDY = f"Restore {FILE} from a copy of the folder of runs."
PROMOTE_AGAIN = (
    f"Use the version of align that wrote it, or move {FILE} away and promote again with stage=registry "
    "stage.action=promote."
)


@dataclass(frozen=True, slots=True)
class Meant:
    """One artifact that an alias stands for.

    Attributes:
        ref: `stage:name` of the run that made it.
        digest: of its weights, see `align.run.artifacts.Artifact`.
        weight: its share of the requests, relative to the others'.
        manifests: `stage:name` → its manifest when the alias was changed: of the run, of the models that it was made
            from, and of its evaluation. Figures that are altered later disagree with it.
    """

    ref: str
    digest: str
    weight: float = 1.0
    manifests: Mapping[str, HeldManifest] = field(default_factory=dict, compare=False)

    def held_as_json(self) -> dict[str, dict[str, str]]:
        return {run: held.as_json() for run, held in self.manifests.items()}


@dataclass(frozen=True, slots=True)
class Change:
    """One change of one alias: a link of the chain.

    Attributes:
        seq: 1, 2, 3, … over all aliases.
        at: when, ISO 8601 in UTC; never before the change in front of it, whatever a clock says.
        arms: what the alias stands for from now on; nothing for one that is retired.
        replaces: seq of the change of this alias before; 0 for the first.
        override: why it was made although a gate was closed; empty where none was.
        gates: what each gate that binds the alias said, as `align.registry.gates` writes it.
    """

    seq: int
    at: str
    alias: str
    arms: tuple[Meant, ...]
    replaces: int
    who: str
    why: str
    override: str
    gates: tuple[Mapping[str, Any], ...]
    prev_hash: str
    hash: str

    @property
    def hashed(self) -> list[Any]:
        arms = [[arm.ref, arm.digest, arm.weight, arm.held_as_json()] for arm in self.arms]
        gates = [dict(gate) for gate in self.gates]
        return [self.seq, self.at, self.alias, arms, self.replaces, self.who, self.why, self.override, gates]

    def as_json(self) -> dict[str, Any]:
        arms = [
            {"ref": arm.ref, "digest": arm.digest, "weight": arm.weight, "manifests": arm.held_as_json()}
            for arm in self.arms
        ]
        own = {one.name: getattr(self, one.name) for one in fields(self)}
        return {"schema_version": SCHEMA, **own, "arms": arms, "gates": [dict(gate) for gate in self.gates]}


KINDS: Mapping[str, type] = {
    "seq": int, "at": str, "alias": str, "arms": list, "replaces": int, "who": str, "why": str, "override": str,
    "gates": list, "prev_hash": str, "hash": str,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class AliasLog:
    """All changes, in order."""

    changes: tuple[Change, ...] = ()

    @property
    def head(self) -> Head:
        return Head(self.changes[-1].seq, self.changes[-1].hash) if self.changes else Head(0, GENESIS)

    def last(self, alias: str) -> Change | None:
        """The newest change of an alias, its retirement too; None where there is none."""
        return next((change for change in reversed(self.changes) if change.alias == alias), None)

    def standing(self, as_of: datetime | None = None) -> dict[str, Change]:
        """Alias → the change that says what it means, now or at another time; without those that are retired."""
        found: dict[str, Change] = {}
        for change in self.changes:
            if as_of is None or datetime.fromisoformat(change.at) <= as_of:
                found[change.alias] = change
        return {alias: change for alias, change in sorted(found.items()) if change.arms}


def read_log(root: Path) -> AliasLog:
    """The changes of all aliases of a folder of runs; none where there is no log.

    Raises:
        CorruptFile: a line is missing, was altered, or cannot be read.
        InputError: another version of align wrote a line.
    """
    if not has_file(root / FILE, "aliases", REMEDY):
        return AliasLog()
    try:
        with open_binary(root / FILE) as file:
            text = file.read()
    except OSError as error:
        raise CorruptFile("aliases", str(root / FILE), problem_of(error), REMEDY) from error
    return parsed(text, root / FILE)[0]


def parsed(text: bytes, path: Path) -> tuple[AliasLog, int]:
    """The changes in a log's bytes, whose chain is checked, and how many of the bytes they are. Behind the last line
    break there may be a whole change that lacks its own, or the beginning of one that was never told of.

    Raises:
        CorruptFile, InputError: as `read_log`.
    """
    head, changes, used = Head(0, GENESIS), list[Change](), 0
    lines = text.split(b"\n")
    rest = lines.pop()
    if not (rest.startswith(LINE_START) or LINE_START.startswith(rest)):
        # `append` cuts off what a killed process left; this is none of its lines.
        raise CorruptFile(f"{path}, line {len(lines) + 1}", shown(rest), "is no change of an alias", REMEDY)
    for number, line in enumerate([*lines, rest] if whole(rest) else lines, 1):
        field = f"{path}, line {number}"
        change = change_in(line, field)
        try:
            head = advance(head, change, f"{field}: seq", REMEDY)
        except (TypeError, ValueError, RecursionError) as error:
            if isinstance(error, InputError):
                raise
            raise CorruptFile(field, shown(line), f"is no change of an alias ({error})", REMEDY) from error
        changes.append(change)
        used = min(len(text), used + len(line) + 1)
    return AliasLog(tuple(changes)), used


def whole(rest: bytes) -> bool:
    """Whether what stands behind the last line break is more than a line that was cut off while it was written."""
    try:
        json.loads(rest)
    except (ValueError, RecursionError):
        return b"\r" in rest  # lines that something else ended
    return True


def shown(line: bytes) -> str:
    return line[:60].decode("utf-8", "replace")


def change_in(line: bytes, field: str) -> Change:
    try:
        found = json.loads(line, parse_constant=refused)
    except (ValueError, RecursionError) as error:
        raise CorruptFile(field, shown(line), "is no line of JSON in UTF-8", REMEDY) from error
    if not isinstance(found, dict) or "schema_version" not in found:
        raise CorruptFile(field, shown(line), "is no change of an alias", REMEDY)
    require_schema_version(found["schema_version"], SCHEMA, field, shown(line), PROMOTE_AGAIN)
    typed = all(isinstance(found.get(key), kind) for key, kind in KINDS.items())
    if not typed or not all(map(is_arm, found["arms"])) or not is_time(found["at"]):
        raise CorruptFile(field, shown(line), "is no change of an alias", REMEDY)
    if not all(isinstance(gate, dict) for gate in found["gates"]) or half_character(
        json.dumps(found, ensure_ascii=False)
    ):
        raise CorruptFile(field, shown(line), "is no change of an alias", REMEDY)
    arms = tuple(
        Meant(arm["ref"], arm["digest"], arm["weight"], parse_held_manifests(arm["manifests"]) or {})
        for arm in found["arms"]
    )
    return Change(**{**{key: found[key] for key in KINDS}, "arms": arms, "gates": tuple(found["gates"])})


def refused(text: str) -> float:
    raise ValueError(f"{text} is no JSON")


def is_arm(value: Any) -> bool:
    texts = isinstance(value, dict) and isinstance(value.get("ref"), str) and isinstance(value.get("digest"), str)
    weight = value.get("weight") if isinstance(value, dict) else None
    held = isinstance(value, dict) and parse_held_manifests(value.get("manifests")) is not None
    return texts and held and isinstance(weight, int | float) and not isinstance(weight, bool) and 0 < weight < math.inf


def is_time(text: str) -> bool:
    try:
        return datetime.fromisoformat(text).tzinfo is not None
    except ValueError:
        return False


def append(
    root: Path, alias: str, arms: Sequence[Meant], *, who: str, why: str, replaces: int, override: str = "",
    gates: Sequence[Mapping[str, Any]] = (),
) -> Change:  # fmt: skip
    """Write one change down, unless the alias was changed since it was looked at. Of two at once, one waits.

    Args:
        replaces: seq of the change of the alias that was the newest when it was looked at; 0 for none.

    Raises:
        RunConflict: the alias was changed meanwhile; the message says by whom, to what and why.
        CorruptFile, InputError: as `read_log`.
        OSError: the log cannot be written.
    """
    path = root / FILE
    if has_file(path, "aliases", REMEDY):
        check_readable(path, "aliases", REMEDY)
    with open(path, "ab+", opener=open_regular) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        text = file.read()
        log, used = parsed(text, path)
        last = log.last(alias)
        if (last.seq if last else 0) != replaces:
            if last is None:
                raise CorruptFile("aliases", str(path), "lost its end since it was looked at", REMEDY)
            now = describe_arms(last.arms) or "nothing: it was retired"
            problem = f"was changed meanwhile by {last.who} at {last.at}: it means {now} ({last.why})"
            raise RunConflict("stage.alias", alias, problem, "If you still want to, run the same command again.")
        at = max([datetime.now(UTC), *(datetime.fromisoformat(change.at) for change in log.changes[-1:])])
        head = log.head
        values = {
            "seq": head.seq + 1, "at": at.isoformat(timespec="microseconds"), "alias": alias, "arms": tuple(arms),
            "replaces": replaces, "who": who, "why": why, "override": override, "gates": tuple(gates),
            "prev_hash": head.hash, "hash": "",
        }  # fmt: skip
        values["hash"] = link_hash(Change(**values).hashed, head.hash)
        change = Change(**values)
        file.truncate(used)  # what a process was writing when it was killed
        broken = b"" if text[:used].endswith(b"\n") or not used else b"\n"
        file.write(broken + canonical(change.as_json()).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    return change


def describe_arms(arms: Sequence[Meant]) -> str:
    """Return `ppo:first (0a0e4de46d76)`, with shares where there are several; empty of none."""
    total = sum(arm.weight for arm in arms)
    share = (lambda arm: f"{arm.weight / total:.3g} of ") if len(arms) > 1 else (lambda arm: "")
    return ", ".join(f"{share(arm)}{arm.ref} ({arm.digest[:12]})" for arm in arms)
