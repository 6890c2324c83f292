"""Ranks other than the first compare bytes of adapters and code before they load them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from run_folders import BASE, publish_run

from align import ranks
from align.config.root import Config
from align.core.errors import CorruptFile, InputError
from align.models.adapters import list_adapter_files
from align.ranks import RankInfo
from align.run import Input, Manifest, load_artifact
from align.run.digests import HASHED, require_same_bytes
from align.stages.worker_rank import StartedRun, require_same_code_and_weights


@pytest.fixture(autouse=True)
def nothing_hashed() -> Iterator[None]:
    HASHED.clear()
    yield
    HASHED.clear()


def build_started_run(root: Path, adapter: Path) -> StartedRun:
    """Build the message of the first rank to the others about a run that reads an adapter."""
    digest = load_artifact(adapter, "sft:one").digest
    inputs = {"init": Input(digest, "sft:one", str(adapter), "sft", "one", whole=False)}
    manifest = Manifest("ppo", "x", 0, {}, inputs, BASE)
    HASHED.clear()  # each rank is a separate process
    return StartedRun(Config(), root, manifest, False, ())


@pytest.mark.parametrize("local_rank", [1, 7])
def test_every_rank_compares_the_adapter_that_it_loads(
    local_rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "_here", RankInfo(local_rank, 8, local_rank, None))
    adapter = publish_run(tmp_path, "one") / "artifact"
    started = build_started_run(tmp_path, adapter)
    require_same_code_and_weights(started)
    with require_same_bytes(list_adapter_files(adapter), "adapter", "sft:one"):
        pass
    (adapter / "adapter_model.safetensors").write_text("x")
    with (
        pytest.raises(CorruptFile, match="changed after it was hashed"),
        require_same_bytes(list_adapter_files(adapter), "adapter", "sft:one"),
    ):
        pytest.fail("it was loaded")
    with pytest.raises(InputError, match=rf"^init=sft:one: rank {local_rank}: is not the file that was published"):
        require_same_code_and_weights(started)


def test_the_first_rank_of_a_machine_compares_code_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "_here", RankInfo(8, 16, 0, None))
    started = build_started_run(tmp_path, publish_run(tmp_path, "one") / "artifact")
    with pytest.raises(InputError, match="rank 8 runs other code than rank 0"):
        require_same_code_and_weights(started)
