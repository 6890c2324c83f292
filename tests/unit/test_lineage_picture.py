"""Pictures of a run's ancestors and descendants: their boxes, lines and positions."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_runs import write_run_folder, write_two_policies

from align.core.chain import ChainHead
from align.registry.index import Index
from align.registry.page.lineage import (
    MOST,
    Box,
    Lineage,
    assign_columns,
    build_lineage,
    compute_box_positions,
    draw_lineage,
)
from align.registry.trace import Tracer, Votes


def read_no_votes(project: str, head: ChainHead) -> Votes:
    return Votes()


def test_every_line_of_a_picture_leads_from_left_to_right(tmp_path: Path) -> None:
    with Index(write_two_policies(tmp_path)) as index:
        for run in index.names():
            lineage = build_lineage(index, Tracer(index, read_no_votes).run(run))
            places = compute_box_positions(lineage)
            assert len(set(places.values())) == len(lineage.boxes)
            assert all(places[source][0] < places[target][0] for source, target in lineage.lines)
            assert not any(key[0] == "gone" for key in lineage.boxes) or run == "eval:one"


def test_a_circle_and_a_crowd_are_drawn_in_a_moment(tmp_path: Path) -> None:
    write_run_folder(tmp_path, "sft:a", {"init": "sft:b"})
    write_run_folder(tmp_path, "sft:b", {"init": "sft:a"})
    for i in range(3 * MOST):
        write_run_folder(tmp_path, f"ppo:n{i}", {"init": "sft:a"}, day=i % 20)
    for i in range(120):  # a chain
        write_run_folder(tmp_path, f"reward:c{i}", {"init": f"reward:c{i - 1}"} if i else {}, day=i % 20)
    with Index(tmp_path) as index:
        for run in ("sft:a", "sft:b", "ppo:n0", "reward:c119", "reward:c0"):
            text = draw_lineage(build_lineage(index, Tracer(index, read_no_votes).run(run)))
            assert text.count("<rect") <= MOST
            assert f">{run}</text>" in text
            assert ("left out" in text) == (run in ("sft:a", "reward:c119", "reward:c0"))
    with Index(tmp_path) as index:
        for run in ("sft:a", "sft:b"):
            lineage = build_lineage(index, Tracer(index, read_no_votes).run(run))
            places = compute_box_positions(lineage)
            assert all(places[source][0] < places[target][0] for source, target in lineage.lines)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)).filter(lambda edge: edge[0] != edge[1]), max_size=30))
@settings(max_examples=200)
def test_columns_of_any_graph_without_circles(edges: list[tuple[int, int]]) -> None:
    lines = [((str(max(edge)), "", ""), (str(min(edge)), "", "")) for edge in edges]
    boxes = {key: Box("run", key[0]) for line in lines for key in line} | {("0", "", ""): Box("run", "0")}
    columns = assign_columns(Lineage(("0", "", ""), boxes, list(dict.fromkeys(lines))))
    assert all(columns[source] > columns[target] for source, target in lines)
