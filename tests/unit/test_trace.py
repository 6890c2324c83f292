"""The trace of an artifact: its tree of inputs, and checks that these are unchanged."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from synthetic_runs import BASE, build_run_input, compute_artifact_digest, write_run_folder, write_two_policies

from align.core.chain import ChainHead
from align.core.errors import MissingArtifact
from align.registry.index import Index, query_index
from align.registry.trace import DEEPEST, TraceNode, Tracer, Votes, as_lines, check_files, trace_response
from align.run.manifest import Input


def count_no_votes(project: str, head: ChainHead) -> Votes:
    return Votes(state="not asked")


def trace_artifact(root: Path, ref: str, full: bool = False, voters: Any = count_no_votes) -> TraceNode:
    return query_index(root, lambda index: Tracer(index, voters, full).run(ref))


def iter_paths(node: TraceNode, prefix: str = "") -> Iterator[str]:
    """Yield each path from the root of a tree to one of its nodes."""
    path = f"{prefix}{node.name}"
    yield path + (" (above)" if node.above else "")
    for name, source in node.sources:
        yield from iter_paths(source, f"{path} <{name}> ")


def write_artifact_files(folder: Path, **contents: bytes) -> dict[str, str]:
    """Write files of a run's artifact. Returns their digests for its manifest."""
    (folder / "artifact").mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / "artifact" / name).write_bytes(content)
    return {f"artifact/{name}": sha256(content).hexdigest() for name, content in contents.items()}


def test_the_tree(tmp_path: Path) -> None:
    """Each input of each ancestor is in the tree; the inputs of a run are listed once."""
    write_two_policies(tmp_path)
    assert [*iter_paths(trace_artifact(tmp_path, "export:one"))] == [
        "export:one",
        "export:one <base> pocket",
        "export:one <artifact> ppo:first",
        "export:one <artifact> ppo:first <base> pocket",
        "export:one <artifact> ppo:first <init> sft:start",
        "export:one <artifact> ppo:first <init> sft:start <base> pocket",
        "export:one <artifact> ppo:first <init> sft:start <data> data:talk",
        "export:one <artifact> ppo:first <reward> reward:votes",
        "export:one <artifact> ppo:first <reward> reward:votes <base> pocket",
        "export:one <artifact> ppo:first <reward> reward:votes <init> sft:start (above)",
    ]


def test_what_is_gone_is_named(tmp_path: Path) -> None:
    write_two_policies(tmp_path)
    shutil.rmtree(tmp_path / "reward" / "votes")
    node = trace_artifact(tmp_path, "ppo:first")
    (gone,) = [input_node for input_node in node.nodes() if input_node.kind == "gone"]
    assert not gone.whole
    assert (gone.kind, gone.name, gone.digest) == ("gone", "reward:votes", compute_artifact_digest("reward:votes"))
    assert "NOT WHOLE: reward:votes: is gone" in [*as_lines([node])]
    gone_names = [node.name for node in trace_artifact(tmp_path, "eval:one").nodes() if node.kind == "gone"]
    assert gone_names == ["reward:votes", "reward:gone"]


def test_a_parent_under_another_name_and_one_that_was_made_again(tmp_path: Path) -> None:
    write_two_policies(tmp_path)
    (tmp_path / "reward" / "votes").rename(tmp_path / "reward" / "people")
    write_run_folder(tmp_path, "reward:votes", digest="e" * 64)
    assert "ppo:first <reward> reward:people" in [*iter_paths(trace_artifact(tmp_path, "ppo:first"))]


def test_a_base_that_a_run_made(tmp_path: Path) -> None:
    write_run_folder(tmp_path, "full:whole", digest=BASE.digest, base=None)
    write_run_folder(tmp_path, "sft:on-it")
    assert [*iter_paths(trace_artifact(tmp_path, "sft:on-it"))] == ["sft:on-it", "sft:on-it <base> full:whole"]


def test_cycles_and_long_lines_of_descent_end(tmp_path: Path) -> None:
    write_run_folder(tmp_path, "sft:a", {"init": "sft:b"})
    write_run_folder(tmp_path, "sft:b", {"init": "sft:a"})
    assert [*iter_paths(trace_artifact(tmp_path, "sft:a"))][-1] == "sft:a <base> pocket" or "sft:a (above)" in [
        path.rpartition("> ")[2] for path in iter_paths(trace_artifact(tmp_path, "sft:a"))
    ]
    for i in range(DEEPEST + 20):
        write_run_folder(tmp_path, f"sft:{i}", {"init": f"sft:{i - 1}"} if i else {})
    node = trace_artifact(tmp_path, f"sft:{DEEPEST + 19}")
    cut_off = [node.name for node in node.nodes() if "continued by" in node.name]
    assert cut_off == ["continued by stage.action=trace artifact=sft:19"]


def test_votes_and_who_gave_them(tmp_path: Path) -> None:
    read = []

    def voters(project: str, head: ChainHead) -> Votes:
        read.append((project, head))
        return Votes({"a1": 3, "a2": 30}, "the last row that was read is in the ledger")

    config = {"stage": {"name": "sample"}, "data": {}, "method": {"name": "qlora"}, "project": "q"}
    write_run_folder(tmp_path, "sft:s")
    write_run_folder(tmp_path, "sample:answers", {"init": "sft:s"}, config=config, digest="")
    write_run_folder(tmp_path, "sample:others", config={**config, "project": "p"}, digest="")
    write_run_folder(tmp_path, "reward:r", {"init": "sft:s", "data": Input("f" * 64, project="q", seq=40)})
    node = trace_artifact(tmp_path, "reward:r", voters=voters)
    assert read == [("q", ChainHead(40, "f" * 64))]
    assert [*iter_paths(node)][2:] == [
        "reward:r <data> q",
        "reward:r <data> q <annotator> a2",
        "reward:r <data> q <annotator> a1",
        "reward:r <data> q <answers> sample:answers",
        "reward:r <data> q <answers> sample:answers <base> pocket",
        "reward:r <data> q <answers> sample:answers <init> sft:s",
        "reward:r <data> q <answers> sample:answers <init> sft:s <base> pocket",
        "reward:r <init> sft:s (above)",
    ]
    assert "├─ a2, 30 judgements" in "\n".join(as_lines([node]))


def test_files_by_time_and_by_hash(tmp_path: Path) -> None:
    """Files that are not hashed are counted; hashed files are recognised by size and time; changed files are named."""
    outputs = write_artifact_files(tmp_path / "sft" / "a", model=b"x" * 10, config=b"{}")
    folder = write_run_folder(tmp_path, "sft:a", outputs=outputs)
    times = os.stat(folder / "manifest.json").st_mtime
    for name in (*outputs, "metrics.json"):
        os.utime(folder / name, (times - 1e7, times - 1e7))

    def state(full: bool = False) -> tuple[bool, str]:
        node = trace_artifact(tmp_path, "sft:a", full)
        return node.whole, node.state

    assert state() == (True, "3 files, 3 not hashed here yet")
    assert [*as_lines([trace_artifact(tmp_path, "sft:a")])][-1] == "stage.verify=full hashes every file."
    assert state(full=True) == (True, "3 files hashed now: as published")
    assert state()[1].startswith("3 files, size and time as when hashed on 20")
    os.utime(folder / "artifact/model", (times + 1e6, times + 1e6))
    assert state() == (True, "3 files, 1 not hashed here yet; artifact/model copied or written again after the run")
    state(full=True)
    assert "as when hashed on" in state()[1]
    with Index(tmp_path, rebuild=True):
        pass
    assert "as when hashed on" in state()[1]  # a rebuilt index keeps the hashes
    (folder / "artifact/model").write_bytes(b"y" * 10)
    os.utime(folder / "artifact/model", (times + 1e6, times + 1e6))
    assert state()[1].startswith("3 files, 1 not hashed here yet")  # its change time differs
    assert state(full=True) == (False, "artifact/model is changed")
    assert state() == (False, "artifact/model is changed")
    (folder / "artifact/config").unlink()
    assert state() == (False, "artifact/config is missing; artifact/model is changed")
    assert [*as_lines([trace_artifact(tmp_path, "sft:a")])][-1] == (
        "NOT WHOLE: sft:a: artifact/config is missing; artifact/model is changed"
    )


def test_many_files_are_counted(tmp_path: Path) -> None:
    outputs = dict.fromkeys((f"artifact/{i}" for i in range(9)), "0" * 64)
    file_check = check_files(tmp_path, outputs, {}, None, rehash_all=False)
    assert file_check.state == "artifact/0, artifact/1, artifact/2 and 6 more are missing"


def test_base_and_files_are_hashed_where_everything_is(tmp_path: Path) -> None:
    """A full check hashes the base and input files, and finds an unreadable base and a changed file."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("one\n")
    corpus = Input(sha256(b"one\n").hexdigest(), path=str(rows))
    write_run_folder(
        tmp_path / "runs", "sft:a", {"data": corpus, "more": Input("0" * 64, path=str(tmp_path / "gone.jsonl"))}
    )
    states = {
        node.name: (node.state, node.whole) for node in trace_artifact(tmp_path / "runs", "sft:a", full=True).nodes()
    }
    assert states[str(rows)] == ("hashed now: as it was read", True)
    assert states[str(tmp_path / "gone.jsonl")] == ("is not there any more", True)
    assert states["pocket"][0].startswith("cannot be read: ")
    rows.write_text("two\n")
    states = {
        node.name: (node.state, node.whole) for node in trace_artifact(tmp_path / "runs", "sft:a", full=True).nodes()
    }
    new_digest = sha256(rows.read_bytes()).hexdigest()[:12]
    assert states[str(rows)] == (f"differs from what was read ({new_digest})", False)
    states = {node.name: node.state for node in trace_artifact(tmp_path / "runs", "sft:a").nodes()}
    assert states[str(rows)] == ""


def write_request_log(root: Path, server: str, *entries: dict[str, Any], text: str = "") -> None:
    folder = write_run_folder(root, f"serve:{server}", digest="")
    lines = [json.dumps(entry) for entry in entries]
    (folder / "requests.jsonl").write_text("".join(line + "\n" for line in [*lines, *([text] if text else [])]))


def trace_answer(root: Path, id: str) -> TraceNode:
    return query_index(root, lambda index: trace_response(index, Tracer(index, count_no_votes), id))


def test_a_served_answer(tmp_path: Path) -> None:
    """An answer is traced by its id or that of the request, over the logs of all servers."""
    write_two_policies(tmp_path)
    entry = {
        "id": "req-0a1b",
        "time": "2026-11-28T06:00:00.000+00:00",
        "tenant": "ann",
        "asked": "chat",
        "arm": "next",
        "adapter": compute_artifact_digest("ppo:first"),
        "base": BASE.digest,
        "completion_tokens": 7,
        "status": 200,
    }
    write_request_log(tmp_path, "one", {**entry, "id": "req-0a1c"}, entry, text='{"id": "req-0a1d", "tor')
    write_request_log(
        tmp_path, "two", {**entry, "id": "req-ffff", "adapter": ""}, {**entry, "id": "req-eeee", "adapter": "a" * 64}
    )
    for id in ("req-0a1b", "chatcmpl-0a1b", "cmpl-0a1b"):
        node = trace_answer(tmp_path, id)
        assert node.facts == (
            "2026-11-28 06:00:00 by serve:one",
            "asked for chat",
            "tenant ann",
            "arm next",
            "7 tokens, status 200",
        )
        assert [*iter_paths(node)][:2] == [id, f"{id} <adapter> ppo:first"]
    assert [*iter_paths(trace_answer(tmp_path, "req-ffff"))] == ["req-ffff", "req-ffff <base> (the base by itself)"]
    (source,) = [node for _, node in trace_answer(tmp_path, "req-eeee").sources]
    assert (source.whole, source.state, source.digest) == (False, "is unknown here", "a" * 64)
    for missing in ("req-0a1d", "req-0", "1b", "req-"):
        with pytest.raises(MissingArtifact, match="is in no server's log under"):
            trace_answer(tmp_path, missing)


def test_an_input_that_was_found_by_an_alias(tmp_path: Path) -> None:
    details = {"alias": {"name": "best", "seq": 1, "hash": "h"}}
    write_run_folder(tmp_path, "sft:s")
    write_run_folder(
        tmp_path, "ppo:p", {"init": Input(**{**get_fields(build_run_input(tmp_path, "sft:s")), "details": details})}
    )
    assert "ppo:p <init by @best> sft:s" in [*iter_paths(trace_artifact(tmp_path, "ppo:p"))]


def get_fields(parent: Input) -> dict[str, Any]:
    return {name: getattr(parent, name) for name in Input.__dataclass_fields__}
