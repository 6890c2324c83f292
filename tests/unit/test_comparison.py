"""The evidence of an evaluation and the figures that follow from it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from align.errors import CorruptFile, MissingArtifact
from align.evals.comparison import Sample, read_samples, summarise, write_samples
from align.types import Message

FIRST = Sample(
    prompt_id="p0",
    prompt=(Message("system", "Be kind."), Message("user", "Hello?")),
    ref="no no",
    policy="yes of course",
    score_ref=0.25,
    score_policy=0.75,
    length_ref=4,
    length_policy=6,
    ended_ref=False,
    ended_policy=True,
    kl=3.0,
)


def answers(*changes: dict) -> list[Sample]:
    return [replace(FIRST, prompt_id=f"p{i}", **change) for i, change in enumerate(changes)]


def test_summary_by_hand():
    samples = answers(
        {},
        {"score_policy": 0.25, "length_policy": 10, "kl": -1.0},  # a tie
        {"score_policy": 0.0, "ended_ref": True, "ended_policy": False, "kl": 4.0},
        {"policy": "yes", "score_policy": 1.0},
    )
    found = summarise(samples)
    assert list(found) == [
        *("win_rate", "gold", "kl", "kl_interval", "length", "distinct1", "distinct2", "repetition"),
        *("most_risen_word", "eos_rate", "empty_rate"),
    ]
    assert found["win_rate"]["value"] == 2.5 / 4
    assert found["win_rate"]["n"] == 4
    assert 0 <= found["win_rate"]["low"] < found["win_rate"]["value"] < found["win_rate"]["high"] <= 1
    assert found["gold"]["ref"] == 0.25
    assert found["gold"]["policy"] == 0.5
    assert found["gold"]["difference"]["value"] == 0.25
    assert found["kl"] == found["kl_interval"]["value"] == 9 / 4
    assert found["length"] == {"ref": 4, "policy": 7}
    assert found["distinct1"] == {"ref": 1 / 8, "policy": 3 / 10}
    assert found["distinct2"] == {"ref": 1 / 4, "policy": 2 / 6}
    assert found["repetition"] == {"ref": 0, "policy": 0}
    assert found["most_risen_word"] == {"word": "yes", "ref": 0, "policy": 1}
    assert found["eos_rate"] == {"ref": 0.25, "policy": 0.75}
    assert found["empty_rate"] == {"ref": 0, "policy": 0}
    blank = summarise(answers({"policy": " \n", "reasoning_policy": "Hm"}, {}, {}, {}))
    assert blank["empty_rate"] == {"ref": 0, "policy": 0.25}


def test_a_policy_against_itself_wins_half():
    found = summarise(answers(*[{"score_policy": 0.25, "kl": 0.0}] * 5))
    won = found["win_rate"]
    assert (won["value"], won["n"]) == (0.5, 5)
    assert 0.1 < won["low"] < 0.4 < 0.6 < won["high"] < 0.9  # five ties do not prove that nothing else can happen
    assert found["kl_interval"] == {"value": 0.0, "low": None, "high": None, "n": 5}
    assert found["kl"] == 0


def test_answers_to_one_prompt_are_one_piece_of_evidence():
    many = [replace(FIRST, prompt_id="p0")] * 9 + [replace(FIRST, prompt_id="p1", score_policy=0.0, kl=5.0)]
    found = summarise(many)
    assert found["kl"] == 4  # (3 + 5) / 2, not nine parts of ten at 3
    assert found["kl_interval"]["n"] == 2
    assert found["win_rate"]["n"] == 2
    assert found["win_rate"]["value"] == 0.5


def test_samples_on_disk_give_the_same_figures_again(tmp_path: Path):
    generator = np.random.default_rng(0)
    samples = [
        replace(
            FIRST,
            prompt_id=f"p{i}",
            policy="line one\nline\u2028two \u0085 \ud83d 猫 " + "x" * i,  # what str.splitlines would break at
            score_ref=float(np.float32(generator.normal())),
            score_policy=float(generator.normal()),
            kl=float(generator.normal() / 3),
            reasoning_policy=None if i % 2 else "Hm",
        )
        for i in range(40)
    ]
    path = write_samples(tmp_path / "samples.jsonl", samples)
    assert read_samples(path) == samples
    metrics = json.loads(json.dumps(summarise(samples)))
    assert summarise(read_samples(path)) == metrics
    rows = [json.loads(line) for line in path.read_text(errors="surrogatepass").split("\n")[:-1]]
    assert ["reasoning_policy" in row for row in rows] == [True, False] * 20  # and nothing of what is not hidden
    assert rows[0]["prompt"] == [m.as_dict() for m in FIRST.prompt]
    assert [p.name for p in tmp_path.iterdir()] == ["samples.jsonl"]


def test_reading_names_the_line_at_fault(tmp_path: Path):
    with pytest.raises(MissingArtifact, match="stage=eval"):
        read_samples(tmp_path / "none.jsonl")
    path = write_samples(tmp_path / "samples.jsonl", [FIRST, FIRST])
    path.write_text(path.read_text()[:-20])
    with pytest.raises(CorruptFile, match=r"samples\.jsonl:2"):
        read_samples(path)
    path.write_text(json.dumps({"prompt_id": "p0"}) + "\n")
    with pytest.raises(CorruptFile, match=r":1.*KeyError"):
        read_samples(path)


def test_older_files_call_every_judge_gold():
    record = FIRST.as_dict()
    record |= {"gold_ref": record.pop("score_ref"), "gold_policy": record.pop("score_policy")}
    assert Sample.of(record) == FIRST


@pytest.mark.parametrize(
    "change", [{"score_ref": float("nan")}, {"kl": float("inf")}, {"length_policy": -1}, {"prompt": ()}]
)
def test_a_sample_is_checked_where_it_is_born(change):
    with pytest.raises(ValueError, match="sample 'p0'"):
        replace(FIRST, **change)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path):
    path = write_samples(tmp_path / "samples.jsonl", [FIRST])

    def broken():
        yield FIRST
        raise RuntimeError("generation died")

    with pytest.raises(RuntimeError, match="generation died"):
        write_samples(path, broken())
    assert read_samples(path) == [FIRST]
    assert len(list(tmp_path.iterdir())) == 1


def test_nothing_to_summarise():
    with pytest.raises(ValueError, match="no samples"):
        summarise([])
