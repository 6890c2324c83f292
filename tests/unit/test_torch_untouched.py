"""Importing `align.models` changes nothing of torch's, not even for a moment."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import importlib, json, pkgutil, sys, types
import torch, torch._dynamo  # which replaces torch.manual_seed by itself

replaced = []

class Watched(types.ModuleType):
    def __setattr__(self, name, value):
        if name in vars(self) and vars(self)[name] is not value:
            replaced.append(name)
        super().__setattr__(name, value)

torch.__class__ = Watched
before = {name: id(value) for name, value in vars(torch).items()}
import align.models
without = sorted({"transformers", "peft", "bitsandbytes"} & sys.modules.keys())
for module in pkgutil.walk_packages(align.models.__path__, "align.models."):
    importlib.import_module(module.name)
changed = [name for name, identity in before.items() if id(vars(torch).get(name)) != identity]
print(json.dumps([without, replaced, changed, "align.models.fastpath.lora" in sys.modules]))
"""


def test_importing_models_leaves_torch_as_it_is():
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded_by_the_package, replaced, changed, walked = json.loads(done.stdout)
    assert loaded_by_the_package == []
    assert replaced == []
    assert changed == []
    assert walked
