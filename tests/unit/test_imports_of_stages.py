"""Imports of the stages load no extras and leave torch unchanged, as a fresh process that imports them all shows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from align.config.extras import EXTRA_NEEDS
from align.config.stages import STAGES
from align.core.distribution import EXTRA_MODULES

ROOT = Path(__file__).resolve().parents[2]
OF_EXTRAS = sorted({module for modules in EXTRA_MODULES.values() for module in modules} | {"jsonschema_rs", "gguf"})
"""Modules that the default installation lacks."""
NEEDING = {need.stage for need in EXTRA_NEEDS if need.action is None and need.unless is None}
WITHOUT_EXTRAS = [
    *(f"align.stages.{stage.module}" for name, stage in STAGES.items() if name not in NEEDING),
    *("align.stages.runner", "align.report.live", "align.registry.comparison_page"),
]
WITH_EXTRAS = [
    *(f"align.stages.{STAGES[name].module}" for name in sorted(NEEDING)),
    *("align.serve.app", "align.annotate.web.server"),
]
PROGRAM = f"""
import importlib, json, pkgutil, sys, types
import torch, torch._dynamo  # which replaces torch.manual_seed by itself

replaced = []

class Watched(types.ModuleType):
    def __setattr__(self, name, value):
        if name in vars(self) and vars(self)[name] is not value:
            replaced.append(name)
        super().__setattr__(name, value)

for name in {OF_EXTRAS}:
    sys.modules[name] = None  # any import of it fails
torch.__class__ = Watched
before = {{name: id(value) for name, value in vars(torch).items()}}
import align.models
heavy = sorted({{"transformers", "peft", "bitsandbytes"}} & sys.modules.keys())
for module in pkgutil.walk_packages(align.models.__path__, "align.models."):
    importlib.import_module(module.name)
changed = [name for name, identity in before.items() if id(vars(torch).get(name)) != identity]
walked = "align.models.fastpath.linear" in sys.modules
torch.__class__ = types.ModuleType

failed = {{}}
def load(names):
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            failed[name] = str(error)

load({WITHOUT_EXTRAS})
experimental = sorted({{"trl.experimental.orpo", "trl.experimental.cpo"}} & sys.modules.keys())
for name in {OF_EXTRAS}:
    del sys.modules[name]
load({WITH_EXTRAS})
told = dict(heavy=heavy, replaced=replaced, changed=changed, walked=walked, failed=failed, experimental=experimental)
print(json.dumps(told | dict(loaded=sorted(sys.modules))))
"""


@pytest.fixture(scope="module")
def told() -> dict[str, Any]:
    process = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


def test_importing_models_leaves_torch_as_it_is(told: dict[str, Any]):
    assert told["heavy"] == []
    assert told["replaced"] == []
    assert told["changed"] == []
    assert told["walked"]


def test_stages_that_train_import_nothing_of_an_extra(told: dict[str, Any]):
    assert told["failed"] == {}


def test_nothing_experimental_is_imported_unless_it_is_asked_for(told: dict[str, Any]):
    assert told["experimental"] == []


def test_no_stage_loads_a_top_level_folder(told: dict[str, Any]):
    """The packages are imported as `align.annotate` and `align.reward`, also if a library imports them."""
    assert {*WITHOUT_EXTRAS, *WITH_EXTRAS} <= set(told["loaded"])
    assert not {"annotate", "reward"} & set(told["loaded"])
