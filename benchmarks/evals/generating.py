"""Tasks of lm-eval that ask for answers, for comparisons with lm-eval's own: with examples, with texts that end an
answer within a token, with answers that end by themselves or are cut, and sums whose result two filters look for.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TASKS = ("asks", "inside", "cut", "chats", "sums")
READ = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/{name}.jsonl, train: {folder}/{name}_shots.jsonl}}}}
test_split: test
output_type: generate_until
"""
MATCH = "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true}]\n"
ASKED = """fewshot_split: train
num_fewshot: 2
doc_to_text: "Question: {{prompt}}\\nAnswer:"
doc_to_target: "{{answer}}"
"""
PLAIN = """doc_to_text: "{{prompt}}"
doc_to_target: "{{answer}}"
"""
STRIPPED = "filter_list: [{name: stripped, filter: [{function: remove_whitespace}, {function: take_first}]}]\n"
ASKS = f"""{ASKED}generation_kwargs: {{until: ["\\n\\n", "Question:", ".", "?"], max_gen_toks: 8, do_sample: false}}
{MATCH}{STRIPPED}"""
INSIDE = f"{PLAIN}generation_kwargs: {{until: [e, ou, '?!'], max_gen_toks: 8, temperature: 0.0}}\n{MATCH}"
CUT = f"{PLAIN}generation_kwargs: {{until: zqzq, max_gen_toks: 5}}\n{MATCH}"
CHATS = f"{PLAIN}generation_kwargs: {{until: [], max_gen_toks: 12}}\n{MATCH}"
SUMS = f"""{ASKED}generation_kwargs: {{until: ["Question:", "</s>", "<|im_end|>"], max_gen_toks: 18, do_sample: false}}
{MATCH}filter_list:
  - name: strict-match
    filter: [{{function: regex, regex_pattern: "#### (\\\\-?[0-9\\\\.\\\\,]+)"}}, {{function: take_first}}]
  - name: flexible-extract
    filter:
      - {{function: regex, group_select: -1, regex_pattern: "(-?[$0-9.,]{{2,}})|(-?[0-9]+)"}}
      - {{function: take_first}}
"""
GROUP = f"group: writing\ntask: [{', '.join(TASKS)}]\n"
NAMES = ("France", "Italy", "Spain", "Norway")


def pairs(*of: tuple[str, str]) -> list[dict[str, Any]]:
    return [{"prompt": prompt, "answer": answer} for prompt, answer in of]


def folder_of_tasks(folder: Path, chats: Sequence[str]) -> Path:
    """Write them; all of them are lm-eval's group `writing`.

    Args:
        chats: prompts that end where an answer of the model's is due, by its chat template.
    """
    countries = [(f"Where is {name}?", "Europe") for name in NAMES]
    added = [(f"Tom has {i + 2} apples and buys {i + 3}. How many has he?", str(2 * i + 5)) for i in range(3)]
    worked = [
        (f"Ann has {i} books and buys {i + 1}. How many has she?", f"{i} + {i + 1} = {2 * i + 1}\n#### {2 * i + 1}")
        for i in range(2, 5)
    ]
    texts = pairs(("I think that", "a"), ("Über naïve 🙂 café:", "b"), ("The old town is ", "c"), ("2 + 2 =", "4"))
    written = {
        "asks": (ASKS, pairs(*countries), pairs(("Where is Kenya?", "Africa"), ("Where is Peru?", "America"))),
        "inside": (INSIDE, texts, texts), "cut": (CUT, texts[:2], texts),
        "chats": (CHATS, pairs(*((chat, "Paris") for chat in chats)), texts),
        "sums": (SUMS, pairs(*added), pairs(*worked)),
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    for name, (asks, rows, shots) in written.items():
        (folder / f"{name}.yaml").write_text(READ.format(name=name, folder=folder) + asks, encoding="utf-8")
        for to, data in ((name, rows), (f"{name}_shots", shots)):
            text = "".join(f"{json.dumps(row)}\n" for row in data)
            (folder / f"{to}.jsonl").write_text(text, encoding="utf-8")
    (folder / "writing.yaml").write_text(GROUP, encoding="utf-8")
    return folder
