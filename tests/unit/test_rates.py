"""Default learning rates: the table, and the rates of a run whose command line sets none."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from align.__main__ import compose_config, main
from align.config.command import format_command_line
from align.config.rates import COLUMNS, SIZE_CLASSES, find_default_rate, format_rates_table
from align.config.root import to_plain_dict
from align.config.settings import replace_values
from align.core.errors import InputError
from align.models.base import find_base
from align.run import Base
from align.run.weights import count_weights
from align.stages.runner import fill_learning_rates

METHODS = Path(__file__).resolve().parents[2] / "docs" / "methods.md"
LINES = {
    "sft": "stage=sft model=pocket",
    "full": "stage=full model=pocket",
    "reward": "stage=reward",
    "dpo": "stage=dpo",
    "kto": "stage=kto",
    "ppo": "stage=ppo",
    "ppo full": "stage=ppo method=full",
}


def make_base_of_size(folder: Path, weights: int) -> Base:
    """Make a base whose safetensors header declares this number of weights, in two tensors without data."""
    folder.mkdir()
    shapes = {"a.weight": [weights // 2, 1], "b.weight": [weights - weights // 2]}
    tensors = {name: {"dtype": "BF16", "shape": shape, "data_offsets": [0, 0]} for name, shape in shapes.items()}
    header = json.dumps({"__metadata__": {"format": "pt"}, **tensors}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    return Base("mine", str(folder), None, "0" * 64)


def test_rates_are_the_published_ones_from_a_billion_weights_on():
    for weights in (1_000_000_000, 8_030_261_248):
        expected = {"sft": 2e-4, "reward": 1e-4, "dpo": 5e-6, "kto": 5e-6, "ppo": 1e-5}
        assert {stage: find_default_rate(stage, "qlora", weights) for stage in expected} == expected
        assert find_default_rate("full", "full", weights) == find_default_rate("sft", "full", weights) == 2e-5
        assert find_default_rate("ppo", "full", weights) == 1e-6
    assert find_default_rate("sft", "lora", 70_000_000_000) == 1e-4
    assert find_default_rate("export", "lora", 8_000_000_000) is None


def test_full_training_has_a_tenth_of_an_adapters_rate():
    for size in SIZE_CLASSES:
        assert set(size.rates) == set(COLUMNS)
        assert size.rates["full"] == pytest.approx(size.rates["sft"] / 10)
        assert size.rates["ppo full"] == pytest.approx(size.rates["ppo"] / 10)


@pytest.mark.parametrize("column", LINES)
def test_pocket_keeps_the_rates_that_its_figures_were_made_with(column: str):
    rates = {"sft": 2e-4, "full": 2e-5, "reward": 1e-3, "dpo": 1e-4, "kto": 1e-4, "ppo": 5e-4, "ppo full": 5e-5}
    config, origin = fill_learning_rates(compose_config(shlex.split(LINES[column])), find_base("pocket"))
    assert config.stage.lr == rates[column]
    assert config.method.lr == rates["full" if config.method.name == "full" else "sft"]
    assert getattr(config.stage, "value_lr", 1e-3) == 1e-3
    assert origin == "default for fewer than 30 million weights, such as pocket"


@pytest.mark.parametrize("size", SIZE_CLASSES, ids=lambda size: size.title)
def test_the_size_of_the_base_decides(tmp_path: Path, size: object):
    index = SIZE_CLASSES.index(size)  # pyright: ignore[reportArgumentType]
    weights = 40_000_000_000 if index == 3 else int(SIZE_CLASSES[index].below) - 1
    base = make_base_of_size(tmp_path / "base", weights)
    assert count_weights(tmp_path / "base") == weights
    for column, line in LINES.items():
        config, origin = fill_learning_rates(compose_config(shlex.split(line)), base)
        assert config.stage.lr == SIZE_CLASSES[index].rates[column]
        assert SIZE_CLASSES[index].title in origin
    assert (
        SIZE_CLASSES[index].rates["value"] == fill_learning_rates(compose_config(["stage=ppo"]), base)[0].stage.value_lr
    )


def test_a_rate_that_is_given_stays(tmp_path: Path):
    base = make_base_of_size(tmp_path / "base", 8_000_000_000)
    for arguments in (["stage=dpo", "stage.lr=3e-5"], ["stage=sft", "method.lr=3e-5"], ["stage=full", "stage.lr=3e-5"]):
        config, origin = fill_learning_rates(compose_config(arguments), base)
        assert (config.stage.lr, origin) == (3e-5, "")
    config, origin = fill_learning_rates(compose_config(["stage=ppo", "stage.value_lr=3e-5"]), base)
    assert (config.stage.lr, config.stage.value_lr) == (1e-5, 3e-5)
    assert origin


def test_estimators_without_a_critic_take_the_filled_rate_and_no_other(tmp_path: Path):
    base = make_base_of_size(tmp_path / "base", 8_000_000_000)
    config, _ = fill_learning_rates(compose_config(["stage=ppo", "stage.advantage=rloo"]), base)
    assert config.stage.value_lr == 1e-4
    with pytest.raises(InputError, match=r"stage\.value_lr"):
        compose_config(["stage=ppo", "stage.advantage=rloo", "stage.value_lr=3e-5"])


@pytest.mark.parametrize("column", LINES)
def test_the_command_line_of_a_run_makes_the_same_configuration(tmp_path: Path, column: str):
    base = make_base_of_size(tmp_path / "base", 100_000_000)
    line = shlex.split(LINES[column])
    for overrides in ([], ["stage.lr=3e-3"], ["method.lr=3e-3"] if column in ("sft", "full") else []):
        config, _ = fill_learning_rates(compose_config([*line, *overrides]), base)
        arguments = shlex.split(format_command_line(to_plain_dict(config), {}))[3:]
        rebuilt = fill_learning_rates(compose_config(arguments), base)[0]
        rebuilt = replace_values(rebuilt, model=config.model)
        assert to_plain_dict(rebuilt) == to_plain_dict(replace_values(config, model=config.model))


def test_the_printed_configuration_says_where_a_rate_is_from(capsys: pytest.CaptureFixture[str]):
    main(["stage=dpo", "--cfg", "job"])
    assert "# dpo: 0.0001 below 30 million weights" in capsys.readouterr().out
    main(["stage=dpo", "stage.lr=1e-5", "--cfg", "job"])
    assert "#" not in capsys.readouterr().out
    main(["stage=export", "--cfg", "job", "--resolve"])
    assert "#" not in capsys.readouterr().out


def test_the_page_has_the_table():
    assert format_rates_table() in METHODS.read_text(encoding="utf-8")
