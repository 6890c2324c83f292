"""Whoever judges reads the answer alone, where that is asked for: the reward, the annotators, the judge."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from workshop import Workshop

from align.run import read_manifest
from align.track import read_rows
from annotate.store import Store

# It writes down what it reads, and likes some prompts more than others: an empty answer gets a score too.
JUDGE = """
import json
from pathlib import Path
LOG = Path(__file__).with_name("read.jsonl")

def likes(conversations):
    with LOG.open("a") as log:
        for turns in conversations:
            log.write(json.dumps(turns[-1]["content"]) + "\\n")
    return [float(len(turns[0]["content"]) % 5) for turns in conversations]
"""


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, chats: Path) -> Workshop:
    """A model whose template opens the block of reasoning: what it says is reasoning until it closes that, and a random
    one never does. Its judge lies beside it."""
    folder = tmp_path_factory.mktemp("reasoning")
    model = folder / "model"
    shutil.copytree(tiny_model, model)
    path = model / "chat_template.jinja"
    told = path.read_text(encoding="utf-8")
    path.write_text(told.replace("{{ '<|assistant|>' }}", "{{ '<|assistant|><think>' }}"), encoding="utf-8")
    assert "<think>" in path.read_text(encoding="utf-8")
    (folder / "thinking_judge.py").write_text(JUDGE, encoding="utf-8")
    shop = Workshop(folder / "runs", chats)
    shop.run("sft", "model=hub", f"model.path={model}", "stage.max_steps=1", "stage.eval_size=2", "run.name=s")
    return shop


def read_by_judge(shop: Workshop) -> list[str]:
    log = shop.root.parent / "read.jsonl"
    found = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    log.unlink(missing_ok=True)
    return found


@pytest.mark.parametrize("reasoning", ["keep", "hide"])
def test_what_is_judged(shop: Workshop, monkeypatch: pytest.MonkeyPatch, reasoning: str) -> None:
    monkeypatch.syspath_prepend(str(shop.root.parent))
    words = [f"rollout.reasoning={reasoning}", f"project={reasoning}", "init=sft:s"]
    judge = ["reward=fn", "reward.fn=thinking_judge:likes"]
    hides = reasoning == "hide"

    shop.run("sample", *words, "stage.prompts=4", "stage.candidates=2")
    with Store.open(f"sqlite:///{shop.root / 'annotations.db'}", create=False) as store:
        shown = [c.text for item in store.items(reasoning) for c in item.candidates]
    assert len(shown) == 8
    assert all(text == "" for text in shown) if hides else any(shown)

    learning = ["stage.updates=1", "stage.batch_size=8", "stage.micro_batch=4", "stage.normalise_on=8"]
    ppo = shop.run("ppo", *words, *judge, *learning)
    read = read_by_judge(shop)
    assert len(read) == 16  # the answers that scores are standardised on, and those of the update
    assert all(text == "" for text in read) if hides else any(read)
    lengths = [row["length"] for row in read_rows(ppo / "metrics.jsonl")]
    assert lengths[0] > 1  # what is learned from is what was sampled, reasoning and all

    artifact = f"ppo:{ppo.name}"
    shop.run("eval", *words[:2], *judge, f"artifact={artifact}", "stage.prompts=4", "stage.allow_proxy=true")
    read = read_by_judge(shop)
    assert len(read) == 8
    assert all(text == "" for text in read) if hides else any(read)
    assert read_manifest(ppo).config["rollout"]["reasoning"] == reasoning


def test_a_learned_reward_reads_answers_alone_too(shop: Workshop, tmp_path: Path) -> None:
    """On the policy's base it reads tokens: those that its own pairs had."""
    pairs = [
        {"prompt": f"What about {i}?", "chosen": f"<think>\nHm {i}.\n</think>\n\nGood {i}.", "rejected": f"No {i}."}
        for i in range(20)
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    given = ["data=jsonl", f"data.path={path}", "init=sft:s", "stage.held_out=0.3", f"run.root={shop.root}"]
    words = ["stage=reward", *given, "stage.batch_size=8", "device=cpu", "run.name=alone", "data.reasoning=hide"]
    assert shop.ended(*words) == 0, shop.said
    assert shop.ended(*words, "data.reasoning=mask", "run.name=masked") == 2
    assert "a pair is judged by all of it" in shop.said
    learning = ["stage.updates=1", "stage.batch_size=8", "stage.micro_batch=4", "stage.normalise_on=8"]
    found = {}
    for reasoning in ("keep", "hide"):
        ppo = shop.run("ppo", f"rollout.reasoning={reasoning}", "init=sft:s", "reward.ref=reward:alone", *learning)
        (found[reasoning],) = read_rows(ppo / "metrics.jsonl")
    assert found["keep"]["length"] == found["hide"]["length"]  # the same answers
    assert found["keep"]["raw_score"] != found["hide"]["raw_score"]  # read otherwise
