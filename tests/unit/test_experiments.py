"""A user's experiments: `+experiment=NAME`, their place between groups and command line, and errors in their files."""

from __future__ import annotations

from pathlib import Path

import pytest

from align.config.compose import build_config, compose_tree
from align.config.root import Config
from align.core.errors import InputError

GLOBAL = "# @package _global_\n"


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    return tmp_path / "it's my (é) folder" / "conf"


def write_group_file(folder: Path, name: str, text: str) -> Path:
    path = folder / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def build_in_folder(folder: Path, *overrides: str) -> Config:
    return build_config(compose_tree(overrides, folder))


def catch_error(folder: Path, *overrides: str) -> InputError:
    with pytest.raises(InputError) as caught:
        build_in_folder(folder, *overrides)
    assert "\n" not in str(caught.value)
    return caught.value


FULL = f"""{GLOBAL}
defaults:
  - override /stage: reward
  - override /method: lora
  - override /data: jsonl
data:
  path: pairs.jsonl
stage:
  lr: 3e-5
method:
  r: 4
seed: 5
"""


def test_an_experiment_lies_between_groups_and_command_line(mine: Path):
    """`stage=reward` alone overrides data with annotations; the experiment's own override comes before it."""
    write_group_file(mine, "experiment/mine", FULL)
    config = build_in_folder(mine, "+experiment=mine")
    assert (config.stage.name, config.method.name, config.data.name) == ("reward", "lora", "files")
    assert (config.stage.lr, config.method.r, config.seed, config.data.path) == (3e-5, 4, 5, "pairs.jsonl")
    overrides = ("stage=dpo", "method=qlora", "seed=6", "stage.lr=1e-6")
    for arguments in (("+experiment=mine", *overrides), (*overrides, "+experiment=mine")):
        config = build_in_folder(mine, *arguments)
        assert (config.stage.name, config.method.name, config.data.name) == ("dpo", "qlora", "files")
        assert (config.stage.lr, config.method.r, config.seed) == (1e-6, 4, 6)
    assert build_in_folder(mine, "experiment=mine").seed == 5  # as if a primary configuration had the group
    assert build_in_folder(mine, "+experiment='mine'").seed == 5
    assert (
        build_in_folder(mine, "+experiment=mine", "stage=sft", "data=chitchat", "data.path=null").data.name
        == "chitchat"
    )


def test_experiments_build_on_one_another_and_on_own_group_files(mine: Path):
    write_group_file(mine, "data/ours", "defaults:\n  - jsonl\n  - _self_\npath: ours.jsonl\n")
    write_group_file(
        mine, "experiment/base", f"{GLOBAL}defaults:\n  - override /data: ours\nseed: 1\nmethod:\n  r: 4\n"
    )
    write_group_file(mine, "experiment/sub/long", f"{GLOBAL}defaults:\n  - /experiment/base\n  - _self_\nseed: 2\n")
    config = build_in_folder(mine, "stage=sft", "model=pocket", "+experiment=sub/long")
    assert (config.data.path, config.seed, config.method.r) == ("ours.jsonl", 2, 4)
    write_group_file(mine, "experiment/high", f"{GLOBAL}method:\n  r: 64\n")
    config = build_in_folder(mine, "stage=sft", "model=pocket", "+experiment=[base,high]")
    assert (config.data.path, config.seed, config.method.r) == ("ours.jsonl", 1, 64)
    assert build_in_folder(mine, "stage=sft", "model=pocket", "+experiment=[high,base]").method.r == 4


def test_a_value_that_an_experiment_leaves_open_or_sets(mine: Path):
    write_group_file(mine, "experiment/open", f"{GLOBAL}defaults:\n  - override /data: jsonl\ndata:\n  path: ???\n")
    assert catch_error(mine, "stage=sft", "+experiment=open").field == "data.path"
    assert build_in_folder(mine, "stage=sft", "model=pocket", "+experiment=open", "data.path=x").data.path == "x"
    write_group_file(mine, "model/ask", "defaults:\n  - hub\n  - _self_\n")  # leaves the same values open as `hub`
    assert catch_error(mine, "stage=sft", "model=ask").field == "model.path"
    write_group_file(mine, "experiment/says", f"{GLOBAL}defaults:\n  - override /model: ask\nmodel:\n  path: org/x\n")
    assert build_in_folder(mine, "stage=sft", "+experiment=says").model.path == "org/x"


@pytest.mark.parametrize(
    ("text", "problem", "remedy"),
    [
        ("seed: 1\n", "does not say where its keys belong", "Make `# @package _global_` its first line."),
        ("", "does not say where its keys belong", "Make `# @package _global_` its first line."),
        (
            "defaults:\n  - override /stage: sft\n",
            "does not say where its",
            "Make `# @package _global_` its first line.",
        ),
        (
            f"{GLOBAL}defaults:\n  - override method: lora\n",
            "chooses method in another way",
            "`- override /method: NAME`",
        ),
        (f"{GLOBAL}defaults:\n  - /method: lora\n", "chooses method in another way", "`- override /method: NAME`"),
        (
            f"{GLOBAL}defaults:\n  - override /method: nope\n",
            "Could not find 'method/nope'",
            "one of: auto, full, lora,",
        ),
        (f"{GLOBAL}defaults:\n  - override /optimizer: adam\n", "Could not override 'optimizer'", "Correct that file"),
        (f"{GLOBAL}stage:\n  learning_rate: 3\n", "stage.learning_rate is not a key", "mean stage.lr or method.lr?"),
        (f"{GLOBAL}seeds: 3\n", "seeds is not a key", "Did you mean seed?"),
        (f"{GLOBAL}stage:\n  lr: abc\n", "stage.lr: Value 'abc' of type 'str' could not be converted", "Correct that"),
        (f"{GLOBAL}stage: [unclosed\n", "line 3", "Correct that file"),
        (f"{GLOBAL}hydra:\n  run:\n    dir: x\n", "sets hydra.run.dir, which nothing here reads", "Take it out"),
        (f"{GLOBAL}hydra:\n  mode: MULTIRUN\n", "sets hydra.mode, which nothing here reads", "-m sweeps"),
    ],
)
def test_a_broken_experiment_is_named(mine: Path, text: str, problem: str, remedy: str):
    path = write_group_file(mine, "experiment/mine", text)
    error = catch_error(mine, "stage=sft", "+experiment=mine")
    assert (error.field, error.value) == ("configuration", str(path))
    assert problem in error.problem
    assert remedy in error.remedy
    write_group_file(mine, "experiment/mine", f"{GLOBAL}seed: 2\n")
    assert build_in_folder(mine, "stage=sft", "+experiment=mine").seed == 2


def test_what_there_is_is_listed(mine: Path):
    assert "None is there yet: write conf/experiment/mine.yaml." in str(
        catch_error(mine, "stage=sft", "+experiment=mine")
    )
    write_group_file(mine, "experiment/one", f"{GLOBAL}seed: 1\n")
    write_group_file(mine, "experiment/sub/two", f"{GLOBAL}seed: 2\n")
    error = catch_error(mine, "stage=sft", "+experiment=on")
    assert (error.field, error.value) == ("+experiment", "on")
    assert error.remedy == "Did you mean +experiment=one? Choose one of: one, sub/two."
    assert catch_error(mine, "stage=sft", "+experiment=[one,three]").value == "three"


def test_a_stage_is_asked_for(mine: Path):
    write_group_file(mine, "experiment/mine", f"{GLOBAL}stage:\n  lr: 1e-5\n")
    error = catch_error(mine, "+experiment=mine")
    assert (error.field, error.value) == ("stage", "(missing)")
    assert "`- override /stage: NAME`" in error.remedy
    assert build_in_folder(mine, "+experiment=mine", "stage=sft").stage.lr == 1e-5


def test_a_key_of_another_stage_is_explained_by_the_stage_that_the_experiment_chose(mine: Path):
    write_group_file(mine, "experiment/mine", FULL)
    assert "is not a key of stage=reward, but of stage=ppo" in str(
        catch_error(mine, "+experiment=mine", "stage.kl_coef=1")
    )


@pytest.mark.parametrize(
    ("word", "remedy"),
    [
        ("+method=lora", "Write method=lora."),
        ("++experiment=x", "Write +experiment=x."),
        ("~experiment", "Write key=value, with a key that is there already."),
        ("+db=mysql", "Write key=value, with a key that is there already."),
        (
            "hydra.sweep.dir=x",
            "Write run.root= and run.name= for folders, --config-dir for group files, -m for sweeps.",
        ),
        ("hydra/launcher=joblib", "Write run.root= and run.name= for folders, --config-dir for group files"),
    ],
)
def test_other_habits_of_hydras_users(mine: Path, word: str, remedy: str):
    assert remedy in catch_error(mine, "stage=sft", word).remedy


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("seed=1,2", "is not a whole number. Give a whole number. Add -m for a run of each."),
        ("stage.lr=1e-4,2e-4", "is not a number. Give a number. Add -m for a run of each."),
        ("seed=range(0,3)", "Add -m for a run of each."),
        ("stage.packing=true,false", "Add -m for a run of each."),
        ("method=lora,qlora", "is not a choice here. Add -m for a run of each."),
        ("dtype=float32,bfloat16", "Add -m for a run of each."),
    ],
)
def test_a_sweep_without_its_option(mine: Path, word: str, said: str):
    assert said in str(catch_error(mine, "stage=sft", word))


@pytest.mark.parametrize("word", ["seed=1.5", "method=lora,nope", "dtype=float32,nope", "stage.lr=[1,2]"])
def test_what_is_no_sweep_is_not_taken_for_one(mine: Path, word: str):
    assert "-m" not in str(catch_error(mine, "stage=sft", word))
