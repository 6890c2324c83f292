"""Rewards, annotators and judges read answers without their reasoning if `rollout.reasoning=hide`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from stage_commands import Workshop

from align.annotate.store import Store
from align.run import read_manifest
from align.track import read_rows

# A judge that logs what it reads and scores by the prompt, so that an empty answer gets a score too.
JUDGE = """
import json
from pathlib import Path
LOG = Path(__file__).with_name("read.jsonl")

def likes(conversations):
    with LOG.open("a") as log:
        for turns in conversations:
            log.write(json.dumps([turn["content"] for turn in turns]) + "\\n")
    return [float(len(turns[0]["content"]) % 5) for turns in conversations]
"""


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Workshop:
    """Build a model whose template opens a block of reasoning, and a judge beside it.

    A random model never closes the block.
    """
    folder = tmp_path_factory.mktemp("reasoning")
    model = folder / "model"
    shutil.copytree(tiny_model, model)
    path = model / "chat_template.jinja"
    template = path.read_text(encoding="utf-8")
    path.write_text(template.replace("{{ '<|assistant|>' }}", "{{ '<|assistant|><think>' }}"), encoding="utf-8")
    assert "<think>" in path.read_text(encoding="utf-8")
    (folder / "thinking_judge.py").write_text(JUDGE, encoding="utf-8")
    thought = "<think>\nAn early thought.\n</think>\n\nFine."
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Hello {i}"},
                {"role": "assistant", "content": thought},
                {"role": "user", "content": f"And {i}?"},
                {"role": "assistant", "content": "Good."},
            ]
        }
        for i in range(24)
    ]
    data = folder / "talks.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shop = Workshop(folder / "runs", data)
    shop.run("sft", "model=hub", f"model.path={model}", "stage.max_steps=1", "stage.eval_size=2", "run.name=s")
    return shop


def read_by_judge(shop: Workshop) -> list[list[str]]:
    """Return the conversations that the judge read, the answer last."""
    log = shop.root.parent / "read.jsonl"
    conversations = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    log.unlink(missing_ok=True)
    return conversations


def check_read(read: list[list[str]], hides: bool) -> None:
    """Check that the reasoning of the answer and of earlier turns is absent if it is hidden."""
    assert all(turns[-1] == "" for turns in read) if hides else any(turns[-1] for turns in read)
    assert all(("An early thought." in turns[1]) != hides for turns in read)
    assert all(turns[1].endswith("Fine.") for turns in read)


@pytest.mark.parametrize("reasoning", ["keep", "hide"])
def test_what_is_judged(shop: Workshop, monkeypatch: pytest.MonkeyPatch, reasoning: str) -> None:
    monkeypatch.syspath_prepend(str(shop.root.parent))
    words = [f"rollout.reasoning={reasoning}", f"project={reasoning}", "init=sft:s"]
    judge = ["reward=fn", "reward.fn=thinking_judge:likes"]
    hides = reasoning == "hide"

    if hides:  # empty answers are not compared
        assert shop.status("stage=sample", *shop.data_words, *words, "stage.prompts=4", "stage.candidates=2") == 2
        assert "rollout.reasoning=hide: leaves every answer empty: no answer closes its reasoning" in shop.output
        sampled = max((shop.root / "sample").iterdir(), key=lambda folder: folder.stat().st_mtime)
        assert [(r["all_empty"], r["empty_rate"]) for r in read_rows(sampled / "metrics.jsonl")] == [(4, 1.0)]
    else:
        sampled = shop.run("sample", *words, "stage.prompts=4", "stage.candidates=2")
        with Store.open(f"sqlite:///{shop.root / 'annotations.db'}", create_if_missing=False) as store:
            assert len(list(store.items(reasoning))) == 4
        assert "empty" not in shop.output
    samples = read_rows(sampled / "samples.jsonl")
    assert len(samples) == 8
    assert [any(row.get("reasoning", "") for row in samples), any(row["answer"] for row in samples)] == [
        hides,
        not hides,
    ]
    # The prompt is whole, as it was asked.
    assert all("An early thought." in row["prompt"][1]["content"] for row in samples)

    learning = ["stage.updates=1", "stage.batch_size=8", "stage.micro_batch=4", "stage.normalise_on=8"]
    ppo = shop.run("ppo", *words, *judge, *learning)
    read = read_by_judge(shop)
    assert len(read) == 16  # the answers that scores are standardised on, and those of the update
    check_read(read, hides)
    (row,) = read_rows(ppo / "metrics.jsonl")
    assert row["length"] > 1  # training includes the reasoning
    assert row.get("empty_rate") == (1.0 if hides else None)
    assert ("answers are empty" in shop.outputs[ppo]) == hides

    artifact = f"ppo:{ppo.name}"
    eval_words = [*words[:2], *judge, f"artifact={artifact}", "stage.prompts=4", "stage.allow_proxy=true"]
    evaluated = shop.run("eval", *eval_words)
    read = read_by_judge(shop)
    assert len(read) == 2 * read_manifest(evaluated).metrics["win_rate"]["n"]
    check_read(read, hides)
    rows = read_rows(evaluated / "artifact" / "samples.jsonl")
    assert [any(r.get("reasoning_policy", "") for r in rows), any(r["policy"] for r in rows)] == [hides, not hides]
    assert read_manifest(evaluated).metrics["empty_rate"] == {"ref": float(hides), "policy": float(hides)}
    assert "was optimised with" not in shop.outputs[evaluated]
    shop.run("eval", *eval_words, "rollout.temperature=0.5")
    note = f"{artifact} was optimised with rollout.temperature=1.0, and answers here with rollout.temperature=0.5"
    assert note in shop.output
    read_by_judge(shop)
    assert read_manifest(ppo).config["rollout"]["reasoning"] == reasoning


def test_a_learned_reward_reads_answers_alone_too(shop: Workshop, tmp_path: Path) -> None:
    """A reward model on the policy's base reads the same tokens as its own pairs had."""
    pairs = [
        {"prompt": f"What about {i}?", "chosen": f"<think>\nHm {i}.\n</think>\n\nGood {i}.", "rejected": f"No {i}."}
        for i in range(20)
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    data_words = ["data=jsonl", f"data.path={path}", "init=sft:s", "stage.held_out=0.3", f"run.root={shop.root}"]
    words = ["stage=reward", *data_words, "stage.batch_size=8", "device=cpu", "run.name=alone", "data.reasoning=hide"]
    assert shop.run_command(*words) == 0, shop.output
    assert " pairs to train on" in shop.output  # each ranking is a pair, so their number is not repeated
    assert shop.run_command(*words, "data.reasoning=mask", "run.name=masked") == 2
    assert "pairs are trained on whole answers" in shop.output
    learning = ["stage.updates=1", "stage.batch_size=8", "stage.micro_batch=4", "stage.normalise_on=8"]
    rows_by_reasoning = {}
    for stage in ("ppo", "verify"):  # verify takes a command of PPO
        assert shop.status(f"stage={stage}", *shop.data_words, "init=sft:s", "reward.ref=reward:alone", *learning) == 2
        assert "rollout.reasoning=keep: reward:alone was trained on answers without their reasoning" in shop.output
    status = shop.run_command(*words, "data.reasoning=keep", "run.name=whole")
    assert status == 0, shop.output
    for reasoning in ("keep", "hide"):
        ppo = shop.run("ppo", f"rollout.reasoning={reasoning}", "init=sft:s", "reward.ref=reward:whole", *learning)
        (rows_by_reasoning[reasoning],) = read_rows(ppo / "metrics.jsonl")
    shop.run("ppo", "rollout.reasoning=hide", "init=sft:s", "reward.ref=reward:alone", *learning)
    assert rows_by_reasoning["keep"]["length"] == rows_by_reasoning["hide"]["length"]  # the same answers
    assert rows_by_reasoning["keep"]["raw_score"] != rows_by_reasoning["hide"]["raw_score"]  # read otherwise
