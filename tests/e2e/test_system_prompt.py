"""The system prompt that a run was trained with is used by the stages that start from it."""

from __future__ import annotations

from pathlib import Path

import pytest
from stage_commands import Ready, Workshop

from align.annotate.store import Store
from align.config.compose import build_config, compose_tree
from align.run import read_manifest
from align.stages import load_stage

PROMPT = "You sell lamps."


@pytest.fixture(scope="module")
def shop(ready: Ready, tiny_model: Path, chats: Path) -> Workshop:
    """Runs, including `sft:lamps`, which was trained with a system prompt."""
    shop = Workshop(ready.root, chats)
    model = ("model=hub", f"model.path={tiny_model}", "data.max_length=160")
    shop.run("sft", *model, f"data.system={PROMPT}", "stage.max_steps=1", "stage.batch_size=8", "run.name=lamps")
    return shop


def test_every_stage_behind_it_asks_with_it(shop: Workshop, ready: Ready):
    evaluated = ["artifact=sft:lamps", *ready.data]
    starts = ["init=sft:lamps", *ready.data]
    commands = {
        "sft": starts,
        "sample": starts,
        "eval": evaluated,
        "export": ["artifact=sft:lamps"],
        "ppo": [*ready.ppo[1:], "init=sft:lamps"],
        "reward": starts,
        "dpo": starts,
    }
    for stage, settings in commands.items():
        for override, expected in ((), PROMPT), (("data.system=",), ""), (("data.system=Own.",), "Own."):
            line = [f"stage={stage}", *settings, f"run.root={shop.root}", *override]
            assert load_stage(stage).inputs(build_config(compose_tree(line))).config.data.system == expected, (
                stage,
                override,
            )
    line = ["stage=sample", "init=sft:s", *ready.data, f"run.root={shop.root}"]
    assert load_stage("sample").inputs(build_config(compose_tree(line))).config.data.system is None


def test_it_is_said_and_written_down_and_people_see_it(shop: Workshop):
    folder = shop.run("sample", "init=sft:lamps", "stage.prompts=2", "stage.candidates=2", "project=lamps")
    assert f"system prompt '{PROMPT}'" in shop.outputs[folder].splitlines()[0]
    assert read_manifest(folder).config["data"]["system"] == PROMPT
    with Store.open(f"sqlite:///{shop.root}/annotations.db") as store:
        first_turns = [item.prompt.messages[0] for item in store.items("lamps")]
    assert [(turn.role, turn.content) for turn in first_turns] == [("system", PROMPT)] * 2
    folder = shop.run(
        "sample", "init=sft:lamps", "stage.prompts=2", "stage.candidates=2", "project=none", "data.system="
    )
    assert "system prompt" not in shop.outputs[folder]
    with Store.open(f"sqlite:///{shop.root}/annotations.db") as store:
        assert all(item.prompt.messages[0].role == "user" for item in store.items("none"))
