"""Options of LoRA and of the optimiser, training that goes on: through every stage, to the bit after a kill."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from workshop import PPO, Workshop

from align.config.root import Config, to_plain_dict
from align.models.adapters import read_tensors
from align.run import read_manifest
from align.track import read_rows

SFT = ("stage.batch_size=8", "stage.micro_batch=4", "stage.epochs=2", "stage.lr=0.01", "stage.log_every=1")
ALL = ("method.r=4", "method.dropout=0.2", "method.targets=[q_proj,up_proj]", "method.rslora=true", "method.dora=true")
FEW = (*SFT, "stage.max_steps=3")


@pytest.fixture
def shop(tmp_path: Path, chats: Path, tiny_model: Path) -> Workshop:
    return Workshop(tmp_path / "runs", chats, "model=hub", f"model.path={tiny_model}")


def weights(run: Path) -> dict[str, torch.Tensor]:
    return read_tensors(run / "artifact")


def same(one: Path, other: Path) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_every_option_through_every_stage(shop: Workshop) -> None:
    """Said once, at stage=sft: reward model, PPO, evaluation and export know it from the adapter."""
    tuned = shop.run("sft", *SFT, *ALL)
    saved = json.loads((tuned / "artifact" / "adapter_config.json").read_text())
    assert (saved["lora_dropout"], saved["use_rslora"], saved["use_dora"]) == (0.2, True, True)
    assert read_manifest(tuned).metrics["loss_after"] < read_manifest(tuned).metrics["loss_before"]
    assert {k.split(".lora_")[0].rpartition(".")[2] for k in weights(tuned)} == {"q_proj", "up_proj"}
    shop.up_to_reward()
    again = "method.targets=[up_proj,q_proj]"  # said again by a file that all stages share, in whatever order
    ppo = shop.run("ppo", *PPO, again, "method.r=4")
    assert shop.run("sft", *SFT, *ALL[:2], again, *ALL[3:]) == tuned
    assert abs(read_rows(ppo / "metrics.jsonl")[0]["first_ratio"] - 1) < 1e-3
    assert weights(ppo).keys() == weights(tuned).keys()
    assert json.loads((ppo / "artifact" / "adapter_config.json").read_text())["use_dora"] is True
    shop.run("eval", "stage.prompts=4")
    assert read_manifest(shop.run("export", "export=merged")).metrics["kl"] < 0.01
    assert shop.status("stage=export", "export=adapter", "artifact=ppo:latest") == 2
    assert "use_dora" in shop.said
    assert "export=merged" in shop.said


def test_rslora_leaves_as_plain_lora(shop: Workshop) -> None:
    shop.run("sft", *FEW, "method.r=4", "method.rslora=true")
    exported = shop.run("export", "export=adapter", "artifact=sft:latest", "export.base=none")
    saved = json.loads((exported / "artifact" / "adapter_config.json").read_text())
    assert (saved["use_rslora"], saved["lora_alpha"]) == (False, saved["r"])


def test_a_killed_run_with_every_option_goes_on_to_the_bit(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    from align.trainers import common

    words = [*SFT, "stage.max_steps=6", *ALL, "stage.save_every=1", "stage.optimiser=adafactor"]
    words.append("stage.gradient_accumulation=2")
    whole = shop.run("sft", *words, "run.name=whole")

    class Killed(common.Reporter):
        def on_save(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
            super().on_save(args, state, control, **kwargs)
            if state.global_step == 3:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(common, "Reporter", Killed)
        assert shop.status("stage=sft", *shop.on_file, *words, "run.name=killed") == 130
    assert same(shop.run("sft", *words, "run.name=killed"), whole)


def test_dropout_is_that_of_supervised_training_alone(shop: Workshop, tmp_path: Path) -> None:
    """With it another adapter is trained; the measure before and after has none; DPO from it draws nothing."""
    with_it, without = (shop.run("sft", *FEW, f"method.dropout={p}", f"run.name=p{p}") for p in (0.5, 0.0))
    assert not same(with_it, without)
    before = [read_manifest(run).metrics["loss_before"] for run in (with_it, without)]
    assert before[0] == before[1]
    rows = [{"prompt": f"hello {i}", "chosen": "hi there", "rejected": "go away"} for i in range(24)]
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["stage=dpo", "init=sft:p0.5", "data=jsonl", f"data.path={pairs}", "stage.batch_size=8", "device=cpu"]
    for name in ("a", "b"):
        torch.manual_seed(ord(name))  # what is drawn before must not matter, for nothing is drawn
        assert shop.ended(*words, f"run.root={shop.root}", f"run.name={name}") == 0, shop.said
    assert same(shop.root / "dpo" / "a", shop.root / "dpo" / "b")


def test_an_optimiser_is_the_one_that_is_named(shop: Workshop) -> None:
    plain = shop.run("sft", *FEW, "run.name=plain")
    for said in ("stage.optimiser=adafactor", "stage.adam_beta1=0.5", "stage.adam_beta2=0.5"):
        assert not same(shop.run("sft", *FEW, said), plain), said


def test_a_run_that_continues_an_adapter_says_how_that_was_made(shop: Workshop) -> None:
    """Its manifest holds the adapter's own settings, and they cannot make another run of it. What follows from an
    adapter of the defaults is known by the defaults, as it was."""
    own = {"r": 4, "alpha": 6, "dropout": 0.25, "targets": ["k_proj", "q_proj"], "rslora": True, "dora": False}
    words = [f"method.{key}={value}".replace(" ", "").replace("'", "") for key, value in own.items()]
    shop.run("sft", *SFT, "stage.max_steps=1", *words, "run.name=special")
    shop.run("sft", *SFT, "stage.max_steps=1", "run.name=plain")
    for ref, made in (("special", own), ("plain", {})):
        said = read_manifest(shop.run("sft", *SFT, "stage.max_steps=1", f"init=sft:{ref}"))
        told = {k: v for k, v in to_plain_dict(Config())["method"].items() if k not in ("name", "lr")} | made
        for config in (said.config, said.identity["config"]):
            assert {k: v for k, v in config["method"].items() if k in told} == told
        again = shop.run("sft", *SFT, "stage.max_steps=1", f"init=sft:{said.name}")  # which says it of the first
        assert read_manifest(again).config["method"]["r"] == told["r"]
    line = ("sft", *SFT, "stage.max_steps=1", "init=sft:special")
    assert shop.run(*line, *words) == shop.run(*line)
    copy = shop.root.parent / "copy"  # of which no run says anything
    shutil.copytree(shop.root / "sft" / "special" / "artifact", copy)
    bare = read_manifest(shop.run("sft", *SFT, "stage.max_steps=1", f"init={copy}"))
    assert bare.config["method"]["targets"] == own["targets"]


def test_an_optimiser_of_a_gpu_is_refused_on_a_cpu(shop: Workshop) -> None:
    assert shop.status("stage=sft", *shop.on_file, *SFT, "stage.optimiser=adamw_8bit") == 2
    assert "stage.optimiser=adamw_8bit: keeps its moments in 8 bits" in shop.said


def test_gradient_accumulation_is_another_word_for_a_batch(shop: Workshop) -> None:
    plain = shop.run("sft", *FEW)
    assert shop.run("sft", *FEW, "stage.gradient_accumulation=2") == plain  # the same run, found again
    assert "finished already" in shop.said
    assert shop.status("stage=sft", *shop.on_file, *SFT, "stage.gradient_accumulation=4") == 2
    assert "stage.batch_size=8: is not stage.gradient_accumulation=4 times stage.micro_batch=4" in shop.said


def test_supervised_training_goes_on_from_an_adapter(shop: Workshop) -> None:
    few = (*SFT, "stage.max_steps=8")
    first = shop.run("sft", *few, "method.r=4", "run.name=first")
    again = shop.run("sft", *few, "init=sft:first", "run.name=again")
    told = read_manifest(again)
    assert told.inputs["init"].name == "first"
    before = told.metrics["loss_before"], read_manifest(first).metrics["loss_after"]
    assert before[0] == pytest.approx(before[1], abs=1e-6)
    assert told.metrics["loss_after"] < before[0]
    assert {t.shape for t in weights(again).values()} == {t.shape for t in weights(first).values()}
    for said, problem in (("method.r=8", "goes on as it is"), ("method=full", "was trained with method=qlora")):
        stage = "full" if said == "method=full" else "sft"
        words = () if stage == "full" else (said,)
        assert shop.status(f"stage={stage}", *shop.on_file, *SFT, "init=sft:first", *words) == 2
        assert problem in shop.said
    shop.run("eval", "artifact=sft:again", "stage.prompts=4")  # against what it went on from


def test_full_fine_tuning_goes_on_from_a_whole_model(shop: Workshop) -> None:
    first = shop.run("full", *FEW, "run.name=first")
    again = Workshop(shop.root, shop.data).run("full", *FEW, "init=full:first", "run.name=again")
    before = read_manifest(again).metrics["loss_before"], read_manifest(first).metrics["loss_after"]
    assert before[0] == pytest.approx(before[1], abs=1e-4)
