"""Odd files of every kind, given to every reader: each is refused at once, by name, as the user's own error."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from fnmatch import fnmatchcase
from importlib.resources import files as files_of_package
from pathlib import Path

import pytest
from model_folders import copy_model
from odd_files import NOT_FILES, as_user, at_once, make_large

from align.__main__ import main
from align.config.root import RunConfig
from align.config.stages import STAGES
from align.core import files
from align.core.errors import CorruptFile, InputError, MissingArtifact
from align.data.clean.quality import read_phrases
from align.data.read.rows import iter_valid_rows
from align.data.sets.forget import load_content_ids
from align.evals.judges.llm_judge import read_template
from align.evals.judges.report import read_report
from align.models.adapters import read_adapter, read_adapter_config, read_tensors
from align.models.base import find_base
from align.models.load import load_tokenizer
from align.registry.gates import read_gates, read_verdict
from align.run import read_json_object, read_manifest
from align.run.alias_log import FILE as ALIASES
from align.run.alias_log import read_alias_log
from align.run.files import as_storage_error
from align.run.signing import load_private_key, load_public_key

Read = Callable[[Path], object]


def load_folder(path: Path) -> None:
    """Load the tokenizer of the folder of a file, as a stage does."""
    load_tokenizer(find_base(str(path.parent)))


SMALL: dict[str, tuple[str, Read]] = {
    "bytes": ("file", lambda path: files.read_bytes(path, "field")),
    "text": ("file", lambda path: files.read_text(path, "field")),
    "json": ("file.json", lambda path: read_json_object(path, "field", "Mend it.")),
    "folder": ("tokenizer.json", lambda path: files.require_readable_folder(path.parent, "field")),
    "manifest": ("manifest.json", lambda path: read_manifest(path.parent)),
    "gate": ("gate.yaml", lambda path: read_gates([path.parent])),
    "private key": ("key.pem", lambda path: load_private_key(str(path), "export.sign")),
    "public key": ("key.pub", lambda path: load_public_key(str(path), "export.verify")),
    "judge's prompt": ("prompt.txt", lambda path: read_template(str(path), "eval.judge.prompt")),
    "phrases": ("phrases.txt", read_phrases),
    "ids": ("ids.txt", lambda path: load_content_ids(str(path))),
    "judge card": ("card.json", read_report),
    "verdict": ("verdict.json", lambda path: read_verdict(path, "source", None)),
    "adapter": ("adapter_config.json", lambda path: read_adapter_config(path.parent)),
    "whole adapter": ("adapter_config.json", lambda path: read_adapter(path.parent)),
}
"""Readers of whole files: reader → the name of its file, and the function that reads it."""
LARGE: dict[str, tuple[str, Read]] = {
    "rows": ("rows.jsonl", lambda path: list(iter_valid_rows(path))),
    "rows of a folder": ("rows.jsonl", lambda path: list(iter_valid_rows(path.parent))),
    "packed rows": ("rows.jsonl.gz", lambda path: list(iter_valid_rows(path))),
    "table": ("rows.csv", lambda path: list(iter_valid_rows(path))),
    "parquet": ("rows.parquet", lambda path: list(iter_valid_rows(path))),
    "adapter's weights": ("adapter_model.safetensors", lambda path: read_tensors(path.parent)),
    "aliases": (ALIASES, lambda path: read_alias_log(path.parent)),
}
"""Readers of files of any size, in the same form."""
READERS = SMALL | LARGE
OF_A_MODEL = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "processor_config.json",
)


@pytest.fixture
def small_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.SIZE_LIMIT, "megabytes", 1.0)


@pytest.mark.parametrize("kind", NOT_FILES)
@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_file_is_refused_at_once(reader: str, kind: str, tmp_path: Path) -> None:
    name, read = READERS[reader]
    make, message = NOT_FILES[kind]
    make(tmp_path / name)
    with at_once(), pytest.raises(InputError, match=message) as refused:
        read(tmp_path / name)
    assert name in str(refused.value) or (reader, kind) == ("rows of a folder", "folder")


@pytest.mark.parametrize("reader", READERS)
def test_a_file_that_may_not_be_read(reader: str, tmp_path: Path) -> None:
    name, read = READERS[reader]
    (tmp_path / name).write_bytes(b"x")
    (tmp_path / name).chmod(0)
    folder = tmp_path
    while folder != folder.parent and not folder.stat().st_mode & 0o001:  # pytest's folders are private
        folder.chmod(folder.stat().st_mode | 0o055)
        folder = folder.parent
    with as_user(), at_once(), pytest.raises(InputError, match="Permission denied"):
        read(tmp_path / name)


@pytest.mark.parametrize("reader", sorted(READERS.keys() - {"folder", "rows of a folder", "gate"}))
def test_a_file_that_is_not_there(reader: str, tmp_path: Path) -> None:
    name, read = READERS[reader]
    if reader == "aliases":
        assert read(tmp_path / name) == read_alias_log(tmp_path)
        return
    with pytest.raises(InputError, match=r"there is no such file|is not there|is neither an id nor a file"):
        read(tmp_path / name)


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff\xfe\x00 not utf-8\n", b"\x80\x81\n", bytes(range(256))],
    ids=("empty", "utf-16", "latin", "binary"),
)
@pytest.mark.parametrize("reader", sorted(READERS.keys() - {"bytes", "folder", "text"}))
def test_what_is_empty_binary_or_in_another_encoding(reader: str, content: bytes, tmp_path: Path) -> None:
    name, read = READERS[reader]
    (tmp_path / name).write_bytes(content)
    may_be_empty = reader in ("aliases", "rows", "rows of a folder") and content == b""
    with at_once(), nullcontext() if may_be_empty else pytest.raises(InputError):
        read(tmp_path / name)


@pytest.mark.parametrize("reader", SMALL)
def test_a_file_that_is_too_large_to_be_read_whole(reader: str, tmp_path: Path, small_limit: None) -> None:
    name, read = SMALL[reader]
    make_large(tmp_path / name)
    with pytest.raises(CorruptFile, match=r"is read up to 1 MiB.*run\.max_file_mb"):
        read(tmp_path / name)


@pytest.mark.parametrize("name", ["rows.json", "trainer_state.json", "notes.txt", "model-00001-of-00001.safetensors"])
def test_the_limit_spares_files_that_no_loader_reads_whole(name: str, tmp_path: Path, small_limit: None) -> None:
    make_large(tmp_path / name)
    files.require_readable_folder(tmp_path, "field")
    make_large(tmp_path / "config.json")
    with pytest.raises(CorruptFile, match=r"config\.json.*has 1\.0 MiB"):
        files.require_readable_folder(tmp_path, "field")


def test_the_limit_covers_every_tokenizer_file_of_transformers() -> None:
    source = Path(str(files_of_package("transformers")))
    texts = (path.read_text(encoding="utf-8") for path in source.glob("**/tokenization_*.py"))
    names = {name for text in texts for name in re.findall(r'_file": "([^"]+)"', text)}
    assert {"vocab.json", "spiece.model", "bpe.codes"} <= names
    loaded = {name for name in names if name.endswith(files.READ_SUFFIXES)}
    assert {name for name in loaded if not any(fnmatchcase(name, pattern) for pattern in files.LOADED_WHOLE)} == set()


def test_a_file_that_states_no_size_is_read_no_further_than_the_limit(tmp_path: Path, small_limit: None) -> None:
    files.SIZE_LIMIT.megabytes = 1e-5  # ten bytes
    (tmp_path / "version").symlink_to("/proc/version")
    assert os.stat(tmp_path / "version").st_size == 0
    with pytest.raises(CorruptFile, match="is read up to"):
        files.read_bytes(tmp_path / "version", "field")


def test_rows_are_read_however_large_their_file_is(tmp_path: Path, small_limit: None) -> None:
    row = json.dumps({"prompt": "a", "completion": "b" * 1000}) + "\n"
    (tmp_path / "rows.jsonl").write_text(row * 2000)
    assert sum(1 for _ in iter_valid_rows(tmp_path / "rows.jsonl")) == 2000


def test_another_file_in_its_place_after_it_was_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe replaces the file between `stat` and `open`: the check of the open descriptor detects it."""
    path = tmp_path / "file"
    path.write_text("text")
    first_stat = os.stat(path)
    path.unlink()
    os.mkfifo(path)
    monkeypatch.setattr(os, "stat", lambda *args, **kwargs: first_stat)
    with at_once(), pytest.raises(files.NotRegularFile, match="is a pipe"):
        files.open_regular(path)


@pytest.mark.parametrize("kind", NOT_FILES)
@pytest.mark.parametrize("name", OF_A_MODEL)
def test_a_file_of_a_model(name: str, kind: str, tiny_model: Path, tmp_path: Path) -> None:
    folder = copy_model(tiny_model, tmp_path)
    (folder / name).unlink(missing_ok=True)
    make, message = NOT_FILES[kind]
    make(folder / name)
    with at_once(), pytest.raises(InputError, match=message) as refused:
        load_folder(folder / name)
    assert name in str(refused.value)


def test_links_to_files_are_followed(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for path in tiny_model.iterdir():
        (folder / path.name).symlink_to(path)
    (tmp_path / "linked").symlink_to(folder)
    assert find_base(str(tmp_path / "linked")).digest == find_base(str(tiny_model)).digest


def test_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files.parse_user_path("~/runs", "field") == tmp_path / "runs"
    for path, message in {
        "~no_such_user/x": "names the home folder of a user that this machine does not have",
        "x/" * 2000: "goes through 2,000 folders",
        "x" * 256: "File name too long",
        "\0": "embedded null byte",
        "/".join(["x" * 200] * 21): "File name too long",
        "\ud800": "is not text in UTF-8",
    }.items():
        with pytest.raises(InputError, match=message) as refused:
            files.parse_user_path(path, "field")
        assert len(str(refused.value)) < 400
    assert files.parse_user_path("x/" * 199, "field").parts
    with pytest.raises(InputError, match=r"^run\.root=~no_such_user"):
        RunConfig(root="~no_such_user/x")


def test_what_no_reader_saw_is_still_the_users() -> None:
    for number in (errno.EIO, errno.ELOOP, errno.ENAMETOOLONG):
        error = as_storage_error(OSError(number, os.strerror(number), "some.json"), "runs")
        assert "some.json" in str(error)
    assert as_storage_error(files.NotRegularFile("pipe", "is a pipe"), "runs") is not None
    assert as_storage_error(OSError(errno.EINVAL, "ours"), "runs") is None
    assert isinstance(
        files.build_read_error(FileNotFoundError(errno.ENOENT, "x"), Path("a"), "field", "Do."), MissingArtifact
    )


# Every stage


def iter_command_lines(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield each stage with a command line that has to read a pipe."""
    root = f"run.root={folder}/runs"
    pipe = folder / "pipe.jsonl"
    model = f"model=hub model.path={folder}/model"
    yield "data", f"stage=data data=jsonl data.path={pipe} {root}"
    yield "sft", f"stage=sft {model} data=jsonl data.path={folder}/rows.jsonl {root}"
    yield "full", f"stage=full model=pocket data=jsonl data.path={pipe} {root}"
    yield "sample", f"stage=sample init=base {model} {root}"
    yield "annotate", f"stage=annotate stage.action=import stage.path={pipe} {root}"
    yield "reward", f"stage=reward init=sft:latest {root}"
    yield "ppo", f"stage=ppo init={folder}/adapter {root}"
    yield "dpo", f"stage=dpo init=sft:latest {root}"
    yield "kto", f"stage=kto init=base model=pocket data=jsonl data.path={pipe} {root}"
    yield "eval", f"stage=eval artifact=sft:latest {root}"
    yield "export", f"stage=export artifact={folder}/model {root}"
    yield "serve", f"stage=serve model=pocket stage.keys={pipe} {root}"
    yield "verify", f"stage=verify {model} {root}"
    yield "registry", f"stage=registry stage.action=replay stage.run=sft:one {root}"
    yield "plan", f"stage=plan stage.of=sft {model} {root}"


def test_no_stage_waits_for_a_pipe(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = copy_model(tiny_model, tmp_path)
    for name in ("tokenizer_config.json", "generation_config.json"):
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)
    (tmp_path / "runs" / "sft" / "one").mkdir(parents=True)
    os.mkfifo(tmp_path / "runs" / "sft" / "one" / "manifest.json")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    os.mkfifo(tmp_path / "adapter" / "adapter_model.safetensors")
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    command_lines = dict(iter_command_lines(tmp_path))
    assert command_lines.keys() == STAGES.keys()
    monkeypatch.chdir(tmp_path)
    for stage, line in command_lines.items():
        with at_once():
            status = main(line.split())
        output = "".join(capfd.readouterr())
        assert (status, "Traceback" in output) == (2, False), f"{stage}: {output}"
        assert "is a pipe (FIFO), not a file" in output, f"{stage}: {output}"
