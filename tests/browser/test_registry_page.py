"""The registry's page in a browser: the table, a run, compared runs, aliases, and a run while it trains."""

from __future__ import annotations

import fcntl
import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from free_ports import pick_free_port
from synthetic_runs import compute_artifact_digest, write_run_folder, write_two_policies

from align.__main__ import main
from align.core.chain import ChainHead
from align.registry.trace import Votes
from align.run.alias_log import AliasTarget, append_change

pytestmark = pytest.mark.slow
POLICY = {"init": "sft:start", "reward": "reward:votes"}
HOSTILE = "<img src=x onerror='document.title=1'>"
VIEWS = {
    "runs": "?view=runs",
    "sorted": "?view=runs&sort=-score.value&stage=ppo",
    "empty": "?view=runs&status=unreadable",
    "wrong": "?view=runs&where=nonsense",
    "run": "?view=run&run=sft:real",
    "policy": "?view=run&run=ppo:first",
    "failed": "?view=run&run=ppo:bad",
    "compare": "?view=compare&runs=ppo:first&runs=sft:start",
    "aliases": "?view=aliases",
    "alias": "?view=aliases&alias=production",
    "none": "?view=run&run=ppo:none",
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, chats: Path) -> Path:
    root = write_two_policies(tmp_path_factory.mktemp("registry") / "runs")
    line = ["stage=sft", "model=hub", f"model.path={tiny_model}", "data=jsonl", f"data.path={chats}", "device=cpu"]
    short_run = [
        "data.held_out=0.25",
        "data.max_length=128",
        "stage.batch_size=8",
        "stage.max_steps=4",
        "stage.log_every=1",
    ]
    assert main([*line, *short_run, f"run.root={root}", "run.name=real"]) == 0
    write_run_folder(root, "ppo:bad", POLICY, status="failed", error=f"stage.lr=3.0: {HOSTILE}", digest="", day=8)
    first = AliasTarget("ppo:first", compute_artifact_digest("ppo:first"))
    append_change(root, "production", [first], who="ann", why="the first one", replaces=0)
    both = [
        AliasTarget(first.ref, first.digest, 9.0),
        AliasTarget("ppo:second", compute_artifact_digest("ppo:second"), 1.0),
    ]
    append_change(root, "production", both, who="bob", why="a tenth, for a week", replaces=1)
    return root


@pytest.fixture(scope="module")
def url(root: Path) -> Iterator[str]:
    import uvicorn

    from align.registry.page.server import build_registry_application
    from align.stages.registry import format_run_command
    from align.web.key_link import OpenAuthenticator

    port = pick_free_port()
    app = build_registry_application(
        root,
        lambda project, head: get_votes(head),
        format_run_command,
        OpenAuthenticator(),
        [f"http://127.0.0.1:{port}"],
    )
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error", ws="none"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{port}/"
    server.should_exit = True
    thread.join(20)


def get_votes(head: ChainHead) -> Votes:
    return Votes({"a1": 3})


def open_view(page: Any, address: str) -> Any:
    """Open an address of the registry, and return the page when it is drawn."""
    page.goto(address)
    page.wait_for_selector("#align-registry h1")
    page.wait_for_function("() => !document.querySelector('#align-registry')?.innerText.includes('Drawing …')")
    return page


def read_run_names(page: Any) -> list[str]:
    return page.locator("#align-registry tbody th").all_inner_texts()


@pytest.mark.parametrize("width", [390, 1400])
def test_every_view_is_fit_to_read(browser: Any, url: str, width: int) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    context = browser.new_context(viewport={"width": width, "height": 900})
    page = context.new_page()
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    requested_urls: list[str] = []
    page.on("request", lambda request: requested_urls.append(request.url))
    for name, query in VIEWS.items():
        open_view(page, url + query)
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            over = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
            assert over == 0, (name, width, scheme)
            faults = axe.run(page).response["violations"]
            assert [(f["id"], f["nodes"][0]["html"]) for f in faults] == [], (name, scheme)
        page.emulate_media(color_scheme="light")
    assert errors == []
    assert [
        requested_url for requested_url in requested_urls if not requested_url.startswith((url, "data:", "blob:"))
    ] == []
    context.close()


def test_the_table_is_filtered_sorted_and_gone_back_in(page: Any, url: str) -> None:
    open_view(page, url)
    assert len(read_run_names(page)) == 9
    page.get_by_label("Stage").select_option("ppo")
    page.wait_for_function("() => document.querySelectorAll('#align-registry tbody tr').length === 3")
    page.get_by_label("Conditions").fill("score.value >= 0.8")
    page.keyboard.press("Enter")
    page.wait_for_function("() => document.querySelectorAll('#align-registry tbody tr').length === 2")
    page.get_by_role("link", name="score").click()
    page.wait_for_function("() => document.querySelector('[aria-sort]')?.innerText.includes('score')")
    assert page.locator("[aria-sort]").get_attribute("aria-sort") == "descending"
    assert [run.split()[0] for run in read_run_names(page)] == ["ppo:second", "ppo:first"]
    page.go_back()
    page.wait_for_function("() => document.querySelector('[aria-sort]')?.innerText.includes('age')")
    page.go_back()
    page.wait_for_function("() => document.querySelectorAll('#align-registry tbody tr').length === 3")
    page.reload()
    page.wait_for_function("() => document.querySelectorAll('#align-registry tbody tr').length === 3")
    assert page.get_by_label("Stage").input_value() == "ppo"
    assert page.title() == "Runs · align registry"


def test_from_a_run_through_its_lineage_to_its_report(page: Any, url: str) -> None:
    open_view(page, url)
    page.get_by_role("link", name="ppo:first", exact=True).first.click()
    page.wait_for_selector("svg .box.focus")
    assert page.locator("h1").inner_text().split() == ["ppo:first", "@production"]
    assert page.evaluate("document.activeElement.tagName") == "H1"
    page.locator("svg a", has_text="sft:start").first.click()
    page.wait_for_function("() => document.querySelector('h1').innerText.startsWith('sft:start')")
    assert "run=sft%3Astart" in page.url
    open_view(page, url + "?view=run&run=sft:real")
    assert page.locator("figure.plot img").count() >= 2
    assert "held out" in page.locator("figure.plot img").first.get_attribute("alt")
    assert page.locator(".tokens mark").count() >= 2
    with page.expect_popup() as popup:
        page.get_by_role("link", name="report.html").click()
    assert popup.value.locator("h1").inner_text() == "Supervised fine-tuning"
    page.get_by_text("Settings, figures").click()
    assert page.get_by_role("rowheader", name="config.stage.max_steps").is_visible()


def test_runs_are_chosen_on_several_views_and_compared(page: Any, url: str) -> None:
    open_view(page, url + "?view=runs&stage=ppo")
    page.get_by_label("Compare ppo:first").check()
    assert "choose another" in page.locator(".chosen").inner_text()
    open_view(page, url + "?view=run&run=sft:start")
    page.get_by_label("compare", exact=True).check()
    assert "2 chosen" in page.locator(".chosen").inner_text()
    page.get_by_role("link", name="Compare").click()
    page.wait_for_function("() => document.querySelector('h1').innerText === '2 runs side by side'")
    assert page.locator(".blocks table tbody tr").count() == 2
    assert page.locator(".chosen").is_hidden()
    page.go_back()
    page.get_by_role("button", name="Clear").click()
    assert page.locator(".chosen").is_hidden()


def test_what_others_wrote_does_nothing(page: Any, url: str) -> None:
    open_view(page, url + "?view=run&run=ppo:bad")
    assert HOSTILE in page.locator(".verdict").inner_text()
    assert page.locator("#align-registry img[src=x]").count() == 0
    assert page.title().endswith("align registry")


def test_a_server_that_is_gone_and_a_view_that_is_not_there(page: Any, url: str) -> None:
    open_view(page, url + "?view=run&run=ppo:none")
    assert "run=ppo:none: is no run under" in page.locator(".view .alert").inner_text()
    page.get_by_role("link", name="All runs").click()
    page.wait_for_function("() => document.querySelectorAll('#align-registry tbody tr').length === 9")
    assert page.locator(".said").inner_text() == ""
    page.route("**/view/**", lambda route: route.abort())
    page.get_by_role("link", name="Aliases").click()
    page.wait_for_function("() => document.querySelector('.said').innerText === 'The server does not answer.'")
    assert len(read_run_names(page)) == 9


def test_a_run_is_live_while_it_trains(page: Any, url: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import align.registry.page.views as run_page

    monkeypatch.setattr(run_page, "LIVE_S", 1)
    folder = write_run_folder(root, "ppo:live", POLICY, status="running", day=9, digest="")
    lock = os.open(folder, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)  # as a run locks its folder
    try:
        open_view(page, url + "?view=run&run=ppo:live")
        assert page.locator(".told .status").inner_text() == "running"
        assert page.locator(".verdict.running").inner_text() == "Running."
        assert page.locator("figure.plot").count() == 0
        rows = [{"step": i, "score": i / 10, "kl": 0.1 * i} for i in range(1, 6)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        page.wait_for_selector("figure.plot img")
        assert "to 0.5 at update 5" in page.locator("figure.plot img").first.get_attribute("alt")
    finally:
        os.close(lock)
    write_run_folder(root, "ppo:live", POLICY, status="failed", error="no more", day=9, digest="")
    page.wait_for_selector(".verdict.failed")
    page.wait_for_function("() => document.querySelector('.told .status').innerText === 'failed'")


def test_back_leads_to_where_somebody_was(page: Any, url: str) -> None:
    page.set_viewport_size({"width": 900, "height": 400})
    open_view(page, url)
    page.evaluate("window.scrollTo(0, 250)")
    page.get_by_role("link", name="data:talk", exact=True).first.evaluate("link => link.click()")
    page.wait_for_function("() => document.querySelector('h1').innerText.startsWith('data:talk')")
    assert page.evaluate("window.scrollY") == 0
    page.go_back()
    page.wait_for_function("() => document.querySelector('h1').innerText === 'Runs'")
    assert page.evaluate("window.scrollY") == 250
    open_view(page, url + "?view=runs&page=2")
    assert "None is on this page" in page.locator(".count").inner_text()
