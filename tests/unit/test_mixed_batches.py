"""Requests of many adapters in one batch get PEFT's logprobs, and the same tokens as each request alone, to the bit."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from serving_engines import (
    FAMILIES,
    add_request,
    build_base_model,
    build_engine,
    build_sampling_params,
    compute_peft_logprobs,
    draw_prompt,
    run_requests,
    save_random_adapters,
    submit_request,
)
from torch.testing import assert_close

from align.config.serve import ServeConfig
from align.models.fastpath import adapter_bank, exact, mixed
from align.models.fastpath.exact import (
    TILE,
    are_blocks_independent,
    are_rows_independent,
    count_padded_rows,
    draw_cancelling_pairs,
)
from align.models.fastpath.mixed import CHUNK, RequestTokens
from align.rollout.serving_engine import Request
from align.stages.serve import describe_batches

LENGTHS = (1, 2, 5, 31, 63, 64, 65, 100, 128, 129, 150)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def build_requests(digests: list[str | None], number: int, seed: int = 0) -> list[Request]:
    """Build requests that differ in prompt, sampling, adapter and tenant."""
    rng = random.Random(seed)
    requests = []
    for i in range(number):
        temperature = rng.choice((0, 0.7, 1))
        sampling = build_sampling_params(
            rng.choice((1, 6, 20)), seed=i, temperature=temperature, top_p=rng.choice((0.9, 1))
        )
        requests.append(Request(draw_prompt(rng.choice(LENGTHS), i), sampling, rng.choice(digests), tenant=str(i % 3)))
    return requests


def test_it_says_what_peft_says(family: str, tmp_path: Path):
    config = FAMILIES[family]
    folders = [None, *save_random_adapters(config, tmp_path)]
    serving_engine = build_engine(config)
    digests = [folder and serving_engine.register(folder) for folder in folders]
    settings = build_sampling_params(30, prompt_logprobs=0)
    requests = [Request(draw_prompt(LENGTHS[i % 11], i), settings, digests[i % len(digests)]) for i in range(14)]
    for i, (request, answer) in enumerate(zip(requests, run_requests(serving_engine, requests, every=2), strict=True)):
        prompt_logprobs = answer.outputs[0].prompt_logprobs
        assert prompt_logprobs is not None
        assert prompt_logprobs[0] is None
        logprobs = [token.logprob for token in (*prompt_logprobs[1:], *answer.tokens) if token is not None]
        expected = compute_peft_logprobs(config, folders[i % len(folders)], [*request.prompt_ids, *answer.ids])
        assert_close(torch.tensor(logprobs), expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("threads", "number"), [(1, 16), (2, 2)])  # two threads beside other tests are slow
def test_mixed_is_alone_to_the_bit(dtype: torch.dtype, threads: int, number: int, tmp_path: Path):
    compare_with_alone("llama", dtype, threads, tmp_path, number)


def test_in_every_family(family: str, tmp_path: Path):
    compare_with_alone(family, torch.float32, 1, tmp_path, 10)


def compare_with_alone(family: str, dtype: torch.dtype, threads: int, folder: Path, number: int) -> None:
    before = torch.get_num_threads()
    config = FAMILIES[family]
    folders = save_random_adapters(config, folder)
    torch.set_num_threads(threads)
    try:
        uncached_engine = build_engine(config, dtype, slots=8, prefix_bytes=0)
        digests = [None, *(uncached_engine.register(path) for path in folders)]
        requests = build_requests(digests, number)
        batched = run_requests(uncached_engine, requests, every=2)
        caching_engine = build_engine(config, dtype, slots=3, prefix_bytes=1 << 28, prefill_tokens=CHUNK)
        for path in folders:
            caching_engine.register(path)
        cached_answers = run_requests(caching_engine, requests * 2, every=1)
        for request, batched_answer, *cached_pair in zip(
            requests, batched, cached_answers[:number], cached_answers[number:], strict=True
        ):
            single = run_requests(uncached_engine, [request])[0]
            for answer in (batched_answer, *cached_pair):
                assert answer.tokens == single.tokens
                assert answer.reason == single.reason
        assert caching_engine.stats().cached_tokens > 0
        assert uncached_engine.decoder.exact
    finally:
        torch.set_num_threads(before)


def test_products_of_a_fixed_shape_where_shapes_do_not_agree(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The check of the machine's products is replaced: no two shapes agree."""
    monkeypatch.setattr(exact, "are_rows_independent", lambda *a: False)
    real = exact.linear
    lengths = set()
    monkeypatch.setattr(exact, "linear", lambda x, *a: lengths.add(len(x)) or real(x, *a))
    compare_with_alone("qwen3", torch.float32, 1, tmp_path, 12)
    assert lengths == {TILE}


@pytest.mark.parametrize("family", ["llama", "llama, one key for all"])
def test_as_many_matrices_as_threads(family: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A library with fewer matrices than threads splits one among threads, and adds in another order."""
    for module in (exact, mixed, adapter_bank):
        monkeypatch.setattr(module, "compute_min_batch", lambda: 5)
    compare_with_alone(family, torch.float32, 1, tmp_path, 8)
    config = FAMILIES[family]
    serving_engine = build_engine(config)
    digests = [serving_engine.register(folder) for folder in save_random_adapters(config, tmp_path)]
    for digest in digests:
        serving_engine.decoder.bank.load(digest, serving_engine.known.by_digest[digest].folders[0], set())
    batch_sizes: set[int] = set()
    for name in ("bmm", "baddbmm"):
        real = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, real=real, **k: batch_sizes.add(len(a[-1])) or real(*a, **k))
    for step_digests in (digests[:1], digests[:2], digests, [None]):
        serving_engine.decoder.step([RequestTokens(i, digest, (7,), 0) for i, digest in enumerate(step_digests)])
    assert batch_sizes
    assert min(batch_sizes) >= 5


def test_a_step_has_rows_for_its_products():
    assert [count_padded_rows(n, True) for n in (1, 2, 31, 32, 33, 34, 65)] == [2, 2, 31, 32, 34, 34, 66]
    assert [count_padded_rows(n, False) for n in (1, 32, 33)] == [32, 32, 64]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_another_order_of_addition_shows(dtype: torch.dtype):
    """Sums of cancelling pairs are small, so that bf16 shows their last bits. Larger sums would hide them."""
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
    assert are_rows_independent(64, 96, torch.float32)
    real = exact.linear

    def linear_with_odd_row(x: Any, *args: Any) -> Any:
        out = real(x, *args)
        return out if len(x) != 7 else torch.nextafter(out, out + 1)

    monkeypatch.setattr(exact, "linear", linear_with_odd_row)
    assert not are_rows_independent(64, 96, torch.float32)
    # The result of a row depends on its index in the batch.
    monkeypatch.setattr(exact, "linear", lambda x, *a: real(x, *a) + torch.arange(len(x))[:, None] * 1e-6)
    assert not are_rows_independent(64, 96, torch.float32)


def test_blocks_that_differ_are_found_out(monkeypatch: pytest.MonkeyPatch):
    real = torch.bmm
    assert are_blocks_independent(64, 48, (4, 8), torch.float32)
    for is_odd in (lambda x: x.shape[0] == 5, lambda x: x.shape[1] == 4):
        monkeypatch.setattr(exact.torch, "bmm", lambda x, w, is_odd=is_odd: real(x, w) + (1e-6 if is_odd(x) else 0))
        assert not are_blocks_independent(64, 48, (4, 8), torch.float32)
        monkeypatch.setattr(exact.torch, "bmm", real)


def test_a_machine_that_cannot_keep_its_word_says_so(monkeypatch: pytest.MonkeyPatch):
    assert build_engine(FAMILIES["llama"]).decoder.exact
    monkeypatch.setattr(mixed, "are_blocks_independent", lambda *a: False)
    serving_engine = build_engine(FAMILIES["llama"])
    assert not serving_engine.decoder.exact
    assert "can depend on the other requests in its batch" in describe_batches(
        ServeConfig(), serving_engine.decoder.exact
    )
    assert "last bits" not in describe_batches(ServeConfig(), True)


def test_garbage_in_a_slot_that_was_used_reaches_nobody(tmp_path: Path):
    """A slot keeps the last request's keys and values behind the end of a shorter next request."""
    config = FAMILIES["llama"]
    serving_engine = build_engine(config, slots=1)
    request = Request(draw_prompt(10), build_sampling_params(20))
    before = run_requests(serving_engine, [request])[0].tokens
    for cache in (*serving_engine.decoder.keys, *serving_engine.decoder.values):
        cache.fill_(1e4)
    assert run_requests(serving_engine, [request])[0].tokens == before


DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}


@pytest.mark.parametrize("change", [{"hidden_act": "gelu"}, {"sliding_window": 8}, {"rope_parameters": DYNAMIC}])
def test_what_is_not_plain_is_refused(change: dict[str, Any]):
    kind = "mistral" if "sliding_window" in change else "llama"
    config = type(FAMILIES[kind])(**{**FAMILIES[kind].to_dict(), **change})
    with pytest.raises(mixed.NotPlainError):
        build_engine(config)


def test_the_weights_of_the_model_are_given_up():
    model = build_base_model(FAMILIES["llama"])
    mixed.MixedDecoder(model, 2, 64, 1, 16)
    assert all(layer.mlp.down_proj.weight.numel() == 0 for layer in model.model.layers)


def test_a_request_without_a_distribution_ends_alone_and_leaves_nothing_behind(tmp_path: Path):
    config = FAMILIES["llama"]
    folders = save_random_adapters(config, tmp_path, ({"r": 16}, {"r": 16}))
    serving_engine = build_engine(config, slots=2)
    good, bad = (serving_engine.register(folder) for folder in folders)
    request = Request(draw_prompt(5), build_sampling_params(12), good)
    expected = run_requests(serving_engine, [request])[0].tokens
    run_requests(serving_engine, [Request(draw_prompt(5), build_sampling_params(1), bad)])
    # In the adapter's value projection.
    serving_engine.decoder.bank.b[0][2][serving_engine.decoder.bank.units[bad][0]] = float("inf")
    poisoned = [submit_request(serving_engine, Request(draw_prompt(40), build_sampling_params(12), bad))]
    neighbours = [submit_request(serving_engine, request)]
    serving_engine.step()
    aborted_id, aborted_answer = add_request(serving_engine, Request(draw_prompt(100), build_sampling_params(12), bad))
    serving_engine.step()
    serving_engine.abort(aborted_id)
    poisoned.append(aborted_answer)
    while serving_engine.step():
        pass
    after = [submit_request(serving_engine, request) for _ in range(3)]  # in the slots that were poisoned
    while serving_engine.step():
        pass
    assert [answer.reason for answer in poisoned] == ["error", "abort"]
    assert "nan or infinite" in str(poisoned[0].error)
    assert all(answer.tokens == expected for answer in (*neighbours, *after))
