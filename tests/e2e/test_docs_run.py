"""The commands of README and docs, run: those of getting started, data formats and methods as they stand, those that
take long in small; what needs something that is not here says what."""

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
from pages import NEEDS, PAGES, ROOT, Block, blocks
from serving import free_port

from align.__main__ import main

AS_THEY_STAND = ("getting-started.md", "data-formats.md", "data.md", "methods.md", "sizes.md")
README_LINES = "Your own model and data"
"""A section whose lines tests/e2e/test_own_model.py runs, on two models."""
ELSEWHERE = ("configuration.md",)
"""tests/configs/test_docs.py composes every line of it beside the files that it shows, and tests/e2e runs sweeps."""
ONE_STORY = ("annotating.md",)
HEREDOC = re.compile(r"^(?P<head>[^\n]*) <<'(?P<end>\w+)'\n(?P<body>.*?)^(?P=end)$", re.M | re.S)
ALIGN = "python -m align "

SMALL = {  # what makes a line quick; everything else is as the page has it
    "sft": ("stage.max_steps=2", "stage.batch_size=8", "stage.eval_size=2"),
    "full": ("stage.max_steps=2", "stage.batch_size=8", "stage.eval_size=2"),
    "reward": ("stage.batch_size=8", "stage.micro_batch=8", "stage.epochs=1"),
    "dpo": ("stage.batch_size=8",),
    "kto": (),
    "ppo": (
        "stage.updates=2", "stage.batch_size=8", "stage.minibatches=2", "stage.micro_batch=4", "stage.normalise_on=8",
        "stage.eval_prompts=4", "rollout.max_new_tokens=8",
    ),
    "verify": ("stage.rows=4", "rollout.max_new_tokens=6"),
    "sample": ("stage.prompts=4", "rollout.max_new_tokens=8"),
    "eval": ("stage.prompts=4", "rollout.max_new_tokens=8"),
    "export": (),
    "annotate": (),
    "data": (),
}  # fmt: skip
BEST_OF = ("stage.prompts=24", "rollout.max_new_tokens=40")
"""For `stage=sample` with `stage.best_of`: some answers of a model that was hardly trained have to end."""
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
    """What the lines of a test have printed."""
    return []


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], printed: list[str]) -> Run:
    """Runs the words of one line, which has to end well."""

    def line(words: list[str]) -> None:
        status = main(words)
        said = capsys.readouterr()
        assert status == 0, f"{shlex.join(words)}\n{said.out}{said.err}"
        printed.extend(said.out.splitlines())

    return line


def without_figures(line: str) -> str:
    """A printed line, whatever the run's name, digests and numbers are."""
    return re.sub(r"\b[0-9a-f]{8,}\b|\d+(\.\d+)?", "#", line)


def perform(block: Block, run: Run) -> None:
    """What bash would do with a block of commands, heredocs and comments; anything else is an error of the page."""
    rest = block.text
    while rest.strip():
        found = HEREDOC.match(rest)
        if found is None:
            line, _, rest = rest.partition("\n")
            if line.strip() and not line.startswith("#"):
                assert line.startswith(ALIGN), f"{block.page.name}: no test runs: {line}"
                run(shlex.split(line, comments=True)[3:])
        else:
            rest = rest[found.end() + 1 :]
            if found["head"] == "python -":
                exec(compile(found["body"], block.page.name, "exec"), {"__name__": "__main__"})
            else:
                cat, name = found["head"].split(" > ")
                assert cat == "cat", f"{block.page.name}: {found['head']}"
                Path(name).write_text(found["body"], encoding="utf-8")


def ask_a_server(found: list[Block]) -> tuple[list[str], list[str]]:
    """What the server of the first block prints until it is ready, and what each other block prints beside it, in bash.
    It has a port of its own."""
    port, said, answers = free_port(), list[str](), list[str]()
    words = [sys.executable, "-m", "align", *shlex.split(found[0].text)[3:], f"stage.port={port}"]
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(words, stdout=subprocess.PIPE, env=environment, encoding="utf-8") as server:
        assert server.stdout is not None
        try:
            for line in server.stdout:
                said.append(line.rstrip("\n"))
                if line.startswith("Ctrl+C"):
                    break
            for block in found[1:]:
                script = block.text.replace("127.0.0.1:8000", f"127.0.0.1:{port}")
                done = subprocess.run(["bash", "-ec", script], env=environment, capture_output=True, encoding="utf-8")
                assert done.returncode == 0, f"{script}\n{done.stderr}\n{said}"
                answers.append(done.stdout)
        finally:
            server.send_signal(signal.SIGINT)
            server.communicate(timeout=60)
    assert server.returncode == 0
    return said, answers


@pytest.mark.slow
@pytest.mark.parametrize("page", AS_THEY_STAND)
def test_a_page_runs_as_it_stands(
    page: str, run: Run, printed: list[str], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_model, "my-model")
    ran = [block for block in blocks(ROOT / "docs" / page, "bash") if block.needs is None]
    for block in ran:
        perform(block, run)
    assert list(Path("runs").glob("*/*/manifest.json")) or page == "sizes.md", "plans make no run"
    if served := [block for block in blocks(ROOT / "docs" / page, "bash") if block.needs == "server"]:
        said, (by_curl, by_openai) = ask_a_server(served)
        printed += said
        assert json.loads(by_curl)["choices"][0]["message"]["content"]
        assert re.fullmatch(r"before \S.*\nsupport \S.*\n", by_openai, re.DOTALL)
    shown = [
        line
        for block in blocks(ROOT / "docs" / page, "")
        if block.kind == "printed"
        for line in block.text.splitlines()
    ]
    said = {without_figures(line) for line in printed}
    assert [line for line in shown if without_figures(line) not in said] == []


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, chats: Path) -> Path:
    """A folder with whatever the pages speak of: a model, data, functions, and a run of each stage."""
    folder = tmp_path_factory.mktemp("workshop")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        shutil.copytree(tiny_model, "ORG/NAME")
        shutil.copy(chats, "chats.jsonl")
        turns = [json.loads(line)["messages"] for line in chats.read_text(encoding="utf-8").splitlines()]
        pairs = [{"prompt": t[:1], "chosen": t[1:], "rejected": [{**t[1], "content": "No."}]} for t in turns]
        Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs), encoding="utf-8")
        (items,) = (b for b in blocks(ROOT / "docs" / "annotating.md", "json") if "answers" in b.text)
        more = [{"prompt": t[:1], "answers": [t[1]["content"], "I hate that."]} for t in turns[:8]]
        text = items.text + "".join(json.dumps(row) + "\n" for row in more)
        Path("items.jsonl").write_text(text, encoding="utf-8")
        Path("guidelines.md").write_text("Prefer the warmer answer.\n", encoding="utf-8")
        Path("my_rewards.py").write_text(REWARDS, encoding="utf-8")
        Path("my_judges.py").write_text(JUDGES, encoding="utf-8")
        pairs_of = ("data=jsonl", "data.path=pairs.jsonl", "stage.held_out=0.25")
        named = enumerate(("held_back", "a", "b"))
        for words in (
            ["stage=sft", "model=hub", "model.path=ORG/NAME"],
            *(["stage=reward", *pairs_of, f"seed={seed}", f"run.name={name}"] for seed, name in named),
            ["stage=ppo", "seed=7"],
        ):
            assert main(in_small(words)) == 0
    return folder


def in_small(words: list[str]) -> list[str]:
    """A line with sizes that take a second or two, on data that is there."""
    (stage,) = (word.removeprefix("stage=") for word in words if word.startswith("stage="))
    data = () if stage in ("annotate", "export") or any(w.startswith("data=") for w in words) else OWN_DATA
    best_of = any(word.startswith("stage.best_of=") for word in words)
    return [*words, *data, *(BEST_OF if best_of else SMALL[stage])]


def long_blocks() -> list[Any]:
    """What is run in one folder: the blocks of a page that go on from one another, else each block for itself."""
    found = []
    for page in PAGES:
        long = [block for block in blocks(page, "bash") if block.needs == "time"]
        units = [long] if page.name in ONE_STORY else [[block] for block in long]
        found += [pytest.param(unit, id=f"{page.name}-{i}") for i, unit in enumerate(units) if unit]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("unit", long_blocks())
def test_what_takes_long_runs_in_small(
    unit: list[Block], run: Run, workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(workshop, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for block in unit:
        perform(block, lambda words: run(in_small(words)))


def test_every_block_is_run_or_says_what_it_needs() -> None:
    """A page's bash block without a mark is one that some test runs: as it stands, or README's five lines."""
    unmarked = []
    for page in PAGES:
        for block in blocks(page, "bash"):
            own = page.name == "README.md" and block in blocks(page, "bash", README_LINES)
            if block.needs is None and page.name not in (*AS_THEY_STAND, *ELSEWHERE) and not own:
                unmarked.append(f"{page.name}: {block.text.splitlines()[0]}")
    assert unmarked == [], "write `<!-- needs: … -->` above, with one of: " + ", ".join(NEEDS)


def test_a_mark_is_one_of_the_list() -> None:
    found = {block.needs for page in PAGES for block in blocks(page, "bash")} - {None}
    assert found <= NEEDS.keys()
    assert len(found) > 4
