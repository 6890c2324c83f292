"""A policy that gives one answer to every prompt is called collapsed wherever its win rate stands."""

from __future__ import annotations

import json

import pytest
from workshop import Workshop

FEELINGS = ("happy", "tired", "hungry", "late", "curious", "cold", "bored", "busy", "proud", "lonely")
THINGS = ("dogs", "rain", "soup", "trains", "books", "gardens", "music", "the sea", "games", "work")
PROMPTS = [f"I am {feeling}. What do you think about {thing}?" for feeling in FEELINGS for thing in THINGS]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """An adapter on the built-in model that was trained to one answer, `sft:one`."""
    folder = tmp_path_factory.mktemp("collapsed")
    path = folder / "chats.jsonl"
    rows = [{"prompt": prompt, "completion": "Great!"} for prompt in PROMPTS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    shop = Workshop(folder / "runs", path)
    shop.run(
        "sft",
        "model=pocket",
        "stage.batch_size=8",
        "stage.epochs=3",
        "method.lr=5e-3",
        "run.name=one",
        "data.held_out=0.1",
    )
    return shop


def evaluated(shop: Workshop, *words: str) -> str:
    line = ("artifact=sft:one", "data.held_out=0.7", "stage.seen=report", *words)
    assert shop.status("stage=eval", "data=jsonl", f"data.path={shop.data}", *line) == 0, shop.said
    return shop.said


def test_it_is_said_first_and_no_gate_takes_its_win_rate(shop: Workshop):
    lines = evaluated(shop, "run.name=judged").splitlines()
    metrics = json.loads((shop.root / "eval" / "judged" / "artifact" / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["collapse"]["verdict"] == "collapsed"
    assert metrics["variety"]["greedy"]["policy"]["commonest"] == "Great!"
    (first,) = (number for number, line in enumerate(lines) if line.startswith("COLLAPSED: "))
    (won,) = (number for number, line in enumerate(lines) if line.startswith("win rate "))
    assert first < won
    assert "are alike: “Great!” (start: " in lines[first]
    assert lines[first].endswith("The win rate below is no success.")
    assert "The policy collapsed: " in (shop.root / "eval" / "judged" / "report.html").read_text(encoding="utf-8")

    assert shop.ended("stage=registry", f"run.root={shop.root}") == 0
    assert any(", collapsed" in line for line in shop.said.splitlines() if line.startswith("eval:judged"))

    gates = shop.root.parent / "gates"
    gates.mkdir()
    gate = "alias: production\nconditions:\n  - {figure: win_rate, at_least: 0.0%s}\n"
    promote = ("stage=registry", "stage.action=promote", "stage.alias=production", "artifact=sft:one", "stage.why=x")
    line = (*promote, f"stage.gates={gates}", f"run.root={shop.root}")
    (gates / "g.yaml").write_text(gate % "")
    shop.refuses(*line, says="of a policy that collapsed: ")
    (gates / "g.yaml").write_text(gate % ", collapsed: true")
    assert shop.ended(*line) == 0, shop.said

    shop.run("export", "artifact=sft:one", "run.name=out")
    card = (shop.root / "export" / "out" / "artifact" / "README.md").read_text(encoding="utf-8")
    assert "**This model collapsed:** " in card
