"""Tasks of lm-eval that generate text: texts and figures of the base and of an adapter equal lm-eval's own; answers are
reused, and dropped or refused items are reported."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from lm_eval_folder import write_task_folder
from suite_evaluations import RuleEvaluations, read_artifact_rows, read_results

from align.__main__ import main
from align.models.base import find_pocket_folder
from align.run import read_manifest

pytestmark = pytest.mark.skipif(find_spec("lm_eval") is None, reason='needs lm-eval (pip install "align-rlhf[evals]")')
BESIDE = Path(__file__).parents[2] / "benchmarks" / "evals"
TWO = ("stage.systems={s: sft:s, base: base}", "dtype=float32")
CHATS = tuple(f"<|user|>{message}<|end|><|assistant|>" for message in ("Hello?", "My dog is late.", "How are you?"))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "path", [*sys.path, str(BESIDE)])
    import generation_tasks  # pyright: ignore[reportMissingImports]

    return generation_tasks.write_tasks(tmp_path / "tasks", CHATS)


def format_tasks(folder: Path, *names: str, more: str = "") -> str:
    return f"eval.tasks=[{', '.join(f'{{name: {n}, lm_eval: {n}, include: {folder}{more}}}' for n in names)}]"


def run_lm_eval(model: Path, folder: Path, **more: Any) -> Any:
    """Run lm-eval itself."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    model_args = {"pretrained": str(model), "dtype": "float32", "device": "cpu", **more}
    return simple_evaluate("hf", model_args, ["writing"], batch_size=1, bootstrap_iters=0, task_manager=manager)


def read_texts(run: Path, system: str) -> dict[str, str]:
    return {row["id"]: row["answers"][system]["text"] for row in read_artifact_rows(run)}


def test_lm_eval_writes_the_same_by_itself(bench: RuleEvaluations, folder: Path) -> None:
    """Compare the texts of pocket and of an adapter on it."""
    model = find_pocket_folder()
    root = bench.root
    training = ["stage=sft", "model=pocket", "method=lora", "stage.max_steps=2", "stage.lr=0.01"]
    assert main([*training, *bench.ready.data, f"run.root={root}", "run.name=plain", "stage.eval_size=2"]) == 0
    systems = ("stage.systems={plain: sft:plain, base: base}", "dtype=float32")
    run = bench.run(*systems, format_tasks(folder, "writing"), "run.name=parity")
    assert read_manifest(run).metrics["answers_made"] > 0
    for system, model_args in (("base", {}), ("plain", {"peft": str(root / "sft" / "plain" / "artifact")})):
        texts = read_texts(run, system)
        expected = run_lm_eval(model, folder, **model_args)
        assert len(texts) == 16
        report = json.loads((run / "artifact" / "lm_eval" / "writing" / f"{system}.json").read_text())["results"]
        for name, samples in expected["samples"].items():
            for sample in samples:
                assert texts[f"{name}/{sample['doc_id']}"] == sample["resps"][0][0]
            figures = {key: value for key, value in expected["results"][name].items() if isinstance(value, float)}
            assert figures
            assert {key: report[name][key] for key in figures} == figures
    ended_by_id = {row["id"]: row["answers"]["plain"]["ended"] for row in read_artifact_rows(run)}
    assert (ended_by_id["chats/0"], ended_by_id["inside/0"], ended_by_id["cut/0"]) == (True, True, False)
    assert "the report could not be made" not in (run / "log.txt").read_text()


def test_they_are_made_once_and_alike_in_any_batch(bench: RuleEvaluations, folder: Path) -> None:
    (bench.root / "answers.db").unlink(missing_ok=True)
    first = bench.run(*TWO, format_tasks(folder, "writing"), "run.name=first")
    metrics = read_manifest(first).metrics
    assert (metrics["answers_made"], metrics.get("likelihoods_made", 0)) == (2 * 16, 0)
    assert read_results(first)["tasks"]["writing"]["by"] == "lm-eval's exact_match"
    second_run = bench.run(*TWO, format_tasks(folder, "writing", more=", prompts: 15"), "run.name=again")
    assert read_manifest(second_run).metrics["answers_made"] == 0
    for size in (1, 8):
        (bench.root / "answers.db").unlink()
        batched = bench.run(*TWO, format_tasks(folder, "writing"), f"rollout.batch_size={size}", f"run.name=by-{size}")
        assert read_artifact_rows(batched) == read_artifact_rows(first)


def test_a_context_that_leaves_no_room_for_an_answer_is_counted(bench: RuleEvaluations, folder: Path) -> None:
    """The context of the model is 256 tokens."""
    full_run = bench.run(*TWO, format_tasks(folder, "cut"), "run.name=whole")
    data = folder / "cut.jsonl"
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    rows[0]["prompt"] = "a" * 252  # at most one token each
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    yaml = folder / "cut.yaml"
    yaml.write_text(yaml.read_text().replace("max_gen_toks: 5", "max_gen_toks: 225"))
    shorter_run = bench.run(*TWO, format_tasks(folder, "cut"), "run.name=less")
    assert (
        read_results(shorter_run)["tasks"]["cut"]["items"],
        read_results(shorter_run)["tasks"]["cut"]["dropped"],
    ) == (1, 1)
    assert read_artifact_rows(shorter_run)[0]["answers"]["s"]["text"].startswith(
        read_artifact_rows(full_run)[1]["answers"]["s"]["text"]
    )
    yaml.write_text(yaml.read_text().replace("max_gen_toks: 225", "max_gen_toks: 300"))
    assert "max_gen_toks count with its context" in bench.expect_error(
        *TWO, format_tasks(folder, "cut"), "run.name=none"
    )


def test_a_group_that_weighs_and_writes_and_a_gate_on_it(bench: RuleEvaluations, tmp_path: Path) -> None:
    folder = write_task_folder(tmp_path / "mixed")
    gate = "name: keeps, task: mixed, is: not_worse, margin: 0.9, against: base"
    settings = (*TWO, format_tasks(folder, "mixed"), "run.name=mixed")
    assert main(bench.words(*settings, f"eval.gates=[{{{gate}}}]")) in (0, 3)
    run = bench.root / "eval" / "mixed"
    task = read_results(run)["tasks"]["mixed"]
    rows = read_artifact_rows(run)
    assert (task["by"], task["role"], task["items"]) == ("lm-eval's acc, exact_match", "exact", 12)
    assert {row["category"] for row in rows} == {"choose", "write"}
    by_row = [row["answers"]["s"]["score"] - row["answers"]["base"]["score"] for row in rows]
    verdict = json.loads((run / "artifact" / "verdicts" / "keeps.json").read_text())
    assert verdict["figure"]["value"] == pytest.approx(sum(by_row) / len(by_row))
    assert all("ended" in row["answers"]["s"] for row in rows if row["category"] == "write")
