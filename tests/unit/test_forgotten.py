"""Forgetting in parts: the texts that are found, the order in which runs are repeated, and gates on stale runs."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from annotation_store import add_question, record_ranking
from json_lines import write_rows
from synthetic_runs import build_run_input, find_record, query_refs, write_run_folder

from align.annotate.store import Store
from align.annotate.store.erasure import erase_target, find_erasure_target
from align.core.errors import InputError
from align.registry.forget_selection import MAY_HAVE, TRAINED
from align.registry.forgetting import StaleRun, list_unfinished, make_receipt, plan_repeats, sort_by_lineage
from align.registry.forgotten_texts import FEW, ForgottenTexts, RowMarks, iter_matches, read_without_texts
from align.registry.gates import Finding, read_gate
from align.registry.index import query_index
from align.registry.promotion import make_subject
from align.run.alias_log import AliasTarget
from align.run.manifest import Input, read_manifest
from align.run.stale import FILE, mark_stale, read_stale_mark
from align.serve.adapter_folders import warn_if_stale

LONG = "Ottilie lives at the old mill\nby the river, and has done so for a good many years now"
CUT = " ".join(LONG.split())[:59] + "…"


def build_overrides(config: Any, inputs: Any) -> list[str]:
    return [f"stage={config['stage']['name']}", *(f"{name}={ref}" for name, ref in inputs.items()), "run.name=x"]


def plan_reruns(root: Path, read: dict[str, str], *sets: str) -> list[StaleRun]:
    return query_index(
        root, lambda index: plan_repeats(index, read, sets, build_overrides, "store.url=sqlite:///a b.db")
    )


@pytest.mark.parametrize("others", [(), tuple(f"another text, number {i}" for i in range(FEW))])
def test_which_lines_go(tmp_path: Path, others: tuple[str, ...]) -> None:
    texts = ForgottenTexts(frozenset({LONG, "no.", *others}), frozenset({"And you?"}), frozenset({"ann@example.org"}))
    stays = [{"answer": "no."}, {"answer": "no. never"}, {"prompt": "And you?", "answer": "yes"}, {"who": "Ann"}]
    goes = [
        {"prompt": [{"content": f"  {LONG} "}]},
        {"parts": [{"text": f"<s>{LONG}</s>"}]},
        {"answer": CUT},
        {"prompt": "And you?", "answer": "no.\n"},
        {"of": "vote by ann@example.org"},
    ]
    path = write_rows(tmp_path / "samples.jsonl", [*stays, *goes])
    remaining, count = read_without_texts(path, texts)
    assert remaining is not None
    assert [json.loads(line) for line in remaining.splitlines()] == stays
    assert count == len(goes)
    log = tmp_path / "log.txt"
    log.write_text(f"began\n  And you? → {CUT}\nno.\n")
    assert read_without_texts(log, texts) == (b"began\nno.\n", 1)
    page = tmp_path / "page.html"
    page.write_text("<p>Ottilie lives at the old mill\nby the river, and has done so for a good many years now</p>")
    assert read_without_texts(page, texts) == (None, 1)
    about = tmp_path / "about.json"
    about.write_text(json.dumps({"said": [LONG, 3], "n": {"x": "no."}}))
    remaining, count = read_without_texts(about, texts)
    assert remaining is not None
    assert (json.loads(remaining), count) == ({"said": ["(forgotten)", 3], "n": {"x": "no."}}, 1)
    cut = tmp_path / "cut.jsonl"
    cut.write_text(json.dumps({"answer": "no."}) + '\n{"answer": "' + LONG[:29])
    assert read_without_texts(cut, texts) == (b'{"answer": "no."}\n', 1)


def test_what_another_row_has_too_is_no_sign(tmp_path: Path) -> None:
    both = ForgottenTexts(frozenset({LONG}), frozenset()) | ForgottenTexts(
        frozenset({"something of its own"}), frozenset({LONG})
    )
    path = write_rows(tmp_path / "samples.jsonl", [{"answer": LONG}, {"answer": "something of its own"}])
    assert read_without_texts(path, both)[1] == 1
    assert [match.file for match in iter_matches(tmp_path, both)] == ["samples.jsonl"]
    assert [*iter_matches(tmp_path, ForgottenTexts())] == []


def test_the_order_and_the_commands(tmp_path: Path) -> None:
    write_run_folder(tmp_path, "sft:a b", day=5)  # later than its children, as after a clock was set back
    write_run_folder(tmp_path, "reward:r", {"init": "sft:a b"}, day=1)
    write_run_folder(tmp_path, "ppo:p", {"init": "sft:a b", "reward": "reward:r"}, day=2)
    write_run_folder(tmp_path, "ppo:p-2", day=3)
    write_run_folder(tmp_path, "eval:e", {"artifact": "ppo:p"}, day=4)
    write_run_folder(tmp_path, "sft:apart")
    stale_runs = plan_reruns(tmp_path, {"sft:a b": TRAINED, "eval:e": MAY_HAVE})
    assert [stale.run for stale in stale_runs] == ["sft:a b", "reward:r", "ppo:p", "eval:e"]
    by_run = {stale.run: stale for stale in stale_runs}
    assert by_run["eval:e"].because == "made from ppo:p"
    assert by_run["ppo:p"].again == "ppo:p-3"  # p-2 is taken
    assert by_run["ppo:p"].command == (
        f"python -m align stage=ppo 'init=sft:a b-2' reward=reward:r-2 run.root={tmp_path} run.name=p-3"
    )
    circle = tmp_path / "circle"
    write_run_folder(circle, "ppo:one", {"init": "ppo:other"})
    write_run_folder(circle, "ppo:other", {"init": "ppo:one"})
    assert {stale.run for stale in plan_reruns(circle, {"ppo:one": TRAINED})} == {"ppo:one", "ppo:other"}
    (circle / "ppo" / "other" / "manifest.json").write_text("{")
    assert [stale.run for stale in plan_reruns(circle, {"ppo:one": TRAINED, "ppo:gone": TRAINED})] == ["ppo:one"]


def test_a_long_chain_of_runs_is_ordered_by_its_parents() -> None:
    runs = [f"sft:{i}" for i in range(5000)]
    parents = {run: [runs[i - 1]] if i else [] for i, run in enumerate(runs)}
    records = {run: {"started": f"{9999 - i}", "parents": parents[run]} for i, run in enumerate(runs)}
    assert sort_by_lineage(records) == runs


def test_parents_come_first_by_name_and_a_circle_is_broken_at_its_first_run() -> None:
    parents = {"ppo:p": ["sft:b", "sft:a", "sft:gone"], "sft:a": ["data:d"], "sft:b": ["data:d"], "data:d": []}
    records = {run: {"started": run, "parents": names} for run, names in parents.items()}
    assert sort_by_lineage(records) == ["data:d", "sft:a", "sft:b", "ppo:p"]
    circle = {"a:1": ["a:3"], "a:2": ["a:1"], "a:3": ["a:2"]}
    assert sort_by_lineage({run: {"started": run, "parents": names} for run, names in circle.items()}) == [
        "a:2",
        "a:3",
        "a:1",
    ]


def test_a_mark_is_found_at_once_and_goes_with_its_folder(tmp_path: Path) -> None:
    folder = write_run_folder(tmp_path, "sft:a")
    assert find_record(tmp_path, "sft:a")["stale"] is None
    mark_stale(folder, TRAINED, "python -m align …", "first", "2026-11-01T00:00:00+00:00")
    assert find_record(tmp_path, "sft:a")["stale"] == "2026-11-01T00:00:00+00:00"
    mark_stale(folder, "another reason", "", "second", "2026-11-02T00:00:00+00:00")
    mark = read_stale_mark(folder)
    assert mark is not None
    assert (mark.since[:10], mark.because, mark.receipts) == ("2026-11-01", TRAINED, ("first", "second"))
    write_run_folder(tmp_path, "sft:b", day=1)
    assert query_refs(tmp_path, {"stale": "!=null"}) == ["sft:a"]
    (folder / FILE).write_text("[")
    assert find_record(tmp_path, "sft:a")["stale"] == "an unknown time"
    (folder / FILE).unlink()
    assert query_refs(tmp_path, {"stale": None}) == ["sft:a", "sft:b"]


def test_a_server_says_that_it_loads_what_is_stale(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_run_folder(tmp_path, "ppo:p")
    warn_if_stale("ppo:p", folder / "artifact")
    assert caplog.messages == []
    mark_stale(folder, TRAINED, "", "x", "2026-11-01T00:00:00+00:00")
    warn_if_stale("ppo:p", folder / "artifact")
    assert caplog.messages == [f"ppo:p is stale since 2026-11-01, {TRAINED}"]


def test_what_the_store_has_of_one_thing(store_url: str) -> None:
    with Store.open(store_url) as store:
        items = [add_question(store, f"run/{i}", texts=(f"answer {i}", "the same")) for i in range(2)]
        first = record_ranking(store, items[0], "0>1", rationale="for it is mine")
        second = record_ranking(store, items[1], "1>0")
        store.retract("p", second)
        target = find_erasure_target(store, "p", "item", items[0])
        assert target.texts == {"question of run/0", "answer 0", "for it is mine"}
        assert target.shared == {"the same"}
        assert [target.was_read_at(seq) for seq in (first - 1, first, first + 99)] == [False, True, True]
        assert target.rows == {"item": 1, "answer": 2, "judgement": 1, "remark": 1}
        ann = find_erasure_target(store, "p", "annotator", "ann@example.org")
        assert ann == find_erasure_target(store, "p", "annotator", ann.id)
        assert [ann.was_read_at(seq) for seq in (first - 1, first)] == [False, True]
        assert not find_erasure_target(store, "p", "item", items[1]).was_read_at(
            second + 1
        )  # the vote was retracted by then
        assert ann.rows == {"name": 1, "judgement": 1, "remark": 1}
        erase_target(store, ann)
        assert store.rankings("p") == []
        with pytest.raises(InputError, match="has no such annotator"):
            find_erasure_target(store, "p", "annotator", "ann@example.org")
        gone = find_erasure_target(store, "p", "annotator", ann.id)
        assert not any(gone.rows.values())
        erase_target(store, gone)
        erase_target(store, find_erasure_target(store, "p", "item", items[0]))
        assert not any(find_erasure_target(store, "p", "item", items[0]).rows.values())
        erase_target(store, find_erasure_target(store, "p", "project", ""))
        assert not any(find_erasure_target(store, "p", "project", "").rows.values())
        assert store.verify()


def evaluate_gate(root: Path, ref: str) -> Finding:
    path = root / "gate.yaml"
    path.write_text("alias: live\nconditions:\n  - {stale: false}\n")
    digest = read_manifest(root / ref.replace(":", "/")).digest
    (finding,) = read_gate(path).check_artifact(
        query_index(root, lambda index: make_subject(index, root, AliasTarget(ref, digest)))
    )
    return finding


def test_a_gate_looks_at_everything_upstream(tmp_path: Path) -> None:
    data_set_fields = {"metrics": {"root": "r" * 64}, "base": None, "outputs": {"artifact/data.json": "d" * 64}}
    write_run_folder(tmp_path, "data:old", **data_set_fields)
    write_run_folder(tmp_path, "sft:s", {"data": Input("x", "data:old", details={"root": "r" * 64})}, day=1)
    write_run_folder(tmp_path, "reward:r", {"init": "sft:s"}, day=2)
    write_run_folder(tmp_path, "ppo:p", {"reward": "reward:r"}, day=3)
    assert evaluate_gate(tmp_path, "ppo:p").passed
    mark_stale(tmp_path / "data" / "old", TRAINED, "", "x", "2026-11-01T00:00:00+00:00")
    assert evaluate_gate(tmp_path, "ppo:p").said == f"data:old is stale since 2026-11-01, {TRAINED}"
    config = {"stage": {"name": "data", "action": "forget"}, "data": {}, "method": {}}
    write_run_folder(
        tmp_path,
        "data:new",
        {"data": Input("x", "data:old", details={"root": "r" * 64})},
        config=config,
        base=None,
        metrics={"root": "n" * 64},
        outputs={"artifact/data.json": "n" * 64},
        day=4,
    )
    write_run_folder(tmp_path, "sft:new", {"data": Input("y", "data:new", details={"root": "n" * 64})}, day=5)
    assert evaluate_gate(tmp_path, "sft:new").passed  # its data set no longer has the forgotten rows
    assert [stale.run for stale in plan_reruns(tmp_path, {"data:old": TRAINED})] == [
        "data:old",
        "sft:s",
        "reward:r",
        "ppo:p",
    ]
    write_run_folder(tmp_path, "ppo:lost", {"init": build_run_input(tmp_path, "sft:gone")}, day=6)
    assert not evaluate_gate(tmp_path, "ppo:lost").passed
    assert "sft:gone no longer exists" in evaluate_gate(tmp_path, "ppo:lost").said


def test_a_receipt_is_known_by_its_command_alone(tmp_path: Path) -> None:
    (tmp_path / "forgotten").mkdir()
    request = ("annotator", "ann@example.org", "p", "sqlite:///x")
    receipt = make_receipt("annotator", "me", request).write(tmp_path)
    (tmp_path / "forgotten" / "strange.json").write_text('{"schema_version": 1, "odd": 2}')
    (unfinished,) = list_unfinished(tmp_path)
    assert unfinished.is_unfinished_for(request)
    assert not unfinished.is_unfinished_for((*request[:-1], "sqlite:///y"))
    assert "ann" not in (tmp_path / "forgotten" / f"{receipt.name}.json").read_text().replace("annotator", "")
    unfinished.end(tmp_path)
    assert list_unfinished(tmp_path) == []


def test_files_of_models_and_exports_are_named_and_stay(tmp_path: Path) -> None:
    texts = ForgottenTexts(frozenset({LONG}), names=frozenset({"martha"}))
    adapter = {"base_model_name_or_path": "/home/martha/base", "note": LONG}
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "receipt.json").write_text("{}")
    (tmp_path / "export" / "README.md").write_text(f"{LONG}\n")
    (tmp_path / "README.md").write_text(f"by martha\n{LONG}\n")
    (tmp_path / "link.md").symlink_to(tmp_path / "README.md")
    (tmp_path / "about.json").write_text(json.dumps({"path": "/home/martha/x"}))
    matches = {match.file: (match.lines, match.stays) for match in iter_matches(tmp_path, texts)}
    assert matches == {
        "adapter_config.json": (1, True),
        "export/README.md": (1, True),
        "README.md": (2, False),
        "link.md": (2, True),
    }


FORMS = {
    "a.txt": "Ottilie said:\n  lives at the\n  OLD mill, by the river\n",
    "b.csv": 'id,text\n1,"she said ""lives at the old mill"" twice"\n',
    "c.yaml": "text: >-\n  lives at the old\n  mill, by the river\n",
    "d.json": json.dumps({'she said "lives at the old mill" twice': 1}),
    "e.jsonl": json.dumps({"arguments": json.dumps({"q": 'she said "lives at the old mill" twice'})}) + "\n",
    "f.html": "<p>lives at the <b>old</b> mill, by the<br>river</p>",
    "g": "lives at the old mill, by the river",
    "h.log": repr('she said "lives at the old mill" twice\n') + "\n",
}


@pytest.mark.parametrize("name", FORMS)
def test_texts_are_found_as_files_hold_them(tmp_path: Path, name: str) -> None:
    texts = frozenset({"lives at the old mill, by the river", 'she said "lives at the old mill" twice'})
    (tmp_path / name).write_text(FORMS[name])
    assert [match.file for match in iter_matches(tmp_path, ForgottenTexts(texts))] == [name]
    remaining, _ = read_without_texts(tmp_path / name, ForgottenTexts(texts))
    assert remaining is None or b"old" not in remaining.lower()


def test_rows_of_votes_are_known_whatever_they_say(tmp_path: Path) -> None:
    marks = RowMarks("a1", "", frozenset({7}))
    write_rows(
        tmp_path / "preferences.jsonl",
        [{"annotator": "a1", "id": "3:x"}, {"annotator": "b", "id": "7:x"}, {"id": "8:x"}],
    )
    assert read_without_texts(tmp_path / "preferences.jsonl", ForgottenTexts(marks=marks))[1] == 2
    write_rows(tmp_path / "ledger.jsonl", [{"seq": 7, "annotator": "a1", "prev_hash": "h"}])
    assert read_without_texts(tmp_path / "ledger.jsonl", ForgottenTexts(marks=marks))[1] == 0
    item = RowMarks(item="i1")
    write_rows(
        tmp_path / "held_out.jsonl",
        [{"group": "i1"}, {"item": "i1"}, {"group_id": "i1"}, {"group": "i2"}, {"id": "i1"}],
    )
    assert read_without_texts(tmp_path / "held_out.jsonl", ForgottenTexts(marks=item))[1] == 3


def test_many_texts_that_begin_alike_take_no_time(tmp_path: Path) -> None:
    texts = ForgottenTexts(frozenset(f"Write a story about the number {i} and its friends" for i in range(20_000)))
    lines = [{"prompt": f"Write a story about the number {i} and its friends"} for i in range(19_990, 20_300)]
    began = time.monotonic()
    assert read_without_texts(write_rows(tmp_path / "many.jsonl", lines), texts)[1] == 10
    assert time.monotonic() - began < 5


def test_what_a_set_is_made_from_counts_though_rows_of_it_were_forgotten(tmp_path: Path) -> None:
    """Lineage: sft:s → data:d → data:d2, which forgets another row → sft:t."""
    write_run_folder(tmp_path, "sft:s")
    root = {"root": "r" * 64, "train_rows": 9}
    write_run_folder(
        tmp_path, "data:d", {"sources.a": "sft:s"}, metrics=root, base=None, outputs={"artifact/data.json": "d"}, day=1
    )
    forgets = {"stage": {"name": "data", "action": "forget"}, "data": {}, "method": {}}
    second = {"metrics": {"root": "s" * 64, "train_rows": 8}, "outputs": {"artifact/data.json": "e"}}
    read = {"data": Input("d", "data:d", details={"root": "r" * 64})}
    write_run_folder(tmp_path, "data:d2", read, base=None, day=2, config=forgets, **second)
    write_run_folder(tmp_path, "sft:t", {"data": Input("e", "data:d2", details={"root": "s" * 64})}, day=3)
    assert [stale.run for stale in plan_reruns(tmp_path, {"sft:s": TRAINED})] == ["sft:s", "data:d", "data:d2", "sft:t"]
    assert [stale.run for stale in plan_reruns(tmp_path, {"data:d": TRAINED})] == ["data:d"]
    mark_stale(tmp_path / "data" / "d", TRAINED, "", "x", "2026-11-01")
    assert evaluate_gate(tmp_path, "sft:t").passed
    mark_stale(tmp_path / "sft" / "s", TRAINED, "", "x", "2026-11-01")
    assert not evaluate_gate(tmp_path, "sft:t").passed


@pytest.mark.parametrize(
    "receipt",
    [
        {"salt": "é", "check": "é"},
        {"salt": 5},
        {"files": {"../../x": {}}},
        {"runs": {"../x": {}}},
        {"data": {"a:..": {}}},
        {"files": 3},
    ],
)
def test_a_receipt_that_nobody_here_wrote_is_passed_over(tmp_path: Path, receipt: dict[str, Any]) -> None:
    (tmp_path / "forgotten").mkdir()
    fields = {"schema_version": 1, "name": "../x", "at": "", "who": "", "kind": "item", "salt": "s", "check": "c"}
    (tmp_path / "forgotten" / "a.json").write_text(json.dumps(fields | receipt))
    os.mkfifo(tmp_path / "forgotten" / "b.json")
    assert list_unfinished(tmp_path) == []
    (tmp_path / "forgotten" / "a.json").write_text(json.dumps(fields))
    assert [unfinished.name for unfinished in list_unfinished(tmp_path)] == ["a"]


def test_a_mark_that_is_no_file_or_says_nothing_is_a_mark(tmp_path: Path) -> None:
    for name, create in {
        "folder": lambda path: path.mkdir(),
        "pipe": os.mkfifo,
        "link": lambda path: path.symlink_to("nowhere"),
        "empty": lambda path: path.write_text("{}"),
        "null": lambda path: path.write_text('{"since": null}'),
    }.items():
        create(write_run_folder(tmp_path, f"sft:{name}") / FILE)
        assert find_record(tmp_path, f"sft:{name}")["stale"] == "an unknown time"
        assert not evaluate_gate(tmp_path, f"sft:{name}").passed
