"""`stage=export` of a whole model, a reward model and a critic."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_tools import make_model
from safetensors.torch import load_file, save_file
from stage_commands import SFT, Workshop
from test_own_model import pairs
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from align.export.reward import encode_as_trained, make_test_conversations
from align.models.adapters import WEIGHTS_FILE, attach_adapter
from align.models.load import cast_to_fp32, load_base, load_own_tokenizer
from align.models.roles import build_linear_head, read_score_weight
from align.reward.learned import score_rows
from align.run import load_artifact, read_manifest
from align.run.receipt import RECEIPT
from align.run.weights import SCORE_KEY

pytestmark = pytest.mark.usefixtures("no_network")
CPU = torch.device("cpu")
SMALL = ("stage.max_steps=3", "stage.eval_size=2")
REWARD = ("stage.batch_size=8", "stage.held_out=0.25", "stage.lr=0.01")
WITHOUT_LLAMA = "export.llama_cpp=none"


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory, chats: Path, tiny_model: Path) -> Workshop:
    folder = tmp_path_factory.mktemp("others")
    model = Path(shutil.copytree(tiny_model, folder / "my llama"))
    shop = Workshop(folder / "runs", Path(shutil.copy(chats, folder / "chats.jsonl")), "data.max_length=128")
    base = ("model=hub", f"model.path={model}")
    file = folder / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in pairs(chats)), encoding="utf-8")
    shop.run("full", *base, *SFT, *SMALL, "run.name=f")
    for method in ("qlora", "lora"):
        shop.run("sft", *base, f"method={method}", "method.r=8", *SFT, *SMALL, f"run.name={method}")
        on_pairs = ("data=jsonl", f"data.path={file}", f"init=sft:{method}")
        shop.run("reward", *on_pairs, *REWARD, f"run.name={method}")
    return shop


def read_receipt(folder: Path) -> dict[str, Any]:
    return json.loads((folder / RECEIPT).read_text())


def read_verdicts(folder: Path) -> dict[str, str]:
    return {row["name"]: row["verdict"] for row in read_receipt(folder)["rows"]}


def compute_scores(shop: Workshop, method: str) -> tuple[list[list[int]], torch.Tensor]:
    """Return rows of a reward model, and their scores as PPO computes them."""
    artifact = load_artifact(shop.root / "reward" / method, method)
    assert artifact.base is not None
    tokenizer = load_own_tokenizer(artifact, artifact.base)
    rows = encode_as_trained(tokenizer, make_test_conversations(tokenizer))
    model = cast_to_fp32(load_base(artifact.base, method, CPU, torch.float32))
    model = attach_adapter(model, artifact.path, "reward", is_reward_model=True, is_only_adapter=True).eval()
    return rows, score_rows(model, build_linear_head(read_score_weight(artifact.path, 64)), rows, 0)


# --- A whole model ----------------------------------------------------------------------------------------------------


def test_a_whole_model_leaves_as_it_was_trained(shop: Workshop) -> None:
    folder = shop.run("export", "artifact=full:latest", "export=merged", "export.dtype=float32") / "artifact"
    assert read_verdicts(folder) == {
        "transformers/model/original/float32": "pass",
        "vLLM": "not checked",
        "llama.cpp": "not checked",
    }
    trained, exported = (load_file(f / "model.safetensors") for f in (shop.root / "full" / "f" / "artifact", folder))
    assert trained.keys() == exported.keys()
    assert all(torch.equal(trained[name], exported[name]) for name in trained)
    card = (folder / "README.md").read_text()
    assert "base_model" not in card  # a folder's name is no repository id
    assert "| base model | my llama |" in card  # the model that training began with
    assert re.search(r"\| full/f \| 0.01, .* \| 3 steps \| 8 \| all of the model \|", card)
    assert re.search(r"On 2 held-out rows \(25% of chats.jsonl, held out\), before and after", card)
    assert "A model for chat" in card
    assert "All weights were trained" in card
    assert re.search(r"1\. Supervised fine-tuning of all weights: `full/f`, sha256 `\w{64}`", card)
    assert (folder / "launch" / "vllm.sh").is_file()
    assert json.loads((folder / "base.json").read_text())["id"] == "my llama"


def test_a_whole_model_in_fewer_bits_is_held_to_a_bound(shop: Workshop) -> None:
    folder = shop.run("export", "artifact=full:f", "export=merged")
    assert read_manifest(folder).metrics["receipt"]["transformers/model/original/bfloat16"]["kl"] > 0
    assert AutoModelForCausalLM.from_pretrained(folder / "artifact", dtype="auto").dtype == torch.bfloat16
    check = ("stage=export", "export=check", f"export.path={folder}")
    assert shop.status(*check, "artifact=full:f") == 0, shop.output
    weights = folder / "artifact" / "model.safetensors"
    copy = folder.parent / "copy"
    shutil.copytree(folder / "artifact", copy)
    save_file({k: v * 1.1 for k, v in load_file(weights).items()}, copy / weights.name, {"format": "pt"})
    assert shop.status(*check[:2], f"export.path={copy}", "artifact=full:f") == 2
    assert "sha256 differs" in shop.output


def test_a_whole_model_that_is_not_what_was_trained_is_not_published(
    shop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    from align.export import kinds

    cast_weights = kinds.cast_weights_in_place

    def cast_wrongly(model: Any, dtype: torch.dtype) -> None:
        cast_weights(model, dtype)
        model.model.norm.weight.data *= 1.5

    monkeypatch.setattr(kinds, "cast_weights_in_place", cast_wrongly)
    assert shop.status("stage=export", "artifact=full:f", "export=merged", "run.name=wrong") == 2
    assert "transformers/model/original/bfloat16: kl is" in shop.output
    assert not (shop.root / "export" / "wrong" / "artifact").exists()


@pytest.mark.llama_cpp
@pytest.mark.slow
def test_a_whole_model_leaves_as_gguf(shop: Workshop, tmp_path: Path) -> None:
    """The model ties its embedding to its head, and has an added pad token."""
    make_model(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", tie_word_embeddings=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.add_special_tokens({"pad_token": "<|padding|>"})
    model.resize_token_embeddings(len(tokenizer))
    model.config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    assert "lm_head.weight" not in load_file(tmp_path / "model" / "model.safetensors")
    other_shop = Workshop(tmp_path / "runs", shop.data, *shop.defaults)
    other_shop.run("full", "model=hub", f"model.path={tmp_path / 'model'}", *SFT, *SMALL, "run.name=g")
    arguments = ("artifact=full:g", "export=all", "export.quantised=[q8_0]", "export.require=[llama.cpp]")
    folder = other_shop.run("export", *arguments)
    assert {path.name for path in (folder / "artifact").iterdir()} == {"merged", "gguf"}
    gguf = folder / "artifact" / "gguf"
    assert read_verdicts(gguf) == {
        "llama.cpp/model/original/f16": "pass",
        "llama.cpp/model/original/q8_0": "reported",
        "Ollama": "not checked",
        "vLLM": "not checked",
    }
    assert {"model-f16.gguf", "model-q8_0.gguf", "Modelfile", "launch/llama-server.sh"} < set(
        read_receipt(gguf)["files"]
    )
    modelfile, script = ((gguf / name).read_text() for name in ("Modelfile", "launch/llama-server.sh"))
    assert "FROM ./model-f16.gguf" in modelfile
    assert "ADAPTER" not in modelfile
    assert "--lora" not in script
    code = re.search(r"```python\n(.*?)```", (gguf / "README.md").read_text(), re.DOTALL)
    assert code is not None
    assert 'Llama("model-f16.gguf"' in code[1]
    assert other_shop.status("stage=export", "export=check", "artifact=full:g", f"export.path={folder}") == 0, (
        other_shop.output
    )


# --- A reward model ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["qlora", "lora"])
def test_a_reward_model_leaves_as_a_sequence_classifier(shop: Workshop, method: str) -> None:
    arguments = (f"artifact=reward:{method}", "export=merged", "export.dtype=float32")
    folder = shop.run("export", *arguments) / "artifact"
    into = "nf4-dequantised" if method == "qlora" else "original"
    verdict_by_name = read_verdicts(folder)
    for step in ("merge-before-cast", "merged"):
        assert verdict_by_name[f"transformers/{step}/{into}/float32"] == "pass"
    rows, expected = compute_scores(shop, method)
    assert expected.std() > 0.01  # the scores differ enough to show errors

    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype="auto").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (model.config.num_labels, type(model).__name__) == (1, "LlamaForSequenceClassification")
    assert model.config.pad_token_id == tokenizer.pad_token_id
    chats = [c.as_dicts() for c in make_test_conversations(tokenizer)]
    inputs = tokenizer.apply_chat_template(chats, return_tensors="pt", return_dict=True, padding=True)
    with torch.no_grad():
        assert torch.allclose(model(**inputs).logits[:, 0], expected, atol=1e-4)
    card = (folder / "README.md").read_text()
    assert 'pipeline_tag: "text-classification"' in card
    assert "the last token of a conversation, `<eos>`" in card
    assert "| pairs in the order of the labels |" in card
    assert "--runner pooling" in (folder / "launch" / "vllm.sh").read_text()
    check = ("stage=export", "export=check", f"artifact=reward:{method}", f"export.path={folder}")
    assert shop.status(*check) == 0, shop.output
    assert rows[0] == tokenizer.apply_chat_template(chats[0], return_dict=True)["input_ids"]


def test_a_reward_model_leaves_as_an_adapter_with_its_head(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import AutoPeftModelForSequenceClassification

    folder = shop.run("export", "artifact=reward:qlora", "export.dtype=float32") / "artifact"
    assert read_verdicts(folder)["transformers/adapter/nf4/float32"] == "pass"
    assert SCORE_KEY in load_file(folder / WEIGHTS_FILE)
    assert [path.name for path in (folder / "launch").iterdir()] == ["align.sh"]  # other engines take no head
    monkeypatch.chdir(folder)
    model: Any = AutoPeftModelForSequenceClassification.from_pretrained(".", num_labels=1).eval()
    rows, expected = compute_scores(shop, "qlora")
    with torch.no_grad():
        logits = torch.cat([model(input_ids=torch.tensor([row])).logits[:, 0] for row in rows])
    assert torch.allclose(logits, expected, atol=1e-4)


@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_a_reward_model_whose_scores_are_others_is_not_published(
    shop: Workshop, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Only the score head is wrong, so every pair keeps its order."""
    from align.export import adapter, kinds

    write_adapter = adapter.write_adapter
    cast_weights = kinds.cast_weights_in_place

    def write_wrong_adapter(folder: Path, *arguments: Any, **keywords: Any) -> None:
        write_adapter(folder, *arguments, **keywords)
        tensors = load_file(folder / WEIGHTS_FILE)
        tensors[SCORE_KEY] *= 1.5
        save_file(tensors, folder / WEIGHTS_FILE, {"format": "pt"})

    def cast_wrongly(model: Any, dtype: torch.dtype) -> None:
        cast_weights(model, dtype)
        model.score.weight.data *= 1.5

    monkeypatch.setattr(adapter, "write_adapter", write_wrong_adapter)
    monkeypatch.setattr(kinds, "cast_weights_in_place", cast_wrongly)
    command = ("artifact=reward:lora", f"export={kind}", "export.dtype=float32", f"run.name=wrong-{kind}")
    assert shop.status("stage=export", *command) == 2, shop.output
    assert "It differs from the trained model" in shop.output


# --- Refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["artifact=full:f"], "full:f is a whole model, of which there is no adapter. Add export=merged"),
        (["artifact=full:f", "export=merged", "method=lora"], "method=lora: full:f is a whole model"),
        (["artifact=reward:lora", "export=gguf"], "Add export=merged, which transformers and vLLM read"),
        (["artifact=reward:lora", "export=merged", "export.require=[vLLM]"], "export=merged does not check with it"),
    ],
)
def test_what_cannot_leave_that_way_is_refused_with_what_can(shop: Workshop, words: list[str], problem: str) -> None:
    assert shop.status("stage=export", *words) == 2
    assert problem in shop.output
    assert "Traceback" not in shop.output


def test_everything_that_there_is_of_a_reward_model(shop: Workshop) -> None:
    folder = shop.run("export", "artifact=reward:lora", "export=all", WITHOUT_LLAMA) / "artifact"
    assert {path.name for path in folder.iterdir()} == {"adapter", "merged"}
    merged = folder / "merged"
    assert shop.status("stage=export", f"artifact={merged}", "export=merged") == 2
    assert "is a sequence classifier, as transformers loads it" in shop.output


def test_a_critic_is_no_policy(shop: Workshop) -> None:
    arguments = ("stage.updates=1", "stage.batch_size=8", "stage.micro_batch=4", "stage.normalise_on=8")
    ppo = shop.run("ppo", "init=sft:lora", "reward.ref=reward:lora", *arguments)
    for kind in ("adapter", "merged"):
        value = ppo / "artifact" / "value"
        model = ("model=hub", f"model.path={shop.root.parent / 'my llama'}", "method=lora")
        assert shop.status("stage=export", f"artifact={value}", *model, f"export={kind}") == 2
        assert "is a value model of PPO" in shop.output
        assert "Export the policy that it was trained with" in shop.output
