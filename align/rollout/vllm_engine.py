"""A serving engine that forwards requests to a vLLM server as token ids, and reads token ids from it.

vLLM does not see the public names of adapters: there, the name of an adapter contains its digest.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Any

from align.core.errors import InputError, require
from align.rollout.probes import Probes
from align.rollout.serving_engine import (
    NAN,
    Completion,
    Listener,
    Request,
    ServingEngine,
    Stats,
    Token,
    require_context_room,
)
from align.rollout.vllm_client import VllmFailed, build_completion_body, parse_logprobs, stream_choices
from align.rollout.vllm_server import ServedAdapter, VllmServer, build_adapter_name

log = logging.getLogger(__name__)

LOOK_S = 1.0
"""Maximum seconds that one step waits for a request to end, arrive or be aborted."""
Prepare = Callable[[Path, str], ServedAdapter]
"""Function that copies the adapter in a folder, given its digest, for vLLM to load. May raise."""


class VllmEngine(ServingEngine):
    """A serving engine that forwards requests to a vLLM server, and checks that it applies the adapters.

    The engine's thread runs an event loop during each step.

    Args:
        server: a running server.
        prepare: see `Prepare`.
        base: probes of the base.
        dtype: dtype of vLLM's computation.
        context: maximum tokens of a prompt and its answer together.
        queue: maximum waiting requests.
        slots: maximum requests in vLLM at once.
        reserve: slots that are kept for tenants without a running request.
    """

    def __init__(
        self,
        server: VllmServer,
        prepare: Prepare,
        base: Probes,
        dtype: str,
        context: int,
        queue: int,
        slots: int,
        reserve: int = 0,
    ) -> None:
        self.server = server
        self.prepare = prepare
        self.dtype = dtype
        self.slots = slots
        try:
            super().__init__(min(context, server.client.context_length()), queue, reserve)
            server.check(None, base, dtype, "model", "base")
        except VllmFailed as error:
            raise server.explain(error, f"vLLM fails at the first request ({error})") from error
        self._adapters = dict[str, ServedAdapter]()
        self._loading = Lock()
        self._loop = asyncio.new_event_loop()
        self._connection = server.client.connect()
        self._wake_up = asyncio.Event()
        self._tasks: dict[asyncio.Task[None], Completion] = {}
        self._salt = secrets.token_bytes(16)
        self._counts = {"steps": 0, "prompt_tokens": 0, "generated_tokens": 0}

    # Adapters

    def register(self, folder: Path, expected: str = "") -> str:
        """Load the adapter in a folder into vLLM, check by its logprobs that vLLM applies it, and return its digest.

        Raises:
            CorruptFile: its files have changed.
            InputError: vLLM does not load it or does not serve the trained weights, or vLLM answers to a name that was
                never loaded.
        """
        digest = super().register(folder, expected)
        with self._loading:
            if digest in self._adapters and self.is_sound():
                return digest
            try:
                adapter = self._adapters[digest] = self.prepare(folder, digest)
                self.server.load(adapter)
                self.server.check(adapter.name, adapter.probes, self.dtype, "adapter", digest[:12])
            except Exception as error:
                self.unregister(digest)
                self._drop(digest)
                if not isinstance(error, VllmFailed):
                    raise
                log.error("adapter %s: %s", digest[:12], error)  # logged only: the message has paths
                problem = "vLLM does not load it"
                raise InputError("adapter", digest[:12], problem, self.server.remedy) from error
        return digest

    def _drop_unregistered_adapters(self) -> None:
        """Unload adapters from vLLM that are neither registered nor in use, unless one is being loaded."""
        if not self._loading.acquire(blocking=False):
            return  # an adapter is being loaded, which may be one of these
        try:
            for digest in [digest for digest in self._adapters if digest not in self.known]:
                self._drop(digest)
        finally:
            self._loading.release()

    def _drop(self, digest: str) -> None:
        """Unload an adapter from vLLM and delete its copy, if there is one. The caller holds the lock `_loading`."""
        adapter = self._adapters.pop(digest, None)
        if adapter is not None:
            self.server.unload(adapter)
            shutil.rmtree(adapter.folder, ignore_errors=True)

    # Requests

    def add(self, request: Request, listener: Listener) -> Completion:
        remedy = "Serve it without serve=vllm."
        require(not request.scored, "model", "reward", "gives scores, which align does not support with vLLM", remedy)
        has_source = request.grammar is None or request.grammar.source is not None
        problem = "continues reasoning that the prompt opens, which align does not support with vLLM"
        require(has_source, "response_format", "json", problem, remedy)
        if request.sampling.max_tokens == 0:  # vLLM generates one token nevertheless
            require_context_room(replace(request, sampling=replace(request.sampling, max_tokens=1)), self.context)
        assert not request.sampling.processed_logprobs, "vLLM was started to return the model's own logprobs"
        completion = super().add(request, listener)
        self._loop.call_soon_threadsafe(self._wake_up.set)
        return completion

    def abort(self, completion: Completion) -> None:
        super().abort(completion)
        self._loop.call_soon_threadsafe(self._wake_up.set)

    def is_sound(self) -> bool:
        return self.server.process is not None and self.server.process.alive

    def step(self) -> bool:
        self._drop_unregistered_adapters()
        while len(self._tasks) < self.slots:
            running = (answer.request.tenant for answer in self._tasks.values())
            answer = self._pop_next_request(running, self.slots - len(self._tasks))
            if answer is None:
                break
            self._tasks[self._loop.create_task(self._complete(answer))] = answer
        if self._tasks:
            self._loop.run_until_complete(self._wait_for_event())
            self._counts["steps"] += 1
        return bool(self._tasks) or len(self._waiting) > 0

    def give_up(self, error: Exception) -> None:
        super().give_up(error)
        for answer in self._tasks.values():
            answer.fail(error)
            answer.is_aborted = True

    def stats(self) -> Stats:
        resident = len(self._adapters)
        return Stats(len(self._waiting), len(self._tasks), cached_tokens=0, resident=resident, **self._counts)

    def close(self, within_s: float) -> None:
        """Cancel running requests, and stop the vLLM server. The engine must not be stepped any more."""

        async def end() -> None:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            await self._connection.aclose()

        try:
            self._loop.run_until_complete(end())
            self._loop.close()
        finally:
            self.server.close(within_s)

    async def _wait_for_event(self) -> None:
        """Wait until a request has ended, was added or is aborted, and cancel the aborted ones.

        Waits `LOOK_S` seconds at most.
        """
        event = asyncio.ensure_future(self._wake_up.wait())
        await asyncio.wait([*self._tasks, event], timeout=LOOK_S, return_when=asyncio.FIRST_COMPLETED)
        self._wake_up.clear()
        event.cancel()
        aborted = [task for task, answer in self._tasks.items() if answer.is_aborted]
        for task in aborted:
            task.cancel()
        if aborted:
            await asyncio.wait(aborted)  # until their connections are closed
        self._tasks = {task: answer for task, answer in self._tasks.items() if not task.done()}

    async def _complete(self, answer: Completion) -> None:
        request = answer.request
        answer.has_begun = True
        choices = stream_choices(self._connection, self._request_body(request))
        try:
            async for choice in choices:
                self._take(answer, choice)
                if answer.finished:
                    break
            if answer.finished is None:
                raise InputError("model", request.adapter or "base", "vLLM ended it without a reason", "Ask again.")
        except asyncio.CancelledError:
            answer.abort()
        except Exception as error:
            answer.fail(error)
        finally:
            await choices.aclose()
            self._release(request)

    def _take(self, answer: Completion, choice: dict[str, Any]) -> None:
        """Add the prompt logprobs and new tokens in a chunk of vLLM's stream to an answer.

        Ends the answer if vLLM has ended it, with an error if that was before its token limit.
        """
        request = answer.request
        sampling = request.sampling
        logprobs = choice.get("logprobs")
        tokens = [] if logprobs is None else parse_logprobs(logprobs)
        if not answer.has_read:
            prompt_logprobs = None
            if sampling.prompt_logprobs is not None:
                size = len(request.prompt_ids)
                prompt_logprobs = (None, *(to_token(*each, sampling.prompt_logprobs) for each in tokens[1:size]))
                tokens = tokens[size:]
            answer.begin(prompt_logprobs)
        if logprobs is None:
            tokens = [(id, None, []) for id in choice["token_ids"]]
        for each in tokens:
            if answer.finished:  # vLLM generated further tokens before the end reached it
                return
            self._counts["generated_tokens"] += 1
            answer.take(to_token(*each, sampling.logprobs))
        if answer.finished is None and choice["finish_reason"] == "stop":  # by a stop token that is not in `stop_ids`
            answer.stop()
        if answer.finished is None and choice["finish_reason"] == "length":
            problem = f"vLLM ended it after {answer.length} of {sampling.max_tokens} tokens"
            answer.fail(InputError("max_tokens", sampling.max_tokens, problem, "Lower it."))

    def _request_body(self, request: Request) -> dict[str, Any]:
        self._counts["prompt_tokens"] += len(request.prompt_ids)
        model = self.server.base if request.adapter is None else build_adapter_name(request.adapter)
        body = build_completion_body(model, request.prompt_ids, request.sampling)
        body["cache_salt"] = hashlib.sha256(self._salt + request.tenant.encode()).hexdigest()
        if request.grammar is not None:
            body["structured_outputs"] = {"grammar": request.grammar.source}
        return body


def to_token(id: int, logprob: float | None, ranked: list[tuple[int, float]], number: int | None) -> Token:
    """Build a Token with the `number` likeliest alternatives, or with logprob nan for `number=None`."""
    if number is None or logprob is None:
        return Token(id, NAN)
    return Token(id, logprob, tuple(ranked[:number]))
