"""Tests that a key is declared once: its default is valid, bounds and choices hold, and its meaning is documented."""

from __future__ import annotations

import ast
import math
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from align.__main__ import main
from align.config.compose import build_config, compose_tree
from align.config.reference import Key, build_sections, format_markdown, format_stage_help, iter_schema_keys
from align.config.root import PARTS, Config
from align.config.schemas import import_all_schemas
from align.config.settings import Setting, Settings, get_declarations, get_defaults
from align.config.stages import ALWAYS, STAGES, load_schema
from align.core.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "settings.md"


def iter_schemas() -> Iterator[type[Settings]]:
    """Yield every schema and its parts."""
    for schema in (
        Config,
        *import_all_schemas()["stage"].values(),
        *PARTS.values(),
        *import_all_schemas()["reward"].values(),
    ):
        yield schema
        if schema is not Config:
            yield from (
                part for field in fields(schema) if isinstance(part := field.default_factory, type) and part is not list
            )


DECLARED = {
    f"{schema.__name__}.{name}": (schema, name, declared)
    for schema in iter_schemas()
    for name, declared in get_declarations(schema).items()
}
BOUNDED = {key: entry for key, entry in DECLARED.items() if entry[2].range}
CHOSEN = {key: entry for key, entry in DECLARED.items() if entry[2].choices}


def iter_outside(declared: Setting) -> Iterator[float]:
    """Yield numbers outside the bounds, the first ones as close to them as possible."""
    for low in (declared.above, declared.at_least):
        if low is not None:
            yield low if declared.above is not None else math.nextafter(low, -math.inf)
            yield low - 1
    if declared.below is not None:
        yield declared.below
    if declared.at_most is not None:
        yield math.nextafter(declared.at_most, math.inf)
    yield 1e38
    yield math.inf
    yield math.nan


def iter_inside(declared: Setting) -> Iterator[float]:
    """Yield numbers inside the bounds, as close to them as possible."""
    low = declared.above if declared.above is not None else declared.at_least
    assert low is not None
    yield math.nextafter(low, math.inf) if declared.above is not None else low
    if declared.below is not None:
        yield math.nextafter(declared.below, -math.inf)
    else:
        yield declared.at_most if declared.at_most is not None else 1e37


def test_nothing_is_undeclared() -> None:
    """Every field is a declared key, a schema of its own, the stage, or the name that a choice decides."""
    assert len(DECLARED) > 120
    for schema in iter_schemas():
        for field in fields(schema):
            part = isinstance(field.default_factory, type) and issubclass(field.default_factory, Settings)
            assert field.name in get_declarations(schema) or field.name in ("name", "stage") or part, (
                schema,
                field.name,
            )


def test_a_declaration_says_what_the_key_means() -> None:
    for key, (schema, name, declared) in DECLARED.items():
        assert declared.meaning[0].isupper() or declared.meaning[0] in "`λ", key
        assert declared.meaning[-1] == ".", key
        assert not (declared.range and declared.choices), key
        default = get_defaults(schema)[name]
        assert declared.follows or str(default).startswith("${oc.env:") or declared.check(name, default) is None, key


def test_a_bound_holds_to_the_last_digit() -> None:
    for schema, name, declared in BOUNDED.values():
        where = f"{schema.AT}.{name}".lstrip(".")
        for value in iter_inside(declared):
            declared.check(where, value)
        for value in iter_outside(declared):
            with pytest.raises(InputError) as error:
                declared.check(where, value)
            assert (error.value.field, error.value.remedy) == (where, f"Give a number {declared.range}.")
        for value in ("text", True):
            with pytest.raises(InputError, match="is not a number"):
                declared.check(where, value)
        declared.check(where, None)


def test_a_choice_is_one_of_those_named() -> None:
    for _, name, declared in CHOSEN.values():
        declared.check(name, list(declared.choices))
        for value in (*(f"{choice}x" for choice in declared.choices), "", declared.choices[0].upper() + " "):
            with pytest.raises(InputError, match="is not a choice here") as error:
                declared.check(name, value)
            listed = error.value.remedy.partition("Choose one of: ")[2]
            assert set(listed.rstrip(".").split(", ")) == {*declared.choices}


def build_arguments(stage: str, key: Key, value: Any) -> list[str]:
    return [f"stage={stage}", f"{key.name}={value}"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_stages_own_bounds_are_those_of_its_command_line(stage: str) -> None:
    """Command lines are checked against the declared bounds and choices."""
    for key in build_sections(stage)[0].keys:
        if key.declared.range:
            low = key.declared.above if key.declared.above is not None else key.declared.at_least
            assert low is not None
            with pytest.raises(InputError) as error:
                build_config(compose_tree(build_arguments(stage, key, int(low - 1)), user_config_dir=Path("nowhere")))
            assert error.value.field == key.name
        for choice in key.declared.choices[:1]:
            with pytest.raises(InputError) as error:
                build_config(compose_tree(build_arguments(stage, key, f"{choice}x"), user_config_dir=Path("nowhere")))
            assert error.value.field == key.name


def test_the_page_is_what_the_declarations_make() -> None:
    assert PAGE.read_text(encoding="utf-8") == format_markdown(), "python -m align.config.reference > docs/settings.md"


def test_the_page_has_every_key() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for schema in iter_schemas():
        for key in iter_schema_keys(schema):
            assert f"| `{key.name}` | `{key.default}` |" in page


@pytest.mark.parametrize("stage", STAGES)
def test_help_on_a_stage_has_every_key_that_it_reads(stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"stage={stage}", "--help"]) == 0
    stdout = capsys.readouterr().out
    assert stdout == format_stage_help(stage)
    raw = compose_tree([f"stage={stage}"], user_config_dir=Path("nowhere"))
    for part in (*ALWAYS, *STAGES[stage].reads):
        if part in raw and part not in ("stage", "reward"):
            value = raw[part]
            names = [f"{part}.{leaf}" for leaf in value if leaf != "name"] if hasattr(value, "keys") else [part]
            assert [name for name in names if f"  {name}=" not in stdout] == []
    for name, declared in get_declarations(load_schema(stage)).items():
        assert f"  stage.{name}=" in stdout
        assert declared.meaning[:40] in stdout
    assert max(map(len, stdout.splitlines())) < 200


@pytest.mark.parametrize(
    ("stage", "lines"),
    [
        ("full", ["method.lr=null", "stage.lr=null", "2e-05 below 30 billion", "Here: method=full."]),
        ("verify", ["init=base"]),
        ("reward", ["store.url=null", "Here: data=annotations."]),
        ("dpo", ["store.url=null"]),
        ("eval", ["Here: reward=sentiment."]),
    ],
)
def test_help_has_the_values_that_the_stage_begins_with(stage: str, lines: list[str]) -> None:
    help_text = " ".join(format_stage_help(stage).split())
    assert [line for line in lines if line not in help_text] == []


def test_text_like_an_interpolation_is_no_choice() -> None:
    for line in ("stage.schedule=\\${x}", "data.template=\\${x}", "rollout.engine=\\${x}"):
        with pytest.raises(InputError):
            build_config(compose_tree(["stage=sft", line], user_config_dir=Path("nowhere")))


def test_help_shows_the_reward_that_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    for reward, key in (
        ("ensemble", "reward.combine=mean"),
        ("learned", "reward.ref=reward:latest"),
        ("no", "reward.ref"),
    ):
        main(["stage=ppo", f"reward={reward}", "--help"])
        assert key in capsys.readouterr().out
    main(["stage=nothing", "--help"])
    assert "usage: python -m align" in capsys.readouterr().out


def test_what_a_stage_reads_is_there() -> None:
    for stage in STAGES.values():
        assert {*stage.reads, *ALWAYS} <= {field.name for field in fields(Config)}
        assert not {"run", "resume", "track"} & {*stage.reads}


@pytest.mark.parametrize("stage", STAGES)
def test_the_table_has_what_a_stage_looks_at(stage: str) -> None:
    """Every `config.PART` in the source of a stage is listed in STAGES, or is known not to change a run."""
    stages = ROOT / "align" / "stages"
    module = STAGES[stage].module
    paths = [*stages.glob(f"{module}.py"), *stages.glob(f"{module}/*.py")]  # a package for evaluation
    source = "\n".join(path.read_text(encoding="utf-8") for path in paths)
    attributes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)]
    config_attributes = {
        node.attr for node in attributes if isinstance(node.value, ast.Name) and node.value.id == "config"
    }
    parts = config_attributes & {field.name for field in fields(Config)}
    assert {"run", "stage"} & parts
    ignored = {"run", "resume", "track", *STAGES[stage].uses}
    assert parts - ignored <= {*ALWAYS, *STAGES[stage].reads}
    # A stage that opens the annotation store writes to it, or reads it by an input's digest.
    assert "open_store" not in source or "store" in (*STAGES[stage].reads, *STAGES[stage].uses)
