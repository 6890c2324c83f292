"""Gates: their conditions, and the artifacts that pass them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from signing_keys import KeyPair, write_key_pair
from synthetic_runs import build_interval, compute_artifact_digest, publish_file, write_run_folder

from align.core.errors import InputError
from align.registry.gates import Finding, Subject, decide_verdict, read_gate, read_gates
from align.registry.index import query_index
from align.registry.promotion import make_subject
from align.run.alias_log import AliasTarget
from align.run.digests import file_digest
from align.run.lineage import find_suite_collapse
from align.run.manifest import Input, read_manifest
from align.run.receipt import write_receipt
from align.run.signing import load_private_key, sign_folder
from align.run.weights import adapter_digest

FIGURES: dict[str, Any] = {
    "win_rate": build_interval(0.81, 0.75, 0.87),
    "kl": 4.0,
    "kl_interval": build_interval(4.0, 2.0, 6.0),
}


def write_gate(root: Path, conditions: str, alias: str = "production") -> Path:
    path = root / "gate.yaml"
    path.write_text(f"alias: {alias}\nconditions:\n{conditions}\n")
    return path


def build_subject(root: Path, ref: str = "ppo:a") -> Subject:
    return query_index(root, lambda index: make_subject(index, root, AliasTarget(ref, compute_artifact_digest(ref))))


def evaluate_condition(root: Path, condition: str, ref: str = "ppo:a") -> Finding:
    (finding,) = read_gate(write_gate(root, f"  - {condition}")).check_artifact(build_subject(root, ref))
    return finding


def write_evaluated_run(root: Path, **metrics: Any) -> None:
    write_run_folder(root, "ppo:a", metrics={"last_score": 0.5})
    write_run_folder(
        root,
        "eval:e",
        {"artifact": "ppo:a"},
        metrics={**FIGURES, "judge_is": "gold", "seen_unknown": 0, **metrics},
        day=1,
    )


@pytest.mark.parametrize(
    ("condition", "passed", "says"),
    [
        ("{figure: win_rate, at_least: 0.75}", True, "0.81 [0.75, 0.87]"),
        ("{figure: win_rate, at_least: 0.7501}", False, "0.81 [0.75, 0.87]"),
        ("{figure: win_rate, at_least: 0.7, at_most: 0.86}", False, "0.81"),
        ("{figure: kl, at_most: 6}", True, "4 [2, 6]"),
        ("{figure: kl, at_most: 5.9}", False, "4 [2, 6]"),
        ("{figure: last_score, at_least: 0.5}", True, "0.5"),
        ("{figure: cost.minutes, at_most: 30}", True, "30"),
        ("{figure: accuracy, at_least: 0.5}", False, "An evaluation may have it: stage=eval artifact=ppo:a"),
        ("{figure: judge_is, at_least: 0.5}", False, "there is no such figure"),
        ("{unseen: true}", True, "eval:e: training saw none of its prompts"),
    ],
)
def test_conditions_on_figures(tmp_path: Path, condition: str, passed: bool, says: str) -> None:
    """The worse end of an interval decides."""
    write_evaluated_run(tmp_path)
    finding = evaluate_condition(tmp_path, condition)
    assert (finding.passed, says in finding.said) == (passed, True), finding


def test_a_figure_by_its_value_alone_keeps_its_interval(tmp_path: Path) -> None:
    """`score.value` and `metrics.win_rate.value` are figures with intervals too."""
    write_evaluated_run(tmp_path)
    for name in ("score", "score.value", "metrics.win_rate.value", "win_rate.value"):
        assert evaluate_condition(tmp_path, f"{{figure: {name}, at_least: 0.75}}").passed
        assert not evaluate_condition(tmp_path, f"{{figure: {name}, at_least: 0.76}}").passed
    write_evaluated_run(tmp_path, win_rate={"value": 0.99})
    assert not evaluate_condition(tmp_path, "{figure: win_rate, at_least: 0.1}").passed


def test_what_a_proxy_judged(tmp_path: Path) -> None:
    """The reward model that a policy was trained against is not accepted as its judge, unless `proxy: true` is set."""
    write_evaluated_run(tmp_path, judge_is="proxy", judge="reward:r")
    for name in ("win_rate", "score", "kl"):
        finding = evaluate_condition(tmp_path, f"{{figure: {name}, at_least: 0.1, at_most: 99}}")
        assert not finding.passed
        assert "by reward:r, which it was trained against" in finding.said
    assert evaluate_condition(tmp_path, "{figure: win_rate, at_least: 0.7, proxy: true}").passed
    assert evaluate_condition(tmp_path, "{figure: last_score, at_least: 0.1}").passed  # a figure of the run itself
    write_run_folder(tmp_path, "eval:gold", {"artifact": "ppo:a"}, metrics={**FIGURES, "judge_is": "gold"}, day=2)
    assert evaluate_condition(tmp_path, "{figure: win_rate, at_least: 0.7}").passed


def test_a_figure_whose_interval_nobody_knows(tmp_path: Path) -> None:
    write_evaluated_run(tmp_path, win_rate={"value": 1.0, "low": None, "high": None, "n": 1})
    finding = evaluate_condition(tmp_path, "{figure: win_rate, at_least: 0.1}")
    assert (finding.passed, finding.said) == (False, "1 (no interval) (n=1, fewer than 20) has no interval")


@pytest.mark.parametrize(
    ("metrics", "says"),
    [
        ({"seen": 3}, "training saw 3 of the prompts of eval:e"),
        ({"seen_unknown": 1}, "it is unknown for prompts of"),
        ({"seen_unknown": None}, "it is unknown for prompts of"),
    ],
    ids=["some", "unknown", "not said"],
)
def test_an_evaluation_that_training_saw(tmp_path: Path, metrics: dict[str, Any], says: str) -> None:
    write_evaluated_run(tmp_path, **metrics)
    finding = evaluate_condition(tmp_path, "{unseen: true}")
    assert not finding.passed
    assert says in finding.said


def test_nothing_evaluated_it(tmp_path: Path) -> None:
    write_run_folder(tmp_path, "ppo:a")
    finding = evaluate_condition(tmp_path, "{unseen: true}")
    assert (finding.passed, finding.said) == (False, "no run evaluated it: stage=eval artifact=ppo:a")


def write_export(root: Path, *verdicts: str, name: str = "x", kind: str = "gguf", status: str = "done") -> Path:
    config = {"stage": {"name": "export"}, "data": {}, "method": {"name": "qlora"}, "export": {"name": kind}}
    folder = (
        write_run_folder(root, f"export:{name}", {"artifact": "ppo:a"}, config=config, status=status, day=2)
        / "artifact"
    )
    (folder / "model.gguf").write_bytes(b"weights")
    rows = [{"name": f"check-{i}", "verdict": verdict} for i, verdict in enumerate(verdicts)]
    write_receipt(folder, rows, [[1]], {"artifact": compute_artifact_digest("ppo:a")})
    outputs = {f"artifact/{path.name}": file_digest(path) for path in folder.iterdir()}
    write_run_folder(
        root, f"export:{name}", {"artifact": "ppo:a"}, config=config, status=status, day=2, outputs=outputs
    )
    return folder


@pytest.mark.parametrize(
    ("verdicts", "passed", "says"),
    [
        (["pass", "reported", "not checked"], True, "export:x: 1 of 3 checks passed, none missed"),
        (["pass", "fail"], False, "export:x missed a bound: check-1"),
        (["pass", "accepted"], False, "export:x missed a bound: check-1"),
        (["reported"], False, "export:x: 0 of 1 checks passed"),
        ([], False, "export:x: 0 of 0 checks passed"),
    ],
    ids=["passed", "failed", "waved through", "nothing was bound", "nothing was checked"],
)
def test_a_receipt(tmp_path: Path, verdicts: list[str], passed: bool, says: str) -> None:
    write_run_folder(tmp_path, "ppo:a")
    write_export(tmp_path, *verdicts)
    finding = evaluate_condition(tmp_path, "{receipt: gguf}")
    assert (finding.passed, says in finding.said) == (passed, True), finding


def test_a_receipt_of_other_files(tmp_path: Path) -> None:
    write_run_folder(tmp_path, "ppo:a")
    (write_export(tmp_path, "pass") / "model.gguf").write_bytes(b"others")
    finding = evaluate_condition(tmp_path, "{receipt: gguf}")
    assert not finding.passed
    assert "is not the file that the receipt lists" in finding.said


def test_a_receipt_that_somebody_wrote(tmp_path: Path) -> None:
    """A forged receipt is detected by its hash in the export's manifest."""
    write_run_folder(tmp_path, "ppo:a")
    folder = write_export(tmp_path, "fail")
    text = (folder / "receipt.json").read_text()
    (folder / "receipt.json").write_text(text.replace('"fail"', '"pass"'))
    finding = evaluate_condition(tmp_path, "{receipt: gguf}")
    assert not finding.passed
    assert "receipt.json: is not the file that was published" in finding.said


def test_a_receipt_of_another_artifact(tmp_path: Path) -> None:
    write_run_folder(tmp_path, "ppo:a")
    folder = write_export(tmp_path, "pass")
    write_receipt(folder, [{"name": "c", "verdict": "pass"}], [[1]], {"artifact": compute_artifact_digest("ppo:b")})
    manifest = json.loads((folder.parent / "manifest.json").read_text())
    manifest["outputs"] = {f"artifact/{path.name}": file_digest(path) for path in folder.iterdir()}
    (folder.parent / "manifest.json").write_text(json.dumps(manifest))
    assert evaluate_condition(tmp_path, "{receipt: gguf}").said == "export:x has the receipt of another artifact"


def test_a_receipt_of_another_kind_or_a_half_export(tmp_path: Path) -> None:
    write_run_folder(tmp_path, "ppo:a")
    write_export(tmp_path, "pass", kind="adapter")
    write_export(tmp_path, "pass", name="y", status="failed")
    finding = evaluate_condition(tmp_path, "{receipt: gguf}")
    assert (finding.passed, finding.said) == (False, "there is no such export: stage=export export=gguf artifact=ppo:a")
    assert evaluate_condition(tmp_path, "{receipt: adapter}").passed


def test_an_export_that_is_promoted_has_its_own_receipt(tmp_path: Path) -> None:
    """A server that requires signatures follows an alias of exports, so receipts count for exports too."""
    write_run_folder(tmp_path, "ppo:a")
    write_export(tmp_path, "pass", kind="merged")
    target = AliasTarget("export:x", "")

    def evaluate_export(condition: str) -> Finding:
        subject = query_index(tmp_path, lambda index: make_subject(index, tmp_path, target))
        return read_gate(write_gate(tmp_path, f"  - {condition}")).check_artifact(subject)[0]

    assert evaluate_export("{receipt: merged}").passed
    assert not evaluate_export("{receipt: gguf}").passed
    write_export(tmp_path, "fail", kind="merged")
    assert not evaluate_export("{receipt: merged}").passed


def test_one_good_export_is_enough(tmp_path: Path) -> None:
    write_run_folder(tmp_path, "ppo:a")
    write_export(tmp_path, "fail", name="a")
    write_export(tmp_path, "pass", name="b")
    assert evaluate_condition(tmp_path, "{receipt: gguf}").said.startswith("export:b")


def write_verdict(path: Path, verdict: str, ref: str = "ppo:a", gate: str = "safety", **more: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    inputs = {"artifact": compute_artifact_digest(ref)}
    path.write_text(json.dumps({"schema_version": 1, "gate": gate, "verdict": verdict, "inputs": inputs, **more}))
    if path.parents[1].name == "artifact":
        publish_file(path.parents[2], f"artifact/verdicts/{path.name}")


def test_verdicts(tmp_path: Path) -> None:
    """Only `pass` for this exact artifact counts. The newest run decides, and so does each file in `verdicts`."""
    write_evaluated_run(tmp_path)
    decide = lambda: decide_verdict(tmp_path, "safety", compute_artifact_digest("ppo:a"))  # noqa: E731
    assert decide() == (False, f"there is none on this artifact ({compute_artifact_digest('ppo:a')[:12]})")
    write_verdict(tmp_path / "verdicts" / "other.json", "pass", "ppo:b")
    assert decide()[1].endswith("; there are 1 on other artifacts")
    first = tmp_path / "eval" / "e" / "artifact" / "verdicts" / "safety.json"
    write_verdict(first, "fail", figure=build_interval(0.5, 0.4, 0.6))
    assert decide() == (False, "eval:e: fail, 0.5 [0.4, 0.6] (n=200)")
    write_run_folder(tmp_path, "eval:later", {"artifact": "ppo:a"}, day=5)
    later = tmp_path / "eval" / "later" / "artifact" / "verdicts" / "safety.json"
    write_verdict(later, "pass")
    assert decide() == (True, "eval:later: pass")
    for word in ("PASS", "passed", "unknown", ""):
        write_verdict(tmp_path / "verdicts" / "mine.json", word)
        assert decide() == (False, f"mine.json: {word}")
    write_verdict(tmp_path / "verdicts" / "mine.json", "pass", gate="another")
    assert decide() == (True, "eval:later: pass")
    write_run_folder(tmp_path, "eval:later", {"artifact": "ppo:a"}, day=5, status="interrupted")
    assert decide()[0] is False  # the verdict of an unfinished run does not count
    assert evaluate_condition(tmp_path, "{verdict: safety}").said.startswith("eval:e: fail")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "is not JSON"),
        ("[]", "not an object"),
        ('{"schema_version": 9}', "this version of align reads 1"),
        ('{"schema_version": 1, "gate": "safety", "verdict": "pass"}', "is no verdict file"),
        ('{"schema_version": 1, "gate": "safety", "verdict": true, "inputs": {}}', "is no verdict file"),
        ('{"schema_version": 1, "gate": "safety", "verdict": "pass", "inputs": {"artifact": 3}}', "is no verdict file"),
    ],
)
def test_a_verdict_that_cannot_be_read_is_no_pass(tmp_path: Path, text: str, says: str) -> None:
    write_evaluated_run(tmp_path)
    write_verdict(tmp_path / "verdicts" / "good.json", "pass")
    (tmp_path / "verdicts" / "odd.json").write_text(text)
    passed, reason = decide_verdict(tmp_path, "safety", compute_artifact_digest("ppo:a"))
    assert not passed
    assert says in reason


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("alias: [", "cannot be read as YAML"),
        ("3", "has other keys than"),
        ("alias: x", "has other keys than"),
        ("alias: x\nconditions: []\nmore: 1", "has other keys than"),
        ("alias: x\nconditions: []", "is no list of conditions"),
        ("alias: []\nconditions: [{unseen: true}]", "is no name or pattern of an alias"),
        ("alias: 3\nconditions: [{unseen: true}]", "is no name or pattern of an alias"),
        ("alias: x\nconditions: [unseen]", "is no condition"),
        ("alias: x\nconditions: [{signed: k}]", "is no condition"),
        ("alias: x\nconditions: [{unseen: true, verdict: y}]", "is no condition"),
        ("alias: x\nconditions: [{unseen: false}]", "is no such condition"),
        ("alias: x\nconditions: [{figure: kl}]", "is no bound of a figure"),
        ("alias: x\nconditions: [{figure: kl, at_lest: 3}]", "is no bound of a figure"),
        ("alias: x\nconditions: [{figure: 3, at_least: 3}]", "is no bound of a figure"),
        ("alias: x\nconditions: [{figure: kl, at_least: high}]", "has a bound that is no number: 'high'"),
        ("alias: x\nconditions: [{figure: kl, at_least: .nan}]", "has a bound that is no number: nan"),
        ("alias: x\nconditions: [{figure: kl, at_least: true}]", "has a bound that is no number: True"),
        ("alias: x\nconditions: [{receipt: [gguf]}]", "is no such condition"),
        ("alias: x\nconditions: [{verdict: ''}]", "is no such condition"),
        ("\x00", "cannot be read as YAML"),
        ("alias: x\nconditions: [{unseen: true}]\nconditions: [{unseen: true}]", "'conditions' is given twice"),
        ("alias: x\nconditions: [{figure: kl, at_most: 3, at_most: 9}]", "'at_most' is given twice"),
        ("alias: '@x'\nconditions: [{unseen: true}]", "is no name or pattern of an alias"),
        ("alias: x\nconditions: [{figure: kl, at_most: 3, proxy: 1}]", "is no bound of a figure"),
    ],
)
def test_a_gate_that_says_nothing_is_refused(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "gate.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=says) as raised:
        read_gate(path)
    assert str(path) in str(raised.value)


def test_which_aliases_a_gate_binds(tmp_path: Path) -> None:
    gate = read_gate(write_gate(tmp_path, "  - {unseen: true}", "[production, 'eu-*']"))
    assert [gate.binds(alias) for alias in ("production", "eu-west", "eu", "productions", "Production")] == [
        True,
        True,
        False,
        False,
        False,
    ]
    assert read_gates([tmp_path / "nowhere"]) == []
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "more.yml").write_text((tmp_path / "gate.yaml").read_text())
    assert [gate.name for gate in read_gates([tmp_path, tmp_path / "other", tmp_path])] == ["gate", "more"]
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(InputError, match=r"is a pipe \(FIFO\), not a file"):
        read_gates([tmp_path])


def write_signed_export(root: Path, ref: str, source_ref: str, keys: KeyPair) -> Path:
    """Write a signed export with a receipt that names the exported artifact. Returns its folder."""
    config = {"stage": {"name": "export"}, "data": {}, "method": {"name": "qlora"}, "export": {"name": "adapter"}}
    folder = write_run_folder(root, ref, {"artifact": source_ref}, config=config, day=2) / "artifact"
    (folder / "weights").write_text("w")
    write_receipt(
        folder, [{"name": "transformers", "verdict": "pass"}], [[1]], {"artifact": compute_artifact_digest(source_ref)}
    )
    sign_folder(folder, load_private_key(str(keys.private), "export.sign"))
    return folder


def test_a_signature(tmp_path: Path) -> None:
    """The export must be of this artifact by its receipt, signed with the key beside the gate, and unchanged since."""
    keys = write_key_pair(tmp_path, "release")
    other_keys = write_key_pair(tmp_path, "other")
    condition = "{signature: release.pub}"
    write_run_folder(tmp_path, "ppo:a")
    write_run_folder(tmp_path, "ppo:b")
    finding = evaluate_condition(tmp_path, condition)
    assert (finding.passed, finding.condition) == (False, "signature by release.pub")
    assert "stage=export export.sign=KEY artifact=ppo:a" in finding.said
    folder = write_signed_export(tmp_path, "export:x", "ppo:a", keys)
    assert evaluate_condition(tmp_path, condition).said == f"export:x is signed by {file_digest(keys.public)[:12]}"
    assert not evaluate_condition(tmp_path, "{signature: other.pub}").passed
    assert not evaluate_condition(tmp_path, condition, "ppo:b").passed
    other_export = write_signed_export(tmp_path, "export:y", "ppo:b", other_keys)
    assert "is by another key" in evaluate_condition(tmp_path, condition, "ppo:b").said
    # A receipt counts only if it is signed, and only for the artifact that it names.
    shutil.rmtree(other_export)
    shutil.copytree(folder, other_export)
    assert "and is another artifact" in evaluate_condition(tmp_path, condition, "ppo:b").said
    (folder / "weights").write_text("x")
    assert "weights is not the file that was signed" in evaluate_condition(tmp_path, condition).said


def test_a_signature_of_the_artifact_itself(tmp_path: Path) -> None:
    """The signed folder may be the run's own, or one of several kinds of exports."""
    keys = write_key_pair(tmp_path, "release")
    folder = write_run_folder(tmp_path, "ppo:a") / "artifact"
    write_run_folder(tmp_path, "ppo:a", digest=adapter_digest(folder))
    target = AliasTarget("ppo:a", adapter_digest(folder))

    def passes_gate() -> bool:
        conditions = read_gate(write_gate(tmp_path, "  - {signature: release.pub}"))
        (finding,) = conditions.check_artifact(
            query_index(tmp_path, lambda index: make_subject(index, tmp_path, target))
        )
        return finding.passed

    assert not passes_gate()
    sign_folder(folder, load_private_key(str(keys.private), "export.sign"))
    assert passes_gate()
    (folder / "more").write_text("")
    assert not passes_gate()


def test_a_signed_copy_inside_vouches_for_nothing_beside_it(tmp_path: Path) -> None:
    write_run_folder(tmp_path, "ppo:a")
    keys = write_key_pair(tmp_path)
    folder = write_signed_export(tmp_path, "export:x", "ppo:a", keys)
    shutil.copytree(folder, tmp_path / "copy")
    (folder / "model.sig").unlink()
    shutil.copytree(tmp_path / "copy", folder / "good")
    shutil.copy(keys.public, tmp_path / "release.pub")
    finding = evaluate_condition(tmp_path, "{signature: release.pub}", "export:x")
    assert not finding.passed


def test_the_key_of_a_gate(tmp_path: Path) -> None:
    """The key is a file beside the gate. A missing or unusable one is refused with a reason."""
    write_evaluated_run(tmp_path)
    for condition in ("{signature: none.pub}", "{signature: 1}", "{signature: release.pub, figure: kl}"):
        with pytest.raises(InputError, match=r"conditions\[0\]"):
            read_gate(write_gate(tmp_path, f"  - {condition}"))
    write_run_folder(tmp_path, "ppo:a")
    write_signed_export(tmp_path, "export:x", "ppo:a", keys := write_key_pair(tmp_path))
    shutil.copy(keys.private, tmp_path / "key.pub")
    # An error of the gate cannot be overridden.
    with pytest.raises(InputError, match=r"conditions\[0\]\.signature.*is a private key"):
        evaluate_condition(tmp_path, "{signature: key.pub}")


def build_collapse(verdict: str, *reasons: str) -> dict[str, Any]:
    return {"verdict": verdict, "reasons": [*reasons]}


@pytest.mark.parametrize(
    ("collapse_", "exempt", "passed", "says"),
    [
        (None, "", True, "0.81 [0.75, 0.87] (n=200)"),
        (None, ", collapsed: measured", False, "is not measured: no evaluation measured it"),
        (build_collapse("varied"), "", True, "0.81 [0.75, 0.87] (n=200)"),
        (build_collapse("varied"), ", collapsed: measured", True, "0.81 [0.75, 0.87] (n=200)"),
        (build_collapse("not measured", "few"), "", True, "; whether the policy collapsed is not measured"),
        (build_collapse("not measured", "few"), ", collapsed: measured", False, "is not measured: few"),
        (build_collapse("collapsed", "alike"), "", False, "of a policy that collapsed: alike"),
        (build_collapse("collapsed", "alike"), ", collapsed: measured", False, "of a policy that collapsed: alike"),
        (build_collapse("collapsed", "alike"), ", collapsed: true", True, "0.81 [0.75, 0.87] (n=200)"),
    ],
)
def test_what_a_condition_asks_of_a_collapse(tmp_path: Path, collapse_: Any, exempt: str, passed: bool, says: str):
    write_evaluated_run(tmp_path, **({"collapse": collapse_} if collapse_ else {}))
    finding = evaluate_condition(tmp_path, f"{{figure: win_rate, at_least: 0.7{exempt}}}")
    assert (finding.passed, finding.said.endswith(says)) == (passed, True), finding.said
    assert finding.condition.endswith(", collapse measured") is ("measured" in exempt)


def test_an_evaluation_of_several_systems_says_that_a_policy_collapsed(tmp_path: Path):
    def write_suite(name: str, day: int, verdict: dict[str, Any]) -> None:
        systems = {"new": verdict, "old": build_collapse("varied")}
        inputs = {"systems.new": "ppo:a", "systems.old": "sft:s"}
        write_run_folder(
            tmp_path, f"eval:{name}", inputs, metrics={"collapse": {**verdict, "systems": systems}}, day=day
        )

    write_evaluated_run(tmp_path, collapse=build_collapse("not measured", "few"))
    condition = "{figure: win_rate, at_least: 0.7, collapsed: measured}"
    assert not evaluate_condition(tmp_path, condition).passed
    write_suite("varied", 2, build_collapse("varied"))
    assert evaluate_condition(tmp_path, condition).passed
    write_suite("collapsed", 3, build_collapse("collapsed", "on chat alike"))
    assert evaluate_condition(tmp_path, condition).said.endswith("of a policy that collapsed: on chat alike")
    write_suite("unmeasured", 4, build_collapse("not measured", "few"))
    assert evaluate_condition(tmp_path, condition).said.endswith("of a policy that collapsed: on chat alike")
    write_suite("newest", 5, build_collapse("varied"))
    assert evaluate_condition(tmp_path, condition).passed
    assert find_suite_collapse(read_subject_input(tmp_path), tmp_path) == build_collapse("varied")


def read_subject_input(root: Path) -> Input:
    return read_manifest(root / "eval" / "e").inputs["artifact"]


@pytest.mark.parametrize("word", ["maybe", "1", "[true]"])
def test_a_word_that_says_nothing_of_a_collapse_is_refused(tmp_path: Path, word: str):
    with pytest.raises(InputError, match="is no bound of a figure"):
        read_gate(write_gate(tmp_path, f"  - {{figure: kl, at_most: 1, collapsed: {word}}}"))
