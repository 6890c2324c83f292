"""Votes in a browser train PPO: `recipes/forty/label.py` presses the keys, and all other steps are commands."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from free_ports import pick_free_port

from align.__main__ import main
from align.annotate.store import Store
from align.reward.rules import load_sentiment_scorer
from align.run import read_manifest, resolve

pytestmark = pytest.mark.slow
LABEL = Path(__file__).resolve().parents[2] / "recipes" / "forty" / "label.py"


def run_label(root: Path, items: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(LABEL), "forty", str(root), f"--items={items}", f"stage.port={pick_free_port()}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_votes_of_a_browser_train_a_reward_model_and_ppo(
    browser: Any, tmp_path: Path, tiny_model: Path, chats: Path
) -> None:
    root = tmp_path / "runs"
    answers = ["It was lovely, thanks!", "It was awful.", "It was a day.", "It was long."]
    common = [f"run.root={root}", "project=forty", "rollout.max_new_tokens=12"]
    data = ["data=jsonl", f"data.path={chats}", "data.held_out=0.25", "data.max_length=128"]
    sft = ["stage=sft", "model=hub", f"model.path={tiny_model}", "stage.max_steps=2", "stage.eval_size=2", *data]
    assert main([*sft, *common]) == 0
    items = tmp_path / "items.jsonl"
    rows = ({"prompt": f"How was day {n}?", "answers": answers[n % 3 :] + answers[: n % 3]} for n in range(12))
    items.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["stage=annotate", "stage.action=import", f"stage.path={items}", *common]) == 0

    first = run_label(root, 5)
    assert first.returncode == 0, first.stderr
    assert "5 items ranked in the browser" in first.stdout
    assert "all: 5 of 12" in first.stdout  # the server's last line after Ctrl+C
    second = run_label(root, 40)
    assert "7 items ranked in the browser" in second.stdout, second.stderr

    warmth = load_sentiment_scorer()
    with Store.open(f"sqlite:///{root / 'annotations.db'}", create_if_missing=False) as store:
        votes = store.rankings("forty")
        texts = {candidate.id: candidate.text for item in store.items("forty") for candidate in item.candidates}
    assert len(votes) == len({vote.item for vote in votes}) == 12
    for vote in votes:
        place = {id: tier for tier, ids in enumerate(vote.tiers) for id in ids}
        for a, b in combinations(place, 2):
            gap = warmth(texts[a]) - warmth(texts[b])
            assert (place[a] < place[b], place[a] == place[b]) == (gap > 0, gap == 0), (texts[a], texts[b])

    reward = ["stage=reward", "data=annotations", "stage.batch_size=8", "stage.held_out=0.3"]
    ppo = ["stage=ppo", "stage.updates=1", "stage.batch_size=8", "stage.micro_batch=4", "stage.normalise_on=16"]
    assert main([*reward, *common]) == 0
    assert main([*ppo, *data, *common]) == 0
    reward_input = resolve("ppo:latest", root, field_name="artifact").manifest.inputs["reward"]
    assert read_manifest(Path(reward_input.path).parent).inputs["data"].project == "forty"


def test_a_server_that_does_not_start_is_said(browser: Any, tmp_path: Path) -> None:
    completed = run_label(tmp_path / "runs", 1)
    assert completed.returncode != 0
    assert "stage=sample" in completed.stderr
    assert "did not start" in completed.stderr
