"""Gates: what they read, and whom they let pass."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from portfolio import digest_of, interval, made, publish_file
from signing_keys import Pair, pair

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

FIGURES: dict[str, Any] = {"win_rate": interval(0.81, 0.75, 0.87), "kl": 4.0, "kl_interval": interval(4.0, 2.0, 6.0)}


def gate(root: Path, conditions: str, alias: str = "production") -> Path:
    path = root / "gate.yaml"
    path.write_text(f"alias: {alias}\nconditions:\n{conditions}\n")
    return path


def subject(root: Path, ref: str = "ppo:a") -> Subject:
    return query_index(root, lambda index: make_subject(index, root, AliasTarget(ref, digest_of(ref))))


def finding(root: Path, condition: str, ref: str = "ppo:a") -> Finding:
    (found,) = read_gate(gate(root, f"  - {condition}")).findings(subject(root, ref))
    return found


def evaluated(root: Path, **metrics: Any) -> None:
    made(root, "ppo:a", metrics={"last_score": 0.5})
    made(
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
)  # fmt: skip
def test_conditions_on_figures(tmp_path: Path, condition: str, passed: bool, says: str) -> None:
    """Of an interval, the end that is worse decides."""
    evaluated(tmp_path)
    found = finding(tmp_path, condition)
    assert (found.passed, says in found.said) == (passed, True), found


def test_a_figure_by_its_value_alone_keeps_its_interval(tmp_path: Path) -> None:
    """`score.value` and `metrics.win_rate.value` are figures with intervals too."""
    evaluated(tmp_path)
    for name in ("score", "score.value", "metrics.win_rate.value", "win_rate.value"):
        assert finding(tmp_path, f"{{figure: {name}, at_least: 0.75}}").passed
        assert not finding(tmp_path, f"{{figure: {name}, at_least: 0.76}}").passed
    evaluated(tmp_path, win_rate={"value": 0.99})
    assert not finding(tmp_path, "{figure: win_rate, at_least: 0.1}").passed


def test_what_a_proxy_judged(tmp_path: Path) -> None:
    """The reward that a policy was trained against is no judge of it, unless somebody says so."""
    evaluated(tmp_path, judge_is="proxy", judge="reward:r")
    for name in ("win_rate", "score", "kl"):
        found = finding(tmp_path, f"{{figure: {name}, at_least: 0.1, at_most: 99}}")
        assert not found.passed
        assert "by reward:r, which it was trained against" in found.said
    assert finding(tmp_path, "{figure: win_rate, at_least: 0.7, proxy: true}").passed
    assert finding(tmp_path, "{figure: last_score, at_least: 0.1}").passed  # a figure of its own
    made(tmp_path, "eval:gold", {"artifact": "ppo:a"}, metrics={**FIGURES, "judge_is": "gold"}, day=2)
    assert finding(tmp_path, "{figure: win_rate, at_least: 0.7}").passed


def test_a_figure_whose_interval_nobody_knows(tmp_path: Path) -> None:
    evaluated(tmp_path, win_rate={"value": 1.0, "low": None, "high": None, "n": 1})
    found = finding(tmp_path, "{figure: win_rate, at_least: 0.1}")
    assert (found.passed, found.said) == (False, "1 (no interval) (n=1, fewer than 20) has no interval")


@pytest.mark.parametrize(
    ("metrics", "says"),
    [
        ({"seen": 3}, "training saw 3 of the prompts of eval:e"),
        ({"seen_unknown": 1}, "it is not known which prompts training saw"),
        ({"seen_unknown": None}, "it is not known which prompts training saw"),
    ],
    ids=["some", "unknown", "not said"],
)
def test_an_evaluation_that_training_saw(tmp_path: Path, metrics: dict[str, Any], says: str) -> None:
    evaluated(tmp_path, **metrics)
    found = finding(tmp_path, "{unseen: true}")
    assert not found.passed
    assert says in found.said


def test_nothing_evaluated_it(tmp_path: Path) -> None:
    made(tmp_path, "ppo:a")
    found = finding(tmp_path, "{unseen: true}")
    assert (found.passed, found.said) == (False, "nothing evaluated it: stage=eval artifact=ppo:a")


def exported(root: Path, *verdicts: str, name: str = "x", kind: str = "gguf", status: str = "done") -> Path:
    config = {"stage": {"name": "export"}, "data": {}, "method": {"name": "qlora"}, "export": {"name": kind}}
    folder = made(root, f"export:{name}", {"artifact": "ppo:a"}, config=config, status=status, day=2) / "artifact"
    (folder / "model.gguf").write_bytes(b"weights")
    rows = [{"name": f"check-{i}", "verdict": one} for i, one in enumerate(verdicts)]
    write_receipt(folder, rows, [[1]], {"artifact": digest_of("ppo:a")})
    outputs = {f"artifact/{path.name}": file_digest(path) for path in folder.iterdir()}
    made(root, f"export:{name}", {"artifact": "ppo:a"}, config=config, status=status, day=2, outputs=outputs)
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
    made(tmp_path, "ppo:a")
    exported(tmp_path, *verdicts)
    found = finding(tmp_path, "{receipt: gguf}")
    assert (found.passed, says in found.said) == (passed, True), found


def test_a_receipt_of_other_files(tmp_path: Path) -> None:
    made(tmp_path, "ppo:a")
    (exported(tmp_path, "pass") / "model.gguf").write_bytes(b"others")
    found = finding(tmp_path, "{receipt: gguf}")
    assert not found.passed
    assert "is not the file that the receipt speaks of" in found.said


def test_a_receipt_that_somebody_wrote(tmp_path: Path) -> None:
    """Its own hash stands in the export's manifest."""
    made(tmp_path, "ppo:a")
    folder = exported(tmp_path, "fail")
    text = (folder / "receipt.json").read_text()
    (folder / "receipt.json").write_text(text.replace('"fail"', '"pass"'))
    found = finding(tmp_path, "{receipt: gguf}")
    assert not found.passed
    assert "receipt.json: is not the file that was published" in found.said


def test_a_receipt_of_another_artifact(tmp_path: Path) -> None:
    made(tmp_path, "ppo:a")
    folder = exported(tmp_path, "pass")
    write_receipt(folder, [{"name": "c", "verdict": "pass"}], [[1]], {"artifact": digest_of("ppo:b")})
    manifest = json.loads((folder.parent / "manifest.json").read_text())
    manifest["outputs"] = {f"artifact/{path.name}": file_digest(path) for path in folder.iterdir()}
    (folder.parent / "manifest.json").write_text(json.dumps(manifest))
    assert finding(tmp_path, "{receipt: gguf}").said == "export:x has the receipt of another artifact"


def test_a_receipt_of_another_kind_or_a_half_export(tmp_path: Path) -> None:
    made(tmp_path, "ppo:a")
    exported(tmp_path, "pass", kind="adapter")
    exported(tmp_path, "pass", name="y", status="failed")
    found = finding(tmp_path, "{receipt: gguf}")
    assert (found.passed, found.said) == (False, "there is no such export: stage=export export=gguf artifact=ppo:a")
    assert finding(tmp_path, "{receipt: adapter}").passed


def test_an_export_that_is_promoted_has_its_own_receipt(tmp_path: Path) -> None:
    """A server that asks for signatures follows an alias of exports: their receipts count for them too."""
    made(tmp_path, "ppo:a")
    exported(tmp_path, "pass", kind="merged")
    meant = AliasTarget("export:x", "")

    def found(condition: str) -> Finding:
        about = query_index(tmp_path, lambda index: make_subject(index, tmp_path, meant))
        return read_gate(gate(tmp_path, f"  - {condition}")).findings(about)[0]

    assert found("{receipt: merged}").passed
    assert not found("{receipt: gguf}").passed
    exported(tmp_path, "fail", kind="merged")
    assert not found("{receipt: merged}").passed


def test_one_good_export_is_enough(tmp_path: Path) -> None:
    made(tmp_path, "ppo:a")
    exported(tmp_path, "fail", name="a")
    exported(tmp_path, "pass", name="b")
    assert finding(tmp_path, "{receipt: gguf}").said.startswith("export:b")


def say(path: Path, verdict: str, ref: str = "ppo:a", gate: str = "safety", **more: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    inputs = {"artifact": digest_of(ref)}
    path.write_text(json.dumps({"schema_version": 1, "gate": gate, "verdict": verdict, "inputs": inputs, **more}))
    if path.parents[1].name == "artifact":
        publish_file(path.parents[2], f"artifact/verdicts/{path.name}")


def test_verdicts(tmp_path: Path) -> None:
    """Only `pass` counts, of this very artifact; of runs the newest says it, of files beside them each."""
    evaluated(tmp_path)
    asked_now = lambda: decide_verdict(tmp_path, "safety", digest_of("ppo:a"))  # noqa: E731
    assert asked_now() == (False, f"nobody has given one on this artifact ({digest_of('ppo:a')[:12]})")
    say(tmp_path / "verdicts" / "other.json", "pass", "ppo:b")
    assert asked_now()[1].endswith("; there are 1 on other artifacts")
    first = tmp_path / "eval" / "e" / "artifact" / "verdicts" / "safety.json"
    say(first, "fail", figure=interval(0.5, 0.4, 0.6))
    assert asked_now() == (False, "eval:e: fail, 0.5 [0.4, 0.6] (n=200)")
    made(tmp_path, "eval:later", {"artifact": "ppo:a"}, day=5)
    later = tmp_path / "eval" / "later" / "artifact" / "verdicts" / "safety.json"
    say(later, "pass")
    assert asked_now() == (True, "eval:later: pass")
    for word in ("PASS", "passed", "unknown", ""):
        say(tmp_path / "verdicts" / "mine.json", word)
        assert asked_now() == (False, f"mine.json: {word}")
    say(tmp_path / "verdicts" / "mine.json", "pass", gate="another")
    assert asked_now() == (True, "eval:later: pass")
    made(tmp_path, "eval:later", {"artifact": "ppo:a"}, day=5, status="interrupted")
    assert asked_now()[0] is False  # that of a run that is not done says nothing
    assert finding(tmp_path, "{verdict: safety}").said.startswith("eval:e: fail")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "is not JSON"), ("[]", "not an object"), ('{"schema_version": 9}', "this version of align reads 1"),
        ('{"schema_version": 1, "gate": "safety", "verdict": "pass"}', "is no verdict file"),
        ('{"schema_version": 1, "gate": "safety", "verdict": true, "inputs": {}}', "is no verdict file"),
        ('{"schema_version": 1, "gate": "safety", "verdict": "pass", "inputs": {"artifact": 3}}', "is no verdict file"),
    ],
)  # fmt: skip
def test_a_verdict_that_cannot_be_read_is_no_pass(tmp_path: Path, text: str, says: str) -> None:
    evaluated(tmp_path)
    say(tmp_path / "verdicts" / "good.json", "pass")
    (tmp_path / "verdicts" / "odd.json").write_text(text)
    passed, said = decide_verdict(tmp_path, "safety", digest_of("ppo:a"))
    assert not passed
    assert says in said


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("alias: [", "cannot be read as YAML"), ("3", "has other keys than"), ("alias: x", "has other keys than"),
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
        ("alias: x\nconditions: [{unseen: true}]\nconditions: [{unseen: true}]", "'conditions' stands twice"),
        ("alias: x\nconditions: [{figure: kl, at_most: 3, at_most: 9}]", "'at_most' stands twice"),
        ("alias: '@x'\nconditions: [{unseen: true}]", "is no name or pattern of an alias"),
        ("alias: x\nconditions: [{figure: kl, at_most: 3, proxy: 1}]", "is no bound of a figure"),
    ],
)  # fmt: skip
def test_a_gate_that_says_nothing_is_refused(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "gate.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=says) as raised:
        read_gate(path)
    assert str(path) in str(raised.value)


def test_which_aliases_a_gate_binds(tmp_path: Path) -> None:
    found = read_gate(gate(tmp_path, "  - {unseen: true}", "[production, 'eu-*']"))
    assert [found.binds(alias) for alias in ("production", "eu-west", "eu", "productions", "Production")] == [
        True, True, False, False, False]  # fmt: skip
    assert read_gates([tmp_path / "nowhere"]) == []
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "more.yml").write_text((tmp_path / "gate.yaml").read_text())
    assert [one.name for one in read_gates([tmp_path, tmp_path / "other", tmp_path])] == ["gate", "more"]
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(InputError, match=r"is a pipe \(FIFO\), not a file"):
        read_gates([tmp_path])


def signed_export(root: Path, ref: str, of: str, keys: Pair) -> Path:
    """An export with a receipt that names what it was made of, signed."""
    config = {"stage": {"name": "export"}, "data": {}, "method": {"name": "qlora"}, "export": {"name": "adapter"}}
    folder = made(root, ref, {"artifact": of}, config=config, day=2) / "artifact"
    (folder / "weights").write_text("w")
    write_receipt(folder, [{"name": "transformers", "verdict": "pass"}], [[1]], {"artifact": digest_of(of)})
    sign_folder(folder, load_private_key(str(keys.private), "export.sign"))
    return folder


def test_a_signature(tmp_path: Path) -> None:
    """Of an export, whose receipt says of what; by the owner of the key beside the gate, and of files as they are."""
    keys, other, condition = pair(tmp_path, "release"), pair(tmp_path, "other"), "{signature: release.pub}"
    made(tmp_path, "ppo:a")
    made(tmp_path, "ppo:b")
    said = finding(tmp_path, condition)
    assert (said.passed, said.condition) == (False, "signature by release.pub")
    assert "stage=export export.sign=KEY artifact=ppo:a" in said.said
    folder = signed_export(tmp_path, "export:x", "ppo:a", keys)
    assert finding(tmp_path, condition).said == f"export:x is signed by {file_digest(keys.public)[:12]}"
    assert not finding(tmp_path, "{signature: other.pub}").passed
    assert not finding(tmp_path, condition, "ppo:b").passed
    foreign = signed_export(tmp_path, "export:y", "ppo:b", other)
    assert "is by another key" in finding(tmp_path, condition, "ppo:b").said
    # A receipt is believed where it is signed, and speaks of one artifact.
    shutil.rmtree(foreign)
    shutil.copytree(folder, foreign)
    assert "and is another artifact" in finding(tmp_path, condition, "ppo:b").said
    (folder / "weights").write_text("x")
    assert "weights is not the file that was signed" in finding(tmp_path, condition).said


def test_a_signature_of_the_artifact_itself(tmp_path: Path) -> None:
    """A run's own folder, which the official tool may have signed; or one of several kinds of an export."""
    keys, folder = pair(tmp_path, "release"), made(tmp_path, "ppo:a") / "artifact"
    made(tmp_path, "ppo:a", digest=adapter_digest(folder))
    meant = AliasTarget("ppo:a", adapter_digest(folder))

    def passed() -> bool:
        conditions = read_gate(gate(tmp_path, "  - {signature: release.pub}"))
        (found,) = conditions.findings(query_index(tmp_path, lambda index: make_subject(index, tmp_path, meant)))
        return found.passed

    assert not passed()
    sign_folder(folder, load_private_key(str(keys.private), "export.sign"))
    assert passed()
    (folder / "more").write_text("")
    assert not passed()


def test_a_signed_copy_inside_vouches_for_nothing_beside_it(tmp_path: Path) -> None:
    made(tmp_path, "ppo:a")
    keys = pair(tmp_path)
    folder = signed_export(tmp_path, "export:x", "ppo:a", keys)
    shutil.copytree(folder, tmp_path / "copy")
    (folder / "model.sig").unlink()
    shutil.copytree(tmp_path / "copy", folder / "good")
    shutil.copy(keys.public, tmp_path / "release.pub")
    found = finding(tmp_path, "{signature: release.pub}", "export:x")
    assert not found.passed


def test_the_key_of_a_gate(tmp_path: Path) -> None:
    """A file beside the gate; whatever it holds, a closed gate says what is wrong with it."""
    evaluated(tmp_path)
    for condition in ("{signature: none.pub}", "{signature: 1}", "{signature: release.pub, figure: kl}"):
        with pytest.raises(InputError, match=r"conditions\[0\]"):
            read_gate(gate(tmp_path, f"  - {condition}"))
    made(tmp_path, "ppo:a")
    signed_export(tmp_path, "export:x", "ppo:a", keys := pair(tmp_path))
    shutil.copy(keys.private, tmp_path / "key.pub")
    with pytest.raises(InputError, match=r"conditions\[0\]\.signature.*is a private key"):  # which nobody overrides
        finding(tmp_path, "{signature: key.pub}")


def collapse(verdict: str, *reasons: str) -> dict[str, Any]:
    return {"verdict": verdict, "reasons": [*reasons]}


@pytest.mark.parametrize(
    ("collapse_", "exempt", "passed", "says"),
    [
        (None, "", True, "0.81 [0.75, 0.87] (n=200)"),
        (None, ", collapsed: measured", False, "is not measured: no evaluation says it"),
        (collapse("varied"), "", True, "0.81 [0.75, 0.87] (n=200)"),
        (collapse("varied"), ", collapsed: measured", True, "0.81 [0.75, 0.87] (n=200)"),
        (collapse("not measured", "few"), "", True, "; whether the policy collapsed is not measured"),
        (collapse("not measured", "few"), ", collapsed: measured", False, "is not measured: few"),
        (collapse("collapsed", "alike"), "", False, "of a policy that collapsed: alike"),
        (collapse("collapsed", "alike"), ", collapsed: measured", False, "of a policy that collapsed: alike"),
        (collapse("collapsed", "alike"), ", collapsed: true", True, "0.81 [0.75, 0.87] (n=200)"),
    ],
)
def test_what_a_condition_asks_of_a_collapse(tmp_path: Path, collapse_: Any, exempt: str, passed: bool, says: str):
    evaluated(tmp_path, **({"collapse": collapse_} if collapse_ else {}))
    found = finding(tmp_path, f"{{figure: win_rate, at_least: 0.7{exempt}}}")
    assert (found.passed, found.said.endswith(says)) == (passed, True), found.said
    assert found.condition.endswith(", collapse measured") is ("measured" in exempt)


def test_an_evaluation_of_several_systems_says_that_a_policy_collapsed(tmp_path: Path):
    def suite(name: str, day: int, verdict: dict[str, Any]) -> None:
        systems = {"new": verdict, "old": collapse("varied")}
        inputs = {"systems.new": "ppo:a", "systems.old": "sft:s"}
        made(tmp_path, f"eval:{name}", inputs, metrics={"collapse": {**verdict, "systems": systems}}, day=day)

    evaluated(tmp_path, collapse=collapse("not measured", "few"))
    condition = "{figure: win_rate, at_least: 0.7, collapsed: measured}"
    assert not finding(tmp_path, condition).passed
    suite("varied", 2, collapse("varied"))
    assert finding(tmp_path, condition).passed
    suite("collapsed", 3, collapse("collapsed", "on chat alike"))
    assert finding(tmp_path, condition).said.endswith("of a policy that collapsed: on chat alike")
    suite("unmeasured", 4, collapse("not measured", "few"))
    assert finding(tmp_path, condition).said.endswith("of a policy that collapsed: on chat alike")
    suite("newest", 5, collapse("varied"))
    assert finding(tmp_path, condition).passed
    assert find_suite_collapse(subject_input(tmp_path), tmp_path) == collapse("varied")


def subject_input(root: Path) -> Input:
    return read_manifest(root / "eval" / "e").inputs["artifact"]


@pytest.mark.parametrize("word", ["maybe", "1", "[true]"])
def test_a_word_that_says_nothing_of_a_collapse_is_refused(tmp_path: Path, word: str):
    with pytest.raises(InputError, match="is no bound of a figure"):
        read_gate(gate(tmp_path, f"  - {{figure: kl, at_most: 1, collapsed: {word}}}"))
