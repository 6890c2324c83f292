"""README's five commands for a user's own model and data, read from the user's folder and files.

The models have random weights of real architectures and the chat templates of their families."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_templates import FAMILIES, make_tokenizer

from align.__main__ import main
from align.run import read_manifest
from align.run.manifest import write_manifest

README = Path(__file__).resolve().parents[2] / "README.md"
SHAPE = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
}
MODELS = {"Qwen3": "qwen3", "Gemma": "gemma"}
SMALLER = {  # what makes a command quick; everything else is as README has it
    "sft": ("stage.batch_size=8", "data.held_out=0.25", "stage.log_every=1"),
    "reward": ("stage.batch_size=4", "stage.micro_batch=4", "stage.held_out=0.25", "stage.log_every=1"),
    "ppo": (
        "stage.updates=2",
        "stage.batch_size=8",
        "stage.micro_batch=4",
        "stage.normalise_on=8",
        "data.held_out=0.25",
        "rollout.max_new_tokens=8",
    ),
    "eval": ("data.held_out=0.25", "rollout.max_new_tokens=8"),
    "export": (),
}


def read_commands() -> list[list[str]]:
    """Read the arguments of README's commands."""
    section = README.read_text(encoding="utf-8").split("## Your own model and data")[1]
    block = re.findall(r"```bash\n(.*?)```", section, re.DOTALL)[0]
    return [shlex.split(line, comments=True)[3:] for line in block.splitlines()]


def save_random_model(architecture: str, folder: Path) -> None:
    import transformers

    family = FAMILIES[MODELS[architecture]]
    tokenizer = make_tokenizer(family.template, family.eos)
    torch.manual_seed(0)
    config = getattr(transformers, f"{architecture}Config")(**SHAPE, eos_token_id=tokenizer.eos_token_id)
    getattr(transformers, f"{architecture}ForCausalLM")(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def pairs(chats: Path) -> list[dict[str, Any]]:
    turns = [json.loads(line)["messages"] for line in chats.read_text(encoding="utf-8").splitlines()]
    refused = [{"role": "assistant", "content": "No."}]
    return [{"prompt": t[:1], "chosen": t[1:], "rejected": refused} for t in turns]


def test_there_are_five_commands() -> None:
    assert [c[0] for c in read_commands()] == [f"stage={name}" for name in SMALLER]


@pytest.mark.parametrize("architecture", MODELS)
def test_five_commands_from_a_model_folder_to_an_adapter(
    architecture: str, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    monkeypatch.chdir(tmp_path)
    save_random_model(architecture, tmp_path / "ORG" / "NAME")
    shutil.copy(chats, "chats.jsonl")
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs(chats)), encoding="utf-8")
    for (stage, *args), smaller in zip(read_commands(), SMALLER.values(), strict=True):
        status = main([stage, *args, *smaller, "device=cpu"])
        output = capsys.readouterr()
        assert status == 0, output.err
        folder = Path(output.out.splitlines()[-1])
        assert read_manifest(folder).status == "done"
        assert (folder / "report.html").is_file()
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "ORG" / "NAME")
    PeftModel.from_pretrained(base, str(folder / "artifact"))


def test_an_instruction_model_is_a_start_as_it_is(
    chats: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Reward models and PPO start from `init=base` without a supervised stage. PPO is measured against the model."""
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in pairs(chats)), encoding="utf-8")
    common = ["init=base", "model=hub", f"model.path={tiny_model}", f"run.root={tmp_path}", "device=cpu", "data=jsonl"]
    for stage in ("reward", "ppo", "eval"):
        data_path = f"data.path={file if stage == 'reward' else chats}"
        status = main([f"stage={stage}", *common, data_path, *SMALLER[stage]])
        output = capsys.readouterr()
        assert status == 0, output.err
        manifest = read_manifest(Path(output.out.splitlines()[-1]))
        assert manifest.base.id == str(tiny_model)
        start = manifest.inputs["init"]
        assert start.digest == manifest.base.digest
        assert start.whole is True
        if stage == "ppo":  # the base may have moved since PPO began
            moved = replace(manifest, inputs={**manifest.inputs, "init": replace(start, path="/gone")})
            write_manifest(Path(output.out.splitlines()[-1]), moved)
    assert manifest.metrics["kl"] != 0
