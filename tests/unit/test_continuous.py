"""Tests of continuous batching: turns, slots, ends, failures, and adapters that are loaded and unloaded."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serving_engines import (
    FAMILIES,
    OutputRecorder,
    add_request,
    build_base_model,
    build_engine,
    build_sampling_params,
    draw_prompt,
    run_requests,
    save_random_adapter,
    save_random_adapters,
    submit_request,
)

from align.core.errors import CorruptFile, InputError
from align.models.fastpath.mixed import CHUNK
from align.rollout.continuous import ContinuousBatch
from align.rollout.one_at_a_time import OneAtATime
from align.rollout.serving_engine import EngineThread, QueueFull, Request, ServingEngine

CONFIG = FAMILIES["llama"]
ENGINES: dict[str, Callable[..., ServingEngine]] = {
    "batched": lambda **options: build_engine(CONFIG, **options),
    "one at a time": lambda **options: OneAtATime(build_base_model(CONFIG), 512, **options),
}


@pytest.fixture(params=ENGINES)
def make(request: pytest.FixtureRequest) -> Callable[..., ServingEngine]:
    return ENGINES[request.param]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return save_random_adapters(CONFIG, tmp_path_factory.mktemp("adapters"), ({"r": 16}, {"r": 4}, {"r": 24}))


def finish(serving_engine: ServingEngine) -> None:
    while serving_engine.step():
        pass


# Tests of both engines.


def test_both_engines_say_the_same(folders: list[Path]):
    answers_by_engine = []
    for make in ENGINES.values():
        serving_engine = make()
        digests = [None, *(serving_engine.register(folder) for folder in folders)]
        settings = [
            build_sampling_params(12, seed=i, temperature=i % 2, top_p=0.9, logprobs=2, prompt_logprobs=1)
            for i in range(8)
        ]
        requests = [Request(draw_prompt(3 + 20 * i, i), settings[i], digests[i % 4]) for i in range(8)]
        answers_by_engine.append(run_requests(serving_engine, requests))
    for batched, sequential in zip(*answers_by_engine, strict=True):
        assert batched.ids == sequential.ids
        assert (batched.reason, len(batched.outputs)) == (sequential.reason, len(sequential.outputs))
        (first, *batched_logprobs), (other_first, *sequential_logprobs) = (
            batched.outputs[0].prompt_logprobs or (),
            sequential.outputs[0].prompt_logprobs or (),
        )
        assert first is other_first is None
        for token, other_token in zip(
            [*batched_logprobs, *batched.tokens], [*sequential_logprobs, *sequential.tokens], strict=True
        ):
            assert token is not None
            assert other_token is not None
            assert token.logprob == pytest.approx(other_token.logprob, abs=1e-4)
            assert [id for id, _ in token.top] == [id for id, _ in other_token.top]


def test_ends(make: Callable[..., ServingEngine]):
    serving_engine = make()
    unstopped = run_requests(serving_engine, [Request(draw_prompt(5), build_sampling_params(12))])[0]
    assert (unstopped.reason, len(unstopped.ids)) == ("length", 12)
    third = unstopped.ids[2]
    assert third not in unstopped.ids[:2]
    stopped = run_requests(serving_engine, [Request(draw_prompt(5), build_sampling_params(12, stop_ids=(third,)))])[0]
    assert (stopped.reason, stopped.ids) == ("stop", unstopped.ids[:3])
    seen_ids: list[int] = []
    watched = run_requests(
        serving_engine,
        [Request(draw_prompt(5), build_sampling_params(12), ends=lambda id: seen_ids.append(id) or len(seen_ids) == 4)],
    )[0]
    assert (watched.reason, watched.ids, seen_ids) == ("stop", unstopped.ids[:4], unstopped.ids[:4])
    scored = run_requests(serving_engine, [Request(draw_prompt(5), build_sampling_params(0, prompt_logprobs=0))])[0]
    assert (scored.reason, scored.ids) == ("length", [])
    assert len(scored.outputs[0].prompt_logprobs or ()) == 5


def test_same_seed_same_answer(make: Callable[..., ServingEngine]):
    serving_engine = make()
    answer, same_answer, other_answer = run_requests(
        serving_engine, [Request(draw_prompt(5), build_sampling_params(20, seed=seed)) for seed in (3, 3, 4)]
    )
    assert answer.tokens == same_answer.tokens
    assert answer.ids != other_answer.ids
    assert (
        run_requests(serving_engine, [Request(draw_prompt(5), build_sampling_params(10, seed=3))])[0].tokens
        == answer.tokens[:10]
    )


class Counting:
    """A grammar that takes four ids, each a multiple of 7."""

    def __init__(self, fail_at: int = -1) -> None:
        self.taken = 0
        self.fail_at = fail_at

    def compute_mask(self) -> np.ndarray:
        if self.taken == self.fail_at:
            raise RuntimeError("a grammar of somebody's own")
        return np.arange(320) % 7 == 0

    def accept(self, token: int) -> bool:
        self.taken += 1
        return self.taken == 4


def test_a_grammar_binds_its_own_request(make: Callable[..., ServingEngine]):
    serving_engine = make()
    free = Request(draw_prompt(5), build_sampling_params(12, temperature=0))
    expected = run_requests(serving_engine, [free])[0].ids
    bound, failing = (
        Request(draw_prompt(5), build_sampling_params(12), grammar=each) for each in (Counting(), Counting(2))
    )
    bound, failing, unbound = run_requests(serving_engine, [bound, failing, free])
    assert (bound.reason, len(bound.ids)) == ("stop", 4)
    assert all(id % 7 == 0 for id in bound.ids)
    assert (failing.reason, len(failing.ids)) == ("error", 2)
    assert unbound.ids == expected


@pytest.mark.parametrize("ids", [(), draw_prompt(510)])
def test_what_has_no_room_is_refused(make: Callable[..., ServingEngine], ids: tuple[int, ...]):
    with pytest.raises(InputError, match="prompt=: has no tokens" if not ids else "8 over the context of 512"):
        make().add(Request(ids, build_sampling_params(10)), OutputRecorder())
    assert run_requests(make(), [Request(draw_prompt(502), build_sampling_params(10, temperature=0))])[0].reason in (
        "length",
        "stop",
    )


def test_a_full_queue(make: Callable[..., ServingEngine], folders: list[Path]):
    serving_engine = make(queue=2)
    digest = serving_engine.register(folders[0])
    listeners = [
        submit_request(serving_engine, Request(draw_prompt(5), build_sampling_params(2), digest)) for _ in range(2)
    ]
    with pytest.raises(QueueFull, match="2 requests wait already"):
        serving_engine.add(Request(draw_prompt(5), build_sampling_params(2), digest), OutputRecorder())
    finish(serving_engine)
    assert [listener.reason for listener in listeners] == ["length"] * 2
    serving_engine.unregister(digest)
    assert digest not in serving_engine.known.by_digest


def test_an_unknown_adapter_is_never_the_base(make: Callable[..., ServingEngine], folders: list[Path]):
    serving_engine = make()
    with pytest.raises(InputError, match="is not registered"):
        serving_engine.add(Request(draw_prompt(5), build_sampling_params(2), "0" * 64), OutputRecorder())
    digest = serving_engine.register(folders[0])
    serving_engine.unregister(digest)
    with pytest.raises(InputError, match="is not registered"):
        serving_engine.add(Request(draw_prompt(5), build_sampling_params(2), digest), OutputRecorder())
    with pytest.raises(InputError, match="is not registered"):
        serving_engine.unregister(digest)


def test_requests_finish_with_the_version_that_they_began_with(
    make: Callable[..., ServingEngine], folders: list[Path], tmp_path: Path
):
    """The adapter is unregistered while requests wait and run, and another one takes its name."""
    serving_engine = make()
    old, new = (serving_engine.register(folder) for folder in folders[:2])
    request = Request(draw_prompt(5), build_sampling_params(12), old)
    expected = run_requests(serving_engine, [request])[0].tokens
    listeners = [submit_request(serving_engine, request) for _ in range(12)]
    serving_engine.step()
    serving_engine.unregister(old)
    new_listener = submit_request(serving_engine, Request(draw_prompt(5), build_sampling_params(12), new))
    finish(serving_engine)
    assert all(listener.tokens == expected for listener in listeners)
    assert new_listener.tokens != expected
    serving_engine.step()
    assert old not in serving_engine.known.by_digest
    resident = (
        serving_engine.decoder.bank.units if isinstance(serving_engine, ContinuousBatch) else serving_engine._loaded  # pyright: ignore
    )
    assert list(resident) == [new]  # its memory is free at once


def test_who_has_chosen_an_adapter_still_gets_it(make: Callable[..., ServingEngine], folders: list[Path]):
    """Another version may take the name between the choice of a version and its request."""
    serving_engine = make()
    digest = serving_engine.register(folders[0])
    serving_engine.known.hold(digest)
    serving_engine.unregister(digest)
    listener = submit_request(serving_engine, Request(draw_prompt(5), build_sampling_params(2), digest))
    serving_engine.known.release(digest)
    finish(serving_engine)
    assert listener.reason == "length"
    assert digest not in serving_engine.known


def test_weights_that_were_changed_on_disk_are_not_served(
    make: Callable[..., ServingEngine], folders: list[Path], tmp_path: Path
):
    serving_engine = make()
    shutil.copytree(folders[0], tmp_path / "a")
    digest = serving_engine.register(tmp_path / "a")
    shutil.copy(folders[1] / "adapter_model.safetensors", tmp_path / "a" / "adapter_model.safetensors")
    answer = run_requests(serving_engine, [Request(draw_prompt(5), build_sampling_params(4), digest)])[0]
    assert answer.reason == "error"
    assert isinstance(answer.error, CorruptFile)
    assert str(tmp_path) not in str(answer.error)
    assert run_requests(serving_engine, [Request(draw_prompt(5), build_sampling_params(4))])[0].reason == "length"


def test_more_adapters_than_room(make: Callable[..., ServingEngine], folders: list[Path]):
    small_engine = make(resident=1)
    large_engine = make()
    for each in (small_engine, large_engine):
        for folder in folders:
            each.register(folder)
    requests = [
        Request(draw_prompt(5, i), build_sampling_params(6, seed=i), large_engine.register(folders[i % 3]))
        for i in range(9)
    ]
    for small_answer, large_answer in zip(
        run_requests(small_engine, requests), run_requests(large_engine, requests), strict=True
    ):
        assert small_answer.tokens == large_answer.tokens
    assert small_engine.stats().resident == 1


def test_aborted_before_its_turn_and_while_it_runs(make: Callable[..., ServingEngine], folders: list[Path]):
    serving_engine = make(queue=8)
    digest = serving_engine.register(folders[0])
    pending = [
        add_request(serving_engine, Request(draw_prompt(5), build_sampling_params(400, stop_ids=()), digest))
        for _ in range(3)
    ]
    serving_engine.abort(pending[2][0])
    assert pending[2][1].reason == "abort"
    if isinstance(serving_engine, OneAtATime):  # it answers in one step, so that the listener has to abort
        pending[0][1].__class__ = AbortsAfterThree
        pending[0][1].engine = serving_engine
        pending[0][1].own_completion = pending[0][0]
        serving_engine.abort(pending[1][0])
        serving_engine.step()
    else:
        serving_engine.step()
        serving_engine.step()
        for request_id, _ in pending[:2]:
            serving_engine.abort(request_id)
        serving_engine.step()
    assert [listener.reason for _, listener in pending] == ["abort"] * 3
    assert len(pending[0][1].ids) <= 3
    assert serving_engine.stats().running == 0
    assert serving_engine.known.by_digest[digest].held == 0


def test_a_prompt_has_begun_once_it_is_read_and_not_while_it_waits():
    serving_engine = build_engine(CONFIG, slots=2, prefill_tokens=CHUNK)
    reads, next_one, waits = (
        serving_engine.add(Request(draw_prompt(CHUNK + 1), build_sampling_params(3)), lambda output: None)
        for _ in range(3)
    )
    assert not reads.has_begun
    serving_engine.step()
    assert (reads.has_begun, next_one.has_begun, waits.has_begun) == (True, False, False)
    for _ in range(3):
        serving_engine.step()
    assert (next_one.has_begun, waits.has_begun) == (True, False)
    finish(serving_engine)
    assert waits.has_begun
    single_engine = OneAtATime(build_base_model(CONFIG), 512)
    first, second = (
        single_engine.add(Request(draw_prompt(5), build_sampling_params(3)), lambda output: None) for _ in range(2)
    )
    single_engine.step()
    assert (first.has_begun, second.has_begun) == (True, False)


class AbortsAfterThree(OutputRecorder):
    engine: Any
    own_completion: Any

    def __call__(self, output: Any) -> None:
        super().__call__(output)
        if len(self.ids) == 3:
            self.engine.abort(self.own_completion)


# Tests of the batch.


def test_weights_that_lie_in_two_folders_outlive_one(folders: list[Path], tmp_path: Path):
    serving_engine = build_engine(CONFIG)
    shutil.copytree(folders[0], tmp_path / "copy")
    digest = serving_engine.register(folders[0])
    assert serving_engine.register(tmp_path / "copy") == digest
    shutil.rmtree(tmp_path / "copy")
    assert (
        run_requests(serving_engine, [Request(draw_prompt(5), build_sampling_params(2), digest)])[0].reason == "length"
    )
    with pytest.raises(CorruptFile, match="were changed while it was loaded"):
        serving_engine.register(folders[1], digest)


def test_a_step_that_fails_harms_whom_it_is_the_fault_of(folders: list[Path], monkeypatch: pytest.MonkeyPatch):
    serving_engine = build_engine(CONFIG)
    requests = [Request(draw_prompt(5 + i, i), build_sampling_params(6, seed=i)) for i in range(4)]
    expected = [answer.tokens for answer in run_requests(serving_engine, requests)]
    real_step = serving_engine.decoder.step

    def fail_on_seven(pieces: Any) -> Any:
        if any(len(piece.ids) == 7 for piece in pieces):
            raise RuntimeError("a chunk of seven")
        return real_step(pieces)

    monkeypatch.setattr(serving_engine.decoder, "step", fail_on_seven)
    answers = run_requests(serving_engine, requests)
    assert [answer.reason for answer in answers] == ["length", "length", "error", "length"]
    assert [answer.tokens for i, answer in enumerate(answers) if i != 2] == [
        tokens for i, tokens in enumerate(expected) if i != 2
    ]


def test_an_adapter_that_waited_for_room_is_released_once(folders: list[Path], monkeypatch: pytest.MonkeyPatch):
    serving_engine = build_engine(CONFIG)
    digests = [serving_engine.register(folder) for folder in folders[:3]]
    monkeypatch.setattr(serving_engine.decoder.bank, "has_room", lambda in_use: False)
    listeners = [
        submit_request(serving_engine, Request(draw_prompt(5), build_sampling_params(6), digest)) for digest in digests
    ]
    serving_engine.step()
    assert serving_engine.stats().waiting == 3
    monkeypatch.undo()
    begin = serving_engine._begin_request

    def fail_at_the_second(answer: Any) -> None:
        if answer.request.adapter == digests[1]:
            raise MemoryError("no memory for a block")
        begin(answer)

    monkeypatch.setattr(serving_engine, "_begin_request", fail_at_the_second)
    with pytest.raises(MemoryError) as raised:
        serving_engine.step()
    serving_engine.give_up(raised.value)
    assert [listener.reason for listener in listeners] == ["error"] * 3
    assert [serving_engine.known.by_digest[digest].held for digest in digests] == [0, 0, 0]


def test_a_listener_that_fails_ends_its_own_request():
    serving_engine = build_engine(CONFIG)

    def fail(output: Any) -> None:
        if output.tokens:
            raise RuntimeError("a listener")

    serving_engine.add(Request(draw_prompt(5), build_sampling_params(6)), fail)
    listener = submit_request(serving_engine, Request(draw_prompt(5), build_sampling_params(6)))
    while serving_engine.step():
        pass
    assert listener.reason == "length"


def test_prompts_are_read_a_few_chunks_at_a_time():
    serving_engine = build_engine(CONFIG, prefill_tokens=CHUNK)
    sizes: list[list[int]] = []
    real_step = serving_engine.decoder.step
    serving_engine.decoder.step = lambda pieces: sizes.append([len(p.ids) for p in pieces]) or real_step(pieces)  # pyright: ignore
    run_requests(
        serving_engine,
        [
            Request(draw_prompt(130), build_sampling_params(1)),
            Request(draw_prompt(70), build_sampling_params(1)),
            Request(draw_prompt(3), build_sampling_params(3)),
        ],
    )
    assert sizes[:5] == [[64], [64], [2, 64], [6, 3], [1]]


# Tests of the engine thread.


def test_the_thread_answers_drains_and_ends(folders: list[Path]):
    thread = EngineThread(build_engine(CONFIG, slots=2))
    thread.start()
    digest = thread.engine.register(folders[0])
    all_ended = threading.Event()
    listeners = [OutputRecorder() for _ in range(6)]

    def create_callback(each: OutputRecorder) -> Callable[[Any], None]:
        return lambda output: (
            each(output) or (all(listener.reason for listener in listeners) and all_ended.set()) or None
        )

    for i, each in enumerate(listeners):
        thread.add(Request(draw_prompt(5, i), build_sampling_params(10), digest), create_callback(each))
    assert thread.close(30)
    assert all_ended.is_set()
    assert not thread.alive


def test_a_fault_of_the_engine_fails_who_waits_and_no_one_later(monkeypatch: pytest.MonkeyPatch):
    serving_engine = build_engine(CONFIG)
    thread = EngineThread(serving_engine)
    real_admit = serving_engine._admit
    monkeypatch.setattr(serving_engine, "_admit", lambda: 1 / 0)
    first_listener = OutputRecorder()
    answered = threading.Event()
    thread.start()
    thread.add(
        Request(draw_prompt(5), build_sampling_params(4)), lambda output: first_listener(output) or answered.set()
    )
    assert answered.wait(10)
    assert first_listener.reason == "error"
    monkeypatch.setattr(serving_engine, "_admit", real_admit)
    second_listener = OutputRecorder()
    answered = threading.Event()
    thread.add(
        Request(draw_prompt(5), build_sampling_params(4)),
        lambda output: second_listener(output) or (second_listener.reason and answered.set()) or None,
    )
    assert answered.wait(10)
    assert second_listener.reason == "length"
    assert thread.close(10)


def test_a_waiting_request_is_aborted_by_its_own_tenant_alone(tmp_path: Path):
    serving_engine = build_engine(CONFIG, slots=1)
    digest = serving_engine.register(save_random_adapter(CONFIG, tmp_path / "a"))
    pending = [
        add_request(serving_engine, Request(draw_prompt(5), build_sampling_params(3), digest, tenant))
        for tenant in "aab"
    ]
    serving_engine.abort(pending[1][0])
    serving_engine.abort(pending[1][0])
    finish(serving_engine)
    assert [listener.reason for _, listener in pending] == ["length", "abort", "length"]
