"""Reading shapes from any `config.json`: each key that a plan reads is missing or has a value of any type."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from align.core.errors import InputError
from align.planning.shapes import LLAMA_LIKE, Shape, build_shape, read_shape
from align.run import Base

GOOD: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 320,
    "max_position_embeddings": 256,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}
LEFT_OUT = object()
VALUES = (LEFT_OUT, None, "false", -1, 0, 1.5, 10**30, float("nan"), [1], {"a": 1}, True, 1, 2, 3)
COMPARED = ("width", "layers", "heads", "groups", "head", "vocabulary", "context", "embeddings", "output", "others")


def write_config(folder: Path, kind: Any, key: str, value: Any) -> Base:
    config = {"model_type": kind, **GOOD, key: value}
    config = {k: v for k, v in config.items() if v is not LEFT_OUT}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return Base("model", str(folder), None, "")


def read_or_none(reader: Any, base: Base) -> Shape | None:
    try:
        return reader(base)
    except InputError:
        return None


@pytest.mark.parametrize("kind", LLAMA_LIKE)
@pytest.mark.parametrize("key", GOOD)
def test_a_shape_is_that_of_the_modules_or_the_key_is_named(kind: str, key: str, tmp_path: Path):
    read_shapes = 0
    for value in VALUES:
        base = write_config(tmp_path, kind, key, value)
        shape = read_or_none(read_shape, base)
        if value not in (LEFT_OUT, None) and type(value) is not type(GOOD[key]):
            assert shape is None, value
        if shape is None:
            with pytest.raises(InputError, match=f"{key}|divide"):
                read_shape(base)
            continue
        read_shapes += 1
        built = read_or_none(build_shape, base)
        if built is not None:  # transformers refuses some numbers that do not change a size
            assert {n: getattr(shape, n) for n in COMPARED} == {n: getattr(built, n) for n in COMPARED}, value
            assert sorted(shape.linears) == sorted(built.linears), value
    assert read_shapes


@pytest.mark.parametrize("value", VALUES)
def test_a_type_is_a_name_that_transformers_has(value: Any, tmp_path: Path):
    with pytest.raises(InputError, match="model_type"):
        read_shape(write_config(tmp_path, value, "model_type", value))


PROBE = """
import json, pathlib, sys, time
from align.__main__ import main
began = time.process_time()
for text in json.loads(sys.argv[1]):
    pathlib.Path("config.json").write_text(text)
    assert main(["stage=plan", "stage.of=sft", "model=hub", "model.path=.", "init=base"]) == 2, text
assert "torch" not in sys.modules
assert time.process_time() - began < 3, time.process_time() - began
"""


def test_a_wrong_one_is_refused_fast_and_without_torch(tmp_path: Path):
    """The command reads the file twice: as a model's folder, and for its sizes."""
    wrong = [{}, {"model_type": "no-such-type"}, {"model_type": None}]
    wrong += [{"model_type": "llama", **GOOD, key: "false"} for key in GOOD]
    texts = json.dumps([json.dumps(config) for config in wrong])
    process = subprocess.run([sys.executable, "-c", PROBE, texts], cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    stderr_lines = process.stderr.splitlines()
    assert stderr_lines[0].startswith("align: config.json, model_type=None: is missing")
    assert all(f"config.json, {key}=false" in line for key, line in zip(GOOD, stderr_lines[3:], strict=True))
