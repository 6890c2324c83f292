"""Options of LoRA and of the optimiser in every stage, exact resumption after a kill, and continued training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from stage_commands import PPO, Workshop

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


def read_weights(run: Path) -> dict[str, torch.Tensor]:
    return read_tensors(run / "artifact")


def have_same_weights(first: Path, second: Path) -> bool:
    first_weights = read_weights(first)
    second_weights = read_weights(second)
    return first_weights.keys() == second_weights.keys() and all(
        torch.equal(first_weights[name], second_weights[name]) for name in first_weights
    )


def test_every_option_through_every_stage(shop: Workshop) -> None:
    """The options are set at stage=sft; reward model, PPO, evaluation and export read them from the adapter."""
    tuned = shop.run("sft", *SFT, *ALL)
    saved = json.loads((tuned / "artifact" / "adapter_config.json").read_text())
    assert (saved["lora_dropout"], saved["use_rslora"], saved["use_dora"]) == (0.2, True, True)
    assert read_manifest(tuned).metrics["loss_after"] < read_manifest(tuned).metrics["loss_before"]
    assert {k.split(".lora_")[0].rpartition(".")[2] for k in read_weights(tuned)} == {"q_proj", "up_proj"}
    shop.run_up_to_reward()
    reordered_targets = "method.targets=[up_proj,q_proj]"  # a file shared by all stages may repeat it in another order
    ppo = shop.run("ppo", *PPO, reordered_targets, "method.r=4")
    assert shop.run("sft", *SFT, *ALL[:2], reordered_targets, *ALL[3:]) == tuned
    assert abs(read_rows(ppo / "metrics.jsonl")[0]["first_ratio"] - 1) < 1e-3
    assert read_weights(ppo).keys() == read_weights(tuned).keys()
    assert json.loads((ppo / "artifact" / "adapter_config.json").read_text())["use_dora"] is True
    shop.run("eval", "stage.prompts=4")
    assert read_manifest(shop.run("export", "export=merged")).metrics["kl"] < 0.01
    assert shop.status("stage=export", "export=adapter", "artifact=ppo:latest") == 2
    assert "use_dora" in shop.output
    assert "export=merged" in shop.output


def test_rslora_leaves_as_plain_lora(shop: Workshop) -> None:
    shop.run("sft", *FEW, "method.r=4", "method.rslora=true")
    exported = shop.run("export", "export=adapter", "artifact=sft:latest", "export.base=none")
    saved = json.loads((exported / "artifact" / "adapter_config.json").read_text())
    assert (saved["use_rslora"], saved["lora_alpha"]) == (False, saved["r"])


def test_a_killed_run_with_every_option_goes_on_to_the_bit(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    from align.trainers import common

    settings = [*SFT, "stage.max_steps=6", *ALL, "stage.save_every=1", "stage.optimiser=adafactor"]
    settings.append("stage.gradient_accumulation=2")
    uninterrupted = shop.run("sft", *settings, "run.name=whole")

    class Killed(common.Reporter):
        def on_save(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
            super().on_save(args, state, control, **kwargs)
            if state.global_step == 3:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(common, "Reporter", Killed)
        assert shop.status("stage=sft", *shop.data_words, *settings, "run.name=killed") == 130
    assert have_same_weights(shop.run("sft", *settings, "run.name=killed"), uninterrupted)


def test_dropout_is_that_of_supervised_training_alone(shop: Workshop, tmp_path: Path) -> None:
    """Dropout changes the trained adapter, but neither the losses measured before and after nor DPO from that
    adapter."""
    with_dropout, without_dropout = (shop.run("sft", *FEW, f"method.dropout={p}", f"run.name=p{p}") for p in (0.5, 0.0))
    assert not have_same_weights(with_dropout, without_dropout)
    losses_before = [read_manifest(run).metrics["loss_before"] for run in (with_dropout, without_dropout)]
    assert losses_before[0] == losses_before[1]
    rows = [{"prompt": f"hello {i}", "chosen": "hi there", "rejected": "go away"} for i in range(24)]
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["stage=dpo", "init=sft:p0.5", "data=jsonl", f"data.path={pairs}", "stage.batch_size=8", "device=cpu"]
    for name in ("a", "b"):
        torch.manual_seed(ord(name))  # the seed must not matter, because DPO uses no dropout
        assert shop.run_command(*command, f"run.root={shop.root}", f"run.name={name}") == 0, shop.output
    assert have_same_weights(shop.root / "dpo" / "a", shop.root / "dpo" / "b")


def test_an_optimiser_is_the_one_that_is_named(shop: Workshop) -> None:
    plain = shop.run("sft", *FEW, "run.name=plain")
    for setting in ("stage.optimiser=adafactor", "stage.adam_beta1=0.5", "stage.adam_beta2=0.5"):
        assert not have_same_weights(shop.run("sft", *FEW, setting), plain), setting


def test_a_run_that_continues_an_adapter_says_how_that_was_made(shop: Workshop) -> None:
    """The manifest holds the adapter's own settings, and giving them again is the same run. A continued adapter with
    default settings has the defaults."""
    adapter_settings = {
        "r": 4,
        "alpha": 6,
        "dropout": 0.25,
        "targets": ["k_proj", "q_proj"],
        "rslora": True,
        "dora": False,
    }
    settings = [f"method.{key}={value}".replace(" ", "").replace("'", "") for key, value in adapter_settings.items()]
    shop.run("sft", *SFT, "stage.max_steps=1", *settings, "run.name=special")
    shop.run("sft", *SFT, "stage.max_steps=1", "run.name=plain")
    for ref, changes in (("special", adapter_settings), ("plain", {})):
        manifest = read_manifest(shop.run("sft", *SFT, "stage.max_steps=1", f"init=sft:{ref}"))
        expected = {k: v for k, v in to_plain_dict(Config())["method"].items() if k not in ("name", "lr")} | changes
        for config in (manifest.config, manifest.identity["config"]):
            assert {k: v for k, v in config["method"].items() if k in expected} == expected
        # The run inherits the settings of the first adapter.
        continued = shop.run("sft", *SFT, "stage.max_steps=1", f"init=sft:{manifest.name}")
        assert read_manifest(continued).config["method"]["r"] == expected["r"]
    command = ("sft", *SFT, "stage.max_steps=1", "init=sft:special")
    assert shop.run(*command, *settings) == shop.run(*command)
    copy = shop.root.parent / "copy"  # a folder without a run
    shutil.copytree(shop.root / "sft" / "special" / "artifact", copy)
    manifest_of_copy = read_manifest(shop.run("sft", *SFT, "stage.max_steps=1", f"init={copy}"))
    assert manifest_of_copy.config["method"]["targets"] == adapter_settings["targets"]


def test_an_optimiser_of_a_gpu_is_refused_on_a_cpu(shop: Workshop) -> None:
    assert shop.status("stage=sft", *shop.data_words, *SFT, "stage.optimiser=adamw_8bit") == 2
    assert "stage.optimiser=adamw_8bit: keeps its moments in 8 bits" in shop.output


def test_gradient_accumulation_is_another_word_for_a_batch(shop: Workshop) -> None:
    plain = shop.run("sft", *FEW)
    assert shop.run("sft", *FEW, "stage.gradient_accumulation=2") == plain  # the same run, so it is reused
    assert "finished already" in shop.output
    assert shop.status("stage=sft", *shop.data_words, *SFT, "stage.gradient_accumulation=4") == 2
    assert "stage.batch_size=8: is not stage.gradient_accumulation=4 times stage.micro_batch=4" in shop.output


def test_supervised_training_goes_on_from_an_adapter(shop: Workshop) -> None:
    settings = (*SFT, "stage.max_steps=8")
    first = shop.run("sft", *settings, "method.r=4", "run.name=first")
    continued = shop.run("sft", *settings, "init=sft:first", "run.name=again")
    manifest = read_manifest(continued)
    assert manifest.inputs["init"].name == "first"
    losses = manifest.metrics["loss_before"], read_manifest(first).metrics["loss_after"]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert manifest.metrics["loss_after"] < losses[0]
    assert {t.shape for t in read_weights(continued).values()} == {t.shape for t in read_weights(first).values()}
    for setting, problem in (
        ("method.r=8", "is an adapter already, and keeps its own settings"),
        ("method=full", "was trained with method=qlora"),
    ):
        stage = "full" if setting == "method=full" else "sft"
        overrides = () if stage == "full" else (setting,)
        assert shop.status(f"stage={stage}", *shop.data_words, *SFT, "init=sft:first", *overrides) == 2
        assert problem in shop.output
    shop.run("eval", "artifact=sft:again", "stage.prompts=4")  # compared with the adapter that it continued


def test_full_fine_tuning_goes_on_from_a_whole_model(shop: Workshop) -> None:
    first = shop.run("full", *FEW, "run.name=first")
    continued = Workshop(shop.root, shop.data).run("full", *FEW, "init=full:first", "run.name=again")
    losses = read_manifest(continued).metrics["loss_before"], read_manifest(first).metrics["loss_after"]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
