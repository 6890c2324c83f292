"""Models behind an OpenAI-compatible server: how they are named, what they are asked, and what they say. Imports no
torch.

Every answer is kept as soon as it is there (`align.rollout.answer_cache`): a run that was cut off asks nothing twice.
Source of the form: https://platform.openai.com/docs/api-reference/chat.
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
from align.core.spec import check_keys, get_integer, get_number, parse_text
from align.core.types import Conversation
from align.data.chat.reasoning import with_reasoning
from align.rollout.answer_cache import Answer, AnswerStore, Question, Token
from align.rollout.vllm_server import LOCKED, MISREAD, VllmFailed, direct_transport, read_response, response_limit
from align.run import Input, json_digest
from align.track import show_progress

KEYS = ("key_env", "extra_body", "at_once", "timeout_s")
"""What may be said of an endpoint beside its url and model."""
PATH = "/chat/completions"
VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")
OURS = ("model", "messages", "stream", "n", "tools")
"""Parameters of a request that `extra_body` cannot change."""
TRIES, FIRST_WAIT_S, LONGEST_WAIT_S = 4, 1.0, 60.0
"""How often a request is made, and the pauses between: doubled each time, or as long as the server says."""
AGAIN = (408, 429, 500, 502, 503, 504, 529)
"""Statuses after which the same request may be answered."""
TOO_LONG = re.compile(
    r"context[ _-]?(length|window|size)|maximum context|too long|too many tokens|max_new_tokens", re.IGNORECASE
)
"""What servers say of a prompt that does not fit, beside the status 400, 413 or 422."""
MOST_TOKENS = 1 << 16
"""Tokens of an answer where nobody says."""
LAST = 16
"""Tokens at the end of an answer whose logprobs are kept."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A model behind a server. Nobody here knows its weights: it is known by its address and its name.

    Attributes:
        field: the setting that names it.
        url: of the server, up to its `/v1`.
        model: by which the server knows it.
        key_env: the variable of the environment that holds the key; empty where none is needed.
        extra_body: further parameters of each request; one that is None is left out of it.
        at_once: requests that wait for their answers together.
        timeout_s: for an answer.
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
        """Of what tells one model from another."""
        return json_digest({"url": self.url, "model": self.model, "extra_body": dict(self.extra_body)})

    @property
    def title(self) -> str:
        return f"{self.model} at {self.url}"

    def record(self, digest: str) -> Input:
        """As an input of a run.

        Args:
            digest: of what it is asked for, or its own.
        """
        return Input(digest, ref=self.title, details={"server": self.url})

    def question(self, messages: Sequence[Mapping[str, Any]], draw: int = 0, **drawn: Any) -> Question:
        """
        Args:
            messages: in OpenAI's form.
            draw: which answer to them it is, from 0.
            drawn: how the answer is drawn, such as `max_tokens`.
        """
        body = {"model": self.model, "messages": [*messages], **drawn, **self.extra_body}
        return Question(self.url, {name: value for name, value in body.items() if value is not None}, draw)


class Failure(NamedTuple):
    """Why there is no answer.

    Attributes:
        kind: `lost` where the server could not be reached, or had no time; `too long` of a prompt; `refused`;
            `unreadable`.
        said: a clause.
    """

    kind: Literal["lost", "too long", "refused", "unreadable"]
    said: str


def parsed_endpoint(given: Any, field: str, more: Sequence[str] = ()) -> Endpoint:
    """An endpoint as a mapping of the configuration writes it.

    Args:
        more: further keys that the mapping may have.

    Raises:
        InputError: it names none, or holds a key instead of the name of a variable.
    """
    spec = check_keys(given, field, ("url", "model"), (*KEYS, *more))
    url, key_env = str(spec["url"]).rstrip("/"), spec.get("key_env", "")
    problem, remedy = "is no address of an API", "Write http://HOST:PORT/v1, without a key, a password or a question."
    require(is_api(url), f"{field}.url", url, problem, remedy)
    told = isinstance(key_env, str) and (key_env == "" or VARIABLE.fullmatch(key_env) is not None)
    problem = "is no name of a variable in capitals"  # it may be the key itself, which is not repeated
    require(told, f"{field}.key_env", MASK, problem, "Put the key into the environment, and write the variable's name.")
    extra = spec.get("extra_body", {})
    require(isinstance(extra, Mapping), f"{field}.extra_body", extra, "is no mapping", "Write {seed: null}.")
    for name, value in extra.items():
        right = isinstance(name, str) and name not in OURS
        require(right, f"{field}.extra_body.{name}", value, "is decided by the evaluation", "Leave it out.")
    return Endpoint(
        field, url, parse_text(spec["model"], f"{field}.model"), key_env, dict(extra),
        get_integer(spec, field, "at_once", 8, 1, 256), get_number(spec, field, "timeout_s", 120.0, 0.01, 86_400),
    )  # fmt: skip


def is_api(url: str) -> bool:
    """Whether a URL is the address of a server's API, and nothing more."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:  # a port that is none, half an IPv6 address
        return False
    more = parts.query or parts.fragment or "@" in parts.netloc or parts.path.endswith("/completions")
    named = bool(parts.hostname) and url.isascii() and re.search(r"[\s;,?#]", url) is None
    return parts.scheme in ("http", "https") and named and not more and port != 0


def api_key(endpoint: Endpoint) -> str:
    """The key, from the environment; empty where none is named. It is masked from now on wherever it would be shown.

    Raises:
        InputError: the variable is not set, or holds what can be no key.
    """
    if not endpoint.key_env:
        return ""
    key, field = os.environ.get(endpoint.key_env, ""), f"{endpoint.field}.key_env"
    remedy = "Set it to the key of the server, or drop key_env."
    require(bool(key), field, endpoint.key_env, "is not set in the environment", remedy)
    good = key.isascii() and key.isprintable() and " " not in key
    require(good, field, endpoint.key_env, "has characters that no key has", remedy)
    register_secret(key)
    return key


def messages_of(conversation: Conversation) -> list[dict[str, Any]]:
    """Return a conversation in OpenAI's form."""
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


def answers_from(
    endpoint: Endpoint, questions: Sequence[Question], store: AnswerStore, label: str,
    watch: Callable[[Answer | Failure], None], keeps: Callable[[Answer], bool] = lambda _: True,
) -> tuple[dict[str, Answer | Failure], int]:  # fmt: skip
    """What an endpoint says to questions: what it said before, and the rest, each kept as soon as it is there.

    Args:
        label: of the progress that is shown.
        watch: is told what came of each question; what it raises ends the asking.
        keeps: whether an answer is worth keeping; another run asks again for one that is not.

    Returns:
        by the question's id; and how many were answered before.

    Raises:
        InputError: the server wants another key, or does not know the model.
        CorruptFile, StorageError: the store cannot be used.
    """
    wanted = {question.id: question for question in questions}
    said: dict[str, Answer | Failure] = {**store.found(wanted)}
    before, missing = len(said), [question for id, question in wanted.items() if id not in said]

    with show_progress(label, len(wanted), before) as bar:

        def heard(question: Question, found: Answer | Failure) -> None:
            if isinstance(found, Answer) and keeps(found):
                store.add([(question, found)])
            watch(found)
            said[question.id] = found
            bar.advance(len(said))

        if missing:
            asyncio.run(ask(endpoint, missing, heard))
    return said, before


async def ask(
    endpoint: Endpoint, questions: Sequence[Question], heard: Callable[[Question, Answer | Failure], None]
) -> None:
    """Ask several questions at once. The first error, of theirs or of `heard`, ends all of them."""
    waiting = iter(questions)

    async def by_turns() -> None:
        for question in waiting:
            heard(question, await answer_to(client, endpoint, question))

    try:
        async with client_of(endpoint) as client, asyncio.TaskGroup() as group:
            for _ in range(min(endpoint.at_once, len(questions))):
                group.create_task(by_turns())
    except BaseExceptionGroup as several:
        raise several.exceptions[0] from None


def client_of(endpoint: Endpoint) -> httpx.AsyncClient:
    """Follows no redirect, so that nobody else gets the key; and goes past any proxy to this machine itself."""
    key = api_key(endpoint)
    headers = {"accept-encoding": "identity", **({"authorization": f"Bearer {key}"} if key else {})}
    transport = direct_transport(endpoint.url) if on_this_machine(endpoint.url) else None
    limits = httpx.Limits(max_connections=endpoint.at_once)  # of httpx's own 100, waiting would cost an answer's time
    return httpx.AsyncClient(transport=transport, base_url=endpoint.url, timeout=None, headers=headers, limits=limits)


def on_this_machine(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    with suppress(ValueError):  # a name
        return ip_address(host).is_loopback
    return host == "localhost"


async def answer_to(client: httpx.AsyncClient, endpoint: Endpoint, question: Question) -> Answer | Failure:
    """An answer, asked for again where the server is busy or out of reach. Raises: InputError: see `answers_from`."""
    asked = [question.body.get(name) for name in ("max_tokens", "max_completion_tokens")]
    limit = response_limit(max([each for each in asked if isinstance(each, int)], default=MOST_TOKENS))
    failure = Failure("lost", "")
    for turn in range(TRIES):
        pause = FIRST_WAIT_S * 2**turn
        try:
            async with asyncio.timeout(endpoint.timeout_s):
                told = await read_response(client, "POST", PATH, question.body, limit)
        except TimeoutError:
            failure = Failure("lost", f"does not answer within {endpoint.timeout_s:g} seconds")
        except httpx.TransportError as error:
            failure = Failure("lost", f"cannot be reached ({type(error).__name__})")
        except (VllmFailed, httpx.DecodingError) as error:
            return Failure("unreadable", f"cannot be read: {error}")
        else:
            if told.status_code not in AGAIN:
                return answer_in(endpoint, told)
            failure = Failure("lost", f"answers by status {told.status_code}{words_of(told)}")
            pause = pause_asked(told) or pause
        if turn + 1 < TRIES:
            await asyncio.sleep(min(pause, LONGEST_WAIT_S))
    return failure


def pause_asked(told: httpx.Response) -> float:
    """Seconds that a server asks for, as a number or a date; 0 where it asks for none."""
    asked = told.headers.get("retry-after", "")
    try:
        return max(0.0, float(asked) if asked[:1].isdigit() else parsedate_to_datetime(asked).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return 0.0


def answer_in(endpoint: Endpoint, told: httpx.Response) -> Answer | Failure:
    """The answer that a response holds. Raises: InputError: see `answers_from`."""
    status, words, at = told.status_code, words_of(told), endpoint.field
    if status in LOCKED:
        given = endpoint.key_env or "(none)"
        raise InputError(f"{at}.key_env", given, f"is not let in by {endpoint.url}{words}", "Name another key.")
    if status == 404:
        problem = f"is not known at {endpoint.url}{PATH}{words}"
        raise InputError(f"{at}.model", endpoint.model, problem, f"Compare it with {endpoint.url}/models.")
    if 300 <= status < 400:
        raise InputError(f"{at}.url", endpoint.url, "sends requests on to elsewhere", "Name the address itself.")
    if status != 200:
        kind = "too long" if status == 413 or (status in (400, 422) and TOO_LONG.search(words)) else "refused"
        return Failure(kind, f"answers by status {status}{words}")
    try:
        body = json.loads(told.content)
        choice = body["choices"][0]
        ended = choice.get("finish_reason") != "length"
        made = Answer((), text_of(choice["message"]), ended, last_tokens(choice), usage_in(body))
    except MISREAD as error:
        return Failure("unreadable", f"answers in another form than OpenAI's ({type(error).__name__})")
    return without_key(made, api_key(endpoint))


def usage_in(body: Mapping[str, Any]) -> tuple[int, int]:
    """Return the tokens of the prompt and of the answer; zeros if the server does not count them."""
    usage = body.get("usage")
    if not isinstance(usage, dict):
        return 0, 0
    prompt, answer = (usage.get(name) for name in ("prompt_tokens", "completion_tokens"))
    if not is_count(prompt) or not is_count(answer):
        return 0, 0
    return prompt, answer


def is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def text_of(message: Mapping[str, Any]) -> str:
    """What a message says, its reasoning in front of it. Raises: TypeError: it is no text."""
    content, thought = message.get("content"), message.get("reasoning_content") or message.get("reasoning")
    content = message.get("refusal") or "" if content is None else content
    if not isinstance(content, str):
        raise TypeError("a content that is no text")
    return written(with_reasoning(content, thought) if isinstance(thought, str) else content)


def last_tokens(choice: Mapping[str, Any]) -> tuple[Token, ...]:
    """The last tokens with their likeliest others; none where the server gives no logprobs, or in a form of its own."""
    try:
        told = (choice.get("logprobs") or {}).get("content") or []
        return tuple(
            Token(
                written(one["token"]),
                {written(each["token"]): float(each["logprob"]) for each in (*one["top_logprobs"], one)},
            )
            for one in told[-LAST:]
        )
    except MISREAD:
        return ()


def written(text: Any) -> str:
    """Text as a file can have it. Raises: TypeError: it is none."""
    if not isinstance(text, str):
        raise TypeError("a token that is no text")
    return text.encode("utf-8", "replace").decode()  # half a character can be written nowhere


def without_key(answer: Answer, key: str) -> Answer:
    """An answer with the mask in place of the key that its server repeats, and then without tokens: each may be a piece
    of the key. A key of few letters is a word like another."""
    names = (name for token in answer.last for name in token.likely)
    texts = (answer.text, "".join(token.text for token in answer.last), *names)
    if len(key) < SHORTEST or not any(key in text for text in texts):
        return answer
    return dataclasses.replace(answer, text=answer.text.replace(key, MASK), last=())


def words_of(told: httpx.Response) -> str:
    """What a server says of an error, in brackets and on one line; nothing where it says nothing."""
    try:
        error = json.loads(told.content)["error"]
        words = " ".join(str(error[key]) for key in ("code", "message") if error.get(key))
    except MISREAD:
        words = told.content[:2000].decode("utf-8", "replace")
    words = "".join(letter if letter.isprintable() else " " for letter in make_printable(words))
    words = " ".join(words.split())[:300]
    return f" ({words})" if words else ""


def lost(endpoint: Endpoint, failure: Failure) -> InputError:
    """What a run that cannot go on without an answer ends with."""
    remedy = "Look at the server. The same command goes on: answers that are there are kept."
    return InputError(f"{endpoint.field}.url", endpoint.url, failure.said, remedy)
