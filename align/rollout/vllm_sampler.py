"""Rollouts by vLLM: servers that answer with snapshots of the actors' adapters, on the base that the learner computes
with.

Each snapshot is loaded under a name of its own, for vLLM keeps what it computed by a name. Whenever an actor is about
to speak, every server is asked what the actor's adapter says of some prompts, and the learner's model is asked the
same: an adapter that is not in force, which would look like an old policy, ends the run.
"""

from __future__ import annotations

import asyncio
import math
import secrets
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import torch

from align.core.errors import InputError, NotFinite, require
from align.core.types import Rollout
from align.data.chat.fixed_prompts import fixed_prompts
from align.models.actor import Actor
from align.models.adapter_files import adapter_config
from align.models.adapter_pool import snapshot
from align.models.adapters import without_adapters
from align.models.backbone import picked_logprobs
from align.models.base import named_base
from align.models.dequantised import dequantised_beside
from align.models.load import DTYPES, name_of
from align.models.plain_adapter import write_plain
from align.rollout.engine import rollout_of, rows_by_actor
from align.rollout.engine_process import VLLM, WITHIN, Servers, engine_version, required_interpreter
from align.rollout.probes import Logprobs, Probes, agreement, check_agreement
from align.rollout.vllm_adapters import LOWEST, adaptable_layers, layer_names, servable_rank, vllm_rank
from align.rollout.vllm_client import (
    COMPLETIONS,
    LOAD,
    UNLOAD,
    VllmFailed,
    address,
    asked_of,
    async_transport,
    bytes_of,
    headers,
    ids_and_logprobs,
    said,
    understood,
)
from align.rollout.vllm_process import VllmProcess, serve_words
from align.rollout.vllm_replica import Replica, gone
from align.run import Base
from align.run.atomic import publish

TRIES = 3
"""How often servers that are gone are opened in one rollout, before the run ends."""
ANSWER_S = 3600.0
"""How long one answer may take."""
ROWS = 4
"""Of the fixed prompts so many are asked whenever an actor is about to speak, the one from all over the vocabulary
among them."""
ADAPTERS = 4
"""There is room for: the policy's, the one before, and the reference's."""
CONTINUES = "The same command then goes on from the run's last checkpoint."


class Served(NamedTuple):
    """A snapshot that servers have.

    Attributes:
        name: by which they know it.
        folder: plain LoRA, which outlives whoever reads it.
        must_say: by the learner.
    """

    name: str
    folder: Path
    must_say: Probes


@dataclass
class VllmSampler:
    """See the module, and `align.rollout.engine.Engine`.

    Attributes:
        stop_ids, pad_id, max_new_tokens, temperature: as `align.rollout.hf.HfEngine` has them.
        batch_size: rows that a server decodes at once.
    """

    stop_ids: tuple[int, ...]
    pad_id: int
    max_new_tokens: int
    temperature: float
    batch_size: int
    tokenizer: Any
    servers: Servers
    replicas: list[Replica] = field(default_factory=list)
    _known: dict[Actor, str | None] = field(default_factory=dict)
    _served: dict[str, Served] = field(default_factory=dict)
    _asking: tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]] | None = None

    def load(self, base: Base, method: str, dtype: torch.dtype) -> None:
        """Raises: InputError: there is no vLLM, or a server does not come up."""
        given, learner = self.servers, name_of(dtype)
        self.base, self.dtype = base, given.dtype or learner
        self.coarser = max(self.dtype, learner, key=lambda name: WITHIN[name])
        self.layers, self.rank = adaptable_layers(base), max(LOWEST, vllm_rank(given.rank))
        self.device = torch.device(given.device)
        self.rows = fixed_prompts(self.tokenizer, given.context - 1)[-ROWS:]
        self.base_says: Logprobs = ()
        self.folder = given.folder / base.digest[:16]
        shutil.rmtree(self.folder, ignore_errors=True)  # of a run that was killed
        self.folder.mkdir(parents=True)
        if given.urls:
            self.replicas = [Replica(url, given.start_s) for url in given.urls]
        else:
            self.python = required_interpreter(VLLM, given.python, "rollout.python")
            self.model = self._base_folder(method, dtype)
            version = engine_version(VLLM, self.python, "rollout.python")
            logs = [f"vllm-{number}.log" if number else "vllm.log" for number in range(given.replicas)]
            print(f"starting vLLM {version}; what it says is in {given.logs}: {', '.join(logs)}", flush=True)
            self.replicas = [
                Replica(self.python, given.start_s, lambda log=log: self._process(given.logs / log), log)
                for log in logs
            ]
        for replica in self.replicas:
            replica.open()

    def _base_folder(self, method: str, dtype: torch.dtype) -> Path:
        """Where servers find the base as the learner computes with it; the dequantised one is written once."""
        if method != "qlora":
            return Path(self.base.path)
        bases, named = self.servers.bases, named_base(self.base)
        return dequantised_beside(
            bases, self.base, named, dtype, DTYPES[self.dtype], torch.device(self.servers.device), self.tokenizer
        )

    def _process(self, log: Path) -> VllmProcess:
        words = serve_words(
            self.base.digest, self.dtype, modules=layer_names(self.layers), rank=self.rank, adapters=ADAPTERS,
            slots=self.batch_size, context=self.servers.context, prefixes=False, logprobs="processed_logprobs",
        )  # fmt: skip
        return VllmProcess(self.python, self.model, [*words, *self.servers.words], log, "rollout")

    # Adapters

    def sync(self, actor: Actor) -> None:
        """
        Raises:
            InputError: the actor is no plain adapter; or a server does not load it, or does not answer by it as the
                learner would.
        """
        digest = None
        with actor.use() as model:
            self.device = next(model.parameters()).device
            self.vocabulary = model.get_input_embeddings().weight.shape[0]
            if not self.base_says:
                with without_adapters(model):
                    self.base_says = self._said_by(model)
        if not actor.base_alone:
            source = snapshot(actor, self.base, self.folder / "snapshots")
            adapter = (source / "adapter_config.json").is_file()
            require(adapter, "rollout.engine", "vllm", "answers by adapters alone", "Use rollout=hf.")
            digest = source.name
            if digest not in self._served:
                self._serve(actor, source, digest)
        before, self._known[actor] = self._known.get(actor), digest
        for replica in self.replicas:
            self._tend(replica, [digest])
        if before not in (None, *self._known.values()):
            self._drop(str(before))

    def _serve(self, actor: Actor, source: Path, digest: str) -> None:
        """Make a snapshot ready for servers, with room for it."""
        adapter_config(source)
        rank = servable_rank(source, None, self.layers)
        name = f"policy-{digest[:16]}-{secrets.token_hex(4)}"  # other runs may ask the same server
        with publish(self.folder / name) as part:
            write_plain(part, source, named_base(self.base))
        with actor.use() as model:
            must_say = Probes(self.rows, self._said_by(model), self.base_says)
        self._served[digest] = Served(name, self.folder / name, must_say)
        if rank > self.rank:
            self.rank = vllm_rank(rank)
            for replica in () if self.servers.urls else self.replicas:
                replica.open()

    @torch.no_grad()
    def _said_by(self, model: Any) -> list[list[float]]:
        """What the learner's model says of the probes, at temperature 1."""
        found = []
        for row in self.rows:
            tokens = torch.tensor([row], device=self.device)
            mask = torch.ones_like(tokens, dtype=torch.bool)
            picked = mask.clone()
            picked[:, 0] = False
            found.append([float(value) for value in picked_logprobs(model, tokens, mask, picked)[0]])
        return found

    def _tend(self, replica: Replica, digests: Iterable[str | None]) -> None:
        """Give a server what it lacks, and see that it answers by it; one that is gone is opened again.

        Args:
            digests: of the adapters to look at; None is the base.
        """
        for _ in range(TRIES):
            try:
                for served in self._served.values():
                    if served.name not in replica.loaded:
                        if self.servers.urls:  # a server that was only slow for a moment still has it
                            replica.asked.unload(served.name)
                        replica.asked.load(served.name, served.folder)
                        replica.loaded.add(served.name)
                replica.base_said = replica.base_said or replica.asked.logprobs(replica.base, self.rows)
                for digest in digests:
                    self._check(replica, digest)
                return
            except (VllmFailed, httpx.TransportError) as error:
                if not gone(error):
                    raise self._refused(replica, error) from error
                self._open_again(replica, error)
        raise InputError(replica.field, replica.where, f"was gone {TRIES} times in a row", replica.remedy)

    def _check(self, replica: Replica, digest: str | None) -> None:
        if digest is None:
            probes, found = Probes.of_base(self.rows, self.base_says), replica.base_said
            remedy = f"Serve the base of this run: {self.base.id}, or for method=qlora its dequantised weights."
        else:
            served = self._served[digest]
            probes, found = served.must_say, replica.asked.logprobs(served.name, self.rows)
            self._check(replica, None)  # or what the adapter moves would be compared with what moves another base
            remedy = f"The server does not serve this adapter. {CONTINUES}"
        check_agreement(agreement(found, replica.base_said, probes), self.coarser, replica.field, replica.where, remedy)

    def _refused(self, replica: Replica, error: VllmFailed | httpx.TransportError) -> InputError:
        """What is said of a server that refuses something."""
        path = error.path if isinstance(error, VllmFailed) else ""
        if isinstance(error, VllmFailed) and error.status == 404 and path == COMPLETIONS:
            problem = "no longer has an adapter that it was given, and nobody here unloaded it"
            return InputError(replica.field, replica.where, problem, f"See who else asks this server. {CONTINUES}")
        problem, remedy = f"does not do what it is asked ({error})", replica.remedy
        if self.servers.urls and path in (LOAD, UNLOAD):
            remedy = (
                f"Start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and --enable-lora --max-lora-rank {self.rank} "
                f"--logprobs-mode processed_logprobs, where it sees {self.folder}."
            )
        return replica.failed(error, problem, remedy)

    def _open_again(self, replica: Replica, error: Exception) -> None:
        print(f"a vLLM server is gone ({type(error).__name__}), and opened again: {replica.where}", flush=True)
        replica.open()

    def _drop(self, digest: str) -> None:
        """Nobody speaks by it any more. A server that does not unload it has less memory, and is else as good."""
        served = self._served.pop(digest)
        for replica in self.replicas:
            with suppress(VllmFailed, httpx.TransportError):
                replica.asked.unload(served.name)
            replica.loaded.discard(served.name)
        shutil.rmtree(served.folder, ignore_errors=True)
        shutil.rmtree(self.folder / "snapshots" / digest, ignore_errors=True)

    def close(self) -> None:
        """Also while a thread asks, which then fails."""
        if self._asking is not None:
            loop, task = self._asking
            with suppress(RuntimeError):  # it has just ended
                loop.call_soon_threadsafe(task.cancel)
        for digest in list(self._served) if self.servers.urls else ():
            self._drop(digest)
        for replica in self.replicas:
            replica.close()
        if hasattr(self, "folder"):
            shutil.rmtree(self.folder, ignore_errors=True)
            with suppress(OSError):  # of several bases this one is not the last
                self.servers.folder.rmdir()

    # Answers

    def generate(
        self, prompts: Sequence[Sequence[int]], actor: Actor | Sequence[Actor], seeds: Sequence[int]
    ) -> Rollout:
        """
        Raises:
            InputError: a server refuses, gives no logprobs, has lost an adapter, or stays gone.
        """
        who: dict[int, str | None] = {}
        for each, rows in rows_by_actor(actor, len(prompts)).items():
            if each not in self._known:
                self.sync(each)
            who |= dict.fromkeys(rows, self._known[each])
        asked = [(list(prompt), seed, who[row]) for row, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))]
        told = [self._read(row, choice) for row, choice in enumerate(self._told(asked))]
        responses, logprobs = [ids for ids, _ in told], [values for _, values in told]
        ended = [ids[-1] in self.stop_ids for ids in responses]
        made = rollout_of(prompts, responses, logprobs, ended, self.pad_id)
        tensors = made.tokens_BS, made.mask_BS, made.ended_B, made.logprobs_BT
        tokens, mask, ends, chances = (None if x is None else x.to(self.device) for x in tensors)
        assert tokens is not None and mask is not None and ends is not None  # noqa: PT018
        return Rollout(tokens, mask, made.prompt_width, ends, chances)

    def _replica(self, row: int) -> Replica:
        return self.replicas[row % len(self.replicas)]

    def _told(self, asked: Sequence[tuple[list[int], int, str | None]]) -> list[Any]:
        """The server's choice for each row. Rows of a server that is gone are asked again."""
        found: dict[int, Any] = {}
        for _ in range(TRIES + 1):
            waiting = {row: self._body(row, *each) for row, each in enumerate(asked) if row not in found}
            lost: dict[int, Exception] = {}
            for row, answer in asyncio.run(self._ask(waiting)).items():
                if not isinstance(answer, Exception):
                    found[row] = answer
                elif gone(answer):
                    lost[row % len(self.replicas)] = answer
                elif isinstance(answer, VllmFailed | httpx.TransportError):
                    raise self._refused(self._replica(row), answer) from answer
                else:
                    raise answer
            if not lost:
                return [found[row] for row in range(len(asked))]
            for number, error in sorted(lost.items()):
                self._open_again(self.replicas[number], error)
                self._tend(self.replicas[number], list(self._served))
        replica = self.replicas[min(lost)]
        raise InputError(replica.field, replica.where, f"was gone {TRIES + 1} times in a row", replica.remedy)

    def _body(self, row: int, prompt: list[int], seed: int, digest: str | None) -> dict[str, Any]:
        return {
            "model": self._replica(row).base if digest is None else self._served[digest].name,
            "prompt": prompt, "max_tokens": self.max_new_tokens, "temperature": self.temperature, "top_p": 1.0,
            "seed": seed, "stop_token_ids": list(self.stop_ids), "ignore_eos": True, "logprobs": 0,
            "return_token_ids": True, "return_tokens_as_token_ids": True,
        }  # fmt: skip

    async def _ask(self, bodies: Mapping[int, dict[str, Any]]) -> dict[int, Any]:
        """The choice of each row, or its error."""
        task = asyncio.current_task()
        assert task is not None
        self._asking = asyncio.get_running_loop(), task
        rooms = [asyncio.Semaphore(self.batch_size) for _ in self.replicas]

        async def one(number: int, body: dict[str, Any]) -> Any:
            async with rooms[number]:
                with understood(COMPLETIONS):
                    most = bytes_of(len(body["prompt"]) + body["max_tokens"])
                    answer = await asyncio.wait_for(asked_of(clients[number], body, most), ANSWER_S)
                    return said(answer)["choices"][0]

        try:
            async with AsyncExitStack() as stack:
                clients = []
                for at in (replica.asked.at for replica in self.replicas):
                    client = httpx.AsyncClient(
                        transport=async_transport(at), base_url=address(at), timeout=ANSWER_S, headers=headers(at)
                    )
                    clients.append(await stack.enter_async_context(client))
                wanted = [one(row % len(self.replicas), body) for row, body in bodies.items()]
                answers = await asyncio.gather(*wanted, return_exceptions=True)
            return dict(zip(bodies, answers, strict=True))
        finally:
            self._asking = None

    def _read(self, row: int, choice: Any) -> tuple[list[int], list[float]]:
        """The tokens of an answer, and their logprobs as they were drawn."""
        replica = self._replica(row)
        try:
            with understood(COMPLETIONS):
                ids = [int(id) for id in choice["token_ids"]]
                given = choice.get("logprobs")
                told = [] if given is None else ids_and_logprobs(given)
                pairs = [(id, None if value is None else float(value)) for id, value, _ in told]
        except VllmFailed as error:
            raise self._refused(replica, error) from error
        problem = "gives no logprobs of the tokens that it draws, without which the policy loss cannot be corrected"
        complete = len(pairs) > 0 and all(value is not None for _, value in pairs)
        require(complete, replica.field, replica.where, problem, "Use vLLM 0.32 or newer, as it is.")
        problem = f"draws tokens that the base does not have: it has {self.vocabulary}"
        known = all(0 <= id < self.vocabulary for id in ids)
        require(known, replica.field, replica.where, problem, "Serve the base of this run.")
        if not all(math.isfinite(value) for _, value in pairs if value is not None):
            raise NotFinite(f"{replica.where} says that it drew a token with a logprob that is no number")
        whole = bool(ids) and [id for id, _ in pairs] == ids
        stops = [place for place, id in enumerate(ids, 1) if id in self.stop_ids]
        ends = whole and len(ids) == min([*stops, self.max_new_tokens])
        problem = f"ended an answer after {len(ids)} tokens, where neither the first stop token nor the limit does"
        require(ends, replica.field, replica.where, problem, replica.remedy)
        return ids, [float(value) for _, value in pairs if value is not None]
