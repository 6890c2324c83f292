"""A policy that gives one answer to every prompt is reported as collapsed beside each of its win rates."""

from __future__ import annotations

import json

import pytest
from stage_commands import Workshop

from align.run import read_manifest

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


def run_evaluation(shop: Workshop, *arguments: str) -> str:
    command = ("artifact=sft:one", "data.held_out=0.7", "stage.seen=report", *arguments)
    assert shop.status("stage=eval", "data=jsonl", f"data.path={shop.data}", *command) == 0, shop.output
    return shop.output


def test_one_answer_may_be_right_in_a_closed_task(shop: Workshop):
    rule = "reward.rules=[{rule: regex, pattern: Great}]"
    stdout = run_evaluation(shop, "run.name=closed", "eval.closed=true", "reward=rules", rule)
    assert "COLLAPSED: it is not shown to beat “Great!”, given as the answer to every prompt" in stdout


def evaluate_suite(shop: Workshop, tasks: str, *arguments: str) -> list[str]:
    """Evaluate the collapsed policy and its base on tasks, and return the lines that were printed."""
    data = ("data=jsonl", f"data.path={shop.data}", "data.held_out=0.7", "rollout.max_new_tokens=8")
    judge = ("reward=rules", "reward.rules=[{rule: regex, pattern: '[a-z]'}]")
    systems = "stage.systems={new: sft:one, base: base}"
    shop.status("stage=eval", "stage.near=null", systems, tasks, *data, *judge, *arguments)
    return shop.output.splitlines()


def find_line(lines: list[str], start: str) -> int:
    """Return the index of the only line with this start."""
    (index,) = (index for index, line in enumerate(lines) if line.startswith(start))
    return index


def test_a_suite_reports_a_collapsed_system_before_its_figures_and_in_gates(shop: Workshop):
    path = shop.root.parent / "asked.jsonl"
    rows = [{"prompt": f"Tell me about {thing} on a {feeling} day."} for feeling in FEELINGS for thing in THINGS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    tasks = f"eval.tasks=[{{name: asked, path: {path}, check: {{kind: instructions, constraints: [no_comma]}}}}]"
    condition = "task: asked, against: base, is: at_most, margin: 0.9"
    gates = f"eval.gates=[{{name: strict, {condition}}}, {{name: lenient, {condition}, collapsed: true}}]"
    lines = evaluate_suite(shop, tasks, gates, "run.name=several")
    collapsed = find_line(lines, "COLLAPSED: new: on asked ")
    assert collapsed < find_line(lines, "asked: new against base")
    assert "are alike: “Great!” (base: " in lines[collapsed]
    assert lines[collapsed].endswith("The win rate below does not count as success.")
    strict = lines[find_line(lines, "gate strict: fail (")]
    assert "; new collapsed: on asked " in strict
    assert "collapsed" not in lines[find_line(lines, "gate lenient: ")]

    run = shop.root / "eval" / "several"
    results = json.loads((run / "artifact" / "results.json").read_text(encoding="utf-8"))
    new = results["collapse"]["asked"]["new"]
    base = results["collapse"]["asked"]["base"]
    assert new["collapse"]["verdict"] == "collapsed"
    assert new["variety"]["greedy"]["policy"]["commonest"] == "Great!"
    assert new["variety"]["greedy"]["ref"] == base["variety"]["greedy"]["policy"]
    metrics = read_manifest(run).metrics
    assert metrics["collapse"]["systems"]["new"]["verdict"] == "collapsed"
    assert metrics["gates"] == {"strict": "fail", "lenient": "pass"}
    assert "new collapsed: on asked " in (run / "report.html").read_text(encoding="utf-8")

    assert shop.run_command("stage=registry", f"run.root={shop.root}") == 0
    assert any(", collapsed" in line for line in shop.output.splitlines() if line.startswith("eval:several"))
    find_line(evaluate_suite(shop, tasks, "run.name=again", "resume=never"), "COLLAPSED: new: on asked ")
    assert read_manifest(shop.root / "eval" / "again").metrics["answers_made"] == 0


def test_it_is_said_first_and_no_gate_takes_its_win_rate(shop: Workshop):
    lines = run_evaluation(shop, "run.name=judged").splitlines()
    metrics = json.loads((shop.root / "eval" / "judged" / "artifact" / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["collapse"]["verdict"] == "collapsed"
    assert metrics["variety"]["greedy"]["policy"]["commonest"] == "Great!"
    (collapse_line,) = (number for number, text in enumerate(lines) if text.startswith("COLLAPSED: "))
    (win_rate_line,) = (number for number, text in enumerate(lines) if text.startswith("win rate "))
    assert collapse_line < win_rate_line
    assert "are alike: “Great!” (start: " in lines[collapse_line]
    assert lines[collapse_line].endswith("The win rate below does not count as success.")
    assert "The policy collapsed: " in (shop.root / "eval" / "judged" / "report.html").read_text(encoding="utf-8")

    assert shop.run_command("stage=registry", f"run.root={shop.root}") == 0
    assert any(", collapsed" in text for text in shop.output.splitlines() if text.startswith("eval:judged"))

    gates = shop.root.parent / "gates"
    gates.mkdir()
    gate = "alias: production\nconditions:\n  - {figure: win_rate, at_least: 0.0%s}\n"
    promote = ("stage=registry", "stage.action=promote", "stage.alias=production", "artifact=sft:one", "stage.why=x")
    command = (*promote, f"stage.gates={gates}", f"run.root={shop.root}")
    (gates / "g.yaml").write_text(gate % "")
    shop.refuses(*command, says="of a policy that collapsed: ")
    (gates / "g.yaml").write_text(gate % ", collapsed: true")
    assert shop.run_command(*command) == 0, shop.output

    shop.run("export", "artifact=sft:one", "run.name=out")
    card = (shop.root / "export" / "out" / "artifact" / "README.md").read_text(encoding="utf-8")
    assert "**This model collapsed:** " in card
