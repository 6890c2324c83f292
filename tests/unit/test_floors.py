"""Imports point only downward, never to a sibling: the floors of CONTRIBUTING.md are checked against the source."""

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
        targets = {target for target in rooms_in(path) if (room, target) not in ALLOWED}
        upward_imports = {target: FLOOR_OF[target] for target in targets if FLOOR_OF[target] >= FLOOR_OF[room]}
        assert not upward_imports, f"{module} is on floor {FLOOR_OF[room]} and imports {upward_imports}"


def find_imported_modules(path: Path) -> set[str]:
    """Return the project's modules that a file imports at run time, also inside functions, without the file itself."""
    module = name_of(path)
    module_names = {name_of(module_path) for module_path in MODULES}
    imported_modules = set()
    for name in imports(path.read_text(encoding="utf-8"), module, path.name == "__init__.py", for_types=False):
        while name and name not in module_names:  # `a.b.c` is the name c of the module a.b, or of the package a
            name = name.rpartition(".")[0]
        imported_modules.add(name)
    return imported_modules - {module, ""}


def find_cycle(imported_by_module: Mapping[str, set[str]]) -> list[str]:
    """Return modules that import one another in a cycle, closed by its first module. Empty if there is no cycle."""
    try:
        TopologicalSorter(imported_by_module).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_no_module_imports_itself_by_way_of_others():
    assert find_cycle({name_of(path): find_imported_modules(path) for path in MODULES}) == []


def test_the_finder_of_circles():
    assert find_cycle({"a": {"b"}, "b": {"c"}, "c": set(), "d": {"a", "c"}}) == []
    assert set(find_cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}})) == {"a", "b", "c"}
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
    for path in list_modules("align.ops"):
        imported_names = imports(path.read_text(encoding="utf-8"), name_of(path), path.name == "__init__.py")
        forbidden = [
            name
            for name in imported_names
            if not any(name == prefix or name.startswith(f"{prefix}.") for prefix in allowed)
        ]
        assert not forbidden, path


def test_no_torch_at_module_level():
    heavy = {"torch", "transformers", "peft", "trl", "datasets", "bitsandbytes", "accelerate"}
    for path in list_modules(*WITHOUT_TORCH):
        imported_names = imports(
            path.read_text(encoding="utf-8"), name_of(path), path.name == "__init__.py", top_only=True
        )
        assert not heavy & {name.partition(".")[0] for name in imported_names}, path


def list_modules(*rooms: str) -> list[Path]:
    paths = [path for path in MODULES if room_of(name_of(path)) in rooms]
    assert paths
    return paths


def test_what_composes_a_command_and_finds_its_inputs_never_loads_torch():
    """The imports are run in a process, so that indirect imports are covered too."""
    names = ["align.track", "align.report", "align.__main__", "align.stages.runner"]
    import_lines = f"import sys, importlib\nfor name in {names}: importlib.import_module(name)\n"
    import_lines += f"from align.stages import load_stage\nfor name in {[*STAGES]}: load_stage(name)\n"
    script = f"{import_lines}print(*sys.modules)"
    process = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "peft", "trl", "datasets"} & set(process.stdout.split())
    assert "align.run" in process.stdout.split()


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import align.ops.kl", {"align.ops.kl"}),
        ("from align import ops", {"align.ops"}),
        ("from align.ops import kl, gae", {"align.ops.kl", "align.ops.gae"}),
        ("def f():\n    from align.stages.runner import execute_run", {"align.stages.runner.execute_run"}),
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


def test_every_stage_has_one_module_or_package_and_beside_them_is_only_the_runner():
    stage_modules = {stage.module for stage in STAGES.values()}
    paths = [path for path in (ROOT / "align" / "stages").iterdir() if path.name != "__pycache__"]
    assert sorted(path.stem for path in paths) == sorted(["__init__", "runner", "worker_rank", *stage_modules])


BELOW_STAGES = [p for p in MODULES if (room := room_of(name_of(p))) and FLOOR_OF[room] < 5 and room != "align.config"]


def test_configuration_stops_at_the_stage():
    """Modules below the stages know no schema: they import only a run's identity and the names of stages."""
    allowed = (
        "root.DEFAULT_ROOT",
        "stages.STAGES",
        "stages.WITH_RUNS",
        "identity.select_identity",
        "identity.completed",
    )
    for path in BELOW_STAGES:
        imported_names = imports(path.read_text(encoding="utf-8"), name_of(path), path.name == "__init__.py")
        config_names = {name for name in imported_names if name.startswith("align.config")}
        assert config_names <= {f"align.config.{name}" for name in allowed}, path


def test_the_picture_is_what_the_imports_make():
    assert PICTURE.read_text(encoding="utf-8") == svg(), "python docs/floors.py"


def test_an_arrow_is_left_out_where_another_way_leads_down():
    graph = {"a": {"b", "c", "d"}, "b": {"c"}, "c": {"d"}, "d": set[str](), "e": {"d"}}
    assert reduced(graph) == {"a": {"b"}, "b": {"c"}, "c": {"d"}, "d": set(), "e": {"d"}}
