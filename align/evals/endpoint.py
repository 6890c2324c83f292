"""Models behind an OpenAI-compatible server: their configuration, requests to them, and their answers. Imports no
torch.

Every answer is stored as soon as it arrives (`align.rollout.answer_cache`), so that a resumed run repeats no request.
Source of the format: https://platform.openai.com/docs/api-reference/chat.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from ipaddress import ip_address
from typing import Any, Literal, NamedTuple, TypeGuard
from urllib.parse import urlsplit

import httpx

from align.core.errors import InputError, make_printable, require
from align.core.redaction import MASK, SHORTEST, register_secret
from align.core.spec import get_integer, get_number, parse_text, require_keys
from align.core.types import Conversation
from align.data.chat.reasoning import prepend_reasoning
from align.rollout.answer_cache import AnswerStore, CachedAnswer, ServerAnswerKey, ServerToken
from align.rollout.vllm_client import (
    LOCKED,
    MISREAD,
    VllmFailed,
    build_direct_transport,
    compute_response_limit,
    read_response,
)
from align.run import Input, json_digest
from align.track import show_progress

KEYS = ("key_env", "extra_body", "at_once", "timeout_s")
"""Optional keys of an endpoint in the configuration, besides `url` and `model`."""
PATH = "/chat/completions"
VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")
FIXED_PARAMETERS = ("model", "messages", "stream", "n", "tools")
"""Parameters of a request that `extra_body` may not set."""
MAX_ATTEMPTS = 4
"""Maximum number of attempts at each request."""
FIRST_WAIT_S = 1.0
"""Seconds between the first and the second attempt. The pause doubles after each further one, unless the server asks
for another."""
LONGEST_WAIT_S = 60.0
"""Maximum pause between attempts in seconds, also if the server asks for a longer one."""
RETRY_STATUSES = (408, 429, 500, 502, 503, 504, 529)
"""HTTP statuses after which the same request is sent again."""
TOO_LONG = re.compile(
    r"context[ _-]?(length|window|size)|maximum context|too long|too many tokens|max_new_tokens", re.IGNORECASE
)
"""Pattern of error messages about a prompt that exceeds the context, sent with the status 400 or 422."""
DEFAULT_MAX_TOKENS = 1 << 16
"""Number of tokens assumed as the limit of an answer if a request sets none."""
LAST_TOKENS = 16
"""Number of tokens at the end of an answer whose logprobs are kept."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A model behind an OpenAI-compatible server. Its weights are unknown, so it is identified by its address and its
    name.

    Attributes:
        field: the setting that configures it, for error messages.
        url: of the server, up to its `/v1`.
        model: its name on the server.
        key_env: name of the environment variable that holds the key. Empty if the server needs no key.
        extra_body: further parameters of each request. Parameters set to None are omitted.
        at_once: maximum number of concurrent requests.
        timeout_s: seconds to wait for an answer.
    """

    field: str
    url: str
    model: str
    key_env: str = ""
    extra_body: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    at_once: int = 8
    timeout_s: float = 120.0

    @property
    def digest(self) -> str:
        """SHA-256 of the URL, the model's name and the extra parameters."""
        return json_digest({"url": self.url, "model": self.model, "extra_body": dict(self.extra_body)})

    @property
    def title(self) -> str:
        return f"{self.model} at {self.url}"

    def record(self, digest: str) -> Input:
        """Return the endpoint as an input for a run's manifest.

        Args:
            digest: of the run's requests, or the endpoint's own.
        """
        return Input(digest, ref=self.title, details={"server": self.url})

    def question(self, messages: Sequence[Mapping[str, Any]], draw: int = 0, **drawn: Any) -> ServerAnswerKey:
        """Build the chat request for the model's answer to a conversation. Its digest is the key of the answer cache.

        Args:
            messages: in OpenAI's form.
            draw: index of the answer, counted from 0, if several answers to the same messages are sampled.
            drawn: sampling parameters, such as `max_tokens`.
        """
        body = {"model": self.model, "messages": [*messages], **drawn, **self.extra_body}
        return ServerAnswerKey(self.url, {name: value for name, value in body.items() if value is not None}, draw)


class EndpointFailure(NamedTuple):
    """The reason for which a server gave no answer.

    Attributes:
        kind: `lost` if the server could not be reached or was busy; `too long` for a prompt that does not fit;
            `refused` for any other error status; `unreadable` for a response in an unknown form.
        problem: a clause that continues a sentence about the server.
    """

    kind: Literal["lost", "too long", "refused", "unreadable"]
    problem: str


def parse_endpoint(value: Any, field: str, extra_keys: Sequence[str] = ()) -> Endpoint:
    """Parse the address, model name and settings of an OpenAI-compatible server from a mapping of the configuration.

    Args:
        extra_keys: further keys that the mapping may have.

    Raises:
        InputError: the mapping is invalid, or contains a key instead of the name of an environment variable.
    """
    spec = require_keys(value, field, ("url", "model"), (*KEYS, *extra_keys))
    url = str(spec["url"]).rstrip("/")
    problem = "is no base URL of an API"
    remedy = "Write http://HOST:PORT/v1, without a key, a password or a query string."
    require(is_api(url), f"{field}.url", url, problem, remedy)
    key_env = spec.get("key_env", "")
    is_variable = isinstance(key_env, str) and (key_env == "" or VARIABLE.fullmatch(key_env) is not None)
    problem = "is no name of a variable in capitals"  # it may be the key itself, which is not repeated
    remedy = "Put the key into the environment, and write the variable's name."
    require(is_variable, f"{field}.key_env", MASK, problem, remedy)
    extra = spec.get("extra_body", {})
    require(isinstance(extra, Mapping), f"{field}.extra_body", extra, "is no mapping", "Write {seed: null}.")
    for name, parameter in extra.items():
        is_allowed = isinstance(name, str) and name not in FIXED_PARAMETERS
        require(is_allowed, f"{field}.extra_body.{name}", parameter, "is decided by the evaluation", "Leave it out.")
    return Endpoint(
        field,
        url,
        parse_text(spec["model"], f"{field}.model"),
        key_env,
        dict(extra),
        get_integer(spec, field, "at_once", 8, 1, 256),
        get_number(spec, field, "timeout_s", 120.0, 0.01, 86_400),
    )


def is_api(url: str) -> bool:
    """Return whether a URL is the base address of an HTTP API, without `/completions`, a query or credentials."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:  # an invalid port, or half an IPv6 address
        return False
    has_more = parts.query or parts.fragment or "@" in parts.netloc or parts.path.endswith("/completions")
    has_host = bool(parts.hostname) and url.isascii() and re.search(r"[\s;,?#]", url) is None
    return parts.scheme in ("http", "https") and has_host and not has_more and port != 0


def read_api_key(endpoint: Endpoint) -> str:
    """Read the server's API key from its environment variable, and mask it from now on in all output.

    Returns an empty string if the endpoint names no variable.

    Raises:
        InputError: the variable is not set, or its value cannot be a key.
    """
    if not endpoint.key_env:
        return ""
    key = os.environ.get(endpoint.key_env, "")
    field = f"{endpoint.field}.key_env"
    remedy = "Set it to the key of the server, or drop key_env."
    require(bool(key), field, endpoint.key_env, "is not set in the environment", remedy)
    is_valid = key.isascii() and key.isprintable() and " " not in key
    require(is_valid, field, endpoint.key_env, "holds characters that are not allowed in a key", remedy)
    register_secret(key)
    return key


def to_openai_messages(conversation: Conversation) -> list[dict[str, Any]]:
    """Convert a conversation to a list of messages in OpenAI's format, with tool calls and their results."""
    messages: list[dict[str, Any]] = []
    for message in conversation.messages:
        messages.append({"role": message.role, "content": message.content})
        if message.tool_calls:
            messages[-1]["tool_calls"] = [
                {"type": "function", "id": call.id, "function": {"name": call.name, "arguments": call.arguments}}
                for call in message.tool_calls
            ]
        if message.role == "tool":
            messages[-1]["tool_call_id"] = message.tool_call_id
    return messages


class FetchedAnswers(NamedTuple):
    """The replies of a server, from the cache or new.

    Attributes:
        replies: id of a question → the reply.
        stored_count: number of replies that were in the store already.
    """

    replies: dict[str, CachedAnswer | EndpointFailure]
    stored_count: int


def fetch_answers(
    endpoint: Endpoint,
    questions: Sequence[ServerAnswerKey],
    store: AnswerStore,
    label: str,
    on_reply: Callable[[CachedAnswer | EndpointFailure], None],
    should_store: Callable[[CachedAnswer], bool] = lambda _: True,
) -> FetchedAnswers:
    """Return a server's reply to each request, from the store or by sending the request. New answers are written to the
    store as soon as they arrive.

    Args:
        label: of the progress bar.
        on_reply: is called with each new reply. An exception that it raises ends the requests.
        should_store: returns whether an answer is stored. Another run asks again for one that is not.

    Raises:
        InputError: the server refuses the key, or does not know the model.
        CorruptFile, StorageError: the store cannot be used.
    """
    question_by_id = {question.id: question for question in questions}
    replies: dict[str, CachedAnswer | EndpointFailure] = {**store.find_records(question_by_id)}
    stored_count = len(replies)
    missing = [question for id, question in question_by_id.items() if id not in replies]

    with show_progress(label, len(question_by_id), stored_count) as bar:

        def receive_reply(question: ServerAnswerKey, reply: CachedAnswer | EndpointFailure) -> None:
            if isinstance(reply, CachedAnswer) and should_store(reply):
                store.add([(question, reply)])
            on_reply(reply)
            replies[question.id] = reply
            bar.advance(len(replies))

        if missing:
            asyncio.run(send_requests(endpoint, missing, receive_reply))
    return FetchedAnswers(replies, stored_count)


async def send_requests(
    endpoint: Endpoint,
    questions: Sequence[ServerAnswerKey],
    receive_reply: Callable[[ServerAnswerKey, CachedAnswer | EndpointFailure], None],
) -> None:
    """Send requests to a server concurrently, and pass each reply to `receive_reply`. The first exception of a request
    or of `receive_reply` cancels the others."""
    queue = iter(questions)

    async def ask_in_turn() -> None:
        for question in queue:
            receive_reply(question, await fetch_answer(client, endpoint, question))

    try:
        async with open_client(endpoint) as client, asyncio.TaskGroup() as group:
            for _ in range(min(endpoint.at_once, len(questions))):
                group.create_task(ask_in_turn())
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None


def open_client(endpoint: Endpoint) -> httpx.AsyncClient:
    """Open an HTTP client with the API key that follows no redirects, so that no other server gets the key. It uses no
    proxy for this machine."""
    key = read_api_key(endpoint)
    headers = {"accept-encoding": "identity", **({"authorization": f"Bearer {key}"} if key else {})}
    transport = build_direct_transport(endpoint.url) if is_on_this_machine(endpoint.url) else None
    limits = httpx.Limits(max_connections=endpoint.at_once)  # time in httpx's own queue would count as the answer's
    return httpx.AsyncClient(transport=transport, base_url=endpoint.url, timeout=None, headers=headers, limits=limits)


def is_on_this_machine(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    with suppress(ValueError):  # a name
        return ip_address(host).is_loopback
    return host == "localhost"


async def fetch_answer(
    client: httpx.AsyncClient, endpoint: Endpoint, question: ServerAnswerKey
) -> CachedAnswer | EndpointFailure:
    """Send a request to a server, with up to three retries if it is busy or cannot be reached. Returns the answer, or
    the reason why none exists.

    Raises:
        InputError: see `fetch_answers`.
    """
    limits = [question.body.get(name) for name in ("max_tokens", "max_completion_tokens")]
    max_tokens = max([limit for limit in limits if isinstance(limit, int)], default=DEFAULT_MAX_TOKENS)
    max_bytes = compute_response_limit(max_tokens)
    failure = EndpointFailure("lost", "")
    for attempt in range(MAX_ATTEMPTS):
        pause = FIRST_WAIT_S * 2**attempt
        try:
            async with asyncio.timeout(endpoint.timeout_s):
                response = await read_response(client, "POST", PATH, question.body, max_bytes)
        except TimeoutError:
            failure = EndpointFailure("lost", f"does not answer within {endpoint.timeout_s:g} seconds")
        except httpx.TransportError as error:
            failure = EndpointFailure("lost", f"cannot be reached ({type(error).__name__})")
        except (VllmFailed, httpx.DecodingError) as error:
            return EndpointFailure("unreadable", f"cannot be read: {error}")
        else:
            if response.status_code not in RETRY_STATUSES:
                return parse_response(endpoint, response)
            failure = EndpointFailure(
                "lost", f"answers by status {response.status_code}{describe_error_body(response)}"
            )
            pause = parse_retry_after(response) or pause
        if attempt + 1 < MAX_ATTEMPTS:
            await asyncio.sleep(min(pause, LONGEST_WAIT_S))
    return failure


def parse_retry_after(response: httpx.Response) -> float:
    """Return the pause in seconds that a Retry-After header asks for, as a number or a date. Returns 0 without a valid
    one."""
    value = response.headers.get("retry-after", "")
    try:
        return max(0.0, float(value) if value[:1].isdigit() else parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return 0.0


def parse_response(endpoint: Endpoint, response: httpx.Response) -> CachedAnswer | EndpointFailure:
    """Parse a server's HTTP response into an answer, or into the reason why none exists.

    Raises:
        InputError: see `fetch_answers`.
    """
    status = response.status_code
    details = describe_error_body(response)
    field = endpoint.field
    if status in LOCKED:
        variable = endpoint.key_env or "(none)"
        problem = f"is rejected by {endpoint.url}{details}"
        raise InputError(f"{field}.key_env", variable, problem, "Name another key.")
    if status == 404:
        problem = f"is not known at {endpoint.url}{PATH}{details}"
        raise InputError(f"{field}.model", endpoint.model, problem, f"Compare it with {endpoint.url}/models.")
    if 300 <= status < 400:
        raise InputError(
            f"{field}.url", endpoint.url, "redirects requests to another address", "Name the address itself."
        )
    if status != 200:
        kind = "too long" if status == 413 or (status in (400, 422) and TOO_LONG.search(details)) else "refused"
        return EndpointFailure(kind, f"answers by status {status}{details}")
    try:
        body = json.loads(response.content)
        choice = body["choices"][0]
        has_ended = choice.get("finish_reason") != "length"
        text = parse_message(choice["message"])
        answer = CachedAnswer((), text, has_ended, parse_final_tokens(choice), parse_usage(body))
    except MISREAD as error:
        return EndpointFailure(
            "unreadable", f"sends a response that does not have OpenAI's format ({type(error).__name__})"
        )
    return mask_key(answer, read_api_key(endpoint))


def parse_usage(body: Mapping[str, Any]) -> tuple[int, int]:
    """Return (prompt tokens, completion tokens) from a response. Returns zeros if the server does not count them."""
    usage = body.get("usage")
    if not isinstance(usage, dict):
        return 0, 0
    prompt_tokens, answer_tokens = (usage.get(name) for name in ("prompt_tokens", "completion_tokens"))
    if not is_count(prompt_tokens) or not is_count(answer_tokens):
        return 0, 0
    return prompt_tokens, answer_tokens


def is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def parse_message(message: Mapping[str, Any]) -> str:
    """Return the text of a chat completion's message, with its reasoning in front if there is any. A refusal counts as
    the text if there is no content.

    Raises:
        TypeError: the content is not text.
    """
    content = message.get("content")
    if content is None:
        content = message.get("refusal") or ""
    if not isinstance(content, str):
        raise TypeError("a content that is no text")
    thought = message.get("reasoning_content") or message.get("reasoning")
    return make_encodable(prepend_reasoning(content, thought) if isinstance(thought, str) else content)


def parse_final_tokens(choice: Mapping[str, Any]) -> tuple[ServerToken, ...]:
    """Return the last 16 tokens of a chat completion with the log-probabilities of their likeliest alternatives.

    Returns nothing if the server gives no logprobs, or gives them in another form.
    """
    try:
        entries = (choice.get("logprobs") or {}).get("content") or []
        return tuple(
            ServerToken(
                make_encodable(entry["token"]),
                {make_encodable(token["token"]): float(token["logprob"]) for token in (*entry["top_logprobs"], entry)},
            )
            for entry in entries[-LAST_TOKENS:]
        )
    except MISREAD:
        return ()


def make_encodable(text: Any) -> str:
    """Replace the lone surrogates in a text by `?`, so that it can be encoded as UTF-8.

    Raises:
        TypeError: the value is not text.
    """
    if not isinstance(text, str):
        raise TypeError("a token that is no text")
    return text.encode("utf-8", "replace").decode()


def mask_key(answer: CachedAnswer, key: str) -> CachedAnswer:
    """Return an answer with the API key masked in its text, if the server repeated the key.

    The tokens are dropped then, since each may be a part of the key. A key shorter than `SHORTEST` is not masked: it
    may be an ordinary word.
    """
    names = (name for token in answer.last for name in token.likely)
    texts = (answer.text, "".join(token.text for token in answer.last), *names)
    if len(key) < SHORTEST or not any(key in text for text in texts):
        return answer
    return dataclasses.replace(answer, text=answer.text.replace(key, MASK), last=())


def describe_error_body(response: httpx.Response) -> str:
    """Return the error message of a response on one line, in brackets. Returns an empty string if none exists."""
    try:
        error = json.loads(response.content)["error"]
        text = " ".join(str(error[key]) for key in ("code", "message") if error.get(key))
    except MISREAD:
        text = response.content[:2000].decode("utf-8", "replace")
    text = "".join(letter if letter.isprintable() else " " for letter in make_printable(text))
    text = " ".join(text.split())[:300]
    return f" ({text})" if text else ""


def build_endpoint_error(endpoint: Endpoint, failure: EndpointFailure) -> InputError:
    """Build the InputError about a server that gave no answer, with the advice to run the command again."""
    remedy = "Check the server, then run the same command again: finished answers are kept."
    return InputError(f"{endpoint.field}.url", endpoint.url, failure.problem, remedy)
