"""Stand-in for `python -m vllm.entrypoints.cli.main serve FOLDER --uds SOCKET …`: the routes that align calls."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import socketserver
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLTokenizer

from vllm.llama import Llama, Lora, softmax

FAULTS = {
    "answers-unknown": "a name that it does not know is answered by the base",
    "answers-unknown-later": "the same, once it has loaded an adapter",
    "not-applied": "adapters load, and the base answers for them",
    "half": "adapters are in force by half",
    "another": "the adapter that came first answers for all",
    "no-load": "no adapter loads",
    "ends": "it ends at once",
    "never-ready": "it starts and answers nothing",
    "dies": "it ends after five tokens of an answer that asks for more than 50",
    "breaks": "such a stream breaks off, without an end",
    "says": "it says so in such a stream",
    "no-grammar": "grammars are passed over",
    "cuts": "such an answer is ended too early, as if it were at its length",
    "warm": "answers are drawn at one and a half times the temperature",
    "raw": "logprobs are the model's own, whatever was asked for",
    "no-logprobs": "answers have no logprobs",
    "forgets": "adapters that came behind the first two are lost before an answer is drawn by them",
    "forgets-silently": "the same, and the base answers for them",
    "dies-once": "it ends at the 12th answer, unless there is the file that STAND_IN_MARK names, which it leaves",
    "dies-always": "it ends before its first answer, however often it is started",
}
FAULT = os.environ.get("STAND_IN", "")
ANSWERS = itertools.count(1)
assert not FAULT or FAULT in FAULTS, FAULT


class RefusedRequest(Exception):
    """A request that gets an error response with this status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Engine:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.lock = Lock()
        self.model = Llama(Path(args.model))
        self.loras = dict[str, Lora]()
        self.loaded_names = list[str]()  # of unloaded adapters too
        self.vocabulary = LLTokenizer(
            (Path(args.model) / "tokenizer.json").read_text(), eos_token=self.model.config["eos_token_id"]
        )

    def grammar(self, body: dict[str, Any]) -> LLMatcher | None:
        source = (body.get("structured_outputs") or {}).get("grammar")
        if source is None or FAULT == "no-grammar":
            return None
        matcher = LLMatcher(self.vocabulary, LLMatcher.grammar_from_lark(source))
        if matcher.is_error():
            raise RefusedRequest(400, matcher.get_error())
        return matcher

    def load(self, body: dict[str, Any]) -> None:
        if body["lora_name"] in self.loras:
            raise RefusedRequest(400, "already loaded")
        try:
            if FAULT == "no-load":
                raise ValueError("it does not")
            lora = Lora(Path(body["lora_path"]))
        except (OSError, ValueError) as error:
            raise RefusedRequest(400, f"no adapter: {error}") from error
        if FAULT == "half":
            lora.scale /= 2
        if FAULT == "another" and self.loras:
            lora = next(iter(self.loras.values()))
        self.loras[body["lora_name"]] = lora
        self.loaded_names.append(body["lora_name"])

    def unload(self, body: dict[str, Any]) -> None:
        if self.loras.pop(body["lora_name"], None) is None:
            raise RefusedRequest(404, "no such adapter")

    def lora(self, name: str) -> Lora | None:
        if name in self.loras:
            return None if FAULT == "not-applied" else self.loras[name]
        forgiving = FAULT == "answers-unknown" or (FAULT == "answers-unknown-later" and self.loras)
        if name != self.args.served_model_name and not forgiving:
            raise RefusedRequest(404, f"The model `{name}` does not exist.")
        return None

    def fail(self, body: dict[str, Any]) -> None:
        """Simulate the faults that come before an answer."""
        if body.get("echo") or body["max_tokens"] < 2:
            return
        if FAULT == "dies-always":
            os._exit(3)
        if FAULT == "dies-once" and next(ANSWERS) == 12:
            mark = Path(os.environ["STAND_IN_MARK"])
            if not mark.exists():
                mark.touch()
                os._exit(3)
        if "forgets" in FAULT and body["model"] in self.loaded_names[2:] and body["model"] in self.loras:
            lora = self.loras.pop(body["model"])
            if FAULT == "forgets-silently":  # its name stays known, which probes see
                lora.scale = 0.0
                self.loras[body["model"]] = lora

    def tokens(self, body: dict[str, Any]) -> Any:
        """Yield the list of echoed prompt tokens, then each new token: its id, its logprob and the likeliest tokens."""
        self.fail(body)
        lora = self.lora(body["model"])
        ids = list(body["prompt"])
        top_count = body.get("logprobs") or 0
        draw = np.random.default_rng(abs(body.get("seed") or 0))
        grammar = self.grammar(body)

        def describe_token(logprobs: np.ndarray, id: int) -> tuple[int, float, dict[int, float]]:
            best = np.argsort(-logprobs)[:top_count].tolist()
            return id, float(logprobs[id]), {i: float(logprobs[i]) for i in dict.fromkeys([id, *best])}

        prompt = []
        if body.get("echo"):
            with self.lock:
                rows = np.log(softmax(self.model.logits(ids, lora)))
            prompt = [(ids[0], None, None), *(describe_token(rows[i], ids[i + 1]) for i in range(len(ids) - 1))]
        yield prompt
        for _ in range(body.get("max_tokens", 16)):
            with self.lock:
                logits = self.model.logits(ids, lora)[-1]
            if grammar is not None:
                bits = np.frombuffer(grammar.compute_bitmask(), np.uint8)
                allowed = np.unpackbits(bits, count=len(logits), bitorder="little").astype(bool)
                logits = np.where(allowed, logits, -np.inf)
            temperature = body.get("temperature", 1.0) * (1.5 if FAULT == "warm" else 1.0)
            chances = nucleus(softmax(logits / temperature), body.get("top_p", 1.0)) if temperature else None
            id = int(logits.argmax()) if chances is None else int((chances.cumsum() > draw.random()).argmax())
            ids.append(id)
            if grammar is not None:
                grammar.consume_token(id)
            processed = self.args.logprobs_mode == "processed_logprobs" and temperature and FAULT != "raw"
            yield describe_token(np.log(softmax(logits / temperature if processed else logits)), id)


def nucleus(chances: np.ndarray, share: float) -> np.ndarray:
    """Keep the likeliest tokens that reach this share together, and normalise their probabilities."""
    order = np.argsort(-chances)
    likeliest = order[: int((chances[order].cumsum() < share).sum()) + 1]
    nucleus_chances = np.zeros_like(chances)
    nucleus_chances[likeliest] = chances[likeliest]
    return nucleus_chances / nucleus_chances.sum()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    engine: Engine

    def refuse_missing_key(self) -> bool:
        """Answer 401 if a required key is missing, and return whether it is. Like vLLM, checks only OpenAI's routes."""
        key = self.engine.args.api_key
        if key is None or not self.path.startswith("/v1") or self.headers["Authorization"] == f"Bearer {key}":
            return False
        self.answer({"error": "Unauthorized"}, 401)
        return True

    def do_GET(self) -> None:
        if self.refuse_missing_key():
            return
        if self.path == "/v1/models":
            config = self.engine.model.config
            length = self.engine.args.max_model_len or config["max_position_embeddings"]
            self.answer({"data": [{"id": self.engine.args.served_model_name, "max_model_len": length}]})
        else:
            self.answer({})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.refuse_missing_key():
            return
        try:
            if self.path == "/v1/completions":
                self.complete(body)
            else:
                actions = {
                    "/v1/load_lora_adapter": self.engine.load,
                    "/v1/unload_lora_adapter": self.engine.unload,
                }
                actions[self.path](body)
                self.answer({})
        except RefusedRequest as error:
            self.answer({"error": {"message": str(error)}}, error.status)

    def complete(self, body: dict[str, Any]) -> None:
        new_tokens = self.engine.tokens(body)
        prompt = next(new_tokens)
        stop_ids = set(body.get("stop_token_ids") or ())
        if not body.get("stream"):
            tokens = list(prompt)
            finish_reason = "length"
            for token in new_tokens:
                tokens.append(token)
                if token[0] in stop_ids:
                    finish_reason = "stop"
                    break
            self.answer({"choices": [choice(body, tokens, finish_reason)]})
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        unsent = prompt
        if not body["max_tokens"]:
            self.chunk(choice(body, unsent, "length"))
        for n, token in enumerate(new_tokens, 1):
            finish_reason = "stop" if token[0] in stop_ids else "length" if n == body["max_tokens"] else None
            if n == 6 and body["max_tokens"] > 50:
                if FAULT == "dies":
                    os._exit(3)
                if FAULT == "breaks":
                    break
                if FAULT == "says":
                    self.event({"error": {"message": "out of memory"}})
                    break
                finish_reason = "length" if FAULT == "cuts" else finish_reason
            self.chunk(choice(body, [*unsent, token], finish_reason))
            unsent = []
            if finish_reason:
                break
        if FAULT != "breaks":
            self.wfile.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")
        else:
            self.wfile.write(b"0\r\n\r\n")

    def chunk(self, choice: dict[str, Any]) -> None:
        self.event({"choices": [choice]})

    def event(self, content: dict[str, Any]) -> None:
        data = f"data: {json.dumps(content)}\n\n".encode()
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

    def answer(self, content: Any, status: int = 200) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def address_string(self) -> str:
        return "socket"

    def log_message(self, *arguments: object) -> None:
        pass


def choice(body: dict[str, Any], tokens: list[Any], finish_reason: str | None) -> dict[str, Any]:
    ids = [id for id, _, _ in tokens]
    new = ids[len(body["prompt"]) :] if body.get("echo") and len(ids) >= len(body["prompt"]) else ids
    logprobs = None
    if body.get("logprobs") is not None and (body.get("echo") or FAULT != "no-logprobs"):
        logprobs = {
            "tokens": [f"token_id:{id}" for id in ids],
            "token_logprobs": [logprob for _, logprob, _ in tokens],
            "top_logprobs": [top and {f"token_id:{id}": value for id, value in top.items()} for _, _, top in tokens],
        }
    return {"index": 0, "text": "", "token_ids": new, "logprobs": logprobs, "finish_reason": finish_reason}


class UnixSocketServer(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
    request_queue_size = 64


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("command", choices=["serve"])
    parser.add_argument("model")
    parser.add_argument("--enable-lora", action="store_true", required=True)
    parser.add_argument("--disable-uvicorn-access-log", action="store_true")
    parser.add_argument("--enable-prefix-caching", action=argparse.BooleanOptionalAction)
    parser.add_argument("--uds")
    parser.add_argument("--port", type=int)
    parser.add_argument("--api-key")
    for name in ("--served-model-name", "--max-lora-rank", "--max-loras", "--generation-config"):
        parser.add_argument(name, required=True)
    for name in ("--logprobs-mode", "--dtype", "--max-num-seqs", "--structured-outputs-config"):
        parser.add_argument(name, required=True)
    parser.add_argument("--max-model-len", type=int)
    parser.add_argument("--lora-target-modules", nargs="+", required=True)
    args = parser.parse_args()  # an option that it does not know ends it
    print("a stand-in for vLLM starts", flush=True)
    if FAULT == "ends":
        sys.exit("ValueError: no memory for a model")
    if FAULT == "never-ready":
        time.sleep(600)
    assert os.environ["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "True"
    Handler.engine = Engine(args)
    server = UnixSocketServer(args.uds, Handler) if args.uds else ThreadingHTTPServer(("127.0.0.1", args.port), Handler)
    server.serve_forever()


if __name__ == "__main__":
    main()
