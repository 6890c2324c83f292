"""Multiple choice beside lm-eval's: the same log-likelihoods and the same picks, on rows that are hard to split into
tokens.

    python benchmarks/evals/multiple_choice.py [--save multiple_choice.json] [--only pocket|smollm2]

`probe: choice` and lm-eval's `hf` backend weigh the choices of sixty rows by the base and by an adapter on it, in fp32,
unquantised. Reported are the largest difference of a log-likelihood, how many picks differ, and the processor seconds
of both commands.
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

from align.models.base import find_base  # noqa: E402

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
        seconds: of a processor.
    """

    logprobs: list[list[float]]
    right: list[list[float]]
    seconds: float


def ran(folder: Path, *words: str) -> float:
    """Processor seconds of a Python command."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home")}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", *words], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}\n{done.stdout[-2000:]}{done.stderr[-3000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def ours(folder: Path, model: str) -> Mapping[str, Weighed]:
    """By `probe: choice`: of the base, and of an adapter that is trained for it."""
    short = ("method=lora", "dtype=float32", f"model={model}", "device=cpu", f"run.root={folder / 'runs'}")
    ran(folder, "align", "stage=sft", *short, "stage.max_steps=2", "stage.lr=0.01", "stage.eval_size=4", "run.name=s",
        "stage.batch_size=4", "stage.micro_batch=1", "data.max_length=128")  # fmt: skip
    seconds = ran(
        folder, "align", "stage=eval", *short, "stage.systems={adapter: sft:s, base: base}", "run.name=e",
        "eval.tasks=[{name: asked, path: rows.jsonl, probe: choice}]",
    )  # fmt: skip
    lines = (folder / "runs" / "eval" / "e" / "artifact" / "answers.jsonl").read_text().splitlines()
    found = sorted(map(json.loads, lines), key=lambda line: int(line["id"]))
    return {
        who: Weighed(
            [line["answers"][who]["weighed"]["logprobs"] for line in found],
            [[line["answers"][who]["weighed"][norm] for norm in NORMS] for line in found],
            seconds / 2,
        )
        for who in ("base", "adapter")
    }


def theirs(folder: Path, model: str) -> Mapping[str, Weighed]:
    """By lm-eval's `hf`."""
    (folder / "asked.yaml").write_text(TASK.replace("DATA", str(folder / "rows.jsonl")))
    path, found = find_base(model).path, dict[str, Weighed]()
    for who, more in (("base", ""), ("adapter", f",peft={folder / 'runs' / 'sft' / 's' / 'artifact'}")):
        seconds = ran(
            folder, "lm_eval", "--model", "hf", "--model_args", f"pretrained={path},dtype=float32{more}", "--tasks",
            "asked", "--include_path", str(folder), "--batch_size", "8", "--device", "cpu", "--log_samples",
            "--output_path", str(folder / f"lm-eval-{who}"),
        )  # fmt: skip
        (samples,) = (folder / f"lm-eval-{who}").glob("*/samples_asked_*.jsonl")
        told = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda row: row["doc_id"])
        logprobs = [[float(logprob) for [[logprob, _]] in row["resps"]] for row in told]
        found[who] = Weighed(logprobs, [[row[norm] for norm in NORMS] for row in told], seconds)
    return found


def compared(folder: Path, model: str, most: int | None = None) -> dict[str, Any]:
    """Both, beside each other, on so many rows; None for all."""
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows()[:most]), encoding="utf-8")
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
