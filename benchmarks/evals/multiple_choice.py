"""Compare multiple choice and generated answers with lm-eval's: log-likelihoods and picks on rows that are hard to
split into tokens, and the answers' texts.

    python benchmarks/evals/multiple_choice.py [--save multiple_choice.json] [--only pocket|smollm2]

`probe: choice` and lm-eval's `hf` backend score the choices of sixty rows with the base and with an adapter on it, in
fp32, unquantised, and generate the answers of `generation_tasks.py`. The report has the largest difference of a
log-likelihood, the number of picks, texts and figures that differ, and the processor seconds of both commands for each
system.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from generation_tasks import TASKS, write_tasks  # noqa: E402

from align.core.types import Conversation, Message  # noqa: E402
from align.data.chat.encode import render  # noqa: E402
from align.models.base import find_base  # noqa: E402
from align.models.load import load_tokenizer  # noqa: E402

TOPICS = ("the rain", "a good book", "this soup", "my dog", "the old town")
ROWS_OF_A_KIND = 5
LONG_TEXT = "We went along the river and came to another village, and nobody there knew the way. "
TASK = """task: asked
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: prompt
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}, {metric: acc_bytes}]
"""
NORMS = ("acc", "acc_norm", "acc_bytes")
LM_EVAL_SCRIPT = """
import json, sys
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

path, adapter, folder = sys.argv[1:]
for system, extra in (("base", {}), ("adapter", {"peft": adapter})):
    model_args = {"pretrained": path, "dtype": "float32", "device": "cpu", **extra}
    manager = TaskManager(include_path=folder, include_defaults=False)
    output = simple_evaluate(
        "hf", model_args, ["asked", "writing"], batch_size=8, bootstrap_iters=0, task_manager=manager
    )
    with open(f"lm-eval-{system}.json", "w") as file:
        json.dump({"results": output["results"], "samples": output["samples"]}, file, default=str)
"""
"""Evaluates both systems with lm-eval's own backend."""
CHATS = ("What is the capital of France?", "Say yes in one word.", "Hello?")
SYSTEMS = ("base", "adapter")


def build_rows() -> list[dict[str, Any]]:
    """Return sixty rows, five each of twelve kinds."""
    rows = list[dict[str, Any]]()
    for i, topic in enumerate(TOPICS * (ROWS_OF_A_KIND // len(TOPICS))):
        question = f"Question: What about {topic}?\nAnswer:"
        shots = "".join(f"Question: Is {shot_topic} nice?\nAnswer: yes\n\n" for shot_topic in TOPICS)
        kinds: Sequence[tuple[str, list[str]]] = (
            (question, [f"I like {topic}.", "No.", "It is late, and I have to go home now."]),
            (f"{question} ", [f"I like {topic}.", "No."]),
            (f"{question}  \n ", [f"I like {topic}.", "No.", f"{topic}?"]),
            (f"{question} A) yes B) no C) both\n", ["A", "B", "C"]),
            ("", [f"{topic} is here.", f"here is {topic}.", "zzq zzq"]),
            (f"Über {topic} — naïve café, 你好 🙂:", ["Größe 🙂", "日本語", "plain words"]),
            (f"I think that {topic}", ["'s fine", "s are fine", ", well", "ish"]),
            (shots + question, ["yes", "no"]),
            (f"{question} again, {topic}", [topic, f"{topic}.", f" {topic}", f"{topic} "]),
            (LONG_TEXT * 20 + question, ["Yes, I do.", "No, I do not."]),
            (f"2 + {i} =", [str(2 + i), str(3 + i), "seven", "\u0663"]),
            (f"<s>{question}", ["</s>", "<s>", "It is <b>bold</b>."]),
        )
        for k, (prompt, choices) in enumerate(kinds):
            rows.append({"prompt": prompt, "choices": choices, "answer": (i + k) % len(choices)})
    return [{"id": i, **row} for i, row in enumerate(rows)]


class SystemResults(NamedTuple):
    """The results of one system in one of the two evaluations.

    Attributes:
        logprobs: of each row's choices, in nats.
        correct: of each row, 1 or 0 for each of `NORMS`.
        answers: to the rows of `generation_tasks.py`, by task and row.
        figures: lm-eval's metrics by task and name.
        seconds: processor time.
    """

    logprobs: list[list[float]]
    correct: list[list[float]]
    answers: Mapping[str, str]
    figures: Mapping[str, Mapping[str, float]]
    seconds: float


def run_python(folder: Path, *arguments: str) -> float:
    """Run Python in a folder and return the processor seconds.

    Raises:
        SystemExit: the process failed. The message has the end of its output.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home")}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    if process.returncode:
        raise SystemExit(f"{' '.join(arguments)}\n{process.stdout[-2000:]}{process.stderr[-3000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def evaluate_with_align(folder: Path, model: str) -> Mapping[str, SystemResults]:
    """Train an adapter, and evaluate it and the base with `stage=eval`."""
    shared_overrides = ("method=lora", "dtype=float32", f"model={model}", "device=cpu", f"run.root={folder / 'runs'}")
    run_python(
        folder,
        *("-m", "align", "stage=sft", *shared_overrides),
        *("stage.max_steps=2", "stage.lr=0.01", "stage.eval_size=2", "stage.batch_size=1", "stage.micro_batch=1"),
        *("run.name=s", "data=files", "data.path=said.jsonl", "data.held_out=0.4", "data.max_length=128"),
    )
    seconds = run_python(
        folder,
        *("-m", "align", "stage=eval", *shared_overrides),
        *("stage.systems={adapter: sft:s, base: base}", "run.name=e"),
        "eval.tasks=[{name: asked, path: rows.jsonl, probe: choice}, {name: w, lm_eval: writing, include: tasks}]",
    )
    artifact = folder / "runs" / "eval" / "e" / "artifact"
    rows = [json.loads(line) for line in (artifact / "answers.jsonl").read_text().splitlines()]
    choice_rows = sorted((row for row in rows if row["task"] == "asked"), key=lambda row: int(row["id"]))
    return {
        system: SystemResults(
            [row["answers"][system]["weighed"]["logprobs"] for row in choice_rows],
            [[row["answers"][system]["weighed"][norm] for norm in NORMS] for row in choice_rows],
            {row["id"]: row["answers"][system]["text"] for row in rows if row["task"] == "w"},
            extract_figures(json.loads((artifact / "lm_eval" / "w" / f"{system}.json").read_text())),
            seconds / 2,
        )
        for system in SYSTEMS
    }


def extract_figures(output: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Return the metrics of the generation tasks in lm-eval's output."""
    return {
        task: {key: value for key, value in output["results"][task].items() if isinstance(value, float)}
        for task in TASKS
    }


def evaluate_with_lm_eval(folder: Path, model: str) -> Mapping[str, SystemResults]:
    """Evaluate the adapter of `evaluate_with_align` and the base with lm-eval's `hf`, in one process."""
    seconds = run_python(folder, "-c", LM_EVAL_SCRIPT, find_base(model).path, "runs/sft/s/artifact", "tasks")
    results = dict[str, SystemResults]()
    for system in SYSTEMS:
        output = json.loads((folder / f"lm-eval-{system}.json").read_text())
        samples = output["samples"]
        choice_samples = sorted(samples["asked"], key=lambda sample: sample["doc_id"])
        results[system] = SystemResults(
            [[float(logprob) for [[logprob, _]] in sample["resps"]] for sample in choice_samples],
            [[sample[norm] for norm in NORMS] for sample in choice_samples],
            {f"{task}/{sample['doc_id']}": sample["resps"][0][0] for task in TASKS for sample in samples[task]},
            extract_figures(output),
            seconds / 2,
        )
    return results


def compare_evaluations(folder: Path, model: str, max_rows: int | None = None) -> dict[str, Any]:
    """Run both evaluations and return their differences by system."""
    rows = build_rows()[:max_rows]
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    training_rows = [
        {"prompt": f"What about {topic}?", "completion": f"I like {topic}, and so do you."} for topic in TOPICS
    ]
    (folder / "said.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in training_rows))
    tasks_path = folder / "tasks"
    tokenizer = load_tokenizer(find_base(model))
    chat_prompts = [render(tokenizer, Conversation((Message("user", text),)), True) for text in CHATS]
    write_tasks(tasks_path, chat_prompts)
    (tasks_path / "asked.yaml").write_text(TASK.replace("DATA", str(folder / "rows.jsonl")))
    align_results = evaluate_with_align(folder, model)
    lm_eval_results = evaluate_with_lm_eval(folder, model)
    return {system: compare_results(results, lm_eval_results[system]) for system, results in align_results.items()}


def compare_results(ours: SystemResults, theirs: SystemResults) -> dict[str, Any]:
    """Return the differences between align's and lm-eval's results of a system."""
    logprob_pairs = [
        pair
        for our_logprobs, their_logprobs in zip(ours.logprobs, theirs.logprobs, strict=True)
        for pair in zip(our_logprobs, their_logprobs, strict=True)
    ]
    return {
        "rows": len(ours.logprobs),
        "choices": len(logprob_pairs),
        "largest_difference": max(abs(our_logprob - their_logprob) for our_logprob, their_logprob in logprob_pairs),
        "rows_judged_otherwise": sum(
            our_row != their_row for our_row, their_row in zip(ours.correct, theirs.correct, strict=True)
        ),
        "acc": sum(row[0] for row in ours.correct) / len(ours.correct),
        "answers": len(ours.answers),
        "answers_that_differ": sum(text != theirs.answers[id] for id, text in ours.answers.items()),
        "figures_that_differ": sum(figures != theirs.figures[task] for task, figures in ours.figures.items()),
        "seconds": round(ours.seconds, 1),
        "seconds_lm_eval": round(theirs.seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", type=Path)
    parser.add_argument("--only", choices=("pocket", "smollm2"))
    options = parser.parse_args()
    report: dict[str, Any] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} processors",
        "lm_eval": version("lm_eval"),
        "torch": version("torch"),
        "transformers": version("transformers"),
    }
    for model in [options.only] if options.only else ["pocket", "smollm2"]:
        with tempfile.TemporaryDirectory() as folder:
            report[model] = compare_evaluations(Path(folder), model)
    print(json.dumps(report, indent=1))
    if options.save:
        options.save.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
