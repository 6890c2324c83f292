"""Exports and adapters loaded without our code, on every kind of base.

Each card's own code and PEFT's own classes compute what the trained model computes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stage_commands import SFT, Workshop
from test_own_model import pairs
from torch import Tensor

from align.data.chat.fixed_prompts import encode_fixed_prompts
from align.export.reward import encode_as_trained, make_test_conversations
from align.models.adapters import attach_adapter
from align.models.load import cast_to_fp32, load_base, load_own_tokenizer
from align.models.roles import build_linear_head, read_score_weight
from align.reward.learned import score_rows
from align.run import Artifact, load_artifact

pytestmark = [pytest.mark.usefixtures("no_network"), pytest.mark.slow]
BASES = {"relative": "qlora", "absolute": "lora", "pocket": "qlora", "hub": "qlora", "full": "lora"}
"""Kind of base → method."""
REWARDED = ("relative", "hub", "full")
BOUNDS = {"lora": 1e-4, "qlora": 0.02}
"""Of logits and scores, beside the largest of them. bitsandbytes' own kernel for a processor with bf16 rounds NF4's
activations to it."""
CPU = torch.device("cpu")
SHA = "0123456789abcdef0123456789abcdef01234567"
SMALL = ("stage.max_steps=3", "stage.eval_size=2")
REWARD = ("stage.batch_size=8", "stage.held_out=0.25", "stage.lr=0.01")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, chats: Path) -> Iterator[Workshop]:
    """Build a working folder with a base, a hub's cache with another base, and runs of every kind on each."""
    from huggingface_hub import constants

    folder = tmp_path_factory.mktemp("my work")
    shutil.copytree(tiny_model, folder / "my llama")
    repo = folder / "hf" / "hub" / "models--org--tiny"
    shutil.copytree(tiny_model, repo / "snapshots" / SHA)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(SHA)
    pairs_file = folder / "pairs.jsonl"
    pairs_file.write_text("".join(json.dumps(row) + "\n" for row in pairs(chats)), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(constants, "HF_HUB_CACHE", str(folder / "hf" / "hub"))
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        shop = Workshop(Path("my runs"), Path(shutil.copy(chats, folder / "chats.jsonl")), "data.max_length=128")
        shop.run("full", "model=hub", "model.path=my llama", *SFT, *SMALL, "run.name=f")
        base_words = {
            "relative": ["model=hub", "model.path=my llama"],
            "absolute": ["model=hub", f"model.path={tiny_model}"],
            "pocket": ["model=pocket"],
            "hub": ["model=hub", "model.path=org/tiny"],
            "full": ["model=hub", "model.path=my runs/full/f/artifact"],
        }
        for kind, method in BASES.items():
            shop.run("sft", *base_words[kind], f"method={method}", *SFT, *SMALL, f"run.name={kind}")
        for kind in REWARDED:
            on_pairs = ("data=jsonl", f"data.path={pairs_file}", f"init=sft:{kind}")
            shop.run("reward", *on_pairs, *REWARD, f"run.name={kind}")
        shop.run("dpo", "data=jsonl", f"data.path={pairs_file}", "init=sft:relative", *REWARD, "run.name=relative")
        shop.run(
            "ppo",
            "init=sft:relative",
            "reward.ref=reward:relative",
            "stage.updates=1",
            "stage.batch_size=8",
            "stage.micro_batch=4",
            "stage.normalise_on=8",
            "run.name=relative",
        )
        yield shop


def run_stranger(jobs: Sequence[dict[str, Any]], folder: Path, hub: Path) -> list[list[Tensor]]:
    """Return the logits or scores that a process without our code computes for each job."""
    for i, job in enumerate(jobs):
        job["out"] = str(folder / f"{i}.npz")
    (folder / "jobs.json").write_text(json.dumps(jobs))
    env = {**os.environ, "HF_HOME": str(hub), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    script = [sys.executable, "-I", str(Path(__file__).with_name("load_without_align.py")), str(folder / "jobs.json")]
    process = subprocess.run(script, env=env, capture_output=True, text=True, timeout=900, cwd=folder)
    assert process.returncode == 0, process.stderr[-3000:]
    outputs = []
    for job in jobs:
        with np.load(job["out"]) as arrays:
            outputs.append([torch.from_numpy(arrays[f"arr_{i}"]) for i in range(len(arrays.files))])
    return outputs


def encode_rows(artifact: Artifact) -> list[list[int]]:
    assert artifact.base is not None
    tokenizer = load_own_tokenizer(artifact, artifact.base)
    if artifact.path.parents[1].name == "reward":
        return encode_as_trained(tokenizer, make_test_conversations(tokenizer))[:4]
    return encode_fixed_prompts(tokenizer)[:4]


@torch.no_grad()
def compute_trained(artifact: Artifact, method: str) -> list[Tensor]:
    """Compute by our own loading the [S, V] logits of each row, or [1] scores of a reward model."""
    rows = encode_rows(artifact)
    base = artifact.base
    assert base is not None
    model = cast_to_fp32(load_base(base, "lora" if artifact.whole else method, CPU, torch.float32))
    is_reward = artifact.path.parents[1].name == "reward"
    if not artifact.whole:
        model = attach_adapter(model, artifact.path, "policy", is_reward_model=is_reward, is_only_adapter=True).eval()
    if is_reward:
        head = build_linear_head(read_score_weight(artifact.path, model.config.hidden_size))
        return list(score_rows(model, head, rows, 0)[:, None])
    return [model(input_ids=torch.tensor([row])).logits[0].float() for row in rows]


def compute_relative_error(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    largest = max(float(b.abs().max()) for b in expected)
    return max(float((a - b).abs().max()) for a, b in zip(outputs, expected, strict=True)) / largest


def test_a_runs_adapter_is_loaded_by_peft_from_anywhere(work: Workshop, tmp_path: Path) -> None:
    runs = [*(f"sft/{kind}" for kind in BASES), *(f"reward/{kind}" for kind in REWARDED)]
    runs += ["dpo/relative", "ppo/relative"]
    artifacts = [load_artifact(work.root / name, name) for name in runs]
    jobs = [
        {
            "cwd": "/",
            "folder": str(artifact.path.absolute()),
            "rows": encode_rows(artifact),
            "nf4": BASES[kind] == "qlora",
            "auto": f"AutoPeftModelFor{'SequenceClassification' if stage == 'reward' else 'CausalLM'}",
        }
        for name, artifact in zip(runs, artifacts, strict=True)
        for stage, kind in [name.split("/")]
    ]
    for name, artifact, outputs in zip(
        runs, artifacts, run_stranger(jobs, tmp_path, Path("hf").absolute()), strict=True
    ):
        method = BASES[name.split("/")[1]]
        assert compute_relative_error(outputs, compute_trained(artifact, method)) < BOUNDS[method], name
    config = json.loads((work.root / "sft" / "hub" / "artifact" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/tiny", SHA)


EXPORTS = [
    *((f"sft:{kind}", "adapter") for kind in BASES),
    *((f"reward:{kind}", "adapter") for kind in REWARDED),
    *((ref, "merged") for ref in ("sft:relative", "reward:relative", "reward:full", "full:f")),
]


def test_each_cards_own_code_says_what_was_trained(work: Workshop, tmp_path: Path) -> None:
    """The code runs as written in the export's folder, and PEFT's own class finds the base there by the link."""
    jobs = []
    expected = []
    for ref, kind in EXPORTS:
        folder = work.run("export", f"artifact={ref}", f"export={kind}", "export.dtype=float32") / "artifact"
        artifact = load_artifact(work.root / ref.replace(":", "/"), ref)
        method = BASES.get(ref.split(":")[1], "full")
        code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
        assert code is not None
        rows = encode_rows(artifact)
        trained_outputs = compute_trained(artifact, method)
        job = {"cwd": str(folder.absolute()), "rows": rows}
        jobs.append(job | {"code": code[1]})
        expected.append((f"the card of {ref} as {kind}", trained_outputs))
        if kind == "adapter":
            name = f"AutoPeftModelFor{'SequenceClassification' if 'reward' in ref else 'CausalLM'}"
            assert f"`{name}.from_pretrained(" in (folder / "README.md").read_text()
            jobs.append(job | {"auto": name, "folder": ".", "nf4": ref.endswith(":hub")})
            expected.append((f"{name} of {ref}", trained_outputs))
    for (description, trained_outputs), outputs in zip(
        expected, run_stranger(jobs, tmp_path, Path("hf").absolute()), strict=True
    ):
        # All but the hub's are on the dequantised base, or on no base.
        bound = BOUNDS["qlora" if ":hub" in description else "lora"]
        assert compute_relative_error(outputs, trained_outputs) < bound, description


AUTO = """
import sys
from peft import AutoPeftModelForCausalLM
model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1])
print("loaded", model.get_base_model().config.hidden_size)
"""


def load_by_auto(folder: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_HOME": str(cwd / "hf")}
    command = [sys.executable, "-I", "-c", AUTO, folder]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, cwd=cwd, check=False)


@pytest.mark.parametrize("export_base", ["auto", "none"])
def test_a_folder_of_the_bases_name_is_not_taken_for_it(work: Workshop, tmp_path: Path, export_base: str) -> None:
    """Another model of that name is in the working folder. A copy of the export loads in its own folder."""
    words = ("artifact=sft:relative", "export.dtype=float32", f"export.base={export_base}")
    folder = (work.run("export", *words) / "artifact").absolute()
    base = json.loads((folder / "base.json").read_text())
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == f"my llama-{base['digest'][:16]}"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copytree("my llama", elsewhere / "my llama")
    process = load_by_auto(str(folder), elsewhere)
    assert process.returncode != 0
    assert "loaded" not in process.stdout
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)  # follows the link, as `cp -rL` does
    process = load_by_auto(".", copy)
    assert (process.returncode, process.stdout.split()[:1]) == (0, ["loaded"]), process.stderr[-2000:]


def test_runs_that_moved_keep_their_links(work: Workshop, tmp_path: Path) -> None:
    """An export and the base beside the runs move together. A copy that followed the link is still the same export."""
    folder = work.run("export", "artifact=sft:relative", "export.dtype=float32")
    moved = tmp_path / "moved"
    shutil.copytree(work.root, moved, symlinks=True)
    name = json.loads((folder / "artifact" / "adapter_config.json").read_text())["base_model_name_or_path"]
    link = moved / "export" / folder.name / "artifact" / name
    assert link.is_symlink()
    assert link.resolve().parent == moved / "bases"
    copy = tmp_path / "copy"
    shutil.copytree(folder / "artifact", copy)
    check = ("export=check", "artifact=sft:relative", "export.dtype=float32")
    assert work.status("stage=export", *check, f"export.path={copy}") == 0, work.output
    (copy / "more.txt").write_text("x")
    work.refuses("stage=export", *check, f"export.path={copy}", says="more.txt")
