"""The chat page of a server in a browser: questions, settings, reloads, errors and keys."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe

sys.path.append(str(Path(__file__).resolve().parents[1] / "e2e"))
from processes import Forks, run_fork_server
from serving import Server, run_serve_stage, write_adapters
from waiting import becomes_true


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    with run_fork_server() as forks:
        yield forks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapters(tmp_path_factory.mktemp("chat"), "one", "two")


@pytest.fixture(scope="module")
def server(forks: Forks, folder: Path) -> Iterator[Server]:
    names = f"{{one: {folder / 'one'}, two: {folder / 'two'}, mix: {{one: 0.9, two: 0.1}}}}"
    with run_serve_stage(forks, folder, "model=pocket", "method=lora", f"stage.adapters={names}") as server:
        yield server


@pytest.fixture
def errors(page: Any) -> Iterator[list[str]]:
    """Errors of the page and its console, among them violations of its policy. The list is empty after the test."""
    messages: list[str] = []
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.on("console", lambda message: messages.append(message.text) if message.type == "error" else None)
    yield messages
    assert not messages


def wait_until(page: Any, expression: str) -> None:
    """Wait until a JavaScript expression is true.

    Playwright's own `wait_for_function` evaluates text in the page, which the page's policy forbids.
    """
    assert becomes_true(lambda: page.evaluate(expression)), (expression, page.inner_text("body"))


def open_chat(page: Any, server: Server) -> Any:
    page.goto(server.url)
    wait_until(page, "document.querySelectorAll('#model option').length > 0")
    return page


def set_request_fields(page: Any, **fields: Any) -> None:
    """Add fields to the page's requests, by default `ignore_eos`.

    An empty answer is no turn of the chat, and a small model generates one now and then.
    """
    fields = {"ignore_eos": True, **fields}
    page.route(
        "**/v1/chat/completions", lambda route: route.continue_(post_data={**route.request.post_data_json, **fields})
    )


def ask_question(page: Any, text: str) -> Any:
    page.fill("#question", text)
    page.press("#question", "Enter")
    page.wait_for_selector(".turn.assistant")
    return page.locator(".turn.assistant").last


def test_somebody_asks_and_is_answered_by_the_model_that_they_chose(page: Any, server: Server, errors: list[str]):
    open_chat(page, server)
    set_request_fields(page, max_tokens=16)
    assert page.locator("#model option").all_inner_texts() == ["one", "two", "mix", "pocket"]
    digests = page.inner_text("#identity")
    models = {model["id"]: model for model in server.get("/v1/models")[1]["data"]}
    assert models["pocket"]["base"] in digests
    page.select_option("#model", "one")
    assert models["one"]["adapter"] in page.inner_text("#identity")
    page.select_option("#model", "mix")
    assert models["two"]["adapter"] in page.inner_text("#identity")
    page.select_option("#model", "one")
    ask_question(page, "Hello <b>there</b>")
    wait_until(page, "document.querySelector('.turn.assistant footer').innerText.includes('tokens')")
    assert page.inner_text(".turn.user .text") == "Hello <b>there</b>"
    assert page.inner_text(".turn.assistant .text").strip()
    assert models["one"]["adapter"][:12] in page.inner_text(".turn.assistant footer")
    assert becomes_true(lambda: len(server.log) == 1)  # the line is written after the answer was sent
    ask_question(page, "And?")
    wait_until(page, "document.querySelectorAll('.turn.assistant footer')[1].innerText.includes('tokens')")
    assert becomes_true(lambda: len(server.log) == 2)
    first, second = server.log
    assert second["prompt_tokens"] > first["prompt_tokens"]  # the chat so far was sent
    page.click("#clear")
    assert page.locator(".turn").count() == 0
    page.reload()
    wait_until(page, "document.querySelectorAll('#model option').length > 0")
    assert page.locator(".turn").count() == 0
    assert page.input_value("#model") == "one"


def test_what_is_set_is_asked_for_and_outlives_a_reload(page: Any, server: Server, errors: list[str]):
    bodies: list[Any] = []
    page.on("request", lambda request: bodies.append(request.post_data_json) if request.method == "POST" else None)
    open_chat(page, server)
    assert not page.is_visible("#system")
    page.click("#settings-said")
    page.fill("#system", "Be brief.")
    page.fill("#temperature", "0")
    page.fill("#most", "3")
    ask_question(page, "Hello")
    wait_until(page, "document.querySelector('.turn.assistant footer').innerText.includes('cut at 3 tokens')")
    system = {"role": "system", "content": "Be brief."}
    assert bodies[0]["messages"] == [system, {"role": "user", "content": "Hello"}]
    assert (bodies[0]["temperature"], bodies[0]["max_completion_tokens"]) == (0, 3)
    page.reload()
    wait_until(page, "document.querySelectorAll('#model option').length > 0")
    assert page.inner_text("#settings-said") == "Settings: system prompt, temperature 0, at most 3 tokens"
    page.click("#settings-said")
    page.fill("#system", "")
    page.fill("#temperature", "")
    page.fill("#most", "0")
    asked_before = len(bodies)
    page.fill("#question", "And?")
    page.press("#question", "Enter")
    assert page.evaluate("document.activeElement.id") == "most"  # the browser reports that it is too low
    page.fill("#most", "")
    set_request_fields(page, max_tokens=4)
    page.press("#question", "Enter")
    wait_until(page, "document.querySelectorAll('.turn.assistant').length === 2")
    assert len(bodies) == asked_before + 1
    assert "temperature" not in bodies[-1]
    assert "max_completion_tokens" not in bodies[-1]
    assert [message["role"] for message in bodies[-1]["messages"]] == ["user", "assistant", "user"]


def test_a_chat_outlives_a_reload_and_is_this_tabs_alone(browser: Any, page: Any, server: Server, errors: list[str]):
    open_chat(page, server)
    set_request_fields(page)
    page.select_option("#model", "two")
    page.click("#settings-said")
    page.fill("#most", "8")
    ask_question(page, "First <i>question</i>")
    wait_until(page, "document.querySelector('.turn.assistant footer').innerText.includes('tokens')")
    turn_texts = page.locator(".turn").all_text_contents()  # including turns without a layout
    page.reload()
    wait_until(page, "document.querySelectorAll('#model option').length > 0")
    assert page.locator(".turn").all_text_contents() == turn_texts
    page.click("#settings-said")
    page.fill("#most", "")  # the answer takes some seconds
    ask_question(page, "A story?")
    wait_until(page, "document.querySelectorAll('.turn.assistant .text')[1].textContent.length > 3")
    page.reload()  # while it answers
    wait_until(page, "document.querySelectorAll('#model option').length > 0")
    footers = page.locator(".turn.assistant footer").all_text_contents()
    assert footers[1].endswith("stopped")
    assert footers[0] in turn_texts[1]
    assert becomes_true(lambda: server.stat("align_requests_running") == 0)
    second_context = browser.new_context()
    assert open_chat(second_context.new_page(), server).locator(".turn").count() == 0
    second_context.close()
    assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]


def test_an_answer_that_fails_keeps_what_was_said_and_one_that_never_begins_gives_the_question_back(
    page: Any, server: Server
):
    open_chat(page, server)
    chunk = '{"choices": [{"delta": {"content": "Half an"}, "finish_reason": null}]}'
    error_chunk = '{"error": {"message": "The server is shutting down."}}'
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=f"data: {chunk}\n\ndata: {error_chunk}\n\n"))
    ask_question(page, "A story?")
    wait_until(page, "document.querySelector('.turn footer').innerText || document.querySelector('#stop').hidden")
    assert page.inner_text(".turn.assistant .text") == "Half an"
    assert page.inner_text(".turn.assistant footer").endswith("ended by an error: The server is shutting down.")
    page.unroute("**/v1/chat/completions")
    error_body = '{"error": {"message": "This limit of your key is used up for now."}}'
    page.route("**/v1/chat/completions", lambda route: route.fulfill(status=429, body=error_body))
    page.fill("#question", "Another?")
    page.press("#question", "Enter")
    wait_until(page, "document.querySelector('#said').textContent.startsWith('This limit')")
    assert page.input_value("#question") == "Another?"
    assert page.locator(".turn").count() == 2


def test_stop_ends_the_answer_and_the_work_for_it(page: Any, server: Server, errors: list[str]):
    open_chat(page, server)
    set_request_fields(page)  # the answer takes some seconds
    ask_question(page, "Tell me a story.")
    wait_until(page, "document.querySelector('.turn.assistant .text').textContent.length > 3")
    page.click("#stop")
    wait_until(page, "document.querySelector('#said').textContent === 'Stopped.'")
    assert page.is_visible("#send")
    assert becomes_true(lambda: server.stat("align_requests_running") == 0)
    assert becomes_true(lambda: server.log[-1]["status"] == 499)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_on_every_screen_and_in_the_dark(browser: Any, server: Server, scheme: str, width: int):
    context = browser.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme)
    page = open_chat(context.new_page(), server)
    set_request_fields(page)
    page.click("#settings-said")
    page.fill("#system", "Be brief.")
    page.fill("#most", "16")
    ask_question(page, "A very long word: " + "a" * 200)
    wait_until(page, "document.querySelector('#stop').hidden")
    ask_question(page, "And?")
    wait_until(page, "document.querySelectorAll('.turn footer')[3].innerText.includes('tokens')")
    below = "document.querySelector('.turn:last-child').getBoundingClientRect().bottom"
    assert page.evaluate(f"{below} <= document.querySelector('#ask').getBoundingClientRect().top + 1")
    wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert wide <= 0
    axe_results = Axe().run(page)
    assert not axe_results.response["violations"], axe_results.generate_report()
    context.close()


def test_a_server_with_keys_asks_for_one(page: Any, forks: Forks, folder: Path):
    completed = forks.run(folder, "stage=serve", "stage.action=key", "stage.keys=keys.json", "stage.tenant=ann")
    (key,) = re.findall(r"al-[\w-]+", completed.out)
    with run_serve_stage(forks, folder, "model=pocket", "stage.keys=keys.json", name="keyed") as server:
        page.goto(server.url)
        page.wait_for_selector("#door:not([hidden])")
        for entered_key in ("al-wrong", key):
            page.fill("#key", entered_key)
            page.press("#key", "Enter")
            if entered_key != key:
                wait_until(page, "document.querySelector('#said').textContent.includes('not known')")
        wait_until(page, "document.querySelectorAll('#model option').length === 1")
        assert not page.is_visible("#door")
        page.set_viewport_size({"width": 390, "height": 844})
        assert page.evaluate("document.querySelector('#model').offsetWidth") > 150
        set_request_fields(page, max_tokens=16)
        ask_question(page, "Hello")
        wait_until(page, "document.querySelector('#stop').hidden")
        page.reload()
        wait_until(page, "document.querySelectorAll('#model option').length === 1")
        assert page.locator(".turn").count() == 2
        page.click("#rekey")
        page.fill("#key", "al-wrong")
        page.press("#key", "Enter")
        wait_until(page, "document.querySelector('#said').textContent.includes('not known')")
        assert page.evaluate("sessionStorage.getItem('align-key')") == f'"{key}"'  # the one that works is kept
        completed = forks.run(folder, "stage=serve", "stage.action=key", "stage.keys=keys.json", "stage.tenant=bo")
        (second_key,) = re.findall(r"al-[\w-]+", completed.out)
        page.fill("#key", second_key)
        assert becomes_true(lambda: server.get("/v1/models", Authorization=f"Bearer {second_key}")[0] == 200)
        page.press("#key", "Enter")
        wait_until(page, "document.querySelector('#door').hidden")
        assert page.locator(".turn").count() == 0  # turns of one key's owner are not sent with another key
        ask_question(page, "Hello again")
        wait_until(page, "document.querySelector('#stop').hidden")
        assert becomes_true(lambda: server.log[-1]["tenant"] == "bo")
        assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
