"""Manifests and references: the artifacts that a later run resolves, and files that it refuses to read."""

from __future__ import annotations

from pathlib import Path

import pytest
from run_folders import BASE, load_manifest, open_run, publish_run

from align.__main__ import STAGES as LISTED
from align.core.errors import CorruptFile, InputError, MissingArtifact
from align.run import Base, load_artifact, resolve, write_json
from align.run.artifacts import WITH_RUNS


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema_version": 1}', "{broken"])
def test_a_manifest_that_is_none(tmp_path: Path, text: str):
    folder = publish_run(tmp_path, "x")
    (folder / "manifest.json").write_text(text)
    with pytest.raises(CorruptFile, match="manifest"):
        open_run(tmp_path, "x")
    with pytest.raises(CorruptFile, match="manifest"):
        resolve("sft:latest", tmp_path)


@pytest.mark.parametrize("version", [0, 1, 3])
def test_a_manifest_of_another_version_is_refused(tmp_path: Path, version: int):
    folder = publish_run(tmp_path, "x")
    write_json(folder / "manifest.json", load_manifest(folder) | {"schema_version": version})
    with pytest.raises(InputError, match=f"has schema_version {version}, and") as caught:
        open_run(tmp_path, "x")
    assert (caught.value.field, caught.value.value) == ("manifest", str(folder / "manifest.json"))
    assert "run its command again" in caught.value.remedy


def test_latest_is_the_newest_done_run_on_the_base(tmp_path: Path):
    other_base = Base("org/other", "/models/other", None, "c" * 64)
    publish_run(tmp_path, "a")
    publish_run(tmp_path, "z-oldest-by-no-means")
    newest_folder = publish_run(tmp_path, "b", weights="w2")
    publish_run(tmp_path, "c", base=other_base)
    with open_run(tmp_path, "unfinished") as run:
        run.begin("a: 1\n")
    assert resolve("sft:latest", tmp_path, BASE.digest).path == newest_folder / "artifact"
    assert resolve("sft:latest", tmp_path).manifest.name == "c"
    assert resolve("sft:a", tmp_path).ref == "sft:a"
    assert resolve(str(newest_folder), tmp_path).digest == resolve(str(newest_folder / "artifact"), tmp_path).digest
    with pytest.raises(MissingArtifact, match=r"no finished sft run on this base.*stage=sft"):
        resolve("sft:latest", tmp_path, "d" * 64)


def test_the_tokenizer_of_a_bare_adapter_is_in_its_digest(tmp_path: Path):
    """A run's tokenizer is in its manifest, with every other file."""
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors", "tokenizer.json"):
        (bare / name).write_text("{}")
    before = load_artifact(bare, "bare").digest
    (bare / "chat_template.jinja").write_text("another")
    assert load_artifact(bare, "bare").digest != before


def test_latest_does_not_go_by_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The clock is set back an hour between two runs, and between two stages that resolve as one."""
    for hour, (name, stage) in enumerate([("old", "sft"), ("new", "sft"), ("newest", "full")]):
        monkeypatch.setattr("align.run.folder.utc_now", lambda hour=hour: f"2026-01-01T{12 - hour}:00:00.000000+00:00")
        publish_run(tmp_path, name, stage)
        assert resolve("sft:latest", tmp_path).manifest.name == name


def test_runs_that_carry_no_number_go_by_their_time_and_come_before_those_that_do(tmp_path: Path):
    for name in ("a", "b"):
        folder = publish_run(tmp_path, name)
        write_json(folder / "manifest.json", {k: v for k, v in load_manifest(folder).items() if k != "published"})
    assert resolve("sft:latest", tmp_path).manifest.name == "b"
    publish_run(tmp_path, "c")
    (tmp_path / "sft" / "stranger").mkdir()
    (tmp_path / "sft" / "stranger" / "manifest.json").write_text("[]")
    folder = publish_run(tmp_path, "d")
    assert load_manifest(folder)["published"] == 2


def test_a_full_run_serves_where_sft_is_asked_for(tmp_path: Path):
    folder = publish_run(tmp_path, "x", stage="full")
    assert resolve("sft:latest", tmp_path).path == resolve("sft:x", tmp_path).path == folder / "artifact"


@pytest.mark.parametrize(
    ("ref", "said"),
    [
        ("sft:latest", "Make it with: python -m align stage=sft run.root="),
        ("reward:nope", " run.name=nope"),
        ("sftt:latest", "neither a folder nor a reference"),
        ("no/such/folder", "neither a folder nor a reference"),
    ],
)
def test_a_missing_artifact_says_what_makes_it(tmp_path: Path, ref: str, said: str):
    with pytest.raises(MissingArtifact) as caught:
        resolve(ref, tmp_path, field_name="init")
    assert (caught.value.field, caught.value.value) == ("init", ref)
    assert said in str(caught.value)


def test_an_unfinished_run_is_no_artifact(tmp_path: Path):
    with open_run(tmp_path, "x") as run:
        run.begin("a: 1\n")
    with pytest.raises(MissingArtifact, match="is running, not done"):
        resolve("sft:x", tmp_path)


@pytest.mark.parametrize("harm", ["changed", "gone"])
def test_a_published_file_that_changed_is_not_read(tmp_path: Path, harm: str):
    weights = publish_run(tmp_path, "x") / "artifact" / "adapter_model.safetensors"
    if harm == "gone":
        weights.unlink()
    else:
        weights.write_text("other")
    for ref in ("sft:x", "sft:latest", str(tmp_path / "sft" / "x")):
        with pytest.raises(CorruptFile, match="is missing" if harm == "gone" else "sha256 differs"):
            resolve(ref, tmp_path)


def test_a_bare_folder(tmp_path: Path):
    with pytest.raises(MissingArtifact, match="neither an adapter nor a model"):
        load_artifact(tmp_path, "here")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_text("w")
    artifact = load_artifact(tmp_path, "here")
    assert (artifact.whole, artifact.base) == (True, Base("here", str(tmp_path), None, artifact.digest))
    (tmp_path / "adapter_config.json").write_text("{}")
    artifact = load_artifact(tmp_path, "here")
    assert (artifact.whole, artifact.base) == (False, None)


def test_a_model_brings_what_files_it_likes(tmp_path: Path):
    """The built-in model has a `manifest.json` of its own, as a downloaded one may."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_text("w")
    (tmp_path / "manifest.json").write_text('{"sha256": {}}')
    artifact = load_artifact(tmp_path, "here")
    assert (artifact.whole, artifact.path, artifact.manifest) == (True, tmp_path, None)


def test_references_and_the_listing_know_the_same_stages():
    assert {*LISTED} - {*WITH_RUNS} == {"registry", "plan"}
