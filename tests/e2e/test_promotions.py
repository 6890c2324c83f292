"""Aliases from the command line, on real runs: promoted, gated, and used as references."""

from __future__ import annotations

import json
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from stage_commands import Ready, Workshop
from synthetic_runs import find_record, query_refs

from align.registry.index import INDEX
from align.run import read_manifest
from align.run.alias_log import FILE, read_alias_log

WHY = "stage.why=better"


@pytest.fixture
def shop(ready: Ready, tmp_path: Path) -> Workshop:
    """Copy real runs into a working folder."""
    shutil.copytree(ready.root, tmp_path / "runs")
    (tmp_path / "runs" / INDEX).unlink(missing_ok=True)
    return Workshop(tmp_path / "runs", tmp_path)


def run_registry_action(shop: Workshop, action: str, *words: str, status: int = 0) -> str:
    line = ["stage=registry", f"stage.action={action}", f"run.root={shop.root}", *words]
    assert shop.run_command(*line) == status, shop.output
    return shop.output


def promote(shop: Workshop, artifact: str, *words: str, alias: str = "production", status: int = 0) -> str:
    return run_registry_action(
        shop, "promote", f"stage.alias={alias}", f"artifact={artifact}", WHY, *words, status=status
    )


def test_promoted_used_rolled_back_retired(shop: Workshop, ready: Ready) -> None:
    first_digest, second_digest = (read_manifest(shop.root / "reward" / name).digest for name in "ab")
    assert promote(shop, "reward:a", "stage.who=ann") == (
        f"@production: reward:a ({first_digest[:12]})\nno gate binds @production\nchange 1 by ann: better\n"
    )
    assert promote(shop, "reward:b").splitlines()[0] == (
        f"@production: reward:a ({first_digest[:12]}) → reward:b ({second_digest[:12]})"
    )
    assert query_refs(shop.root, {"aliases": "production"}) == ["reward:b"]
    promote(shop, "reward:a")  # rolled back: one more promotion
    assert find_record(shop.root, "reward:a")["aliases"] == ["production"]
    assert find_record(shop.root, "reward:b")["aliases"] == []
    promote(shop, "@production", alias="best")
    assert find_record(shop.root, "reward:a")["aliases"] == ["best", "production"]
    stdout = run_registry_action(shop, "retire", "stage.alias=production", "stage.why=no more of it")
    assert stdout.splitlines()[0] == f"@production: reward:a ({first_digest[:12]}) → nothing"
    assert query_refs(shop.root, {"aliases": "production"}) == []
    lines = run_registry_action(shop, "history").splitlines()
    assert [line.split()[0] for line in lines[::2]] == ["5", "4", "3", "2", "1"]
    assert lines[-1] == "   ann: better"
    assert len(run_registry_action(shop, "history", "stage.alias=best").splitlines()) == 2
    changes = json.loads(run_registry_action(shop, "history", "stage.format=json"))
    assert [change["seq"] for change in changes] == [1, 2, 3, 4, 5]
    assert "was retired by" in read_refusal(shop, "@production")


def read_refusal(shop: Workshop, ref: str) -> str:
    """Return the message with which an evaluation of a reference is refused."""
    assert shop.run_command("stage=eval", f"artifact={ref}", f"run.root={shop.root}", "device=cpu") == 2
    return shop.output


def test_what_an_alias_meant_then(shop: Workshop) -> None:
    promote(shop, "reward:a")
    between = datetime.now(UTC)
    promote(shop, "reward:b")
    assert "reward:a" in run_registry_action(shop, "history", f"stage.as_of={between.isoformat()}")
    assert "reward:a" in run_registry_action(shop, "history", f"stage.as_of={between.replace(tzinfo=None).isoformat()}")
    assert "reward:b" in run_registry_action(
        shop, "history", f"stage.as_of={(between + timedelta(hours=1)).isoformat()}"
    )
    assert run_registry_action(shop, "history", "stage.as_of=2020-01-01") == "no alias pointed at an artifact then\n"


def test_a_run_keeps_what_the_alias_meant(shop: Workshop, ready: Ready) -> None:
    """The run is the same as by its artifact's own name, and its manifest records the alias's change.

    Later changes of the alias do not affect it.
    """
    digest = read_manifest(shop.root / "sft" / "s").digest
    promote(shop, "sft:s", alias="start")
    words = [
        "stage=sample",
        "stage.prompts=2",
        "stage.candidates=2",
        "rollout.max_new_tokens=4",
        "device=cpu",
        *ready.data,
    ]
    assert shop.run_command(*words, "init=@start", f"run.root={shop.root}", "project=p") == 0, shop.output
    folder = Path(shop.output.splitlines()[-1])
    manifest = read_manifest(folder)
    init = manifest.inputs["init"]
    change = read_alias_log(shop.root).changes[0]
    assert (init.ref, init.run, init.digest) == ("@start", "sft:s", digest)
    assert init.details == {"alias": {"name": "start", "seq": 1, "hash": change.hash}}
    assert query_refs(shop.root, {"inputs.init.alias.name": "start"}) == [manifest.ref]
    assert manifest.ref in find_record(shop.root, "sft:s")["children"]
    assert shop.run_command(*words, "init=sft:s", f"run.root={shop.root}", "project=p") == 0
    assert Path(shop.output.splitlines()[-1]) == folder
    assert "This run is finished already" in shop.output

    # The end of the log is cut off, which its chain cannot show. The run's manifest names the change.
    text = (shop.root / FILE).read_text()
    (shop.root / FILE).write_text("")
    assert f"{manifest.ref} relied on change 1" in run_registry_action(shop, "history", status=2)
    (shop.root / FILE).write_text(text)
    run_registry_action(shop, "history")


def test_an_alias_finds_its_artifact_by_what_it_is(shop: Workshop) -> None:
    """A renamed artifact is found under its new name. Another artifact under its old name is not taken for it."""
    promote(shop, "reward:a")
    (shop.root / "reward" / "a").rename(shop.root / "reward" / "c")
    shutil.copytree(shop.root / "reward" / "b", shop.root / "reward" / "a")
    promote(shop, "@production", alias="same")
    assert read_alias_log(shop.root).changes[1].arms[0].digest == read_alias_log(shop.root).changes[0].arms[0].digest
    assert find_record(shop.root, "reward:c")["aliases"] == ["production", "same"]
    shutil.rmtree(shop.root / "reward" / "c")
    message = read_refusal(shop, "@production")
    assert "which was removed or made again" in message
    assert [*query_refs(shop.root, {"aliases": "production"})] == []


def test_several_by_weight(shop: Workshop) -> None:
    words = ("stage.arms={reward\\:a: 3, reward\\:b: 1}", "stage.alias=split", WHY)
    assert "0.75 of reward:a" in run_registry_action(shop, "promote", *words)
    assert query_refs(shop.root, {"aliases": "split"}) == ["reward:a", "reward:b"]
    assert "artifact=@split: points at several artifacts: 0.75 of reward:a" in read_refusal(shop, "@split")
    assert "points at" in run_registry_action(shop, "promote", *words, status=2)


def test_a_run_is_judged_by_its_folder(shop: Workshop) -> None:
    """Two folders changed places: the artifact in the named folder is promoted and judged."""
    a, b, between = (shop.root / "reward" / name for name in ("a", "b", "t"))
    digest = read_manifest(a).digest
    for folder, target in ((a, between), (b, a), (between, b)):
        folder.rename(target)
    promote(shop, "reward:b")
    arm = read_alias_log(shop.root).changes[-1].arms[0]
    assert (arm.ref, arm.digest) == ("reward:b", digest)
    b.rename(shop.root / "reward" / "renamed")
    promote(shop, "reward:renamed", alias="other")
    assert read_alias_log(shop.root).changes[-1].arms[0].ref == "reward:renamed"


def test_what_somebody_wrote_moves_no_cursor_and_tells_no_secret(shop: Workshop) -> None:
    key = "hf_" + "a" * 34
    promote(shop, "reward:a", "stage.who=ann\n9  2026  @x  evil\x1b[31m", f"stage.override={key}", status=2)
    stdout = run_registry_action(shop, "promote", "stage.alias=x", "artifact=reward:a", f"stage.why=a\nb\x1b[31m {key}")
    for text in (
        stdout,
        run_registry_action(shop, "history"),
        run_registry_action(shop, "history", "stage.as_of=2999-01-01"),
    ):
        assert "\x1b" not in text
        assert "a\\nb\\x1b[31m" in text
        assert key not in text
    assert key not in (shop.root / FILE).read_text()


def test_a_gate(shop: Workshop, tmp_path: Path) -> None:
    gates = tmp_path / "gates"
    gates.mkdir()
    conditions = "conditions:\n  - {figure: steps, at_least: 1}\n  - {verdict: safe}\n"
    (gates / "good.yaml").write_text(f"alias: prod*\n{conditions}")
    gates_word = f"stage.gates={gates}"
    output = promote(shop, "reward:a", gates_word, status=2)
    assert "gate good, reward:a: verdict safe: there is none on this artifact" in output
    assert "at least 1" not in output
    assert not (shop.root / FILE).exists()
    promote(shop, "reward:a", gates_word, alias="canary")
    assert "overrides nothing" in promote(
        shop, "reward:b", gates_word, "stage.override=because", alias="canary", status=2
    )
    output = promote(shop, "reward:a", gates_word, "stage.override=we must")
    assert "gate good, NOT MET: reward:a: verdict safe" in output
    assert "gate good, met: reward:a: steps at least 1: " in output
    last_change = read_alias_log(shop.root).changes[-1]
    assert last_change.override == "we must"
    assert [finding["passed"] for finding in last_change.gates[0]["findings"]] == [True, False]
    digest = read_manifest(shop.root / "reward" / "b").digest
    verdict = {"schema_version": 1, "gate": "safe", "verdict": "pass", "inputs": {"artifact": digest}}
    (shop.root / "verdicts").mkdir()
    (shop.root / "verdicts" / "safe.json").write_text(json.dumps(verdict))
    promote(shop, "reward:b", gates_word)
    assert read_alias_log(shop.root).changes[-1].override == ""
    output = run_registry_action(
        shop, "promote", gates_word, "stage.alias=prod", "stage.arms={reward\\:a: 1, reward\\:b: 1}", WHY, status=2
    )
    assert output.count("gate good") == 1  # each of several has to pass
    assert "(overridden: we must)" in run_registry_action(shop, "history")


def test_a_log_that_is_damaged_is_said_and_the_runs_are_listed(shop: Workshop) -> None:
    promote(shop, "reward:a")
    promote(shop, "reward:b")
    lines = (shop.root / FILE).read_text().splitlines(keepends=True)
    (shop.root / FILE).write_text(lines[1])
    for action in ("history", "promote"):
        words = ("stage.alias=production", "artifact=reward:a", WHY) if action == "promote" else ()
        assert "the row is missing (seq 2 follows seq 0)" in run_registry_action(shop, action, *words, status=2)
    listing = run_registry_action(shop, "list").splitlines()
    assert listing[0].startswith("run ")
    assert listing[-1].startswith("aliases left out: ")
    (shop.root / FILE).write_text("".join(lines))
    assert "@production" in run_registry_action(shop, "list")


REFUSED = {
    "promote": "stage.alias=(not given): cannot be a name",
    f"promote stage.alias=@x {WHY}": "Write no @ before it.",
    "promote stage.alias=x": "stage.why=(not given): gives no reason",
    f"promote stage.alias=x {WHY} stage.override=": "gives no reason",
    f"promote stage.alias=x {WHY} artifact=ppo:none": "artifact=ppo:none: there is no such run under",
    f"promote stage.alias=x {WHY} artifact=@none": "artifact=@none: is no alias under",
    f"promote stage.alias=x {WHY} artifact=SAMPLE": "holds no adapter and no model",
    f"promote stage.alias=x {WHY} artifact=MODEL": "was made by no run under",
    f"promote stage.alias=x {WHY} stage.arms={{reward\\:a:-1}}": "is no weight",
    f"promote stage.alias=x {WHY} stage.arms={{reward\\:b:1,reward\\:latest:1}}": "names the same artifact twice",
    f"promote stage.alias=x {WHY} stage.arms={{reward\\:a:1,sft\\:s:1}}": "are a reward model and a policy",
    f"promote stage.alias=x {WHY} stage.gates=nowhere": "stage.gates=nowhere: is no folder",
    f"promote stage.alias=x {WHY} artifact=sft:s stage.arms={{reward\\:a:1}}": "Drop one of the two.",
    f"retire stage.alias=x {WHY}": "is not in use",
    "history stage.alias=x": "is no alias under",
    "history stage.as_of=yesterday": "is no time in ISO 8601",
    "history stage.format=csv": "is not a format of stage.action=history",
    "list stage.alias=x": "is not read by stage.action=list. Add stage.action=promote, retire or history",
    f"history {WHY}": "is not read by stage.action=history",
}
"""Action and words → text of the message."""


def test_what_is_refused(shop: Workshop, tiny_model: Path) -> None:
    sample = next((shop.root / "sample").iterdir()).name
    for line, says in REFUSED.items():
        action, *words = line.replace("SAMPLE", f"sample:{sample}").replace("MODEL", str(tiny_model)).split()
        assert says in run_registry_action(shop, action, *words, status=2), line
    assert not (shop.root / FILE).exists()
