"""Serving by vLLM: what an answer needs of a model is asked of vLLM's server, token ids in and token ids out.

What everybody else knows an adapter by stays here: to vLLM an adapter is a name that holds its digest and is never used
again, since vLLM keeps what it computed by that name.
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
from typing import Any, NamedTuple

import httpx

from align.core.errors import InputError, require
from align.rollout.answer import Answer
from align.rollout.intake import Intake, check_room
from align.rollout.probes import Logprobs, Probes, agreement, check_agreement, in_words
from align.rollout.requests import Listener, Pending, Request, SamplingParams, Stats, Token
from align.rollout.vllm_client import StreamingClient, VllmFailed, ids_and_logprobs
from align.rollout.vllm_process import VllmProcess, adapter_name, base_name

log = logging.getLogger(__name__)

LOOK_S = 1.0
"""How long a step waits for anything to happen."""
NAN = float("nan")
NO_SEED, OTHER_SEED = -1, -(2**63)
"""What vLLM takes for none; and what it is given instead."""


class Prepared(NamedTuple):
    """An adapter for vLLM.

    Attributes:
        folder: plain LoRA; ours, so that nobody changes it while vLLM may read it.
    """

    folder: Path
    probes: Probes


Prepare = Callable[[Path, str], Prepared]
"""Folder and digest of an adapter → what vLLM is given of it. May raise."""


class VllmEngine(Intake):
    """See `align.rollout.requests.ServingEngine`. The engine's thread runs an event loop while it steps.

    Args:
        process: ready.
        prepare: see `Prepare`.
        base: what must be said by the base.
        digest: of the base.
        dtype: that vLLM computes in.
        context: tokens of a prompt and its answer together, at most.
        queue: requests that may wait.
        slots: requests that vLLM is given at once.
        reserve: slots that are kept for tenants who have none.
    """

    def __init__(
        self, process: VllmProcess, prepare: Prepare, base: Probes, digest: str, dtype: str,
        context: int, queue: int, slots: int, reserve: int = 0,
    ) -> None:  # fmt: skip
        self.process, self.prepare, self.dtype, self.base = process, prepare, dtype, base_name(digest)
        self.client = StreamingClient(process.socket)
        super().__init__(min(context, self.client.context()), queue)
        self.slots, self.reserve = slots, reserve
        self._folders, self._loading = dict[str, Path](), Lock()
        self._base_said: tuple[Any, Logprobs] = ((), ())  # rows of probes, and what the base says of them
        self._loop, self._news = asyncio.new_event_loop(), asyncio.Event()
        self._tasks: dict[asyncio.Task[None], Answer] = {}
        self._salt = secrets.token_bytes(16)
        self._counts = {"steps": 0, "prompt_tokens": 0, "generated_tokens": 0}
        try:
            self._check_unknown()
            self._check(self.base, base, "model", "base")
        except (VllmFailed, httpx.TransportError) as error:
            problem, remedy = f"vLLM fails at its first question ({error})", "vllm.log, in the run's folder, says why."
            raise InputError("serve.python", process.python, problem, remedy) from error

    # Adapters

    def register(self, folder: Path, expected: str = "") -> str:
        """Load an adapter into vLLM, and see that it is in force.

        Raises:
            CorruptFile: its files have changed.
            InputError: vLLM does not load it, or does not serve it as it was trained; or something answers by a name
                that is none.
        """
        digest = super().register(folder, expected)
        with self._loading:
            if digest in self._folders and self.sound():
                return digest
            try:
                prepared = self.prepare(folder, digest)
                self._folders[digest] = prepared.folder
                self.client.load(adapter_name(digest), prepared.folder)
                self._check_unknown()
                self._check(adapter_name(digest), prepared.probes, "adapter", digest[:12])
            except Exception as error:
                self.unregister(digest)
                self._drop(digest)
                if not isinstance(error, VllmFailed | httpx.TransportError):
                    raise
                log.error("adapter %s: %s", digest[:12], error)  # its words hold paths
                problem, remedy = "vLLM does not load it", "vllm.log, in the run's folder, says why."
                raise InputError("adapter", digest[:12], problem, remedy) from error
        return digest

    def _check(self, name: str, probes: Probes, field: str, shown: str) -> None:
        found = self.client.logprobs(name, probes.rows)
        if self._base_said[0] != probes.rows:
            base = found if name == self.base else self.client.logprobs(self.base, probes.rows)
            self._base_said = probes.rows, base
        base = self._base_said[1]
        agreed = agreement(found, base, probes)
        log.info("vLLM serves %s: %s", shown, in_words(agreed))
        check_agreement(agreed, self.dtype, field, shown)

    def _check_unknown(self) -> None:
        """Raises: InputError: vLLM answers by a name that it was never given, and so by other weights."""
        name = adapter_name(secrets.token_hex(32))
        problem = "it answers by a name that it was never given, where a status 404 is due"
        require(not self.client.knows(name), "serve.python", self.process.python, problem, "Use another vLLM.")

    def _forget(self) -> None:
        """Adapters that nobody may ask for any more, and nobody uses."""
        if not self._loading.acquire(blocking=False):
            return  # one is being loaded; it may be one of these
        try:
            for digest in [digest for digest in self._folders if digest not in self.known]:
                self._drop(digest)
        finally:
            self._loading.release()

    def _drop(self, digest: str) -> None:
        """Whoever calls it is loading nothing else."""
        if (folder := self._folders.pop(digest, None)) is None:
            return
        try:
            self.client.unload(adapter_name(digest))
        except (VllmFailed, httpx.TransportError) as error:  # it takes memory, and nobody can ask for it
            log.warning("adapter %s stays in vLLM: %s", digest[:12], error)
        shutil.rmtree(folder, ignore_errors=True)

    # Requests

    def add(self, request: Request, listener: Listener) -> Pending:
        remedy = "Serve it without serve=vllm."
        require(not request.scored, "model", "reward", "gives scores, which vLLM is not asked for", remedy)
        source = None if request.grammar is None else request.grammar.source
        problem = "begins behind reasoning that the prompt opens, which vLLM is not asked for"
        require(request.grammar is None or source is not None, "response_format", "json", problem, remedy)
        if request.sampling.max_tokens == 0:  # vLLM makes a token all the same
            check_room(replace(request, sampling=replace(request.sampling, max_tokens=1)), self.context)
        assert not request.sampling.processed_logprobs, "vLLM is started for the model's own logprobs"
        pending = super().add(request, listener)
        self._loop.call_soon_threadsafe(self._news.set)
        return pending

    def abort(self, pending: Pending) -> None:
        super().abort(pending)
        self._loop.call_soon_threadsafe(self._news.set)

    def sound(self) -> bool:
        return self.process.alive

    def step(self) -> bool:
        self._forget()
        while len(self._tasks) < self.slots:
            pending = self._next((answer.pending.request.tenant for answer in self._tasks.values()), self._has_room)
            if pending is None:
                break
            answer = Answer(pending)
            self._tasks[self._loop.create_task(self._answered(answer))] = answer
        if self._tasks:
            self._loop.run_until_complete(self._something_happens())
            self._counts["steps"] += 1
        return bool(self._tasks) or len(self._waiting) > 0

    def give_up(self, error: Exception) -> None:
        super().give_up(error)
        for answer in self._tasks.values():
            answer.fail(error)
            answer.pending.aborted = True

    def stats(self) -> Stats:
        return Stats(len(self._waiting), len(self._tasks), cached_tokens=0, resident=len(self._folders), **self._counts)

    def close(self, within_s: float) -> None:
        """End vLLM, and what is under way. Nobody steps the engine any more."""

        async def end() -> None:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            await self.client.end()

        try:
            self._loop.run_until_complete(end())
            self._loop.close()
        finally:
            self.process.stop(within_s)

    def _has_room(self, running: int) -> bool:
        """See `align.rollout.continuous.ContinuousBatch`."""
        return running == 0 or self.slots - len(self._tasks) > self.reserve

    async def _something_happens(self) -> None:
        """Until a request has ended, was added or is aborted."""
        news = asyncio.ensure_future(self._news.wait())
        await asyncio.wait([*self._tasks, news], timeout=LOOK_S, return_when=asyncio.FIRST_COMPLETED)
        self._news.clear()
        news.cancel()
        for task, answer in list(self._tasks.items()):
            if answer.pending.aborted:
                task.cancel()
        aborted = [task for task, answer in self._tasks.items() if answer.pending.aborted]
        if aborted:
            await asyncio.wait(aborted)  # its connection is closed by then
        self._tasks = {task: answer for task, answer in self._tasks.items() if not task.done()}

    async def _answered(self, answer: Answer) -> None:
        request, answer.pending.begun = answer.pending.request, True
        stream = self.client.stream(self._asked(request))
        try:
            async for choice in stream:
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
            await stream.aclose()
            self._release(request)

    def _take(self, answer: Answer, choice: dict[str, Any]) -> None:
        """A chunk of vLLM's: the prompt's logprobs if they were asked for, then new tokens."""
        request, told = answer.pending.request, choice.get("logprobs")
        sampling = request.sampling
        tokens = [] if told is None else ids_and_logprobs(told)
        if not (answer.read or sampling.prompt_logprobs is None):
            size = len(request.prompt_ids)
            prompt, tokens = tokens[:size], tokens[size:]
            answer.begin((None, *(token(each, sampling.prompt_logprobs) for each in prompt[1:])), 0)
        elif not answer.read:
            answer.begin(None, 0)
        if told is None:
            tokens = [(id, None, []) for id in choice["token_ids"]]
        for each in tokens:
            if answer.finished:  # what vLLM made before it heard of the end
                return
            self._counts["generated_tokens"] += 1
            answer.take(token(each, sampling.logprobs))
        if answer.finished is None and choice["finish_reason"] == "stop":  # by a token that is none of ours
            answer.stop()
        if answer.finished is None and choice["finish_reason"] == "length":
            problem = f"vLLM ended it after {answer.made} of {sampling.max_tokens} tokens"
            answer.fail(InputError("max_tokens", sampling.max_tokens, problem, "Lower it."))

    def _asked(self, request: Request) -> dict[str, Any]:
        """The body of vLLM's `/v1/completions`."""
        sampling = request.sampling
        self._counts["prompt_tokens"] += len(request.prompt_ids)
        salt = hashlib.sha256(self._salt + request.tenant.encode()).hexdigest()
        asked: dict[str, Any] = {
            "model": self.base if request.adapter is None else adapter_name(request.adapter),
            "prompt": request.prompt_ids, "max_tokens": sampling.max_tokens, "temperature": sampling.temperature,
            "top_p": sampling.top_p, "seed": OTHER_SEED if sampling.seed == NO_SEED else sampling.seed,
            "stop_token_ids": sampling.stop_ids, "ignore_eos": True,
            "echo": sampling.prompt_logprobs is not None or sampling.max_tokens == 0,
            "logprobs": most_logprobs(sampling),
            "return_token_ids": True, "return_tokens_as_token_ids": True, "cache_salt": salt,
        }  # fmt: skip
        if request.grammar is not None:
            asked["structured_outputs"] = {"grammar": request.grammar.source}
        return asked


def most_logprobs(sampling: SamplingParams) -> int | None:
    """As many alternatives as are wanted of the prompt or of the answer; None for no logprobs of either."""
    wanted = [number for number in (sampling.prompt_logprobs, sampling.logprobs) if number is not None]
    return max(wanted, default=None)


def token(told: tuple[int, float | None, list[tuple[int, float]]], number: int | None) -> Token:
    """Args:
    number: of alternatives that are wanted; None for no logprob.
    """
    id, logprob, ranked = told
    if number is None or logprob is None:
        return Token(id, NAN)
    return Token(id, logprob, tuple(ranked[:number]))
