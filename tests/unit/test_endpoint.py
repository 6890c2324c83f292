"""Models behind a server: requests, parsing of answers, retries and failures."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from email.utils import formatdate
from pathlib import Path
from socket import socket
from typing import Any

import pytest
from chat_server import ChatServer, Reply, build_chat_reply, build_error_reply, run_chat_server

from align.core.errors import InputError, StorageError
from align.core.redaction import redact
from align.core.types import Conversation, Message, ToolCall
from align.evals import endpoint as module
from align.evals.endpoint import Endpoint, EndpointFailure, fetch_answers, parse_endpoint, to_openai_messages
from align.rollout.answer_cache import AnswerStore, CachedAnswer, ServerAnswerKey, ServerToken

FIELD = "stage.systems.theirs"
HELLO = [{"role": "user", "content": "Hello?"}]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ChatServer]:
    monkeypatch.setattr(module, "FIRST_WAIT_S", 0.01)
    with run_chat_server(lambda _: build_chat_reply("Hello.")) as server:
        yield server


@pytest.fixture
def store(tmp_path: Path) -> AnswerStore:
    return AnswerStore(tmp_path / "answers.db")


def build_endpoint(server: ChatServer, **settings: Any) -> Endpoint:
    return parse_endpoint({"url": server.url, "model": "m", **settings}, FIELD)


def build_questions(endpoint: Endpoint, count: int = 1) -> list[ServerAnswerKey]:
    return [endpoint.question(HELLO, max_tokens=8, temperature=1.0, seed=seed) for seed in range(count)]


def fetch_answer(endpoint: Endpoint, store: AnswerStore) -> CachedAnswer | EndpointFailure:
    [response] = fetch_answers(endpoint, build_questions(endpoint), store, "x", lambda _: None)[0].values()
    return response


def test_a_question_is_asked_once_and_several_at_once(server: ChatServer, store: AnswerStore):
    server.says = lambda body: build_chat_reply(f"answer {body['seed']}")._replace(wait_s=0.05)
    endpoint = build_endpoint(server, at_once=3)
    questions = build_questions(endpoint, 7)
    answers, cached_count = fetch_answers(endpoint, [*questions, questions[0]], store, "x", lambda _: None)
    assert cached_count == 0
    assert [answers[q.id] for q in questions] == [CachedAnswer((), f"answer {seed}", True) for seed in range(7)]
    assert (len(server.requests), server.most_at_once) == (7, 3)
    body = {"model": "m", "messages": HELLO, "max_tokens": 8, "temperature": 1.0}
    assert sorted(server.requests, key=lambda request: request["seed"]) == [{**body, "seed": seed} for seed in range(7)]
    assert server.request_headers[0]["path"] == "/v1/chat/completions"
    assert "authorization" not in server.request_headers[0]
    later_answers, cached_count = fetch_answers(
        endpoint, [*questions, *build_questions(endpoint, 8)], store, "x", lambda _: None
    )
    assert cached_count == 7
    assert len(later_answers) == 8
    assert len(server.requests) == 8, "one that was not asked before"


def test_whatever_decides_an_answer_is_in_its_name():
    spec: dict[str, Any] = {"url": "http://h/v1", "model": "m"}
    endpoint = parse_endpoint(spec, FIELD)
    questions = [
        endpoint.question(HELLO, max_tokens=8),
        endpoint.question(HELLO, max_tokens=9),
        endpoint.question([{"role": "user", "content": "Hello!"}], max_tokens=8),
        parse_endpoint({**spec, "model": "n"}, FIELD).question(HELLO, max_tokens=8),
        parse_endpoint({**spec, "url": "http://h/v2"}, FIELD).question(HELLO, max_tokens=8),
        parse_endpoint({**spec, "extra_body": {"top_p": 0.5}}, FIELD).question(HELLO, max_tokens=8),
    ]
    assert len({question.id for question in questions}) == len(questions)
    same_endpoint = parse_endpoint({**spec, "url": "http://h/v1/", "at_once": 2, "timeout_s": 3}, FIELD)
    assert same_endpoint.question(HELLO, max_tokens=8).id == questions[0].id
    assert same_endpoint.digest == endpoint.digest


def test_parameters_that_a_server_does_not_know_are_left_out():
    extra = {"seed": None, "max_tokens": None, "max_completion_tokens": 20}
    endpoint = parse_endpoint({"url": "http://h/v1", "model": "m", "extra_body": extra}, FIELD)
    body = endpoint.question(HELLO, max_tokens=8, seed=1).body
    assert body == {"model": "m", "messages": HELLO, "max_completion_tokens": 20}


def test_messages_in_their_form():
    call = ToolCall.from_arguments("rain", {"in": "Oslo"}, "c1")
    turns = Message("user", "Rain?"), Message("assistant", "", tool_calls=(call,)), Message("tool", "no", name="rain")
    assert to_openai_messages(Conversation(turns)) == [
        {"role": "user", "content": "Rain?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {"type": "function", "id": "c1", "function": {"name": "rain", "arguments": '{"in": "Oslo"}'}}
            ],
        },
        {"role": "tool", "content": "no", "tool_call_id": ""},
    ]


@pytest.mark.parametrize(
    ("reply", "text", "ended"),
    [
        (build_chat_reply("Yes."), "Yes.", True),
        (build_chat_reply(None), "", True),
        (build_chat_reply(None, refusal="No."), "No.", True),
        (build_chat_reply("Yes.", reasoning_content="Hm."), "<think>\nHm.\n</think>\n\nYes.", True),
        (build_chat_reply("half \ud800"), "half ?", True),
        (build_chat_reply("<a>\u2028\0"), "<a>\u2028\0", True),
        (Reply({"choices": [{"message": {"content": "Ye"}, "finish_reason": "length"}]}), "Ye", False),
    ],
)
def test_what_is_read_of_an_answer(reply: Reply, text: str, ended: bool, server: ChatServer, store: AnswerStore):
    server.says = lambda _: reply
    assert fetch_answer(build_endpoint(server), store) == CachedAnswer((), text, ended)
    assert fetch_answer(build_endpoint(server), store) == CachedAnswer((), text, ended), "as it was kept"
    assert len(server.requests) == 1


DEEP = b"[" * 100_000
UNREADABLE = (
    b"",
    b"prose",
    b"null",
    b"[]",
    b"{}",
    b'{"choices": []}',
    b'{"choices": [{}]}',
    b"\xff\xfe",
    DEEP,
    b'{"choices": [{"message": null}]}',
    b'{"choices": [{"message": {"content": 3}}]}',
    b'{"choices": [{"message": {"content": [{"text": "a"}]}}]}',
    b" " * (1 << 21),
)


@pytest.mark.parametrize("body", UNREADABLE, ids=range(len(UNREADABLE)))
def test_what_is_no_answer(body: bytes, server: ChatServer, store: AnswerStore):
    server.says = lambda _: Reply(body)
    failure = fetch_answer(build_endpoint(server), store)
    assert isinstance(failure, EndpointFailure)
    assert failure.kind == "unreadable"
    assert len(server.requests) == 1
    assert not store.path.exists(), "what is no answer is not kept"


@pytest.mark.parametrize(
    "logprobs",
    [
        3,
        {"content": 3},
        {"content": [{"token": "a"}]},
        {"content": [{"token": "a", "logprob": None, "top_logprobs": []}]},
        {"content": [{"token": 5, "logprob": 0, "top_logprobs": []}]},
        {"content": [{"token": "a", "logprob": 0, "top_logprobs": [{"token": None, "logprob": -1}]}]},
        {"content": {"a": 1}},
        {"tokens": ["a"], "token_logprobs": [-1]},
    ],
)
def test_logprobs_in_another_form_are_none(logprobs: Any, server: ChatServer, store: AnswerStore):
    server.says = lambda _: Reply({"choices": [{"message": {"content": "a"}, "logprobs": logprobs}]})
    assert fetch_answer(build_endpoint(server), store) == CachedAnswer((), "a", True)


def test_half_a_character_in_a_token_is_written_as_in_a_text(server: ChatServer, store: AnswerStore):
    server.says = lambda _: build_chat_reply("a \ud800", ("\ud800", {"\ud800": -0.5}))
    assert fetch_answer(build_endpoint(server), store) == CachedAnswer(
        (), "a ?", True, (ServerToken("?", {"?": -0.5}),)
    )
    assert fetch_answer(build_endpoint(server), store) == CachedAnswer(
        (), "a ?", True, (ServerToken("?", {"?": -0.5}),)
    ), "as it was kept"


def reply_in_turn(*replies: Reply) -> Callable[[Any], Reply]:
    remaining = [*replies]
    return lambda _: remaining.pop(0)


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504, 529])
def test_a_busy_server_is_asked_again(status: int, server: ChatServer, store: AnswerStore):
    server.says = reply_in_turn(
        build_error_reply(status, "busy"), build_error_reply(status, "busy"), build_chat_reply("Yes.")
    )
    assert fetch_answer(build_endpoint(server), store) == CachedAnswer((), "Yes.", True)
    server.says = lambda _: build_error_reply(status, "busy")
    assert fetch_answer(build_endpoint(server, model="n"), store) == EndpointFailure(
        "lost", f"answers by status {status} (busy)"
    )
    assert len(server.requests) == 3 + module.MAX_ATTEMPTS


@pytest.mark.parametrize("asked_for", ["0.3", "date"])
def test_a_server_says_when_to_ask_again(asked_for: str, server: ChatServer, store: AnswerStore):
    header = formatdate(time.time() + 2, usegmt=True) if asked_for == "date" else asked_for
    server.says = reply_in_turn(build_error_reply(429, "busy", retry_after=header), build_chat_reply("Yes."))
    began = time.monotonic()
    assert fetch_answer(build_endpoint(server), store) == CachedAnswer((), "Yes.", True)
    assert 0.25 < time.monotonic() - began < 5


@pytest.mark.parametrize("header", ["1e9", "99999", "inf", "nan", "soon", "-5", "Mon, 99 Foo 2026"])
def test_a_server_cannot_make_anybody_wait_for_long(
    header: str, server: ChatServer, store: AnswerStore, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "LONGEST_WAIT_S", 0.05)
    server.says = reply_in_turn(build_error_reply(429, "busy", retry_after=header), build_chat_reply("Yes."))
    began = time.monotonic()
    assert fetch_answer(build_endpoint(server), store) == CachedAnswer((), "Yes.", True)
    assert time.monotonic() - began < 5


def test_a_server_that_takes_too_long(server: ChatServer, store: AnswerStore):
    server.says = lambda _: build_chat_reply("late")._replace(wait_s=1)
    failure = fetch_answer(build_endpoint(server, timeout_s=0.05), store)
    assert failure == EndpointFailure("lost", "does not answer within 0.05 seconds")
    assert len(server.requests) == module.MAX_ATTEMPTS


def send_drops() -> Iterator[bytes]:
    for _ in range(200):
        time.sleep(0.02)
        yield b" "


def test_a_server_that_answers_by_drops_has_its_time(server: ChatServer, store: AnswerStore):
    server.says = lambda _: Reply(send_drops())
    began = time.monotonic()
    failure = fetch_answer(build_endpoint(server, timeout_s=0.2), store)
    assert failure == EndpointFailure("lost", "does not answer within 0.2 seconds")
    assert time.monotonic() - began < 3


def test_an_answer_without_an_end_is_not_read_to_its_end(server: ChatServer, store: AnswerStore):
    server.says = lambda _: Reply(b"x" * (1 << 16) for _ in range(1 << 20))
    failure = fetch_answer(build_endpoint(server), store)
    assert isinstance(failure, EndpointFailure)
    assert failure.kind == "unreadable"
    assert "more than 1," in failure.problem


def test_nobody_listens(store: AnswerStore, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "FIRST_WAIT_S", 0.01)
    with closing(socket()) as free_socket:
        free_socket.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free_socket.getsockname()[1]}/v1"
        failure = fetch_answer(parse_endpoint({"url": url, "model": "m"}, FIELD), store)
    assert failure == EndpointFailure("lost", "cannot be reached (ConnectError)")


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        (build_error_reply(400, "This model's maximum context length is 4096 tokens."), "too long"),
        (build_error_reply(400, "No.", "context_length_exceeded"), "too long"),
        (build_error_reply(413, ""), "too long"),
        (build_error_reply(422, "`inputs` tokens + `max_new_tokens` must be <= 9"), "too long"),
        (build_error_reply(400, "the request exceeds the available context size"), "too long"),
        (build_error_reply(400, "logprobs are not supported"), "refused"),
        (build_error_reply(402, "pay"), "refused"),
        (Reply({"object": "error", "message": "prompt too long"}, 400), "too long"),
        (build_error_reply(418, "tea"), "refused"),
        (build_error_reply(400, "Unsupported parameter: 'max_tokens' is not supported in this context."), "refused"),
        (build_error_reply(400, "this exceeds the context window"), "too long"),
        (build_error_reply(400, "too many tokens: 9"), "too long"),
    ],
)
def test_a_refusal_is_not_asked_again_and_not_kept(reply: Reply, kind: str, server: ChatServer, store: AnswerStore):
    server.says = lambda _: reply
    failure = fetch_answer(build_endpoint(server), store)
    assert isinstance(failure, EndpointFailure)
    assert failure.kind == kind
    assert f"status {reply.status}" in failure.problem
    assert len(server.requests) == 1
    assert not store.path.exists()


def test_what_a_server_says_of_an_error_is_one_bounded_line(server: ChatServer, store: AnswerStore):
    server.says = lambda _: build_error_reply(400, "\x1b[31mred\nline " + "x" * 5000)
    failure = fetch_answer(build_endpoint(server), store)
    assert isinstance(failure, EndpointFailure)
    assert (
        failure.problem.startswith("answers by status 400 ( [31mred line xxx") or "[31mred line xxx" in failure.problem
    )
    assert failure.problem.isprintable()
    assert len(failure.problem) < 400


@pytest.mark.parametrize(
    ("status", "named"), [(401, "key_env"), (403, "key_env"), (404, "model"), (301, "url"), (307, "url"), (302, "url")]
)
def test_what_no_other_question_would_change_ends_the_asking(
    status: int, named: str, server: ChatServer, store: AnswerStore
):
    server.says = lambda _: build_error_reply(status, "no", location=server.url)
    with pytest.raises(InputError) as refused:
        fetch_answers(build_endpoint(server), build_questions(build_endpoint(server), 50), store, "x", lambda _: None)
    assert refused.value.field == f"{FIELD}.{named}"
    assert len(server.requests) <= 8


def test_the_key_goes_to_the_server_alone(server: ChatServer, store: AnswerStore, monkeypatch: pytest.MonkeyPatch):
    key = "s3cret-of-the-judges"
    monkeypatch.setenv("WHERE_IT_IS", key)
    endpoint = build_endpoint(server, key_env="WHERE_IT_IS")
    with run_chat_server(lambda _: build_chat_reply("Hello.")) as other_server:
        fetch_answer(endpoint, store)
        assert server.request_headers[0]["authorization"] == f"Bearer {key}"
        server.says = lambda _: Reply(b"", 307, {"location": f"{other_server.url}/chat/completions"})
        with pytest.raises(InputError):
            fetch_answers(endpoint, build_questions(endpoint, 2), store, "x", lambda _: None)
        assert other_server.requests == []
    server.says = lambda _: build_error_reply(401, f"wrong key {key}")
    with pytest.raises(InputError) as refused:
        fetch_answers(endpoint, build_questions(endpoint, 2), store, "x", lambda _: None)
    assert key not in str(refused.value)
    assert "***" in str(refused.value)
    assert redact(f"a {key}") == "a ***"
    assert key.encode() not in store.path.read_bytes()
    assert key not in repr(endpoint)


def test_a_key_that_the_server_repeats_is_not_kept(
    server: ChatServer, store: AnswerStore, monkeypatch: pytest.MonkeyPatch
):
    key = "s3cret-of-the-judges"
    logprobs = {"x": -0.5}
    monkeypatch.setenv("WHERE_IT_IS", key)
    endpoint = build_endpoint(server, key_env="WHERE_IT_IS")
    replies = [
        build_chat_reply(f"You sent {key}.", ("s3cret-of-", logprobs), ("the-judges", logprobs)),
        build_chat_reply("Hm.", ("x", {f"{key}!": -1.0})),
        build_chat_reply("Hm.", reasoning_content=f"I got {key}"),
        build_chat_reply("Hm.", ("s3cret-of-", logprobs), ("the-judges", logprobs)),
        build_chat_reply("Hm.", ("x", logprobs)),
    ]
    server.says = lambda body: replies[body["seed"]]
    answers, _ = fetch_answers(endpoint, build_questions(endpoint, 5), store, "x", lambda _: None)
    texts = ["You sent ***.", "Hm.", "<think>\nI got ***\n</think>\n\nHm.", "Hm.", "Hm."]
    ordered_answers = [answers[question.id] for question in build_questions(endpoint, 5)]
    assert ordered_answers == [
        *(CachedAnswer((), text, True) for text in texts[:4]),
        CachedAnswer((), "Hm.", True, (ServerToken("x", logprobs),)),
    ]
    assert b"s3cret" not in store.path.read_bytes()


def test_a_key_of_few_letters_is_a_word(server: ChatServer, store: AnswerStore, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WHERE_IT_IS", "EMPTY")
    server.says = lambda _: build_chat_reply("The set is EMPTY.")
    assert fetch_answer(build_endpoint(server, key_env="WHERE_IT_IS"), store) == CachedAnswer(
        (), "The set is EMPTY.", True
    )


@pytest.mark.parametrize("value", ["", "two words", "line\nbreak", "é"])
def test_a_key_that_is_none(value: str, store: AnswerStore, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WHERE_IT_IS", value)
    endpoint = parse_endpoint({"url": "http://127.0.0.1:1/v1", "model": "m", "key_env": "WHERE_IT_IS"}, FIELD)
    with pytest.raises(InputError, match=rf"^{FIELD}.key_env=WHERE_IT_IS: "):
        fetch_answer(endpoint, store)


def test_a_proxy_is_not_asked_for_this_machine(server: ChatServer, store: AnswerStore, monkeypatch: pytest.MonkeyPatch):
    with run_chat_server(lambda _: build_chat_reply("by the proxy")) as proxy:
        for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.url.removesuffix("/v1"))
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        assert fetch_answer(build_endpoint(server), store) == CachedAnswer((), "Hello.", True)
        remote_endpoint = parse_endpoint({"url": "http://judge.invalid/v1", "model": "m"}, FIELD)
        assert fetch_answer(remote_endpoint, store) == CachedAnswer((), "by the proxy", True)
        assert len(proxy.requests) == 1


def test_what_watches_may_end_the_asking(server: ChatServer, store: AnswerStore):
    """Answers that arrived before the end are kept, also those of the other connection."""
    outcomes: list[Any] = []

    def watch(outcome: CachedAnswer | EndpointFailure) -> None:
        outcomes.append(outcome)
        if len(outcomes) == 5:
            raise StorageError("x", "y", "z", "w")

    endpoint = build_endpoint(server, at_once=2)
    with pytest.raises(StorageError):
        fetch_answers(endpoint, build_questions(endpoint, 40), store, "x", watch)
    assert len(server.requests) <= 7
    assert 5 <= len(store.find_records(q.id for q in build_questions(endpoint, 40))) <= len(server.requests)


@pytest.mark.parametrize(
    ("spec", "named"),
    [
        ("x", ""),
        ({"url": "http://h/v1"}, ".model"),
        ({"model": "m"}, ".url"),
        ({"weights": 1}, ".weights"),
        *(
            ({"url": url}, ".url")
            for url in (
                "h/v1",
                "ftp://h/v1",
                "http://",
                "http://u:p@h/v1",
                "http://h/v1?key=k",
                "http://h/v1#f",
                "http://h:99999/v1",
                "http://h:x/v1",
                "http://[::1/v1",
                "http://h /v1",
                "http://h/v1,http://i",
                "http://h/v1/chat/completions",
                "",
                3,
                None,
            )
        ),
        ({"model": ""}, ".model"),
        ({"model": ["m"]}, ".model"),
        ({"at_once": 0}, ".at_once"),
        ({"at_once": 1.5}, ".at_once"),
        ({"timeout_s": 0}, ".timeout_s"),
        ({"timeout_s": float("nan")}, ".timeout_s"),
        ({"extra_body": 3}, ".extra_body"),
        ({"extra_body": {"messages": []}}, ".extra_body.messages"),
        ({"extra_body": {"stream": True}}, ".extra_body.stream"),
        ({"extra_body": {"n": 2}}, ".extra_body.n"),
        *(({"key_env": key}, ".key_env") for key in ("sk-abcdef", "hf_abcdef", "two words", 3, None)),
    ],
)
def test_endpoints_that_are_refused(spec: Any, named: str):
    full_spec = {"url": "http://h/v1", "model": "m", **spec} if isinstance(spec, Mapping) else spec
    if named in (".model", ".url") and isinstance(spec, Mapping) and named[1:] not in spec:
        full_spec = spec
    with pytest.raises(InputError) as refused:
        parse_endpoint(full_spec, FIELD)
    assert refused.value.field == FIELD + named
    for key in ("sk-abcdef", "hf_abcdef"):
        assert key not in str(refused.value), "somebody's key"


def test_the_store_has_questions_as_they_were_asked(server: ChatServer, store: AnswerStore):
    fetch_answer(build_endpoint(server), store)
    with closing(sqlite3.connect(store.path)) as db:
        rows: Sequence[tuple[str, str, str]] = db.execute("SELECT * FROM answers").fetchall()
    assert [json.loads(row[1]) for row in rows] == [{"url": server.url, "body": server.requests[0], "draw": 0}]


def test_each_further_answer_to_one_request_is_asked_for(server: ChatServer, store: AnswerStore):
    endpoint = build_endpoint(server, extra_body={"seed": None})
    questions = [endpoint.question(HELLO, draw, seed=7 + draw) for draw in range(3)]
    assert len({question.id for question in questions}) == 3
    answers, _ = fetch_answers(endpoint, questions, store, "x", lambda _: None)
    assert len(answers) == len(server.requests) == 3
    assert {json.dumps(body) for body in server.requests} == {json.dumps({"model": "m", "messages": HELLO})}
    fetch_answers(endpoint, questions, store, "x", lambda _: None)
    assert len(server.requests) == 3
