"""Write lm-eval tasks with `generate_until`, to compare answers with those of lm-eval's own backend: with few-shot
examples, with stop strings inside a token, with answers that end by themselves or at the token limit, and sums whose
result two filters extract.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TASKS = ("asks", "inside", "cut", "chats", "sums")
TASK_HEADER = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/{name}.jsonl, train: {folder}/{name}_shots.jsonl}}}}
test_split: test
output_type: generate_until
"""
EXACT_MATCH = "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true}]\n"
FEW_SHOT = """fewshot_split: train
num_fewshot: 2
doc_to_text: "Question: {{prompt}}\\nAnswer:"
doc_to_target: "{{answer}}"
"""
PLAIN = """doc_to_text: "{{prompt}}"
doc_to_target: "{{answer}}"
"""
STRIP_FILTER = "filter_list: [{name: stripped, filter: [{function: remove_whitespace}, {function: take_first}]}]\n"
ASKS = f"""{FEW_SHOT}generation_kwargs: {{until: ["\\n\\n", "Question:", ".", "?"], max_gen_toks: 8, do_sample: false}}
{EXACT_MATCH}{STRIP_FILTER}"""
INSIDE = f"{PLAIN}generation_kwargs: {{until: [e, ou, '?!'], max_gen_toks: 8, temperature: 0.0}}\n{EXACT_MATCH}"
CUT = f"{PLAIN}generation_kwargs: {{until: zqzq, max_gen_toks: 5}}\n{EXACT_MATCH}"
CHATS = f"{PLAIN}generation_kwargs: {{until: [], max_gen_toks: 12}}\n{EXACT_MATCH}"
SUM_GENERATION = 'generation_kwargs: {until: ["Question:", "</s>", "<|im_end|>"], max_gen_toks: 18, do_sample: false}'
SUMS = f"""{FEW_SHOT}{SUM_GENERATION}
{EXACT_MATCH}filter_list:
  - name: strict-match
    filter: [{{function: regex, regex_pattern: "#### (\\\\-?[0-9\\\\.\\\\,]+)"}}, {{function: take_first}}]
  - name: flexible-extract
    filter:
      - {{function: regex, group_select: -1, regex_pattern: "(-?[$0-9.,]{{2,}})|(-?[0-9]+)"}}
      - {{function: take_first}}
"""
GROUP = f"group: writing\ntask: [{', '.join(TASKS)}]\n"
COUNTRIES = ("France", "Italy", "Spain", "Norway")


def build_rows(*questions: tuple[str, str]) -> list[dict[str, Any]]:
    return [{"prompt": prompt, "answer": answer} for prompt, answer in questions]


def write_tasks(folder: Path, chat_prompts: Sequence[str]) -> Path:
    """Write the tasks and lm-eval's group `writing`, which has all of them. Returns the folder.

    Args:
        chat_prompts: prompts in the model's chat template that end where its answer begins.
    """
    country_rows = build_rows(*((f"Where is {country}?", "Europe") for country in COUNTRIES))
    country_shots = build_rows(("Where is Kenya?", "Africa"), ("Where is Peru?", "America"))
    text_rows = build_rows(
        ("I think that", "a"), ("Über naïve 🙂 café:", "b"), ("The old town is ", "c"), ("2 + 2 =", "4")
    )
    chat_rows = build_rows(*((prompt, "Paris") for prompt in chat_prompts))
    sum_rows = build_rows(
        *((f"Tom has {i + 2} apples and buys {i + 3}. How many has he?", str(2 * i + 5)) for i in range(3))
    )
    sum_shots = build_rows(
        *(
            (f"Ann has {i} books and buys {i + 1}. How many has she?", f"{i} + {i + 1} = {2 * i + 1}\n#### {2 * i + 1}")
            for i in range(2, 5)
        )
    )
    tasks = {
        "asks": (ASKS, country_rows, country_shots),
        "inside": (INSIDE, text_rows, text_rows),
        "cut": (CUT, text_rows[:2], text_rows),
        "chats": (CHATS, chat_rows, text_rows),
        "sums": (SUMS, sum_rows, sum_shots),
    }
    folder.mkdir(exist_ok=True)
    for name, (definition, rows, shots) in tasks.items():
        yaml = TASK_HEADER.format(name=name, folder=folder) + definition
        (folder / f"{name}.yaml").write_text(yaml, encoding="utf-8")
        for file_name, file_rows in ((name, rows), (f"{name}_shots", shots)):
            text = "".join(f"{json.dumps(row)}\n" for row in file_rows)
            (folder / f"{file_name}.jsonl").write_text(text, encoding="utf-8")
    (folder / "writing.yaml").write_text(GROUP, encoding="utf-8")
    return folder
