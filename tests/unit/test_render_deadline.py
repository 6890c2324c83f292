"""Chat templates that loop: the probe finds them, and a deadline stops those that loop for one conversation."""

from __future__ import annotations

import threading
import time

import pytest
from chat_templates import make_tokenizer

from align.core.errors import InputError
from align.core.types import Conversation, Message
from align.data.chat import render_deadline as deadlines
from align.data.chat.encode import render
from align.data.chat.render_deadline import RenderDeadline, render_deadline
from align.data.chat.template import check_template_terminates

LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
BODY = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }};{% endfor %}"


def build_hanging_template(condition: str) -> str:
    return "{% if " + condition + " %}" + LOOP + "{% endif %}" + BODY


@pytest.fixture
def short_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deadlines, "RENDER_S", 0.2)
    monkeypatch.setattr(deadlines, "LOOK_S", 0.05)
    monkeypatch.setattr(deadlines, "WATCH", deadlines.RenderWatch())


@pytest.mark.parametrize(
    "condition",
    [
        "messages[0]['content']|length > 1500",
        "messages|length > 50",
        "tools and tools|length > 10",
        "messages[0]['content'].split(' ')|length > 100",
    ],
)
def test_the_probe_finds_a_template_that_loops_for_some_conversations(
    condition: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("align.data.chat.template.PATIENCE_S", 3)
    with pytest.raises(InputError, match="it did not render a few conversations, short and long"):
        check_template_terminates(build_hanging_template(condition), {})


def test_the_probe_lets_a_template_pass_that_ends() -> None:
    check_template_terminates(build_hanging_template("false"), {})


def test_the_probe_refuses_a_power_that_nothing_could_end() -> None:
    with pytest.raises(InputError, match="it raises a number to a power that it computes"):
        check_template_terminates("{{ 9 ** (9 ** messages[0]['content']|length) }}", {})
    check_template_terminates("{{ 2 ** 3 }}", {})


@pytest.mark.usefixtures("short_deadline")
def test_a_conversation_that_makes_its_template_loop_is_named() -> None:
    """Other conversations are rendered as before, also later ones."""
    tokenizer = make_tokenizer(build_hanging_template("messages[0]['content'] == 'the one'"))
    good = Conversation((Message("user", "another"),), id="row 2")
    bad = Conversation((Message("user", "the one"),), id="row 1")
    assert render(tokenizer, good) == "user: another;"
    for _ in range(2):
        with pytest.raises(InputError, match=r"row 1=1 turns.*the chat template: it has not ended after 0\.2 s"):
            render(tokenizer, bad)
        assert render(tokenizer, good) == "user: another;"
    assert not deadlines.WATCH.renderings


@pytest.mark.usefixtures("short_deadline")
def test_threads_are_ended_one_by_one_by_their_own_time() -> None:
    """A waiting thread uses no processor time and is not stopped."""
    was_stopped: dict[str, bool] = {}
    release = threading.Event()

    def compute(name: str, seconds: float) -> None:
        try:
            with render_deadline():
                until = time.thread_time() + seconds
                while time.thread_time() < until:
                    pass
            was_stopped[name] = False
        except RenderDeadline:
            was_stopped[name] = True

    def wait() -> None:
        with render_deadline():
            release.wait(60)
        was_stopped["waits"] = False

    seconds_of_thread = {"short": 0.01, "long": 60.0, "longer": 90.0}
    threads = [threading.Thread(target=compute, args=item) for item in seconds_of_thread.items()]
    waiting = threading.Thread(target=wait)
    for thread in (waiting, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    release.set()
    waiting.join()
    assert was_stopped == {"short": False, "long": True, "longer": True, "waits": False}
