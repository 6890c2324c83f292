"""Tasks of lm-eval that ask for answers: the texts and figures are those that lm-eval finds by itself, of the base and
of an adapter; what is made once; and what is counted, and refused."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from benches import Bench, lines, results
from lm_eval_folder import written

from align.__main__ import main
from align.models.base import find_pocket_folder
from align.run import read_manifest

pytestmark = pytest.mark.skipif(find_spec("lm_eval") is None, reason='needs lm-eval (pip install "align-rlhf[evals]")')
BESIDE = Path(__file__).parents[2] / "benchmarks" / "evals"
TWO = ("stage.systems={s: sft:s, base: base}", "dtype=float32")
CHATS = tuple(f"<|user|>{said}<|end|><|assistant|>" for said in ("Hello?", "My dog is late.", "How are you?"))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "path", [*sys.path, str(BESIDE)])
    import generation_tasks  # pyright: ignore[reportMissingImports]

    return generation_tasks.write_tasks(tmp_path / "tasks", CHATS)


def tasks_of(folder: Path, *names: str, more: str = "") -> str:
    return f"eval.tasks=[{', '.join(f'{{name: {n}, lm_eval: {n}, include: {folder}{more}}}' for n in names)}]"


def theirs(model: Path, folder: Path, **more: Any) -> Any:
    """What lm-eval finds by itself."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    given = {"pretrained": str(model), "dtype": "float32", "device": "cpu", **more}
    return simple_evaluate("hf", given, ["writing"], batch_size=1, bootstrap_iters=0, task_manager=manager)


def said(run: Path, who: str) -> dict[str, str]:
    return {row["id"]: row["answers"][who]["text"] for row in lines(run)}


def test_lm_eval_writes_the_same_by_itself(bench: Bench, folder: Path) -> None:
    """Of pocket, and of an adapter on it."""
    model, root = find_pocket_folder(), bench.root
    trained = ["stage=sft", "model=pocket", "method=lora", "stage.max_steps=2", "stage.lr=0.01"]
    assert main([*trained, *bench.ready.data, f"run.root={root}", "run.name=plain", "stage.eval_size=2"]) == 0
    systems = ("stage.systems={plain: sft:plain, base: base}", "dtype=float32")
    run = bench.run(*systems, tasks_of(folder, "writing"), "run.name=parity")
    assert read_manifest(run).metrics["answers_made"] > 0
    for who, more in (("base", {}), ("plain", {"peft": str(root / "sft" / "plain" / "artifact")})):
        mine, found = said(run, who), theirs(model, folder, **more)
        assert len(mine) == 16
        told = json.loads((run / "artifact" / "lm_eval" / "writing" / f"{who}.json").read_text())["results"]
        for name, samples in found["samples"].items():
            for one in samples:
                assert mine[f"{name}/{one['doc_id']}"] == one["resps"][0][0]
            figures = {key: value for key, value in found["results"][name].items() if isinstance(value, float)}
            assert figures
            assert {key: told[name][key] for key in figures} == figures
    ended = {row["id"]: row["answers"]["plain"]["ended"] for row in lines(run)}
    assert (ended["chats/0"], ended["inside/0"], ended["cut/0"]) == (True, True, False)
    assert "the report could not be made" not in (run / "log.txt").read_text()


def test_they_are_made_once_and_alike_in_any_batch(bench: Bench, folder: Path) -> None:
    (bench.root / "answers.db").unlink(missing_ok=True)
    first = bench.run(*TWO, tasks_of(folder, "writing"), "run.name=first")
    metrics = read_manifest(first).metrics
    assert (metrics["answers_made"], metrics.get("likelihoods_made", 0)) == (2 * 16, 0)
    assert results(first)["tasks"]["writing"]["by"] == "lm-eval's exact_match"
    again = bench.run(*TWO, tasks_of(folder, "writing", more=", prompts: 15"), "run.name=again")
    assert read_manifest(again).metrics["answers_made"] == 0
    for size in (1, 8):
        (bench.root / "answers.db").unlink()
        other = bench.run(*TWO, tasks_of(folder, "writing"), f"rollout.batch_size={size}", f"run.name=by-{size}")
        assert lines(other) == lines(first)


def test_a_context_that_leaves_no_room_for_an_answer_is_counted(bench: Bench, folder: Path) -> None:
    """The model reads 256 tokens."""
    whole = bench.run(*TWO, tasks_of(folder, "cut"), "run.name=whole")
    data = folder / "cut.jsonl"
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    rows[0]["prompt"] = "a" * 252  # tokens of its own, or fewer
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    yaml = folder / "cut.yaml"
    yaml.write_text(yaml.read_text().replace("max_gen_toks: 5", "max_gen_toks: 225"))
    less = bench.run(*TWO, tasks_of(folder, "cut"), "run.name=less")
    assert (results(less)["tasks"]["cut"]["items"], results(less)["tasks"]["cut"]["dropped"]) == (1, 1)
    assert lines(less)[0]["answers"]["s"]["text"].startswith(lines(whole)[1]["answers"]["s"]["text"])
    yaml.write_text(yaml.read_text().replace("max_gen_toks: 225", "max_gen_toks: 300"))
    assert "max_gen_toks count with its context" in bench.refused(*TWO, tasks_of(folder, "cut"), "run.name=none")


def test_a_group_that_weighs_and_writes_and_a_gate_on_it(bench: Bench, tmp_path: Path) -> None:
    folder, gate = written(tmp_path / "mixed"), "name: keeps, task: mixed, is: not_worse, margin: 0.9, against: base"
    words = (*TWO, tasks_of(folder, "mixed"), "run.name=mixed")
    assert main(bench.words(*words, f"eval.gates=[{{{gate}}}]")) in (0, 3)
    run = bench.root / "eval" / "mixed"
    task, rows = results(run)["tasks"]["mixed"], lines(run)
    assert (task["by"], task["role"], task["items"]) == ("lm-eval's acc, exact_match", "exact", 12)
    assert {row["category"] for row in rows} == {"choose", "write"}
    by_row = [row["answers"]["s"]["score"] - row["answers"]["base"]["score"] for row in rows]
    verdict = json.loads((run / "artifact" / "verdicts" / "keeps.json").read_text())
    assert verdict["figure"]["value"] == pytest.approx(sum(by_row) / len(by_row))
    assert all("ended" in row["answers"]["s"] for row in rows if row["category"] == "write")
