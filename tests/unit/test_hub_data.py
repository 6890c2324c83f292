"""Data sets of the hub: one file, or a split of a whole data set."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest

from align.core.errors import InputError, StorageError
from align.data.sources import DataSource, build_data_input, read_documents_of_split


def test_a_file_of_a_hub_data_set_is_read_like_one_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub
    from huggingface_hub import errors

    file = tmp_path / "test.jsonl"
    file.write_text('{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}\n')
    requests: list[Any] = []

    def hf_hub_download(repo: str, name: str, *, repo_type: str, revision: str | None) -> str:
        requests.append((repo, name, repo_type, revision))
        if name == "full.jsonl":
            raise OSError(errno.ENOSPC, "No space left on device")
        if name == "none.jsonl":
            raise errors.EntryNotFoundError.__new__(errors.EntryNotFoundError, "no")
        return str(file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    data = DataSource("jsonl", "hub:Anthropic/hh-rlhf@v1/harmless-base/test.jsonl.gz", held_out=0.0)
    assert len(read_documents_of_split(data, "train")) == 1
    assert build_data_input(data).path == data.path
    # The file is downloaded once for both reads.
    assert requests == [("Anthropic/hh-rlhf", "harmless-base/test.jsonl.gz", "dataset", "v1")]
    with pytest.raises(StorageError, match="No space left"):
        read_documents_of_split(DataSource("jsonl", "hub:org/name/full.jsonl"), "train")
    with pytest.raises(InputError, match="has no such file"):
        read_documents_of_split(DataSource("jsonl", "hub:org/name/none.jsonl"), "train")
    with pytest.raises(InputError, match="names no data set"):
        read_documents_of_split(DataSource("jsonl", "hub:org"), "train")


def test_a_whole_data_set_of_the_hub_is_one_split_of_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A local folder stands in for a repository of the hub, which is only asked whether the data set exists."""
    import huggingface_hub

    folder = tmp_path / "own" / "rows"
    (folder / "more").mkdir(parents=True)
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: main\n  default: true\n  data_files: [{split: train, path: a.jsonl}, "
        "{split: test, path: b.jsonl}]\n- config_name: extra\n  data_files: [{split: train, path: more/c.jsonl}]\n---\n"
    )
    for name in ("a.jsonl", "b.jsonl", "more/c.jsonl"):
        (folder / name).write_text(json.dumps({"text": name[-7]}) + "\n")
    requests: list[Any] = []
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda _, repo, **more: requests.append((repo, more)))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for path, text in (("hub:own/rows", "a"), ("hub:own/rows:train", "a"), ("hub:own/rows:extra:train", "c")):
        data = DataSource("jsonl", path)
        assert (path, read_documents_of_split(data, "train")) == (path, [text])
        assert len(build_data_input(data).digest) == 64
    assert requests == [("own/rows", {"revision": None, "timeout": 10})] * 3
    for path, problem in (("hub:own/rows:dev", "Unknown split"), ("hub:own/rows:less:train", "less")):
        with pytest.raises(InputError, match=f"cannot be loaded .*{problem}"):
            read_documents_of_split(DataSource("jsonl", path), "train")
