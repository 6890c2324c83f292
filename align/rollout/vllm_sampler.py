"""The rollout engine `vllm`: vLLM servers sample with snapshots of the actors' adapters on the learner's base.

Each snapshot is loaded under a new name, because vLLM caches results by name. Before an actor is sampled, the logprobs
of some prompts are compared between every server and the learner's model: if a server does not apply the adapter, which
would look like a stale policy, the run ends.
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
from typing import Any, ClassVar

import torch

from align.core.errors import InputError, NonFiniteLogits, require
from align.core.types import Rollout
from align.data.chat.fixed_prompts import encode_fixed_prompts
from align.models.actors import Actor
from align.models.adapters import disable_adapters
from align.models.base import to_public_base
from align.models.dequantised import get_or_write_dequantised_base
from align.models.forward import compute_picked_logprobs
from align.models.load import DTYPES, get_dtype_name
from align.models.plain_lora import write_plain_lora
from align.rollout.engine import SnapshotEngine, build_rollout
from align.rollout.engine_process import VLLM, WITHIN, choose_vllm_rank, find_engine_version, require_interpreter
from align.rollout.probes import Logprobs, Probes
from align.rollout.serving_engine import SamplingParams
from align.rollout.vllm_client import (
    COMPLETIONS,
    LOAD,
    UNLOAD,
    VllmFailed,
    VllmGone,
    build_completion_body,
    convert_format_errors,
    parse_logprobs,
)
from align.rollout.vllm_server import (
    LOWEST,
    ServedAdapter,
    VllmProcess,
    VllmServer,
    build_serve_arguments,
    list_adaptable_layers,
    read_servable_rank,
)
from align.run import Base
from align.run.atomic import publish_folder

TRIES = 3
"""Maximum number of restarts of an unreachable server in one rollout before the run ends."""
ANSWER_S = 3600.0
"""Time limit of one answer in seconds."""
ROWS = 4
"""Number of fixed prompts whose logprobs are compared before an actor is sampled.

They include the one with tokens from the whole vocabulary."""
ADAPTERS = 4
"""Maximum adapters loaded in a server: the policy's, its previous one, the reference's, and a spare."""
CONTINUES = "The same command then goes on from the run's last checkpoint."


@dataclass
class VllmSampler(SnapshotEngine):
    """The rollout engine `vllm`, which samples responses on vLLM servers, started here or running already.

    Attributes:
        stop_ids, pad_id, max_new_tokens, temperature: see `align.rollout.hf.HfEngine`.
        batch_size: rows that a server decodes at once.
        settings: the config group `rollout`.
        learner_device: device on which the base is quantised to NF4.
        adapter_rank: expected rank of the adapters; servers are restarted with a higher one if an adapter needs it.
        context: maximum tokens of a prompt and its answer.
        run_folder: folder for snapshots, which the servers must be able to read, and for logs of servers started here.
        adapters: digest → the snapshot that the servers have loaded.
    """

    name: ClassVar[str] = "vllm"
    stop_ids: tuple[int, ...]
    pad_id: int
    max_new_tokens: int
    temperature: float
    batch_size: int
    tokenizer: Any
    settings: Any
    learner_device: torch.device
    adapter_rank: int
    context: int
    run_folder: Path
    servers: list[VllmServer] = field(default_factory=list)
    digests: dict[Actor, str | None] = field(default_factory=dict)
    adapters: dict[str, ServedAdapter] = field(default_factory=dict)
    _sampling: tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]] | None = None

    def load(self, base: Base, method: str, dtype: torch.dtype) -> None:
        """Start the vLLM servers with the base, or connect to the ones in `rollout.urls`; raise InputError on failure.

        It fails if vLLM is not installed, or a server does not start or respond. With method=qlora the dequantised base
        is written first if it does not exist.
        """
        settings = self.settings
        learner_dtype = get_dtype_name(dtype)
        self.base = base
        self.dtype = learner_dtype if settings.dtype == "auto" else settings.dtype
        self.coarser = max(self.dtype, learner_dtype, key=lambda name: WITHIN[name])
        self.layers = list_adaptable_layers(base)
        self.rank = max(LOWEST, choose_vllm_rank(self.adapter_rank))
        self.device = self.learner_device
        self.rows = encode_fixed_prompts(self.tokenizer, self.context - 1)[-ROWS:]
        self.base_logprobs: Logprobs = ()
        self.folder = self.run_folder / "vllm" / base.digest[:16]
        shutil.rmtree(self.folder, ignore_errors=True)  # of a run that was killed
        self.folder.mkdir(parents=True)
        self.snapshots = self.folder / "snapshots"
        if settings.urls:
            remedy = f"Check this server. {CONTINUES}"
            urls = (url.rstrip("/") for url in settings.urls)
            self.servers = [VllmServer("rollout.urls", url, settings.start_s, remedy) for url in urls]
        else:
            self.python = require_interpreter(VLLM, settings.python, "rollout.python")
            self.base_folder = Path(base.path)
            if method == "qlora":
                bases = self.run_folder.parent.parent / "bases"
                vllm_dtype = DTYPES[self.dtype]
                self.base_folder = get_or_write_dequantised_base(
                    bases, base, to_public_base(base), dtype, vllm_dtype, self.learner_device, self.tokenizer
                )
            version = find_engine_version(VLLM, self.python, "rollout.python")
            logs = [f"vllm-{number}.log" if number else "vllm.log" for number in range(settings.replicas)]
            print(f"starting vLLM {version}; its output is in {self.run_folder}: {', '.join(logs)}", flush=True)
            self.servers = [self._own_server(log) for log in logs]
        for server in self.servers:
            server.start_or_connect()

    def _own_server(self, log: str) -> VllmServer:
        def start() -> VllmProcess:
            arguments = build_serve_arguments(
                self.base.digest,
                self.dtype,
                layers=self.layers,
                rank=self.rank,
                adapters=ADAPTERS,
                slots=self.batch_size,
                context=self.context,
                prefixes=False,
                logprobs="processed_logprobs",
            )
            return VllmProcess(self.python, self.base_folder, [*arguments, *self.settings.words], self.run_folder / log)

        remedy = f"Read {log} in the run's folder. {CONTINUES}"
        return VllmServer("rollout.python", f"{self.python} ({log})", self.settings.start_s, remedy, start)

    # Adapters

    def sync(self, actor: Actor) -> None:
        """Save a snapshot of an actor's present adapter, load it into the servers, and check that they apply it.

        Raises:
            InputError: the actor is not a plain adapter, a server does not load it, or a server's logprobs differ from
                the learner's.
        """
        with actor.use() as model:
            self.device = next(model.parameters()).device
            self.vocabulary = model.get_input_embeddings().weight.shape[0]
            if not self.base_logprobs:
                with disable_adapters(model):
                    self.base_logprobs = self._learner_logprobs(model)
        super().sync(actor)

    def load_snapshot(self, actor: Actor, folder: Path | None) -> None:
        if folder is not None and folder.name not in self.adapters:
            rank = read_servable_rank(folder, None, self.layers)
            name = f"policy-{folder.name[:16]}-{secrets.token_hex(4)}"  # other runs may use the same server
            with publish_folder(self.folder / name) as part:
                write_plain_lora(part, folder, to_public_base(self.base))
            with actor.use() as model:
                probes = Probes(self.rows, self._learner_logprobs(model), self.base_logprobs)
            self.adapters[folder.name] = ServedAdapter(name, self.folder / name, probes)
            if rank > self.rank:
                self.rank = choose_vllm_rank(rank)
                for server in () if self.settings.urls else self.servers:
                    server.start_or_connect()
        for server in self.servers:
            self._refresh_server(server, [] if folder is None else [folder.name])

    @torch.no_grad()
    def _learner_logprobs(self, model: Any) -> list[list[float]]:
        """Compute a model's logprobs of the fixed prompts' tokens from the second on, in nats at temperature 1."""
        logprobs = []
        for row in self.rows:
            tokens = torch.tensor([row], device=self.device)
            mask = torch.ones_like(tokens, dtype=torch.bool)
            picked = mask.clone()
            picked[:, 0] = False
            logprobs.append([float(value) for value in compute_picked_logprobs(model, tokens, mask, picked)[0]])
        return logprobs

    def _refresh_server(self, server: VllmServer, digests: Iterable[str]) -> None:
        """Load missing adapters into a server, and compare its logprobs of the base and `digests` with the learner's.

        Restarts an unreachable server up to `TRIES` times. Raises InputError if that or a comparison fails.
        """
        for _ in range(TRIES):
            try:
                for adapter in self.adapters.values():
                    server.load(adapter)
                # The base is checked first: the probes of an adapter measure its change from the right base.
                remedy = f"Serve the base of this run: {self.base.id}, or for method=qlora its dequantised weights."
                base_probes = Probes.from_base(self.rows, self.base_logprobs)
                server.check(None, base_probes, self.coarser, server.setting, server.label, remedy)
                remedy = f"The server does not serve this adapter. {CONTINUES}"
                for digest in digests:
                    name, _, probes = self.adapters[digest]
                    server.check(name, probes, self.coarser, server.setting, server.label, remedy)
                return
            except VllmGone as error:
                self._restart(server, error)
            except VllmFailed as error:
                raise self._explain(server, error) from error
        raise InputError(server.setting, server.label, f"was unreachable {TRIES} times in a row", server.remedy)

    def _restart(self, server: VllmServer, error: VllmGone) -> None:
        print(f"a vLLM server is unreachable ({error}); starting it or connecting again: {server.label}", flush=True)
        server.start_or_connect()

    def _explain(self, server: VllmServer, error: VllmFailed) -> InputError:
        """Convert a failed request to a server to an InputError with a remedy."""
        if error.status == 404 and error.path == COMPLETIONS:
            problem = "no longer has an adapter that was loaded into it"
            return InputError(
                server.setting, server.label, problem, f"Check whether another client unloads adapters. {CONTINUES}"
            )
        remedy = ""
        if self.settings.urls and error.path in (LOAD, UNLOAD):
            remedy = (
                f"Start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and --enable-lora --max-lora-rank {self.rank} "
                f"--logprobs-mode processed_logprobs, where it sees {self.folder}."
            )
        return server.explain(error, f"cannot do what a request asks for ({error})", remedy)

    def drop_snapshot(self, digest: str) -> None:
        adapter = self.adapters.pop(digest)
        for server in self.servers:
            server.unload(adapter)
        shutil.rmtree(adapter.folder, ignore_errors=True)
        shutil.rmtree(self.snapshots / digest, ignore_errors=True)

    def close(self) -> None:
        """Stop the servers that were started here, unload adapters from the others, and delete the snapshots.

        May be called while another thread samples, which then fails.
        """
        if self._sampling is not None:
            loop, task = self._sampling
            with suppress(RuntimeError):  # its loop has just ended
                loop.call_soon_threadsafe(task.cancel)
        for digest in list(self.adapters) if self.settings.urls else ():
            self.drop_snapshot(digest)
        for server in self.servers:
            server.close()
        if hasattr(self, "folder"):
            shutil.rmtree(self.folder, ignore_errors=True)
            with suppress(OSError):  # the folder holds another base
                self.folder.parent.rmdir()

    # Answers

    def generate(
        self, prompts: Sequence[Sequence[int]], actor: Actor | Sequence[Actor], seeds: Sequence[int]
    ) -> Rollout:
        """Sample one response for each prompt from the vLLM servers.

        Raises:
            InputError: a server refuses a request, returns no logprobs, lost an adapter, or stays unreachable.
        """
        digests = self.digests_of_rows(actor, len(prompts))
        choices = self._complete([*zip(prompts, seeds, digests, strict=True)])
        answers = [self._read_answer(self._server_of(row), choice) for row, choice in enumerate(choices)]
        responses = [ids for ids, _ in answers]
        logprobs = [values for _, values in answers]
        ended_B = [ids[-1] in self.stop_ids for ids in responses]
        return build_rollout(prompts, responses, logprobs, ended_B, self.pad_id).to(self.device)

    def _server_of(self, row: int) -> VllmServer:
        return self.servers[row % len(self.servers)]

    def _complete(self, rows: Sequence[tuple[Sequence[int], int, str | None]]) -> list[Any]:
        """Request a completion for each (prompt, seed, adapter digest), and return each response's entry of `choices`.

        Restarts an unreachable server and repeats its requests.
        """
        choices: dict[int, Any] = {}
        unreachable: dict[VllmServer, VllmGone] = {}
        for _ in range(TRIES + 1):
            bodies = {row: self._request_body(row, *each) for row, each in enumerate(rows) if row not in choices}
            unreachable = {}
            for row, answer in asyncio.run(self._ask(bodies)).items():
                if isinstance(answer, VllmGone):
                    unreachable[self._server_of(row)] = answer
                elif isinstance(answer, VllmFailed):
                    raise self._explain(self._server_of(row), answer) from answer
                elif isinstance(answer, BaseException):
                    raise answer
                else:
                    choices[row] = answer
            if not unreachable:
                return [choices[row] for row in range(len(rows))]
            for server, error in unreachable.items():
                self._restart(server, error)
                self._refresh_server(server, self.adapters)
        server = next(iter(unreachable))
        raise InputError(server.setting, server.label, f"was unreachable {TRIES + 1} times in a row", server.remedy)

    def _request_body(self, row: int, prompt: Sequence[int], seed: int, digest: str | None) -> dict[str, Any]:
        model = self._server_of(row).base if digest is None else self.adapters[digest].name
        sampling = SamplingParams(self.max_new_tokens, self.temperature, seed=seed, stop_ids=self.stop_ids, logprobs=0)
        return build_completion_body(model, prompt, sampling)

    async def _ask(self, bodies: Mapping[int, dict[str, Any]]) -> dict[int, Any]:
        """Send request bodies to the servers concurrently, and return row → entry of `choices`, or the exception."""
        task = asyncio.current_task()
        assert task is not None
        self._sampling = asyncio.get_running_loop(), task
        slots = [asyncio.Semaphore(self.batch_size) for _ in self.servers]

        async def ask(number: int, body: dict[str, Any]) -> Any:
            async with slots[number]:
                tokens = len(body["prompt"]) + body["max_tokens"]
                return await self.servers[number].client.request(
                    connections[number],
                    "POST",
                    COMPLETIONS,
                    body,
                    tokens,
                    ANSWER_S,
                    lambda response: response["choices"][0],
                )

        try:
            async with AsyncExitStack() as stack:
                connections = [await stack.enter_async_context(server.client.connect()) for server in self.servers]
                requests = [ask(row % len(self.servers), body) for row, body in bodies.items()]
                answers = await asyncio.gather(*requests, return_exceptions=True)
            return dict(zip(bodies, answers, strict=True))
        finally:
            self._sampling = None

    def _read_answer(self, server: VllmServer, choice: Any) -> tuple[list[int], list[float]]:
        """Return the token ids and sampling logprobs in a server's response, or raise InputError if they are invalid.

        Raises NonFiniteLogits if a logprob is not finite.
        """
        try:
            with convert_format_errors(COMPLETIONS):
                ids = [int(id) for id in choice["token_ids"]]
                columns = choice.get("logprobs")
                tokens = [] if columns is None else parse_logprobs(columns)
                logprobs = [float(value) for _, value, _ in tokens if value is not None]
        except VllmFailed as error:
            raise self._explain(server, error) from error
        problem = "gives no logprobs of the tokens that it draws, without which the policy loss cannot be corrected"
        is_complete = len(tokens) == len(logprobs) > 0
        require(is_complete, server.setting, server.label, problem, "Use an unmodified vLLM 0.32 or newer.")
        problem = f"draws tokens that the base does not have: it has {self.vocabulary}"
        is_known = all(0 <= id < self.vocabulary for id in ids)
        require(is_known, server.setting, server.label, problem, "Serve the base of this run.")
        if not all(map(math.isfinite, logprobs)):
            raise NonFiniteLogits(f"{server.label} reports a logprob that is not finite for a token that it sampled")
        stop_lengths = [length for length, id in enumerate(ids, 1) if id in self.stop_ids]
        is_whole = [id for id, _, _ in tokens] == ids and len(ids) == min([*stop_lengths, self.max_new_tokens])
        problem = f"ended an answer after {len(ids)} tokens, where neither the first stop token nor the limit does"
        require(is_whole, server.setting, server.label, problem, server.remedy)
        return ids, logprobs
