"""Requests of many adapters in one batch: right, and the same to the bit as each of them alone."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from many_adapters import FAMILIES, adapters, added, asked, base_model, engine, peft_logprobs, prompt, run, sampled
from torch.testing import assert_close

from align.config.serve import ServeConfig
from align.models.fastpath import adapter_bank, exact, mixed
from align.models.fastpath.exact import TILE, blocks_agree, count_padded_rows, draw_cancelling_pairs, rows_agree
from align.models.fastpath.mixed import CHUNK, Piece
from align.rollout.serving_engine import Request
from align.stages.serve import describe_batches

LENGTHS = (1, 2, 5, 31, 63, 64, 65, 100, 128, 129, 150)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def requests_of(digests: list[str | None], number: int, seed: int = 0) -> list[Request]:
    """Requests that differ in everything."""
    draw = random.Random(seed)
    found = []
    for i in range(number):
        cold = draw.choice((0, 0.7, 1))
        sampling = sampled(draw.choice((1, 6, 20)), seed=i, temperature=cold, top_p=draw.choice((0.9, 1)))
        found.append(Request(prompt(draw.choice(LENGTHS), i), sampling, draw.choice(digests), tenant=str(i % 3)))
    return found


def test_it_says_what_peft_says(family: str, tmp_path: Path):
    config = FAMILIES[family]
    folders = [None, *adapters(config, tmp_path)]
    made = engine(config)
    digests = [folder and made.register(folder) for folder in folders]
    settings = sampled(30, prompt_logprobs=0)
    requests = [Request(prompt(LENGTHS[i % 11], i), settings, digests[i % len(digests)]) for i in range(14)]
    for i, (request, heard) in enumerate(zip(requests, run(made, requests, every=2), strict=True)):
        told = heard.outputs[0].prompt_logprobs
        assert told is not None
        assert told[0] is None
        found = [token.logprob for token in (*told[1:], *heard.tokens) if token is not None]
        right = peft_logprobs(config, folders[i % len(folders)], [*request.prompt_ids, *heard.ids])
        assert_close(torch.tensor(found), right, atol=2e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("threads", "number"), [(1, 16), (2, 2)])  # two threads beside other tests are slow
def test_mixed_is_alone_to_the_bit(dtype: torch.dtype, threads: int, number: int, tmp_path: Path):
    compare_with_alone("llama", dtype, threads, tmp_path, number)


def test_in_every_family(family: str, tmp_path: Path):
    compare_with_alone(family, torch.float32, 1, tmp_path, 10)


def compare_with_alone(family: str, dtype: torch.dtype, threads: int, folder: Path, number: int) -> None:
    before, config = torch.get_num_threads(), FAMILIES[family]
    folders = adapters(config, folder)
    torch.set_num_threads(threads)
    try:
        made = engine(config, dtype, slots=8, prefix_bytes=0)
        digests = [None, *(made.register(each) for each in folders)]
        requests = requests_of(digests, number)
        beside = run(made, requests, every=2)
        cached = engine(config, dtype, slots=3, prefix_bytes=1 << 28, prefill_tokens=CHUNK)
        for each in folders:
            cached.register(each)
        again = run(cached, requests * 2, every=1)
        for request, one, *others in zip(requests, beside, again[:number], again[number:], strict=True):
            alone = run(made, [request])[0]
            for other in (one, *others):
                assert other.tokens == alone.tokens
                assert other.reason == alone.reason
        assert cached.stats().cached_tokens > 0
        assert made.decoder.exact
    finally:
        torch.set_num_threads(before)


def test_products_of_a_fixed_shape_where_shapes_do_not_agree(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """As on a machine whose products agree in no two shapes."""
    monkeypatch.setattr(exact, "rows_agree", lambda *a: False)
    real, seen = exact.linear, set()
    monkeypatch.setattr(exact, "linear", lambda x, *a: seen.add(len(x)) or real(x, *a))
    compare_with_alone("qwen3", torch.float32, 1, tmp_path, 12)
    assert seen == {TILE}


@pytest.mark.parametrize("family", ["llama", "llama, one key for all"])
def test_as_many_matrices_as_threads(family: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """With fewer, a library shares one among its threads, and adds in another order."""
    for module in (exact, mixed, adapter_bank):
        monkeypatch.setattr(module, "compute_least_batch", lambda: 5)
    compare_with_alone(family, torch.float32, 1, tmp_path, 8)
    config = FAMILIES[family]
    made = engine(config)
    digests = [made.register(folder) for folder in adapters(config, tmp_path)]
    for digest in digests:
        made.decoder.bank.load(digest, made.known.by_digest[digest].folders[0], set())
    seen: set[int] = set()
    for name in ("bmm", "baddbmm"):
        real = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, real=real, **k: seen.add(len(a[-1])) or real(*a, **k))
    for chosen in (digests[:1], digests[:2], digests, [None]):
        made.decoder.step([Piece(i, digest, (7,), 0) for i, digest in enumerate(chosen)])
    assert seen
    assert min(seen) >= 5


def test_a_step_has_rows_for_its_products():
    assert [count_padded_rows(n, True) for n in (1, 2, 31, 32, 33, 34, 65)] == [2, 2, 31, 32, 34, 34, 66]
    assert [count_padded_rows(n, False) for n in (1, 32, 33)] == [32, 32, 64]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_another_order_of_addition_shows(dtype: torch.dtype):
    """In bf16 a sum's own size hides its last bits; sums of pairs that cancel are nothing else."""
    x, weight = draw_cancelling_pairs(4, 130, 50, dtype)
    products = x.float()[:, None] * weight.float()
    sums = []
    for order in (torch.arange(130), torch.randperm(130, generator=torch.Generator().manual_seed(1))):
        total = torch.zeros(4, 50)
        for i in order:
            total += products[..., i]
        sums.append(total.to(dtype))
    assert float((sums[0] != sums[1]).float().mean()) > 0.9


def test_a_machine_whose_rows_differ_is_found_out(monkeypatch: pytest.MonkeyPatch):
    assert rows_agree(64, 96, torch.float32)
    real = exact.linear

    def odd(x: Any, *given: Any) -> Any:
        out = real(x, *given)
        return out if len(x) != 7 else torch.nextafter(out, out + 1)

    monkeypatch.setattr(exact, "linear", odd)
    assert not rows_agree(64, 96, torch.float32)
    # A row that comes out otherwise in another place.
    monkeypatch.setattr(exact, "linear", lambda x, *a: real(x, *a) + torch.arange(len(x))[:, None] * 1e-6)
    assert not rows_agree(64, 96, torch.float32)


def test_blocks_that_differ_are_found_out(monkeypatch: pytest.MonkeyPatch):
    real = torch.bmm
    assert blocks_agree(64, 48, (4, 8), torch.float32)
    for odd in (lambda x: x.shape[0] == 5, lambda x: x.shape[1] == 4):
        monkeypatch.setattr(exact.torch, "bmm", lambda x, w, odd=odd: real(x, w) + (1e-6 if odd(x) else 0))
        assert not blocks_agree(64, 48, (4, 8), torch.float32)
        monkeypatch.setattr(exact.torch, "bmm", real)


def test_a_machine_that_cannot_keep_its_word_says_so(monkeypatch: pytest.MonkeyPatch):
    assert engine(FAMILIES["llama"]).decoder.exact
    monkeypatch.setattr(mixed, "blocks_agree", lambda *a: False)
    made = engine(FAMILIES["llama"])
    assert not made.decoder.exact
    assert "last bits can change" in describe_batches(ServeConfig(), made.decoder.exact)
    assert "last bits" not in describe_batches(ServeConfig(), True)


def test_garbage_in_a_slot_that_was_used_reaches_nobody(tmp_path: Path):
    """A slot keeps what its last request left behind the end of the next."""
    config = FAMILIES["llama"]
    made = engine(config, slots=1)
    request = Request(prompt(10), sampled(20))
    before = run(made, [request])[0].tokens
    for cache in (*made.decoder.keys, *made.decoder.values):
        cache.fill_(1e4)
    assert run(made, [request])[0].tokens == before


DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}


@pytest.mark.parametrize("change", [{"hidden_act": "gelu"}, {"sliding_window": 8}, {"rope_parameters": DYNAMIC}])
def test_what_is_not_plain_is_refused(change: dict[str, Any]):
    kind = "mistral" if "sliding_window" in change else "llama"
    config = type(FAMILIES[kind])(**{**FAMILIES[kind].to_dict(), **change})
    with pytest.raises(mixed.NotPlainError):
        engine(config)


def test_the_weights_of_the_model_are_given_up():
    model = base_model(FAMILIES["llama"])
    mixed.MixedDecoder(model, 2, 64, 1, 16)
    assert all(layer.mlp.down_proj.weight.numel() == 0 for layer in model.model.layers)


def test_a_request_without_a_distribution_ends_alone_and_leaves_nothing_behind(tmp_path: Path):
    config = FAMILIES["llama"]
    folders = adapters(config, tmp_path, ({"r": 16}, {"r": 16}))
    made = engine(config, slots=2)
    good, bad = (made.register(folder) for folder in folders)
    request = Request(prompt(5), sampled(12), good)
    expected = run(made, [request])[0].tokens
    run(made, [Request(prompt(5), sampled(1), bad)])
    made.decoder.bank.b[0][2][made.decoder.bank.units[bad][0]] = float("inf")  # of its values
    poisoned = [asked(made, Request(prompt(40), sampled(12), bad))]
    beside = [asked(made, request)]
    made.step()
    aborted, heard = added(made, Request(prompt(100), sampled(12), bad))
    made.step()
    made.abort(aborted)
    poisoned.append(heard)
    while made.step():
        pass
    after = [asked(made, request) for _ in range(3)]  # in the slots that were poisoned
    while made.step():
        pass
    assert [each.reason for each in poisoned] == ["error", "abort"]
    assert "nan or infinite" in str(poisoned[0].error)
    assert all(each.tokens == expected for each in (*beside, *after))
