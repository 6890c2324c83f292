"""Stages without their extras: a stage that needs one fails with one line that names it; the others work."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path
from types import SimpleNamespace

import pytest

from align.__main__ import main
from align.config.extras import EXTRA_NEEDS, ExtraNeed
from align.config.stages import STAGES
from align.core.distribution import EXTRA_MODULES
from align.core.errors import InputError
from align.registry.comparison_page import Point, draw_tradeoff
from align.report import Report
from align.reward.checkers.build import build_checker

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
LEFT_OUT = sorted({module for modules in EXTRA_MODULES.values() for module in modules} | {"jsonschema_rs", "gguf"})
"""Modules that the default installation lacks."""

LINES = {
    "data": ["stage=data", "stage.sources=[rows.jsonl]"],
    "annotate": ["stage=annotate"],
    "sample": ["stage=sample"],
    "serve": ["stage=serve"],
    "registry": ["stage=registry", "stage.action=serve"],
}


def hide_modules(monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)  # find_spec finds no such module, and any import fails


@pytest.mark.parametrize("need", EXTRA_NEEDS, ids=lambda need: need.stage)
def test_a_stage_without_its_extra_says_so_in_one_line(
    need: ExtraNeed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    module = EXTRA_MODULES[need.extra][0]
    hide_modules(monkeypatch, module)
    assert main([*LINES[need.stage], f"run.root={tmp_path / 'runs'}"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    setting = f"stage={need.stage}" if need.action is None else f"stage.action={need.action}"
    problem = f"needs packages that are not installed ({module})"
    assert captured.err == f"align: {setting}: {problem}. Run: pip install 'align-rlhf[{need.extra}]'\n"
    assert not (tmp_path / "runs").exists()


def test_each_need_is_one_of_a_stage():
    assert {need.stage for need in EXTRA_NEEDS} == set(LINES)
    assert set(LINES) <= set(STAGES)


def test_a_choice_can_make_an_extra_unnecessary():
    sample = ExtraNeed("sample", "annotate", unless="best_of")
    assert sample.applies_to(SimpleNamespace(name="sample", best_of=None))
    assert not sample.applies_to(SimpleNamespace(name="sample", best_of=4))
    assert not sample.applies_to(SimpleNamespace(name="sft"))
    page = ExtraNeed("registry", "annotate", action="serve")
    assert page.applies_to(SimpleNamespace(name="registry", action="serve"))
    assert not page.applies_to(SimpleNamespace(name="registry", action="list"))


def test_every_extra_installs_the_modules_that_it_is_checked_by():
    """Compare with the distributions of this environment, which have all extras but lm-eval."""
    providers = packages_distributions()
    names = {name.lower().replace("_", "-") for names in providers.values() for name in names}
    for extra, modules in EXTRA_MODULES.items():
        declared = read_declared(extra)
        for module in modules:
            provided = {name.lower().replace("_", "-") for name in providers.get(module, [])}
            assert provided & declared or not declared & names, f"[{extra}] does not install {module}"


def read_declared(extra: str) -> set[str]:
    """Return the names of the distributions that an extra requires, also through our other extras."""
    names = set()
    for requirement in PROJECT["optional-dependencies"][extra]:
        name, _, extras = requirement.partition("[")
        if name == PROJECT["name"]:
            for required_extra in extras.partition("]")[0].split(","):
                names |= read_declared(required_extra)
        else:
            name = "".join(c for c in name.partition(">")[0].partition("=")[0] if c.isalnum() or c in "-_")
            names.add(name.lower().replace("_", "-"))
    return names


def test_stages_that_train_import_nothing_of_an_extra():
    """Import them in one process in which any import of such a module fails."""
    stages_with_extra = {need.stage for need in EXTRA_NEEDS if need.action is None and need.unless is None}
    modules = [f"align.stages.{stage.module}" for name, stage in STAGES.items() if name not in stages_with_extra]
    modules.append("align.stages.runner")
    modules += ["align.report.live", "align.registry.comparison_page"]
    code = f"""
import importlib, sys
for name in {LEFT_OUT}:
    sys.modules[name] = None
for name in {modules}:
    importlib.import_module(name)
"""
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr


def test_a_check_by_schema_names_its_extra(monkeypatch: pytest.MonkeyPatch):
    hide_modules(monkeypatch, "jsonschema_rs")
    with pytest.raises(InputError, match=r"check\.kind=json_schema.*jsonschema_rs.*pip install 'align-rlhf\[serve\]'"):
        build_checker({"kind": "json_schema", "schema": {}}, "check")


def test_a_report_without_matplotlib_describes_its_plots(monkeypatch: pytest.MonkeyPatch):
    points = [Point("1", (1.0, 1.0, 1.0), (2.0, 2.0, 2.0))]

    def build_report() -> str:
        page = Report("r")
        for name in ("first", "second"):
            page.draw(lambda: draw_tradeoff(points, points, "KL", "score"), "How to read it.", f"The {name} <curve>")
        return page.html()

    html = build_report()
    assert html.count("data:image/svg+xml") == 2
    assert "pip install" not in html
    hide_modules(monkeypatch, "matplotlib")
    html_without_plots = build_report()
    assert "data:image" not in html_without_plots
    assert html_without_plots.count("align-rlhf[plots]") == 1
    assert "<p>The first &lt;curve&gt;</p>" in html_without_plots
    assert "<p>The second &lt;curve&gt;</p>" in html_without_plots


CHATS = "".join(
    f'{{"prompt": "What is {i} and {i + 1}?", "completion": "It is {2 * i + 1}, I think."}}\n' for i in range(40)
)
PAIRS = "".join(
    f'{{"prompt": "Is it {i}?", "chosen": "Yes, I am glad to say so!", "rejected": "No."}}\n' for i in range(40)
)


@pytest.mark.slow
def test_the_default_installation_trains_evaluates_and_exports(tmp_path: Path):
    (tmp_path / "chats.jsonl").write_text(CHATS)
    (tmp_path / "pairs.jsonl").write_text(PAIRS)
    chats = "data=jsonl data.path=chats.jsonl"
    pairs = "data=jsonl data.path=pairs.jsonl"
    lines = [
        f"stage=sft model=pocket {chats} stage.max_steps=2",
        f"stage=reward {pairs}",
        f"stage=ppo {chats} stage.updates=1 stage.batch_size=8 rollout.max_new_tokens=8",
        f"stage=dpo {pairs}",
        f"stage=eval {chats} rollout.max_new_tokens=8",
        "stage=export",
        "stage=registry",
    ]
    code = f"""
import sys
for name in {LEFT_OUT}:
    sys.modules[name] = None
from align.__main__ import main
for line in {lines}:
    status = main(line.split())
    if status:
        sys.exit(f"{{line}} ended with {{status}}")
"""
    process = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert {path.name for path in (tmp_path / "runs").iterdir()} >= {"sft", "reward", "ppo", "dpo", "eval", "export"}
    page = next((tmp_path / "runs" / "sft").glob("*/report.html")).read_text(encoding="utf-8")
    assert "align-rlhf[plots]" in page
