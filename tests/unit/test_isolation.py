"""Programs, settings and caches of the user do not reach the tests."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from isolation import USER_CACHE, build_isolated_environment


def test_variables_and_folders_of_the_user_are_left_out(tmp_path: Path):
    interpreter_folder = str(Path(sys.executable).parent)
    user = {
        "HOME": "/home/u",
        "PATH": "/home/u/.local/bin:/usr/local/bin:/usr/bin:/bin",
        "HF_HOME": "/home/u/hub",
        "WANDB_API_KEY": "k",
        "XDG_CONFIG_HOME": "/home/u/c",
        "CUDA_VISIBLE_DEVICES": "0",
        "LANG": "C.UTF-8",
        "OMP_NUM_THREADS": "1",
        "PIP_CERT": "c",
    }
    variables = build_isolated_environment(user, tmp_path)
    assert variables == {
        "HOME": str(tmp_path),
        "PATH": f"{interpreter_folder}:/usr/bin:/bin",
        USER_CACHE: "/home/u/.cache",
        "LANG": "C.UTF-8",
        "OMP_NUM_THREADS": "1",
        "PIP_CERT": "c",
    }
    # A worker process inherits the variables of its parent.
    worker_variables = build_isolated_environment(variables, tmp_path / "worker")
    assert worker_variables == {**variables, "HOME": str(tmp_path / "worker")}


def test_this_process_is_isolated():
    assert Path.home().name.startswith("align-tests-home-")
    assert "XDG_CACHE_HOME" not in os.environ
    assert not [folder for folder in os.environ["PATH"].split(":")[1:] if folder.startswith(("/usr/local", "/root"))]
