"""All figures of a project: read out of a store, as JSON, and in plots."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from annotation_store import add_question, build_prompt, record_ranking
from sqlalchemy.event import listen
from votes import build_vote

from align.annotate.figures import compute_figures, plots
from align.annotate.figures.project import SECONDS_EDGES, ProjectView, count_per_day, list_disagreements, read_view
from align.annotate.store import Candidate, Judgement, Store, configure_project
from align.core.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
PLOTS = (plots.plot_per_day, plots.plot_seconds, plots.plot_position, plots.plot_length)


@pytest.fixture
def store(store_url):
    with Store.open(store_url) as store:
        yield store


def fill_project(store) -> dict[str, str]:
    """Add items with agreement, contradictions and ties; and skipped, erased, gold and retracted ones."""
    names = ("agreed", "opposed", "half", "tied", "alone", "erased", "skipped", "untouched")
    items = {name: add_question(store, f"run/{name}", texts=("long one", "mid", "s")) for name in names}
    items["gold"] = store.add_item(
        "p", "gold", build_prompt(), [Candidate("good"), Candidate("bad")], expected=[[0], [1]]
    )
    orders = {
        "agreed": ("0>1>2", "0>1>2"),
        "opposed": ("0>1>2", "2>1>0"),
        "half": ("0>1>2", "0>2>1"),
        "tied": ("0>1>2", "0>12"),
        "erased": ("0>1>2", "2>1>0"),
        "gold": ("0>1", "1>0"),
    }
    for name, pair_orders in orders.items():
        for annotator, order in zip(("ann", "bob"), pair_orders, strict=True):
            screen = tuple(f"{items[name]}-{k}" for k in range(order.count(">") + 1 if "12" not in order else 3))
            record_ranking(store, items[name], order, annotator, seconds=12, display_order=screen)
    retracted_seq = record_ranking(store, items["alone"], "2>1>0", "bob")
    record_ranking(store, items["alone"], "0>1>2", "ann")
    store.retract("p", retracted_seq)
    record_ranking(store, items["alone"], "0>1>2", "bot", source="simulated")
    store.record("p", items["skipped"], Judgement(skipped="broken"), annotator="ann", key="skip")
    store.erase_content("p", items["erased"])
    return items


def test_the_totals(store):
    configure_project(store, "p", {"overlap": 2})
    fill_project(store)
    totals = compute_figures(store, "p")["totals"]
    assert totals["rankings"] == 12
    assert (totals["by_people"], totals["simulated"]) == (11, 1)
    assert totals["by_purpose"] == {"work": 10, "gold": 2, "repeat": 0, "review": 0}
    assert (totals["items"], totals["items_done"], totals["gold_items"]) == (7, 4, 1)
    assert totals["skips"] == {"unsure": 0, "language": 0, "broken": 1, "harmful": 0, "other": 0}
    assert totals["retracted"] == 1
    assert totals["ties"]["value"] == pytest.approx(1 / 32)


def test_agreement_is_of_what_stands_and_is_work(store):
    """Agreeing pairs by hand: agreed 3 of 3, opposed 0, half 2, tied 2, alone (with the simulated one) 3 of 3."""
    fill_project(store)
    figures = compute_figures(store, "p")
    agreement = figures["agreement"]
    assert (agreement["items"], agreement["pairs"]) == (5, 15)
    assert agreement["raw"]["value"] == pytest.approx(10 / 15)
    # Of 30 values four are +1 (opposed, half), one is 0 (tied) and 25 are −1; five units, of two values each, differ.
    chance_disagreement = 2 * (25 * 4 + 25 * 1 + 4 * 1) / 29
    assert agreement["alpha"]["value"] == pytest.approx(1 - 10 / chance_disagreement)
    assert agreement["alpha_strength"] == "undefined (no item has two strengths)"
    assert agreement["kappas"] == []


def test_disagreements_come_with_the_most_contradicted_first(store):
    items = fill_project(store)
    disagreements = compute_figures(store, "p")["disagreements"]
    assert [(row["item"], row["contradictions"]) for row in disagreements] == [
        (items["opposed"], 3),
        (items["half"], 1),
    ]
    votes = {vote.seq: vote for vote in store.rankings("p")}
    assert [votes[vote["seq"]].item for vote in disagreements[0]["votes"]] == [items["opposed"]] * 2
    assert [vote["annotator"] for vote in disagreements[0]["votes"]] == [
        store.pseudonym("p", annotator) for annotator in ("ann", "bob")
    ]
    assert list_disagreements([]) == []


def test_strengths_of_two_answers(store):
    for n, (first_order, second_order) in enumerate([("0>1", "0>1"), ("1>0", "1>0"), ("0>1", "1>0")]):
        item = add_question(store, f"run/{n}", texts=("a", "b"))
        record_ranking(store, item, first_order, "ann", strength=3)
        record_ranking(store, item, second_order, "bob", strength=1)
    agreement = compute_figures(store, "p")["agreement"]
    assert agreement["alpha_strength"]["n"] == 3
    assert agreement["alpha_strength"]["value"] != agreement["alpha"]["value"]


def test_unanimous_annotators(store):
    for n in range(12):
        item = add_question(store, f"run/{n}")
        for annotator in ("ann", "bob"):
            record_ranking(store, item, "0>1>2", annotator)
    agreement = compute_figures(store, "p")["agreement"]
    assert agreement["alpha"] == "undefined (unanimous)"
    assert agreement["raw"]["value"] == 1.0
    assert agreement["kappas"][0]["direction"] == "undefined (unanimous)"


def test_a_single_annotator(store):
    record_ranking(store, add_question(store), "0>1>2", "ann", seconds=3)
    figures = compute_figures(store, "p")
    undefined = "undefined (nobody judged the same item)"
    assert figures["agreement"]["alpha"] == figures["agreement"]["raw"] == undefined
    assert figures["seconds"]["median"] == 3
    assert len(figures["people"]) == 1


def test_a_project_without_anything(store):
    configure_project(store, "p", {})
    figures = compute_figures(store, "p")
    assert figures["totals"]["rankings"] == figures["totals"]["items"] == figures["hours"]["total"] == 0
    assert figures["position"] == dict.fromkeys(("share", "log_odds"), "undefined (nothing to count)")
    assert figures["seconds"]["median"] == "undefined (not measured)"
    assert figures["people"] == figures["per_day"] == figures["disagreements"] == []


def test_an_unknown_project_is_refused(store):
    with pytest.raises(InputError, match="no such project"):
        compute_figures(store, "nope")


def test_another_project_is_another(store):
    record_ranking(store, add_question(store), "0>1>2", "ann")
    before = compute_figures(store, "p")
    other_item = add_question(store, "run/0", project="q")
    store.record("q", other_item, Judgement(tuple((f"{other_item}-{k}",) for k in range(3))), annotator="bob", key="q")
    assert compute_figures(store, "p") == before


def test_json_has_no_nan_and_nothing_else_that_is_not_json(store):
    fill_project(store)
    figures = compute_figures(store, "p")
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures
    assert compute_figures(store, "p") == figures


def test_one_view_for_everything(store):
    """All reads happen in one transaction, and the number of queries does not grow with the items."""
    fill_project(store)
    queries: list[str] = []
    with store.reading() as db:
        listen(db, "before_cursor_execute", lambda c, cursor, text, *_: queries.append(text))
        compute_figures(store, "p")
        query_count = len(queries)
        assert query_count > 0  # the figures are read in this transaction
    for n in range(30):
        record_ranking(store, add_question(store, f"more/{n}"), "0>1>2", "ann")
    with store.reading() as db:
        queries.clear()
        listen(db, "before_cursor_execute", lambda c, cursor, text, *_: queries.append(text))
        compute_figures(store, "p")
    assert len(queries) == query_count


def test_texts_stay_in_the_database_and_count_characters(store):
    item = add_question(store, texts=("ä☃𝄞", "four"))
    assert read_view(store, "p").lengths == {f"{item}-0": 3, f"{item}-1": 4}


def test_candidates_are_in_the_order_of_their_positions(store):
    item = add_question(store, texts=tuple("abcdefghi"))
    assert read_view(store, "p").candidates == {item: tuple(f"{item}-{k}" for k in range(9))}


# Days and seconds


def build_view(rankings=(), skips=()) -> ProjectView:
    return ProjectView(
        list(rankings), list(skips), [*rankings, *skips], frozenset(), {}, {}, {}, {}, frozenset(), {}, {}
    )


def test_votes_per_day():
    first = "2026-01-01T23:59:59+00:00"
    second = "2026-01-03T00:00:00+00:00"
    votes = [
        replace(build_vote("i", "0>1", source=source), created_at=created_at)
        for source, created_at in (("human", second), ("human", first), ("simulated", first), ("human", first))
    ]
    skip = replace(build_vote("i", "0>1"), tiers=(), skipped="unsure", created_at=second)
    assert count_per_day(build_view(votes, [skip])) == [
        {"day": "2026-01-01", "people": 2, "simulated": 1, "skips": 0},
        {"day": "2026-01-03", "people": 1, "simulated": 0, "skips": 1},
    ]


def test_seconds(store):
    for n, seconds in enumerate((1, 2, 4.9, 5, 700)):
        record_ranking(store, add_question(store, f"run/{n}"), "0>1>2", "ann", seconds=seconds)
    seconds_figures = compute_figures(store, "p")["seconds"]
    assert (
        seconds_figures["n"],
        seconds_figures["lower_quartile"],
        seconds_figures["median"],
        seconds_figures["upper_quartile"],
    ) == (5, 2, 4.9, 5)
    counts = {row["from"]: row["count"] for row in seconds_figures["histogram"] if row["count"]}
    assert counts == {0: 1, 2: 2, 5: 1, 600: 1}
    assert seconds_figures["histogram"][-1]["below"] is None
    assert len(seconds_figures["histogram"]) == len(SECONDS_EDGES)


# Plots


@pytest.mark.parametrize("plot", PLOTS)
@pytest.mark.parametrize("full", [True, False])
def test_plots_are_drawn_from_the_json(store, plot, full):
    configure_project(store, "p", {})
    if full:
        fill_project(store)
    figures = json.loads(json.dumps(compute_figures(store, "p")))
    svg = plot(figures)
    assert ElementTree.fromstring(svg).tag.endswith("svg")
    assert plot(figures) == svg  # no date, no random ids


def test_a_plot_names_no_identity(store):
    fill_project(store)
    figures = compute_figures(store, "p")
    for person in figures["people"]:
        person["identity"] = "SOMEBODY"
    assert plots.plot_position(figures) == plots.plot_position(compute_figures(store, "p"))


def test_what_the_figures_load():
    """Figures import neither torch, so that a dashboard starts fast, nor the web page."""
    code = "import align.annotate.figures, align.annotate.figures.plots, sys; print(*sys.modules)"
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    heavy = {"torch", "transformers", "pandas", "sklearn", "matplotlib.pyplot", "align.annotate.web"}
    assert not heavy & set(process.stdout.split())
