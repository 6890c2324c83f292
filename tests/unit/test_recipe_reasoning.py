"""`recipes/reasoning`: TRL gets align's prompts in align's order, and the comparison finds the bars that are missed."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from align.__main__ import main as run_align
from align.config.compose import build_config, compose_tree
from align.config.ppo import PpoConfig
from align.core.types import Conversation, Message
from align.data.sources import DataSource, read_divided_prompts
from align.ppo.rollouts import select_prompts

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "reasoning"
COMPARE = runpy.run_path(str(RECIPE / "compare.py"))
TRAIN = runpy.run_path(str(RECIPE / "train_with_trl.py"))


def build_row(seed: int, align: float, trl: float, as_many: float, **changes: Any) -> dict[str, Any]:
    shares = {"start": 0.3, "align": align, "trl": trl, "as-many": as_many}
    return {
        "seed": seed,
        "commonest": 0.01,
        "right": {name: {"value": share, "low": share - 0.1, "high": share + 0.1} for name, share in shares.items()},
        "minutes": {"align": 14.0, "trl": 15.5},
        "updates": {"align": 40, "trl": 6},
        **changes,
    }


CLEAR = [build_row(0, 0.6, 0.4, 0.41), build_row(1, 0.62, 0.4, 0.40), build_row(2, 0.61, 0.4, 0.42)]


def test_differences_over_seeds_have_students_interval() -> None:
    pooled = COMPARE["pool_differences"](CLEAR)
    assert pooled["align"]["value"] == pytest.approx(0.21)
    assert pooled["align"]["low"] == pytest.approx(0.21 - 4.302653 * 0.01 / 3**0.5)  # t of 2 degrees of freedom
    assert pooled["as-many"]["high"] == pytest.approx(0.01 + 4.302653 * 0.01 / 3**0.5)
    assert "mean of the seeds: +0.210 [+0.185, +0.235]" in COMPARE["format_table"](CLEAR)


def test_no_bar_is_missed_by_clear_results_or_by_one_seed() -> None:
    assert COMPARE["list_missed_bars"](CLEAR) == []
    assert COMPARE["list_missed_bars"]([build_row(0, 0.3, 0.4, 0.3)]) == []


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (build_row(2, 0.4, 0.4, 0.41), "equal minutes"),
        (build_row(2, 0.61, 0.4, 0.30), "equal answers"),
        (build_row(2, 0.61, 0.4, 0.41, commonest=0.2), "20% of the questions"),
        (build_row(2, 0.61, 0.4, 0.41, minutes={"align": 16.0, "trl": 15.5}), "longer than TRL"),
        (build_row(2, 0.61, 0.4, 0.41) | {"right": {**CLEAR[0]["right"], "start": {"value": 0.6}}}, "starts at 0.60"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_missed_bar_is_named(row: Mapping[str, Any], problem: str) -> None:
    (missed,) = COMPARE["list_missed_bars"]([*CLEAR[:2], row])
    assert problem in missed


def test_trl_gets_the_prompts_of_each_update_in_the_order_of_the_loop() -> None:
    prompts = [Conversation((Message("user", str(i)),), str(i)) for i in range(50)]
    in_order = TRAIN["list_in_training_order"](prompts, 7)
    settings = SimpleNamespace(batch_size=128, per_prompt=8, max_draws=1, seed=7)
    for update in range(10):  # three epochs
        of_loop = select_prompts(SimpleNamespace(prompts=prompts), settings, update)  # pyright: ignore[reportArgumentType]
        assert of_loop[::8] == in_order[16 * update : 16 * (update + 1)]


def test_trl_gets_the_settings_of_the_recipes_lines() -> None:
    script = (RECIPE / "run.sh").read_text(encoding="utf-8")
    variables = dict(re.findall(r'^(\w+)="(.*)"$', script, re.MULTILINE))
    words = shlex.split(" ".join(variables[name] for name in ("common", "questions", "grpo")))
    kept = [word for word in words if not re.search(r"[$']", word)]  # without those of the shell's variables
    config = build_config(compose_tree([*kept, "data.tasks=[needle_haystack]"]))
    assert isinstance(config.stage, PpoConfig)
    assert config.stage.per_prompt == TRAIN["GROUP_SIZE"]
    assert config.stage.batch_size == TRAIN["ANSWERS"]
    assert config.stage.micro_batch == TRAIN["MICRO_BATCH"]
    assert config.rollout.max_new_tokens == TRAIN["MAX_NEW_TOKENS"]
    assert config.data.held_out == TRAIN["HELD_OUT"]
    assert (config.stage.missing_eos_penalty, config.stage.kl_coef, config.stage.score_scale) == (0, 0, 1)
    assert [*map(float, re.findall(r"--lr (\S+)", script))] == [config.stage.lr]


@pytest.mark.slow
def test_trl_trains_and_answers_each_held_out_question(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed: pip install 'align-rlhf[reasoning]'")
    tasks = "[{name: needle_haystack, min_num_statements: 2, max_num_statements: 2, read: whole, size: 200}]"
    settings = ["data=reasoning_gym", f"data.tasks={tasks}", "data.held_out=0", "stage.max_steps=1"]
    assert run_align(["stage=full", "model=pocket", f"run.root={tmp_path}", *settings]) == 0
    folder = tmp_path / "trl"
    arguments = [str(tmp_path), tasks, "--seed", "3", "--minutes", "0"]
    monkeypatch.setattr(sys, "argv", ["train_with_trl.py", *arguments])
    TRAIN["main"]()
    questions, answers = (
        [json.loads(line) for line in (folder / name).read_text().splitlines()]
        for name in ("questions.jsonl", "answers.jsonl")
    )
    source = DataSource("reasoning_gym", tasks=yaml.safe_load(tasks), held_out=TRAIN["HELD_OUT"])
    held_out = read_divided_prompts(source, 3).test
    assert [row["id"] for row in questions] == [row["id"] for row in answers] == [prompt.id for prompt in held_out]
    assert [row["check"] for row in questions] == [prompt.columns["check"] for prompt in held_out]
    assert json.loads((folder / "training.json").read_text())["updates"] == 1
