"""The registry's page without a browser: text of its views, access, and bad input."""

from __future__ import annotations

import html
import json
import os
import re
from itertools import chain
from pathlib import Path
from urllib.parse import urlencode

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient
from synthetic_runs import build_interval, compute_artifact_digest, write_run_folder, write_two_policies

from align.core.chain import ChainHead
from align.core.errors import InputError
from align.registry.page.server import build_registry_application
from align.registry.page.views import A_PAGE, parse_conditions
from align.registry.trace import Votes
from align.run.alias_log import AliasTarget, append_change
from align.run.stale import mark_stale
from align.web.key_link import KeyAuthenticator, OpenAuthenticator

URL = "http://127.0.0.1:7862"
POLICY = {"init": "sft:start", "reward": "reward:votes"}


def load_no_votes(project: str, head: ChainHead) -> Votes:
    return Votes()


def make_client(root: Path, authenticator=None) -> TestClient:
    app = build_registry_application(
        root, load_no_votes, lambda manifest: "python -m align", authenticator or OpenAuthenticator(), [URL]
    )
    return TestClient(app, base_url=URL, follow_redirects=False)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_two_policies(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def client(root: Path) -> TestClient:
    return make_client(root)


def fetch_view(client: TestClient, name: str, **query: object) -> str:
    answer = client.get(f"/view/{name}?{urlencode(query, doseq=True)}")
    assert answer.status_code == 200, answer.text
    return answer.text


def list_runs(text: str) -> list[str]:
    """Return the runs of the table, in order."""
    return re.findall(r'name="chosen" value="([^"]*)"', text)


# Text of the views


def test_the_table_is_that_of_the_registry(client: TestClient) -> None:
    text = fetch_view(client, "runs")
    assert list_runs(text) == [
        "export:one",
        "eval:one",
        "ppo:second",
        "ppo:first",
        "reward:votes",
        "sft:start",
        "data:talk",
    ]
    assert "win rate</span> <b>0.81</b>" in text
    assert "[0.75, 0.87]" in text
    assert "1 to 7 of 7 runs" in text


@pytest.mark.parametrize(
    ("query", "runs"),
    [
        ({"stage": "ppo"}, ["ppo:second", "ppo:first"]),
        ({"text": "st"}, ["ppo:first", "sft:start"]),
        ({"status": "failed"}, []),
        ({"where": "score.value >= 0.8, score.value < 0.9"}, ["eval:one", "ppo:first", "reward:votes"]),
        ({"where": "metrics.win_rate.low > 0.7", "stage": "ppo"}, ["ppo:first"]),
        ({"where": "run = 'ppo:second'"}, ["ppo:second"]),
        ({"sort": "run", "stage": "ppo"}, ["ppo:first", "ppo:second"]),
        ({"sort": "-kl", "where": "kl != null"}, ["eval:one", "ppo:first", "ppo:second", "export:one"]),
    ],
)
def test_filters(client: TestClient, query: dict[str, str], runs: list[str]) -> None:
    text = fetch_view(client, "runs", **query)
    assert list_runs(text) == runs
    assert ("No run meets this." in text) == (not runs)


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("nonsense", "is no condition"),
        ("score.value >=", "is no condition"),
        (", , ,", "is no condition"),
        ("scor.value > 1", "Did you mean"),
        ("seed > true", "compares values that have no order"),
        ("x" * 1999, "is no condition"),
    ],
)
def test_a_condition_that_cannot_be_read_is_said_beside_the_form(client: TestClient, where: str, said: str) -> None:
    text = fetch_view(client, "runs", where=where)
    assert said in text
    assert 'role="alert"' in text
    assert 'role="search"' in text


def test_pages(tmp_path: Path) -> None:
    for i in range(2 * A_PAGE + 5):
        write_run_folder(tmp_path, f"sft:n{i:03}", day=i % 20)
    client = make_client(tmp_path)
    pages = [list_runs(fetch_view(client, "runs", sort="run", page=n)) for n in (1, 2, 3)]
    assert [len(page) for page in pages] == [A_PAGE, A_PAGE, 5]
    assert list(chain(*pages)) == [f"sft:n{i:03}" for i in range(2 * A_PAGE + 5)]
    assert "201 to 205 of 205 runs" in fetch_view(client, "runs", sort="run", page=3)
    assert "None is on this page, of 205 runs" in fetch_view(client, "runs", page=4)


def test_an_empty_folder(tmp_path: Path) -> None:
    client = make_client(tmp_path)
    assert "No runs yet." in fetch_view(client, "runs")
    assert "No aliases yet." in fetch_view(client, "aliases")
    assert list(tmp_path.iterdir()) == []


def test_a_run_shows_what_it_came_from_and_what_came_of_it(client: TestClient) -> None:
    text = fetch_view(client, "run", run="ppo:first")
    for run in ("data:talk", "sft:start", "reward:votes", "ppo:first", "eval:one", "export:one"):
        assert f">{run}</text>" in text
    assert ">ppo:second</text>" not in text
    assert 'data-src="?view=report&amp;run=ppo%3Afirst"' in text


def test_the_report_of_a_run_is_drawn_anew_when_its_folder_changes(tmp_path: Path) -> None:
    folder = write_run_folder(
        write_two_policies(tmp_path), "ppo:live", POLICY, status="failed", error="stage.lr: <b>too large</b>", day=9
    )
    client = make_client(tmp_path)
    first = fetch_view(client, "report", run="ppo:live")
    assert "Failed: stage.lr: &lt;b&gt;too large&lt;/b&gt;." in first
    assert 'class="plot"' not in first
    rows = [{"step": i, "score": i / 10, "kl": 0.1 * i} for i in range(1, 6)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sample = {"step": 0, "prompt": [{"role": "user", "content": "<script>x</script>"}], "answer": "ok", "score": 0.5}
    (folder / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    second = fetch_view(client, "report", run="ppo:live")
    assert "Score: from 0.1 at update 1 to 0.5 at update 5" in second or 'class="plot"' in second
    assert "&lt;script&gt;x&lt;/script&gt;" in second
    assert "<script" not in second


def test_a_folder_that_lacks_what_a_report_shows(client: TestClient) -> None:
    assert "lacks content that a report of this version needs" in fetch_view(client, "report", run="eval:one")


def test_what_is_stale_is_marked(tmp_path: Path) -> None:
    write_two_policies(tmp_path)
    reason = "trained on rows that were forgotten"
    command = "python -m align stage=sft"
    mark_stale(tmp_path / "sft" / "start", reason, command, "r", "2026-11-02")
    client = make_client(tmp_path)
    assert fetch_view(client, "runs").count('<span class="stale">') == 1
    text = fetch_view(client, "run", run="sft:start")
    assert f"Stale since 2026-11-02: {reason}. Made again by: {command}" in text
    assert "sft:start; loss after 2.5, qlora r8; stale" in fetch_view(client, "run", run="ppo:first")


def test_runs_side_by_side(client: TestClient) -> None:
    text = fetch_view(client, "compare", runs=["ppo:first", "ppo:second"])
    assert "2 runs side by side" in text
    assert 'aria-label="Settings that differ, and figures"' in text


@pytest.mark.parametrize(
    ("address", "status", "said"),
    [
        ("run?run=ppo:none", 404, "is no run under"),
        ("run?run=../../etc/passwd", 404, "is no run under"),
        ("report?run=ppo:none", 404, "is no run under"),
        ("compare?runs=ppo:first", 422, "are fewer than two"),
        ("compare?runs=ppo:first&runs=ppo:first", 422, "are fewer than two"),
        ("compare?runs=ppo:first&runs=ppo:none", 404, "is no run under"),
        ("compare?" + "&".join(f"runs=ppo:{i}" for i in range(61)), 422, "are more than 60"),
        ("compare", 422, ""),
        ("runs?page=0", 422, ""),
        ("runs?page=" + "9" * 30, 422, ""),
        ("runs?text=" + "x" * 2001, 422, ""),
        ("none", 404, ""),
    ],
)
def test_what_cannot_be_shown(client: TestClient, address: str, status: int, said: str) -> None:
    answer = client.get(f"/view/{address}")
    assert answer.status_code == status
    assert said in answer.text


# Hostile text and conditions


HOSTILE = '<img src=x onerror="alert(1)">\'"&'


def test_names_and_errors_are_text_and_nothing_else(tmp_path: Path) -> None:
    name = HOSTILE.replace("/", "")
    write_run_folder(tmp_path, f"sft:{name}", digest="a" * 64)
    write_run_folder(tmp_path, "ppo:p", {"init": f"sft:{name}"}, status="failed", error=HOSTILE, day=1)
    write_run_folder(
        tmp_path, "sft:plain", config={"stage": {"name": "sft", "note": HOSTILE}, "data": {}, "method": {}}, day=2
    )
    append_change(tmp_path, "production", [AliasTarget(f"sft:{name}", "a" * 64)], who=HOSTILE, why=HOSTILE, replaces=0)
    client = make_client(tmp_path)
    views = [
        fetch_view(client, "runs", text=HOSTILE, where=HOSTILE, stage=HOSTILE, status=HOSTILE),
        fetch_view(client, "runs"),
        fetch_view(client, "run", run=f"sft:{name}"),
        fetch_view(client, "run", run="ppo:p"),
        fetch_view(client, "run", run="sft:plain"),
        fetch_view(client, "aliases"),
        fetch_view(client, "aliases", alias=HOSTILE),
        fetch_view(client, "compare", runs=[f"sft:{name}", "sft:plain"]),
        fetch_view(client, "report", run="ppo:p"),
    ]
    for text in views:
        assert "<img src=x" not in text
        assert 'onerror="' not in text
    assert f"sft:{name}" in map(html.unescape, list_runs(views[1]))


def test_names_with_spaces_and_accents_are_found_under_their_links(tmp_path: Path) -> None:
    names = ["sft:a b", "sft:é ü", "sft:100%", "sft:a&b=c", "sft:#1?", "sft:日本"]
    for name in names:
        write_run_folder(tmp_path, name)
    client = make_client(tmp_path)
    links = re.findall(r'<a href="(\?view=run&amp;run=[^"]*)"', fetch_view(client, "runs", sort="run"))
    assert len(links) == len(names)
    for name in names:
        (tmp_path / "sft" / name.partition(":")[2] / "report.html").write_text(name)
        (href,) = re.findall(r'href="(runs/[^"]*)"', fetch_view(client, "run", run=name))
        assert client.get(f"/{href}").text == name
    for link in links:
        path = link.replace("&amp;", "&").replace("?view=run&", "/view/run?")
        assert client.get(path).status_code == 200


@given(st.text(max_size=60))
@settings(max_examples=300)
def test_whatever_is_typed_as_conditions_is_read_or_refused(typed: str) -> None:
    try:
        conditions = list(parse_conditions(typed))
    except InputError:
        return
    assert all(key and condition[0] in "<>=!" for key, condition in conditions)


@pytest.mark.parametrize("text", ["a<", "a <= ", "a = 'b", "= 3", "a b = 3", "a == 3, ", "a=1,,b=2"])
def test_conditions_with_a_slip(text: str) -> None:
    with pytest.raises(InputError, match="Write conditions such as"):
        list(parse_conditions(text))


def test_conditions_are_read_as_they_are_typed() -> None:
    typed = "metrics.win_rate.low >= 0.7, seed=0,name = 'a, b' , run != \"x\""
    assert list(parse_conditions(typed)) == [
        ("metrics.win_rate.low", ">=0.7"),
        ("seed", "=0"),
        ("name", "=a, b"),
        ("run", "!=x"),
    ]
    assert list(parse_conditions("  ")) == []


# Access


def test_another_host_is_refused_and_so_is_everything_but_reading(client: TestClient) -> None:
    assert client.get("/view/runs", headers={"host": "evil.example"}).status_code == 421
    assert client.get("/view/runs", headers={"origin": "http://evil.example"}).status_code == 403
    for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS"):
        for path in ("/view/runs", "/gradio_api/queue/join", "/gradio_api/upload", "/"):
            assert client.request(method, path).status_code in (404, 405)


def test_behind_a_key_nothing_is_to_be_had_without_it(root: Path) -> None:
    client = make_client(root, KeyAuthenticator("k" * 32, OpenAuthenticator.visitor, "align_registry"))
    paths = [
        "/",
        "/view/runs",
        "/view/run?run=ppo:first",
        "/runs/ppo/first/report.html",
        "/align/registry.js",
        "/config",
    ]
    for path in paths:
        assert client.get(path).status_code == 403
        assert client.get(path, headers={"cookie": f"align_registry={'k' * 31}"}).status_code == 403
    response = client.get(f"/?view=run&run=ppo%3Afirst&key={'k' * 32}")
    assert (response.status_code, response.headers["location"]) == (303, "/?view=run&run=ppo%3Afirst")
    assert "align_registry" in response.headers["set-cookie"]
    assert client.get("/view/runs").status_code == 200


def test_reports_of_runs_are_served_and_no_other_file(tmp_path: Path) -> None:
    write_two_policies(tmp_path / "runs")
    (tmp_path / "secret.html").write_text("secret")
    folder = tmp_path / "runs" / "ppo" / "first"
    (folder / "report.html").write_text("<p>fine</p>")
    (tmp_path / "runs" / "ppo" / "second" / "report.html").symlink_to(tmp_path / "secret.html")
    os.mkfifo(tmp_path / "runs" / "sft" / "start" / "report.html")
    (tmp_path / "runs" / "report.html").write_text("above")
    client = make_client(tmp_path / "runs")
    answer = client.get("/runs/ppo/first/report.html")
    assert (answer.status_code, answer.text) == (200, "<p>fine</p>")
    assert "sandbox allow-popups" in answer.headers["content-security-policy"]  # for every report
    for path in (
        "ppo/second/report.html",
        "sft/start/report.html",
        "ppo/none/report.html",
        "ppo/first/manifest.json",
        "ppo/first/../../report.html",
        "ppo/%2e%2e/report.html",
        "..%2f..%2fsecret.html",
    ):
        assert client.get(f"/runs/{path}").status_code == 404, path


# Damaged folders


def test_a_run_that_cannot_be_read_and_a_log_that_was_cut(tmp_path: Path) -> None:
    write_two_policies(tmp_path)
    (tmp_path / "ppo" / "first" / "manifest.json").write_text("{")
    for i in range(3):
        append_change(tmp_path, "production", [AliasTarget("sft:start", "a" * 64)], who="me", why="x", replaces=i)
    lines = (tmp_path / "aliases.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "aliases.jsonl").write_text("".join([lines[0], lines[2]]))
    client = make_client(tmp_path)
    assert "unreadable" in fetch_view(client, "runs")
    assert "Aliases left out" in fetch_view(client, "runs")
    assert 'role="alert"' in fetch_view(client, "run", run="ppo:first")
    assert 'role="alert"' in fetch_view(client, "aliases")
    assert client.get("/view/report?run=ppo:first").text.count('role="alert"') == 1
    assert client.get("/view/compare?runs=ppo:first&runs=ppo:second").status_code == 422


@pytest.mark.parametrize("query", ["page=2", "deep_link=x", "view=runs&page=100&sort=-kl", "__theme=dark"])
def test_every_address_leads_to_the_page(client: TestClient, query: str) -> None:
    assert client.get(f"/?{query}").status_code == 200


@pytest.mark.parametrize("path", ["/openapi.json", "/gradio_api/dev/reload", "/gradio_api/queue/data?session_hash=x"])
def test_other_addresses_lead_nowhere(client: TestClient, path: str) -> None:
    assert client.get(path).status_code == 404


def test_the_page_runs_no_script_but_its_own(client: TestClient) -> None:
    response = client.get("/")
    assert "default-src 'self'" in response.headers["content-security-policy"]
    assert "script-src" not in response.headers["content-security-policy"]
    assert re.findall(r"<script[^>]*>", response.text) == ['<script type="module" src="align/registry.js">']


def test_a_fifo_in_place_of_a_stream_holds_nobody_up(tmp_path: Path) -> None:
    folder = write_run_folder(tmp_path, "ppo:p", status="failed", error="x", digest="")
    for name in ("timing.jsonl", "metrics.jsonl", "samples.jsonl", "report.html", "stale.json"):
        os.mkfifo(folder / name)
    client = make_client(tmp_path)
    assert list_runs(fetch_view(client, "runs")) == ["ppo:p"]
    assert "report.html" not in fetch_view(client, "run", run="ppo:p")
    fetch_view(client, "report", run="ppo:p")


def test_too_many_conditions_are_refused(client: TestClient) -> None:
    assert "are more than 20" in fetch_view(client, "runs", where="seed=0," * 21)


# Aliases


def test_aliases_with_their_history(tmp_path: Path) -> None:
    write_two_policies(tmp_path)
    first_target, second_target = (
        AliasTarget(run, compute_artifact_digest(run)) for run in ("ppo:first", "ppo:second")
    )
    gate_results = [{"gate": "safe", "digest": "d", "findings": [{"passed": True}, {"passed": False}]}]
    append_change(
        tmp_path,
        "production",
        [first_target],
        who="ann",
        why="first",
        replaces=0,
        gates=gate_results,
        override="it is urgent",
    )
    append_change(
        tmp_path,
        "production",
        [AliasTarget(first_target.ref, first_target.digest, 3.0), second_target],
        who="bob",
        why="some",
        replaces=1,
    )
    append_change(tmp_path, "old", [AliasTarget("ppo:lost", "f" * 64)], who="ann", why="before", replaces=0)
    client = make_client(tmp_path)
    text = fetch_view(client, "aliases")
    assert "safe: 1 of 2 met" in text
    assert "overridden: it is urgent" in text
    assert "75%" in text
    assert "ppo:lost (gone)" in text
    assert "before" not in fetch_view(client, "aliases", alias="production")
    assert "@production" in fetch_view(client, "runs")
    assert "@production" in fetch_view(client, "run", run="ppo:second")
    assert "No such alias." in fetch_view(client, "aliases", alias="none")


def test_a_share_with_its_interval_is_drawn_and_no_other_score(tmp_path: Path) -> None:
    write_run_folder(tmp_path, "eval:a", metrics={"win_rate": build_interval(0.5, 0.25, 0.75)})
    write_run_folder(tmp_path, "sft:b", metrics={"loss_after": 2.5})
    text = fetch_view(make_client(tmp_path), "runs")
    assert text.count('<svg class="interval"') == 1
    assert "M15.0 5H45.0" in text
