"""lm-eval asks a running server (`local-completions`) what it asks the model itself (`hf`, transformers and PEFT), and
finds the same: loglikelihoods of choices, which of them are greedy, and answers, on tasks of rows made here."""

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
from serving import Server, adapters, serving

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
    made = adapters(folder / "adapters", "one")
    words = ("model=pocket", "method=lora", "dtype=float32", f"stage.adapters={{one: {made / 'one'}}}")
    with serving(forks, folder, *words) as server:
        yield server


def written_tasks(server: Server, folder: Path) -> None:
    """Two tasks on twenty rows. One of each row's choices is what the model itself would say: the likeliest token at
    each place, which lm-eval finds by comparing numbers."""
    rows = []
    for i, mood in enumerate(("happy", "tired", "hungry", "curious", "late")):
        for thing in ("my dog", "the rain", "a good book", "this soup"):
            prompt = ASKED.format(mood=mood, thing=thing)
            body = {"model": "one", "prompt": prompt, "max_tokens": 3, "temperature": 0}
            _, said = server.post("/v1/completions", body)
            likely = said["choices"][0]["text"].strip()
            rows.append({"prompt": prompt, "choices": [likely, f"I like {thing}!", "No."], "answer": i % 3})
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, what in (("choose", CHOOSE), ("write", WRITE)):
        read = f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
        (folder / f"{name}.yaml").write_text(read + 'doc_to_text: "{{prompt}}"\n' + what)


def measured(folder: Path, name: str, backend: str, **given: object) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """Metrics by task, and what was found for each row, by `python -m lm_eval`."""
    words = ["--model", backend, "--model_args", ",".join(f"{key}={value}" for key, value in given.items())]
    words += ["--tasks", "choose,write", "--include_path", str(folder), "--batch_size", "3"]
    words += ["--device", "cpu", "--log_samples", "--output_path", str(folder / name)]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "lm_eval", *words]
    done = subprocess.run(words, env=env, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = (folder / name).glob("*/results_*.json")
    found = {}
    for task in ("choose", "write"):
        (samples,) = (folder / name).glob(f"*/samples_{task}_*.jsonl")
        rows = map(json.loads, samples.read_text().splitlines())
        found[task] = [row["resps"] for row in sorted(rows, key=lambda row: row["doc_id"])]
    return json.loads(results.read_text())["results"], found


def test_a_server_gives_what_the_model_gives(server: Server, folder: Path) -> None:
    written_tasks(server, folder)
    model, address = find_pocket_folder(), f"{server.api}/completions"
    mine, by_http = measured(
        folder, "served", "local-completions", model="one", base_url=address, tokenizer=model,
        tokenizer_backend="huggingface", num_concurrent=4, max_retries=1,
    )  # fmt: skip
    theirs, in_process = measured(
        folder, "itself", "hf", pretrained=model, peft=folder / "adapters" / "one", dtype="float32"
    )
    numbers = {key: value for key, value in theirs["choose"].items() if isinstance(value, float)}
    assert {"acc,none", "acc_norm,none"} <= numbers.keys()
    assert {key: mine["choose"][key] for key in numbers} == pytest.approx(numbers, abs=1e-3)
    greedy = 0
    for row, other in zip(by_http["choose"], in_process["choose"], strict=True):
        for [[logprob, is_greedy]], [[expected, was_greedy]] in zip(row, other, strict=True):
            assert float(logprob) == pytest.approx(float(expected), abs=1e-3)
            assert is_greedy == was_greedy
            greedy += is_greedy == "True"
    assert 5 < greedy < 60
    assert by_http["write"] == in_process["write"]
    assert len({said for [[said]] in by_http["write"]}) > 5
