"""What end-to-end tests of PPO share: runs up to a reward model, and a command line that works on them."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest

from align.__main__ import main


class Ready(NamedTuple):
    """Attributes:
    root: runs of `sft`, `sample`, `annotate` and two of `reward`, named `a` and `b`.
    ppo: the words of a command that trains on them in a second or two; later words override.
    data: the words that name the data.
    """

    root: Path
    ppo: list[str]
    data: list[str]


@pytest.fixture(scope="session")
def ready(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, chats: Path) -> Ready:
    """Shared: copy the runs before changing them, and give runs of your own a name of your own."""
    root = tmp_path_factory.mktemp("ready") / "runs"
    data = ["data=jsonl", f"data.path={chats}", "data.held_out=0.25", "data.max_length=128"]
    reward = ["stage=reward", "data.allow_simulated=true", "stage.batch_size=8", "stage.held_out=0.3"]
    sft = ["stage=sft", "model=hub", f"model.path={tiny_model}", "stage.max_steps=2", "stage.eval_size=2"]
    for line in (
        [*sft, *data, "run.name=s"],
        ["stage=sample", *data, "stage.prompts=24"],
        ["stage=annotate"],
        [*reward, "run.name=a"],
        [*reward, "run.name=b", "seed=1"],
    ):
        assert main([*line, f"run.root={root}", "rollout.max_new_tokens=12"]) == 0
    ppo = [
        *("stage=ppo", "stage.updates=2", "stage.batch_size=8", "stage.micro_batch=4", "stage.normalise_on=16"),
        *("rollout.max_new_tokens=12", "init=sft:s", "reward.ref=reward:a", *data),
    ]
    return Ready(root, ppo, data)
