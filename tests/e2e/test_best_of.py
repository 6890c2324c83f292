"""Best-of-n from the command line: answers, winners and pairs, what is trained on them, and who may judge that."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import Forks
from ranked import ranked
from workshop import SFT, Workshop

from align.config.identity import identifying
from align.data.read.records import read_preferences
from align.data.sources import ranked_by
from align.models import load
from align.reward.build import on_its_own_base
from align.reward.learned import RoleReward, score_rows
from align.run import Input, artifact_in, read_manifest
from align.track import Tracker, read_rows

N = 6
JUDGES = """
import math
from pathlib import Path

def vowels(chats):
    return [float(sum(c in "aeiou" for c in turns[-1]["content"])) for turns in chats]

def alike(chats):
    return [1.0 for _ in chats]

def nothing(chats):
    return [math.nan for _ in chats]

def consonants(chats):
    return [float(sum(c in "bcdfghklmnprst" for c in turns[-1]["content"])) for turns in chats]
"""
VOWELS = ("reward=fn", "reward.fn=judges_of_best_of:vowels")
BEST = (f"stage.best_of={N}", "stage.prompts=14", "data.held_out=0", "rollout.max_new_tokens=48")


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, chats: Path) -> Workshop:
    """A policy that ends most answers, a reward model, and functions beside them."""
    folder = tmp_path_factory.mktemp("best_of")
    (folder / "judges_of_best_of.py").write_text(JUDGES, encoding="utf-8")
    shop = Workshop(folder / "runs", Path(shutil.copy(chats, folder / "chats.jsonl")))
    shop.run("sft", "model=hub", f"model.path={tiny_model}", *SFT, "run.name=s")
    shop.up_to_reward()
    return shop


@pytest.fixture(autouse=True)
def beside(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(shop.root.parent))


@pytest.fixture(scope="module")
def best(shop: Workshop) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(shop.root.parent))
        return sampled(shop, *VOWELS, "run.name=best", "stage.gold={name: sentiment}")


def status(shop: Workshop, *words: str) -> int:
    """Of a command that samples, with as many tokens as these answers need."""
    return shop.ended("stage=sample", *shop.on_file, *BEST, *words, "device=cpu", f"run.root={shop.root}")


def sampled(shop: Workshop, *words: str) -> Path:
    assert status(shop, *words) == 0, shop.said
    folder = Path(shop.said.splitlines()[-1])
    shop.told[folder] = shop.said
    return folder


def published(folder: Path) -> dict[str, bytes]:
    """What a run answers for, but its page, which has times."""
    names = ("metrics.jsonl", "samples.jsonl", *(f"artifact/{p.name}" for p in (folder / "artifact").iterdir()))
    return {name: (folder / name).read_bytes() for name in names}


def test_winners_and_pairs_are_the_best_and_the_worst(shop: Workshop, best: Path) -> None:
    rows, winners = read_rows(best / "samples.jsonl"), read_rows(best / "artifact" / "winners.jsonl")
    pairs = read_preferences(best / "artifact" / "pairs.jsonl")
    assert [(row["number"], len(row["answers"])) for row in rows] == [(i, N) for i in range(14)]
    metrics = read_manifest(best).metrics
    assert len(winners) == metrics["winners"] > 7
    assert len(pairs) == metrics["pairs"] > 5
    by_id = {row["id"]: row for row in winners}
    groups = {pair.group_id: pair for pair in pairs}
    for row in rows:
        assert all(
            a["score"] == sum(c in "aeiou" for c in a["answer"]) for a in row["answers"] if "\ufffd" not in a["answer"]
        )
        fit = [(a["score"], -i, a) for i, a in enumerate(row["answers"]) if a["ended"] and a["answer"].strip()]
        id = f"sample:best/{row['number']}"
        if not fit:
            assert id not in by_id
            continue
        score, place, won = max(fit, key=lambda each: each[:2])
        ahead = sum((a["score"], -i) > (score, place) for i, a in enumerate(row["answers"]))
        expected = {"id": id, "score": score, "rank": ahead + 1, "n": N, "scorer": "judges_of_best_of:vowels"}
        found = by_id[id]
        assert {key: found[key] for key in expected} == expected
        assert found["messages"] == [*row["prompt"], {"role": "assistant", "content": won["answer"]}]
        others = [a["score"] for a in row["answers"] if a["answer"].strip() not in ("", won["answer"].strip())]
        assert (id in groups) == bool(others and min(others) < score)
        if pair := groups.get(id):
            assert (pair.chosen[0].content, pair.margin) == (won["answer"], score - min(others))
            assert pair.chosen_ended
            assert {(pair.source, pair.scorer)} == {("simulated", "judges_of_best_of:vowels")}


def test_the_figures_grow_with_n(shop: Workshop, best: Path) -> None:
    found = json.loads((best / "artifact" / "best_of.json").read_text())
    scores = [[a["score"] for a in row["answers"]] for row in read_rows(best / "samples.jsonl")]
    assert [line["n"] for line in found["best_of"]] == [1, 2, 4, 6]
    rewards = [line["reward"]["value"] for line in found["best_of"]]
    assert rewards == sorted(rewards)
    assert rewards[0] == pytest.approx(sum(map(sum, scores)) / (14 * N))
    assert rewards[-1] == pytest.approx(sum(map(max, scores)) / 14)
    winners = read_rows(best / "artifact" / "winners.jsonl")
    assert found["winner_reward"] == pytest.approx(sum(row["score"] for row in winners) / len(winners))
    assert found["outranked"] == sum(row["score"] < max(scores[int(row["id"].split("/")[1])]) for row in winners)
    assert (found["scorer"], found["measured_by"]) == ("judges_of_best_of:vowels", "vader")
    assert "KL at most" in shop.told[best]
    assert "artifact/winners.jsonl" in shop.told[best]
    page = (best / "report.html").read_text(encoding="utf-8")
    assert "Best of n" in page
    assert "KL at most" in page
    assert not (best / "artifact" / "ledger.json").exists()


IN_CHUNKS = (*VOWELS, "stage.gold={name: sentiment}", "run.name=best")


@pytest.fixture(scope="module")
def in_chunks(shop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of `best`, its answers in chunks of four prompts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(shop.root.parent))
        patch.setattr("align.stages.sample.ANSWERS_AT_ONCE", 4 * N)
        whole = Workshop(tmp_path_factory.mktemp("whole") / "runs", shop.data)
        return sampled(whole, *IN_CHUNKS, f"init={shop.root / 'sft' / 's'}")


@pytest.mark.parametrize("step", [8, 14])
def test_a_killed_run_ends_with_the_same_bytes(
    shop: Workshop, best: Path, in_chunks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Killed behind the answers of a chunk, before it was logged; at last before the artifact is written."""
    from align.stages import sample

    monkeypatch.setattr(sample, "ANSWERS_AT_ONCE", 4 * N)
    words = (*IN_CHUNKS, f"init={shop.root / 'sft' / 's'}")
    parts = Workshop(tmp_path / "runs", shop.data)
    log = Tracker.log

    def killed(self: Tracker, at: int, *given: Any) -> None:
        if at == step:
            raise KeyboardInterrupt
        log(self, at, *given)

    with monkeypatch.context() as patch:
        if step == 14:
            patch.setattr(sample, "write_preferences", lambda *given: (_ for _ in ()).throw(KeyboardInterrupt))
        else:
            patch.setattr(Tracker, "log", killed)
        assert status(parts, *words) == 130
    calls, answered = [], sample.RankedSampling.answer
    monkeypatch.setattr(sample.RankedSampling, "answer", lambda *given: calls.append(1) or answered(*given))
    found = sampled(parts, *words)
    assert len(calls) == {8: 3, 14: 0}[step]
    assert published(found) == published(in_chunks)
    # Chunks of another size draw the same answers.
    one_go = published(best)
    assert [r["answers"] for r in read_rows(found / "samples.jsonl")] == [
        r["answers"] for r in read_rows(best / "samples.jsonl")
    ]
    assert one_go["artifact/pairs.jsonl"] == published(found)["artifact/pairs.jsonl"]


def test_what_is_trained_on_them_knows_who_ranked_them(shop: Workshop, best: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copy(best / "artifact" / "winners.jsonl", tmp_path / "rows.jsonl"))
    sft = ("stage=sft", "data=jsonl", "init=sft:s", "stage.max_steps=2", "stage.eval_size=2", "data.held_out=0.2")
    assert shop.status(*sft, f"data.path={copied}", "run.name=w") == 0, shop.said
    pairs = best / "artifact" / "pairs.jsonl"
    dpo = ("stage=dpo", "data=jsonl", f"data.path={pairs}", "init=sft:s", "stage.batch_size=4",
           "stage.micro_batch=4", "stage.held_out=0.3")  # fmt: skip
    assert shop.status(*dpo, "run.name=d") == 0, shop.said
    sources = "stage.sources=[{path: '" + str(copied) + "'}]"
    assert shop.status("stage=data", sources, "run.name=mixed", "data.held_out=0.2") == 0, shop.said
    assert shop.status(*sft[:1], "data=manifest", "data.path=data:mixed", *sft[2:5], "run.name=m") == 0, shop.said
    for name in ("sft/w", "dpo/d", "sft/m"):
        assert read_manifest(shop.root / name).inputs["data"].details["ranked_by"] == ["sample:best"], name
        judged = ("stage=eval", f"artifact={name.replace('/', ':')}", *shop.on_file, "stage.prompts=4")
        assert shop.status(*judged, *VOWELS) == 2, shop.said
        assert f"{name.replace('/', ':')}, which was optimised against it" in shop.said
        assert "stage.allow_proxy=true" in shop.said
    assert shop.status(*judged) == 0, shop.said  # by the sentiment, which ranked nothing
    assert shop.status("stage=registry", "stage.action=trace", "artifact=dpo:d") == 0
    assert "data: sample:best" in shop.said


def test_a_reward_model_on_the_policys_base_is_one_more_adapter(
    shop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, scored = [], []
    for module in ("align.ppo.workers", "align.reward.build"):
        monkeypatch.setattr(f"{module}.load_base", lambda *given: loaded.append(given) or load.load_base(*given))
    score = RoleReward.score

    def noted(self: RoleReward, conversations: Any, rollout: Any = None) -> torch.Tensor:
        scored.append((rollout, score(self, conversations, rollout)))
        return scored[-1][1]

    monkeypatch.setattr(RoleReward, "score", noted)
    folder = sampled(shop, "run.name=learned", "init=sft:s")
    assert (len(loaded), len(scored)) == (1, 1)
    read = read_manifest(folder).inputs["reward"]
    assert read.stage == "reward"
    # What a reward model that stands alone says of the very tokens that were sampled.
    alone = on_its_own_base(artifact_in(Path(read.path), read.ref), torch.device("cpu"), torch.float32, 8)
    rollout, scores = scored[0]
    rows = [row[mask].tolist() for row, mask in zip(rollout.tokens_BS, rollout.mask_BS, strict=True)]
    expected = score_rows(alone.model, alone.score_head, rows, alone.tokenizer.pad_token_id)
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)
    assert expected.std() > 1e-3
    told = [a["score"] for row in read_rows(folder / "samples.jsonl") for a in row["answers"]]
    assert told == scores.tolist()


def test_an_ensemble_is_on_one_scale_however_often_it_is_killed(
    shop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from align.stages import sample

    a = next((shop.root / "reward").iterdir())
    monkeypatch.setattr(sample, "ANSWERS_AT_ONCE", 4 * N)
    parts = "reward.parts=[{name: learned, ref: '" + str(a) + "'}, {name: sentiment, weight: 0.5}]"
    words = ("reward=sum", parts, f"init={shop.root / 'sft' / 's'}", "run.name=sum")
    whole, killed = (Workshop(tmp_path / name, shop.data) for name in ("whole", "parts"))
    expected = sampled(whole, *words)
    with monkeypatch.context() as patch:
        log = Tracker.log

        def stop(self: Tracker, at: int, *given: Any) -> None:
            if at == 8:
                raise KeyboardInterrupt
            log(self, at, *given)

        patch.setattr(Tracker, "log", stop)
        assert status(killed, *words) == 130
    assert published(sampled(killed, *words)) == published(expected)


def test_fewer_answers_are_the_first_of_more(shop: Workshop, best: Path) -> None:
    folder = sampled(shop, *VOWELS, "stage.best_of=3", "init=sft:s", "run.name=three")
    given, more = (read_rows(f / "samples.jsonl") for f in (folder, best))
    assert [[a["answer"] for a in row["answers"]] for row in given] == [
        [a["answer"] for a in row["answers"][:3]] for row in more
    ]


def test_what_nobody_ranked_names_nobody(shop: Workshop, best: Path, tmp_path: Path) -> None:
    """A corpus, a file and a pattern beside a run of best-of-n; and a pattern that matches its winners."""
    root = shop.root
    shutil.copy(best / "artifact" / "winners.jsonl", tmp_path / "a-part.jsonl")
    shutil.copy(shop.data, tmp_path / "b-part.jsonl")
    of_nobody = ("chitchat", str(shop.data), f"{tmp_path}/b-*")
    assert [ranked_by(Input("d" * 64, path=path), root) for path in of_nobody] == [()] * 3
    for path in (f"{tmp_path}/*-part.jsonl", str(tmp_path)):
        assert ranked_by(Input("d" * 64, path=path), root) == ("sample:best",)


def test_two_ranks_give_what_one_gives(shop: Workshop, best: Path, forks: Forks, tmp_path: Path) -> None:
    words = ["stage=sample", *shop.on_file, *BEST, *VOWELS, "stage.gold={name: sentiment}", "run.name=best"]
    words += [f"init={shop.root / 'sft' / 's'}", "device=cpu", f"run.root={tmp_path / 'runs'}"]
    shutil.copy(shop.root.parent / "judges_of_best_of.py", tmp_path)
    for ended in ranked(forks, tmp_path, *words):
        assert ended.status == 0, ended
    told = [json.loads((f / "artifact" / "best_of.json").read_text()) for f in (tmp_path / "runs/sample/best", best)]
    assert told[0] == told[1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("stage.best_of=1",), ("stage.best_of=1", "from 2 to 4096")),
        (("stage.best_of=4", "stage.candidates=3"), ("stage.candidates=3", "for people", "Drop it")),
        (("stage.gold={name: sentiment}",), ("stage.gold", "Add stage.best_of=N")),
        (("stage.best_of=4", "stage.gold=vader"), ("stage.gold=vader", "is no mapping")),
        (("stage.best_of=4", "stage.gold={name: magic}"), ("stage.gold.name=magic", "Choose one of")),
        (("stage.best_of=4", "reward=sentiment", "stage.gold={name: sentiment}"), ("stage.gold=vader", "also ranks")),
        (("stage.best_of=4", "reward.ref=reward:none"), ("reward.ref=reward:none", "python -m align stage=reward")),
        (("stage.best_of=4", "reward.ref=sft:s"), ("reward.ref=sft:s", "is no reward model")),
        (
            ("stage.best_of=4", "reward=fn", "reward.fn=judges_of_best_of:nothing"),
            ("reward.fn=judges_of_best_of:nothing", "returned nan"),
        ),
        (("stage.best_of=4", "stage.prompts=3", "reward=sentiment", "rollout.max_new_tokens=1"), ("raise it",)),
    ],
)  # fmt: skip
def test_bad_input_is_named(shop: Workshop, words: tuple[str, ...], said: tuple[str, ...]) -> None:
    given = ("init=sft:s", "rollout.max_new_tokens=16", "device=cpu", *words, f"run.root={shop.root}")
    assert shop.ended("stage=sample", *shop.on_file, *given) == 2, shop.said
    assert [part for part in said if part.lower() not in shop.said.lower()] == [], shop.said
    assert "Traceback" not in shop.said


def test_the_checks_that_measure_are_read_before_any_weights(shop: Workshop) -> None:
    given = ("init=sft:s", "stage.best_of=4", "reward=sentiment", "device=cpu", f"run.root={shop.root}")
    assert shop.ended("stage=sample", *shop.on_file, *given, "stage.gold={name: check}") == 2, shop.said
    assert "check=(missing)" in shop.said
    assert "ranked by" not in shop.said  # which is said once they are loaded


def test_one_score_for_all_gives_winners_and_no_pair(shop: Workshop) -> None:
    folder = sampled(shop, "reward=fn", "reward.fn=judges_of_best_of:alike", "run.name=alike", "init=sft:s")
    metrics = read_manifest(folder).metrics
    assert (metrics["pairs"], (folder / "artifact" / "pairs.jsonl").read_bytes()) == (0, b"")
    assert metrics["one_score"] + metrics["all_equal"] == metrics["winners"] > 7
    assert metrics["winner_reward"] == 1.0
    assert metrics["reward"]["best"]["value"] == 1.0
    assert "with no answer below the winner's score" in shop.told[folder]


def test_a_run_for_people_has_the_name_that_it_had(shop: Workshop, best: Path) -> None:
    manifest = read_manifest(next(p for p in (shop.root / "sample").iterdir() if (p / "artifact/ledger.json").exists()))
    told = identifying("sample", manifest.config, manifest.inputs)
    assert "reward" not in told
    assert "reward" in identifying("sample", read_manifest(best).config, ())
