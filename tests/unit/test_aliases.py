"""Names of artifacts: values of `stage.adapters` and of an alias file."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.core.aliases import NAME, Arm, parse_aliases
from align.core.errors import InputError

NAMES = st.from_regex(NAME, fullmatch=True)
REFS = st.text(min_size=1, max_size=20)
WEIGHTS = st.one_of(st.integers(1, 10**6), st.floats(1e-6, 1e6))


def test_a_name_of_one_artifact_and_of_several() -> None:
    aliases = parse_aliases({"support": "ppo:latest", "chat": {"support": 9, "sft:next": 0.5}}, "stage.adapters")
    assert aliases == {"support": (Arm("ppo:latest", 1.0),), "chat": (Arm("support", 9.0), Arm("sft:next", 0.5))}
    assert parse_aliases(None, "x") == {}


@given(st.dictionaries(NAMES, st.one_of(REFS, st.dictionaries(REFS, WEIGHTS, min_size=1)), max_size=5))
def test_what_is_written_is_read_from_a_command_line_and_from_a_file_alike(value: dict[str, Any]) -> None:
    aliases = parse_aliases(value, "x")
    assert aliases == parse_aliases(json.loads(json.dumps(value)), "x")
    assert {name: {arm.ref: arm.weight for arm in arms} for name, arms in aliases.items()} == {
        name: target if isinstance(target, dict) else {target: 1} for name, target in value.items()
    }


@pytest.mark.parametrize(
    ("value", "field"),
    [
        ("ppo:latest", "x"),
        (["a"], "x"),
        ({"a b": "r"}, "x"),
        ({"../a": "r"}, "x"),
        ({"a@b": "r"}, "x"),
        ({"": "r"}, "x"),
        ({3: "r"}, "x"),
        ({"a" * 65: "r"}, "x"),
        ({"a\n": "r"}, "x"),
        ({"a": ""}, "x.a"),
        ({"a": None}, "x.a"),
        ({"a": {}}, "x.a"),
        ({"a": 3}, "x.a"),
        ({"a": ["r"]}, "x.a"),
        ({"a": {"r": 0}}, "x.a.r"),
        ({"a": {"r": -1}}, "x.a.r"),
        ({"a": {"r": math.inf}}, "x.a.r"),
        ({"a": {"r": math.nan}}, "x.a.r"),
        ({"a": {"r": True}}, "x.a.r"),
        ({"a": {"r": "1"}}, "x.a.r"),
        ({"a": {"r": None}}, "x.a.r"),
    ],
)
def test_other_shapes_are_refused_by_name(value: Any, field: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_aliases(value, "x")
    assert caught.value.field == field
