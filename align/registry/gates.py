"""Gates: what has to be true of an artifact before an alias may mean it.

A gate is a YAML file that binds aliases to conditions:

    alias: production*
    conditions:
      - {figure: win_rate, at_least: 0.55}
      - {figure: kl, at_most: 20}
      - {receipt: gguf}
      - {unseen: true}
      - {signature: release.pub}
      - {verdict: safety}
      - {stale: false}

Of a figure with an interval, the end that is worse has to keep the bound. What a proxy judged, the reward that a policy
was trained against, counts only where a condition says `proxy: true`. Figures of a policy that collapsed, which gives
nearly the same answer to every prompt, count only where a condition says `collapsed: true`. With `collapsed: measured`
they count only if an evaluation measured that the policy did not collapse.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from hashlib import sha256
from pathlib import Path
from typing import Any

import yaml

from align.core.errors import CorruptFile, InputError, require
from align.core.files import read_bytes, user_path
from align.registry.record import Record, altered_in, number
from align.registry.shown import figure as in_words
from align.registry.shown import value_at
from align.registry.verdicts import PASS, verdict_on
from align.report.words import is_bounded, is_interval
from align.run.artifacts import verify_outputs
from align.run.files import json_object
from align.run.manifest import read_manifest
from align.run.receipt import RECEIPT, checked_receipt
from align.run.signing import SIGNATURE, PublicKey, public_key, verified
from align.run.stale import stale_in
from align.run.weights import published_digest

ENDINGS = (".yaml", ".yml")
PATTERN = re.compile(r"[A-Za-z0-9._*?\[\]!-]+")
EXAMPLE = (
    "Write it like {figure: win_rate, at_least: 0.55}, {receipt: gguf}, {unseen: true}, {stale: false}, "
    "{signature: PUBLIC_KEY} or {verdict: NAME}."
)


@dataclass(frozen=True, slots=True)
class Subject:
    """What a gate is asked about.

    Attributes:
        root: the folder of all runs.
        record: of the run that made the artifact, see `align.registry.record`.
        digest: of the artifact.
        evaluation: the record of the run that evaluated it; None where none did.
        exports: the records of its exports.
        upstream: it, and all that it was made from, as far as that is there.
        gone: the runs that it was made from and that are not there.
    """

    root: Path
    record: Record
    digest: str
    evaluation: Record | None
    exports: Sequence[Record]
    upstream: Sequence[Record] = ()
    gone: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Finding:
    """What one condition says of one artifact.

    Attributes:
        run: that made the artifact.
        condition: in words.
        said: the figure that it was decided by, or what is missing.
    """

    run: str
    condition: str
    passed: bool
    said: str


def altered_figures(subject: Subject) -> str:
    """Return why the figures of an artifact decide nothing: they, or those of its evaluation, are not known to be the
    published ones. Empty if they are.

    All published files of the evaluation are hashed: they are the evidence of its figures.
    """
    problems = [altered_in(subject.record)]
    if subject.evaluation is not None:
        folder = subject.root / subject.evaluation["folder"]
        problems.append(altered_in(subject.evaluation))
        try:
            verify_outputs(folder, read_manifest(folder).outputs)
        except InputError as error:
            problems.append(f"{subject.evaluation['run']}: {error}")
    return "; ".join(dict.fromkeys(filter(None, problems)))


Check = Callable[[Subject], tuple[bool, str]]
"""Whether a condition is met, and by what."""


@dataclass(frozen=True, slots=True)
class Gate:
    """Attributes:
    name: of its file, without the ending.
    aliases: patterns of the aliases that it binds.
    conditions: each in words, and its check.
    digest: sha256 of the file, hex.
    """

    name: str
    aliases: tuple[str, ...]
    conditions: tuple[tuple[str, Check], ...]
    digest: str

    def binds(self, alias: str) -> bool:
        return any(fnmatchcase(alias, pattern) for pattern in self.aliases)

    def findings(self, subject: Subject) -> list[Finding]:
        """What each condition says of an artifact."""
        return [Finding(subject.record["run"], said, *check(subject)) for said, check in self.conditions]

    def as_json(self, findings: Sequence[Finding]) -> dict[str, Any]:
        """As the log of the aliases keeps it."""
        return {"gate": self.name, "digest": self.digest, "findings": [asdict(finding) for finding in findings]}


class Loader(yaml.SafeLoader):
    """YAML in which no key stands twice: of two the last one would count, and nobody would know."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if twice := next((key for key in keys if keys.count(key) > 1), None):
            raise yaml.YAMLError(f"the key {twice!r} stands twice")
        return super().construct_mapping(node, deep)


def read_gates(folders: Iterable[Path]) -> list[Gate]:
    """The gates of some folders, by name; none of one that is not there.

    Raises:
        InputError: a file cannot be read as a gate.
    """
    found = {
        os.path.realpath(path): path for folder in folders for ending in ENDINGS for path in folder.glob(f"*{ending}")
    }
    return [read_gate(path) for path in sorted(found.values())]


def read_gate(path: Path) -> Gate:
    field = str(path)
    text = read_bytes(path, "gate", "Mend the file.")
    try:
        given = yaml.load(text.decode("utf-8"), Loader)
    except (ValueError, yaml.YAMLError, RecursionError, TypeError) as error:
        raise CorruptFile("gate", field, f"cannot be read as YAML ({error})", "Mend the file.") from error
    remedy = "Write `alias:` with the name or the pattern of an alias, and `conditions:` with a list."
    whole = isinstance(given, Mapping) and {*given} == {"alias", "conditions"}
    require(whole, "gate", field, "has other keys than `alias` and `conditions`", remedy)
    aliases = [given["alias"]] if isinstance(given["alias"], str) else given["alias"]
    texts = isinstance(aliases, list) and bool(aliases) and all(isinstance(one, str) and one for one in aliases)
    texts = texts and all(PATTERN.fullmatch(one) for one in aliases)
    require(texts, f"{field}: alias", aliases, "is no name or pattern of an alias, nor a list of them", remedy)
    listed = isinstance(given["conditions"], list) and bool(given["conditions"])
    require(listed, f"{field}: conditions", given["conditions"], "is no list of conditions", EXAMPLE)
    numbered = enumerate(given["conditions"])
    found = tuple(condition(one, f"{field}: conditions[{i}]", path.parent) for i, one in numbered)
    return Gate(path.stem, tuple(aliases), found, sha256(text).hexdigest())


def condition(given: Any, field: str, home: Path) -> tuple[str, Check]:
    """One condition in words, and its check.

    Args:
        home: the folder of its gate.

    Raises:
        InputError: it is none.
    """
    kinds = [kind for kind in KINDS if isinstance(given, Mapping) and kind in given]
    require(len(kinds) == 1, field, given, f"is no condition: it has none of {', '.join(KINDS)}, or two", EXAMPLE)
    return KINDS[kinds[0]](given, field, home)


def bound(given: Mapping[str, Any], field: str, home: Path) -> tuple[str, Check]:
    """Read `{figure: KEY, at_least: X}`, `at_most`, or both, with `proxy: true` and `collapsed: true` as exemptions;
    `collapsed: measured` asks for an evaluation that measured it."""
    limits = {key: given[key] for key in ("at_least", "at_most") if key in given}
    known = {*given} <= {"figure", "proxy", "collapsed", *limits} and isinstance(given["figure"], str)
    collapsed = given.get("collapsed", False)
    known = bool(limits) and known and isinstance(given.get("proxy", False), bool)
    known = known and (isinstance(collapsed, bool) or collapsed == "measured")
    require(known, field, dict(given), "is no bound of a figure", EXAMPLE)
    for value in limits.values():
        finite = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        require(finite, field, dict(given), f"has a bound that is no number: {value!r}", EXAMPLE)
    name = str(given["figure"])
    words = " and ".join(f"{key.replace('_', ' ')} {value}" for key, value in limits.items())

    def check(subject: Subject) -> tuple[bool, str]:
        if problem := altered_figures(subject):
            return False, f"altered: {problem}"
        key, figure = figure_of(subject.record, name)
        if figure is None or number(figure) is None:
            measure = f"stage=eval artifact={subject.record['run']}"
            return False, f"there is no such figure. An evaluation may have it: {measure}"
        if isinstance(figure, Mapping) and not (is_interval(figure) and is_bounded(figure)):
            return False, f"{in_words(figure)} has no interval"
        judge = judged_by(subject, key, figure)
        if judge and not given.get("proxy"):
            return False, f"{in_words(figure)} by {judge}, which it was trained against: evaluate it with another judge"
        verdict = value_at(subject.record, "metrics.collapse.verdict")
        reasons = value_at(subject.record, "metrics.collapse.reasons")
        reasons = "; ".join(map(str, reasons)) if isinstance(reasons, list) else ""
        if verdict == "collapsed" and collapsed is not True:
            return False, f"{in_words(figure)} of a policy that collapsed: {reasons}"
        if verdict != "varied" and collapsed == "measured":
            why = reasons or "no evaluation says it"
            return False, f"{in_words(figure)}; whether the policy collapsed is not measured: {why}"
        unmeasured = "; whether the policy collapsed is not measured" if verdict == "not measured" else ""
        low, high = (figure["low"], figure["high"]) if isinstance(figure, Mapping) else (figure, figure)
        kept = limits.get("at_least", -math.inf) <= low and high <= limits.get("at_most", math.inf)
        return kept, f"{in_words(figure)}{unmeasured}"

    required = ", collapse measured" if collapsed == "measured" else ""
    return f"{name} {words}{required}", check


def figure_of(record: Record, name: str) -> tuple[str, Any]:
    """(key, figure) that a name stands for: of the metrics, with its interval where it has one."""
    name = name.removesuffix(".value")  # which alone would pass over the interval
    keys = (f"metrics.{name}_interval", f"metrics.{name}", f"{name}_interval", name)
    return next(((key, found) for key in keys if (found := value_at(record, key)) is not None), (name, None))


def judged_by(subject: Subject, key: str, figure: Any) -> str:
    """The proxy that a figure goes by, where an evaluation by one measured it; empty elsewhere."""
    found = subject.evaluation
    if found is None or value_at(found, "metrics.judge_is") != "proxy":
        return ""
    measured = value_at(found, key) == figure or (key == "score" and value_at(found, "score") == figure)
    return str(value_at(found, "metrics.judge")) if measured else ""


def receipt(given: Mapping[str, Any], field: str, home: Path) -> tuple[str, Check]:
    """`{receipt: KIND}`: it is, or has, an export of that kind, whose files are those that its receipt speaks of, and
    which kept every bound."""
    kind = given["receipt"]
    alone = {*given} == {"receipt"} and isinstance(kind, str) and bool(kind)
    require(alone, field, dict(given), "is no kind of export", "Write {receipt: adapter}, merged or gguf.")

    def check(subject: Subject) -> tuple[bool, str]:
        said = f"there is no such export: stage=export export={kind} artifact={subject.record['run']}"
        own = [subject.record] if subject.record["stage"] == "export" else []
        for export in (*own, *subject.exports):
            if value_at(export, "config.export.name") == kind and export["status"] == "done":
                passed, said = receipt_passed(subject, export)
                if passed:
                    return True, said
        return False, said

    return f"receipt of export={kind}", check


def receipt_passed(subject: Subject, export: Record) -> tuple[bool, str]:
    """Whether an export is what was exported, and close enough to what was trained."""
    folder = subject.root / export["folder"]
    try:
        found = checked_receipt(folder / "artifact")
        verify_outputs(folder, read_manifest(folder).outputs)  # the receipt itself among them
    except InputError as error:
        return False, f"{export['run']}: {error}"
    if export is not subject.record and found.get("artifact") != subject.digest:
        return False, f"{export['run']} has the receipt of another artifact"
    verdicts = [row.get("verdict") for row in found["rows"]]
    missed = [row.get("name") for row in found["rows"] if row.get("verdict") not in (PASS, "reported", "not checked")]
    if missed:
        return False, f"{export['run']} missed a bound: {', '.join(map(str, missed))}"
    return PASS in verdicts, f"{export['run']}: {verdicts.count(PASS)} of {len(verdicts)} checks passed, none missed"


def unseen(given: Mapping[str, Any], field: str, home: Path) -> tuple[str, Check]:
    """`{unseen: true}`: it was evaluated, and on nothing that it was trained on."""
    require(dict(given) == {"unseen": True}, field, dict(given), "says nothing else than true", "Write {unseen: true}.")

    def check(subject: Subject) -> tuple[bool, str]:
        ref, found = subject.record["run"], subject.evaluation
        if found is None:
            return False, f"nothing evaluated it: stage=eval artifact={ref}"
        if problem := altered_figures(subject):
            return False, f"altered: {problem}"
        unknown, seen = value_at(found, "metrics.seen_unknown"), value_at(found, "metrics.seen")
        if seen:
            return False, f"training saw {seen:,} of the prompts of {found['run']}"
        if unknown != 0:
            return False, f"of {found['run']} it is not known which prompts training saw"
        return True, f"{found['run']}: training saw none of its prompts"

    return "evaluated on what it never saw", check


def signature(given: Mapping[str, Any], field: str, home: Path) -> tuple[str, Check]:
    """`{signature: PUBLIC_KEY}`: the artifact itself, or an export of it, is signed by the owner of a key, whose path
    counts from the folder of the gate."""
    name = given["signature"]
    alone = {*given} == {"signature"} and isinstance(name, str) and bool(name)
    require(alone, field, dict(given), "names no public key", "Write {signature: PUBLIC_KEY}.")
    path = home / user_path(name, field)
    field, remedy = f"{field}.signature", "The path of a public key counts from the folder of its gate."
    require(path.is_file(), field, name, f"is no file in {home}", remedy)

    def check(subject: Subject) -> tuple[bool, str]:
        ref = subject.record["run"]
        said = f"neither it nor an export of it is signed: stage=export export.sign=KEY artifact={ref}"
        key = public_key(str(path), field)  # one that cannot be read is a fault of the gate, which nobody overrides
        for record in (subject.record, *subject.exports):
            published = subject.root / record["folder"] / "artifact"
            found = [signed(subject, record["run"], folder, key) for folder in signed_folders(published)]
            if found and all(passed for passed, _ in found):
                return True, found[0][1]
            said = next((why for passed, why in found if not passed), said)
        return False, said

    return f"signature by {Path(name).name}", check


def signed_folders(published: Path) -> list[Path]:
    """The folders of an artifact that have to be signed: itself, or of several kinds of export each. A signed copy in
    it vouches for nothing beside it."""
    inside = sorted(published.glob("*"))
    if (published / SIGNATURE).is_file():
        return [published]
    return [] if any(not path.is_dir() for path in inside) else inside


def signed(subject: Subject, run: str, folder: Path, key: PublicKey) -> tuple[bool, str]:
    """Whether a folder is signed, and is the artifact or, as the receipt in it says, an export of it."""
    try:
        verified(folder, key, "artifact", run)
        receipt = folder / RECEIPT
        exported = json_object(receipt, RECEIPT, "Export it again.").get("artifact") if receipt.is_file() else None
    except InputError as error:
        return False, str(error)
    said = f"{run} is signed by {key.fingerprint[:12]}"
    alike = subject.digest in (exported, published_digest(folder))
    return alike, said if alike else f"{said}, and is another artifact"


def verdict(given: Mapping[str, Any], field: str, home: Path) -> tuple[str, Check]:
    """`{verdict: NAME}`: a verdict file of that name says `pass` of this very artifact."""
    name = given["verdict"]
    alone = {*given} == {"verdict"} and isinstance(name, str) and bool(name)
    require(alone, field, dict(given), "names no verdict", "Write {verdict: NAME}.")

    def check(subject: Subject) -> tuple[bool, str]:
        if problem := altered_figures(subject):
            return False, f"altered: {problem}"
        return verdict_on(subject.root, name, subject.digest)

    return f"verdict {name}", check


def fresh(given: Mapping[str, Any], field: str, home: Path) -> tuple[str, Check]:
    """`{stale: false}`: neither it nor anything that it was made from learned from what was forgotten since. Of a run
    that is gone nobody knows."""
    require(
        dict(given) == {"stale": False}, field, dict(given), "says nothing else than false", "Write {stale: false}."
    )

    def check(subject: Subject) -> tuple[bool, str]:
        for record in subject.upstream:
            if stale := stale_in(subject.root / record["folder"]):
                again = f": {stale.again}" if stale.again else ""
                return False, f"{record['run']} is stale since {stale.since[:10]}, {stale.because}{again}"
        if subject.gone:
            return False, f"{', '.join(subject.gone)} is gone, so nobody knows whether it is stale"
        return True, f"none of {len(subject.upstream):,} runs is"

    return "nothing that it was made from is stale", check


KINDS: Mapping[str, Callable[[Mapping[str, Any], str, Path], tuple[str, Check]]] = {
    "figure": bound, "receipt": receipt, "unseen": unseen, "signature": signature, "verdict": verdict, "stale": fresh,
}  # fmt: skip
"""The key that a condition is known by."""
