"""Continuous batching: turns, slots, ends, failures, and adapters that come and go."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from many_adapters import FAMILIES, Heard, adapter, adapters, added, asked, base_model, engine, prompt, run, sampled

from align.core.errors import CorruptFile, InputError
from align.models.fastpath.mixed import CHUNK
from align.rollout.continuous import ContinuousBatch
from align.rollout.one_at_a_time import OneAtATime
from align.rollout.serving_engine import EngineThread, QueueFull, Request, ServingEngine

CONFIG = FAMILIES["llama"]
ENGINES: dict[str, Callable[..., ServingEngine]] = {
    "batched": lambda **options: engine(CONFIG, **options),
    "one at a time": lambda **options: OneAtATime(base_model(CONFIG), 512, **options),
}


@pytest.fixture(params=ENGINES)
def make(request: pytest.FixtureRequest) -> Callable[..., ServingEngine]:
    return ENGINES[request.param]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return adapters(CONFIG, tmp_path_factory.mktemp("adapters"), ({"r": 16}, {"r": 4}, {"r": 24}))


def finish(made: ServingEngine) -> None:
    while made.step():
        pass


# What both engines do.


def test_both_engines_say_the_same(folders: list[Path]):
    said = []
    for make in ENGINES.values():
        made = make()
        digests = [None, *(made.register(folder) for folder in folders)]
        settings = [sampled(12, seed=i, temperature=i % 2, top_p=0.9, logprobs=2, prompt_logprobs=1) for i in range(8)]
        requests = [Request(prompt(3 + 20 * i, i), settings[i], digests[i % 4]) for i in range(8)]
        said.append(run(made, requests))
    for one, other in zip(*said, strict=True):
        assert one.ids == other.ids
        assert (one.reason, len(one.outputs)) == (other.reason, len(other.outputs))
        (first, *rest), (again, *others) = one.outputs[0].prompt_logprobs or (), other.outputs[0].prompt_logprobs or ()
        assert first is again is None
        for token, same in zip([*rest, *one.tokens], [*others, *other.tokens], strict=True):
            assert token is not None
            assert same is not None
            assert token.logprob == pytest.approx(same.logprob, abs=1e-4)
            assert [id for id, _ in token.top] == [id for id, _ in same.top]


def test_ends(make: Callable[..., ServingEngine]):
    made = make()
    free = run(made, [Request(prompt(5), sampled(12))])[0]
    assert (free.reason, len(free.ids)) == ("length", 12)
    third = free.ids[2]
    assert third not in free.ids[:2]
    stopped = run(made, [Request(prompt(5), sampled(12, stop_ids=(third,)))])[0]
    assert (stopped.reason, stopped.ids) == ("stop", free.ids[:3])
    told: list[int] = []
    watched = run(made, [Request(prompt(5), sampled(12), ends=lambda id: told.append(id) or len(told) == 4)])[0]
    assert (watched.reason, watched.ids, told) == ("stop", free.ids[:4], free.ids[:4])
    scored = run(made, [Request(prompt(5), sampled(0, prompt_logprobs=0))])[0]
    assert (scored.reason, scored.ids) == ("length", [])
    assert len(scored.outputs[0].prompt_logprobs or ()) == 5


def test_same_seed_same_answer(make: Callable[..., ServingEngine]):
    made = make()
    one, same, other = run(made, [Request(prompt(5), sampled(20, seed=seed)) for seed in (3, 3, 4)])
    assert one.tokens == same.tokens
    assert one.ids != other.ids
    assert run(made, [Request(prompt(5), sampled(10, seed=3))])[0].tokens == one.tokens[:10]


class Counting:
    """A grammar: only ids that are multiples of 7, four of them."""

    def __init__(self, fail_at: int = -1) -> None:
        self.taken, self.fail_at = 0, fail_at

    def compute_mask(self) -> np.ndarray:
        if self.taken == self.fail_at:
            raise RuntimeError("a grammar of somebody's own")
        return np.arange(320) % 7 == 0

    def accept(self, token: int) -> bool:
        self.taken += 1
        return self.taken == 4


def test_a_grammar_binds_its_own_request(make: Callable[..., ServingEngine]):
    made = make()
    free = Request(prompt(5), sampled(12, temperature=0))
    expected = run(made, [free])[0].ids
    bound, failing = (Request(prompt(5), sampled(12), grammar=each) for each in (Counting(), Counting(2)))
    bound, failing, beside = run(made, [bound, failing, free])
    assert (bound.reason, len(bound.ids)) == ("stop", 4)
    assert all(id % 7 == 0 for id in bound.ids)
    assert (failing.reason, len(failing.ids)) == ("error", 2)
    assert beside.ids == expected


@pytest.mark.parametrize("ids", [(), prompt(510)])
def test_what_has_no_room_is_refused(make: Callable[..., ServingEngine], ids: tuple[int, ...]):
    with pytest.raises(InputError, match="prompt=: has no tokens" if not ids else "8 over the context of 512"):
        make().add(Request(ids, sampled(10)), Heard())
    assert run(make(), [Request(prompt(502), sampled(10, temperature=0))])[0].reason in ("length", "stop")


def test_a_full_queue(make: Callable[..., ServingEngine], folders: list[Path]):
    made = make(queue=2)
    digest = made.register(folders[0])
    first = [asked(made, Request(prompt(5), sampled(2), digest)) for _ in range(2)]
    with pytest.raises(QueueFull, match="2 requests wait already"):
        made.add(Request(prompt(5), sampled(2), digest), Heard())
    finish(made)
    assert [each.reason for each in first] == ["length"] * 2
    made.unregister(digest)
    assert digest not in made.known.by_digest


def test_an_unknown_adapter_is_never_the_base(make: Callable[..., ServingEngine], folders: list[Path]):
    made = make()
    with pytest.raises(InputError, match="is not registered"):
        made.add(Request(prompt(5), sampled(2), "0" * 64), Heard())
    digest = made.register(folders[0])
    made.unregister(digest)
    with pytest.raises(InputError, match="is not registered"):
        made.add(Request(prompt(5), sampled(2), digest), Heard())
    with pytest.raises(InputError, match="is not registered"):
        made.unregister(digest)


def test_requests_finish_with_the_version_that_they_began_with(
    make: Callable[..., ServingEngine], folders: list[Path], tmp_path: Path
):
    """Unregistered while some wait and some run; then another adapter comes under its name."""
    made = make()
    old, new = (made.register(folder) for folder in folders[:2])
    request = Request(prompt(5), sampled(12), old)
    expected = run(made, [request])[0].tokens
    heard = [asked(made, request) for _ in range(12)]
    made.step()
    made.unregister(old)
    other = asked(made, Request(prompt(5), sampled(12), new))
    finish(made)
    assert all(each.tokens == expected for each in heard)
    assert other.tokens != expected
    made.step()
    assert old not in made.known.by_digest
    resident = made.decoder.bank.units if isinstance(made, ContinuousBatch) else made._loaded  # pyright: ignore
    assert list(resident) == [new]  # its memory is free at once


def test_who_has_chosen_an_adapter_still_gets_it(make: Callable[..., ServingEngine], folders: list[Path]):
    """Between the choice of a version and its request, another may take its name."""
    made = make()
    digest = made.register(folders[0])
    made.known.hold(digest)
    made.unregister(digest)
    heard = asked(made, Request(prompt(5), sampled(2), digest))
    made.known.release(digest)
    finish(made)
    assert heard.reason == "length"
    assert digest not in made.known


def test_weights_that_were_changed_on_disk_are_not_served(
    make: Callable[..., ServingEngine], folders: list[Path], tmp_path: Path
):
    made = make()
    shutil.copytree(folders[0], tmp_path / "a")
    digest = made.register(tmp_path / "a")
    shutil.copy(folders[1] / "adapter_model.safetensors", tmp_path / "a" / "adapter_model.safetensors")
    heard = run(made, [Request(prompt(5), sampled(4), digest)])[0]
    assert heard.reason == "error"
    assert isinstance(heard.error, CorruptFile)
    assert str(tmp_path) not in str(heard.error)
    assert run(made, [Request(prompt(5), sampled(4))])[0].reason == "length"


def test_more_adapters_than_room(make: Callable[..., ServingEngine], folders: list[Path]):
    made, plenty = make(resident=1), make()
    for each in (made, plenty):
        for folder in folders:
            each.register(folder)
    requests = [Request(prompt(5, i), sampled(6, seed=i), plenty.register(folders[i % 3])) for i in range(9)]
    for one, other in zip(run(made, requests), run(plenty, requests), strict=True):
        assert one.tokens == other.tokens
    assert made.stats().resident == 1


def test_aborted_before_its_turn_and_while_it_runs(make: Callable[..., ServingEngine], folders: list[Path]):
    made = make(queue=8)
    digest = made.register(folders[0])
    pending = [added(made, Request(prompt(5), sampled(400, stop_ids=()), digest)) for _ in range(3)]
    made.abort(pending[2][0])
    assert pending[2][1].reason == "abort"
    if isinstance(made, OneAtATime):  # it answers in one step, and is asked from outside
        pending[0][1].__class__ = AbortsAfterThree
        pending[0][1].engine, pending[0][1].mine = made, pending[0][0]
        made.abort(pending[1][0])
        made.step()
    else:
        made.step()
        made.step()
        for each, _ in pending[:2]:
            made.abort(each)
        made.step()
    assert [heard.reason for _, heard in pending] == ["abort"] * 3
    assert len(pending[0][1].ids) <= 3
    assert made.stats().running == 0
    assert made.known.by_digest[digest].held == 0


def test_a_prompt_has_begun_once_it_is_read_and_not_while_it_waits():
    made = engine(CONFIG, slots=2, prefill_tokens=CHUNK)
    reads, next_one, waits = (made.add(Request(prompt(CHUNK + 1), sampled(3)), lambda output: None) for _ in range(3))
    assert not reads.has_begun
    made.step()
    assert (reads.has_begun, next_one.has_begun, waits.has_begun) == (True, False, False)
    for _ in range(3):
        made.step()
    assert (next_one.has_begun, waits.has_begun) == (True, False)
    finish(made)
    assert waits.has_begun
    alone = OneAtATime(base_model(CONFIG), 512)
    first, second = (alone.add(Request(prompt(5), sampled(3)), lambda output: None) for _ in range(2))
    alone.step()
    assert (first.has_begun, second.has_begun) == (True, False)


class AbortsAfterThree(Heard):
    engine: Any
    mine: Any

    def __call__(self, output: Any) -> None:
        super().__call__(output)
        if len(self.ids) == 3:
            self.engine.abort(self.mine)


# What a batch does.


def test_weights_that_lie_in_two_folders_outlive_one(folders: list[Path], tmp_path: Path):
    made = engine(CONFIG)
    shutil.copytree(folders[0], tmp_path / "copy")
    digest = made.register(folders[0])
    assert made.register(tmp_path / "copy") == digest
    shutil.rmtree(tmp_path / "copy")
    assert run(made, [Request(prompt(5), sampled(2), digest)])[0].reason == "length"
    with pytest.raises(CorruptFile, match="were changed while it was loaded"):
        made.register(folders[1], digest)


def test_a_step_that_fails_harms_whom_it_is_the_fault_of(folders: list[Path], monkeypatch: pytest.MonkeyPatch):
    made = engine(CONFIG)
    requests = [Request(prompt(5 + i, i), sampled(6, seed=i)) for i in range(4)]
    expected = [heard.tokens for heard in run(made, requests)]
    real = made.decoder.step

    def failing(pieces: Any) -> Any:
        if any(len(piece.ids) == 7 for piece in pieces):
            raise RuntimeError("a chunk of seven")
        return real(pieces)

    monkeypatch.setattr(made.decoder, "step", failing)
    heard = run(made, requests)
    assert [each.reason for each in heard] == ["length", "length", "error", "length"]
    assert [each.tokens for i, each in enumerate(heard) if i != 2] == [t for i, t in enumerate(expected) if i != 2]


def test_an_adapter_that_waited_for_room_is_released_once(folders: list[Path], monkeypatch: pytest.MonkeyPatch):
    made = engine(CONFIG)
    digests = [made.register(folder) for folder in folders[:3]]
    monkeypatch.setattr(made.decoder.bank, "has_room", lambda in_use: False)
    heard = [asked(made, Request(prompt(5), sampled(6), digest)) for digest in digests]
    made.step()
    assert made.stats().waiting == 3
    monkeypatch.undo()
    begin = made._begin

    def fail_at_the_second(answer: Any) -> None:
        if answer.request.adapter == digests[1]:
            raise MemoryError("no memory for a block")
        begin(answer)

    monkeypatch.setattr(made, "_begin", fail_at_the_second)
    with pytest.raises(MemoryError) as raised:
        made.step()
    made.give_up(raised.value)
    assert [each.reason for each in heard] == ["error"] * 3
    assert [made.known.by_digest[digest].held for digest in digests] == [0, 0, 0]


def test_a_listener_that_fails_ends_its_own_request():
    made = engine(CONFIG)

    def fail(output: Any) -> None:
        if output.tokens:
            raise RuntimeError("a listener")

    made.add(Request(prompt(5), sampled(6)), fail)
    heard = asked(made, Request(prompt(5), sampled(6)))
    while made.step():
        pass
    assert heard.reason == "length"


def test_prompts_are_read_a_few_chunks_at_a_time():
    made = engine(CONFIG, prefill_tokens=CHUNK)
    seen: list[list[int]] = []
    real = made.decoder.step
    made.decoder.step = lambda pieces: seen.append([len(p.ids) for p in pieces]) or real(pieces)  # pyright: ignore
    run(made, [Request(prompt(130), sampled(1)), Request(prompt(70), sampled(1)), Request(prompt(3), sampled(3))])
    assert seen[:5] == [[64], [64], [2, 64], [6, 3], [1]]


# The thread.


def test_the_thread_answers_drains_and_ends(folders: list[Path]):
    thread = EngineThread(engine(CONFIG, slots=2))
    thread.start()
    digest = thread.engine.register(folders[0])
    done, heard = threading.Event(), [Heard() for _ in range(6)]

    def listener(each: Heard) -> Callable[[Any], None]:
        return lambda output: each(output) or (all(h.reason for h in heard) and done.set()) or None

    for i, each in enumerate(heard):
        thread.add(Request(prompt(5, i), sampled(10), digest), listener(each))
    assert thread.close(30)
    assert done.is_set()
    assert not thread.alive


def test_a_fault_of_the_engine_fails_who_waits_and_no_one_later(monkeypatch: pytest.MonkeyPatch):
    made = engine(CONFIG)
    thread = EngineThread(made)
    real = made._admit
    monkeypatch.setattr(made, "_admit", lambda: 1 / 0)
    heard, told = Heard(), threading.Event()
    thread.start()
    thread.add(Request(prompt(5), sampled(4)), lambda output: heard(output) or told.set())
    assert told.wait(10)
    assert heard.reason == "error"
    monkeypatch.setattr(made, "_admit", real)
    again, told = Heard(), threading.Event()
    thread.add(Request(prompt(5), sampled(4)), lambda output: again(output) or (again.reason and told.set()) or None)
    assert told.wait(10)
    assert again.reason == "length"
    assert thread.close(10)


def test_a_waiting_request_is_aborted_by_its_own_tenant_alone(tmp_path: Path):
    made = engine(CONFIG, slots=1)
    digest = made.register(adapter(CONFIG, tmp_path / "a"))
    pending = [added(made, Request(prompt(5), sampled(3), digest, tenant)) for tenant in "aab"]
    made.abort(pending[1][0])
    made.abort(pending[1][0])
    finish(made)
    assert [heard.reason for _, heard in pending] == ["length", "abort", "length"]
