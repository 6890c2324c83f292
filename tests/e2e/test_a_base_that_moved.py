"""A base is loaded from any working folder, and an error about a missing base names the remedy."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from stage_commands import SFT, Workshop

from align.run import read_manifest

pytestmark = pytest.mark.usefixtures("no_network")
SMALL = ("stage.max_steps=1", "stage.eval_size=2")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, chats: Path) -> Path:
    """A folder with `my llama` in it, and a run that named it from there."""
    work = tmp_path_factory.mktemp("work")
    shutil.copytree(tiny_model, work / "my llama")
    shutil.copy(chats, work / "chats.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work)
        shop = Workshop(Path("runs"), Path("chats.jsonl"))
        shop.run("sft", "model=hub", "model.path=my llama", *SFT, *SMALL, "run.name=a")
    return work


@pytest.fixture
def shop(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Workshop]:
    """Another working folder, with the runs by their absolute path. The base is moved back after each test."""
    monkeypatch.chdir(tmp_path)
    yield Workshop(work / "runs", work / "chats.jsonl")
    if (moved := tmp_path / "elsewhere").is_dir():
        moved.rename(work / "my llama")


def test_it_is_found_from_another_working_folder(shop: Workshop, work: Path) -> None:
    manifest = read_manifest(work / "runs" / "sft" / "a")
    assert manifest.base is not None
    assert (manifest.base.id, manifest.base.path) == ("my llama", str(work / "my llama"))
    shop.run("export", "artifact=sft:a")


def test_a_base_that_is_gone_is_named_with_the_remedy(shop: Workshop, work: Path, tmp_path: Path) -> None:
    (work / "my llama").rename(tmp_path / "elsewhere")
    for command in (["stage=export", "artifact=sft:a"], ["stage=sample", "init=sft:a", *shop.data_words]):
        shop.refuses(
            *command,
            "resume=never",
            says=(f"its base my llama is not in {work / 'my llama'} any more", "model=hub model.path=FOLDER"),
        )
    shop.run("export", "artifact=sft:a", "model=hub", "model.path=elsewhere", "resume=never")
    shop.refuses("stage=export", "artifact=sft:a", "model=pocket", says="was trained on my llama")


def test_the_same_command_from_another_folder_is_the_same_run(shop: Workshop, work: Path) -> None:
    """A manifest identifies the base by its digest, so another spelling of its path is the same run."""
    shop.run("sft", "model=hub", f"model.path={work / 'my llama'}", *SFT, *SMALL, "run.name=a")
    assert "finished already" in shop.output
