"""Every choice in `conf/` composes with every stage, and every command line of a recipe parses."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

import pytest

from align.__main__ import STAGES
from align.config.compose import build_config, compose_tree
from align.config.group_files import find_conf_dir

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "recipes").glob("*/*.sh"))
CHOICES = {
    group.name: sorted(p.stem for p in group.glob("*.yaml"))
    for group in sorted(find_conf_dir().iterdir())
    if group.is_dir()
}
# What a choice needs to be complete, and the pairs that a stage refuses on purpose.
NEEDS = {
    ("model", "hub"): ["model.path=org/name"],
    ("data", "files"): ["data.path=a.jsonl", "model=pocket"],
    ("data", "jsonl"): ["data.path=a.jsonl", "model=pocket"],
    ("data", "manifest"): ["data.path=data:latest", "model=pocket"],
    ("data", "reasoning_gym"): ["data.tasks=[gcd]", "model=pocket"],
    ("reward", "fn"): ["reward.fn=package.module:name"],
    ("reward", "rules"): ["reward.rules=[{rule: sentiment}]"],
    ("reward", "ensemble"): ["reward.refs=['reward:a','reward:b']"],
    ("reward", "sum"): ["reward.parts=[{name: rules, rules: [{rule: json}]}]"],
    ("export", "check"): ["export.path=runs/export/a"],
}
REFUSED = {
    "data": {("data", "annotations"), ("data", "manifest"), ("data", "reasoning_gym")},
    "sft": {("method", "full"), ("data", "annotations")},
    "full": {("method", "auto"), ("method", "qlora"), ("method", "lora"), ("data", "annotations")},
    "reward": {("data", "chitchat"), ("data", "reasoning_gym"), ("method", "full")},
    "dpo": {("data", "chitchat"), ("data", "reasoning_gym"), ("method", "full")},
    "kto": {("data", "chitchat"), ("data", "reasoning_gym"), ("method", "full")},
}


def iter_choices() -> Iterator[tuple[str, dict[str, str]]]:
    """Yield (stage, group → choice) until every stage had every choice of every group.

    Groups advance together, as the composition of all combinations takes too long.
    """
    for stage in CHOICES["stage"]:
        columns = {
            group: [choice for choice in choices if (group, choice) not in REFUSED.get(stage, set())]
            for group, choices in CHOICES.items()
            if group != "stage"
        }
        for row in zip_longest(*columns.values()):
            yield stage, {group: choice for group, choice in zip(columns, row, strict=True) if choice is not None}


@pytest.mark.parametrize(("stage", "chosen"), [*iter_choices()])
def test_choices_with_a_stage(stage: str, chosen: dict[str, str]):
    overrides = dict(word.split("=", 1) for pair in chosen.items() for word in NEEDS.get(pair, []))
    overrides |= {"stage": stage, **chosen}
    if stage == "data" and chosen.get("data") not in ("files", "jsonl"):
        overrides["stage.sources"] = "[a.jsonl]"
    if stage == "data" and "reward" in chosen:
        overrides["stage.score.by"] = "reward"
    config = build_config(compose_tree([f"{key}={value}" for key, value in overrides.items()]))
    assert config.stage.name == ("ppo" if stage == "plan" else stage)  # the stage that is planned
    for group, choice in chosen.items():
        name = "files" if choice == "jsonl" else choice  # an alias
        assert getattr(getattr(config, group), "name", name) == name


def test_every_listed_stage_has_a_configuration_and_every_configuration_is_listed():
    assert set(STAGES) == set(CHOICES["stage"])


# A stub for `python` and `align`: it records each call on a line, its arguments separated by 0x1f. The lines that
# `align -` reads are recorded as calls, their quotation included. A program of `-c` prints 1.
STUB = """#!/usr/bin/env bash
if [ "${!#}" = - ]; then sed 's/^/-\\x1f/; s/$/\\x1f/'
else printf '%s\\x1f' "$(basename "$0")" "$@"; echo; fi >> "$RECORD"
[ "$1" != -c ] || echo 1
"""


def collect_commands(script: Path, folder: Path) -> list[list[str]]:
    """Run a shell script with stubs in place of Python, and return the arguments of its calls of `align`."""
    bin_folder = folder / "bin"
    record = folder / "record"
    bin_folder.mkdir()
    for name in ("python", "python3", "align", "pip"):
        (bin_folder / name).write_text(STUB, encoding="utf-8")
        (bin_folder / name).chmod(0o755)
    environment = {"PATH": f"{bin_folder}:/usr/bin:/bin", "HOME": str(folder), "RECORD": str(record)}
    subprocess.run(["bash", str(script)], cwd=folder, env=environment, check=True, capture_output=True, timeout=60)
    calls = [line.split("\x1f")[:-1] for line in record.read_text(encoding="utf-8").splitlines()]
    calls = [["align", *shlex.split(call[1])] if call[0] == "-" else call for call in calls]
    return [
        call[3:] if call[1:3] == ["-m", "align"] else call[1:] for call in calls if "align" in (call[0], *call[2:3])
    ]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: f"{s.parent.name}/{s.name}")
def test_every_command_of_a_recipe(script: Path, tmp_path: Path):
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes", ignore=shutil.ignore_patterns("*.safetensors"))
    commands = collect_commands(tmp_path / script.relative_to(ROOT), tmp_path)
    assert commands
    for arguments in commands:
        config = build_config(compose_tree(arguments))
        assert config.stage is not None, arguments


def test_the_reader_of_scripts(tmp_path: Path):
    script = tmp_path / "x.sh"
    script.write_text(
        """#!/usr/bin/env bash
# align stage=none
build=${1:-runs/a b}
align=(python -m align seed=3)
[ -d x ] || python recipes/x.py
python -m align stage=full \\
  "model.path=$build/start" run.name=x  # why
for seed in 0 1; do align stage=ppo "seed=$seed" "$@" > log; done
"${align[@]}" stage=eval
python -m align - <<LINES
stage=export 'run.root=$build'
LINES
""",
        encoding="utf-8",
    )
    assert collect_commands(script, tmp_path) == [
        ["stage=full", "model.path=runs/a b/start", "run.name=x"],
        ["stage=ppo", "seed=0"],
        ["stage=ppo", "seed=1"],
        ["seed=3", "stage=eval"],
        ["stage=export", "run.root=runs/a b"],
    ]
