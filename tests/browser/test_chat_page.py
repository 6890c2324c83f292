"""The chat page of a server, in a browser: what people try first."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe

sys.path.append(str(Path(__file__).resolve().parents[1] / "e2e"))
from processes import Forks, forking
from serving import Server, adapters, serving, settles


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    with forking() as forks:
        yield forks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return adapters(tmp_path_factory.mktemp("chat"), "one", "two")


@pytest.fixture(scope="module")
def server(forks: Forks, folder: Path) -> Iterator[Server]:
    names = f"{{one: {folder / 'one'}, two: {folder / 'two'}, mix: {{one: 0.9, two: 0.1}}}}"
    with serving(forks, folder, "model=pocket", "method=lora", f"stage.adapters={names}") as server:
        yield server


@pytest.fixture
def errors(page: Any) -> Iterator[list[str]]:
    """What the browser complains about, of which there is nothing in the end; a policy that was broken among it."""
    found: list[str] = []
    page.on("pageerror", lambda error: found.append(str(error)))
    page.on("console", lambda message: found.append(message.text) if message.type == "error" else None)
    yield found
    assert not found


def until(page: Any, expression: str) -> None:
    """Playwright's own waiting evaluates text in the page, which the page's policy forbids."""
    assert settles(lambda: page.evaluate(expression), 20), (expression, page.inner_text("body"))


def opened(page: Any, server: Server) -> Any:
    page.goto(server.url)
    until(page, "document.querySelectorAll('#model option').length > 0")
    return page


def asking(page: Any, **more: Any) -> None:
    """Has the page's requests ask for this too."""
    page.route(
        "**/v1/chat/completions", lambda route: route.continue_(post_data={**route.request.post_data_json, **more})
    )


def asked(page: Any, text: str) -> Any:
    page.fill("#question", text)
    page.press("#question", "Enter")
    page.wait_for_selector(".turn.assistant")
    return page.locator(".turn.assistant").last


def test_somebody_asks_and_is_answered_by_the_model_that_they_chose(page: Any, server: Server, errors: list[str]):
    opened(page, server)
    asking(page, max_tokens=16)
    assert page.locator("#model option").all_inner_texts() == ["one", "two", "mix", "pocket"]
    digests = page.inner_text("#identity")
    listed = {model["id"]: model for model in server.get("/v1/models")[1]["data"]}
    assert listed["pocket"]["base"] in digests
    page.select_option("#model", "one")
    assert listed["one"]["adapter"] in page.inner_text("#identity")
    page.select_option("#model", "mix")
    assert listed["two"]["adapter"] in page.inner_text("#identity")
    page.select_option("#model", "one")
    asked(page, "Hello <b>there</b>")
    until(page, "document.querySelector('.turn.assistant footer').innerText.includes('tokens')")
    assert page.inner_text(".turn.user .text") == "Hello <b>there</b>"
    assert page.inner_text(".turn.assistant .text").strip()
    assert listed["one"]["adapter"][:12] in page.inner_text(".turn.assistant footer")
    assert settles(lambda: len(server.log) == 1)  # the line is written once the answer has gone
    asked(page, "And?")
    until(page, "document.querySelectorAll('.turn.assistant footer')[1].innerText.includes('tokens')")
    assert settles(lambda: len(server.log) == 2)
    first, second = server.log
    assert second["prompt_tokens"] > first["prompt_tokens"]  # the chat so far was sent
    page.click("#clear")
    assert page.locator(".turn").count() == 0


def test_stop_ends_the_answer_and_the_work_for_it(page: Any, server: Server, errors: list[str]):
    opened(page, server)
    asking(page, ignore_eos=True)  # for some seconds
    asked(page, "Tell me a story.")
    until(page, "document.querySelector('.turn.assistant .text').textContent.length > 3")
    page.click("#stop")
    until(page, "document.querySelector('#said').textContent === 'Stopped.'")
    assert page.is_visible("#send")
    assert settles(lambda: server.stat("align_requests_running") == 0)
    assert settles(lambda: server.log[-1]["status"] == 499)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_telephone_and_in_the_dark(browser: Any, server: Server, scheme: str):
    context = browser.new_context(viewport={"width": 390, "height": 844}, color_scheme=scheme)
    page = opened(context.new_page(), server)
    asking(page, max_tokens=16)
    asked(page, "A very long word: " + "a" * 200)
    until(page, "document.querySelector('#stop').hidden")
    asked(page, "And?")
    until(page, "document.querySelectorAll('.turn footer')[3].innerText.includes('tokens')")
    below = "document.querySelector('.turn:last-child').getBoundingClientRect().bottom"
    assert page.evaluate(f"{below} <= document.querySelector('#ask').getBoundingClientRect().top + 1")
    wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert wide <= 0
    found = Axe().run(page)
    assert not found.response["violations"], found.generate_report()
    context.close()


def test_a_server_with_keys_asks_for_one(page: Any, forks: Forks, folder: Path):
    made = forks.run(folder, "stage=serve", "stage.action=key", "stage.keys=keys.json", "stage.tenant=ann")
    (key,) = re.findall(r"al-[\w-]+", made.out)
    with serving(forks, folder, "model=pocket", "stage.keys=keys.json", name="keyed") as server:
        page.goto(server.url)
        page.wait_for_selector("#door:not([hidden])")
        for given in ("al-wrong", key):
            page.fill("#key", given)
            page.press("#key", "Enter")
            if given != key:
                until(page, "document.querySelector('#said').textContent.includes('not known')")
        until(page, "document.querySelectorAll('#model option').length === 1")
        assert not page.is_visible("#door")
        asking(page, max_tokens=16)
        asked(page, "Hello")
        until(page, "document.querySelector('#stop').hidden")
        page.reload()
        until(page, "document.querySelectorAll('#model option').length === 1")
        assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
