"""Composed configurations are immutable."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import FrozenInstanceError, fields, is_dataclass
from pathlib import Path

import pytest

from align.config.compose import build_config, compose_tree
from align.config.groups import TrackConfig
from align.config.root import Config
from align.config.schemas import import_all_schemas
from align.config.settings import Settings, replace_values
from align.core.errors import InputError

CHOICES = [
    "stage=data stage.sources=[a.jsonl]",
    "stage=sft",
    "stage=full",
    "stage=sample",
    "stage=annotate",
    "stage=reward",
    "stage=ppo",
    "stage=dpo",
    "stage=kto",
    "stage=eval",
    "stage=export",
    "stage=verify",
    "stage=serve",
    "stage=registry",
    "stage=plan stage.of=reward",
    "stage=ppo reward=rules reward.rules=[{rule:json}]",
    "stage=ppo reward=ensemble reward.refs=[reward:a,reward:b]",
    "stage=ppo reward=sum reward.parts=[{name:learned}]",
    "stage=ppo reward=fn reward.fn=a:b",
    "stage=eval reward=sentiment",
]


def compose_config(line: str) -> Config:
    return build_config(compose_tree(line.split(), user_config_dir=Path("nowhere")))


def iter_settings(settings: object, path: str = "") -> Iterator[tuple[str, Settings]]:
    """Yield a configuration and every configuration in it, with their dotted paths."""
    assert is_dataclass(settings)
    assert isinstance(settings, Settings), path
    yield path, settings
    for field in fields(settings):
        if is_dataclass(part := getattr(settings, field.name)):
            yield from iter_settings(part, f"{path}.{field.name}")


@pytest.mark.parametrize("line", CHOICES)
def test_nothing_can_be_assigned_or_taken_away(line: str) -> None:
    config = compose_config(line)
    settings_by_path = dict(iter_settings(config))
    assert len(settings_by_path) >= 10
    for path, settings in settings_by_path.items():
        assert is_dataclass(settings)
        for field in fields(settings):
            before = getattr(settings, field.name)
            with pytest.raises(FrozenInstanceError, match=field.name):
                setattr(settings, field.name, before)
            with pytest.raises(FrozenInstanceError):
                delattr(settings, field.name)
            assert getattr(settings, field.name) is before, path
        with pytest.raises(FrozenInstanceError):
            settings.anything = 1  # pyright: ignore[reportAttributeAccessIssue]


def test_every_schema_is_covered() -> None:
    assert {line.split()[0].removeprefix("stage=") for line in CHOICES} >= import_all_schemas()["stage"].keys()


def test_another_value_is_another_configuration() -> None:
    config = compose_config("stage=ppo")
    changed = replace_values(config, method=replace_values(config.method, name="lora"))
    assert (config.method.name, changed.method.name) == ("auto", "lora")
    assert changed.stage is config.stage
    with pytest.raises(FrozenInstanceError):
        changed.method.name = "qlora"
    with pytest.raises(InputError, match="DPO trains an adapter"):
        replace_values(compose_config("stage=dpo"), method=replace_values(config.method, name="full"))
    with pytest.raises(InputError, match="KTO trains an adapter"):
        replace_values(compose_config("stage=kto"), method=replace_values(config.method, name="full"))


@pytest.mark.parametrize("project", ["it's", 'a"b', "a/b", "a:b", "", " a", "x" * 129, "-a"])
def test_a_project_has_a_name_that_every_service_takes(project: str) -> None:
    with pytest.raises(InputError, match=r"track\.project"):
        TrackConfig(name="mlflow", project=project).check_together()
