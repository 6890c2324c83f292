"""Commands of README and docs, run: some pages as they stand, long blocks with small sizes. A block that needs
something missing here is marked with what it needs."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from code_blocks import NEEDS, PAGES, ROOT, Block, read_blocks
from free_ports import pick_free_port

from align.__main__ import main

AS_THEY_STAND = ("getting-started.md", "data-formats.md", "data.md", "methods.md", "sizes.md")
README_LINES = "Your own model and data"
"""A section whose lines tests/e2e/test_own_model.py runs, on two models."""
ELSEWHERE = ("configuration.md",)
"""A page whose lines tests/configs/test_docs.py composes; tests/e2e runs its sweeps."""
ONE_STORY = ("annotating.md",)
HEREDOC = re.compile(r"^(?P<head>[^\n]*) <<'(?P<end>\w+)'\n(?P<body>.*?)^(?P=end)$", re.M | re.S)
ALIGN = "python -m align "

SMALL = {  # settings that make a line quick; the page sets the rest
    "sft": ("stage.max_steps=2", "stage.batch_size=8", "stage.eval_size=2"),
    "full": ("stage.max_steps=2", "stage.batch_size=8", "stage.eval_size=2"),
    "reward": ("stage.batch_size=8", "stage.micro_batch=8", "stage.epochs=1"),
    "dpo": ("stage.batch_size=8",),
    "kto": (),
    "ppo": (
        "stage.updates=2",
        "stage.batch_size=8",
        "stage.minibatches=2",
        "stage.micro_batch=4",
        "stage.normalise_on=8",
        "stage.eval_prompts=4",
        "rollout.max_new_tokens=8",
    ),
    "verify": ("stage.rows=4", "rollout.max_new_tokens=6"),
    "sample": ("stage.prompts=4", "rollout.max_new_tokens=8"),
    "eval": ("stage.prompts=4", "rollout.max_new_tokens=8"),
    "export": (),
    "annotate": (),
    "data": (),
}
BEST_OF = ("stage.prompts=24", "rollout.max_new_tokens=40")
"""Sizes for `stage=sample` with `stage.best_of`, with which a hardly trained model ends some answers."""
OWN_DATA = ("data=jsonl", "data.path=chats.jsonl", "data.held_out=0.25", "data.max_length=128")
REWARDS = """
def polite(conversations):
    return [float(len(turns[-1]["content"])) for turns in conversations]
"""
JUDGES = """
def helpful(conversations):
    return [float(turns[-1]["content"].count("e")) for turns in conversations]
"""

Run = Callable[..., None]


@pytest.fixture
def printed() -> list[str]:
    """Lines that the commands of a test printed."""
    return []


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], printed: list[str]) -> Run:
    """A function that runs one line and checks that it succeeds."""

    def run_line(arguments: list[str]) -> None:
        status = main(arguments)
        captured = capsys.readouterr()
        assert status == 0, f"{shlex.join(arguments)}\n{captured.out}{captured.err}"
        printed.extend(captured.out.splitlines())

    return run_line


def mask_figures(line: str) -> str:
    """Replace digests and numbers of a printed line by `#`."""
    return re.sub(r"\b[0-9a-f]{8,}\b|\d+(\.\d+)?", "#", line)


def run_block(block: Block, run: Run) -> None:
    """Run a block of commands, heredocs and comments as bash would. Any other line is an error of the page."""
    remaining = block.text
    while remaining.strip():
        heredoc = HEREDOC.match(remaining)
        if heredoc is None:
            line, _, remaining = remaining.partition("\n")
            if line.strip() and not line.startswith("#"):
                assert line.startswith(ALIGN), f"{block.page.name}: no test runs: {line}"
                run(shlex.split(line, comments=True)[3:])
        else:
            remaining = remaining[heredoc.end() + 1 :]
            if heredoc["head"] == "python -":
                exec(compile(heredoc["body"], block.page.name, "exec"), {"__name__": "__main__"})
            else:
                cat, name = heredoc["head"].split(" > ")
                assert cat == "cat", f"{block.page.name}: {heredoc['head']}"
                Path(name).write_text(heredoc["body"], encoding="utf-8")


def run_beside_server(server_blocks: list[Block]) -> tuple[list[str], list[str]]:
    """Start the server of the first block on a free port and run the other blocks in bash. Return the lines that the
    server prints until it is ready, and the output of each other block."""
    port = pick_free_port()
    lines = list[str]()
    answers = list[str]()
    command = [sys.executable, "-m", "align", *shlex.split(server_blocks[0].text)[3:], f"stage.port={port}"]
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, encoding="utf-8") as server:
        assert server.stdout is not None
        try:
            for text in server.stdout:
                lines.append(text.rstrip("\n"))
                if text.startswith("Ctrl+C"):
                    break
            for block in server_blocks[1:]:
                script = block.text.replace("127.0.0.1:8000", f"127.0.0.1:{port}")
                process = subprocess.run(
                    ["bash", "-ec", script], env=environment, capture_output=True, encoding="utf-8"
                )
                assert process.returncode == 0, f"{script}\n{process.stderr}\n{lines}"
                answers.append(process.stdout)
        finally:
            server.send_signal(signal.SIGINT)
            server.communicate(timeout=60)
    assert server.returncode == 0
    return lines, answers


@pytest.mark.slow
@pytest.mark.parametrize("page", AS_THEY_STAND)
def test_a_page_runs_as_it_stands(
    page: str, run: Run, printed: list[str], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_model, "my-model")
    unmarked = [block for block in read_blocks(ROOT / "docs" / page, "bash") if block.needs is None]
    for block in unmarked:
        run_block(block, run)
    assert list(Path("runs").glob("*/*/manifest.json")) or page == "sizes.md", "plans make no run"
    if server_blocks := [block for block in read_blocks(ROOT / "docs" / page, "bash") if block.needs == "server"]:
        lines, (by_curl, by_openai) = run_beside_server(server_blocks)
        printed += lines
        assert json.loads(by_curl)["choices"][0]["message"]["content"]
        assert re.fullmatch(r"before \S.*\nsupport \S.*\n", by_openai, re.DOTALL)
    promised = [
        line
        for block in read_blocks(ROOT / "docs" / page, "")
        if block.kind == "printed"
        for line in block.text.splitlines()
    ]
    lines = {mask_figures(line) for line in printed}
    assert [line for line in promised if mask_figures(line) not in lines] == []


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, chats: Path) -> Path:
    """A folder with everything that the pages name: a model, data, functions, and a run of each stage."""
    folder = tmp_path_factory.mktemp("workshop")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        shutil.copytree(tiny_model, "ORG/NAME")
        shutil.copy(chats, "chats.jsonl")
        turns = [json.loads(line)["messages"] for line in chats.read_text(encoding="utf-8").splitlines()]
        pairs = [{"prompt": t[:1], "chosen": t[1:], "rejected": [{**t[1], "content": "No."}]} for t in turns]
        Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs), encoding="utf-8")
        (items,) = (b for b in read_blocks(ROOT / "docs" / "annotating.md", "json") if "answers" in b.text)
        more_items = [{"prompt": t[:1], "answers": [t[1]["content"], "I hate that."]} for t in turns[:8]]
        text = items.text + "".join(json.dumps(row) + "\n" for row in more_items)
        Path("items.jsonl").write_text(text, encoding="utf-8")
        Path("guidelines.md").write_text("Prefer the warmer answer.\n", encoding="utf-8")
        Path("my_rewards.py").write_text(REWARDS, encoding="utf-8")
        Path("my_judges.py").write_text(JUDGES, encoding="utf-8")
        pair_settings = ("data=jsonl", "data.path=pairs.jsonl", "stage.held_out=0.25")
        seeds = enumerate(("held_back", "a", "b"))
        for arguments in (
            ["stage=sft", "model=hub", "model.path=ORG/NAME"],
            *(["stage=reward", *pair_settings, f"seed={seed}", f"run.name={name}"] for seed, name in seeds),
            ["stage=ppo", "seed=7"],
        ):
            assert main(shrink_command(arguments)) == 0
    return folder


def shrink_command(arguments: list[str]) -> list[str]:
    """Return a line with sizes that take a second or two, on data that exists."""
    (stage,) = (word.removeprefix("stage=") for word in arguments if word.startswith("stage="))
    data = () if stage in ("annotate", "export") or any(w.startswith("data=") for w in arguments) else OWN_DATA
    best_of = any(word.startswith("stage.best_of=") for word in arguments)
    return [*arguments, *data, *(BEST_OF if best_of else SMALL[stage])]


def list_long_blocks() -> list[Any]:
    """Return the parameters of blocks that run in one folder: all blocks of a page of `ONE_STORY`, else each block by
    itself."""
    parameters = []
    for page in PAGES:
        long = [block for block in read_blocks(page, "bash") if block.needs == "time"]
        units = [long] if page.name in ONE_STORY else [[block] for block in long]
        parameters += [pytest.param(unit, id=f"{page.name}-{i}") for i, unit in enumerate(units) if unit]
    return parameters


@pytest.mark.slow
@pytest.mark.parametrize("unit", list_long_blocks())
def test_what_takes_long_runs_in_small(
    unit: list[Block], run: Run, workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(workshop, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for block in unit:
        run_block(block, lambda words: run(shrink_command(words)))


def test_every_block_is_run_or_says_what_it_needs() -> None:
    """A page's bash block without a mark is run by some test: as it stands, or README's five lines."""
    unmarked = []
    for page in PAGES:
        for block in read_blocks(page, "bash"):
            is_readme_line = page.name == "README.md" and block in read_blocks(page, "bash", README_LINES)
            if block.needs is None and page.name not in (*AS_THEY_STAND, *ELSEWHERE) and not is_readme_line:
                unmarked.append(f"{page.name}: {block.text.splitlines()[0]}")
    assert unmarked == [], "write `<!-- needs: … -->` above, with one of: " + ", ".join(NEEDS)


def test_a_mark_is_one_of_the_list() -> None:
    marks = {block.needs for page in PAGES for block in read_blocks(page, "bash")} - {None}
    assert marks <= NEEDS.keys()
    assert len(marks) > 4
