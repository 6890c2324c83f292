"""Figures that were altered are marked wherever figures are shown, and open no gate."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from synthetic_runs import build_interval, compute_artifact_digest, publish_file, write_run_folder

from align.core.aliases import Arm
from align.core.errors import CorruptFile, InputError
from align.registry import comparison, trace
from align.registry.formatting import USUAL
from align.registry.gates import read_gate
from align.registry.index import Index, query_index
from align.registry.page.templating import get_template_environment
from align.registry.promotion import promote
from align.registry.record import Record, describe_alteration
from align.run.alias_log import read_alias_log
from align.run.digests import file_digest
from align.run.figures import FILE, IN_ARTIFACT, load_published_figures, write_figures
from align.run.manifest import compute_manifest_digests, read_manifest
from align.run.receipt import write_receipt
from align.run.weights import adapter_digest

GOOD = build_interval(0.9, 0.85, 0.95)
POOR = build_interval(0.5, 0.45, 0.55)


def make_evaluated_policy(root: Path, win_rate: dict[str, float] = POOR) -> None:
    """Make a policy with weights that can be promoted, and its evaluation."""
    folder = write_run_folder(root, "ppo:a", metrics={"last_score": 0.5})
    (folder / "artifact" / "adapter_model.safetensors").write_bytes(b"weights")
    digest = adapter_digest(folder / "artifact")
    edit_manifest(folder, digest=digest)
    metrics = {"win_rate": win_rate, "kl": 4.0, "judge_is": "gold", "seen_unknown": 0}
    evaluation = write_run_folder(root, "eval:e", {"artifact": "ppo:a"}, metrics=metrics, day=1)
    inputs = json.loads((evaluation / "manifest.json").read_text())["inputs"]
    inputs["artifact"] |= {"digest": digest, "whole": False}
    edit_manifest(evaluation, inputs=inputs)
    (evaluation / IN_ARTIFACT).write_text(json.dumps(metrics))
    publish_file(evaluation, IN_ARTIFACT)


def edit_manifest(folder: Path, **values: Any) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def edit_manifest_figures(root: Path) -> None:
    folder = root / "eval" / "e"
    edit_manifest(folder, metrics=json.loads((folder / "manifest.json").read_text())["metrics"] | {"win_rate": GOOD})


def edit_file(root: Path) -> None:
    path = root / "eval" / "e" / FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"win_rate": GOOD}))


def edit_file_in_artifact(root: Path) -> None:
    path = root / "eval" / "e" / IN_ARTIFACT
    path.write_text(json.dumps(json.loads(path.read_text()) | {"win_rate": GOOD}))


def remove_file(root: Path) -> None:
    (root / "eval" / "e" / FILE).unlink()


def edit_figures_and_drop_the_file(root: Path) -> None:
    """Edit the manifest's figures, and remove the file of figures from its outputs."""
    edit_manifest_figures(root)
    folder = root / "eval" / "e"
    outputs = json.loads((folder / "manifest.json").read_text())["outputs"]
    edit_manifest(folder, outputs={name: digest for name, digest in outputs.items() if name != FILE})


EDITS = [edit_manifest_figures, edit_file, edit_file_in_artifact, remove_file, edit_figures_and_drop_the_file]


def edit_both(root: Path) -> None:
    """Edit the figures in the manifest and in both files, so that they agree."""
    folder = root / "eval" / "e"
    metrics = json.loads((folder / FILE).read_text()) | {"win_rate": GOOD}
    write_figures(folder, metrics)
    (folder / IN_ARTIFACT).write_text(json.dumps(metrics))
    outputs = json.loads((folder / "manifest.json").read_text())["outputs"]
    digests = {name: file_digest(folder / name) for name in (FILE, IN_ARTIFACT)}
    edit_manifest(folder, metrics=metrics, outputs=outputs | digests)


def read_all_records(root: Path) -> dict[str, Record]:
    with Index(root) as index:
        return {run: record for run in index.names() if (record := index.record(run))}


def render_trace(root: Path, run: str) -> str:
    def raise_on_votes(project: str, head: object) -> Any:
        raise AssertionError

    return "\n".join(trace.as_lines([query_index(root, lambda index: trace.Tracer(index, raise_on_votes).run(run))]))


def try_promotion(root: Path, condition: str = "{figure: win_rate, at_least: 0.8}", **options: Any) -> str:
    """Return the reason why a promotion of the policy is refused, or an empty string if it succeeds."""
    gate = root / "gate.yaml"
    gate.write_text(f"alias: production\nconditions:\n  - {condition}\n")
    try:
        promote(root, "production", [Arm("ppo:a", 1.0)], [read_gate(gate)], who="ann", why="good", **options)
    except InputError as error:
        return str(error)
    return ""


def test_the_load_published_figures_open_a_gate(tmp_path: Path) -> None:
    make_evaluated_policy(tmp_path, GOOD)
    assert try_promotion(tmp_path) == ""
    assert all(not describe_alteration(record) for record in read_all_records(tmp_path).values())


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_of_either_is_shown_and_opens_no_gate(tmp_path: Path, edit: Callable[[Path], None]) -> None:
    make_evaluated_policy(tmp_path)
    assert "0.5 [0.45, 0.55]" in try_promotion(tmp_path)
    edit(tmp_path)
    for condition in ("{figure: win_rate, at_least: 0.8}", "{figure: kl, at_most: 9}", "{unseen: true}"):
        assert "altered: eval:e: " in try_promotion(tmp_path, condition)
    by_run = read_all_records(tmp_path)
    for run in ("eval:e", "ppo:a"):
        assert describe_alteration(by_run[run]).startswith("eval:e: ")
        assert USUAL["status"](by_run[run], None).endswith("altered")  # pyright: ignore[reportArgumentType]
        assert "altered" in get_template_environment().get_template("pieces.html").module.status_mark(by_run[run])  # pyright: ignore
        assert "NOT WHOLE: " in render_trace(tmp_path, run)
    side_by_side = comparison.compare(tmp_path, [by_run["ppo:a"]], [])
    assert "ALTERED: eval:e: " in "\n".join(comparison.as_lines(side_by_side))
    assert comparison.as_objects(side_by_side)["altered"] == [describe_alteration(by_run["ppo:a"])]
    if edit is not edit_file_in_artifact:
        with pytest.raises(CorruptFile):
            load_published_figures(tmp_path / "eval" / "e", read_manifest(tmp_path / "eval" / "e"))


def test_figures_come_from_the_file_and_not_from_the_manifest(tmp_path: Path) -> None:
    make_evaluated_policy(tmp_path)
    edit_manifest_figures(tmp_path)
    assert read_all_records(tmp_path)["eval:e"]["metrics"]["win_rate"]["value"] == 0.5


def test_an_edit_that_leaves_size_and_time_alone_opens_no_gate(tmp_path: Path) -> None:
    """A gate reads the files again, although the index has read them before."""
    make_evaluated_policy(tmp_path)
    read_all_records(tmp_path)
    path = tmp_path / "eval" / "e" / "manifest.json"
    before = os.stat(path)
    text = path.read_text()
    edited = text.replace('"value": 0.5', '"value": 0.9').replace('"low": 0.45', '"low": 0.85')
    assert len(edited) == len(text)
    assert edited != text
    with path.open("r+") as file:
        file.write(edited)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert "altered: eval:e: manifest.json and metrics.json have different figures" in try_promotion(tmp_path)


def test_an_edit_of_both_is_shown_where_the_log_of_aliases_holds_the_manifest(tmp_path: Path) -> None:
    make_evaluated_policy(tmp_path)
    assert try_promotion(tmp_path, override="for a day") == ""
    (arm,) = read_alias_log(tmp_path).changes[0].arms
    assert {*arm.manifests} == {"ppo:a", "eval:e"}
    edit_both(tmp_path)
    alteration = "eval:e: manifest.json was different when @production was changed (change 1)"
    by_run = read_all_records(tmp_path)
    assert {run: describe_alteration(record) for run, record in by_run.items()} == {
        "eval:e": alteration,
        "ppo:a": alteration,
    }
    assert alteration in render_trace(tmp_path, "ppo:a")
    gate = tmp_path / "gate.yaml"
    gate.write_text("alias: production\nconditions:\n  - {figure: win_rate, at_least: 0.8}\n")
    with pytest.raises(InputError, match=r"altered: eval:e: manifest\.json was different"):
        promote(tmp_path, "other-production", [Arm("ppo:a", 1.0)], [bind_to_all(gate)], who="ann", why="again")


def bind_to_all(gate: Path) -> Any:
    gate.write_text(gate.read_text().replace("alias: production", "alias: '*'"))
    return read_gate(gate)


def test_an_edit_of_both_is_shown_where_a_receipt_holds_the_manifest(tmp_path: Path) -> None:
    make_evaluated_policy(tmp_path)
    assert try_promotion(tmp_path).count("altered") == 0
    manifests = {}
    for run in ("ppo/a", "eval/e"):
        folder = tmp_path / run
        manifests[run.replace("/", ":")] = compute_manifest_digests(folder, read_manifest(folder)).as_json()
    config = {"stage": {"name": "export"}, "data": {}, "method": {"name": "qlora"}, "export": {"name": "adapter"}}
    folder = write_run_folder(tmp_path, "export:x", {"artifact": "ppo:a"}, config=config, day=2)
    write_receipt(
        folder / "artifact", [], [[1]], {"artifact": compute_artifact_digest("ppo:a"), "manifests": manifests}
    )
    assert not describe_alteration(read_all_records(tmp_path)["eval:e"])
    edit_both(tmp_path)
    assert describe_alteration(read_all_records(tmp_path)["eval:e"]) == (
        "eval:e: manifest.json was different when export:x was written"
    )
    assert "altered: " in try_promotion(tmp_path)


def test_a_run_that_was_made_again_is_not_called_altered(tmp_path: Path) -> None:
    """A run with other weights is not compared with the manifest of the run before it."""
    make_evaluated_policy(tmp_path)
    assert try_promotion(tmp_path, override="for a day") == ""
    (tmp_path / "ppo" / "a" / "artifact" / "adapter_model.safetensors").write_bytes(b"others")
    edit_manifest(tmp_path / "ppo" / "a", digest=adapter_digest(tmp_path / "ppo" / "a" / "artifact"))
    assert not describe_alteration(read_all_records(tmp_path)["ppo:a"])
