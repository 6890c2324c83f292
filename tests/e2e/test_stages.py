"""Every stage on a random model of 78,000 weights: it trains, scores, stores and exports offline, in a folder whose
name has spaces, accents and parentheses. The figures mean nothing, but they are finite."""

from __future__ import annotations

import html
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from stage_commands import EVERY_RUN, PPO, SFT, STREAMS, Workshop, list_file_names

from align.config.schemas import import_all_schemas
from align.core.types import Conversation
from align.data.split import compute_question_key
from align.evals.suite.samples import read_samples, summarise_samples
from align.models.adapters import read_tensors
from align.report.figure_labels import describe_small_samples
from align.run import Manifest, read_manifest
from align.track import read_rows

pytestmark = pytest.mark.usefixtures("no_network")
TRAINED = {"steps.jsonl", "trained_on.jsonl", "trained_ids.parquet"}
TOKENIZER = {"chat_template.jinja", "tokenizer.json", "tokenizer_config.json"}
ADAPTER = {"adapter_config.json", "adapter_model.safetensors"}
WHOLE = {"config.json", "generation_config.json", "model.safetensors"}
LEAVES = {"README.md", "base.json", "launch", "receipt.json"}
IN = {"value": {*ADAPTER, "value_head.safetensors"}, "launch": {"align.sh", "vllm.sh", "chat_template.jinja"}}
"""Files in the subfolders of an artifact."""


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory, chats: Path) -> Workshop:
    folder = tmp_path_factory.mktemp("path") / "mes essais (été)"
    folder.mkdir()
    return Workshop(folder / "runs", Path(shutil.copy(chats, folder / "données d'été.jsonl")))


@pytest.fixture(scope="module")
def runs(shop: Workshop, tiny_model: Path) -> dict[str, Path]:
    """Run every stage once, each on the output of the one before."""
    folders = {"sft": shop.run("sft", "model=hub", f"model.path={tiny_model}", *SFT)}
    folders |= shop.run_up_to_reward()
    folders["ppo"] = shop.run("ppo", *PPO)
    folders["eval"] = shop.run("eval", "stage.prompts=16")
    folders["adapter"] = shop.run("export")
    folders["merged"] = shop.run("export", "export=merged")
    return folders


def read_manifests(runs: dict[str, Path]) -> dict[str, Manifest]:
    return {name: read_manifest(folder) for name, folder in runs.items()}


@pytest.mark.parametrize(
    ("name", "streams", "artifact"),
    [
        ("sft", STREAMS | TRAINED, ADAPTER | TOKENIZER),
        ("sample", STREAMS | {"samples.jsonl"}, {"ledger.json"}),
        ("annotate", set(), {"ledger.json"}),
        ("reward", STREAMS | TRAINED | {"held_out.jsonl"}, ADAPTER | TOKENIZER),
        ("ppo", STREAMS | {"trained_ids.parquet"}, ADAPTER | TOKENIZER | {"value"}),
        ("eval", set(), {"metrics.json", "samples.jsonl"}),
        ("adapter", set(), ADAPTER | TOKENIZER | LEAVES | {"generation_config.json", "probes.json", "tiny"}),
        ("merged", set(), WHOLE | TOKENIZER | LEAVES),
    ],
)
def test_a_run_leaves_exactly_these_files(
    runs: dict[str, Path], name: str, streams: set[str], artifact: set[str]
) -> None:
    assert list_file_names(runs[name]) == EVERY_RUN | streams
    base = read_manifest(runs[name]).base
    links = {f"tiny-{base.digest[:16]}"} if base and "tiny" in artifact else set[str]()
    assert list_file_names(runs[name] / "artifact") == artifact - {"tiny"} | links
    inner = {f"{folder}/{n}" for folder in IN.keys() & artifact for n in IN[folder]}
    direct = artifact - IN.keys() - {"tiny"}
    published = direct | inner | ({"launch/vllm-resolver.sh"} if name == "adapter" else set())
    # Step times are not published.
    run_files = {
        "report.html",
        "config.yaml",
        "metrics.json",
        *(streams - {"timing.jsonl"}),
    }
    assert set(read_manifest(runs[name]).outputs) == {f"artifact/{n}" for n in published} | run_files


def test_manifests_tell_where_everything_came_from(runs: dict[str, Path], tiny_model: Path) -> None:
    manifests = read_manifests(runs)
    assert {m.status for m in manifests.values()} == {"done"}
    base = manifests["sft"].base
    assert base is not None
    assert base.path == str(tiny_model)
    assert all(m.base == base for name, m in manifests.items() if name != "annotate")
    assert set(manifests["sft"].inputs) == {"base", "data"}
    assert set(manifests["ppo"].inputs) == {"init", "reward", "data"}
    for name, role, parent in (
        ("sample", "init", "sft"),
        ("reward", "init", "sft"),
        ("ppo", "init", "sft"),
        ("ppo", "reward", "reward"),
        ("eval", "artifact", "ppo"),
        ("eval", "init", "sft"),
        ("adapter", "artifact", "ppo"),
        ("merged", "artifact", "ppo"),
    ):
        recorded = manifests[name].inputs[role]
        assert (recorded.stage, recorded.name) == (parent, runs[parent].name), (name, role)
        assert len(recorded.digest) == 64
    ledgers = [json.loads((runs[n] / "artifact" / "ledger.json").read_text()) for n in ("sample", "annotate")]
    assert ledgers[0]["seq"] < ledgers[1]["seq"] == manifests["reward"].inputs["data"].seq
    assert ledgers[1]["hash"] == manifests["reward"].inputs["data"].digest


def iter_leaves(value: Any) -> Iterator[Any]:
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from iter_leaves(item)
    if not isinstance(value, dict | list):
        yield value


def test_figures_are_finite_and_the_base_is_nf4(runs: dict[str, Path]) -> None:
    manifests = read_manifests(runs)
    for name, manifest in manifests.items():
        figures = [v for v in iter_leaves(manifest.metrics) if isinstance(v, float)]
        assert figures or name == "annotate", name
        assert all(map(math.isfinite, figures)), (name, manifest.metrics)
        assert all(None not in row.values() for row in read_rows(runs[name] / "metrics.jsonl")), name
    assert manifests["ppo"].metrics["quantised_layers"] == 14  # seven linear layers in each of two blocks
    assert manifests["sft"].metrics["loss_after"] < manifests["sft"].metrics["loss_before"]
    assert manifests["merged"].metrics["kl"] < 0.05
    assert [row["step"] for row in read_rows(runs["ppo"] / "metrics.jsonl")] == [1, 2]


def test_ppo_publishes_what_it_trained(runs: dict[str, Path]) -> None:
    trained, start, exported = (read_tensors(runs[name] / "artifact") for name in ("ppo", "sft", "adapter"))
    assert trained.keys() == start.keys() == exported.keys()
    assert not any(torch.equal(trained[k], start[k]) for k in start)
    config_path = runs["ppo"] / "artifact" / "adapter_config.json"
    scale = json.loads(config_path.read_text())["lora_alpha"] / json.loads(config_path.read_text())["r"]
    assert all(torch.equal(trained[k] * (scale if "lora_B" in k else 1), exported[k]) for k in trained)


def test_the_samples_are_the_evidence_for_the_metrics(runs: dict[str, Path]) -> None:
    metrics = json.loads((runs["eval"] / "artifact" / "metrics.json").read_text())
    samples = read_samples(runs["eval"] / "artifact" / "samples.jsonl")
    recomputed = summarise_samples(samples)
    assert {k: metrics[k] for k in recomputed} == recomputed
    assert metrics["win_rate"]["n"] == len(samples) > 4


def compute_logits(model: Any, tokenizer: Any) -> torch.Tensor:
    ids = tokenizer("<bos><|user|>I am late.<|assistant|>", return_tensors="pt", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        return model(input_ids=ids).logits.float()


def test_strangers_load_what_was_exported(runs: dict[str, Path], tiny_model: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(runs["merged"] / "artifact")
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    plain = compute_logits(base, tokenizer)
    adapted = compute_logits(PeftModel.from_pretrained(base, str(runs["adapter"] / "artifact")), tokenizer)
    merged = compute_logits(AutoModelForCausalLM.from_pretrained(runs["merged"] / "artifact"), tokenizer)
    assert not torch.allclose(plain, adapted, atol=0.05)
    spread = (adapted - plain).abs().mean()
    assert (merged - adapted).abs().mean() < 0.5 * spread  # they differ only by the rounding to NF4
    config = (runs["adapter"] / "artifact" / "adapter_config.json").read_text()
    assert str(tiny_model.parent) not in config


def test_the_same_command_again_does_nothing(shop: Workshop, runs: dict[str, Path], tiny_model: Path) -> None:
    before = {p: p.stat().st_mtime_ns for folder in runs.values() for p in folder.rglob("*")}
    assert shop.run("sft", "model=hub", f"model.path={tiny_model}", *SFT) == runs["sft"]
    assert "finished already" in shop.output
    assert shop.run("ppo", *PPO) == runs["ppo"]
    assert shop.run("annotate", "stage.action=simulate") == runs["annotate"]
    assert {p: p.stat().st_mtime_ns for folder in runs.values() for p in folder.rglob("*")} == before


def test_sampling_goes_on_behind_what_the_store_has(
    tmp_path: Path, chats: Path, runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kill a run after the store commits the third chunk and before it is logged: the first two are not sampled
    again."""
    from align.rollout.hf import HfEngine
    from align.stages import sample
    from align.track import Tracker

    command = ("stage.prompts=20", "stage.candidates=3", "data.held_out=0", f"init={runs['sft']}", "project=again")
    monkeypatch.setattr(sample, "PROMPTS_AT_ONCE", 5)
    generate = HfEngine.generate
    log = Tracker.log
    batch_sizes = []
    monkeypatch.setattr(
        HfEngine, "generate", lambda self, p, a, g: batch_sizes.append(len(p)) or generate(self, p, a, g)
    )

    def log_or_kill(self: Tracker, step: int, *args: Any) -> None:
        if step == 15:
            raise KeyboardInterrupt
        log(self, step, *args)

    uninterrupted, interrupted = (Workshop(tmp_path / name, chats) for name in ("whole", "parts"))
    expected = uninterrupted.run("sample", *command)
    batch_sizes.clear()
    with monkeypatch.context() as patch:
        patch.setattr(Tracker, "log", log_or_kill)
        assert interrupted.status("stage=sample", *interrupted.data_words, *command) == 130
    assert batch_sizes == [15, 15, 15]
    resumed = interrupted.run("sample", *command)
    assert batch_sizes == [15] * 5
    assert (resumed / "metrics.jsonl").read_bytes() == (expected / "metrics.jsonl").read_bytes()
    ledger_seqs = [json.loads((f / "artifact" / "ledger.json").read_text())["seq"] for f in (resumed, expected)]
    assert ledger_seqs == [20, 20]
    figures = [{k: v for k, v in read_manifest(f).metrics.items() if k != "peak_rss_mb"} for f in (resumed, expected)]
    assert figures[0] == figures[1]


def count_held_out_and_seen(shop: Workshop, held_out: float, trained: float) -> tuple[int, int]:
    """Count the questions that a share holds out, and those among them that a run with another held-out share was
    trained on. Implements the rule of the docs independently."""
    questions = [json.loads(line)["messages"][:-1] for line in shop.data.read_text(encoding="utf-8").splitlines()]
    keys = [compute_question_key(Conversation.from_messages(turns)) for turns in questions]
    shares = [int(key[:8], 16) / 2**32 for key in keys]
    return sum(s < held_out for s in shares), sum(trained <= s < held_out for s in shares)


def test_what_was_trained_on_is_left_out_of_an_evaluation(shop: Workshop, runs: dict[str, Path]) -> None:
    held_out, seen_count = count_held_out_and_seen(shop, 0.5, 0.25)
    assert 0 < seen_count < held_out
    evaluate = ("stage=eval", f"artifact={runs['ppo']}", *shop.data_words[:2])
    assert shop.status(*evaluate, "data.held_out=0.5") == 0, shop.output
    assert f"{seen_count} of {held_out} prompts left out: training saw them" in shop.output
    dropped = read_manifest(Path(shop.output.splitlines()[-1])).metrics
    assert (dropped["dropped_seen"], dropped["win_rate"]["n"]) == (seen_count, held_out - seen_count)
    assert "unseen" not in dropped

    assert shop.status(*evaluate, "data.held_out=0.5", "data.limit=3") == 0, shop.output
    # All three prompts are unseen.
    assert read_manifest(Path(shop.output.splitlines()[-1])).metrics["win_rate"]["n"] == 3
    assert "this result is no basis for a decision: it is measured on 3 prompts" in shop.output

    assert shop.status(*evaluate, "data.held_out=0.5", "stage.seen=report") == 0, shop.output
    assert f"training saw {seen_count} of these prompts; win rate " in shop.output
    folder = Path(shop.output.splitlines()[-1])
    both = read_manifest(folder).metrics
    assert (both["win_rate"]["n"], both["seen"], both["unseen"]["win_rate"]["n"]) == (
        held_out,
        seen_count,
        held_out - seen_count,
    )
    samples = read_samples(folder / "artifact" / "samples.jsonl")
    assert sum(bool(sample.seen) for sample in samples) == seen_count
    wins = [(s.score_policy > s.score_ref) + (s.score_policy == s.score_ref) / 2 for s in samples if not s.seen]
    assert both["unseen"]["win_rate"]["value"] == pytest.approx(sum(wins) / len(wins))
    assert "Win rate on unseen prompts" in (folder / "report.html").read_text(encoding="utf-8")


def test_prompts_of_another_file_that_were_all_trained_on_leave_nothing_to_measure(
    shop: Workshop, runs: dict[str, Path], tmp_path: Path
) -> None:
    """Prompts are recognised in another order and under a system prompt added by `data.system`."""
    conversations = [json.loads(line)["messages"] for line in shop.data.read_text(encoding="utf-8").splitlines()]
    keys = [compute_question_key(Conversation.from_messages(turns[:-1])) for turns in conversations]
    trained = [turns for turns, key in zip(conversations, keys, strict=True) if int(key[:8], 16) / 2**32 >= 0.25]
    file = tmp_path / "others.json"
    file.write_text(json.dumps([{"messages": turns} for turns in trained[::-1]]), encoding="utf-8")
    data = ("data=jsonl", f"data.path={file}", "data.held_out=1", "data.system=Answer in a word.")
    shop.refuses("stage=eval", f"artifact={runs['ppo']}", *data, says="stage.seen=drop: leaves no prompt to measure on")


def test_an_evaluation_says_what_it_cannot_know(shop: Workshop, runs: dict[str, Path], tmp_path: Path) -> None:
    """A missing run of the lineage is named; trained ids that differ from the published ones stop the evaluation."""
    root = tmp_path / "runs"
    for name in ("sft", "ppo"):
        folder = root / name / runs[name].name
        shutil.copytree(runs[name], folder)
        manifest = folder / "manifest.json"
        manifest.write_text(manifest.read_text().replace(str(shop.root), str(root)))
    moved_shop = Workshop(root, shop.data)
    evaluate = ("stage=eval", *shop.data_words, "artifact=ppo:latest", "stage.prompts=2")
    assert moved_shop.status(*evaluate) == 0, moved_shop.output
    sentence = f"reward:{runs['reward'].name} is gone: it is unknown whether it was trained on these prompts"
    assert sentence in moved_shop.output
    folder = Path(moved_shop.output.splitlines()[-1])
    assert sentence in read_manifest(folder).metrics["judge_notes"]
    assert sentence in html.unescape((folder / "report.html").read_text(encoding="utf-8"))
    ids_path = root / "ppo" / runs["ppo"].name / "trained_ids.parquet"
    ids_path.write_bytes(ids_path.read_bytes()[:-9])
    moved_shop.refuses(*evaluate, "resume=never", says="trained_ids.parquet: is not the file that was published")


def test_an_export_follows_its_evaluation(shop: Workshop, runs: dict[str, Path]) -> None:
    before = shop.run("export", f"artifact={runs['ppo']}")
    shop.run("eval", "stage.prompts=5", f"artifact={runs['ppo']}")
    after = shop.run("export", f"artifact={runs['ppo']}")
    assert before != after
    assert "on 5 held-out prompts" in (after / "artifact" / "README.md").read_text()


def iter_intervals(figures: Any, name: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each `{value, low, high, n}` in a run's metrics with its name as in a report."""
    for key, value in figures.items() if isinstance(figures, dict) else ():
        label = f"{name} {key}".strip().replace("_", " ")
        yield from [(label, value)] if isinstance(value, dict) and "low" in value else iter_intervals(value, label)


def test_below_twenty_observations_every_report_says_so(shop: Workshop, runs: dict[str, Path]) -> None:
    """Run every stage of the framework: the report and the output name each interval over fewer than twenty
    observations."""
    direct = ("data=annotations", "data.allow_simulated=true", "stage.batch_size=8", "stage.held_out=0.3")
    folders = [*runs.values(), *(shop.run(stage, *direct) for stage in ("dpo", "kto"))]
    folders.append(shop.run("verify", *PPO, "init=sft:latest"))
    folders.append(shop.run("data", f'stage.sources=[{{path: "{shop.data}"}}]'))
    without = {"serve", "registry", "plan"}  # stages without figures
    assert {f.parent.name for f in folders} == import_all_schemas()["stage"].keys() - without
    marked = set()
    for folder in folders:
        page = html.unescape((folder / "report.html").read_text())
        stdout = shop.outputs[folder]
        metrics = read_manifest(folder).metrics
        sentence = describe_small_samples(metrics)
        small_counts = [figure["n"] for _, figure in iter_intervals(metrics) if figure["n"] < 20]
        assert sentence.count(" (") >= len(small_counts), (folder, sentence)
        assert all(f" ({n})" in sentence for n in small_counts), (folder, sentence)
        for name, figure in iter_intervals(metrics):
            assert (figure["low"] is None) == (figure["high"] is None)
            assert figure["low"] is None or figure["low"] < figure["high"], (folder, name)
        if small_counts:
            marked.add(folder.parent.name)
            assert sentence.startswith("Fewer than 20 observations")
        beginning, _, names = sentence.rstrip(".").partition(": ")  # the manifest lists its figures in another order
        for name in (beginning, *names.split(", ")):
            assert name in stdout, (folder, name)
            assert name in page, (folder, name)
    assert marked == {"sft", "reward", "dpo", "kto", "eval"}


def test_a_reward_model_is_no_policy(shop: Workshop, runs: dict[str, Path]) -> None:
    assert shop.status("stage=eval", *shop.data_words, f"artifact={runs['reward']}") == 2
    assert "is a reward model, and no policy" in shop.output
