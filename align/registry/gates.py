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

A condition on a verdict asks for a verdict file, in which an evaluator said something of an artifact:

    {"schema_version": 1, "gate": "safety", "verdict": "pass", "figure": {"value": 0.98, "low": 0.95, "high": 0.99},
     "inputs": {"artifact": SHA256, "data": SHA256}}

Such files lie in `verdicts/` of a run's artifact, or of the folder of all runs, for those that another tool wrote. Only
`pass` counts, and only of the artifact that `inputs.artifact` is the digest of.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import yaml

from align.core.errors import CorruptFile, InputError, require, require_schema_version
from align.core.files import read_bytes, user_path
from align.registry.formatting import figure as format_value
from align.registry.formatting import value_at
from align.registry.record import Record, altered_in, number
from align.report.figure_text import is_bounded, is_interval
from align.run.artifacts import readable, verify_outputs
from align.run.digests import file_digest
from align.run.files import json_object
from align.run.manifest import Manifest, read_manifest
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

    @property
    def text(self) -> str:
        return f"{self.run}: {self.condition}: {self.said}"


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
    found = tuple(read_condition(one, f"{field}: conditions[{i}]", path.parent) for i, one in numbered)
    return Gate(path.stem, tuple(aliases), found, sha256(text).hexdigest())


def read_condition(given: Any, field: str, home: Path) -> tuple[str, Check]:
    """Return one condition in words, and its check.

    Args:
        home: the folder of its gate, from which the path of a public key counts.

    Raises:
        InputError: it is none.
    """
    kinds = [kind for kind in KINDS if isinstance(given, Mapping) and kind in given]
    require(len(kinds) == 1, field, given, f"is no condition: it has none of {', '.join(KINDS)}, or two", EXAMPLE)
    kind = kinds[0]
    if kind == "figure":
        return read_bound(given, field)
    words, value_kind, check = KINDS[kind]
    value = given[kind]
    is_value = value == value_kind if isinstance(value_kind, bool) else isinstance(value, str) and bool(value)
    meaning = str(value_kind).lower() if isinstance(value_kind, bool) else value_kind
    require(
        {*given} == {kind} and is_value, field, dict(given), "is no such condition", f"Write {{{kind}: {meaning}}}."
    )
    if kind == "signature":
        path = home / user_path(value, field)
        remedy = "The path of a public key counts from the folder of its gate."
        require(path.is_file(), f"{field}.signature", value, f"is no file in {home}", remedy)
        return words.format(path.name), partial(check, value=(path, f"{field}.signature"))
    return words.format(value), partial(check, value=value)


def read_bound(given: Mapping[str, Any], field: str) -> tuple[str, Check]:
    """Read `{figure: KEY, at_least: X}`, `at_most`, or both, with `proxy: true` and `collapsed: true` as exemptions;
    `collapsed: measured` asks for an evaluation that measured it."""
    limits = {key: given[key] for key in ("at_least", "at_most") if key in given}
    collapsed = given.get("collapsed", False)
    known = bool(limits) and {*given} <= {"figure", "proxy", "collapsed", *limits} and isinstance(given["figure"], str)
    known = known and isinstance(given.get("proxy", False), bool)
    known = known and (isinstance(collapsed, bool) or collapsed == "measured")
    require(known, field, dict(given), "is no bound of a figure", EXAMPLE)
    for value in limits.values():
        finite = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        require(finite, field, dict(given), f"has a bound that is no number: {value!r}", EXAMPLE)
    words = " and ".join(f"{key.replace('_', ' ')} {value}" for key, value in limits.items())
    required = ", collapse measured" if collapsed == "measured" else ""
    bounds = limits.get("at_least", -math.inf), limits.get("at_most", math.inf)
    check = partial(
        check_bound, name=given["figure"], bounds=bounds, proxy=given.get("proxy", False), collapsed=collapsed
    )
    return f"{given['figure']} {words}{required}", check


def check_bound(
    subject: Subject, name: str, bounds: tuple[float, float], proxy: bool, collapsed: bool | str
) -> tuple[bool, str]:
    if problem := altered_figures(subject):
        return False, f"altered: {problem}"
    key, figure = figure_of(subject.record, name)
    if figure is None or number(figure) is None:
        measure = f"stage=eval artifact={subject.record['run']}"
        return False, f"there is no such figure. An evaluation may have it: {measure}"
    text = format_value(figure)
    if isinstance(figure, Mapping) and not (is_interval(figure) and is_bounded(figure)):
        return False, f"{text} has no interval"
    judge = judged_by(subject, key, figure)
    if judge and not proxy:
        return False, f"{text} by {judge}, which it was trained against: evaluate it with another judge"
    verdict = value_at(subject.record, "metrics.collapse.verdict")
    reasons = value_at(subject.record, "metrics.collapse.reasons")
    reasons = "; ".join(map(str, reasons)) if isinstance(reasons, list) else ""
    if verdict == "collapsed" and collapsed is not True:
        return False, f"{text} of a policy that collapsed: {reasons}"
    if verdict != "varied" and collapsed == "measured":
        why = reasons or "no evaluation says it"
        return False, f"{text}; whether the policy collapsed is not measured: {why}"
    unmeasured = "; whether the policy collapsed is not measured" if verdict == "not measured" else ""
    low, high = (figure["low"], figure["high"]) if isinstance(figure, Mapping) else (figure, figure)
    return bounds[0] <= low and high <= bounds[1], f"{text}{unmeasured}"


def figure_of(record: Record, name: str) -> tuple[str, Any]:
    """Return (key, figure) that a name stands for: of the metrics, with its interval if it has one."""
    name = name.removesuffix(".value")  # which alone would pass over the interval
    keys = (f"metrics.{name}_interval", f"metrics.{name}", f"{name}_interval", name)
    return next(((key, found) for key in keys if (found := value_at(record, key)) is not None), (name, None))


def judged_by(subject: Subject, key: str, figure: Any) -> str:
    """Return the proxy that a figure goes by, if an evaluation by one measured it; empty otherwise."""
    found = subject.evaluation
    if found is None or value_at(found, "metrics.judge_is") != "proxy":
        return ""
    measured = value_at(found, key) == figure or (key == "score" and value_at(found, "score") == figure)
    return str(value_at(found, "metrics.judge")) if measured else ""


def check_receipt(subject: Subject, value: str) -> tuple[bool, str]:
    """Check that it is, or has, an export of a kind, whose files are those that its receipt speaks of, and which kept
    every bound."""
    problem = f"there is no such export: stage=export export={value} artifact={subject.record['run']}"
    own = [subject.record] if subject.record["stage"] == "export" else []
    for export in (*own, *subject.exports):
        if value_at(export, "config.export.name") == value and export["status"] == "done":
            passed, problem = receipt_passed(subject, export)
            if passed:
                return True, problem
    return False, problem


def receipt_passed(subject: Subject, export: Record) -> tuple[bool, str]:
    """Return whether an export is what was exported and close enough to what was trained, and why."""
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


def check_unseen(subject: Subject, value: bool) -> tuple[bool, str]:
    """Check that it was evaluated, and on nothing that it was trained on."""
    evaluation = subject.evaluation
    if evaluation is None:
        return False, f"nothing evaluated it: stage=eval artifact={subject.record['run']}"
    if problem := altered_figures(subject):
        return False, f"altered: {problem}"
    if seen := value_at(evaluation, "metrics.seen"):
        return False, f"training saw {seen:,} of the prompts of {evaluation['run']}"
    if value_at(evaluation, "metrics.seen_unknown") != 0:
        return False, f"of {evaluation['run']} it is not known which prompts training saw"
    return True, f"{evaluation['run']}: training saw none of its prompts"


def check_signature(subject: Subject, value: tuple[Path, str]) -> tuple[bool, str]:
    """Check that the artifact itself, or an export of it, is signed by the owner of a key.

    Args:
        value: the path of the public key, and the field that names it.
    """
    run = subject.record["run"]
    problem = f"neither it nor an export of it is signed: stage=export export.sign=KEY artifact={run}"
    key = public_key(str(value[0]), value[1])  # one that cannot be read is a fault of the gate, which nobody overrides
    for record in (subject.record, *subject.exports):
        published = subject.root / record["folder"] / "artifact"
        results = [check_signed(subject, record["run"], folder, key) for folder in signed_folders(published)]
        if results and all(passed for passed, _ in results):
            return True, results[0][1]
        problem = next((why for passed, why in results if not passed), problem)
    return False, problem


def signed_folders(published: Path) -> list[Path]:
    """Return the folders of an artifact that have to be signed: itself, or each of several kinds of export. A signed
    copy in it vouches for nothing beside it."""
    inside = sorted(published.glob("*"))
    if (published / SIGNATURE).is_file():
        return [published]
    return [] if any(not path.is_dir() for path in inside) else inside


def check_signed(subject: Subject, run: str, folder: Path, key: PublicKey) -> tuple[bool, str]:
    """Check that a folder is signed, and is the artifact or, as the receipt in it says, an export of it."""
    try:
        verified(folder, key, "artifact", run)
        receipt = folder / RECEIPT
        exported = json_object(receipt, RECEIPT, "Export it again.").get("artifact") if receipt.is_file() else None
    except InputError as error:
        return False, str(error)
    said = f"{run} is signed by {key.fingerprint[:12]}"
    alike = subject.digest in (exported, published_digest(folder))
    return alike, said if alike else f"{said}, and is another artifact"


def check_verdict(subject: Subject, value: str) -> tuple[bool, str]:
    """Check that a verdict file of a name says `pass` of this very artifact."""
    if problem := altered_figures(subject):
        return False, f"altered: {problem}"
    return verdict_on(subject.root, value, subject.digest)


def check_fresh(subject: Subject, value: bool) -> tuple[bool, str]:
    """Check that neither it nor anything that it was made from learned from what was forgotten since. Of a run that is
    gone nobody knows."""
    for record in subject.upstream:
        if stale := stale_in(subject.root / record["folder"]):
            again = f": {stale.again}" if stale.again else ""
            return False, f"{record['run']} is stale since {stale.since[:10]}, {stale.because}{again}"
    if subject.gone:
        return False, f"{', '.join(subject.gone)} is gone, so nobody knows whether it is stale"
    return True, f"none of {len(subject.upstream):,} runs is"


KINDS: Mapping[str, tuple[str, str | bool, Callable[..., tuple[bool, str]]]] = {
    "figure": ("", "KEY", check_bound),
    "receipt": ("receipt of export={}", "adapter|merged|gguf", check_receipt),
    "unseen": ("evaluated on what it never saw", True, check_unseen),
    "signature": ("signature by {}", "PUBLIC_KEY", check_signature),
    "verdict": ("verdict {}", "NAME", check_verdict),
    "stale": ("nothing that it was made from is stale", False, check_fresh),
}
"""The key that a condition is known by → the condition in words, its value or an example of it, its check."""


SCHEMA = 1
FOLDER = "verdicts"
PASS = "pass"
REMEDY = "See docs/registry.md for what a verdict file holds."
AGAIN = "Evaluate again with stage=eval resume=never, or write the file anew: docs/registry.md says what it holds."


@dataclass(frozen=True, slots=True)
class Verdict:
    """Attributes:
    source: the run that it lies in, or the name of its file.
    run: that run's manifest; None of a file beside the runs.
    """

    gate: str
    verdict: str
    figure: Any
    inputs: dict[str, str]
    source: str
    run: Manifest | None


def read_verdict(path: Path, source: str, run: Manifest | None) -> Verdict:
    """One verdict file.

    Raises:
        CorruptFile: it is none.
        InputError: another version wrote it.
    """
    found = json_object(path, "verdict", REMEDY)
    require_schema_version(found.get("schema_version"), SCHEMA, "verdict", str(path), AGAIN)
    inputs = found.get("inputs")
    texts = isinstance(found.get("gate"), str) and isinstance(found.get("verdict"), str)
    digests = isinstance(inputs, dict) and all(isinstance(value, str) for value in inputs.values())
    if not texts or not isinstance(inputs, dict) or not digests:
        raise CorruptFile("verdict", str(path), "is no verdict file", REMEDY)
    return Verdict(found["gate"], found["verdict"], found.get("figure"), inputs, source, run)


def verdicts(root: Path) -> Iterator[Verdict]:
    """All of them, those of runs that are done and those beside the runs.

    Raises:
        CorruptFile, InputError: as `read_verdict`.
    """
    for path in sorted(root.glob(f"*/*/artifact/{FOLDER}/*.json")):
        folder = path.parents[2]
        manifest = readable(folder)
        if manifest is not None and manifest.done:
            name = path.relative_to(folder).as_posix()
            if file_digest(path) != manifest.outputs.get(name):
                problem = "is not the file that the run published"
                raise CorruptFile("verdict", str(path), problem, "Restore it, or evaluate again with resume=never.")
            yield read_verdict(path, manifest.ref, manifest)
    for path in sorted((root / FOLDER).glob("*.json")):
        yield read_verdict(path, path.name, None)


def verdict_on(root: Path, gate: str, digest: str) -> tuple[bool, str]:
    """Whether a verdict of this name says `pass` of an artifact, and what it says. Of runs, the newest counts; of files
    beside the runs, which have no order, each."""
    try:
        named = [one for one in verdicts(root) if one.gate == gate]
    except InputError as error:
        return False, str(error)
    found = [one for one in named if one.inputs.get("artifact") == digest]
    if not found:
        others = f"; there are {len(named)} on other artifacts" if named else ""
        return False, f"nobody has given one on this artifact ({digest[:12]}){others}"
    newest = max((one.run.publication for one in found if one.run), default=None)
    count = [one for one in found if one.run is None or one.run.publication == newest]
    worst = next((one for one in count if one.verdict != PASS), count[0])
    figure = "" if worst.figure is None else f", {format_value(worst.figure)}"
    return worst.verdict == PASS, f"{worst.source}: {worst.verdict}{figure}"
