"""Imports point downward only, and never to a sibling: the floors of CONTRIBUTING.md, read from the source."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from align.config.stages import STAGES

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "docs"))
from floors import FLOOR_OF, FLOORS, MODULES, PICTURE, ROOT, imports, name_of, reduced, room_of, rooms_in, svg

# Within floor 0, the configuration and the ranks may import the core.
ALLOWED = {("align.config", "align.core"), ("align.ranks", "align.core")}
WITHOUT_TORCH = (*FLOORS[0], "align.run", "align.track", "align.report", "align.web")


def test_imports_point_downward():
    assert len(MODULES) > 300
    for path in MODULES:
        module = name_of(path)
        if module == "align":
            assert not rooms_in(path)
            continue
        room = room_of(module)
        assert room is not None, f"{module} is on no floor: add it here and to CONTRIBUTING.md"
        others = {other for other in rooms_in(path) if (room, other) not in ALLOWED}
        wrong = {other: FLOOR_OF[other] for other in others if FLOOR_OF[other] >= FLOOR_OF[room]}
        assert not wrong, f"{module} is on floor {FLOOR_OF[room]} and imports {wrong}"


def modules_in(path: Path) -> set[str]:
    """The modules of ours that a file imports when it runs, inside functions too, other than itself."""
    module, known = name_of(path), {name_of(p) for p in MODULES}
    found = set()
    for name in imports(path.read_text(encoding="utf-8"), module, path.name == "__init__.py", for_types=False):
        while name and name not in known:  # `a.b.c` is the name c of the module a.b, or of the package a
            name = name.rpartition(".")[0]
        found.add(name)
    return found - {module, ""}


def circle(imported: Mapping[str, set[str]]) -> list[str]:
    """Modules that import one another in a circle, the first one again at the end; none where there is no circle."""
    try:
        TopologicalSorter(imported).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_no_module_imports_itself_by_way_of_others():
    assert circle({name_of(path): modules_in(path) for path in MODULES}) == []


def test_the_finder_of_circles():
    assert circle({"a": {"b"}, "b": {"c"}, "c": set(), "d": {"a", "c"}}) == []
    assert set(circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}})) == {"a", "b", "c"}
    source = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import a\ndef f():\n    import b"
    assert set(imports(source, for_types=False)) == {"typing.TYPE_CHECKING", "b"}
    assert set(imports(source)) == {"typing.TYPE_CHECKING", "a", "b"}
    assert set(imports(source, top_only=True)) == {"typing.TYPE_CHECKING"}


def test_ops_are_pure_torch():
    allowed = (
        "torch",
        "align.ops",
        "__future__",
        "math",
        "collections.abc",
        "dataclasses",
        "typing",
        "functools",
        "statistics",
        "numpy",
    )
    for path in modules_of("align.ops"):
        found = imports(path.read_text(encoding="utf-8"), name_of(path), path.name == "__init__.py")
        others = [name for name in found if not any(name == a or name.startswith(f"{a}.") for a in allowed)]
        assert not others, path


def test_no_torch_at_module_level():
    heavy = {"torch", "transformers", "peft", "trl", "datasets", "bitsandbytes", "accelerate"}
    for path in modules_of(*WITHOUT_TORCH):
        found = imports(path.read_text(encoding="utf-8"), name_of(path), path.name == "__init__.py", top_only=True)
        assert not heavy & {name.partition(".")[0] for name in found}, path


def modules_of(*rooms: str) -> list[Path]:
    found = [path for path in MODULES if room_of(name_of(path)) in rooms]
    assert found
    return found


def test_what_composes_a_command_and_finds_its_inputs_never_loads_torch():
    """The same by running it: what these modules import in turn is seen too."""
    names = ["align.track", "align.report", "align.__main__", "align.stages.runner"]
    loading = f"import sys, importlib\nfor name in {names}: importlib.import_module(name)\n"
    loading += f"from align.stages import load_stage\nfor name in {[*STAGES]}: load_stage(name)\n"
    loaded = f"{loading}print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", loaded], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "peft", "trl", "datasets"} & set(done.stdout.split())
    assert "align.run" in done.stdout.split()


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import align.ops.kl", {"align.ops.kl"}),
        ("from align import ops", {"align.ops"}),
        ("from align.ops import kl, gae", {"align.ops.kl", "align.ops.gae"}),
        ("def f():\n    from align.stages.runner import execute", {"align.stages.runner.execute"}),
        ("from . import b", {"align.data.b"}),
        ("from .b import c", {"align.data.b.c"}),
        ("from ..ops import kl", {"align.ops.kl"}),
    ],
)
def test_the_reader_of_imports(source: str, found: set[str]):
    assert set(imports(source, "align.data.a")) == found
    assert set(imports("from .a import b", "align.data", is_package=True)) == {"align.data.a.b"}


def test_rooms():
    expected = {
        "align.annotate.store.connections": "align.annotate.store",
        "align.annotate.simulate": "align.annotate",
        "align.annotate.web.access": "align.annotate",
        "align.web.auth": "align.web",
        "align.reward": "align.reward",
        "align.run.files": "align.run",
        "align.runner": None,
        "align": None,
    }
    assert {module: room_of(module) for module in expected} == expected


def test_every_stage_has_one_file_and_beside_them_is_only_the_runner():
    named = {stage.module for stage in STAGES.values()}
    assert {p.stem for p in (ROOT / "align" / "stages").glob("*.py")} == {
        "__init__",
        "runner",
        "worker_rank",
        *named,
    }


BELOW_STAGES = [p for p in MODULES if (room := room_of(name_of(p))) and FLOOR_OF[room] < 5 and room != "align.config"]


def test_configuration_stops_at_the_stage():
    """Below the stages nothing knows a schema: a run's identity and its stage's name are all that is asked of them."""
    known = ("root.DEFAULT_ROOT", "stages.STAGES", "stages.WITH_RUNS", "identity.select_identity", "identity.completed")
    for path in BELOW_STAGES:
        found = imports(path.read_text(encoding="utf-8"), name_of(path), path.name == "__init__.py")
        asked = {name for name in found if name.startswith("align.config")}
        assert asked <= {f"align.config.{name}" for name in known}, path


def test_the_picture_is_what_the_imports_make():
    assert PICTURE.read_text(encoding="utf-8") == svg(), "python docs/floors.py"


def test_an_arrow_is_left_out_where_another_way_leads_down():
    graph = {"a": {"b", "c", "d"}, "b": {"c"}, "c": {"d"}, "d": set[str](), "e": {"d"}}
    assert reduced(graph) == {"a": {"b"}, "b": {"c"}, "c": {"d"}, "d": set(), "e": {"d"}}
