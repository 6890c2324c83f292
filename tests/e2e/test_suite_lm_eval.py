"""Tasks of lm-eval in a suite: the figures of the base and of an adapter equal lm-eval's own; results are reused, and
wrong settings are refused before anything is loaded."""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from code_blocks import ROOT, read_blocks
from lm_eval_folder import write_task_folder
from suite_evaluations import RuleEvaluations, read_artifact_rows, read_results

from align.__main__ import main
from align.run import read_manifest

WINDOW = 256
"""Context length in tokens."""
needs_lm_eval = pytest.mark.skipif(
    find_spec("lm_eval") is None, reason='needs lm-eval (pip install "align-rlhf[evals]")'
)
TWO = ("stage.systems={s: sft:s, base: base}", "dtype=float32")


def format_tasks(folder: Path, *names: str, more: str = "") -> str:
    return f"eval.tasks=[{', '.join(f'{{name: {n}, lm_eval: {n}, include: {folder}{more}}}' for n in names)}]"


def run_lm_eval(model: Path, folder: Path, *names: str, **more: Any) -> Any:
    """Run lm-eval itself: it loads the model, with a context as long as ours."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    model_args = {"pretrained": str(model), "dtype": "float32", "device": "cpu", "max_length": WINDOW - 1, **more}
    return simple_evaluate("hf", model_args, [*names], batch_size=4, bootstrap_iters=0, task_manager=manager)


def select_floats(figures: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in figures.items() if isinstance(value, float)}


@needs_lm_eval
def test_lm_eval_finds_the_same_by_itself(bench: RuleEvaluations, tmp_path: Path, tiny_model: Path) -> None:
    folder = write_task_folder(tmp_path / "tasks")
    root = bench.root
    training = [
        "stage=sft",
        "model=hub",
        f"model.path={tiny_model}",
        "method=lora",
        "stage.max_steps=2",
        "stage.lr=0.01",
    ]
    assert main([*training, *bench.ready.data, f"run.root={root}", "run.name=plain", "stage.eval_size=2"]) == 0
    names = ("choose", "more", "guess", "reading")
    systems = ("stage.systems={plain: sft:plain, base: base}", "dtype=float32", f"data.max_length={WINDOW}")
    run = bench.run(*systems, format_tasks(folder, *names), "run.name=parity")
    rows = read_artifact_rows(run)
    for system, model_args in (("base", {}), ("plain", {"peft": str(root / "sft" / "plain" / "artifact")})):
        expected = run_lm_eval(tiny_model, folder, *names, **model_args)
        for name in names:
            actual = json.loads((run / "artifact" / "lm_eval" / name / f"{system}.json").read_text())
            assert select_floats(actual["results"][name]) == pytest.approx(
                select_floats(expected["results"][name]), rel=1e-4
            )
            assert actual["n-samples"] == {name: expected["n-samples"][name]}
            assert actual["n-shot"] == {name: expected["n-shot"][name]}
            answers = [row["answers"][system]["weighed"] for row in rows if row["task"] == name]
            samples = sorted(expected["samples"][name], key=lambda sample: sample["doc_id"])
            for answer, sample in zip(answers, samples, strict=True):
                if name != "reading":
                    logprobs = [float(logprob) for [[logprob, _]] in sample["resps"]]
                    assert [logprob for _, logprob in answer["requests"]] == pytest.approx(logprobs, abs=1e-3)
                    assert answer["metrics"] == pytest.approx({m: sample[m] for m in sample["metrics"]}, abs=1e-3)


@needs_lm_eval
def test_they_are_computed_once_and_say_what_was_measured(bench: RuleEvaluations, tmp_path: Path) -> None:
    folder = write_task_folder(tmp_path / "tasks")
    run = bench.run(*TWO, format_tasks(folder, "choose", "both"), "run.name=once")
    assert "the report could not be made" not in (run / "log.txt").read_text()
    reports = {
        system: json.loads((run / "artifact" / "lm_eval" / "choose" / f"{system}.json").read_text())
        for system in ("s", "base")
    }
    adapter_record = reports["s"]["align"]
    base_record = reports["base"]["align"]
    assert adapter_record["base"] == base_record["base"] == reports["base"]["config"]["model_sha"]
    assert adapter_record["adapter"] == reports["s"]["config"]["model_sha"] != base_record["adapter"] == ""
    assert (adapter_record["requests"], adapter_record["dtype"]) == (base_record["requests"], "float32")
    task_results = read_results(run)["tasks"]
    for system in ("s", "base"):
        acc = reports[system]["results"]["choose"]["acc,none"]
        assert (
            task_results["choose"]["systems"][system]["acc"]
            == acc
            == task_results["choose"]["systems"][system]["score"]["value"]
        )
        group = json.loads((run / "artifact" / "lm_eval" / "both" / f"{system}.json").read_text())
        assert task_results["both"]["systems"][system]["acc"] == group["groups"]["both"]["acc,none"]
    assert {*task_results["both"]["categories"]} == {"choose", "more"}
    assert read_manifest(run).metrics["likelihoods_made"] > 0
    second_run = bench.run(*TWO, format_tasks(folder, "choose", more=", metric: acc_norm"), "run.name=again")
    assert read_manifest(second_run).metrics["likelihoods_made"] == 0
    assert {row["answers"]["s"]["score"] for row in read_artifact_rows(second_run)} <= {0.0, 1.0}
    assert read_results(second_run)["tasks"]["choose"]["by"] == "lm-eval's acc_norm"


@needs_lm_eval
def test_what_is_refused_is_refused_before_a_run_begins(bench: RuleEvaluations, tmp_path: Path) -> None:
    folder = write_task_folder(tmp_path / "tasks")
    runs_before = {*bench.root.glob("eval/*")}
    assert "choose, draws, guess" in bench.expect_error(*TWO, format_tasks(folder, "nothing"))
    assert "docs/checkers.md" in bench.expect_error(*TWO, format_tasks(folder, "leaderboard_ifeval"))
    assert "Its metrics are perplexity, acc." in bench.expect_error(
        *TWO, format_tasks(folder, "guess", more=", metric: f1")
    )
    file = tmp_path / "theirs.jsonl"
    file.write_text('{"id": "0", "answer": "e"}\n')
    systems = f"stage.systems={{s: sft:s, theirs: {{file: {file}}}}}"
    assert "measures log-likelihoods, which needs the model itself" in bench.expect_error(
        systems, format_tasks(folder, "choose")
    )
    broken = json.dumps({"prompt": "a", "choices": ["a", "b"]})
    (folder / "choose.jsonl").write_text(broken + "\n")
    assert "fails in lm-eval (" in bench.expect_error(*TWO, format_tasks(folder, "choose"))
    new_runs = {*bench.root.glob("eval/*")} - runs_before
    assert not any((run / "artifact").exists() for run in new_runs)


@needs_lm_eval
def test_the_page_shows_commands_that_run(
    bench: RuleEvaluations, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    blocks_by_task = dict(
        zip(("facts", "sums"), read_blocks(ROOT / "docs" / "evaluation.md", "bash", "Tasks of lm-eval"), strict=True)
    )
    for name, block in blocks_by_task.items():
        files, _, command = block.text.partition("python -m align ")
        subprocess.run(["bash", "-ec", files], check=True)
        run = bench.run(*shlex.split(command), f"run.name=page-{name}")
        assert read_results(run)["tasks"][name]["items"] == 2
        assert {path.name for path in (run / "artifact" / "lm_eval" / name).iterdir()} == {"new.json", "base.json"}
    assert {"exact_match,strict-match", "exact_match,flexible-extract"} <= {
        *read_results(run)["tasks"][name]["systems"]["new"]
    }
