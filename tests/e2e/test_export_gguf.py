"""`stage=export export=gguf|all`: files that llama.cpp loads and confirms."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from gguf_tools import make_model
from stage_commands import SFT, Workshop

from align.run import file_digest, read_manifest
from align.run.receipt import RECEIPT

pytestmark = [pytest.mark.usefixtures("no_network"), pytest.mark.slow, pytest.mark.llama_cpp]
F16_ROW = "llama.cpp/adapter/nf4-dequantised/f16"
ONE = "export.quantised=[q8_0]"


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory, chats: Path) -> Workshop:
    folder = tmp_path_factory.mktemp("gguf")
    make_model(folder / "model")
    shop = Workshop(folder / "runs", Path(shutil.copy(chats, folder / "chats.jsonl")))
    shop.run("sft", "model=hub", f"model.path={folder / 'model'}", *SFT, "run.name=a")
    return shop


@pytest.fixture(scope="module")
def exported(shop: Workshop) -> Path:
    return shop.run("export", "artifact=sft:a", "export=gguf", ONE)


def read_receipt(folder: Path) -> dict[str, Any]:
    return json.loads((folder / RECEIPT).read_text())


def test_base_and_adapter_leave_as_gguf_with_llama_cpps_word_on_them(shop: Workshop, exported: Path) -> None:
    artifact = exported / "artifact"
    receipt = read_receipt(artifact)
    assert {row["name"]: row["verdict"] for row in receipt["rows"]} == {
        F16_ROW: "pass",
        "llama.cpp/adapter/nf4-dequantised/q8_0": "reported",
        "transformers/adapter/original/float32": "reported",
        "transformers/base alone/nf4/float32": "reported",
        "Ollama": "not checked",
        "vLLM": "not checked",
    }
    assert receipt["kind"] == "gguf"
    assert {"base-f16.gguf", "base-q8_0.gguf", "adapter-f16.gguf", "Modelfile", "launch/llama-server.sh"} < set(
        receipt["files"]
    )
    assert read_manifest(exported).metrics["max_logprob"] <= 0.02
    template = re.search(r'TEMPLATE """(.*)"""', (artifact / "Modelfile").read_text(), re.S)
    assert template is not None
    assert "<|user|>{{ .Content }}<|end|>" in template[1]
    for path in artifact.rglob("*"):  # no file names a path of this machine
        assert path.is_dir() or str(shop.root.parent).encode() not in path.read_bytes(), path.name


def test_the_base_is_shared_by_its_adapters(shop: Workshop, exported: Path) -> None:
    [base] = (shop.root / "bases").glob("*-gguf-*/base-f16.gguf")
    assert base.samefile(exported / "artifact" / "base-f16.gguf")


def test_the_cards_own_words_talk_to_it(exported: Path) -> None:
    code = re.search(r"```python\n(.*?)```", (exported / "artifact" / "README.md").read_text(), re.S)
    assert code is not None
    process = subprocess.run(
        [sys.executable, "-c", code[1]], cwd=exported / "artifact", capture_output=True, text=True, timeout=120
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.strip()


def test_it_is_measured_again(shop: Workshop, exported: Path, tmp_path: Path) -> None:
    check = ("export=check", "artifact=sft:a")
    shop.run("export", *check, f"export.path={exported}")
    assert "pass (max_logprob ≤ 0.02)" in shop.output
    copy = Path(shutil.copytree(exported / "artifact", tmp_path / "copy"))
    adapter = copy / "adapter-f16.gguf"
    adapter_bytes = bytearray(adapter.read_bytes())
    adapter_bytes[-4096:] = bytes(4096)  # an adapter that learned less
    adapter.write_bytes(adapter_bytes)
    assert shop.status("stage=export", *check, f"export.path={copy}") == 2
    assert "sha256 differs" in shop.output
    receipt = read_receipt(copy)
    receipt["files"][adapter.name] = file_digest(adapter)
    (copy / RECEIPT).write_text(json.dumps(receipt))
    assert shop.status("stage=export", *check, f"export.path={copy}") == 2
    assert "It differs from the trained model" in shop.output or "the receipt's result differs" in shop.output
    shutil.rmtree(copy)
    shutil.copytree(exported / "artifact", copy)
    base = copy / "base-f16.gguf"  # another base in its place, with a forged receipt
    base.chmod(0o644)
    shutil.copyfile(copy / "base-q8_0.gguf", base)
    receipt = read_receipt(copy)
    receipt["files"][base.name] = file_digest(base)
    for row in receipt["rows"]:
        row["found"] = next((r["found"] for r in receipt["rows"] if r["weights"] == "q8_0"), None) or row["found"]
    (copy / RECEIPT).write_text(json.dumps(receipt))
    assert shop.status("stage=export", *check, f"export.path={copy}") == 2
    assert "It differs from the trained model" in shop.output or "the receipt's result differs" in shop.output
    shutil.rmtree(copy)
    shutil.copytree(exported / "artifact", copy)
    assert shop.status("stage=export", *check, f"export.path={copy}", "export.into=original") == 2
    assert shop.status("stage=export", *check, f"export.path={copy}", "export.llama_cpp=none") == 2
    assert "no engine is available here to check whether the export equals the trained model" in shop.output


def test_everything_at_once(shop: Workshop) -> None:
    folder = shop.run("export", "artifact=sft:a", "export=all", "export.require=[llama.cpp,transformers]", ONE)
    assert {path.name for path in (folder / "artifact").iterdir()} == {"adapter", "merged", "gguf"}
    for kind in ("adapter", "merged", "gguf"):
        assert read_receipt(folder / "artifact" / kind)["kind"] == kind
        assert (folder / "artifact" / kind / "README.md").is_file()
    rows = read_manifest(folder).metrics["receipt"]
    assert {
        F16_ROW,
        "transformers/adapter/nf4/float32",
        "transformers/merge-before-cast/nf4-dequantised/float32",
    } < set(rows)
    check = ("stage=export", "export=check", "artifact=sft:a")
    assert shop.status(*check, f"export.path={folder}") == 0  # all three
    assert shop.output.count("verdict") == 3
    launch = folder / "artifact" / "adapter" / "launch" / "vllm.sh"
    base_match = re.search(r"\$here/(\S+)}", launch.read_text())
    assert base_match is not None
    assert (launch.parent / base_match[1] / "config.json").is_file()  # the base, relative to the export


def test_without_llama_cpp_it_is_not_checked(shop: Workshop, tmp_path: Path) -> None:
    arguments = ("artifact=sft:a", "export=gguf", "export.llama_cpp=none")
    assert shop.status("stage=export", *arguments, "export.require=[llama.cpp]") == 2
    assert "export.require=llama.cpp: it is not available: switched off by its setting" in shop.output
    assert shop.status("stage=export", *arguments, "export.require=[vLLM]") == 2
    assert (
        "export.require=vLLM: export=gguf does not check with it. It checks with llama.cpp, transformers" in shop.output
    )
    folder = shop.run("export", *arguments) / "artifact"
    assert {row["verdict"] for row in read_receipt(folder)["rows"]} == {"reported", "not checked"}
    assert not (folder / "base-q8_0.gguf").exists()
    assert not (folder / "Modelfile").exists()
    full_export = shop.run("export", *arguments[:2], ONE)  # llama.cpp is available now, and confirms the export
    assert full_export != folder.parent
    assert shop.status("stage=export", "artifact=sft:a", "export=gguf", f"export.converters={tmp_path}") == 2
    assert "python -m align.export.converters" in shop.output
    assert shop.status("stage=export", *arguments[:2], f"export.llama_cpp={tmp_path / 'python'}", "resume=never") == 2
    assert "export.llama_cpp=" in shop.output
    assert "it does not run" in shop.output


def test_what_llama_cpp_says_otherwise_is_not_published(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import load_file, save_file

    from align.export import adapter as made

    write_adapter = made.write_adapter

    def write_scaled(folder: Path, *arguments: Any, **keywords: Any) -> None:
        write_adapter(folder, *arguments, **keywords)
        weights = folder / "adapter_model.safetensors"
        tensors = {k: v * 1.5 if "lora_B" in k else v for k, v in load_file(weights).items()}
        save_file(tensors, weights, {"format": "pt"})

    monkeypatch.setattr(made, "write_adapter", write_scaled)
    assert shop.status("stage=export", "artifact=sft:a", "export=gguf", "run.name=wrong", ONE) == 2
    assert "It differs from the trained model" in shop.output
    assert F16_ROW in shop.output
    assert not (shop.root / "export" / "wrong" / "artifact").exists()
    assert not [path.name for path in (shop.root / "bases").iterdir() if not (path / "base.json").is_file()]
