"""Mistakes of users, each run through the whole command line: `mistake_cases`, `row_mistake_cases` and
`server_mistake_cases`.

Each command exits soon with status 2 and one line with field, value, problem and remedy, and leaves nothing behind.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from pathlib import Path

import pytest
from mistake_cases import CASES, Case
from row_mistake_cases import CASES as ROWS
from server_mistake_cases import CASES as SERVERS
from stage_commands import Ready, Workshop

MESSAGE = re.compile(r"align: [^=\n]+=[^\n]*: [^\n]+\. [^\n]+")
"""FIELD=VALUE: problem. Remedy."""
LONGEST_S = 2
"""Seconds of processor time. A mistake that is refused before torch is imported takes a tenth of it."""
GOOD = {
    "sft": {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]},
    "reward": {"prompt": "Is it open?", "chosen": "Yes, until six.", "rejected": "No idea."},
    "dpo": {"prompt": "Is it open?", "chosen": "Yes, until six.", "rejected": "No idea."},
    "kto": {"prompt": "Is it open?", "chosen": "Yes, until six.", "rejected": "No idea."},
    "import": {"prompt": "Is it open?", "answers": ["Yes, until six.", "No idea."]},
}
"""The first row of every file with a wrong second row."""


def build_command(case: Case, ready: Ready, model: Path, rows: Path) -> list[str]:
    """Return a working command, without the words that the case adds."""
    data = ["data=jsonl", f"data.path={rows}"]
    short = ["stage.prompts=2", "rollout.max_new_tokens=8", *ready.data]
    has_scorer = "reward=" in case.words  # a scorer other than a reward model
    return {
        "none": [],
        "sft": ["stage=sft", "model=hub", f"model.path={model}", *data, "stage.max_steps=1", "stage.batch_size=8"],
        "sample": ["stage=sample", "init=sft:s", *short],
        "reward": ["stage=reward", "init=sft:s", *data],
        "dpo": ["stage=dpo", "init=sft:s", *data],
        "kto": ["stage=kto", "init=sft:s", *data],
        "ppo": [word for word in ready.ppo if not (has_scorer and word.startswith("reward."))],
        "eval": ["stage=eval", "artifact=sft:s", *short],
        "suite": ["stage=eval", "stage.systems={a: sft:s, b: base}", *short],
        "judge": ["stage=eval", "eval=judge", *data, "reward=rules", "reward.rules=[{rule: regex, pattern: e}]"],
        "data": ["stage=data", f"stage.sources=[{rows}]"],
        "export": ["stage=export", "artifact=sft:s"],
        "import": ["stage=annotate", "stage.action=import", f"stage.path={rows}", "project=battery"],
        "serve": ["stage=serve"],
        "key": ["stage=serve", "stage.action=key", "stage.tenant=acme", f"stage.keys={rows.parent / 'keys.json'}"],
    }[case.command]


def write_files(case: Case, model: Path, chats: Path, folder: Path) -> tuple[Path, Path]:
    """Write the model and the file of rows of a case, and return their paths."""
    rows = folder / "rows.jsonl"
    rows.write_bytes(chats.read_bytes() if case.content is None or case.of_model else case.content)
    if case.content is not None and not case.of_model and case.content.startswith(b'{"') and case.command in GOOD:
        rows.write_bytes(json.dumps(GOOD[case.command]).encode() + b"\n" + case.content)
    if case.of_model:
        model = Path(shutil.copytree(model, folder / "model"))
        config = json.loads((model / "tokenizer_config.json").read_text())
        config.pop("chat_template", None)  # it would be used instead of the file
        if case.of_model.startswith("chat_template"):
            (model / "tokenizer_config.json").write_text(json.dumps(config))
        (model / case.of_model).write_bytes(case.content or b"")
    return model, rows


@pytest.mark.parametrize("case", [*CASES, *ROWS, *SERVERS], ids=str)
def test_a_mistake_is_named_with_its_remedy(
    case: Case, ready: Ready, tiny_model: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    model, rows = write_files(case, tiny_model, chats, tmp_path)
    shop = Workshop(ready.root, ready.root)
    common = [] if case.command == "none" else [f"run.root={ready.root}", "device=cpu", "resume=never"]
    arguments = case.words.replace("{file}", str(rows)).split()
    before = {*ready.root.glob("*/*")}
    began = time.process_time()
    status = shop.run_command(*build_command(case, ready, model, rows), *common, *arguments)
    seconds = time.process_time() - began
    assert status == 2, shop.output
    message = shop.output[shop.output.rindex("align: ") :].strip()
    assert not [part for part in case.says if part not in message], message
    assert MESSAGE.fullmatch(message), message
    assert seconds < LONGEST_S
    assert {*ready.root.glob("*/*")} == before  # no folder of a run that never began
    assert not (tmp_path / "runs").exists()
