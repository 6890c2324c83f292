"""Training on two ranks is that of one process, to the bit except for shards, and resumes if a rank is killed."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import Forks
from rank_processes import NO_CODE, start_ranks
from safetensors.torch import load_file
from stage_commands import Ready

from align.run import read_manifest
from align.track import read_rows

pytestmark = pytest.mark.slow
PACE = (
    "stage.batch_size=8",
    "stage.micro_batch=4",
    "stage.log_every=1",
    "stage.save_every=1",
    "stage.lr=1e-2",
    "stage.epochs=2",
    "device=cpu",
    "ddp_timeout=120",
)
SHARDS = ("stage.batch_size=12", "stage.micro_batch=2", "stage.lr=1e-3", "stage.eval_every=2", "stage.publish=best")
READS_NOTHING = "from align.models import sharded\nsharded.load_base = None"
NOTES_SEEDS = """
import torch
from align.trainers.multi_rank import MultiRankTrainer

share = MultiRankTrainer.compute_share

def noted(self, *given):
    with open({path!r}, "a") as file:
        print(torch.initial_seed(), file=file)
    return share(self, *given)

MultiRankTrainer.compute_share = noted
"""
VOTES = ("data.allow_simulated=true", "stage.held_out=0.3")


class Ranked:
    """Commands on ranks in one root.

    Attributes:
        stages: stage → the words of its command.
    """

    def __init__(self, forks: Forks, ready: Ready, model: Path, cwd: Path) -> None:
        self.forks = forks
        self.root = ready.root
        self.cwd = cwd
        learn = (f"model.path={model}", "model=hub", *ready.data, *PACE, "stage.eval_size=5")
        voted = (*PACE, *VOTES, "init=sft:s")
        self.stages = {"sft": learn, "full": learn, "reward": voted, "dpo": voted, "kto": voted}

    def words(self, stage: str, name: str, *more: str) -> list[str]:
        return [f"stage={stage}", *self.stages[stage], *more, f"run.name={name}", f"run.root={self.root}"]

    def run(self, world: int, stage: str, name: str, *more: str, first: Mapping[int, str] = NO_CODE) -> Path:
        """Run a stage that must succeed, and return the run's folder.

        Args:
            first: rank → Python that it runs before.
        """
        words = self.words(stage, name, *more)
        results = [child.wait() for child in start_ranks(self.forks, self.cwd, *words, world=world, more=first)]
        assert [result.status for result in results] == [0] * world, [result.err for result in results]
        assert results[0].folder == str(self.root / stage / name)
        assert not any(result.out for result in results[1:])
        return self.root / stage / name

    def kill_rank(self, world: int, stage: str, name: str, *more: str, rank: int, after: int) -> None:
        """Kill a rank once `after` steps are logged. The other ranks end with status 1."""
        children = start_ranks(self.forks, self.cwd, *self.words(stage, name, *more), world=world)
        rows = self.root / stage / name / "metrics.jsonl"
        while not rows.exists() or len(read_rows(rows)) < after:
            assert children[0].poll() is None, children[0].wait()
            time.sleep(0.005)
        os.kill(children[rank].pid, signal.SIGKILL)
        assert children[rank].wait().status == -signal.SIGKILL
        assert all(child.wait(60).status == 1 for child in children if child is not children[rank])


@pytest.fixture(scope="module")
def ranked(forks: Forks, ready: Ready, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Ranked:
    return Ranked(forks, ready, tiny_model, tmp_path_factory.mktemp("cwd"))


def load_tensors(folder: Path) -> dict[str, torch.Tensor]:
    (path,) = (folder / "artifact").glob("*.safetensors")
    return load_file(path)


def assert_same_run(first_run: Path, second_run: Path) -> None:
    """Assert that metrics and weights are the same to the bit."""
    assert read_rows(first_run / "metrics.jsonl") == read_rows(second_run / "metrics.jsonl")
    tensors_by_run = load_tensors(first_run), load_tensors(second_run)
    assert tensors_by_run[0].keys() == tensors_by_run[1].keys()
    assert all(torch.equal(tensors_by_run[0][name], tensors_by_run[1][name]) for name in tensors_by_run[0])
    figures: list[dict[str, Any]] = [dict(read_manifest(folder).metrics) for folder in (first_run, second_run)]
    for metrics in figures:
        # These depend on how many micro-batches a rank adds up.
        del metrics["peak_rss_mb"], metrics["predicted_peak_mb"]
    assert figures[0] == figures[1]


@pytest.mark.parametrize(
    ("stage", "more"),
    [
        # At this rate it breaks down half-way, so the best step is not the last one.
        ("sft", ("stage.eval_every=1", "stage.publish=best", "stage.lr=30", "stage.schedule=constant")),
        ("sft", ("stage.packing=true", "stage.micro_batch=2", "stage.batch_size=4", "data.max_length=48")),
        ("reward", ("data=annotations", "data.path=null")),
        ("dpo", ("data=annotations", "stage.eval_every=2")),
        ("dpo", ("data=annotations", "stage.loss=simpo")),
        ("kto", ("data=annotations", "stage.eval_every=2")),
    ],
)
def test_two_ranks_make_what_one_process_makes(ranked: Ranked, stage: str, more: tuple[str, ...]):
    label = "-".join(word.split("=")[0].rpartition(".")[2] for word in more[:2]).replace("_", "-")
    single = ranked.run(1, stage, f"one-{label}", *more)
    two_ranks = ranked.run(2, stage, f"two-{label}", *more)
    assert_same_run(single, two_ranks)
    assert read_manifest(two_ranks).hardware["world_size"] == 2
    if "stage.publish=best" in more:
        assert read_manifest(single).metrics["published_step"] < read_manifest(single).metrics["steps"]


@pytest.fixture(scope="module")
def in_shards(ranked: Ranked) -> tuple[Path, Path]:
    """Train every weight by one process and by two ranks, in steps of three micro-batches and a last one of one.

    The second rank cannot read weights, and gets its shards from the first.
    """
    single = ranked.run(1, "full", "one", *SHARDS)
    return single, ranked.run(2, "full", "two", *SHARDS, first={1: READS_NOTHING})


def assert_close_runs(first_run: Path, second_run: Path) -> None:
    """Assert that all losses agree within 1e-6, and that both runs have the same files."""
    for rows in zip(*(read_rows(folder / "metrics.jsonl") for folder in (first_run, second_run)), strict=True):
        assert rows[0].keys() == rows[1].keys()
        for name in {"loss", "held_out_loss", "accuracy", "lr"} & rows[0].keys():
            assert rows[1][name] == pytest.approx(rows[0][name], rel=1e-6), name
        assert rows[1]["grad_norm"] == pytest.approx(rows[0]["grad_norm"], rel=1e-4)  # a sum of squares in fp32
    tensors_by_run = load_tensors(first_run), load_tensors(second_run)
    assert {n: (t.shape, t.dtype) for n, t in tensors_by_run[0].items()} == {
        n: (t.shape, t.dtype) for n, t in tensors_by_run[1].items()
    }
    assert max(float((t - tensors_by_run[1][name]).abs().max()) for name, t in tensors_by_run[0].items()) < 1e-4
    assert {p.name for p in (first_run / "artifact").iterdir()} == {p.name for p in (second_run / "artifact").iterdir()}
    configs = [json.loads((folder / "artifact" / "config.json").read_text()) for folder in (first_run, second_run)]
    assert configs[0] == configs[1]
    for key in ("loss_before", "loss_after"):
        figures = [read_manifest(folder).metrics[key] for folder in (first_run, second_run)]
        assert figures[1] == pytest.approx(figures[0], rel=1e-6)


def test_every_weight_in_shards_has_the_losses_of_one_process(in_shards: tuple[Path, Path]):
    assert_close_runs(*in_shards)


@pytest.mark.parametrize(("stage", "before", "rank", "after"), [("sft", 2, 1, 1), ("dpo", 1, 0, 2)])
def test_a_killed_run_goes_on_to_the_bit_on_another_number_of_ranks(
    ranked: Ranked, stage: str, before: int, rank: int, after: int
):
    more = ("data=annotations",) if stage == "dpo" else ()
    uninterrupted = ranked.run(1, stage, "whole", *more)
    ranked.kill_rank(before, stage, "killed", *more, rank=rank, after=2)
    assert_same_run(uninterrupted, ranked.run(after, stage, "killed", *more))


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_shards_are_continued_on_another_number_of_ranks(
    ranked: Ranked, in_shards: tuple[Path, Path], before: int, after: int
):
    ranked.kill_rank(before, "full", f"killed-on-{before}", *SHARDS, rank=0, after=3)
    assert_close_runs(in_shards[0], ranked.run(after, "full", f"killed-on-{before}", *SHARDS))


def test_dropout_on_ranks_is_the_same_once_continued(ranked: Ranked):
    more = ("method.dropout=0.2",)
    uninterrupted = ranked.run(2, "sft", "dropping", *more)
    ranked.kill_rank(2, "sft", "dropping-killed", *more, rank=1, after=2)
    assert_same_run(uninterrupted, ranked.run(2, "sft", "dropping-killed", *more))


def test_each_micro_batch_draws_dropout_by_its_place_whichever_rank_computes_it(ranked: Ranked, tmp_path: Path):
    more = ("method.dropout=0.2", "stage.batch_size=12", "stage.micro_batch=2", "stage.max_steps=2")
    seeds: dict[int, list[str]] = {}
    for world in (2, 3):
        path = tmp_path / f"seeds-{world}"
        notes = dict.fromkeys(range(world), NOTES_SEEDS.format(path=str(path)))
        ranked.run(world, "sft", f"seeds-{world}", *more, first=notes)
        seeds[world] = sorted(path.read_text().splitlines())
    assert len(seeds[2]) == len(set(seeds[2])) == 12  # two steps of six micro-batches
    assert seeds[3] == seeds[2]
