"""Rows with tools, from a file to a model that calls them: one data set for every stage, TRL and the server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import load_dataset
from stage_commands import Workshop
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from align.core.types import Conversation
from align.data.chat.encode import encode_conversation, encode_prompt
from align.data.read.records import read_documents
from align.data.sets.published import load_data_set
from align.data.split import truncate_to_question
from align.models.base import POCKET_FOLDER
from align.run import read_manifest
from align.serve.answers import AnswerParser
from align.track import read_rows

TOOLS = [{"type": "function", "function": {"name": "rain", "parameters": {"type": "object"}}}]
PLACES = ("Oslo", "Rome", "Lima", "Kyiv", "Bern", "Graz")


def build_tool_row(place: str) -> dict[str, Any]:
    call = {"id": "c1", "type": "function", "function": {"name": "rain", "arguments": json.dumps({"in": place})}}
    return {
        "messages": [
            {"role": "user", "content": f"Rain in {place}?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": f"dry in {place}"},
            {"role": "assistant", "content": f"No, {place} is dry."},
        ],
        "tools": TOOLS,
    }


def run_shop_stage(shop: Workshop, stage: str, *settings: str) -> Path:
    """Run a stage and return the folder of its run."""
    assert shop.status(f"stage={stage}", *settings) == 0, shop.output
    return Path(shop.output.splitlines()[-1])


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    root = tmp_path_factory.mktemp("tools")
    workshop = Workshop(root / "runs", root)
    rows = [build_tool_row(place) for place in PLACES] + [
        {"messages": build_tool_row("Nice")["messages"][:2], "tools": TOOLS}
    ]
    rows += [{"prompt": f"Hello {i}", "completion": f"Hi {i}!"} for i in range(3)]
    (root / "rows.jsonl").write_text("".join(json.dumps(document) + "\n" for document in rows), encoding="utf-8")
    return workshop


@pytest.fixture(scope="module")
def made(shop: Workshop) -> Path:
    settings = ("data.held_out=0.2", "stage.duplicates.near=null", "stage.contamination.test=false", "run.name=tools")
    return run_shop_stage(shop, "data", f"stage.sources=[{{path: {shop.data}/rows.jsonl}}]", *settings)


def test_a_data_set_keeps_what_its_source_says(shop: Workshop, made: Path) -> None:
    data_set = load_data_set(made / "artifact")
    published = {
        (c.messages, c.tools)
        for side in ("train", "test")
        for c in data_set.load_records(side)
        if isinstance(c, Conversation)
    }
    source_rows = [c for c in read_documents(shop.data / "rows.jsonl") if isinstance(c, Conversation)]
    assert published == {(c.messages, c.tools) for c in source_rows}
    reread = read_documents(next((made / "artifact").glob("train-*.parquet")))  # its files can be read like any others
    assert {(c.messages, c.tools) for c in reread if isinstance(c, Conversation)} <= published
    assert "calls rain" in (made / "report.html").read_text()


def test_trl_trains_on_the_same_tokens(made: Path, tmp_path: Path) -> None:
    train_set: Any = load_dataset(str(made / "artifact"), cache_dir=str(tmp_path))["train"]
    tokenizer = AutoTokenizer.from_pretrained(POCKET_FOLDER)
    arguments = SFTConfig(
        str(tmp_path / "trl"),
        max_steps=1,
        per_device_train_batch_size=2,
        assistant_only_loss=True,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        max_length=None,
    )
    model = AutoModelForCausalLM.from_pretrained(POCKET_FOLDER)
    trainer = SFTTrainer(model, arguments, train_dataset=train_set, processing_class=tokenizer)
    trl_rows: Any = trainer.train_dataset
    for conversation, row in zip(load_data_set(made / "artifact").load_records("train"), trl_rows, strict=True):
        assert isinstance(conversation, Conversation)
        encoded = encode_conversation(tokenizer, conversation)
        assert encoded.input_ids == list(row["input_ids"])
        assert encoded.labels == list(row["labels"])
    trainer.train()


def test_every_stage_of_prompts_takes_them_and_nobody_is_shown_them(shop: Workshop, made: Path) -> None:
    settings = ("data=manifest", f"data.path={made}", "data.held_out=0", "rollout.max_new_tokens=4")
    folder = run_shop_stage(
        shop, "sample", *settings, "model=pocket", "init=base", "stage.candidates=2", "run.name=asked"
    )
    samples = read_rows(folder / "samples.jsonl")
    with_tools = [sample for sample in samples if "tools" in sample]
    last_roles = {sample["prompt"][-1]["role"] for sample in with_tools}
    assert "tool" in last_roles
    assert last_roles <= {"tool", "user"}
    assert all(sample["tools"] == TOOLS for sample in with_tools)
    metrics = read_manifest(folder).metrics
    assert metrics["with_tools"] == len(with_tools) // 2
    handed_out = metrics["prompts"] - sum(metrics[reason] for reason in ("with_tools", "all_empty", "all_equal"))
    sentence = f"{metrics['answers']} answers to {metrics['prompts']} prompts, {handed_out} of them in project"
    assert sentence in shop.output


def test_best_of_n_scores_their_answers_and_writes_no_row_of_them(shop: Workshop, made: Path) -> None:
    settings = ("data=manifest", f"data.path={made}", "data.held_out=0", "model=pocket", "init=base", "run.name=best")
    selection = ("stage.best_of=4", "reward=sentiment", f"run.root={shop.root}")
    assert shop.run_command("stage=sample", *settings, *selection, "rollout.max_new_tokens=40", "device=cpu") == 0, (
        shop.output
    )
    folder = Path(shop.output.splitlines()[-1])
    rows = read_rows(folder / "samples.jsonl")
    metrics = read_manifest(folder).metrics
    has_tools = {f"sample:best/{row['number']}": "tools" in row for row in rows}
    winner_ids = [row["id"] for row in read_rows(folder / "artifact" / "winners.jsonl")]
    assert all(len(row["answers"]) == 4 for row in rows)
    assert metrics["with_tools"] == sum(has_tools.values()) > 0
    assert 0 < metrics["winners"] == len(winner_ids) == len(rows) - metrics["with_tools"] - metrics["no_winner"]
    assert not any(has_tools[id] for id in winner_ids)
    assert "with tools, whose calls are no text to imitate" in shop.output


def test_a_model_that_was_trained_on_calls_calls(shop: Workshop) -> None:
    import torch
    from peft import PeftModel

    rows = [{**document, "messages": document["messages"][:2]} for document in map(build_tool_row, PLACES[:2])]
    (shop.data / "calls.jsonl").write_text("".join(json.dumps(document) + "\n" for document in rows), encoding="utf-8")
    settings = ("model=pocket", "data=jsonl", f"data.path={shop.data}/calls.jsonl", "data.held_out=0")
    folder = run_shop_stage(shop, "sft", *settings, "stage.epochs=60", "stage.lr=5e-3", "run.name=calls")
    examples = (folder / "trained_on.jsonl").read_text()
    assert "tool_call" in examples
    tokenizer = AutoTokenizer.from_pretrained(folder / "artifact")
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(POCKET_FOLDER).chat_template
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(POCKET_FOLDER), str(folder / "artifact"))
    documents = [
        document for document in read_documents(shop.data / "calls.jsonl") if isinstance(document, Conversation)
    ]
    questions = [truncate_to_question(document) for document in documents]
    for place, prompt in zip(PLACES, questions, strict=False):
        assert prompt is not None
        ids = encode_prompt(tokenizer, prompt)
        with torch.no_grad():
            output_ids: Any = model.generate(torch.tensor([ids]), max_new_tokens=48, do_sample=False)
        text = tokenizer.decode(output_ids[0, len(ids) :], skip_special_tokens=True)
        (part,) = AnswerParser(tools=["rain"]).feed(text, is_last=True)
        assert part.call is not None, text
        assert (part.call.name, json.loads(part.call.arguments)) == ("rain", {"in": place})
