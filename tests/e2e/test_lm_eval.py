"""Metrics of lm-eval on a running server (`local-completions`) are those of the model itself (`hf`).

Compared are loglikelihoods of choices, which of them are greedy, and answers.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from processes import Forks
from serving import Server, run_serve_stage, write_adapters

from align.models.base import find_pocket_folder

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("lm_eval") is None, reason='lm-eval is not installed (pip install "lm-eval[api]")'),
]
CHOOSE = """
output_type: multiple_choice
doc_to_choice: choices
target_delimiter: "\\n"
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
WRITE = """
output_type: generate_until
doc_to_target: "{{choices[1]}}"
generation_kwargs: {until: [" the", "\\n\\n"], max_gen_toks: 24, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
ASKED = "{mood} Question: I am {mood}. What about {thing}?\nAnswer:"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lm-eval")


@pytest.fixture(scope="module")
def server(forks: Forks, folder: Path) -> Iterator[Server]:
    adapters_folder = write_adapters(folder / "adapters", "one")
    words = ("model=pocket", "method=lora", "dtype=float32", f"stage.adapters={{one: {adapters_folder / 'one'}}}")
    with run_serve_stage(forks, folder, *words) as server:
        yield server


def write_tasks(server: Server, folder: Path) -> None:
    """Write two tasks of twenty rows. One choice of each row is the model's own greedy answer."""
    rows = []
    for i, mood in enumerate(("happy", "tired", "hungry", "curious", "late")):
        for thing in ("my dog", "the rain", "a good book", "this soup"):
            prompt = ASKED.format(mood=mood, thing=thing)
            body = {"model": "one", "prompt": prompt, "max_tokens": 3, "temperature": 0}
            _, response = server.post("/v1/completions", body)
            likeliest = response["choices"][0]["text"].strip()
            rows.append({"prompt": prompt, "choices": [likeliest, f"I like {thing}!", "No."], "answer": i % 3})
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, settings in (("choose", CHOOSE), ("write", WRITE)):
        read = f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
        (folder / f"{name}.yaml").write_text(read + 'doc_to_text: "{{prompt}}"\n' + settings)


def measure_by_lm_eval(
    folder: Path, name: str, backend: str, **model_args: object
) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """Run `python -m lm_eval`. Returns the metrics by task, and the responses for each row by task."""
    words = ["--model", backend, "--model_args", ",".join(f"{key}={value}" for key, value in model_args.items())]
    words += ["--tasks", "choose,write", "--include_path", str(folder), "--batch_size", "3"]
    words += ["--device", "cpu", "--log_samples", "--output_path", str(folder / name)]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "lm_eval", *words]
    process = subprocess.run(words, env=env, capture_output=True, text=True, cwd=folder)
    assert process.returncode == 0, process.stderr[-3000:]
    (results,) = (folder / name).glob("*/results_*.json")
    responses = {}
    for task in ("choose", "write"):
        (samples,) = (folder / name).glob(f"*/samples_{task}_*.jsonl")
        rows = map(json.loads, samples.read_text().splitlines())
        responses[task] = [row["resps"] for row in sorted(rows, key=lambda row: row["doc_id"])]
    return json.loads(results.read_text())["results"], responses


def test_a_server_gives_what_the_model_gives(server: Server, folder: Path) -> None:
    write_tasks(server, folder)
    model = find_pocket_folder()
    address = f"{server.api}/completions"
    server_metrics, server_responses = measure_by_lm_eval(
        folder,
        "served",
        "local-completions",
        model="one",
        base_url=address,
        tokenizer=model,
        tokenizer_backend="huggingface",
        num_concurrent=4,
        max_retries=1,
    )
    hf_metrics, hf_responses = measure_by_lm_eval(
        folder, "itself", "hf", pretrained=model, peft=folder / "adapters" / "one", dtype="float32"
    )
    numbers = {key: value for key, value in hf_metrics["choose"].items() if isinstance(value, float)}
    assert {"acc,none", "acc_norm,none"} <= numbers.keys()
    assert {key: server_metrics["choose"][key] for key in numbers} == pytest.approx(numbers, abs=1e-3)
    greedy = 0
    for server_row, hf_row in zip(server_responses["choose"], hf_responses["choose"], strict=True):
        for [[logprob, is_greedy]], [[expected, was_greedy]] in zip(server_row, hf_row, strict=True):
            assert float(logprob) == pytest.approx(float(expected), abs=1e-3)
            assert is_greedy == was_greedy
            greedy += is_greedy == "True"
    assert 5 < greedy < 60
    assert server_responses["write"] == hf_responses["write"]
    assert len({text for [[text]] in server_responses["write"]}) > 5
