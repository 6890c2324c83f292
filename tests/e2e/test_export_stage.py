"""`stage=export`: every export has a receipt that holds, and a changed export fails its check."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from stage_commands import EVERY_RUN, SFT, Workshop, list_file_names

from align.export.converters import HF, LORA
from align.models import load
from align.models.adapters import WEIGHTS_FILE
from align.run import file_digest, read_manifest
from align.run.receipt import RECEIPT

pytestmark = pytest.mark.usefixtures("no_network")
NF4 = "transformers/adapter/nf4/float32"
ROUNDED = "transformers/adapter/nf4-dequantised/bfloat16"


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory, chats: Path, tiny_model: Path) -> Workshop:
    """Two adapters, on a copy of the tiny model that a test may change."""
    folder = tmp_path_factory.mktemp("exports")
    model = Path(shutil.copytree(tiny_model, folder / "model"))
    shop = Workshop(folder / "runs", Path(shutil.copy(chats, folder / "chats.jsonl")))
    for name in ("a", "b"):
        seed = f"seed={ord(name)}"
        shop.run("sft", "model=hub", f"model.path={model}", *SFT, f"run.name={name}", seed)
    return shop


@pytest.fixture(scope="module")
def exported(shop: Workshop) -> Path:
    return shop.run("export", "artifact=sft:a")


def read_receipt(folder: Path) -> dict[str, Any]:
    return json.loads((folder / RECEIPT).read_text())


def scale_adapter(folder: Path, factor: float) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    save_file(
        {k: v * factor if "lora_B" in k else v for k, v in tensors.items()}, folder / WEIGHTS_FILE, {"format": "pt"}
    )


def test_an_adapter_leaves_with_its_base_and_a_receipt(shop: Workshop, exported: Path) -> None:
    receipt = read_receipt(exported / "artifact")
    manifest = read_manifest(exported)
    verdicts = {row["name"]: row["verdict"] for row in receipt["rows"]}
    assert verdicts == {
        NF4: "pass",
        ROUNDED: "pass",
        "transformers/adapter/original/float32": "reported",
        "transformers/base alone/nf4/float32": "reported",
        "llama.cpp": "not checked",
        "vLLM": "not checked",
    }
    assert receipt["base"]["digest"] == manifest.base.digest
    assert receipt["base"]["id"] == "model"  # the folder's name without its path
    exported_files = {str(path.relative_to(exported / "artifact")) for path in (exported / "artifact").rglob("*.*")}
    assert set(receipt["files"]) == exported_files - {RECEIPT}
    assert "generation_config.json" in receipt["files"]
    assert manifest.metrics["max_logprob"] <= 1e-4
    assert manifest.metrics["receipt"]["transformers/base alone/nf4/float32"]["max_logprob"] > 0.1
    [base_folder] = (shop.root / "bases").iterdir()
    assert json.loads((base_folder / "base.json").read_text())["digest"] == receipt["base"]["digest"]
    card = (exported / "artifact" / "README.md").read_text()
    assert "On the **original** weights" in card
    assert "not checked: it reads GGUF" in card
    assert "Data: chats.jsonl." in card
    for text in (card, json.dumps(receipt), (base_folder / "base.json").read_text()):
        assert str(shop.root.parent) not in text


def test_an_export_is_measured_again(shop: Workshop, exported: Path, tmp_path: Path) -> None:
    check = ("export=check", "artifact=sft:a")
    check_folder = shop.run("export", *check, f"export.path={exported / 'artifact'}")
    assert "pass (max_logprob ≤ 0.0001)" in shop.output
    assert read_manifest(check_folder).metrics["max_logprob"] <= 1e-4
    # Each check is a new run. It takes the run's folder too.
    assert shop.run("export", *check, f"export.path={exported}") != check_folder

    copy = Path(shutil.copytree(exported / "artifact", tmp_path / "copy"))
    scale_adapter(copy, 1.5)
    receipt = read_receipt(copy)  # a forged digest is noticed by the figures
    receipt["files"][WEIGHTS_FILE] = file_digest(copy / WEIGHTS_FILE)
    (copy / RECEIPT).write_text(json.dumps(receipt))
    command = ("stage=export", *check, f"export.path={copy}")
    shop.refuses(*command, says=("It differs from the trained model", f"{NF4}: max_logprob is"))
    for row in receipt["rows"]:
        row["accepted"] = True  # the check ignores which rows a receipt accepts
    (copy / RECEIPT).write_text(json.dumps(receipt | {"beside": "none", "into": "original", "dtype": "bfloat16"}))
    shop.refuses(*command, says="It differs from the trained model")


def test_a_receipt_that_claims_more_than_was_measured(shop: Workshop, exported: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(exported / "artifact", tmp_path / "copy"))
    check = ("stage=export", "export=check", "artifact=sft:a", f"export.path={copy}")
    receipt = read_receipt(copy)
    [row] = [row for row in receipt["rows"] if row["engine"] == "vLLM"]
    row |= {"verdict": "pass", "found": {"kl": 0.0, "top1": 1.0, "max_logprob": 0.0, "tokens": 9}}
    (copy / RECEIPT).write_text(json.dumps(receipt))
    shop.refuses(*check, says="vLLM: the receipt has a check that was not measured here (vllm is not installed)")
    template = copy / "chat_template.jinja"
    template.write_text("x" + template.read_text())
    receipt = read_receipt(exported / "artifact")
    receipt["files"]["chat_template.jinja"] = file_digest(template)
    (copy / RECEIPT).write_text(json.dumps(receipt))
    shop.refuses(*check, says="its tokens of the fixed prompts are others")


def test_an_adapter_that_no_run_made(shop: Workshop, exported: Path, tmp_path: Path) -> None:
    stranger = Path(shutil.copytree(exported / "artifact", tmp_path / "stranger"))
    model = shop.root.parent / "model"
    export = ("stage=export", f"artifact={stranger}", "model=hub", f"model.path={model}")
    shop.refuses(*export, says="it is not recorded how")
    assert shop.status(*export, "method=qlora") == 0
    other_model = Path(shutil.copytree(model, tmp_path / "other"))
    weights = load_file(other_model / "model.safetensors")
    save_file({k: v + 0.01 for k, v in weights.items()}, other_model / "model.safetensors", {"format": "pt"})
    shop.refuses(
        "stage=export",
        f"artifact={stranger}",
        "model=hub",
        f"model.path={other_model}",
        "method=qlora",
        says="names another base",
    )
    config = json.loads((stranger / "adapter_config.json").read_text())
    for init, problem in (("pissa_niter_4", "cannot be reproduced"), ("pissa", "quantised anew")):
        (stranger / "adapter_config.json").write_text(json.dumps(config | {"init_lora_weights": init}))
        shop.refuses(*export, "method=qlora", "resume=never", says=problem)


def raise_on_read(*arguments: object, **keywords: object) -> None:
    raise AssertionError("weights are read")


@pytest.mark.parametrize(
    ("kind", "settings", "problem"),
    [
        ("merged", {"use_dora": True}, None),
        ("adapter", {"use_dora": True}, "use_dora=True"),
        ("merged", {"trainable_token_indices": [1]}, "trainable_token_indices=[1]"),
        ("adapter", {"peft_type": "IA3"}, "IA3"),
        ("merged", {"init_lora_weights": "pissa_niter_4"}, "cannot be reproduced"),
        ("merged", {"init_lora_weights": "olora"}, "quantised anew"),
        ("merged", {"arrow_config": "none"}, "arrow_config='none', which is not computed here"),
        ("adapter", {"parent_library": ["a"]}, "parent_library=['a'], which is not computed here"),
    ],
)
def test_a_refused_adapter_loads_no_weights(
    shop: Workshop,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    settings: dict[str, Any],
    problem: str | None,
) -> None:
    """Other refusals are tested in `test_export` and `test_merged`."""
    stranger = Path(shutil.copytree(shop.root / "sft" / "a" / "artifact", tmp_path / "stranger"))
    config = json.loads((stranger / "adapter_config.json").read_text())
    (stranger / "adapter_config.json").write_text(json.dumps(config | settings))
    monkeypatch.setattr(load, "require_finite_file", raise_on_read)
    model = ("model=hub", f"model.path={shop.root.parent / 'model'}", "method=qlora")
    status = shop.status("stage=export", f"export={kind}", f"artifact={stranger}", *model, "resume=never")
    assert status == (1 if problem is None else 2), shop.output
    assert (problem or "weights are read") in shop.output


def test_a_receipt_that_does_not_hold_is_refused_before_weights_are_read(
    shop: Workshop, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, bad = (Path(shutil.copytree(exported / "artifact", tmp_path / name)) for name in ("good", "bad"))
    scale_adapter(bad, 1.5)
    monkeypatch.setattr(load, "require_finite_file", raise_on_read)
    check = ("stage=export", "export=check")
    assert shop.status(*check, "artifact=sft:a", f"export.path={good}") == 1
    assert "weights are read" in shop.output
    shop.refuses(*check, "artifact=sft:a", f"export.path={bad}", says=(f"file={WEIGHTS_FILE}", "sha256 differs"))
    shop.refuses(*check, "artifact=sft:b", f"export.path={good}", says="was made from another artifact")
    (good / RECEIPT).write_text(json.dumps(read_receipt(good) | {"kind": "merged", "into": "original"}))
    shop.refuses(
        *check,
        "artifact=sft:a",
        f"export.path={good}",
        says="its receipt says that it was merged into original weights",
    )
    for folder in ("adapter", "merged"):  # a folder as `export=all` writes it, with a bad last receipt
        shutil.copytree(exported / "artifact" if folder == "adapter" else bad, tmp_path / "all" / folder)
    shop.refuses(*check, "artifact=sft:a", f"export.path={tmp_path / 'all'}", says="sha256 differs")


def test_what_was_not_trained_is_not_published(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    from align.export import adapter

    write_adapter = adapter.write_adapter

    def write_scaled(folder: Path, *arguments: Any, **keywords: Any) -> None:
        write_adapter(folder, *arguments, **keywords)
        scale_adapter(folder, 1.5)

    monkeypatch.setattr(adapter, "write_adapter", write_scaled)
    shop.refuses("stage=export", "artifact=sft:a", "run.name=wrong", says=f"{NF4}: max_logprob is")
    assert list_file_names(shop.root / "export" / "wrong") == EVERY_RUN - {"artifact", "metrics.json"} | {"checks.json"}
    checks = json.loads((shop.root / "export/wrong/checks.json").read_text())
    assert [row["verdict"] for row in checks if row["name"] == NF4] == ["fail"]
    accepted = shop.run("export", "artifact=sft:a", f"export.accept=[{NF4},{ROUNDED}]")
    verdicts = {row["name"]: row["verdict"] for row in read_receipt(accepted / "artifact")["rows"]}
    assert verdicts[NF4] == "accepted"
    assert "| accepted (max_logprob" in (accepted / "artifact" / "README.md").read_text()
    unknown_check = f"export.accept=[{NF4},{ROUNDED},nobody]"
    shop.refuses("stage=export", "artifact=sft:a", unknown_check, says="no such check has a bound")


@pytest.mark.parametrize("into", ["auto", "original"])
def test_a_merged_model_says_what_it_was_merged_into(shop: Workshop, into: str) -> None:
    folder = shop.run("export", "artifact=sft:a", "export=merged", f"export.into={into}")
    base = "nf4-dequantised" if into == "auto" else "original"
    rows = {row["name"]: row for row in read_receipt(folder / "artifact")["rows"]}
    shipped = f"transformers/merged/{base}/bfloat16"
    before_cast = f"transformers/merge-before-cast/{base}/float32"
    assert rows[before_cast]["found"]["kl"] < 1e-8
    assert rows[shipped]["verdict"] == "pass"
    metrics = read_manifest(folder).metrics
    difference = read_receipt(folder / "artifact")["difference"]
    for kind, suffix, name in (("shipped", "", shipped), ("before_cast", "_before_cast", before_cast)):
        assert difference[kind] == {"check": name, **rows[name]["found"]}
        assert metrics[f"kl{suffix}"] == rows[name]["found"]["kl"]
    assert metrics["kl"] > 100 * metrics["kl_before_cast"]  # users of the file load the cast weights
    check = ("stage=export", "export=check", "artifact=sft:a", f"export.path={folder / 'artifact'}")
    assert shop.status(*check, f"export.into={into}") == 0
    if into == "original":
        assert rows["transformers/gap/original/bfloat16"]["found"]["kl"] > 1e-4
        assert shop.status(*check) == 2  # without export.into=original the check expects the other base


@pytest.mark.parametrize("kind", ["merged", "all"])
def test_a_merge_into_a_tied_base_is_refused_before_weights_are_read(
    shop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    stranger = Path(shutil.copytree(shop.root / "sft" / "a" / "artifact", tmp_path / "stranger"))
    config = json.loads((stranger / "adapter_config.json").read_text())
    (stranger / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["lm_head"]}))
    rows = json.loads((shop.root.parent / "model" / "config.json").read_text())["vocab_size"]
    sides = {"A": torch.ones(config["r"], 64), "B": torch.ones(rows, config["r"])}
    tensors = {f"base_model.model.lm_head.lora_{side}.weight": tensor for side, tensor in sides.items()}
    save_file(tensors, stranger / WEIGHTS_FILE, {"format": "pt"})
    monkeypatch.setattr(load, "require_finite_file", raise_on_read)
    model = ("model=hub", f"model.path={shop.root.parent / 'model'}", "method=qlora")
    converters = tmp_path / "llama.cpp"  # `all` has GGUF, which looks for the converters first
    converters.mkdir()
    for script in (HF, LORA):
        (converters / script).touch()
    arguments = ("stage=export", f"artifact={stranger}", *model, "resume=never")
    assert shop.status(*arguments, f"export={kind}", f"export.converters={converters}") == 2, shop.output
    assert "target_modules=lm_head: the base ties its embedding to its head" in shop.output
    assert shop.status(*arguments, "export=adapter") == 1
    assert "weights are read" in shop.output  # the adapter passes all other checks


def test_without_a_base_beside_it(shop: Workshop, tmp_path: Path) -> None:
    other_shop = Workshop(
        Path(shutil.copytree(shop.root, tmp_path / "runs", ignore=shutil.ignore_patterns("bases"))), shop.data
    )
    folder = other_shop.run("export", "artifact=sft:a", "export.base=none")
    assert not (other_shop.root / "bases").exists()
    [row] = [row for row in read_receipt(folder / "artifact")["rows"] if row["base"] == "nf4-dequantised"]
    assert (row["verdict"], row["note"]) == (
        "not checked",
        "that base was left out of the export, or is not beside the runs",
    )


def test_another_base_is_no_base_of_it(shop: Workshop, exported: Path, tmp_path: Path) -> None:
    weights = shop.root.parent / "model" / "model.safetensors"
    original = shutil.copy2(weights, tmp_path)
    try:
        save_file({k: v + 0.01 for k, v in load_file(weights).items()}, weights, {"format": "pt"})
        for arguments in (["export=check", f"export.path={exported / 'artifact'}"], ["resume=never"]):
            shop.refuses("stage=export", "artifact=sft:a", *arguments, says="has changed since it was trained")
    finally:
        shutil.copy2(original, weights)
