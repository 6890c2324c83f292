"""Report of a PPO run: its headline, and how it shows answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from run_views import build_run_view, summarize_view, write_ppo_metrics

from align.report.headlines import estimate_score_gain
from align.report.live import TITLES, build_finished_page, get_title
from align.report.origins import describe_batch, describe_learning_rate
from align.track import last_updates, select_updates


def test_ppo_says_how_far_its_score_is_from_chance(tmp_path: Path):
    metrics = {"last_kl": 4.8, "last_eos_rate": 0.51, "tripped": ["length_correlation"]}
    settings = {"batch_size": 64}
    assert summarize_view("ppo", metrics, write_ppo_metrics(tmp_path, [0.0] * 10 + [1.0] * 10), settings=settings) == (
        # t · √(1/63 + 1/630), at 76 degrees of freedom
        "The score of the reward rose from 0.00 to 1.00, by 1.00 [0.74, 1.26], and the policy moved 4.8 nats an answer "
        "from its start. Signs of a gamed reward: length correlation. The score is what training optimises; stage=eval "
        "says whether the answers are better."
    )
    metrics = {"last_kl": 0.1, "last_eos_rate": 0.0904}
    text = summarize_view("ppo", metrics, write_ppo_metrics(tmp_path, [0.1, 0.2, 0.0]), settings=settings)
    assert "from 0.10 to 0.00" in text  # the last of three updates
    assert "The interval holds 0: no change was shown." in text
    assert "91 % of the answers were cut at 24 tokens." in text
    single_update = summarize_view("ppo", metrics, write_ppo_metrics(tmp_path, [0.1]), settings={"batch_size": 8})
    assert "by" not in single_update.split(",")[0]
    assert "Fewer than 20 answers" in single_update


@pytest.mark.parametrize(("updates", "last"), [(1, 1), (2, 1), (3, 1), (6, 3), (20, 10), (60, 10)])
def test_the_end_of_a_run_does_not_reach_its_beginning(updates: int, last: int):
    rows = [{"step": step} for step in range(updates + 1)]
    assert [row["step"] for row in last_updates(select_updates(rows))] == [*range(updates - last + 1, updates + 1)]


def test_ppo_speaks_of_what_it_publishes(tmp_path: Path):
    """The headline compares the published update with the start on held-out prompts, not the later updates."""
    metrics = {
        "last_kl": 16.2,
        "last_eos_rate": 1.0,
        "published_update": 4,
        "updates": 16,
        "objective_before": 0.0,
        "objective_after": 0.65,
        "beats_start": True,
        "published_kl": 13.4,
        "held_out_prompts": 16,
    }
    folder = write_ppo_metrics(tmp_path, [0.1] * 16)

    def write_headline(publish: str = "best", **changed: Any) -> str:
        settings = {"batch_size": 32, "publish": publish}
        return summarize_view("ppo", {**metrics, **changed}, folder, settings=settings).partition(
            " In training the score"
        )[0]

    assert write_headline() == (
        "Update 4 of 16, which is published, raised the score minus its KL penalty on 16 held-out prompts from 0.00 to "
        "0.65. Its KL from the start is 13.4 nats an answer."
    )
    worse = {"objective_after": -0.65, "beats_start": False}
    assert write_headline(**worse) == (
        "No update that was measured beats the start on 16 held-out prompts: update 4 of 16, which is published, has "
        "a score minus its KL penalty of −0.65, the start 0.00. "
        "Its KL from the start is 13.4 nats an answer."
    )
    assert write_headline("last", **worse).startswith(
        "The last update does not beat the start on 16 held-out prompts: update"
    )
    assert "16.2" not in write_headline(**worse)


def test_the_interval_of_a_gain_covers(tmp_path: Path):
    import numpy as np

    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(2000):
        batches = [generator.normal(mean, 2.0, 16) for mean in (0.0, *[1.0] * 10)]
        rows = [{"score": b.mean(), "score_std": b.std()} for b in batches]
        gain = estimate_score_gain(rows[:1], rows[1:], 16)
        hits += gain["low"] <= 1.0 <= gain["high"]
    assert 0.935 <= hits / 2000 <= 0.965  # 0.95, give or take three standard errors


def test_the_interval_of_a_gain_covers_where_prompts_have_several_answers():
    """Treating eight answers to each of sixteen prompts as independent gives intervals that are too narrow."""
    import numpy as np

    generator = np.random.default_rng(1)
    hits = 0
    overconfident_hits = 0
    for _ in range(1000):
        rows = []
        for mean in (0.0, *[1.0] * 5):
            scores = mean + generator.normal(0, 1.0, (16, 1)) + generator.normal(0, 2.0, (16, 8))
            by_prompt = {"prompt_score_std": scores.mean(1).std()}
            rows.append({"score": scores.mean(), "score_std": scores.std(), **by_prompt})
        gain = estimate_score_gain(rows[:1], rows[1:], 16)
        hits += gain["low"] <= 1.0 <= gain["high"]
        rows_without_prompts = [{"score": row["score"], "score_std": row["score_std"]} for row in rows]
        gain = estimate_score_gain(rows_without_prompts[:1], rows_without_prompts[1:], 128)
        overconfident_hits += gain["low"] <= 1.0 <= gain["high"]
    assert 0.93 <= hits / 1000 <= 0.97
    assert overconfident_hits / 1000 < 0.85


def test_an_estimator_without_a_critic_is_named_and_has_no_rate_of_one():
    grpo = {"advantage": "grpo", "group_size": 8, "lr": 1e-3, "value_lr": 1e-3, "batch_size": 64, "updates": 3}
    run = build_run_view("ppo", {}, settings=grpo)
    assert get_title(run.manifest) == "Group relative policy optimisation (GRPO)"
    assert [*describe_learning_rate(grpo)] == ["0.001"]
    assert [*describe_batch(grpo)] == ["64 answers an update, 8 to each prompt"]
    assert [*describe_learning_rate(grpo | {"advantage": "gae"})] == ["0.001", "0.001 for the value"]
    assert get_title(build_run_view("ppo", {}, settings={"advantage": "gae"}).manifest) == TITLES["ppo"]
    assert get_title(build_run_view("verify", {}, settings=grpo).manifest) == TITLES["verify"]
    assert (
        get_title(build_run_view("dpo", {}, settings={"loss": "simpo"}).manifest)
        == "Simple preference optimisation (SimPO)"
    )


def test_verification_shows_how_far_estimators_are_from_unbiased(tmp_path: Path):
    (tmp_path / "artifact").mkdir()
    anchor = {"name": "gae", "holds": True, "claim": "sums", "measured": 0.0, "tolerance": 1e-9}
    (tmp_path / "artifact" / "anchors.json").write_text(json.dumps([anchor]))
    (tmp_path / "artifact" / "estimators.json").write_text(json.dumps({"grpo, token": {"angle": 66.741, "scale": 1.0}}))
    build_finished_page(build_run_view("verify", {}, tmp_path)).write(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "How far each estimator is from unbiased" in page
    assert "66.74°" in page


def make_turns(*turns: str) -> list[dict[str, str]]:
    """Build a conversation; `system: …` is a system turn, and the others alternate from the user's on."""
    system = [{"role": "system", "content": t.removeprefix("system: ")} for t in turns if t.startswith("system: ")]
    chat_turns = [t for t in turns if not t.startswith("system: ")]
    return system + [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(chat_turns)]


def test_conversations_that_end_alike_are_told_apart(tmp_path: Path):
    """Half of the conversations in support data end with "thanks"."""
    lamp = make_turns("system: Be kind.", "The lamp?", "30 W.", "Thanks!")
    desk = make_turns("The desk?", "Oak.", "Thanks!")
    rows = [
        {"step": step, "prompt": prompt, "answer": f"{step} {i}", "score": -0.5, "reasoning": "Hm, <b>so</b>."}
        for step in (0, 3)
        for i, prompt in enumerate((lamp, desk))
    ]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = write_ppo_metrics(tmp_path, [0.0, 1.0])
    metrics = {"last_kl": 1.0, "last_eos_rate": 1.0}
    html = build_finished_page(build_run_view("ppo", metrics, folder, settings={"batch_size": 8})).html()
    first, second = html.split('<figure class="transcript">')[1:]
    assert [first.count(f"<div dir=auto>{answer}</div>") for answer in ("0 0", "3 0", "0 1", "3 1")] == [1, 1, 0, 0]
    assert [second.count(f"<div dir=auto>{answer}</div>") for answer in ("0 1", "3 1")] == [1, 1]
    assert "<summary>system turn and 2 earlier turns</summary>" in first
    assert all(
        text in first for text in ("Be kind.", "The lamp?", "30 W.", "The start, score −0.50", "Update 3, score")
    )
    assert "<summary>2 earlier turns</summary>" in second
    assert first.count("<summary>reasoning</summary>") == 2
    assert "Hm, &lt;b&gt;so&lt;/b&gt;." in first
