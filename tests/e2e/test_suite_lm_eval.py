"""Tasks of lm-eval among the tasks of a suite: the figures are those that lm-eval finds by itself, of the base and of
an adapter; what is computed once; and what is refused before anything is loaded."""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from benches import Bench, lines, results
from lm_eval_folder import written
from pages import ROOT, blocks

from align.__main__ import main
from align.run import read_manifest

WINDOW = 256
"""Of texts: all that the model reads at once."""
needs_lm_eval = pytest.mark.skipif(
    find_spec("lm_eval") is None, reason='needs lm-eval (pip install "align-rlhf[evals]")'
)
TWO = ("stage.systems={s: sft:s, base: base}", "dtype=float32")


def tasks_of(folder: Path, *names: str, more: str = "") -> str:
    return f"eval.tasks=[{', '.join(f'{{name: {n}, lm_eval: {n}, include: {folder}{more}}}' for n in names)}]"


def theirs(model: Path, folder: Path, *names: str, **more: Any) -> Any:
    """What lm-eval finds by itself, with its own loading of the model, in windows as long as ours."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    given = {"pretrained": str(model), "dtype": "float32", "device": "cpu", "max_length": WINDOW - 1, **more}
    return simple_evaluate("hf", given, [*names], batch_size=4, bootstrap_iters=0, task_manager=manager)


def numbers(figures: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in figures.items() if isinstance(value, float)}


@needs_lm_eval
def test_lm_eval_finds_the_same_by_itself(bench: Bench, tmp_path: Path, tiny_model: Path) -> None:
    folder, root = written(tmp_path / "tasks"), bench.root
    trained = [
        "stage=sft",
        "model=hub",
        f"model.path={tiny_model}",
        "method=lora",
        "stage.max_steps=2",
        "stage.lr=0.01",
    ]
    assert main([*trained, *bench.ready.data, f"run.root={root}", "run.name=plain", "stage.eval_size=2"]) == 0
    names = ("choose", "more", "guess", "reading")
    systems = ("stage.systems={plain: sft:plain, base: base}", "dtype=float32", f"data.max_length={WINDOW}")
    run = bench.run(*systems, tasks_of(folder, *names), "run.name=parity")
    rows = lines(run)
    for who, more in (("base", {}), ("plain", {"peft": str(root / "sft" / "plain" / "artifact")})):
        found = theirs(tiny_model, folder, *names, **more)
        for name in names:
            mine = json.loads((run / "artifact" / "lm_eval" / name / f"{who}.json").read_text())
            assert numbers(mine["results"][name]) == pytest.approx(numbers(found["results"][name]), rel=1e-4)
            assert mine["n-samples"] == {name: found["n-samples"][name]}
            assert mine["n-shot"] == {name: found["n-shot"][name]}
            said = [row["answers"][who]["weighed"] for row in rows if row["task"] == name]
            samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
            for one, sample in zip(said, samples, strict=True):
                if name != "reading":
                    logprobs = [float(logprob) for [[logprob, _]] in sample["resps"]]
                    assert [logprob for _, logprob in one["requests"]] == pytest.approx(logprobs, abs=1e-3)
                    assert one["metrics"] == pytest.approx({m: sample[m] for m in sample["metrics"]}, abs=1e-3)


@needs_lm_eval
def test_they_are_computed_once_and_say_what_was_measured(bench: Bench, tmp_path: Path) -> None:
    folder = written(tmp_path / "tasks")
    run = bench.run(*TWO, tasks_of(folder, "choose", "both"), "run.name=once")
    assert "the report could not be made" not in (run / "log.txt").read_text()
    told = {
        who: json.loads((run / "artifact" / "lm_eval" / "choose" / f"{who}.json").read_text()) for who in ("s", "base")
    }
    s, base = told["s"]["align"], told["base"]["align"]
    assert s["base"] == base["base"] == told["base"]["config"]["model_sha"]
    assert s["adapter"] == told["s"]["config"]["model_sha"] != base["adapter"] == ""
    assert (s["requests"], s["dtype"]) == (base["requests"], "float32")
    found = results(run)["tasks"]
    for who in ("s", "base"):
        acc = told[who]["results"]["choose"]["acc,none"]
        assert found["choose"]["systems"][who]["acc"] == acc == found["choose"]["systems"][who]["score"]["value"]
        group = json.loads((run / "artifact" / "lm_eval" / "both" / f"{who}.json").read_text())
        assert found["both"]["systems"][who]["acc"] == group["groups"]["both"]["acc,none"]
    assert {*found["both"]["categories"]} == {"choose", "more"}
    assert read_manifest(run).metrics["likelihoods_made"] > 0
    again = bench.run(*TWO, tasks_of(folder, "choose", more=", metric: acc_norm"), "run.name=again")
    assert read_manifest(again).metrics["likelihoods_made"] == 0
    assert {row["answers"]["s"]["score"] for row in lines(again)} <= {0.0, 1.0}
    assert results(again)["tasks"]["choose"]["by"] == "lm-eval's acc_norm"


@needs_lm_eval
def test_what_is_refused_is_refused_before_a_run_begins(bench: Bench, tmp_path: Path) -> None:
    folder, before = written(tmp_path / "tasks"), {*bench.root.glob("eval/*")}
    assert "choose, draws, guess" in bench.refused(*TWO, tasks_of(folder, "nothing"))
    assert "docs/checkers.md" in bench.refused(*TWO, tasks_of(folder, "leaderboard_ifeval"))
    assert "Its metrics are perplexity, acc." in bench.refused(*TWO, tasks_of(folder, "guess", more=", metric: f1"))
    theirs = tmp_path / "theirs.jsonl"
    theirs.write_text('{"id": "0", "answer": "e"}\n')
    systems = f"stage.systems={{s: sft:s, theirs: {{file: {theirs}}}}}"
    assert "is a probe, which needs the model itself" in bench.refused(systems, tasks_of(folder, "choose"))
    broken = json.dumps({"prompt": "a", "choices": ["a", "b"]})
    (folder / "choose.jsonl").write_text(broken + "\n")
    assert "fails in lm-eval (" in bench.refused(*TWO, tasks_of(folder, "choose"))
    kept = {*bench.root.glob("eval/*")} - before
    assert not any((run / "artifact").exists() for run in kept)


@needs_lm_eval
def test_the_page_shows_commands_that_run(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shown = dict(
        zip(("facts", "sums"), blocks(ROOT / "docs" / "evaluation.md", "bash", "Tasks of lm-eval"), strict=True)
    )
    for name, block in shown.items():
        files, _, command = block.text.partition("python -m align ")
        subprocess.run(["bash", "-ec", files], check=True)
        run = bench.run(*shlex.split(command), f"run.name=page-{name}")
        assert results(run)["tasks"][name]["items"] == 2
        assert {path.name for path in (run / "artifact" / "lm_eval" / name).iterdir()} == {"new.json", "base.json"}
    assert {"exact_match,strict-match", "exact_match,flexible-extract"} <= {
        *results(run)["tasks"][name]["systems"]["new"]
    }
