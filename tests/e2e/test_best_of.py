"""Best-of-n from the command line: answers, winners and pairs, training on them, and the scorers that may judge the
trained model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import Forks
from rank_processes import run_on_ranks
from stage_commands import SFT, Workshop

from align.data.read.records import read_preferences
from align.models import load
from align.reward.build import load_reward_model
from align.reward.learned import RoleReward, score_rows
from align.run import load_artifact, read_manifest
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
    shop.run_up_to_reward()
    return shop


@pytest.fixture(autouse=True)
def beside(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(shop.root.parent))


@pytest.fixture(scope="module")
def best(shop: Workshop) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(shop.root.parent))
        return sample_answers(shop, *VOWELS, "run.name=best", "stage.gold={name: sentiment}")


def run_sample(shop: Workshop, *arguments: str) -> int:
    """Sample with as many tokens as these answers need, and return the exit status."""
    return shop.run_command("stage=sample", *shop.data_words, *BEST, *arguments, "device=cpu", f"run.root={shop.root}")


def sample_answers(shop: Workshop, *arguments: str) -> Path:
    assert run_sample(shop, *arguments) == 0, shop.output
    folder = Path(shop.output.splitlines()[-1])
    shop.outputs[folder] = shop.output
    return folder


def read_published(folder: Path) -> dict[str, bytes]:
    """Return the files by which runs are compared. The page has times and is left out."""
    names = ("metrics.jsonl", "samples.jsonl", *(f"artifact/{p.name}" for p in (folder / "artifact").iterdir()))
    return {name: (folder / name).read_bytes() for name in names}


def test_winners_and_pairs_are_the_best_and_the_worst(shop: Workshop, best: Path) -> None:
    """Only answers that ended by themselves can win. Every case of ranking is tested in `test_best_of_rows`."""
    rows = read_rows(best / "samples.jsonl")
    winners = read_rows(best / "artifact" / "winners.jsonl")
    pairs = read_preferences(best / "artifact" / "pairs.jsonl")
    metrics = read_manifest(best).metrics
    assert (len(winners), len(pairs)) == (metrics["winners"], metrics["pairs"])
    assert len(winners) > 7
    assert len(pairs) > 5
    row_by_id = {f"sample:best/{row['number']}": row for row in rows}
    for winner in winners:
        row = row_by_id[winner["id"]]
        candidates = [a for a in row["answers"] if a["ended"] and a["answer"].strip()]
        best_answer = max(candidates, key=lambda a: a["score"])  # the first of equals
        assert winner["messages"] == [*row["prompt"], {"role": "assistant", "content": best_answer["answer"]}]
        assert (winner["score"], winner["n"], winner["scorer"]) == (best_answer["score"], N, "judges_of_best_of:vowels")
    for pair in pairs:
        scores = [a["score"] for a in row_by_id[pair.group_id]["answers"] if a["answer"].strip()]
        assert pair.margin == next(w["score"] for w in winners if w["id"] == pair.group_id) - min(scores) > 0
        assert (pair.chosen_ended, pair.source, pair.scorer) == (True, "simulated", "judges_of_best_of:vowels")


def test_a_reward_model_on_the_policys_base_scores_as_it_does_alone(
    shop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded_bases = list[Any]()
    scored = list[tuple[Any, torch.Tensor]]()
    score = RoleReward.score

    def count_load_base(*arguments: Any) -> Any:
        loaded_bases.append(arguments)
        return load.load_base(*arguments)

    def record_score(self: RoleReward, conversations: Any, rollout: Any = None) -> torch.Tensor:
        scores = score(self, conversations, rollout)
        scored.append((rollout, scores))
        return scores

    monkeypatch.setattr("align.ppo.workers.load_base", count_load_base)
    monkeypatch.setattr("align.reward.build.load_base", count_load_base)
    monkeypatch.setattr(RoleReward, "score", record_score)
    folder = sample_answers(shop, "run.name=learned", "init=sft:s")
    assert len(loaded_bases) == 1  # the reward model is one more adapter on it
    ((rollout, scores),) = scored
    recorded = read_manifest(folder).inputs["reward"]
    artifact = load_artifact(Path(recorded.path), recorded.ref)
    reward_model = load_reward_model(artifact, torch.device("cpu"), torch.float32, 8)
    rows = [row[mask].tolist() for row, mask in zip(rollout.tokens_BS, rollout.mask_BS, strict=True)]
    expected = score_rows(reward_model.model, reward_model.score_head, rows, reward_model.tokenizer.pad_token_id)
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)
    assert expected.std() > 1e-3
    published_scores = [answer["score"] for row in read_rows(folder / "samples.jsonl") for answer in row["answers"]]
    assert published_scores == scores.tolist()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ("reward=sentiment", "stage.prompts=3", "rollout.max_new_tokens=1"),
            "leaves no answer that is complete and not empty",
        ),
        (("reward=fn", "reward.fn=judges_of_best_of:nothing"), "reward.fn=judges_of_best_of:nothing: returned nan"),
    ],
    ids=["cut", "nan"],
)
def test_answers_that_cannot_be_ranked_are_refused(shop: Workshop, words: tuple[str, ...], says: str) -> None:
    assert run_sample(shop, *words) == 2, shop.output
    assert says in shop.output
    assert "Traceback" not in shop.output


def test_the_figures_grow_with_n(shop: Workshop, best: Path) -> None:
    figures = json.loads((best / "artifact" / "best_of.json").read_text())
    scores = [[a["score"] for a in row["answers"]] for row in read_rows(best / "samples.jsonl")]
    assert [line["n"] for line in figures["best_of"]] == [1, 2, 4, 6]
    rewards = [line["reward"]["value"] for line in figures["best_of"]]
    assert rewards == sorted(rewards)
    assert rewards[0] == pytest.approx(sum(map(sum, scores)) / (14 * N))
    assert rewards[-1] == pytest.approx(sum(map(max, scores)) / 14)
    assert (figures["scorer"], figures["measured_by"]) == ("judges_of_best_of:vowels", "vader")
    assert "artifact/winners.jsonl" in shop.outputs[best]
    for text in (shop.outputs[best], (best / "report.html").read_text(encoding="utf-8")):
        assert "KL at most" in text
    assert not (best / "artifact" / "ledger.json").exists()


def ensemble_arguments(shop: Workshop) -> tuple[str, ...]:
    """Return the arguments of a run with an ensemble, whose members are first brought to one scale."""
    learned = next((shop.root / "reward").iterdir())
    parts = f"reward.parts=[{{name: learned, ref: '{learned}'}}, {{name: sentiment, weight: 0.5}}]"
    return ("reward=sum", parts, f"init={shop.root / 'sft' / 's'}", "run.name=best")


@pytest.fixture(scope="module")
def whole(shop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of chunks of four prompts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("align.stages.sample.ANSWERS_AT_ONCE", 4 * N)
        return sample_answers(Workshop(tmp_path_factory.mktemp("whole") / "runs", shop.data), *ensemble_arguments(shop))


@pytest.mark.parametrize("step", [8, 14])
def test_a_killed_run_ends_with_the_same_bytes(
    shop: Workshop, best: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """The run is killed after the answers of a chunk, before it is logged, and before the artifact is written."""
    from align.stages import sample

    monkeypatch.setattr(sample, "ANSWERS_AT_ONCE", 4 * N)
    interrupted = Workshop(tmp_path / "runs", shop.data)
    log_step = Tracker.log

    def log_or_interrupt(self: Tracker, at: int, *arguments: Any) -> None:
        if at == step:
            raise KeyboardInterrupt
        log_step(self, at, *arguments)

    with monkeypatch.context() as patch:
        if step == 14:
            patch.setattr(sample, "write_preferences", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
        else:
            patch.setattr(Tracker, "log", log_or_interrupt)
        assert run_sample(interrupted, *ensemble_arguments(shop)) == 130
    calls = []
    answer_chunk = sample.RankedSampling.sample_answers
    monkeypatch.setattr(
        sample.RankedSampling, "sample_answers", lambda *arguments: calls.append(1) or answer_chunk(*arguments)
    )
    folder = sample_answers(interrupted, *ensemble_arguments(shop))
    assert len(calls) == {8: 4, 14: 1}[step]  # one of them for the scale
    assert read_published(folder) == read_published(whole)
    # Chunks of another size draw the same answers.
    texts = [[[a["answer"] for a in row["answers"]] for row in read_rows(f / "samples.jsonl")] for f in (folder, best)]
    assert texts[0] == texts[1]


def test_what_is_trained_on_them_knows_who_ranked_them(shop: Workshop, best: Path, tmp_path: Path) -> None:
    winners_path = Path(shutil.copy(best / "artifact" / "winners.jsonl", tmp_path / "rows.jsonl"))
    sft = ("stage=sft", "data=jsonl", "init=sft:s", "stage.max_steps=2", "stage.eval_size=2", "data.held_out=0.2")
    assert shop.status(*sft, f"data.path={winners_path}", "run.name=w") == 0, shop.output
    pairs = best / "artifact" / "pairs.jsonl"
    dpo = (
        "stage=dpo",
        "data=jsonl",
        f"data.path={pairs}",
        "init=sft:s",
        "stage.batch_size=4",
        "stage.micro_batch=4",
        "stage.held_out=0.3",
    )
    assert shop.status(*dpo, "run.name=d") == 0, shop.output
    sources = "stage.sources=[{path: '" + str(winners_path) + "'}]"
    assert shop.status("stage=data", sources, "run.name=mixed", "data.held_out=0.2") == 0, shop.output
    assert shop.status(*sft[:1], "data=manifest", "data.path=data:mixed", *sft[2:5], "run.name=m") == 0, shop.output
    for name in ("sft/w", "dpo/d", "sft/m"):
        assert read_manifest(shop.root / name).inputs["data"].details["ranked_by"] == ["sample:best"], name
        evaluation = ("stage=eval", f"artifact={name.replace('/', ':')}", *shop.data_words, "stage.prompts=4")
        shop.refuses(
            *evaluation,
            *VOWELS,
            says=(f"{name.replace('/', ':')}, which was optimised against it", "stage.allow_proxy=true"),
        )
    assert shop.status(*evaluation) == 0, shop.output  # judged by sentiment, which ranked nothing
    assert shop.status("stage=registry", "stage.action=trace", "artifact=dpo:d") == 0
    assert "data: sample:best" in shop.output


def test_only_answers_with_the_minimum_score_win(shop: Workshop, best: Path) -> None:
    scores = sorted(row["score"] for row in read_rows(best / "artifact" / "winners.jsonl"))
    median = scores[len(scores) // 2]
    folder = sample_answers(shop, *VOWELS, "init=sft:s", "run.name=high", f"stage.min_score={median}")
    expected_rows = [row for row in read_rows(best / "artifact" / "winners.jsonl") if row["score"] >= median]
    rows = read_rows(folder / "artifact" / "winners.jsonl")
    assert [row["messages"] for row in rows] == [row["messages"] for row in expected_rows]
    assert read_manifest(folder).metrics["low_score"] == sum(score < median for score in scores) > 0
    shop.refuses(
        *("stage=sample", "init=sft:s", *shop.data_words, *VOWELS, *BEST, "run.name=none", "stage.min_score=1000"),
        says=("stage.min_score=1000", "is higher than the score of every prompt's best complete answer. Lower it"),
    )


def test_fewer_answers_are_the_first_of_more(shop: Workshop, best: Path) -> None:
    folder = sample_answers(shop, *VOWELS, "stage.best_of=3", "init=sft:s", "run.name=three")
    three_rows, six_rows = (read_rows(f / "samples.jsonl") for f in (folder, best))
    assert [[a["answer"] for a in row["answers"]] for row in three_rows] == [
        [a["answer"] for a in row["answers"][:3]] for row in six_rows
    ]


def test_two_ranks_give_what_one_gives(shop: Workshop, best: Path, forks: Forks, tmp_path: Path) -> None:
    command = ["stage=sample", *shop.data_words, *BEST, *VOWELS, "stage.gold={name: sentiment}", "run.name=best"]
    command += [f"init={shop.root / 'sft' / 's'}", "device=cpu", f"run.root={tmp_path / 'runs'}"]
    shutil.copy(shop.root.parent / "judges_of_best_of.py", tmp_path)
    for result in run_on_ranks(forks, tmp_path, *command):
        assert result.status == 0, result
    figures = [json.loads((f / "artifact" / "best_of.json").read_text()) for f in (tmp_path / "runs/sample/best", best)]
    assert figures[0] == figures[1]


def test_one_score_for_all_gives_winners_and_no_pair(shop: Workshop) -> None:
    folder = sample_answers(shop, "reward=fn", "reward.fn=judges_of_best_of:alike", "run.name=alike", "init=sft:s")
    metrics = read_manifest(folder).metrics
    assert (metrics["pairs"], (folder / "artifact" / "pairs.jsonl").read_bytes()) == (0, b"")
    assert metrics["one_score"] + metrics["all_equal"] == metrics["winners"] > 7
    assert metrics["winner_reward"] == 1.0
    assert metrics["reward"]["best"]["value"] == 1.0
    assert "with no answer below the winner's score" in shop.outputs[folder]
