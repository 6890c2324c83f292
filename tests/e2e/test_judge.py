"""Who judges, from the command line: `stage=eval` on policies that were really optimised against what is named."""

from __future__ import annotations

import html
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from workshop import Ready, Workshop

from align.run import read_manifest

LENGTH = "reward.rules=[{rule: length, low: 2, high: 9}]"
MINE = "def score(found):\n    return [float(len(c[-1]['content'])) for c in found]\n\ndef vowels(found):\n"
MINE += "    return [float(sum(c[-1]['content'].count(v) for v in 'aeiou')) for c in found]\n"


@pytest.fixture(scope="module")
def shop(ready: Ready, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    """Policies by what they were optimised against: `learned` (reward:a, of simulated votes), `rules` (with sentiment),
    `fn`, and `after`, which went on from `rules` with reward:b."""
    folder = tmp_path_factory.mktemp("judges")
    shutil.copytree(ready.root, folder / "runs")
    (folder / "my_scores.py").write_text(MINE)
    (folder / "their_scores.py").write_text("from my_scores import score as mark\n")
    found = Workshop(folder / "runs", Path(ready.data[1].removeprefix("data.path=")), *ready.data)
    ppo = [word for word in ready.ppo if not word.startswith(("reward.", "rollout."))]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        for name, words in {
            "learned": ["reward.ref=reward:a"],
            "rules": ["reward=rules", "reward.rules=[{rule: sentiment}, {rule: length, low: 2, high: 9, weight: 0.1}]"],
            "fn": ["reward=fn", "reward.fn=my_scores:score"],
            "after": ["reward.ref=reward:b", "init=ppo:rules"],
        }.items():
            assert found.status(*ppo, *words, f"run.name={name}") == 0, found.said
        yield found


def judged(shop: Workshop, policy: str, *words: str) -> dict[str, Any]:
    folder = shop.run("eval", f"artifact=ppo:{policy}", "stage.prompts=8", *words)
    return dict(read_manifest(folder).metrics) | {"folder": folder}


def refused(shop: Workshop, policy: str, *words: str) -> str:
    assert shop.status("stage=eval", f"artifact=ppo:{policy}", "stage.prompts=8", *words) == 2
    return shop.said


def test_the_judge_of_its_own_stays_one_where_its_noisy_votes_taught_the_reward(shop: Workshop) -> None:
    found = judged(shop, "learned")
    assert (found["judge"], found["judge_is"]) == ("vader", "gold")
    note = "vader also ranked, as a simulated annotator with noise, the pairs that reward:a learned from"
    assert found["judge_notes"] == [note]
    assert note in shop.told[found["folder"]]
    assert note in html.unescape((found["folder"] / "report.html").read_text())


@pytest.mark.parametrize(
    "judge",
    [
        ["reward=learned", "reward.ref=reward:a"],
        ["reward=learned", "reward.ref={root}/reward/a/artifact"],
    ],
    ids=lambda words: words[1],
)
def test_what_it_was_optimised_against_is_refused(shop: Workshop, judge: list[str]) -> None:
    said = refused(shop, "learned", *(word.format(root=shop.root) if "{root}" in word else word for word in judge))
    assert "ppo:learned, which was optimised against it" in said
    assert "stage.allow_proxy=true" in said
    assert "Traceback" not in said


def test_latest_may_be_the_same_model(shop: Workshop) -> None:
    """`reward:latest` is b, which `after` was optimised against and `learned` was not."""
    refused(shop, "after", "reward=learned")
    assert judged(shop, "learned", "reward=learned")["judge"] == "reward:b"


def test_a_judge_that_is_named_judges(shop: Workshop) -> None:
    """Its scores are its own: no two judges have the same ones, and the default's are none of them."""
    judges = {
        "vader": [], "reward:b": ["reward=learned", "reward.ref=reward:b"],
        "my_scores:vowels": ["reward=fn", "reward.fn=my_scores:vowels"], "rules (length)": ["reward=rules", LENGTH],
    }  # fmt: skip
    found = {name: judged(shop, "learned", *words) for name, words in judges.items()}
    assert [found[name]["judge"] for name in judges] == list(judges)
    scores = [(m["gold"]["ref"], m["gold"]["policy"]) for m in found.values()]
    assert len(set(scores)) == len(judges)
    assert found["reward:b"]["judge_notes"] == []
    runs = [read_manifest(m["folder"]) for m in found.values()]
    assert len({run.name for run in runs}) == len(judges)
    assert runs[1].inputs["reward"].name == "b"


def test_a_key_of_another_judge_is_refused_and_not_ignored(shop: Workshop) -> None:
    assert "reward.ref" in refused(shop, "learned", "reward.ref=reward:b")


@pytest.mark.parametrize("judge", [[], ["reward=rules", LENGTH]], ids=["default", "length"])
def test_sentiment_does_not_judge_what_was_optimised_for_it(shop: Workshop, judge: list[str]) -> None:
    """However many runs ago."""
    assert "ppo:rules, which was optimised against it" in refused(shop, "after", *judge)


def test_a_function_is_known_by_another_name(shop: Workshop) -> None:
    for spec in ("my_scores:score", "their_scores:mark"):
        assert "ppo:fn, which was optimised against it" in refused(shop, "fn", "reward=fn", f"reward.fn={spec}")
    assert judged(shop, "fn", "reward=fn", "reward.fn=my_scores:vowels")["judge_is"] == "gold"
    assert judged(shop, "fn")["judge_notes"] == []


def test_who_asks_for_it_gets_a_proxy_and_reads_so(shop: Workshop) -> None:
    found = judged(shop, "rules", "stage.allow_proxy=true")
    assert found["judge_is"] == "proxy"
    assert "gold" not in found
    assert {"ref", "policy", "difference"} == found["proxy"].keys()
    said, page = shop.told[found["folder"]], html.unescape((found["folder"] / "report.html").read_text())
    for text in (said, page):
        assert "vader is a proxy: ppo:rules was optimised against it" in text
    assert "proxy score" in page.lower()
    assert "gold" not in page.lower()
    card = (shop.run("export", "artifact=ppo:rules") / "artifact" / "README.md").read_text()
    assert "win rate by a proxy" in card
    assert "gold" not in card
    judged(shop, "rules", "reward=rules", "reward.rules=[{rule: json}]")
    judged(shop, "rules", "stage.allow_proxy=true", "seed=1")  # newer, and no match for one that is gold
    card = (shop.run("export", "artifact=ppo:rules") / "artifact" / "README.md").read_text()
    assert "gold score by rules (json)" in card
    assert "proxy" not in card
    assert judged(shop, "learned", "stage.allow_proxy=true")["judge_is"] == "gold"  # asked for, and not needed
