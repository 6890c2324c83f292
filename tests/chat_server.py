"""A local chat server that gives the replies of a test and records the requests."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple


class Reply(NamedTuple):
    """A response of the chat server.

    Attributes:
        body: bytes or an iterator of pieces, sent as they are; anything else is sent as JSON, with NaN as Python
            writes it.
        wait_s: the time before the response begins.
    """

    body: Any
    status: int = 200
    headers: Mapping[str, str] = {}
    wait_s: float = 0.0


def build_chat_reply(text: str | None, *tokens: tuple[str, Mapping[str, float]], **message: Any) -> Reply:
    """Build the reply of a chat completion.

    Args:
        tokens: its last tokens, each with the logprobs of the likeliest tokens at its position, its own included.
    """
    content = [
        {
            "token": token,
            "logprob": likely.get(token, -1.0),
            "top_logprobs": [{"token": name, "logprob": value} for name, value in likely.items()],
        }
        for token, likely in tokens
    ]
    logprobs = {"content": content} if tokens else None
    choice = {"index": 0, "message": {"role": "assistant", "content": text, **message}, "finish_reason": "stop"}
    return Reply({"object": "chat.completion", "choices": [{**choice, "logprobs": logprobs}]})


def build_error_reply(status: int, message: str, code: str | None = None, **headers: str) -> Reply:
    return Reply({"error": {"message": message, "code": code}}, status, headers)


class ChatServer:
    """A running chat server and the requests that it received.

    Attributes:
        requests: the bodies of all requests, in the order of their arrival.
        request_headers: the headers of each request, and its path.
        answered_requests: the bodies of requests whose response was sent completely.
        says: a function from a request's body to the reply; it may be replaced at any time.
    """

    def __init__(self, says: Callable[[dict[str, Any]], Reply], port: int) -> None:
        self.says = says
        self.url = f"http://127.0.0.1:{port}/v1"
        self.requests = list[dict[str, Any]]()
        self.request_headers = list[dict[str, str]]()
        self.answered_requests = list[dict[str, Any]]()
        self.lock = threading.Lock()
        self.at_once = 0
        self.most_at_once = 0

    @property
    def prompts(self) -> list[str]:
        """The content of the last message of each request."""
        return [body["messages"][-1]["content"] for body in self.requests]


@contextmanager
def run_chat_server(says: Callable[[dict[str, Any]], Reply]) -> Iterator[ChatServer]:
    """Run a chat server for as long as the block lasts."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            with chat.lock:
                chat.requests.append(body)
                chat.request_headers.append({**{k.lower(): v for k, v in self.headers.items()}, "path": self.path})
                chat.at_once += 1
                chat.most_at_once = max(chat.most_at_once, chat.at_once)
            try:
                reply = chat.says(body)
                time.sleep(reply.wait_s)
                self.send(reply)
                with chat.lock:
                    chat.answered_requests.append(body)
            finally:
                with chat.lock:
                    chat.at_once -= 1

        def send(self, reply: Reply) -> None:
            is_encoded = isinstance(reply.body, bytes | Iterator)
            data = reply.body if is_encoded else json.dumps(reply.body).encode()
            pieces = [data] if isinstance(data, bytes) else data
            length = ("content-length", str(len(data))) if isinstance(data, bytes) else ("connection", "close")
            with suppress(OSError):  # the client has closed the connection
                self.send_response(reply.status)
                for name, value in {"content-type": "application/json", **reply.headers}.items():
                    self.send_header(name.replace("_", "-"), value)
                self.send_header(*length)
                self.end_headers()
                for piece in pieces:
                    self.wfile.write(piece)

        do_GET = do_POST

        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 64

        def handle_error(self, *_: Any) -> None:
            pass

    server = Server(("127.0.0.1", 0), Handler)
    chat = ChatServer(says, server.server_port)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield chat
    finally:
        server.shutdown()
        server.server_close()
