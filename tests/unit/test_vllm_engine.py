"""The engine that calls vLLM, tested on a stand-in in NumPy: answers, adapters, and refusals of a faulty vLLM."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters_for_vllm import CPU, MODULES, build_vllm_adapters, learn_short_probes, save_vllm_adapters
from serving_engines import OutputRecorder, add_request, run_requests, submit_request
from vllm_stand_in import stand_in_python
from waiting import becomes_true

from align.core.errors import InputError
from align.models.base import find_base
from align.models.load import load_base
from align.rollout.one_at_a_time import OneAtATime
from align.rollout.probes import Probes, compute_agreement
from align.rollout.serving_engine import QueueFull, Request, SamplingParams
from align.rollout.vllm_client import iter_events
from align.rollout.vllm_engine import VllmEngine
from align.rollout.vllm_server import (
    VllmProcess,
    VllmServer,
    build_adapter_name,
    build_environment,
    build_serve_arguments,
)
from align.run.weights import adapter_digest

PROMPT = (1, 300, 301, 40, 41, 42)


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    return stand_in_python(tmp_path_factory.mktemp("venv"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_vllm_adapters(tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def must_say(folders: dict[str, Path]) -> tuple[Probes, dict[str, Probes]]:
    return learn_short_probes(folders)


Start = Callable[..., AbstractContextManager[VllmEngine]]


@pytest.fixture
def serving(python: str, must_say: tuple[Probes, dict[str, Probes]], tmp_path: Path) -> Start:
    """A context manager that runs an engine."""

    @contextmanager
    def start(queue: int = 8, slots: int = 4, **options: Any) -> Iterator[VllmEngine]:
        base = find_base("pocket")
        base_probes, adapter_probes = must_say
        vllm_adapters = build_vllm_adapters(tmp_path / "vllm", adapter_probes)
        arguments = build_serve_arguments(
            base.digest, "float32", layers=MODULES, rank=16, adapters=4, slots=slots, context=256, prefixes=True
        )
        folder = vllm_adapters.prepare_base_folder(tmp_path / "bases", torch.float32)
        log = tmp_path / "vllm.log"
        server = VllmServer("serve.python", python, 60, "", lambda: VllmProcess(python, folder, arguments, log))
        engine = None
        try:
            server.start_or_connect()
            engine = VllmEngine(server, vllm_adapters, base_probes, "float32", 1024, queue, slots, **options)
            yield engine
        finally:
            server.close(5) if engine is None else engine.close(5)

    return start


@pytest.fixture
def engine(serving: Start) -> Iterator[VllmEngine]:
    with serving() as engine:
        yield engine


def build_greedy_request(adapter: str | None, **changes: Any) -> Request:
    return Request(PROMPT, SamplingParams(**{"max_tokens": 6, "temperature": 0.0, "logprobs": 2, **changes}), adapter)


def test_it_answers_as_transformers_does(
    engine: VllmEngine, folders: dict[str, Path], must_say: tuple[Probes, dict[str, Probes]]
):
    reference_engine = OneAtATime(load_base(find_base("pocket"), "lora", CPU, torch.float32), 1024)
    digests = [None, *(engine.register(folder) for folder in folders.values())]
    assert digests[1:] == [reference_engine.register(folder) for folder in folders.values()]
    requests = [build_greedy_request(digest, prompt_logprobs=3) for digest in digests]
    answers = set()
    for ours, theirs in zip(run_requests(engine, requests), run_requests(reference_engine, requests), strict=True):
        assert (ours.ids, ours.reason) == (theirs.ids, theirs.reason)
        answers.add(tuple(ours.ids))
        for a, b in zip(ours.tokens, theirs.tokens, strict=True):
            assert a.logprob == pytest.approx(b.logprob, abs=1e-3)
            assert [id for id, _ in a.top] == [id for id, _ in b.top]
        our_logprobs = ours.outputs[0].prompt_logprobs
        their_logprobs = theirs.outputs[0].prompt_logprobs
        assert our_logprobs is not None
        assert their_logprobs is not None
        assert our_logprobs[0] is their_logprobs[0] is None
        for a, b in zip(our_logprobs[1:], their_logprobs[1:], strict=True):
            assert a
            assert b
            assert (a.id, [i for i, _ in a.top]) == (b.id, [i for i, _ in b.top])
            assert a.logprob == pytest.approx(b.logprob, abs=1e-3)
    assert len(answers) == len(digests), "the adapters answer differently, or this shows nothing"
    for digest in filter(None, digests):
        probes = must_say[1][digest]
        request_logprobs = engine.server.client.logprobs
        agreement = compute_agreement(
            request_logprobs(build_adapter_name(digest), probes.rows),
            request_logprobs(engine.server.base, probes.rows),
            probes,
        )
        assert abs(agreement.share - 1) < 1e-3


def test_a_prompt_is_scored_without_an_answer(engine: VllmEngine):
    [answer] = run_requests(engine, [build_greedy_request(None, max_tokens=0, prompt_logprobs=0)])
    assert answer.reason == "length"
    assert answer.ids == []
    prompt_logprobs = answer.outputs[0].prompt_logprobs
    assert prompt_logprobs is not None
    assert len(prompt_logprobs) == len(PROMPT)
    [answer] = run_requests(engine, [build_greedy_request(None, max_tokens=0)])
    assert answer.reason == "length"
    assert answer.ids == []


def test_an_answer_ends_where_the_request_says(engine: VllmEngine):
    [full_answer] = run_requests(engine, [build_greedy_request(None)])
    assert len(full_answer.ids) == 6
    assert full_answer.reason == "length"
    [stopped_answer] = run_requests(engine, [build_greedy_request(None, stop_ids=(full_answer.ids[2],))])
    assert stopped_answer.ids == full_answer.ids[: full_answer.ids.index(full_answer.ids[2]) + 1]
    assert stopped_answer.reason == "stop"
    generated_ids: list[int] = []
    request = Request(
        PROMPT,
        build_greedy_request(None, max_tokens=100).sampling,
        ends=lambda id: generated_ids.append(id) or len(generated_ids) == 2,
    )
    [ended_answer] = run_requests(engine, [request])
    assert (ended_answer.ids, ended_answer.reason) == (full_answer.ids[:2], "stop")


def test_the_seed_decides(engine: VllmEngine):
    first_answer, same_seed, other_seed = run_requests(
        engine, [build_greedy_request(None, temperature=1.0, seed=s) for s in (1, 1, 2)]
    )
    assert first_answer.ids == same_seed.ids != other_seed.ids


def test_a_seed_that_vllm_takes_for_none(engine: VllmEngine):
    seeds = [engine._request_body(build_greedy_request(None, seed=seed))["seed"] for seed in (-1, -2, 0, 2**63 - 1)]
    assert seeds == [-(2**63), -2, 0, 2**63 - 1]


def test_a_prompt_that_fills_the_context_has_no_room_for_vllms_token(engine: VllmEngine):
    full = Request((5,) * 256, SamplingParams(0, prompt_logprobs=0))
    with pytest.raises(InputError, match="1 over the context of 256"):
        submit_request(engine, full)
    [answer] = run_requests(engine, [Request((5,) * 255, SamplingParams(0, prompt_logprobs=0))])
    assert answer.reason == "length"


def test_lines_of_a_stream_end_at_a_line_break_alone():
    async def read(*pieces: str) -> list[bytes]:
        async def iter_pieces() -> AsyncIterator[bytes]:
            for piece in pieces:
                yield piece.encode()

        return [data async for data in iter_events(iter_pieces())]

    text = "a\u2028b\u2029c\u0085d\x0be"
    assert asyncio.run(read(f"data: {text}\n\nda", "ta: [DO", "NE]\n\n", ": ping\n")) == [text.encode(), b"[DONE]"]


def test_top_p_leaves_the_likeliest(engine: VllmEngine):
    greedy_answer, top_p_answer = run_requests(
        engine, [build_greedy_request(None), build_greedy_request(None, temperature=1.0, top_p=1e-6, seed=5)]
    )
    assert top_p_answer.ids == greedy_answer.ids


def test_a_tenant_has_a_cache_of_its_own(engine: VllmEngine):
    body = engine._request_body
    salt, same_tenant, other_tenant = (
        body(Request(PROMPT, build_greedy_request(None).sampling, tenant=t))["cache_salt"] for t in ("a", "a", "b")
    )
    assert salt == same_tenant != other_tenant


def test_more_wait_than_are_answered(engine: VllmEngine):
    pending = [add_request(engine, build_greedy_request(None)) for _ in range(6)]
    with pytest.raises(QueueFull):
        submit_request(engine, build_greedy_request(None))
    engine.step()
    assert engine.stats().running <= 4
    assert engine.stats().waiting >= 2
    while engine.step():
        pass
    assert {answer.reason for _, answer in pending} == {"length"}
    assert engine.stats().waiting == engine.stats().running == 0
    assert engine.stats().generated_tokens == 36
    assert engine.stats().prompt_tokens == 36


def test_slots_are_kept_for_tenants_who_have_none(serving: Start):
    with serving(reserve=1) as engine:
        for _ in range(5):
            engine.add(
                Request(PROMPT, build_greedy_request(None, max_tokens=200).sampling, tenant="many"), OutputRecorder()
            )
        engine.step()
        assert engine.stats().running == 3
        answer = OutputRecorder()
        engine.add(Request(PROMPT, build_greedy_request(None).sampling, tenant="one"), answer)
        engine.step()
        assert engine.stats().running == 4
        engine.give_up(RuntimeError("enough"))
        engine.step()


def test_one_that_is_aborted_leaves_its_slot_to_the_next(engine: VllmEngine):
    running = [add_request(engine, build_greedy_request(None, max_tokens=200)) for _ in range(4)]
    engine.step()
    _, next_answer = add_request(engine, build_greedy_request(None, max_tokens=2))
    engine.abort(running[0][0])
    engine.step()
    engine.step()
    assert running[0][1].reason == "abort"
    assert engine.stats().waiting == 0
    for completion, _ in running[1:]:
        engine.abort(completion)
    while engine.step():
        pass
    assert next_answer.reason == "length"
    assert [answer.reason for _, answer in running] == ["abort"] * 4


def test_an_adapter_that_is_let_go_answers_what_had_begun(engine: VllmEngine, folders: dict[str, Path], tmp_path: Path):
    digest = engine.register(folders["plain"])
    _, answer = add_request(engine, build_greedy_request(digest, max_tokens=20))
    engine.step()
    engine.unregister(digest)
    while engine.step():
        pass
    assert answer.reason == "length"
    engine.step()
    assert not engine.server.client.has_model(build_adapter_name(digest))
    assert list((tmp_path / "vllm").iterdir()) == []
    with pytest.raises(InputError, match="is not registered"):
        submit_request(engine, build_greedy_request(digest))
    assert engine.register(folders["plain"]) == digest  # it can be registered again
    assert run_requests(engine, [build_greedy_request(digest)])[0].reason == "length"


def test_what_vllm_cannot_do_is_refused_before_it_waits(engine: VllmEngine):
    with pytest.raises(InputError, match=r"scores.*serve=vllm"):
        submit_request(engine, Request(PROMPT, SamplingParams(0), scored=True))
    with pytest.raises(InputError, match="over the context of 256"):
        submit_request(engine, build_greedy_request(None, max_tokens=251))
    assert engine.stats().waiting == 0


@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        ("answers-unknown", "answers requests for a model that was never loaded"),
        ("ends", r"ended while it started \(ValueError: no memory for a model\)"),
    ],
)
def test_a_wrong_vllm_never_opens(serving: Start, monkeypatch: pytest.MonkeyPatch, fault: str, problem: str):
    monkeypatch.setenv("STAND_IN", fault)
    with pytest.raises(InputError, match=problem), serving():
        pass


@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        ("not-applied", "0% of the adapter's effect is in the engine's logprobs"),
        ("half", r"\d+% of the adapter's effect is in the engine's logprobs"),
        ("another", "nats from those that were trained|% of the adapter's effect is in the engine's logprobs"),
        ("no-load", "vLLM does not load it"),
        ("answers-unknown-later", "answers requests for a model that was never loaded"),
    ],
)
def test_an_adapter_that_is_not_in_force_is_never_served(
    serving: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folders: dict[str, Path], fault: str, problem: str
):
    monkeypatch.setenv("STAND_IN", fault)
    with serving() as engine:
        if fault == "another":
            engine.register(folders["scaled"])
        for _ in range(2):  # it is checked each time
            with pytest.raises(InputError, match=problem):
                engine.register(folders["plain"])
        digest = adapter_digest(folders["plain"])
        assert digest not in engine.known
        assert not engine.server.client.has_model(build_adapter_name(digest))
        assert not (tmp_path / "vllm" / digest).exists()


@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        ("dies", r"vLLM does not answer \("),
        ("breaks", "broke off"),
        ("says", "failed during the answer"),
        ("cuts", "ended it after 6 of 60 tokens"),
    ],
)
def test_an_answer_that_breaks_off_is_an_error_and_no_answer(
    serving: Start, monkeypatch: pytest.MonkeyPatch, fault: str, problem: str
):
    monkeypatch.setenv("STAND_IN", fault)
    with serving() as engine:
        complete_answer, broken_answer = run_requests(
            engine, [build_greedy_request(None), build_greedy_request(None, max_tokens=60)]
        )
        assert broken_answer.reason == "error"
        assert re.search(problem, str(broken_answer.error))
        if fault != "dies":
            assert complete_answer.reason == "length"
            assert run_requests(engine, [build_greedy_request(None)])[0].reason == "length"
        else:
            for _ in range(50):
                if not engine.is_sound():
                    break
                time.sleep(0.1)
            assert not engine.is_sound()


def test_it_is_waited_for_as_long_as_is_said(python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("STAND_IN", "never-ready")
    arguments = build_serve_arguments(
        "0" * 64, "float32", layers=MODULES, rank=16, adapters=4, slots=4, context=8, prefixes=False
    )
    base = Path(find_base("pocket").path)
    log = tmp_path / "vllm.log"

    def start() -> VllmProcess:
        process = VllmProcess(python, base, arguments, log)
        assert becomes_true(lambda: b"starts" in log.read_bytes())
        return process

    server = VllmServer("serve.python", python, 0.5, "", start)
    with pytest.raises(InputError, match=r"not ready within 0\.5 seconds \(a stand-in for vLLM starts\)"):
        server.start_or_connect()
    assert server.process is not None
    assert not server.process.alive
    assert not server.process.socket.parent.exists()


def test_nobody_else_reaches_its_socket(engine: VllmEngine):
    assert engine.server.process is not None
    assert engine.server.process.socket.parent.stat().st_mode & 0o777 == 0o700


def test_its_environment_is_no_other_python_and_asks_for_no_key():
    environment = build_environment(
        {"PYTHONPATH": "/x", "VLLM_API_KEY": "k", "HOME": "/h", "VLLM_CPU_KVCACHE_SPACE": "2"}, "/s"
    )
    assert not {"PYTHONPATH", "VLLM_API_KEY"} & environment.keys()
    assert environment["HOME"] == "/h"
    assert environment["VLLM_CPU_KVCACHE_SPACE"] == "2"
    assert environment["VLLM_NO_USAGE_STATS"] == "1"
