"""The answer cache: keys contain everything that decides an answer, records survive, and damage is reported."""

from __future__ import annotations

import sqlite3
import time
from dataclasses import fields, replace
from multiprocessing import get_context
from pathlib import Path

import pytest

from align.core.errors import CorruptFile, StorageError
from align.rollout.answer_cache import AnswerKey, AnswerStore, CachedAnswer

ASKED = AnswerKey("b" * 64, "a" * 64, "qlora", "float32", "t" * 64, (5, 6, 7), 12, 1.0, (2,), 3, "hf cpu torch 2.13.0")
OTHER = {
    "base": "b" * 63 + "c",
    "adapter": "a" * 63 + "b",
    "method": "lora",
    "dtype": "bfloat16",
    "tokenizer": "t" * 63 + "u",
    "prompt": (5, 6, 8),
    "max_new_tokens": 13,
    "temperature": 1.1,
    "stop_ids": (3,),
    "seed": 4,
    "engine": "hf cpu torch 2.13.1",
    "stops": ("\n",),
}
SAID = CachedAnswer((8, 9, 2), "two words \u2028 é", True)


def test_whatever_decides_an_answer_is_in_its_name():
    assert OTHER.keys() == {field.name for field in fields(AnswerKey)}
    changed = {replace(ASKED, **{name: value}).id for name, value in OTHER.items()}
    shorter = replace(ASKED, prompt=(5, 6)).id
    assert len({ASKED.id, shorter, *changed}) == len(OTHER) + 2
    assert replace(ASKED, seed=3).id == ASKED.id


def test_the_texts_that_end_an_answer_are_in_its_name():
    assert len({replace(ASKED, stops=stops).id for stops in ((), ("a", "b"), ("b", "a"), ("ab",))}) == 4


def test_an_answer_is_found_again_and_stays_what_it_was(tmp_path: Path):
    store = AnswerStore(tmp_path / "new" / "answers.db")
    assert store.find_records([ASKED.id]) == {}
    store.add([(ASKED, SAID)])
    store.add([(ASKED, replace(SAID, text="another"))])
    entries = [(replace(ASKED, seed=seed), replace(SAID, text=str(seed))) for seed in range(10, 1300)]
    store.add(entries)
    records = store.find_records([ASKED.id, "nobody", *(key.id for key, _ in entries)])
    assert records.pop(ASKED.id) == SAID
    assert records == {key.id: answer for key, answer in entries}


def add_answers(path: Path, first: int) -> None:
    for seed in range(first, first + 40):
        AnswerStore(path).add([(replace(ASKED, seed=seed), SAID)])


def test_several_processes_keep_answers_at_once(tmp_path: Path):
    path = tmp_path / "answers.db"
    workers = [get_context("fork").Process(target=add_answers, args=(path, first)) for first in (0, 20, 40)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert len(AnswerStore(path).find_records(replace(ASKED, seed=seed).id for seed in range(80))) == 80


@pytest.mark.parametrize("after_s", [0.02, 0.1, 0.3])
def test_what_a_process_was_adding_as_it_was_killed_is_there_whole_or_not_at_all(after_s: float, tmp_path: Path):
    store = AnswerStore(tmp_path / "answers.db")
    store.add([(ASKED, SAID)])
    entries = [(replace(ASKED, seed=seed), SAID) for seed in range(10, 6_000)]
    adding = get_context("fork").Process(target=store.add, args=(entries,))
    adding.start()
    time.sleep(after_s)
    adding.kill()
    adding.join()
    records = store.find_records([ASKED.id, *(key.id for key, _ in entries)])
    assert len(records) in (1, 1 + len(entries))
    store.add(entries)
    assert len(store.find_records(key.id for key, _ in entries)) == len(entries)


@pytest.mark.parametrize("damage", ["text", "cut", "json", "shape"])
def test_a_damaged_store_is_said_to_be_one(damage: str, tmp_path: Path):
    path = tmp_path / "answers.db"
    store = AnswerStore(path)
    store.add([(replace(ASKED, seed=seed), SAID) for seed in range(200)])
    if damage == "text":
        path.write_text("this is no database, whatever its name is" * 100)
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        with sqlite3.connect(path) as db:
            db.execute("UPDATE answers SET answer = ?", ("{" if damage == "json" else '{"text": 1}',))
    with pytest.raises(CorruptFile, match="Move the file away"):
        store.find_records(replace(ASKED, seed=seed).id for seed in range(200))


def test_a_folder_that_takes_no_file(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        AnswerStore(tmp_path / "file" / "answers.db").add([(ASKED, SAID)])
