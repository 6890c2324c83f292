"""A folder of lm-eval tasks of each kind, for tests."""

from __future__ import annotations

import json
from pathlib import Path

READ = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/{name}.jsonl{train}}}}}
test_split: test
"""
CHOOSE = """fewshot_split: train
num_fewshot: 2
output_type: multiple_choice
doc_to_text: "Question: {{prompt}}\\nAnswer:"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
GUESS = """output_type: loglikelihood
doc_to_text: "{{prompt}}"
doc_to_target: " {{choices[0]}}"
metric_list: [{metric: perplexity}, {metric: acc}]
"""
READING = """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
"""
WRITE = """output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 8}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
DRAWS = WRITE.replace("max_gen_toks: 8", "do_sample: true, temperature: 0.7")
GROUP = """group: both
task: [choose, more]
aggregate_metric_list: [{metric: acc, weight_by_size: true}]
"""
MIXED = """group: mixed
task: [choose, write]
"""


def write_task_folder(folder: Path) -> Path:
    """Write a folder with tasks of each kind, and two groups of two tasks."""
    folder.mkdir()
    things = ("my dog", "the rain", "a good book", "this soup", "the old town", "Über 🙂")
    rows = [
        {"prompt": f"What about {thing}?", "choices": [f"I like {thing}.", "No.", " It is late."], "answer": i % 3}
        for i, thing in enumerate(things)
    ]
    shots = [
        {"prompt": f"Is {thing} here?", "choices": ["Yes.", "No."], "answer": i % 2} for i, thing in enumerate(things)
    ]
    more = [{**row, "prompt": f"And {row['prompt']}", "choices": ["Yes.", "No.", "No."]} for row in rows[:4]]
    guess = [
        {"prompt": prompt, "choices": [word]} for prompt, word in (("How are", "you"), ("I am", "a"), ("Thank", "zq"))
    ]
    texts = [{"text": "I am tired, and the rain is here."}, {"text": "The rain is here, and my dog is late. " * 40}]
    kinds = {
        "choose": (rows, CHOOSE),
        "more": (more, CHOOSE),
        "guess": (guess, GUESS),
        "reading": (texts, READING),
        "write": (rows, WRITE),
        "draws": (rows, DRAWS),
    }
    for name, (data, asks) in {**kinds, "shots": (shots, "")}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data), encoding="utf-8")
        if asks:
            train = f", train: {folder}/shots.jsonl" if "fewshot" in asks else ""
            read = READ.format(name=name, folder=folder, train=train)
            (folder / f"{name}.yaml").write_text(read + asks, encoding="utf-8")
    (folder / "both.yaml").write_text(GROUP, encoding="utf-8")
    (folder / "mixed.yaml").write_text(MIXED, encoding="utf-8")
    return folder
