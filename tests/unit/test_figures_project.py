"""Everything at once: out of a store, into JSON, into plots."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from annotation_store import add, ask, rank
from sqlalchemy.event import listen
from votes import voted

from align.annotate.figures import compute_figures, plots
from align.annotate.figures.project import SECONDS_EDGES, ProjectView, count_per_day, list_disagreements, read_view
from align.annotate.store import Candidate, Judgement, Store, configure
from align.core.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
PLOTS = (plots.plot_per_day, plots.plot_seconds, plots.plot_position, plots.plot_length)


@pytest.fixture
def store(store_url):
    with Store.open(store_url) as store:
        yield store


def filled(store) -> dict[str, str]:
    """Items that two agree on, contradict each other on, differ on by a tie; skipped, erased, gold, taken back."""
    names = ("agreed", "opposed", "half", "tied", "alone", "erased", "skipped", "untouched")
    items = {name: add(store, f"run/{name}", texts=("long one", "mid", "s")) for name in names}
    items["gold"] = store.add_item("p", "gold", ask(), [Candidate("good"), Candidate("bad")], expected=[[0], [1]])
    orders = {
        "agreed": ("0>1>2", "0>1>2"),
        "opposed": ("0>1>2", "2>1>0"),
        "half": ("0>1>2", "0>2>1"),
        "tied": ("0>1>2", "0>12"),
        "erased": ("0>1>2", "2>1>0"),
        "gold": ("0>1", "1>0"),
    }
    for name, said in orders.items():
        for who, order in zip(("ann", "bob"), said, strict=True):
            screen = tuple(f"{items[name]}-{k}" for k in range(order.count(">") + 1 if "12" not in order else 3))
            rank(store, items[name], order, who, seconds=12, display_order=screen)
    back = rank(store, items["alone"], "2>1>0", "bob")
    rank(store, items["alone"], "0>1>2", "ann")
    store.retract("p", back)
    rank(store, items["alone"], "0>1>2", "bot", source="simulated")
    store.record("p", items["skipped"], Judgement(skipped="broken"), annotator="ann", key="skip")
    store.erase_content("p", items["erased"])
    return items


def test_the_totals(store):
    configure(store, "p", {"overlap": 2})
    filled(store)
    totals = compute_figures(store, "p")["totals"]
    assert totals["rankings"] == 12
    assert (totals["by_people"], totals["simulated"]) == (11, 1)
    assert totals["by_purpose"] == {"work": 10, "gold": 2, "repeat": 0, "review": 0}
    assert (totals["items"], totals["items_done"], totals["gold_items"]) == (7, 4, 1)
    assert totals["skips"] == {"unsure": 0, "language": 0, "broken": 1, "harmful": 0, "other": 0}
    assert totals["retracted"] == 1
    assert totals["ties"]["value"] == pytest.approx(1 / 32)


def test_agreement_is_of_what_stands_and_is_work(store):
    """By hand: agreed 3 of 3, opposed 0, half 2, tied 2, alone (with the simulated one) 3 of 3."""
    filled(store)
    found = compute_figures(store, "p")
    agreement = found["agreement"]
    assert (agreement["items"], agreement["pairs"]) == (5, 15)
    assert agreement["raw"]["value"] == pytest.approx(10 / 15)
    # Of 30 values four are +1 (opposed, half), one is 0 (tied) and 25 are −1; five units, of two values each, differ.
    by_chance = 2 * (25 * 4 + 25 * 1 + 4 * 1) / 29
    assert agreement["alpha"]["value"] == pytest.approx(1 - 10 / by_chance)
    assert agreement["alpha_strength"] == "undefined (no item has two strengths)"
    assert agreement["kappas"] == []


def test_disagreements_come_with_the_most_contradicted_first(store):
    items = filled(store)
    found = compute_figures(store, "p")["disagreements"]
    assert [(row["item"], row["contradictions"]) for row in found] == [(items["opposed"], 3), (items["half"], 1)]
    votes = {vote.seq: vote for vote in store.rankings("p")}
    assert [votes[said["seq"]].item for said in found[0]["votes"]] == [items["opposed"]] * 2
    assert [said["annotator"] for said in found[0]["votes"]] == [store.pseudonym("p", who) for who in ("ann", "bob")]
    assert list_disagreements([]) == []


def test_strengths_of_two_answers(store):
    for n, (mine, theirs) in enumerate([("0>1", "0>1"), ("1>0", "1>0"), ("0>1", "1>0")]):
        item = add(store, f"run/{n}", texts=("a", "b"))
        rank(store, item, mine, "ann", strength=3)
        rank(store, item, theirs, "bob", strength=1)
    agreement = compute_figures(store, "p")["agreement"]
    assert agreement["alpha_strength"]["n"] == 3
    assert agreement["alpha_strength"]["value"] != agreement["alpha"]["value"]


def test_unanimous_annotators(store):
    for n in range(12):
        item = add(store, f"run/{n}")
        for who in ("ann", "bob"):
            rank(store, item, "0>1>2", who)
    agreement = compute_figures(store, "p")["agreement"]
    assert agreement["alpha"] == "undefined (unanimous)"
    assert agreement["raw"]["value"] == 1.0
    assert agreement["kappas"][0]["direction"] == "undefined (unanimous)"


def test_a_single_annotator(store):
    rank(store, add(store), "0>1>2", "ann", seconds=3)
    found = compute_figures(store, "p")
    alone = "undefined (nobody judged the same item)"
    assert found["agreement"]["alpha"] == found["agreement"]["raw"] == alone
    assert found["seconds"]["median"] == 3
    assert len(found["people"]) == 1


def test_a_project_without_anything(store):
    configure(store, "p", {})
    found = compute_figures(store, "p")
    assert found["totals"]["rankings"] == found["totals"]["items"] == found["hours"]["total"] == 0
    assert found["position"] == dict.fromkeys(("share", "log_odds"), "undefined (nothing to count)")
    assert found["seconds"]["median"] == "undefined (not measured)"
    assert found["people"] == found["per_day"] == found["disagreements"] == []


def test_an_unknown_project_is_refused(store):
    with pytest.raises(InputError, match="no such project"):
        compute_figures(store, "nope")


def test_another_project_is_another(store):
    rank(store, add(store), "0>1>2", "ann")
    before = compute_figures(store, "p")
    other = add(store, "run/0", project="q")
    store.record("q", other, Judgement(tuple((f"{other}-{k}",) for k in range(3))), annotator="bob", key="q")
    assert compute_figures(store, "p") == before


def test_json_has_no_nan_and_nothing_else_that_is_not_json(store):
    filled(store)
    found = compute_figures(store, "p")
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert compute_figures(store, "p") == found


def test_one_view_for_everything(store):
    """Whatever is read is read in one transaction, and the number of queries does not grow with the items."""
    filled(store)
    queries: list[str] = []
    with store.reading() as db:
        listen(db, "before_cursor_execute", lambda c, cursor, text, *_: queries.append(text))
        compute_figures(store, "p")
        few = len(queries)
        assert few > 0  # it joined this view
    for n in range(30):
        rank(store, add(store, f"more/{n}"), "0>1>2", "ann")
    with store.reading() as db:
        queries.clear()
        listen(db, "before_cursor_execute", lambda c, cursor, text, *_: queries.append(text))
        compute_figures(store, "p")
    assert len(queries) == few


def test_texts_stay_in_the_database_and_count_characters(store):
    item = add(store, texts=("ä☃𝄞", "four"))
    assert read_view(store, "p").lengths == {f"{item}-0": 3, f"{item}-1": 4}


def test_candidates_are_in_the_order_of_their_positions(store):
    item = add(store, texts=tuple("abcdefghi"))
    assert read_view(store, "p").candidates == {item: tuple(f"{item}-{k}" for k in range(9))}


# Days and seconds


def view(rankings=(), skips=()) -> ProjectView:
    return ProjectView(list(rankings), list(skips), [*rankings, *skips], frozenset(), {}, {}, {}, {}, {}, {})


def test_votes_per_day():
    first, second = "2026-01-01T23:59:59+00:00", "2026-01-03T00:00:00+00:00"
    votes = [replace(voted("i", "0>1", source=source), created_at=when) for source, when in
             (("human", second), ("human", first), ("simulated", first), ("human", first))]  # fmt: skip
    skip = replace(voted("i", "0>1"), tiers=(), skipped="unsure", created_at=second)
    assert count_per_day(view(votes, [skip])) == [
        {"day": "2026-01-01", "people": 2, "simulated": 1, "skips": 0},
        {"day": "2026-01-03", "people": 1, "simulated": 0, "skips": 1},
    ]


def test_seconds(store):
    for n, taken in enumerate((1, 2, 4.9, 5, 700)):
        rank(store, add(store, f"run/{n}"), "0>1>2", "ann", seconds=taken)
    found = compute_figures(store, "p")["seconds"]
    assert (found["n"], found["lower_quartile"], found["median"], found["upper_quartile"]) == (5, 2, 4.9, 5)
    counts = {row["from"]: row["count"] for row in found["histogram"] if row["count"]}
    assert counts == {0: 1, 2: 2, 5: 1, 600: 1}
    assert found["histogram"][-1]["below"] is None
    assert len(found["histogram"]) == len(SECONDS_EDGES)


# Plots


@pytest.mark.parametrize("plot", PLOTS)
@pytest.mark.parametrize("full", [True, False])
def test_plots_are_drawn_from_the_json(store, plot, full):
    configure(store, "p", {})
    if full:
        filled(store)
    found = json.loads(json.dumps(compute_figures(store, "p")))
    drawn = plot(found)
    assert ElementTree.fromstring(drawn).tag.endswith("svg")
    assert plot(found) == drawn  # no date, no random ids


def test_a_plot_names_no_identity(store):
    filled(store)
    found = compute_figures(store, "p")
    for person in found["people"]:
        person["identity"] = "SOMEBODY"
    assert plots.plot_position(found) == plots.plot_position(compute_figures(store, "p"))


def test_what_the_figures_load():
    """A dashboard answers at once: no torch; and the page is no business of theirs."""
    loaded = "import align.annotate.figures, align.annotate.figures.plots, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", loaded], cwd=ROOT, capture_output=True, text=True, check=True)
    heavy = {"torch", "transformers", "pandas", "sklearn", "matplotlib.pyplot", "align.annotate.web"}
    assert not heavy & set(done.stdout.split())
