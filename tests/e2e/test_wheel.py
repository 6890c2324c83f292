"""The wheel: built, installed without the checkout, and run from another folder that contains a user's own
`reward.py`."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


def run_command(*command: str | Path, cwd: Path, **environment: str) -> str:
    process = subprocess.run(
        list(map(str, command)), cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("hatchling", reason="the wheel is built with hatchling, of the dev extra")
    folder = tmp_path_factory.mktemp("dist")
    run_command(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with only the package; its dependencies come from this environment."""
    folder = tmp_path_factory.mktemp("site")
    run_command(
        sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", folder, wheel, cwd=folder
    )
    return folder


def test_what_the_wheel_holds(wheel: Path):
    names = [Path(name) for name in zipfile.ZipFile(wheel).namelist()]
    top_folders = {name.parts[0] for name in names}
    assert {top for top in top_folders if not top.endswith(".dist-info")} == {"align"}
    sources = (("align", "align"), *((name, f"align/{name}") for name in ("annotate", "reward", "conf", "recipes")))
    for source, target in sources:
        patterns = (
            "*.yaml",
            "*.sh",
            "*.py",
            "*.json",
            "*.jsonl",
            "*.safetensors",
            "*.js",
            "*.css",
            "*.html",
            "*.md",
            "*.svg",
        )
        source_files = {p.relative_to(ROOT / source) for pattern in patterns for p in (ROOT / source).rglob(pattern)}
        wheel_files = {name.relative_to(target) for name in names if name.is_relative_to(target)}
        assert source_files
        assert source_files <= wheel_files
    assert not [name for name in names if name.suffix == ".pyc" or "tests" in name.parts]
    assert not {name.parts[1] for name in names if name.parts[0].endswith(".dist-info")} ^ {
        *("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses"),
    }


def test_it_runs_elsewhere(installed: Path, tmp_path: Path):
    (tmp_path / "reward.py").write_text("raise SystemExit('the wrong reward')\n")
    (tmp_path / "conf" / "model").mkdir(parents=True)
    (tmp_path / "conf" / "model" / "mine.yaml").write_text("path: org/mine\n")

    def run_align(*arguments: str) -> str:
        return run_command(sys.executable, "-m", "align", *arguments, cwd=tmp_path, PYTHONPATH=str(installed))

    assert "usage: python -m align stage=STAGE" in run_align()
    assert "path: org/mine" in run_align("stage=full", "model=mine", "--cfg", "job")
    code = (
        "import align, align.reward, align.__main__; from align.config.group_files import find_conf_dir; "
        "print(align.__file__, find_conf_dir())"
    )
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    paths = run_command(sys.executable, "-c", code, cwd=folder, PYTHONPATH=str(installed)).split()
    assert paths == [str(installed / "align" / "__init__.py"), str(installed / "align" / "conf")]


def test_its_command_is_installed(installed: Path, tmp_path: Path):
    assert "usage:" in run_command(installed / "bin" / "align", cwd=tmp_path, PYTHONPATH=str(installed))


def test_its_stages_read_our_reward_beside_a_users_own(installed: Path, tmp_path: Path):
    (tmp_path / "reward.py").write_text("raise SystemExit('the wrong reward')\n")
    process = subprocess.run(
        [sys.executable, "-m", "align", "stage=ppo"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (process.returncode, process.stderr.count("\n")) == (2, 1), process.stderr
    assert "init=sft:latest" in process.stderr
