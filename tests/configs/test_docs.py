"""README and docs name files, links and messages that exist, and every command line in them is valid."""

from __future__ import annotations

import ast
import importlib
import json
import re
import shlex
import subprocess
from collections import Counter
from importlib.util import module_from_spec, spec_from_file_location
from itertools import product
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import yaml
from code_blocks import PAGES, ROOT, read_blocks

from align.__main__ import compose_config, find_stages, main
from align.cli.batch import split_line
from align.config.compose import build_config, compose_tree
from align.core.errors import InputError
from align.data.read.records import read_documents, read_preferences
from align.report import format_interval


def collect_commands() -> list[tuple[str, str]]:
    """Return (page, line) for every `python -m align …` line in a bash block."""
    page_lines = []
    for page in PAGES:
        for block in read_blocks(page, "bash"):
            page_lines += [(page.name, line) for line in block.text.splitlines() if line.startswith("python -m align ")]
    return page_lines


def test_there_are_commands_to_check() -> None:
    assert len(collect_commands()) >= 5


@pytest.fixture(scope="module")
def own_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with the files that docs/configuration.md shows, each under the name in its first line."""
    folder = tmp_path_factory.mktemp("own")
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    for name, content in re.findall(r"```yaml\n# (conf/\S+)\n(.*?)```", text, re.DOTALL):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content, encoding="utf-8")
    return folder


@pytest.mark.parametrize(("page", "line"), collect_commands())
def test_a_documented_command_composes(
    page: str, line: str, own_files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if page == "configuration.md":
        monkeypatch.chdir(own_files)
    arguments = shlex.split(line, comments=True)[3:]
    if "--cfg" in arguments:
        assert main(arguments) == 0
        assert all(yaml.safe_load_all(capsys.readouterr().out))
    elif arguments[-1] != "--help":
        assert find_stages(arguments)


def test_the_page_on_configuration_shows_what_it_speaks_of(own_files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(own_files)
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    file_names = {path.relative_to(own_files / "conf").as_posix() for path in own_files.rglob("*.yaml")}
    assert {line.split()[0] for line in text.split("conf/\n")[1].split("```")[0].splitlines() if line} == file_names
    config = compose_config(["+experiment=support", "method=qlora", "seed=8"])
    assert (config.method.name, config.method.r, config.seed, config.data.path) == ("qlora", 32, 8, "support.jsonl")
    assert compose_config(["stage=sft", "model=pocket", "data=support"]).data.max_length == 1024
    assert len(find_stages(["-m", "+experiment=support-grid"])) == 6
    assert len(find_stages(["-m", "+experiment=support-grid", "seed=0"])) == 3
    assert len(find_stages(["+experiment=support-grid"])) == 1


def collect_recipe_lines() -> list[tuple[str, str]]:
    """Return (recipe, line) for every line that a `run.sh` pipes to `python -m align -`.

    The scripts run with another `python`, which keeps these lines, and prints 1 for a program of theirs (`-c`).
    """
    lines = []
    with TemporaryDirectory() as name:
        folder = Path(name)
        stub = folder / "python"
        stub.write_text(
            '#!/bin/sh\n[ "$1" != "-c" ] || echo 1\n[ "$*" != "-m align -" ] || cat >> "$LINES"\n', encoding="utf-8"
        )
        stub.chmod(0o755)
        for script in sorted((ROOT / "recipes").glob("*/run.sh")):
            kept = folder / f"{script.parent.name}.txt"
            environment = {"PATH": f"{folder}:/usr/bin:/bin", "LINES": str(kept)}
            subprocess.run(["bash", script], env=environment, cwd=folder, capture_output=True, check=False)
            if kept.is_file():
                lines += [(script.parent.name, line) for line in kept.read_text(encoding="utf-8").splitlines()]
    return lines


@pytest.mark.parametrize(("recipe", "line"), collect_recipe_lines())
def test_a_line_of_a_recipe_composes(recipe: str, line: str) -> None:
    assert build_config(compose_tree(split_line(line))).stage is not None, f"{recipe}: {line}"


def test_the_lines_of_the_frontier_compose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks" / "frontier")
    methods = importlib.import_module("training_methods")
    common = methods.build_shared_overrides(Path("runs"), methods.TUNING_SEED, "auto")
    for stage in (*methods.SHARED_STAGES, "ppo"):
        assert build_config(compose_tree([*common, *methods.read_recipe_overrides(stage, 0)])).stage.name == stage
    best_of = methods.build_best_of_overrides(64, ROOT / "README.md")
    assert build_config(compose_tree([*common, *best_of])).stage.best_of == 64
    assert len({len(method.learning_rates) for method in methods.METHODS}) == 1
    for method in methods.METHODS:
        for rate, price in product(method.learning_rates, method.kl_values):
            run = build_config(compose_tree([*common, *method.build_overrides(rate, price)]))
            assert (run.stage.name, run.stage.lr) == (method.stage, float(rate))
            assert getattr(run.stage, method.kl_key) == float(price)
    kl_efficiency = importlib.import_module("kl_efficiency")
    overoptimisation = importlib.import_module("overoptimisation")
    for line in (*kl_efficiency.LINES.values(), overoptimisation.POLICY_OVERRIDES, overoptimisation.REWARD_OVERRIDES):
        rows = ["data.path=rows.jsonl", "init=sft:s"] if "data=files" in line else []
        assert build_config(compose_tree([*common, *line.split(), *rows])).stage.name in line


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)\s]*)?\)|^\[[^]]+\]: (\S+)$", text, re.MULTILINE):
        target = "".join(target)
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def collect_example_rows() -> list[Any]:
    """Return the blocks of example rows of every page as parameters (mark, text)."""
    example_blocks = [b for page in PAGES for b in read_blocks(page, "json") if b.kind == "rows"]
    return [pytest.param(b.mark, b.text, id=f"{b.page.name}-{i}-{b.mark}") for i, b in enumerate(example_blocks)]


@pytest.mark.parametrize(("kind", "text"), collect_example_rows())
def test_example_rows_are_read_as_the_page_says(kind: str, text: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(text, encoding="utf-8")
    if kind == "pairs":
        assert read_preferences(file)
    elif kind == "imitate":
        assert len(read_documents(file)) == len(text.splitlines())
    else:
        assert kind == "refused"
        for row in text.splitlines():
            file.write_text(row + "\n", encoding="utf-8")
            with pytest.raises(InputError):
                read_documents(file)


def test_both_ways_to_write_reasoning_are_one(tmp_path: Path) -> None:
    rows, *_ = (b.text for b in read_blocks(ROOT / "docs" / "data-formats.md", "json") if "reasoning_content" in b.text)
    (tmp_path / "rows.jsonl").write_text(rows, encoding="utf-8")
    first, second = (document.messages for document in read_documents(tmp_path / "rows.jsonl"))
    assert first == second


def collect_messages() -> list[str]:
    """Return all string literals of the source; of an f-string, the parts between its variables."""
    files = (path for room in ("align", "annotate", "reward") for path in (ROOT / room).rglob("*.py"))
    nodes = (node for file in files for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    return [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]


def test_troubleshooting_quotes_messages_as_they_are_printed() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^### (.+)$", page, re.MULTILINE)
    assert len(quoted) >= 25
    messages = collect_messages()
    pieces = {piece.strip(): message for message in quoted for piece in message.split("…") if piece.strip()}
    assert {m for piece, m in pieces.items() if not any(piece in text for text in messages)} == set()


def test_readme_counts_the_types_of_models_that_were_measured() -> None:
    table = (ROOT / "docs" / "architectures.md").read_text(encoding="utf-8")
    fast, plain = (int(re.findall(rf"^\| {path} \| (\d+) \|", table, re.MULTILINE)[0]) for path in ("fast", "plain"))
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"[{fast + plain} types]" in text
    assert f"of types with default settings, {fast} and {plain}" in " ".join(text.split())


def test_readme_has_the_win_rates_that_the_quickstart_reached() -> None:
    rows = json.loads((ROOT / "recipes" / "quickstart" / "expected.json").read_text(encoding="utf-8"))
    rates = [row["win_rate"] for row in rows]
    assert len(rows) == 5
    won = f"wins {min(rates):.2f} to {max(rates):.2f} of the held-out prompts against the SFT model in five runs"
    assert won in " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())


def test_every_page_is_in_the_site() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:\n")[1]
    assert set(re.findall(r"([\w-]+\.md)$", text, re.MULTILINE)) == {p.name for p in (ROOT / "docs").glob("*.md")}


def test_the_tree_names_what_is_there() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = text.split("## What is where")[1].split("```")[1]
    named = {line.split()[0] for line in tree.splitlines() if line.strip()}
    assert len(named) > 15
    assert [path for path in named if not (ROOT / path).exists()] == []
    rooms = {
        f"align/{p.name}/" for p in (ROOT / "align").iterdir() if (p / "__init__.py").is_file() and not p.is_symlink()
    }
    assert rooms <= named


def test_the_files_that_answer_where_to_look_are_there() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    questions = [line for line in page.partition("| question |")[2].splitlines() if line.count("`") > 1]
    assert len(questions) >= 20
    files = re.findall(r"`([\w./]+\.(?:py|js|md|yaml))`", page)
    assert len(files) > 50
    assert [path for path in files if not (ROOT / path).is_file()] == []


XEON = "Intel(R) Xeon(R) Processor, amx_bf16"
EPYC = "AMD EPYC, avx512_bf16"
XEON_WITHOUT_BF16 = "Intel(R) Xeon(R) Processor @ 2.80GHz, avx512_vnni"
MISSES = {
    "quickstart": [
        (EPYC, 0, "minutes"),
        (XEON_WITHOUT_BF16, 0, "minutes"),
        (XEON, 0, "win_rate"),
        (XEON, 0, "minutes"),
        (XEON, 1, "minutes"),
        (XEON, 2, "minutes"),
    ]
}
"""Bars that rows of `expected.json` miss, as docs/recipes.md says in bold."""


@pytest.mark.parametrize("recipe", ["quickstart", "forty"])
def test_recipe_table_shows_every_expected_row_and_its_misses(recipe: str) -> None:
    check = load_module(ROOT / "recipes" / "check.py")
    rows = check.read_json(recipe, "expected.json")
    bars = check.read_json(recipe, "bars.json")
    for processor in {row["processor"] for row in rows}:
        seeds = [row["seed"] for row in rows if row["processor"] == processor]
        assert seeds == list(range(len(seeds)))  # no seed is missing
    assert check.format_table(recipe) in (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    missed = [
        (row["processor"], row["seed"], name)
        for row in rows
        for name, bar in bars.items()
        if not check.meets_bar(row[name], *bar)
    ]
    assert missed == MISSES.get(recipe, [])


@pytest.mark.parametrize(
    ("page", "script", "figures"),
    [
        ("docs/choosing.md", "benchmarks/frontier/run.py", "benchmarks/frontier/results.json"),
        ("docs/choosing.md", "benchmarks/frontier/kl_efficiency.py", "benchmarks/frontier/spend.json"),
        ("docs/choosing.md", "benchmarks/frontier/overoptimisation.py", "benchmarks/frontier/turn.json"),
        ("docs/choosing.md", "benchmarks/methods.py", "benchmarks/methods.json"),
        ("docs/annotating-for-a-team.md", "benchmarks/annotation/load.py", "benchmarks/annotation/load.json"),
        ("docs/recipes.md", "recipes/hh/compare_with_trl.py", "recipes/hh/expected.json"),
        ("docs/recipes.md", "recipes/reasoning/compare.py", "recipes/reasoning/expected.json"),
        ("docs/recipes.md", "recipes/demo/seeds.py", "recipes/demo/tuning.json"),
        ("docs/recipes.md", "recipes/demo/seeds.py", "recipes/demo/expected.json"),
        ("docs/recipes.md", "recipes/instructions/figures.py", "recipes/instructions/expected.json"),
        ("docs/recipes.md", "recipes/instructions/ifbench_scores.py", "recipes/instructions/ifbench.json"),
        ("benchmarks/ppo/README.md", "benchmarks/ppo/run.py", "benchmarks/ppo/results.json"),
        ("benchmarks/ppo/README.md", "benchmarks/ppo/run.py", "benchmarks/ppo/results-amx.json"),
        ("benchmarks/ppo/README.md", "benchmarks/ppo/gold.py", "benchmarks/ppo/gold.json"),
        ("benchmarks/ppo/README.md", "benchmarks/ppo/run.py", "benchmarks/ppo/results-grpo.json"),
        ("benchmarks/ppo/README.md", "benchmarks/ppo/live.py", "benchmarks/ppo/live.json"),
        ("benchmarks/serve/README.md", "benchmarks/serve/decode_step.py", "benchmarks/serve/step.json"),
        ("benchmarks/serve/README.md", "benchmarks/serve/batch_exactness.py", "benchmarks/serve/exact.json"),
        ("benchmarks/serve/README.md", "benchmarks/serve/batching.py", "benchmarks/serve/batching.json"),
        ("benchmarks/serve/README.md", "benchmarks/serve/over_http.py", "benchmarks/serve/over_http.json"),
        ("benchmarks/serve/README.md", "benchmarks/serve/flood.py", "benchmarks/serve/flood.json"),
        ("benchmarks/serve/README.md", "benchmarks/serve/adapter_capacity.py", "benchmarks/serve/many.json"),
        ("benchmarks/serve/README.md", "benchmarks/serve/rollouts.py", "benchmarks/serve/rollouts.json"),
    ],
)
def test_a_measured_table_is_what_its_script_found(
    page: str, script: str, figures: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in (ROOT / "benchmarks" / "ppo", (ROOT / script).parent):  # the script's imports
        monkeypatch.syspath_prepend(folder)
    measurements = json.loads((ROOT / figures).read_text(encoding="utf-8"))
    assert load_module(ROOT / script).format_table(measurements) in (ROOT / page).read_text(encoding="utf-8")


def test_the_readme_has_the_figures_of_the_reasoning_recipe() -> None:
    compare = load_module(ROOT / "recipes" / "reasoning" / "compare.py")
    rows = json.loads((ROOT / "recipes" / "reasoning" / "expected.json").read_text(encoding="utf-8"))
    start, align, trl, as_many = (
        fmean(row["right"][name]["value"] for row in rows) for name in ("start", "align", "trl", "as-many")
    )
    differences = compare.pool_differences(rows)
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert (
        f"in {start:.2f} of held-out questions. GRPO on one CPU core raises this to {align:.2f} in 15 minutes" in text
    )
    at_equal_time = format_interval(differences["align"], ".2f")
    assert f"on the other core, reaches {trl:.2f} (three seeds; difference {at_equal_time})" in text
    gains = f"both had gained {trl - start:.2f} to {as_many - start:.2f}"
    at_equal_answers = format_interval(differences["as-many"], ".2f")
    assert f"(seven updates, when {gains}) they differ by {at_equal_answers}." in text
    assert {row["updates"]["trl"] for row in rows} == {7}
    assert len(rows) == 3
    assert compare.list_missed_bars(rows) == []


def test_the_checkers_page_has_the_figures_of_the_comparison_with_lm_eval() -> None:
    comparison = json.loads((ROOT / "benchmarks" / "evals" / "ifeval_verdicts.json").read_text(encoding="utf-8"))
    instructions = {(row["prompt"], row["instruction"]) for row in comparison["differences"]}
    text = " ".join((ROOT / "docs" / "checkers.md").read_text(encoding="utf-8").split())
    assert f"on {comparison['instructions'] - len(instructions)} of {comparison['instructions']} instructions" in text
    align, lm_eval = (comparison["accuracies"][name]["prompt_strict"] for name in ("align", "lm_eval"))
    assert (
        f"follows {align:.4f} of the prompts strictly by these checks and {lm_eval:.4f} by the published ones" in text
    )
    shares = [comparison["accuracies"]["align"][f"{unit}_strict"] for unit in ("prompt", "instruction")]
    assert f"the mean is {100 * fmean(shares):.1f} %" in text
    assert all(f"`{id.partition(':')[2]}`" in text for _, id in instructions)


def test_the_pairs_and_the_readers_votes_of_the_demo_are_those_of_its_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "recipes" / "demo")
    readers = load_module(ROOT / "recipes" / "demo" / "readers.py")
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    summary = (ROOT / "README.md").read_text(encoding="utf-8")
    for run in ("first", "second"):
        counts = {}
        votes_cast = Counter[bool]()
        preferred_after = Counter[bool]()
        for seed in (0, 1, 2):
            folder = ROOT / "recipes" / "demo" / "votes" / run / f"seed-{seed}"
            pairs = json.loads((folder / "key.json").read_text(encoding="utf-8"))
            preferred, table = readers.count_votes(pairs, sorted(folder.glob("reader*.txt")))
            _, after, before, tie = table.splitlines()[-1].split()
            assert f" {after} / {before} / {tie} " in page
            counts[seed] = preferred
            assert (run, seed) != ("second", 0) or readers.format_table(pairs) in page
            votes = [readers.read_votes(path, pairs) for path in sorted(folder.glob("reader*.txt"))]
            for pair, *votes_of_pair in zip(pairs, *votes, strict=True):
                is_cut = pair["before"].endswith(" […]")
                votes_cast[is_cut] += 1
                preferred_after[is_cut] += readers.find_majority(votes_of_pair) == "after"
        shares = f"{preferred_after[True]} of {votes_cast[True]} pairs whose untouched answer was cut off, and in "
        assert shares + f"{preferred_after[False]} of the {votes_cast[False]} others" in " ".join(page.split())
        assert f"in {counts[0]}, {counts[1]} and {counts[2]} of 30" in " ".join(summary.split())


def load_module(path: Path) -> Any:
    spec = spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_share_of_general_data_is_told_as_it_was_measured() -> None:
    """The tables of benchmarks/data/README.md are those of `ratio.json`."""
    folder = ROOT / "benchmarks" / "data"
    spec = spec_from_file_location("ratio", folder / "ratio.py")
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(ratio := module_from_spec(spec))
    tables = ratio.format_table(json.loads((folder / "ratio.json").read_text(encoding="utf-8"))).split("\n\n")
    assert len(tables) == 2
    assert all(table in (folder / "README.md").read_text(encoding="utf-8") for table in tables)
