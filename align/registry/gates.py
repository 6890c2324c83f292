"""Gates: conditions that an artifact must meet before an alias may refer to it.

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

For a metric with an interval, the worse end has to keep the bound. Metrics by a proxy judge, the reward that a policy
was trained against, count only if a condition says `proxy: true`. Metrics of a policy that collapsed, which gives
nearly the same answer to every prompt, count only if a condition says `collapsed: true`. With `collapsed: measured`
they count only if an evaluation measured that the policy did not collapse.

A condition on a verdict needs a verdict file, which holds an evaluator's result for an artifact:

    {"schema_version": 1, "gate": "safety", "verdict": "pass", "figure": {"value": 0.98, "low": 0.95, "high": 0.99},
     "inputs": {"artifact": SHA256, "data": SHA256}}

Such files lie in `verdicts/` of a run's artifact or, if another tool wrote them, of the folder of all runs. Only `pass`
counts, and only for the artifact whose digest is `inputs.artifact`.
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
from typing import Any, NamedTuple

import yaml

from align.core.errors import CorruptFile, InputError, require, require_schema_version
from align.core.files import parse_user_path, read_bytes
from align.registry.formatting import format_value, get_value
from align.registry.record import Record, describe_alteration, get_number
from align.report.figure_text import is_bounded, is_interval
from align.run.artifacts import try_read_manifest, verify_outputs
from align.run.digests import file_digest
from align.run.files import read_json_object
from align.run.manifest import Manifest, read_manifest
from align.run.receipt import RECEIPT, read_verified_receipt
from align.run.signing import SIGNATURE, PublicKey, load_public_key, verify_signature
from align.run.stale import read_stale_mark
from align.run.weights import compute_published_digest

ENDINGS = (".yaml", ".yml")
PATTERN = re.compile(r"[A-Za-z0-9._*?\[\]!-]+")
EXAMPLE = (
    "Write it like {figure: win_rate, at_least: 0.55}, {receipt: gguf}, {unseen: true}, {stale: false}, "
    "{signature: PUBLIC_KEY} or {verdict: NAME}."
)


@dataclass(frozen=True, slots=True)
class Subject:
    """The artifact that a gate checks, with the records of its run, its evaluation, its exports and its ancestors.

    Attributes:
        root: the folder of all runs.
        record: record of the run that made the artifact, see `align.registry.record`.
        digest: digest of the artifact.
        evaluation: record of its evaluation; None if it was not evaluated.
        exports: records of its exports.
        upstream: records of the run itself and of all that it was made from, as far as they exist.
        gone: runs that it was made from and that no longer exist.
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
    """The result of checking one condition of a gate on one artifact.

    Attributes:
        run: the run that made the artifact.
        condition: the condition as text.
        said: the metric that decided, or what is missing.
    """

    run: str
    condition: str
    passed: bool
    said: str

    @property
    def text(self) -> str:
        return f"{self.run}: {self.condition}: {self.said}"


def verify_metrics(subject: Subject) -> str:
    """Return reasons why the metrics of an artifact or of its evaluation may differ from the published ones, or "" if
    they agree.

    All published files of the evaluation are hashed, as they are the evidence for its metrics.
    """
    problems = [describe_alteration(subject.record)]
    if subject.evaluation is not None:
        folder = subject.root / subject.evaluation["folder"]
        problems.append(describe_alteration(subject.evaluation))
        try:
            verify_outputs(folder, read_manifest(folder).outputs)
        except InputError as error:
            problems.append(f"{subject.evaluation['run']}: {error}")
    return "; ".join(dict.fromkeys(filter(None, problems)))


class Outcome(NamedTuple):
    """The outcome of checking one condition: passed or not, and the reason.

    Attributes:
        reason: the metric or file that decided, or what is missing.
    """

    passed: bool
    reason: str


ConditionCheck = Callable[[Subject], Outcome]
"""A function that checks an artifact against one condition of a gate."""


class Condition(NamedTuple):
    """One condition of a gate, as text and as a function that checks it.

    Attributes:
        text: the condition as text.
    """

    text: str
    check: ConditionCheck


class PublicKeyFile(NamedTuple):
    """The path of a public key file, and the name of the gate's field with that path, for error messages."""

    path: Path
    field: str


@dataclass(frozen=True, slots=True)
class Gate:
    """A gate: conditions that an artifact must meet before some aliases may refer to it.

    Attributes:
        name: name of its file, without the suffix.
        aliases: patterns of the aliases that it binds.
        digest: SHA-256 of the file, in hex.
    """

    name: str
    aliases: tuple[str, ...]
    conditions: tuple[Condition, ...]
    digest: str

    def binds(self, alias: str) -> bool:
        """Return whether an alias matches one of the gate's patterns, so that the gate must pass before the alias
        changes."""
        return any(fnmatchcase(alias, pattern) for pattern in self.aliases)

    def check_artifact(self, subject: Subject) -> list[Finding]:
        """Check an artifact against each condition, and return one Finding per condition, in the same order."""
        return [
            Finding(subject.record["run"], condition.text, *condition.check(subject)) for condition in self.conditions
        ]

    def as_json(self, findings: Sequence[Finding]) -> dict[str, Any]:
        """Return a gate's name, its file digest and its findings as a JSON mapping, for a change in the log of
        aliases."""
        return {"gate": self.name, "digest": self.digest, "findings": [asdict(finding) for finding in findings]}


class UniqueKeyLoader(yaml.SafeLoader):
    """A YAML loader that raises YAMLError on duplicate keys. PyYAML would silently take the last one."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if duplicate := next((key for key in keys if keys.count(key) > 1), None):
            raise yaml.YAMLError(f"the key {duplicate!r} is given twice")
        return super().construct_mapping(node, deep)


def read_gates(folders: Iterable[Path]) -> list[Gate]:
    """Read a gate from each YAML file directly in the given folders, sorted by path. Missing folders hold no gates.

    Raises:
        InputError: A file cannot be read as a gate.
    """
    paths = {}
    for folder in folders:
        for suffix in ENDINGS:
            paths |= {os.path.realpath(path): path for path in folder.glob(f"*{suffix}")}
    return [read_gate(path) for path in sorted(paths.values())]


def read_gate(path: Path) -> Gate:
    """Read a gate from a YAML file with the keys `alias` and `conditions`.

    Raises:
        CorruptFile: The file is not YAML.
        InputError: It is not a gate.
    """
    field = str(path)
    text = read_bytes(path, "gate", "Correct the file.")
    try:
        spec = yaml.load(text.decode("utf-8"), UniqueKeyLoader)
    except (ValueError, yaml.YAMLError, RecursionError, TypeError) as error:
        raise CorruptFile("gate", field, f"cannot be read as YAML ({error})", "Correct the file.") from error
    remedy = "Write `alias:` with the name or the pattern of an alias, and `conditions:` with a list."
    has_keys = isinstance(spec, Mapping) and {*spec} == {"alias", "conditions"}
    require(has_keys, "gate", field, "has other keys than `alias` and `conditions`", remedy)
    aliases = [spec["alias"]] if isinstance(spec["alias"], str) else spec["alias"]
    are_patterns = (
        isinstance(aliases, list)
        and bool(aliases)
        and all(isinstance(alias, str) and PATTERN.fullmatch(alias) for alias in aliases)
    )
    require(are_patterns, f"{field}: alias", aliases, "is no name or pattern of an alias, nor a list of them", remedy)
    is_list = isinstance(spec["conditions"], list) and bool(spec["conditions"])
    require(is_list, f"{field}: conditions", spec["conditions"], "is no list of conditions", EXAMPLE)
    conditions = tuple(
        parse_condition(condition, f"{field}: conditions[{i}]", path.parent)
        for i, condition in enumerate(spec["conditions"])
    )
    return Gate(path.stem, tuple(aliases), conditions, sha256(text).hexdigest())


def parse_condition(spec: Any, field: str, gate_folder: Path) -> Condition:
    """Parse one condition of a gate, such as `{receipt: gguf}`, to its text and its check.

    Args:
        spec: the condition as YAML holds it.
        field: name of the condition in error messages.
        gate_folder: folder of the gate's file, to which the path of a public key is relative.

    Raises:
        InputError: It is not a condition.
    """
    kinds = [kind for kind in KINDS if isinstance(spec, Mapping) and kind in spec]
    require(len(kinds) == 1, field, spec, f"is no condition: it needs exactly one of {', '.join(KINDS)}", EXAMPLE)
    kind = kinds[0]
    if kind == "figure":
        return parse_metric_condition(spec, field)
    text, value_kind, check = KINDS[kind]
    value = spec[kind]
    is_value = value == value_kind if isinstance(value_kind, bool) else isinstance(value, str) and bool(value)
    meaning = str(value_kind).lower() if isinstance(value_kind, bool) else value_kind
    require({*spec} == {kind} and is_value, field, dict(spec), "is no such condition", f"Write {{{kind}: {meaning}}}.")
    if kind == "signature":
        path = gate_folder / parse_user_path(value, field)
        remedy = "The path of a public key counts from the folder of its gate."
        require(path.is_file(), f"{field}.signature", value, f"is no file in {gate_folder}", remedy)
        return Condition(text.format(path.name), bind_value(check, PublicKeyFile(path, f"{field}.signature")))
    return Condition(text.format(value), bind_value(check, value))


def bind_value(check: Callable[[Subject, Any], Outcome], value: object) -> ConditionCheck:
    """Return a check that takes only an artifact, and calls `check` with the artifact and `value`."""

    def check_condition(subject: Subject) -> Outcome:
        return check(subject, value)

    return check_condition


def parse_metric_condition(spec: Mapping[str, Any], field: str) -> Condition:
    """Parse a condition that bounds a metric, such as `{figure: kl, at_most: 20}`, to its text and its check.

    `at_least`, `at_most` or both are required; `proxy` and `collapsed` are optional.

    Raises:
        InputError: It is not such a condition, or a bound is not a finite number.
    """
    limits = {key: spec[key] for key in ("at_least", "at_most") if key in spec}
    collapsed = spec.get("collapsed", False)
    is_valid = (
        bool(limits)
        and {*spec} <= {"figure", "proxy", "collapsed", *limits}
        and isinstance(spec["figure"], str)
        and isinstance(spec.get("proxy", False), bool)
        and (isinstance(collapsed, bool) or collapsed == "measured")
    )
    require(is_valid, field, dict(spec), "is no bound of a figure", EXAMPLE)
    for value in limits.values():
        is_finite = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        require(is_finite, field, dict(spec), f"has a bound that is no number: {value!r}", EXAMPLE)
    text = " and ".join(f"{key.replace('_', ' ')} {value}" for key, value in limits.items())
    note = ", collapse measured" if collapsed == "measured" else ""
    bounds = limits.get("at_least", -math.inf), limits.get("at_most", math.inf)
    check = partial(
        check_metric_bounds,
        name=spec["figure"],
        bounds=bounds,
        allow_proxy=spec.get("proxy", False),
        collapsed=collapsed,
    )
    return Condition(f"{spec['figure']} {text}{note}", check)


def check_metric_bounds(
    subject: Subject, name: str, bounds: tuple[float, float], allow_proxy: bool, collapsed: bool | str
) -> Outcome:
    """Return whether a metric of an artifact, with its whole interval, lies within bounds, and the reason.

    Fails if the metric is missing or was altered, is by a proxy judge, or is of a collapsed policy, unless allowed.

    Args:
        name: name of the metric.
        bounds: smallest and largest allowed value; infinite for no bound.
        allow_proxy: accept a metric by the proxy judge that the artifact was trained against.
        collapsed: True accepts metrics of a policy that collapsed; `measured` demands that an evaluation measured that
            it did not; False accepts metrics unless it is known to have collapsed.
    """
    if problem := verify_metrics(subject):
        return Outcome(False, f"altered: {problem}")
    key, figure = find_metric(subject.record, name)
    if figure is None or get_number(figure) is None:
        command = f"stage=eval artifact={subject.record['run']}"
        return Outcome(False, f"there is no such figure. An evaluation may have it: {command}")
    text = format_value(figure)
    if isinstance(figure, Mapping) and not (is_interval(figure) and is_bounded(figure)):
        return Outcome(False, f"{text} has no interval")
    judge = find_proxy_judge(subject, key, figure)
    if judge and not allow_proxy:
        return Outcome(False, f"{text} by {judge}, which it was trained against: evaluate it with another judge")
    verdict = get_value(subject.record, "metrics.collapse.verdict")
    reasons = get_value(subject.record, "metrics.collapse.reasons")
    reasons = "; ".join(map(str, reasons)) if isinstance(reasons, list) else ""
    if verdict == "collapsed" and collapsed is not True:
        return Outcome(False, f"{text} of a policy that collapsed: {reasons}")
    if verdict != "varied" and collapsed == "measured":
        return Outcome(
            False, f"{text}; whether the policy collapsed is not measured: {reasons or 'no evaluation measured it'}"
        )
    unmeasured = "; whether the policy collapsed is not measured" if verdict == "not measured" else ""
    low, high = (figure["low"], figure["high"]) if isinstance(figure, Mapping) else (figure, figure)
    return Outcome(bounds[0] <= low and high <= bounds[1], f"{text}{unmeasured}")


def find_metric(record: Record, name: str) -> tuple[str, Any]:
    """Return the key and value of a metric in a record, with its interval if it has one, or (name, None) if it is
    missing."""
    name = name.removesuffix(".value")  # which would leave out the interval
    keys = (f"metrics.{name}_interval", f"metrics.{name}", f"{name}_interval", name)
    for key in keys:
        if (value := get_value(record, key)) is not None:
            return key, value
    return name, None


def find_proxy_judge(subject: Subject, key: str, figure: Any) -> str:
    """Return the name of the judge that measured a metric if the artifact was trained against this judge, otherwise an
    empty text."""
    evaluation = subject.evaluation
    if evaluation is None or get_value(evaluation, "metrics.judge_is") != "proxy":
        return ""
    is_measured = get_value(evaluation, key) == figure or (key == "score" and get_value(evaluation, "score") == figure)
    return str(get_value(evaluation, "metrics.judge")) if is_measured else ""


def check_receipt(subject: Subject, export_kind: str) -> Outcome:
    """Return whether an artifact has an export of a kind, or is one, with unchanged files and no failed check, and the
    reason."""
    problem = f"there is no such export: stage=export export={export_kind} artifact={subject.record['run']}"
    own_export = [subject.record] if subject.record["stage"] == "export" else []
    for export in (*own_export, *subject.exports):
        if get_value(export, "config.export.name") == export_kind and export["status"] == "done":
            outcome = check_export_receipt(subject, export)
            if outcome.passed:
                return outcome
            problem = outcome.reason
    return Outcome(False, problem)


def check_export_receipt(subject: Subject, export: Record) -> Outcome:
    """Return whether an export's files match its receipt, which names this artifact and has no failed check, and the
    reason.

    At least one check has to have passed. The receipt may name another artifact if the export itself is checked.
    """
    folder = subject.root / export["folder"]
    try:
        receipt = read_verified_receipt(folder / "artifact")
        verify_outputs(folder, read_manifest(folder).outputs)  # they include the receipt itself
    except InputError as error:
        return Outcome(False, f"{export['run']}: {error}")
    if export is not subject.record and receipt.get("artifact") != subject.digest:
        return Outcome(False, f"{export['run']} has the receipt of another artifact")
    verdicts = [row.get("verdict") for row in receipt["rows"]]
    missed = [row.get("name") for row in receipt["rows"] if row.get("verdict") not in (PASS, "reported", "not checked")]
    if missed:
        return Outcome(False, f"{export['run']} missed a bound: {', '.join(map(str, missed))}")
    reason = f"{export['run']}: {verdicts.count(PASS)} of {len(verdicts)} checks passed, none missed"
    return Outcome(PASS in verdicts, reason)


def check_unseen_prompts(subject: Subject, _value: bool) -> Outcome:
    """Return whether an artifact was evaluated on prompts of which none was in its training data, and the reason."""
    evaluation = subject.evaluation
    if evaluation is None:
        return Outcome(False, f"no run evaluated it: stage=eval artifact={subject.record['run']}")
    if problem := verify_metrics(subject):
        return Outcome(False, f"altered: {problem}")
    if seen_count := get_value(evaluation, "metrics.seen"):
        return Outcome(False, f"training saw {seen_count:,} of the prompts of {evaluation['run']}")
    if get_value(evaluation, "metrics.seen_unknown") != 0:
        return Outcome(False, f"it is unknown for prompts of {evaluation['run']} whether training saw them")
    return Outcome(True, f"{evaluation['run']}: training saw none of its prompts")


def check_signature(subject: Subject, key_file: PublicKeyFile) -> Outcome:
    """Return whether an artifact, or one of its exports, has a valid signature by the given public key, and the reason.

    Raises:
        InputError: The public key cannot be read.
    """
    run = subject.record["run"]
    problem = f"neither it nor an export of it is signed: stage=export export.sign=KEY artifact={run}"
    # An unreadable key is an error of the gate, not a missed condition.
    key = load_public_key(str(key_file.path), key_file.field)
    for record in (subject.record, *subject.exports):
        published = subject.root / record["folder"] / "artifact"
        outcomes = [
            check_folder_signature(subject, record["run"], folder, key) for folder in list_signed_folders(published)
        ]
        if outcomes and all(outcome.passed for outcome in outcomes):
            return outcomes[0]
        problem = next((outcome.reason for outcome in outcomes if not outcome.passed), problem)
    return Outcome(False, problem)


def list_signed_folders(published: Path) -> list[Path]:
    """Return the folders that need a signature in a run's `artifact` folder: itself, or else one subfolder per kind of
    export.

    Returns no folder if the unsigned `artifact` folder holds anything but folders.

    A signed copy inside it proves nothing about the files beside that copy.
    """
    inside = sorted(published.glob("*"))
    if (published / SIGNATURE).is_file():
        return [published]
    return [] if any(not path.is_dir() for path in inside) else inside


def check_folder_signature(subject: Subject, run: str, folder: Path, key: PublicKey) -> Outcome:
    """Return whether a folder is signed with a key and holds the artifact or an export of it, and the reason.

    Args:
        run: `stage:name` of the run that published the folder.
    """
    try:
        verify_signature(folder, key, "artifact", run)
        receipt = folder / RECEIPT
        exported = read_json_object(receipt, RECEIPT, "Export it again.").get("artifact") if receipt.is_file() else None
    except InputError as error:
        return Outcome(False, str(error))
    text = f"{run} is signed by {key.fingerprint[:12]}"
    if subject.digest not in (exported, compute_published_digest(folder)):
        return Outcome(False, f"{text}, and is another artifact")
    return Outcome(True, text)


def check_verdict(subject: Subject, verdict_gate: str) -> Outcome:
    """Return whether the verdict files with a gate name hold `pass` for exactly this artifact, and the reason."""
    if problem := verify_metrics(subject):
        return Outcome(False, f"altered: {problem}")
    return decide_verdict(subject.root, verdict_gate, subject.digest)


def check_not_stale(subject: Subject, _value: bool) -> Outcome:
    """Return a failed outcome if a run or one of its ancestors is stale (read data that was deleted later), else a
    passed one.

    Fails as well if one of these runs no longer exists.
    """
    for record in subject.upstream:
        if stale := read_stale_mark(subject.root / record["folder"]):
            command = f": {stale.again}" if stale.again else ""
            return Outcome(False, f"{record['run']} is stale since {stale.since[:10]}, {stale.because}{command}")
    if subject.gone:
        return Outcome(False, f"{', '.join(subject.gone)} no longer exists, so it is unknown whether it is stale")
    return Outcome(True, f"none of {len(subject.upstream):,} runs is")


KINDS: Mapping[str, tuple[str, str | bool, Callable[..., Outcome]]] = {
    "figure": ("", "KEY", check_metric_bounds),
    "receipt": ("receipt of export={}", "adapter|merged|gguf", check_receipt),
    "unseen": ("evaluated on prompts that it was not trained on", True, check_unseen_prompts),
    "signature": ("signature by {}", "PUBLIC_KEY", check_signature),
    "verdict": ("verdict {}", "NAME", check_verdict),
    "stale": ("none of the runs that it was made from is stale", False, check_not_stale),
}
"""Key of a condition in a gate file → (text of the condition, allowed value or an example, check function)."""


SCHEMA = 1
FOLDER = "verdicts"
PASS = "pass"
REMEDY = "See docs/registry.md for what a verdict file holds."
AGAIN = "Evaluate again with stage=eval resume=never, or write the file anew: docs/registry.md says what it holds."


@dataclass(frozen=True, slots=True)
class Verdict:
    """The content of a verdict file, which holds an evaluator's result for an artifact.

    Attributes:
        source: run that holds the file, or the file's name.
        run: manifest of that run; None for a file beside the runs.
        condition: what the gate asked, as text; empty if the file does not say.
        plan, looks: of a gate that is evaluated again as data arrive, see `align.evals.suite.gates`.
    """

    gate: str
    verdict: str
    figure: Any
    inputs: dict[str, str]
    source: str
    run: Manifest | None
    condition: str = ""
    plan: Any = None
    looks: Any = ()


def read_verdict(path: Path, source: str, run: Manifest | None) -> Verdict:
    """Read a verdict from a JSON file, and store `source` and `run` with it as its origin.

    Raises:
        CorruptFile: It is not a verdict file.
        InputError: Another version wrote it.
    """
    values = read_json_object(path, "verdict", REMEDY)
    require_schema_version(values.get("schema_version"), SCHEMA, "verdict", str(path), AGAIN)
    inputs = values.get("inputs")
    has_texts = isinstance(values.get("gate"), str) and isinstance(values.get("verdict"), str)
    if not has_texts or not isinstance(inputs, dict) or not all(isinstance(value, str) for value in inputs.values()):
        raise CorruptFile("verdict", str(path), "is no verdict file", REMEDY)
    return Verdict(
        values["gate"],
        values["verdict"],
        values.get("figure"),
        inputs,
        source,
        run,
        str(values.get("asked", "")),
        values.get("plan"),
        values.get("looks", ()),
    )


def iter_verdicts(root: Path) -> Iterator[Verdict]:
    """Yield all verdicts under the folder of all runs: from the artifacts of finished runs, then from its own
    `verdicts/`.

    Raises:
        CorruptFile, InputError: As `read_verdict`.
    """
    for path in sorted(root.glob(f"*/*/artifact/{FOLDER}/*.json")):
        folder = path.parents[2]
        manifest = try_read_manifest(folder)
        if manifest is not None and manifest.done:
            name = path.relative_to(folder).as_posix()
            if file_digest(path) != manifest.outputs.get(name):
                problem = "is not the file that the run published"
                raise CorruptFile("verdict", str(path), problem, "Restore it, or evaluate again with resume=never.")
            yield read_verdict(path, manifest.ref, manifest)
    for path in sorted((root / FOLDER).glob("*.json")):
        yield read_verdict(path, path.name, None)


def decide_verdict(root: Path, gate: str, digest: str) -> Outcome:
    """Return whether the verdict files with a gate name hold `pass` for the artifact with a digest, and the deciding
    verdict.

    Of runs, the newest counts. Files beside the runs have no order, so that each counts. The reason is the deciding
    verdict as text.

    Args:
        root: the folder of all runs.
        digest: digest of the artifact.
    """
    try:
        all_verdicts = [verdict for verdict in iter_verdicts(root) if verdict.gate == gate]
    except InputError as error:
        return Outcome(False, str(error))
    matching = [verdict for verdict in all_verdicts if verdict.inputs.get("artifact") == digest]
    if not matching:
        note = f"; there are {len(all_verdicts)} on other artifacts" if all_verdicts else ""
        return Outcome(False, f"there is none on this artifact ({digest[:12]}){note}")
    newest = max((verdict.run.publication for verdict in matching if verdict.run), default=None)
    current = [verdict for verdict in matching if verdict.run is None or verdict.run.publication == newest]
    worst = next((verdict for verdict in current if verdict.verdict != PASS), current[0])
    figure = "" if worst.figure is None else f", {format_value(worst.figure)}"
    return Outcome(worst.verdict == PASS, f"{worst.source}: {worst.verdict}{figure}")
