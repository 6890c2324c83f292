"""Served answers come from the trained weights; models without fast decoding are served too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from processes import Forks
from serving import run_serve_stage, write_adapters
from transformers import GPT2Config, GPT2LMHeadModel

from align.core.types import Conversation, Message
from align.data.chat.encode import encode_for_reward_model, find_stop_token_ids
from align.models.adapters import add_new_adapter, attach_adapter, save_adapter
from align.models.base import find_base
from align.models.dequantised import DEQUANTISED, dequantise_in_place
from align.models.load import load_base, load_classifier, load_tokenizer, read_configurations
from align.models.lora import Lora
from align.reward.learned import score_rows
from align.run import write_json


@torch.no_grad()
def compute_logprobs(model: Any, ids: list[int]) -> list[float]:
    log_probabilities = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    return log_probabilities.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()


def test_an_adapter_of_qlora_answers_on_the_dequantised_base(forks: Forks, tmp_path: Path):
    base = find_base("pocket")
    cpu = torch.device("cpu")
    folder = write_adapters(tmp_path / "adapters", "one")
    write_json(folder / "one" / "receipt.json", {"into": DEQUANTISED})  # as if it had been trained on NF4
    ids = load_tokenizer(base)("Hello there, how are you today? I am fine.", add_special_tokens=False)["input_ids"]
    plain = load_base(base, "lora", cpu, torch.float32)
    nf4 = dequantise_in_place(load_base(base, "qlora", cpu, torch.float32), torch.float32)
    expected = {"pocket": compute_logprobs(nf4, ids)}
    expected["one"] = compute_logprobs(attach_adapter(nf4, folder / "one", "one"), ids)
    on_plain_base = compute_logprobs(attach_adapter(plain, folder / "one", "one"), ids)
    assert max(abs(a - b) for a, b in zip(expected["one"], on_plain_base, strict=True)) > 0.01
    settings = ("model=pocket", f"stage.adapters={{one: {folder / 'one'}}}")
    with run_serve_stage(forks, tmp_path, *settings) as server:
        for model, logprobs in expected.items():
            assert server.logprobs(model, ids) == pytest.approx(logprobs, abs=2e-4)


def build_reward_model(folder: Path) -> tuple[Any, Any]:
    """Save a reward model on pocket to a folder with its records. Returns the model and its head."""
    base = find_base("pocket")
    torch.manual_seed(3)
    classifier = load_classifier(base, "lora", torch.device("cpu"), torch.float32)
    model: Any = add_new_adapter(classifier, Lora(8, 16), is_reward_model=True)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.05 * torch.randn_like(weight))
    save_adapter(model, folder, base)
    write_json(folder / "base.json", {"id": "pocket", "digest": base.digest})
    write_json(folder / "receipt.json", {"into": "original"})
    return model.eval(), model.base_model.model.score.modules_to_save["default"]


def test_a_reward_model_scores_beside_those_that_answer(forks: Forks, tmp_path: Path):
    model, head = build_reward_model(tmp_path / "adapters" / "taste")
    folder = write_adapters(tmp_path / "adapters", "one")
    tokenizer = load_tokenizer(find_base("pocket"))
    stops = find_stop_token_ids(tokenizer, read_configurations(find_base("pocket")).generation_config)
    talks = [[("user", "How are you?"), ("assistant", reply)] for reply in ("Fine, thanks. And you?", "No.")]
    talks.append([("user", "Hi"), ("assistant", "Hello"), ("user", "Bye"), ("assistant", "<s> Bye")])
    rows = [
        encode_for_reward_model(
            tokenizer, Conversation(tuple(Message(*m) for m in talk[:-1])), talk[-1][1], True, stops
        )
        for talk in talks
    ]
    expected = score_rows(model, head, rows, tokenizer.pad_token_id).tolist()
    conversations = [[{"role": role, "content": text} for role, text in talk] for talk in talks]
    names = f"stage.adapters={{taste: {folder / 'taste'}, one: {folder / 'one'}}}"
    with run_serve_stage(forks, tmp_path, "model=pocket", "method=lora", names) as server:
        status, answer = server.post("/v1/rewards", {"model": "taste", "messages": conversations})
        assert status == 200, answer
        assert [entry["reward"] for entry in answer["data"]] == pytest.approx(expected, abs=1e-4)
        assert answer["usage"]["prompt_tokens"] == sum(map(len, rows))
        (alone,) = server.post("/v1/rewards", {"model": "taste", "messages": conversations[1]})[1]["data"]
        assert alone["reward"] == answer["data"][1]["reward"]
        hello = [{"role": "user", "content": "Hello"}]
        too_long = [*hello, {"role": "assistant", "content": "a " * 3000}]
        for path, body, problem in (
            ("/v1/chat/completions", {"model": "taste", "messages": hello}, "use /v1/rewards"),
            ("/v1/completions", {"model": "taste", "prompt": "Hello"}, "use /v1/rewards"),
            ("/v1/rewards", {"model": "one", "messages": conversations}, "'one' is no reward model"),
            ("/v1/rewards", {"model": "pocket", "messages": conversations}, "'pocket' is no reward model"),
            ("/v1/rewards", {"model": "taste", "messages": hello}, "must end with the answer to score"),
            ("/v1/rewards", {"model": "taste", "messages": [hello]}, "must end with the answer to score"),
            ("/v1/rewards", {"model": "taste", "messages": []}, "at least 1 item"),
            ("/v1/rewards", {"model": "taste", "messages": too_long}, "The context is"),
        ):
            status, answer = server.post(path, body)
            assert (status, problem in answer["error"]["message"]) == (400, True), answer
        models = {entry["id"]: entry["scores"] for entry in server.get("/v1/models")[1]["data"]}
        assert models == {"pocket": False, "taste": True, "one": False}


def test_a_model_off_the_fast_path_is_answered_one_request_at_a_time(forks: Forks, tmp_path: Path, tiny_tokenizer: Any):
    torch.manual_seed(0)
    shape = {"vocab_size": 320, "n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 128}
    model = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=1, eos_token_id=2)).eval()
    model.save_pretrained(tmp_path / "tiny")
    tiny_tokenizer.save_pretrained(tmp_path / "tiny")
    with run_serve_stage(forks, tmp_path, "model=hub", "model.path=tiny") as server:
        ids = list(range(20, 40))
        assert server.logprobs("tiny", ids) == pytest.approx(compute_logprobs(model, ids), abs=1e-4)
        body = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8, "n": 3, "seed": 1}
        status, answer = server.post("/v1/chat/completions", body)
        assert status == 200
        assert len({choice["message"]["content"] for choice in answer["choices"]}) == 3
        server.child.send_signal(2)
        stdout = server.child.wait().out
    assert "engine: one request at a time: gpt2 is not on the fast path" in stdout
