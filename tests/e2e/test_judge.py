"""Judges of `stage=eval` from the command line, on policies that were optimised against a known reward."""

from __future__ import annotations

import html
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from stage_commands import Ready, Workshop

from align.run import read_manifest

MINE = "def vowels(found):\n    return [float(sum(c[-1]['content'].count(v) for v in 'aeiou')) for c in found]\n"
MINE += "    return [float(sum(c[-1]['content'].count(v) for v in 'aeiou')) for c in found]\n"


@pytest.fixture(scope="module")
def shop(ready: Ready, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    """Build two optimised policies: `learned` against reward:a, of simulated votes, and `rules` against sentiment."""
    folder = tmp_path_factory.mktemp("judges")
    shutil.copytree(ready.root, folder / "runs")
    (folder / "my_scores.py").write_text(MINE)
    workshop = Workshop(folder / "runs", Path(ready.data[1].removeprefix("data.path=")), *ready.data)
    ppo = [word for word in ready.ppo if not word.startswith(("reward.", "rollout."))]
    rules = ["reward=rules", "reward.rules=[{rule: sentiment}, {rule: length, low: 2, high: 9, weight: 0.1}]"]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        for name, words in {"learned": ["reward.ref=reward:a"], "rules": rules}.items():
            assert workshop.status(*ppo, *words, f"run.name={name}") == 0, workshop.output
        yield workshop


def evaluate_policy(shop: Workshop, policy: str, *words: str) -> dict[str, Any]:
    folder = shop.run("eval", f"artifact=ppo:{policy}", "stage.prompts=8", *words)
    return dict(read_manifest(folder).metrics) | {"folder": folder}


@pytest.mark.parametrize("ref", ["reward:a", "{root}/reward/a/artifact"])
def test_what_it_was_optimised_against_is_refused(shop: Workshop, ref: str) -> None:
    words = ["reward=learned", f"reward.ref={ref.format(root=shop.root)}", "artifact=ppo:learned", "stage.prompts=8"]
    messages = ("ppo:learned, which was optimised against it", "stage.allow_proxy=true")
    shop.refuses("stage=eval", *words, says=messages)


def test_a_judge_that_is_named_judges(shop: Workshop) -> None:
    """Each judge has scores of its own, which differ from those of the default judge."""
    judges = {
        "vader": [],
        "reward:b": ["reward=learned", "reward.ref=reward:b"],
        "my_scores:vowels": ["reward=fn", "reward.fn=my_scores:vowels"],
    }
    metrics = {name: evaluate_policy(shop, "learned", *words) for name, words in judges.items()}
    assert [metrics[name]["judge"] for name in judges] == list(judges)
    assert len({(figures["gold"]["ref"], figures["gold"]["policy"]) for figures in metrics.values()}) == len(judges)
    runs = [read_manifest(figures["folder"]) for figures in metrics.values()]
    assert len({run.name for run in runs}) == len(judges)
    assert runs[1].inputs["reward"].name == "b"
    note = "vader also ranked, as a simulated annotator with noise, the pairs that reward:a learned from"
    assert (metrics["vader"]["judge_is"], metrics["vader"]["judge_notes"]) == ("gold", [note])
    # `reward.ref` belongs to another judge.
    shop.refuses("stage=eval", "artifact=ppo:learned", "reward.ref=reward:b", says="reward.ref")


def test_who_asks_for_it_gets_a_proxy_and_reads_so(shop: Workshop) -> None:
    metrics = evaluate_policy(shop, "rules", "stage.allow_proxy=true")
    assert metrics["judge_is"] == "proxy"
    assert "gold" not in metrics
    assert {"ref", "policy", "difference"} == metrics["proxy"].keys()
    stdout = shop.outputs[metrics["folder"]]
    page = html.unescape((metrics["folder"] / "report.html").read_text())
    for text in (stdout, page):
        assert "vader is a proxy: ppo:rules was optimised against it" in text
    assert "gold" not in page.lower()
    card = (shop.run("export", "artifact=ppo:rules") / "artifact" / "README.md").read_text()
    assert "win rate by a proxy" in card
    assert "gold" not in card
    evaluate_policy(shop, "rules", "reward=rules", "reward.rules=[{rule: json}]")
    evaluate_policy(shop, "rules", "stage.allow_proxy=true", "seed=1")  # newer, but a gold evaluation takes precedence
    card = (shop.run("export", "artifact=ppo:rules") / "artifact" / "README.md").read_text()
    assert "gold score by rules (json)" in card
    assert "proxy" not in card
