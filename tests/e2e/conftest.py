"""Fixtures of end-to-end tests: runs up to a reward model, evaluations, servers and stores with votes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import Forks, run_fork_server
from serving import Server, run_serve_stage, write_adapters
from shared_folders import MadeOnce
from stage_commands import Ready
from suite_evaluations import RuleEvaluations
from vote_data import build_data_command, open_filled_store

from align.__main__ import main
from align.annotate.store import Store


@pytest.fixture(autouse=True, scope="module")
def plots_unless_reports_are_tested(request: pytest.FixtureRequest) -> None:
    if request.module.__name__ != "test_reports":
        request.getfixturevalue("blank_plots")


@pytest.fixture(scope="module")
def ready(made: Ready, tmp_path_factory: pytest.TempPathFactory) -> Ready:
    """A copy of the runs for one module. Copy a run before changing it, and give new runs new names."""
    # If modules shared one root, a run of one module would be the latest of its stage for another.
    return made._replace(root=Path(shutil.copytree(made.root, tmp_path_factory.mktemp("ready") / "runs")))


@pytest.fixture(scope="session")
def made(made_once: MadeOnce, tiny_model: Path, chats: Path) -> Ready:
    """Runs of SFT, sampling, annotation and two reward models, shared by all modules. Do not change them."""
    data = ["data=jsonl", f"data.path={chats}", "data.held_out=0.25", "data.max_length=128"]
    reward = ["stage=reward", "data.allow_simulated=true", "stage.batch_size=8", "stage.held_out=0.3"]
    sft = ["stage=sft", "model=hub", f"model.path={tiny_model}", "stage.max_steps=2", "stage.eval_size=2"]

    def run(folder: Path) -> None:
        for line in (
            [*sft, *data, "run.name=s"],
            ["stage=sample", *data, "stage.prompts=24"],
            ["stage=annotate", "stage.action=simulate"],
            [*reward, "run.name=a"],
            [*reward, "run.name=b", "seed=1"],
        ):
            assert main([*line, f"run.root={folder}", "rollout.max_new_tokens=12"]) == 0

    root = made_once("runs", run)
    ppo = [
        *("stage=ppo", "stage.updates=2", "stage.batch_size=8", "stage.micro_batch=4", "stage.normalise_on=16"),
        *("rollout.max_new_tokens=12", "init=sft:s", "reward.ref=reward:a", *data),
    ]
    return Ready(root, ppo, data)


@pytest.fixture(scope="session")
def trained_by_ppo(made_once: MadeOnce, made: Ready) -> Path:
    """A PPO run that starts from the runs of `made`. Do not change it."""

    def run(folder: Path) -> None:
        root = shutil.copytree(made.root, folder / "runs")
        assert main([*made.ppo, "run.name=p", f"run.root={root}"]) == 0

    return made_once("ppo", run) / "runs" / "ppo" / "p"


@pytest.fixture
def bench(ready: Ready, trained_by_ppo: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> RuleEvaluations:
    """Evaluations of an SFT artifact and a PPO artifact."""
    if not (ready.root / "ppo" / "p").exists():
        shutil.copytree(trained_by_ppo, ready.root / "ppo" / "p")
    capsys.readouterr()
    return RuleEvaluations(ready, tmp_path, capsys)


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    """A server that starts commands in forks, which need not import torch again."""
    with run_fork_server() as forks:
        yield forks


@pytest.fixture(scope="session")
def adapter_server(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with adapters, shared by tests of several modules. A test unloads the adapters that it loads."""
    folder = tmp_path_factory.mktemp("serve")
    adapters_path = write_adapters(folder / "adapters", "one", "two", "tools", "spoilt", "third", "fourth")
    names = ", ".join(f"{name}: {adapters_path / name}" for name in ("one", "two", "tools"))
    arguments = ("model=pocket", "method=lora", f"stage.roots=[{adapters_path}]")
    with run_serve_stage(
        forks, folder, *arguments, f"stage.adapters={{{names}, mix: {{one: 0.5, two: 0.5}}}}"
    ) as server:
        yield server


@pytest.fixture
def vote_store(store_url: str) -> Iterator[Store]:
    """A store with the votes of `vote_data`."""
    with open_filled_store(store_url) as store:
        yield store


@pytest.fixture
def words(tmp_path: Path, store_url: str) -> list[str]:
    """The command that builds a data set from the votes and a file."""
    return build_data_command(tmp_path, store_url)
