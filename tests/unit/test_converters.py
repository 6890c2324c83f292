"""Tests of unpacking llama.cpp's converters from a source archive."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from align.core.errors import CorruptFile, InputError
from align.core.outputs import FOLDER_SEAL
from align.export import converters
from align.export.converters import (
    HF,
    LORA,
    convert_model,
    find_converters,
    get_default_folder,
    main,
    unpack_converters,
)

CARRIED = (HF, LORA, "LICENSE", "conversion/base.py", "gguf-py/gguf/__init__.py")


def write_archive(
    path: Path, names: tuple[str, ...] = CARRIED, top: str = "llama_cpp_python-0.3.36/vendor/llama.cpp"
) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name in (*names, "src/llama.cpp", "conversion/notes.md", "../../pyproject.toml"):
            member = tarfile.TarInfo(f"{top}/{name}")
            member.size = len(name)
            tar.addfile(member, io.BytesIO(name.encode()))
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "align" / "llama.cpp"


def test_what_converting_needs_is_unpacked_and_nothing_else(tmp_path: Path, cache: Path, capsys):
    with pytest.raises(InputError, match=r"export\.converters=.*is not there.*python -m align\.export\.converters"):
        find_converters(None)
    assert main([str(write_archive(tmp_path / "a.tar.gz"))]) == 0
    assert capsys.readouterr().out == f"{cache}\n"
    unpacked = {str(path.relative_to(cache)) for path in cache.rglob("*.*") if path.is_file()}
    assert unpacked | {"LICENSE"} == {*CARRIED, FOLDER_SEAL}
    assert find_converters(None) == cache == get_default_folder()
    assert main([str(write_archive(tmp_path / "old.tar.gz", (*CARRIED, "conversion/old.py")))]) == 0
    assert (cache / "conversion" / "old.py").exists()
    (cache / "conversion" / "__pycache__").mkdir()
    (cache / "conversion" / "__pycache__" / "old.pyc").write_text("")
    assert main([str(write_archive(tmp_path / "b.tar.gz"))]) == 0
    assert not (cache / "conversion" / "old.py").exists()  # a file of another version
    assert [path.name for path in cache.parent.iterdir()] == ["llama.cpp"]


def test_the_same_files_without_a_seal_stay(tmp_path: Path, cache: Path):
    unpack_converters(write_archive(tmp_path / "a.tar.gz"), cache)
    (cache / FOLDER_SEAL).unlink()
    unpack_converters(tmp_path / "a.tar.gz", cache)
    assert not (cache / FOLDER_SEAL).exists()
    (cache / HF).write_text("mine")
    with pytest.raises(InputError, match="did not write"):
        unpack_converters(tmp_path / "a.tar.gz", cache)
    assert (cache / HF).read_text() == "mine"


def test_an_archive_that_is_none_leaves_what_was_there(tmp_path: Path, cache: Path, capsys):
    unpack_converters(write_archive(tmp_path / "a.tar.gz"), cache)
    truncated = tmp_path / "half.tar.gz"
    truncated.write_bytes((tmp_path / "a.tar.gz").read_bytes()[:60])
    for bad_archive, problem in (
        (truncated, "cannot be read"),
        (tmp_path / "nowhere.tar.gz", "cannot be read"),
        (write_archive(tmp_path / "old.tar.gz", (HF,)), f"holds no {LORA}"),
        (write_archive(tmp_path / "other.tar.gz", top="other-1/src"), f"holds no {LORA}"),
    ):
        with pytest.raises(CorruptFile, match=problem):
            unpack_converters(bad_archive, cache)
        assert main([str(bad_archive)]) == 2
        assert "archive=" in capsys.readouterr().err
        assert find_converters(None) == cache


def test_it_is_downloaded_in_the_version_that_is_installed(tmp_path: Path, cache: Path, monkeypatch):
    archive_bytes = write_archive(tmp_path / "ready.tar.gz").read_bytes()
    commands = []

    def run_pip(command, **options):
        commands.append(command)
        folder = Path(command[command.index("--dest") + 1])
        (folder / "llama_cpp_python-0.3.30.tar.gz").write_bytes(archive_bytes)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(converters.subprocess, "run", run_pip)
    monkeypatch.setattr(converters.metadata, "version", lambda name: "0.3.30")
    assert main([]) == 0
    assert commands[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert commands[0][-1] == "llama-cpp-python==0.3.30"
    assert find_converters(None) == cache


def test_pip_that_downloads_nothing_is_told_in_its_words(monkeypatch, capsys):
    def run_pip(command, **options):
        return subprocess.CompletedProcess(command, 1, "", "noise\nERROR: No matching distribution found\n")

    monkeypatch.setattr(converters.subprocess, "run", run_pip)
    assert main([]) == 2
    assert "No matching distribution found" in capsys.readouterr().err


def test_a_converter_that_fails_otherwise_is_a_fault_with_its_traceback(tmp_path: Path):
    (tmp_path / HF).write_text("raise OSError('the disk is full')")
    with pytest.raises(RuntimeError, match=r"(?s)ended with status 1.*the disk is full"):
        convert_model(tmp_path, tmp_path, tmp_path / "x.gguf", "x", "f16")
    (tmp_path / HF).write_text("")  # writes nothing
    with pytest.raises(RuntimeError, match="ended with status 0"):
        convert_model(tmp_path, tmp_path, tmp_path / "x.gguf", "x", "f16")
