"""An artifact is measured against its start, which is found by digest. A run that took its place is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from run_folders import publish_run

from align.core.errors import InputError, MissingArtifact
from align.models.base import find_recorded_artifact, find_reference_artifact
from align.run import load_artifact


def test_a_start_that_was_renamed_or_moved_is_found(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    recorded = load_artifact(publish_run(root, "s"), "sft:s").as_input()
    assert find_recorded_artifact(recorded, root).path == root / "sft" / "s" / "artifact"
    (root / "sft" / "s").rename(root / "sft" / "renamed")
    assert find_recorded_artifact(recorded, root).path == root / "sft" / "renamed" / "artifact"
    root.rename(tmp_path / "moved")
    assert find_recorded_artifact(recorded, tmp_path / "moved").digest == recorded.digest


def test_an_artifact_is_measured_against_nothing_but_its_start(tmp_path: Path) -> None:
    start = load_artifact(publish_run(tmp_path, "s"), "sft:s")
    other_run = load_artifact(publish_run(tmp_path, "other", weights="trained otherwise"), "sft:other")
    artifact = load_artifact(publish_run(tmp_path, "p", stage="ppo", inputs={"init": start.as_input()}), "ppo:p")
    for given_start in (None, start):
        reference = find_reference_artifact(artifact, given_start, tmp_path)
        assert reference is not None
        assert reference.digest == start.digest
    with pytest.raises(InputError, match="was trained from sft:s, and is measured against that") as error:
        find_reference_artifact(artifact, other_run, tmp_path)
    assert error.value.field == "init"
    assert error.value.value == "sft:other"


def test_another_run_in_its_place_is_not_taken_for_it(tmp_path: Path) -> None:
    recorded = load_artifact(publish_run(tmp_path, "s"), "sft:s").as_input()
    shutil.rmtree(tmp_path / "sft" / "s")
    publish_run(tmp_path, "s", weights="trained again")
    with pytest.raises(MissingArtifact, match="was removed or changed") as error:
        find_recorded_artifact(recorded, tmp_path)
    assert (error.value.field, error.value.value) == ("init", "sft:s")


def test_a_bare_folder_is_held_to_its_digest_too(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_text("a")
    recorded = load_artifact(tmp_path, str(tmp_path)).as_input()
    assert find_recorded_artifact(recorded, tmp_path).digest == recorded.digest
    (tmp_path / "adapter_model.safetensors").write_text("b")
    with pytest.raises(MissingArtifact, match="was removed or changed"):
        find_recorded_artifact(recorded, tmp_path)
