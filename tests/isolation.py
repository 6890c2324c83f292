"""The environment that tests run in: an empty home, the system's programs, and variables that are listed here.

Importing this module replaces the environment of the process. `conftest.py` imports it before anything of the package,
which sets variables of its own."""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

USER_CACHE = "ALIGN_TESTS_USER_CACHE"
"""The variable that holds the user's cache folder, where `make llama-cpp` puts llama.cpp's converters."""
KEPT = {
    *("CI", "LANG", "LC_ALL", "TERM", "TMPDIR", "TZ", "USER", "LOGNAME", "VIRTUAL_ENV", USER_CACHE),
    *("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_NUM_THREADS", "OMP_NUM_THREADS"),
    *("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE"),
}
KEPT_PREFIXES = ("OPENBLAS_", "PIP_", "PYTEST_", "PYTHON", "COVERAGE_")


def build_isolated_environment(environment: Mapping[str, str], home: Path) -> dict[str, str]:
    """Return the variables of a test process: the listed ones of `environment`, `home` as the home folder, and a PATH
    with this interpreter's folder in front, without folders of the user or of `/usr/local`."""
    user_home = Path(environment.get("HOME") or "/nonexistent")
    variables = {name: value for name, value in environment.items() if name in KEPT or name.startswith(KEPT_PREFIXES)}
    variables.setdefault(USER_CACHE, environment.get("XDG_CACHE_HOME") or str(user_home / ".cache"))
    folders = [Path(folder) for folder in environment.get("PATH", os.defpath).split(os.pathsep) if folder]
    excluded = (user_home, Path("/usr/local"))
    system = [str(folder) for folder in folders if not any(folder.is_relative_to(parent) for parent in excluded)]
    interpreter_folder = str(Path(sys.executable).parent)
    return {**variables, "HOME": str(home), "PATH": os.pathsep.join(dict.fromkeys([interpreter_folder, *system]))}


def isolate_process() -> None:
    """Replace this process's environment by an isolated one. The home folder is deleted when the process ends."""
    home = Path(tempfile.mkdtemp(prefix="align-tests-home-"))
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    variables = build_isolated_environment(os.environ, home)
    os.environ.clear()
    os.environ.update(variables)


def user_converters() -> Path | None:
    """Return the folder where the user installed llama.cpp's converters. Returns None if they are not installed."""
    folder = Path(os.environ[USER_CACHE]) / "align" / "llama.cpp"
    return folder if folder.is_dir() else None


isolate_process()
