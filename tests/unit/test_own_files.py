"""Refusals to replace a file that align did not make."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from odd_files import NOT_FILES, at_once
from run_folders import BASE

from align.core.errors import InputError
from align.report.page import Report
from align.run import Run


def build_page(text: str = "text") -> Report:
    return Report("title").text(text)


def test_a_page_replaces_pages_of_its_kind_alone(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    build_page().write(path, "stage.html")
    first = path.read_bytes()
    build_page("another text").write(path, "stage.html")
    assert first != path.read_bytes()
    path.write_bytes(first.replace(b"title", b"my own title"))  # edited by the user
    edited = path.read_bytes()
    with pytest.raises(InputError, match=r"stage\.html=.*that align did not write, or that was edited since"):
        build_page().write(path, "stage.html")
    assert path.read_bytes() == edited
    assert os.listdir(tmp_path) == ["page.html"]


@pytest.mark.parametrize("content", [b"", b"{}", b"<html></html>", b"\xff\x00", build_page().html().encode()])
def test_a_page_replaces_no_file_of_others(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match="did not write"):
        build_page().write(path, "stage.html")
    (tmp_path / "link.html").symlink_to(path)
    with pytest.raises(InputError, match="did not write"):
        build_page().write(tmp_path / "link.html", "stage.html")
    assert path.read_bytes() == content


def open_run(root: Path) -> Run:
    config = {"stage": {"name": "sft"}, "run": {"root": str(root), "name": "mine"}, "seed": 0, "data": {}, "method": {}}
    return Run.open(config, {}, BASE, "label")


def test_a_run_takes_no_folder_with_files_of_others(tmp_path: Path) -> None:
    folder = tmp_path / "sft" / "mine"
    folder.mkdir(parents=True)
    for name in ("config.yaml", "notes.txt", "artifact"):
        (folder / name).write_text("mine")
    with pytest.raises(InputError, match=r"run\.name=mine: .*holds files that no run wrote \(artifact, config\.yaml, "):
        open_run(tmp_path)
    assert (folder / "config.yaml").read_text() == "mine"
    assert sorted(os.listdir(folder)) == ["artifact", "config.yaml", "notes.txt"]


@pytest.mark.parametrize("kind", NOT_FILES)
def test_a_run_replaces_no_odd_manifest(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "sft" / "mine"
    folder.mkdir(parents=True)
    make, message = NOT_FILES[kind]
    make(folder / "manifest.json")
    with at_once(), pytest.raises(InputError, match=message):
        open_run(tmp_path)


def test_a_run_that_was_killed_at_any_moment_of_its_beginning_is_continued(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        pass  # killed before it began
    with open_run(tmp_path) as run:
        (run.folder / ".manifest.json.tmp").write_text("{")  # killed as it wrote its manifest
    with open_run(tmp_path) as run:
        run.begin("stage: sft\n")
    (run.folder / "config.yaml").unlink()  # killed after it wrote its manifest
    with open_run(tmp_path) as run:
        assert run.resumed
