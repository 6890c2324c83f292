"""The log of aliases of a folder of runs: what `@production` refers to, and who changed it, when and why.

`aliases.jsonl` in that folder has one change per line, in a chain of hashes (`align.core.chain`) that shows altered and
removed lines. The file is only appended to. An incomplete last line is a change whose writer was killed before it
reported success.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from align.core.chain import GENESIS, ChainHead, hash_link, to_canonical_json, verify_successor
from align.core.errors import CorruptFile, InputError, RunConflict, find_lone_surrogate, require_schema_version
from align.core.files import describe_read_error, has_file, open_binary, open_regular, require_readable
from align.run.manifest import ManifestDigests, parse_manifest_digests

FILE = "aliases.jsonl"
SIGN = "@"
"""First character of a reference to an alias."""
SCHEMA = 1
LINE_START = b'{"alias":'
"""First bytes of every line of the log, whose JSON keys are sorted."""
REMEDY = f"Restore {FILE} from a copy of the folder of runs."
PROMOTE_AGAIN = (
    f"Use the version of align that wrote it, or move {FILE} away and promote again with stage=registry "
    "stage.action=promote."
)


@dataclass(frozen=True, slots=True)
class AliasTarget:
    """An artifact that an alias refers to, with its share of the requests.

    Attributes:
        ref: `stage:name` of the run that made it.
        digest: digest of its weights, see `align.run.artifacts.Artifact`.
        weight: its share of the requests, relative to the other artifacts'.
        manifests: `stage:name` → manifest at the time of the change: of the run, of the models it was made from, and of
            its evaluation. They show metrics that are altered later.
    """

    ref: str
    digest: str
    weight: float = 1.0
    manifests: Mapping[str, ManifestDigests] = field(default_factory=dict, compare=False)

    def manifests_as_json(self) -> dict[str, dict[str, str]]:
        return {run: manifest.as_json() for run, manifest in self.manifests.items()}


@dataclass(frozen=True, slots=True)
class Change:
    """A record in the alias log: an alias's new targets, and who changed it, when and why.

    Attributes:
        seq: 1, 2, 3, … over all aliases.
        at: time, ISO 8601 in UTC, never before that of the previous change, even if the clock was set back.
        arms: artifacts that the alias refers to from now on; empty if it is retired.
        replaces: seq of the previous change of this alias; 0 for the first.
        override: reason why it was made although a gate was closed; empty if none was.
        gates: result of each gate of the alias, as `align.registry.gates` writes it.
    """

    seq: int
    at: str
    alias: str
    arms: tuple[AliasTarget, ...]
    replaces: int
    who: str
    why: str
    override: str
    gates: tuple[Mapping[str, Any], ...]
    prev_hash: str
    hash: str

    @property
    def hashed(self) -> list[Any]:
        arms = [[arm.ref, arm.digest, arm.weight, arm.manifests_as_json()] for arm in self.arms]
        gates = [dict(gate) for gate in self.gates]
        return [self.seq, self.at, self.alias, arms, self.replaces, self.who, self.why, self.override, gates]

    def as_json(self) -> dict[str, Any]:
        arms = [
            {"ref": arm.ref, "digest": arm.digest, "weight": arm.weight, "manifests": arm.manifests_as_json()}
            for arm in self.arms
        ]
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {"schema_version": SCHEMA, **values, "arms": arms, "gates": [dict(gate) for gate in self.gates]}


KINDS: Mapping[str, type] = {
    "seq": int,
    "at": str,
    "alias": str,
    "arms": list,
    "replaces": int,
    "who": str,
    "why": str,
    "override": str,
    "gates": list,
    "prev_hash": str,
    "hash": str,
}
"""Field of an alias change → Python type that its JSON value must have."""


@dataclass(frozen=True, slots=True)
class AliasLog:
    """All alias changes of a folder of runs, in the order they were made."""

    changes: tuple[Change, ...] = ()

    @property
    def head(self) -> ChainHead:
        return ChainHead(self.changes[-1].seq, self.changes[-1].hash) if self.changes else ChainHead(0, GENESIS)

    def last(self, alias: str) -> Change | None:
        """Return the newest change of an alias, which may be its retirement, or None if the alias never existed."""
        return next((change for change in reversed(self.changes) if change.alias == alias), None)

    def get_current_changes(self, as_of: datetime | None = None) -> dict[str, Change]:
        """Return a mapping from each alias that is not retired to its newest change up to `as_of`, by default now."""
        newest: dict[str, Change] = {}
        for change in self.changes:
            if as_of is None or datetime.fromisoformat(change.at) <= as_of:
                newest[change.alias] = change
        return {alias: change for alias, change in sorted(newest.items()) if change.arms}


def read_alias_log(root: Path) -> AliasLog:
    """Read `aliases.jsonl` in a folder of runs and verify its hash chain; the log is empty if there is no such file.

    Raises:
        CorruptFile: A line is missing, was altered or cannot be read.
        InputError: Another version of align wrote a line.
    """
    if not has_file(root / FILE, "aliases", REMEDY):
        return AliasLog()
    try:
        with open_binary(root / FILE) as file:
            text = file.read()
    except OSError as error:
        raise CorruptFile("aliases", str(root / FILE), describe_read_error(error), REMEDY) from error
    return parse_alias_log(text, root / FILE)[0]


def parse_alias_log(text: bytes, path: Path) -> tuple[AliasLog, int]:
    """Parse an alias log, verify its hash chain, and return the log and the number of bytes that complete lines take.

    The rest, if any, is an incomplete last line.

    The last line may be a complete change without its line break, or the beginning of a change that was never reported.

    Raises:
        CorruptFile, InputError: As `read_alias_log`.
    """
    head = ChainHead(0, GENESIS)
    changes: list[Change] = []
    used = 0
    lines = text.split(b"\n")
    last_line = lines.pop()
    if not (last_line.startswith(LINE_START) or LINE_START.startswith(last_line)):
        # `append_change` cuts off the beginning of a line that a killed process left; this is not one.
        raise CorruptFile(
            f"{path}, line {len(lines) + 1}", shorten_line(last_line), "is no record of an alias change", REMEDY
        )
    if is_complete(last_line):
        lines.append(last_line)
    for number, line in enumerate(lines, 1):
        field = f"{path}, line {number}"
        change = parse_change(line, field)
        try:
            head = verify_successor(head, change, f"{field}: seq", REMEDY)
        except (TypeError, ValueError, RecursionError) as error:
            if isinstance(error, InputError):
                raise
            raise CorruptFile(
                field, shorten_line(line), f"is no record of an alias change ({error})", REMEDY
            ) from error
        changes.append(change)
        used = min(len(text), used + len(line) + 1)
    return AliasLog(tuple(changes)), used


def is_complete(last_line: bytes) -> bool:
    """Return whether the text after the last line break is valid JSON, not a line cut off in the middle of a write.

    A line that ends with a carriage return counts as complete.
    """
    try:
        json.loads(last_line)
    except (ValueError, RecursionError):
        return b"\r" in last_line  # lines that another program ended with a carriage return
    return True


def shorten_line(line: bytes) -> str:
    return line[:60].decode("utf-8", "replace")


def parse_change(line: bytes, field: str) -> Change:
    invalid = CorruptFile(field, shorten_line(line), "is no record of an alias change", REMEDY)
    try:
        values = json.loads(line, parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        raise CorruptFile(field, shorten_line(line), "is no line of JSON in UTF-8", REMEDY) from error
    if not isinstance(values, dict) or "schema_version" not in values:
        raise invalid
    require_schema_version(values["schema_version"], SCHEMA, field, shorten_line(line), PROMOTE_AGAIN)
    if not all(isinstance(values.get(key), kind) for key, kind in KINDS.items()):
        raise invalid
    if not all(map(is_arm, values["arms"])) or not is_time(values["at"]):
        raise invalid
    if not all(isinstance(gate, dict) for gate in values["gates"]):
        raise invalid
    if find_lone_surrogate(json.dumps(values, ensure_ascii=False)):
        raise invalid
    arms = tuple(
        AliasTarget(arm["ref"], arm["digest"], arm["weight"], parse_manifest_digests(arm["manifests"]) or {})
        for arm in values["arms"]
    )
    return Change(**{**{key: values[key] for key in KINDS}, "arms": arms, "gates": tuple(values["gates"])})


def refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is no JSON")


def is_arm(value: Any) -> bool:
    if not (isinstance(value, dict) and isinstance(value.get("ref"), str) and isinstance(value.get("digest"), str)):
        return False
    weight = value.get("weight")
    if not isinstance(weight, int | float) or isinstance(weight, bool) or not 0 < weight < math.inf:
        return False
    return parse_manifest_digests(value.get("manifests")) is not None


def is_time(text: str) -> bool:
    try:
        return datetime.fromisoformat(text).tzinfo is not None
    except ValueError:
        return False


def append_change(
    root: Path,
    alias: str,
    arms: Sequence[AliasTarget],
    *,
    who: str,
    why: str,
    replaces: int,
    override: str = "",
    gates: Sequence[Mapping[str, Any]] = (),
) -> Change:
    """Append a change to the alias log, or raise RunConflict if the alias was changed since the caller read it.

    Concurrent calls wait for each other. An incomplete last line is cut off.

    Args:
        replaces: seq of the newest change of the alias when the caller read it; 0 if there was none.

    Raises:
        RunConflict: The alias was changed since. The message says by whom, to what and why.
        CorruptFile, InputError: As `read_alias_log`.
        OSError: The log cannot be written.
    """
    path = root / FILE
    if has_file(path, "aliases", REMEDY):
        require_readable(path, "aliases", REMEDY)
    with open(path, "ab+", opener=open_regular) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        text = file.read()
        log, used = parse_alias_log(text, path)
        last = log.last(alias)
        if (last.seq if last else 0) != replaces:
            if last is None:
                raise CorruptFile("aliases", str(path), "was cut at its end since it was read", REMEDY)
            target = describe_arms(last.arms) or "no artifact: it was retired"
            problem = f"was changed in the meantime by {last.who} at {last.at}: it points at {target} ({last.why})"
            raise RunConflict("stage.alias", alias, problem, "If you still want to, run the same command again.")
        at = max([datetime.now(UTC), *(datetime.fromisoformat(change.at) for change in log.changes[-1:])])
        head = log.head
        values = {
            "seq": head.seq + 1,
            "at": at.isoformat(timespec="microseconds"),
            "alias": alias,
            "arms": tuple(arms),
            "replaces": replaces,
            "who": who,
            "why": why,
            "override": override,
            "gates": tuple(gates),
            "prev_hash": head.hash,
            "hash": "",
        }
        values["hash"] = hash_link(Change(**values).hashed, head.hash)
        change = Change(**values)
        file.truncate(used)  # cuts off the line of a process that was killed
        missing_break = b"" if text[:used].endswith(b"\n") or not used else b"\n"
        file.write(missing_break + to_canonical_json(change.as_json()).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    return change


def describe_arms(arms: Sequence[AliasTarget]) -> str:
    """Return an alias's targets as text, such as `ppo:first (0a0e4de46d76)`, several of them with their traffic shares.

    Returns an empty text if none exist.
    """
    total = sum(arm.weight for arm in arms)
    shares = [f"{arm.weight / total:.3g} of " if len(arms) > 1 else "" for arm in arms]
    return ", ".join(f"{share}{arm.ref} ({arm.digest[:12]})" for share, arm in zip(shares, arms, strict=True))
