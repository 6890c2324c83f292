"""Multiple choice and answers beside lm-eval's: the same log-likelihoods and the same picks, on rows that are hard to
split into tokens, and the same texts.

    python benchmarks/evals/multiple_choice.py [--save multiple_choice.json] [--only pocket|smollm2]

`probe: choice` and lm-eval's `hf` backend weigh the choices of sixty rows by the base and by an adapter on it, in fp32,
unquantised, and write the answers of `generating.py`. Reported are the largest difference of a log-likelihood, how many
picks, texts and figures differ, and the processor seconds of both commands by system.
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

from generating import TASKS, folder_of_tasks  # noqa: E402

from align.core.types import Conversation, Message  # noqa: E402
from align.data.chat.encode import render  # noqa: E402
from align.models.base import find_base  # noqa: E402
from align.models.load import load_tokenizer  # noqa: E402

THINGS = ("the rain", "a good book", "this soup", "my dog", "the old town")
ROUND = 5
"""Of each kind of row so many."""
LONG = "We went along the river and came to another village, and nobody there knew the way. "
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
ALONE = """
import json, sys
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

path, adapter, folder = sys.argv[1:]
for who, more in (("base", {}), ("adapter", {"peft": adapter})):
    given = {"pretrained": path, "dtype": "float32", "device": "cpu", **more}
    manager = TaskManager(include_path=folder, include_defaults=False)
    found = simple_evaluate("hf", given, ["asked", "writing"], batch_size=8, bootstrap_iters=0, task_manager=manager)
    with open(f"lm-eval-{who}.json", "w") as file:
        json.dump({"results": found["results"], "samples": found["samples"]}, file, default=str)
"""
"""What lm-eval finds by itself."""
CHATS = ("What is the capital of France?", "Say yes in one word.", "Hello?")


def rows() -> list[dict[str, Any]]:
    """Sixty rows, of twelve kinds."""
    found = list[dict[str, Any]]()
    for i, thing in enumerate(THINGS * (ROUND // len(THINGS))):
        asked = f"Question: What about {thing}?\nAnswer:"
        shots = "".join(f"Question: Is {other} nice?\nAnswer: yes\n\n" for other in THINGS)
        kinds: Sequence[tuple[str, list[str]]] = (
            (asked, [f"I like {thing}.", "No.", "It is late, and I have to go home now."]),
            (f"{asked} ", [f"I like {thing}.", "No."]),
            (f"{asked}  \n ", [f"I like {thing}.", "No.", f"{thing}?"]),
            (f"{asked} A) yes B) no C) both\n", ["A", "B", "C"]),
            ("", [f"{thing} is here.", f"here is {thing}.", "zzq zzq"]),
            (f"Über {thing} — naïve café, 你好 🙂:", ["Größe 🙂", "日本語", "plain words"]),
            (f"I think that {thing}", ["'s fine", "s are fine", ", well", "ish"]),
            (shots + asked, ["yes", "no"]),
            (f"{asked} again, {thing}", [thing, f"{thing}.", f" {thing}", f"{thing} "]),
            (LONG * 20 + asked, ["Yes, I do.", "No, I do not."]),
            (f"2 + {i} =", [str(2 + i), str(3 + i), "seven", "\u0663"]),
            (f"<s>{asked}", ["</s>", "<s>", "It is <b>bold</b>."]),
        )
        found += [{"prompt": prompt, "choices": choices, "answer": (i + k) % len(choices)}
                  for k, (prompt, choices) in enumerate(kinds)]  # fmt: skip
    return [{"id": i, **row} for i, row in enumerate(found)]


class Weighed(NamedTuple):
    """What somebody made of the rows.

    Attributes:
        logprobs: of each row's choices, in nats.
        right: by each norm, whether each row's pick is right.
        answers: to the rows of `generating.py`, by task and row.
        figures: lm-eval's, of each of its tasks.
        seconds: of a processor.
    """

    logprobs: list[list[float]]
    right: list[list[float]]
    answers: Mapping[str, str]
    figures: Mapping[str, Mapping[str, float]]
    seconds: float


def ran(folder: Path, *words: str) -> float:
    """Processor seconds of a command of Python's."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home")}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}\n{done.stdout[-2000:]}{done.stderr[-3000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def ours(folder: Path, model: str) -> Mapping[str, Weighed]:
    """By `probe: choice`: of the base, and of an adapter that is trained for it."""
    short = ("method=lora", "dtype=float32", f"model={model}", "device=cpu", f"run.root={folder / 'runs'}")
    ran(
        folder, "-m", "align", "stage=sft", *short, "stage.max_steps=2", "stage.lr=0.01", "stage.eval_size=2",
        "run.name=s", "data=files", "data.path=said.jsonl", "data.held_out=0.4", "data.max_length=128",
        "stage.batch_size=1", "stage.micro_batch=1",
    )  # fmt: skip
    seconds = ran(
        folder, "-m", "align", "stage=eval", *short, "stage.systems={adapter: sft:s, base: base}", "run.name=e",
        "eval.tasks=[{name: asked, path: rows.jsonl, probe: choice}, {name: w, lm_eval: writing, include: tasks}]",
    )  # fmt: skip
    artifact = folder / "runs" / "eval" / "e" / "artifact"
    lines = [json.loads(line) for line in (artifact / "answers.jsonl").read_text().splitlines()]
    found = sorted((line for line in lines if line["task"] == "asked"), key=lambda line: int(line["id"]))
    return {
        who: Weighed(
            [line["answers"][who]["weighed"]["logprobs"] for line in found],
            [[line["answers"][who]["weighed"][norm] for norm in NORMS] for line in found],
            {line["id"]: line["answers"][who]["text"] for line in lines if line["task"] == "w"},
            figures(json.loads((artifact / "lm_eval" / "w" / f"{who}.json").read_text())),
            seconds / 2,
        )
        for who in ("base", "adapter")
    }


def figures(results: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Of lm-eval's results those of the tasks that ask for answers."""
    of = {name: results["results"][name] for name in TASKS}
    return {name: {key: x for key, x in one.items() if isinstance(x, float)} for name, one in of.items()}


def theirs(folder: Path, model: str) -> Mapping[str, Weighed]:
    """By lm-eval's `hf`, of which one process asks both."""
    seconds = ran(folder, "-c", ALONE, find_base(model).path, "runs/sft/s/artifact", "tasks")
    found = dict[str, Weighed]()
    for who in ("base", "adapter"):
        results = json.loads((folder / f"lm-eval-{who}.json").read_text())
        samples = results["samples"]
        told = sorted(samples["asked"], key=lambda row: row["doc_id"])
        logprobs = [[float(logprob) for [[logprob, _]] in row["resps"]] for row in told]
        right = [[row[norm] for norm in NORMS] for row in told]
        answers = {f"{name}/{row['doc_id']}": row["resps"][0][0] for name in TASKS for row in samples[name]}
        found[who] = Weighed(logprobs, right, answers, figures(results), seconds / 2)
    return found


def compared(folder: Path, model: str, most: int | None = None) -> dict[str, Any]:
    """Both, beside each other, on so many rows; None for all."""
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows()[:most]), encoding="utf-8")
    said = [{"prompt": f"What about {thing}?", "completion": f"I like {thing}, and so do you."} for thing in THINGS]
    (folder / "said.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in said))
    tasks, tokenizer = folder / "tasks", load_tokenizer(find_base(model))
    folder_of_tasks(tasks, [render(tokenizer, Conversation((Message("user", said),)), True) for said in CHATS])
    (tasks / "asked.yaml").write_text(TASK.replace("DATA", str(folder / "rows.jsonl")))
    mine, other = ours(folder, model), theirs(folder, model)
    found = dict[str, Any]()
    for who, one in mine.items():
        pairs = [
            (a, b) for row, of in zip(one.logprobs, other[who].logprobs, strict=True)
            for a, b in zip(row, of, strict=True)
        ]  # fmt: skip
        differ = sum(a != b for a, b in zip(one.right, other[who].right, strict=True))
        found[who] = {
            "rows": len(one.logprobs), "choices": len(pairs), "largest_difference": max(abs(a - b) for a, b in pairs),
            "rows_judged_otherwise": differ,
            "acc": sum(right[0] for right in one.right) / len(one.right),
            "answers": len(one.answers),
            "answers_that_differ": sum(text != other[who].answers[id] for id, text in one.answers.items()),
            "figures_that_differ": sum(of != other[who].figures[name] for name, of in one.figures.items()),
            "seconds": round(one.seconds, 1), "seconds_lm_eval": round(other[who].seconds, 1),
        }  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", type=Path)
    parser.add_argument("--only", choices=("pocket", "smollm2"))
    given = parser.parse_args()
    found: dict[str, Any] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} processors", "lm_eval": version("lm_eval"),
        "torch": version("torch"), "transformers": version("transformers"),
    }  # fmt: skip
    for model in [given.only] if given.only else ["pocket", "smollm2"]:
        with tempfile.TemporaryDirectory() as folder:
            found[model] = compared(Path(folder), model)
    print(json.dumps(found, indent=1))
    if given.save:
        given.save.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
