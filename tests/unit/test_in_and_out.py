"""Imports into the annotation store, exports of its votes, and backups."""

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest
from annotation_store import add_question, build_judgement, query_rows, record_ranking, tamper
from assignment_queues import cast_vote
from datasets import Dataset, DatasetDict
from json_lines import write_rows
from postgres import create_schema
from row_formats import PACKERS, WRITERS, write_row_file

from align.annotate.assignment import AssignmentQueue
from align.annotate.exchange.archive import restore_store, write_store_backup
from align.annotate.exchange.exporting import export_votes
from align.annotate.exchange.importing import import_items
from align.annotate.store import Judgement, Store, configure_project, publish_guidelines
from align.annotate.store.preference_pairs import load_preferences
from align.annotate.store.vote_selection import VoteSelection
from align.core.errors import CorruptFile, InputError
from align.data.read.records import read_documents, read_preferences


@pytest.fixture
def store(store_url):
    with Store.open(store_url) as store:
        yield store


ROWS = [
    {"id": "a", "prompt": "How are you?", "answers": ["Fine", "Bad"], "priority": 0.4},
    {
        "prompt": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Grüße"}],
        "answers": [
            {"text": "Hello", "model": "m1", "adapter": "x", "sampling": {"seed": 3}},
            {"text": "", "ended": False},
        ],
    },
    {"id": 7, "prompt": "2+2?", "answers": ["4", "5", "four"], "expected": [[0, 2], [1]]},
]


# In


def test_every_row_becomes_an_item_once(store, tmp_path):
    path = write_rows(tmp_path / "items.jsonl", ROWS)
    assert import_items(store, "p", path) == (3, 3)
    head = store.head()
    assert import_items(store, "p", path) == (3, 0)
    assert store.head() == head
    assert import_items(store, "p", path, source="other") == (3, 3)
    first, second, third, *_ = store.items("p")
    assert (first.prompt.as_dicts(), [candidate.text for candidate in first.candidates]) == (
        [{"role": "user", "content": "How are you?"}],
        ["Fine", "Bad"],
    )
    assert [message.content for message in second.prompt.messages] == ["Be kind.", "Grüße"]
    hello, cut = second.candidates
    assert (hello.model_digest, hello.adapter_digest, hello.sampling, hello.ended) == ("m1", "x", {"seed": 3}, True)
    assert (cut.text, cut.ended) == ("", False)
    gold = dict(query_rows(store, "SELECT item, gold FROM work"))
    assert [bool(gold[item.id]) for item in (first, second, third)] == [False, False, True]
    expected = json.loads(query_rows(store, "SELECT payload FROM ledger WHERE seq = 3")[0][0])["expected"]
    assert expected == [[f"{third.id}-0", f"{third.id}-2"], [f"{third.id}-1"]]
    store.verify()


def test_a_row_changed_since_is_refused(store, tmp_path):
    import_items(store, "p", write_rows(tmp_path / "items.jsonl", ROWS))
    changed = [ROWS[0] | {"answers": ["Fine", "Worse"]}, *ROWS[1:]]
    with pytest.raises(InputError, match=r"row 1, id=a: .*other content.*stage\.source="):
        import_items(store, "p", write_rows(tmp_path / "items.jsonl", changed))


def test_every_format_has_the_same_items(store, tmp_path):
    """The second file adds nothing, since it has the same rows with the same content."""
    rows = [
        {"id": f"i{i}", "prompt": f"q{i}", "answers": ["a, b", "c"], "priority": i / 2, "expected": [[1], [0]]}
        for i in range(4)
    ]
    rows[1]["expected"] = rows[2]["id"] = None
    added = []
    for name in WRITERS:
        for packed in PACKERS:
            added.append(import_items(store, "p", write_row_file(tmp_path, name, rows, packed), source="s"))
    assert added == [(4, 4), *[(4, 0)] * (len(added) - 1)]
    (tmp_path / "shards").mkdir()
    for name, shard_rows in (("0.jsonl", rows[:2]), ("1.jsonl", rows[2:])):
        write_row_file(tmp_path, "d.jsonl", shard_rows).rename(tmp_path / "shards" / name)
    assert import_items(store, "p", tmp_path / "shards", source="s") == (4, 0)


def test_a_saved_data_set_is_read_like_a_file(store, tmp_path):
    rows = [{"prompt": f"q{i}", "answers": ["a", "b"], "priority": i / 2} for i in range(3)]
    Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    assert import_items(store, "p", tmp_path / "saved") == (3, 3)
    assert [item.prompt.messages[0].content for item in store.items("p")] == ["q0", "q1", "q2"]
    assert [row[0] for row in query_rows(store, "SELECT priority FROM work ORDER BY priority")] == [0, 0.5, 1]
    DatasetDict(train=Dataset.from_list(rows)).save_to_disk(tmp_path / "parts")
    with pytest.raises(InputError, match=r"several parts \(train\)"):
        import_items(store, "p", tmp_path / "parts")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="is a folder without a file"):
        import_items(store, "p", tmp_path / "empty")


@pytest.mark.parametrize(
    ("change", "column"),
    [
        ({"answers": ["only"]}, "answers"),
        ({"answers": list("abcdefghij")}, "answers"),
        ({"prompt": " "}, "prompt"),
        ({"answers": "no list"}, "answers"),
        ({"answers": None}, "answers"),
        ({"answers": ["a", 3]}, r"answers\[1\]"),
        ({"answers": ["a", {"txt": "b"}]}, r"answers\[1\]"),
        ({"answers": ["a", {"text": "b", "modle": "m"}]}, r"answers\[1\]"),
        ({"answers": ["a", {"text": "b", "ended": "yes"}]}, r"answers\[1\]"),
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [{"role": "user"}]}, "prompt"),
        ({"prompt": [{"role": "assistant", "content": "Hi"}]}, "prompt"),
        ({"prompt": [{"role": "robot", "content": "Hi"}]}, "prompt"),
        ({"priority": "high"}, "priority"),
        ({"priority": float("nan")}, "priority"),
        ({"expected": [[0]]}, "expected"),
        ({"expected": [[0], [0, 1, 2]]}, "expected"),
        ({"expected": [[0], [], [1, 2]]}, "expected"),
        ({"expected": [[0, 1], [3]]}, "expected"),
        ({"expected": 3}, "expected"),
        ({"id": [1]}, "id"),
        ({"id": True}, "id"),
        ({"id": "a"}, "id"),
        ({"priority": 10**400}, "priority"),
        ({"expected": [[True], [False], [2]]}, "expected"),
        ({"expected": [["0"], [1], [2]]}, "expected"),
        ({"answers": ["a", "\ud83d"]}, r"answers\[1\]"),
        ({"answers": ["a", "b\x00"]}, r"answers\[1\]"),
        ({"answers": ["a", {"text": "b", "model": "m" * 201}]}, r"answers\[1\]"),
        ({"answers": ["a", {"text": "b", "sampling": {"t": float("nan")}}]}, r"answers\[1\]"),
        ({"prompt": "half an emoji \ud83d"}, "prompt"),
        ({"answer": ["a", "b"]}, "answer"),
    ],
)
def test_a_bad_row_is_named_and_nothing_of_the_file_is_taken(store, tmp_path, change, column):
    path = write_rows(tmp_path / "items.jsonl", [ROWS[0], ROWS[2] | change])
    with pytest.raises(InputError, match=rf"items\.jsonl, row 2, {column}"):
        import_items(store, "p", path)
    assert store.head().seq == 0


def test_a_row_is_known_by_its_id_or_its_number_and_takes_a_new_priority(store, tmp_path):
    rows = [{"id": 2, "prompt": "a", "answers": ["x", "y"]}, {"prompt": "b", "answers": ["x", "y"], "priority": 0.1}]
    path = write_rows(tmp_path / "items.jsonl", rows)
    assert import_items(store, "p", path) == (2, 2)
    rows[1]["priority"] = 0.9
    assert import_items(store, "p", write_rows(path, rows)) == (2, 0)
    assert sorted(row[0] for row in query_rows(store, "SELECT priority FROM work")) == [0.0, 0.9]


def test_a_long_file_is_taken_in_parts_between_which_others_write(store, tmp_path, monkeypatch):
    monkeypatch.setattr("align.annotate.exchange.importing.ITEMS_PER_TRANSACTION", 2)
    rows = [{"prompt": f"q{i}", "answers": ["x", "y"]} for i in range(5)]
    assert import_items(store, "p", write_rows(tmp_path / "items.jsonl", rows)) == (5, 5)


def test_an_empty_file_is_refused(store, tmp_path):
    with pytest.raises(InputError, match="is empty"):
        import_items(store, "p", write_rows(tmp_path / "items.jsonl", []))


# Out


@pytest.fixture
def judged(store):
    """Items of three answers: a ranking with all fields, a tie of the best two, a tie of all, a skip, and gold."""
    publish_guidelines(store, "p", "# Be fair")
    configure_project(store, "p", {"attributes": ["helpful"]})
    ids = [add_question(store, f"run/{i}") for i in range(4)]
    more = {"strength": 2, "rationale": "kind", "demonstration": "I am fine!", "guideline_version": "1"}
    record_ranking(store, ids[0], "0>1>2", flagged=(f"{ids[0]}-2",), ratings={f"{ids[0]}-0": {"helpful": 5}}, **more)
    record_ranking(store, ids[1], "01>2")
    record_ranking(store, ids[2], "012", quality="good")
    store.record(
        "p",
        ids[3],
        Judgement(skipped="unsure", demonstration="I would say this"),
        annotator="ann@example.org",
        key="skip",
    )
    record_ranking(store, ids[3], "0>1>2", annotator="bob", purpose="gold")
    return store, ids


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_what_is_exported_can_be_trained_on_and_traced(judged, tmp_path):
    store, ids = judged
    counts = export_votes(store, "p", tmp_path)
    assert counts == {name: len(read_rows(tmp_path / name)) for name in counts}
    pairs = read_preferences(tmp_path / "preferences.jsonl")
    exported = [(pair.prompt, pair.chosen, pair.rejected, pair.group_id, pair.margin, pair.id) for pair in pairs]
    assert exported == [
        (pair.prompt, pair.chosen, pair.rejected, pair.group_id, pair.margin, pair.id)
        for pair in load_preferences(store, "p")
    ]
    implicit_pairs = read_preferences(tmp_path / "implicit.jsonl")
    assert [(pair.prompt, pair.chosen, pair.rejected) for pair in implicit_pairs] == [
        (pair.prompt, pair.chosen, pair.rejected) for pair in pairs
    ]
    assert not any("margin" in row for row in read_rows(tmp_path / "preferences.jsonl"))  # three answers have no margin
    per_vote = Counter()
    for row in read_rows(tmp_path / "preferences.jsonl"):
        per_vote[row["vote"]] += row["weight"]
        assert row["annotator"] == store.pseudonym("p", "ann@example.org")
        assert {"adapter", "model"} == row["chosen_from"].keys()
    votes = {vote.item: vote.seq for vote in store.rankings("p")}
    assert per_vote == pytest.approx({votes[ids[0]]: 1, votes[ids[1]]: 2 / 3})  # a tie lacks one pair of three


def test_rankings_keep_ties_and_read_back_as_pairs(judged, tmp_path):
    store, ids = judged
    export_votes(store, "p", tmp_path)
    rows = {row["item"]: row for row in read_rows(tmp_path / "rankings.jsonl")}
    assert [answer["rank"] for answer in rows[ids[1]]["answers"]] == [1, 1, 2]
    first = rows[ids[0]]
    assert [answer["flagged"] for answer in first["answers"]] == [False, False, True]
    assert (first["answers"][0]["ratings"], first["rationale"], first["guideline_version"]) == (
        {"helpful": 5},
        "kind",
        "1",
    )
    assert rows.keys() == set(ids[:3])
    assert len(read_preferences(tmp_path / "rankings.jsonl")) == 5


def test_unpaired_rows_and_demonstrations(judged, tmp_path):
    store, ids = judged
    export_votes(store, "p", tmp_path)
    labels: dict[str, list] = {}
    for row in read_rows(tmp_path / "unpaired.jsonl"):
        labels.setdefault(row["item"], []).append((row["completion"][0]["content"], row["label"]))
    assert labels == {
        ids[0]: [("fine", True), ("eh", False)],
        ids[1]: [("fine", True), ("bad", True), ("eh", False)],
        ids[2]: [("fine", True), ("bad", True), ("eh", True)],
    }
    demonstrations = read_documents(tmp_path / "demonstrations.jsonl")
    assert [message.content for document in demonstrations for message in document.messages] == [
        "question of run/0",
        "I am fine!",
        "question of run/3",
        "I would say this",
    ]
    ledger = read_rows(tmp_path / "ledger.jsonl")
    assert [row["seq"] for row in ledger] == list(range(1, store.head().seq + 1))
    assert ledger[-1]["hash"] == store.head().hash


def test_a_strength_is_a_margin_where_every_pair_has_one(store, tmp_path):
    ids = [add_question(store, f"run/{i}", texts=("yes", "no")) for i in range(3)]
    for strength, item in enumerate(ids[:2], start=1):
        record_ranking(store, item, "0>1", strength=strength)
    export_votes(store, "p", tmp_path)
    assert [row["margin"] for row in read_rows(tmp_path / "preferences.jsonl")] == [1.0, 2.0]
    record_ranking(store, ids[2], "1>0")
    (tmp_path / "again").mkdir()
    export_votes(store, "p", tmp_path / "again")
    assert not any("margin" in row for row in read_rows(tmp_path / "again" / "preferences.jsonl"))


def test_an_answer_that_was_sampled_twice_is_neither_good_nor_bad(store, tmp_path):
    record_ranking(store, add_question(store, texts=("same", "mid", "same")), "0>1>2")
    record_ranking(store, add_question(store, "run/1", texts=("same", "mid", "other")), "0>1>2")
    export_votes(store, "p", tmp_path)
    rows = read_rows(tmp_path / "unpaired.jsonl")
    assert [(row["completion"][0]["content"], row["label"]) for row in rows] == [("same", True), ("other", False)]


def test_simulated_rankings_leave_only_when_asked_for(store, tmp_path):
    record_ranking(store, add_question(store), "0>1>2", source="simulated")
    with pytest.raises(InputError, match="simulated"):
        export_votes(store, "p", tmp_path)
    assert export_votes(store, "p", tmp_path, VoteSelection(allow_simulated=True))["preferences.jsonl"] == 3


# Backups


def fill_store(store):
    add_question(store, "q/0", project="q")
    configure_project(store, "p", {"overlap": 2, "attributes": ["helpful"]})
    publish_guidelines(store, "p", "# Be fair")
    for i in range(3):
        add_question(store, f"run/{i}")
    queue = AssignmentQueue(store, "p")
    task = queue.take("ann")
    _, held_task = cast_vote(queue, "ann", task, "k", build_judgement(task.item.id, "0>1>2", rationale="wär schön"))
    queue.save_draft("ann", held_task.token, {"rationale": "half"})
    store.erase_content(
        "p", next(item.id for item in store.items("p") if item.id not in (task.item.id, held_task.item.id))
    )
    return held_task


def test_simulated_rankings_say_by_what_they_were_made_and_files_keep_it(store, tmp_path):
    for n, scorer in enumerate(("vader", "")):
        record_ranking(
            store, add_question(store, f"run/{n}"), "0>1>2", source="simulated" if scorer else "human", scorer=scorer
        )
    export_votes(store, "p", tmp_path, VoteSelection(allow_simulated=True))
    for name in ("preferences.jsonl", "implicit.jsonl", "rankings.jsonl"):
        preferences = read_preferences(tmp_path / name)
        assert [(pair.source, pair.scorer) for pair in preferences] == [("simulated", "vader")] * 3 + [
            ("human", "")
        ] * 3, name
    ledger = (tmp_path / "ledger.jsonl").read_text()
    assert ledger.count("vader") == 1


def test_a_backup_replaces_nothing_and_is_for_its_owners_eyes(store, tmp_path):
    fill_store(store)
    write_store_backup(store, tmp_path / "b.jsonl.gz")
    assert (tmp_path / "b.jsonl.gz").stat().st_mode & 0o777 == 0o600
    before = (tmp_path / "b.jsonl.gz").read_bytes()
    with pytest.raises(InputError, match="there is such a file already"):
        write_store_backup(store, tmp_path / "b.jsonl.gz")
    assert (tmp_path / "b.jsonl.gz").read_bytes() == before


@pytest.mark.parametrize("into", ["sqlite", "postgresql"])
def test_a_backup_is_the_store_in_either_kind_of_database(store, tmp_path, request, into):
    held_task = fill_store(store)
    summary = write_store_backup(store, tmp_path / "b.jsonl.gz")
    assert (summary["seq"], summary["hash"]) == (store.head().seq, store.head().hash)
    assert [path.name for path in tmp_path.glob("b.*")] == ["b.jsonl.gz"]
    url = f"sqlite:///{tmp_path / 'other.db'}"
    if into == "postgresql":
        url = create_schema(request.getfixturevalue("postgres"), f"r{tmp_path.name[-20:]}".lower().replace("-", "_"))
    with Store.open(url) as restored:
        assert restore_store(restored, tmp_path / "b.jsonl.gz") == store.head() == restored.verify()
        assert restored.rankings("p") == store.rankings("p")
        assert restored.key("p") == store.key("p") is not None  # the key is restored, so its data sets stay comparable
        assert list(restored.items("q")) == list(store.items("q"))
        task = AssignmentQueue(restored, "p").take("ann")
        assert (task.token, task.draft) == (held_task.token, {"rationale": "half"})
        with pytest.raises(InputError, match="not empty"):
            restore_store(restored, tmp_path / "b.jsonl.gz")
        with pytest.raises(InputError, match="stands"):
            record_ranking(restored, restored.rankings("p")[0].item, "0>1>2", annotator="ann")


def test_a_backup_is_taken_of_one_moment_while_people_work(store, tmp_path, monkeypatch):
    fill_store(store)
    head = store.head()
    verify = Store.verify

    def verify_while_someone_adds(self, expected=None):
        verified_head = verify(self, expected)
        if not additions:
            additions.append(True)
            import threading

            thread = threading.Thread(target=lambda: add_question(store, "meanwhile"))
            thread.start()
            thread.join()
        return verified_head

    additions: list[bool] = []
    monkeypatch.setattr(Store, "verify", verify_while_someone_adds)
    write_store_backup(store, tmp_path / "b.jsonl.gz")
    assert store.head().seq == head.seq + 1
    with Store.open(f"sqlite:///{tmp_path / 'other.db'}") as restored:
        assert restore_store(restored, tmp_path / "b.jsonl.gz") == head


def test_what_was_tampered_with_is_not_backed_up(store, tmp_path):
    fill_store(store)
    tamper(store, "UPDATE candidates SET text = 'forged' WHERE position = 0")
    with pytest.raises(CorruptFile):
        write_store_backup(store, tmp_path / "b.jsonl.gz")
    assert list(tmp_path.glob("b.*")) == []


def test_a_backup_that_was_cut_or_changed_restores_nothing(store, tmp_path):
    fill_store(store)
    write_store_backup(store, tmp_path / "b.jsonl.gz")
    lines = gzip.decompress((tmp_path / "b.jsonl.gz").read_bytes()).decode().splitlines()
    forged = [line.replace('\\"content\\":\\"question', '\\"content\\":\\"forged') for line in lines]
    assert forged != lines
    for name, broken, error in (
        ("cut", lines[:-5], "cut short"),
        ("less", [*lines[:-5], *lines[-4:]], "cut short"),
        ("forged", forged, "its sha256 differs"),
        ("strange", [*lines[:3], '{"table": "users", "row": {}}', *lines[3:]], "no row of a table"),
        ("older", [json.dumps(json.loads(lines[0]) | {"schema_version": 1}), *lines[1:]], "has schema_version 1, and"),
        ("other", ["{}", *lines[1:]], "no backup"),
    ):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(broken) + "\n")
        with Store.open(f"sqlite:///{tmp_path / name}.db") as restored:
            with pytest.raises(InputError, match=error):
                restore_store(restored, tmp_path / f"{name}.jsonl")
            assert restored.head().seq == 0
            assert query_rows(restored, "SELECT count(*) FROM candidates") == [(0,)]
    data = (tmp_path / "b.jsonl.gz").read_bytes()
    (tmp_path / "torn.jsonl.gz").write_bytes(data[: len(data) // 2])
    with Store.open(f"sqlite:///{tmp_path / 'torn.db'}") as restored, pytest.raises(CorruptFile, match="unpacked"):
        restore_store(restored, tmp_path / "torn.jsonl.gz")
