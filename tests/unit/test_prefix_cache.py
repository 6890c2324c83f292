"""The prefix cache: a prefix is computed once per tenant and adapter, and others do not read it."""

from __future__ import annotations

from pathlib import Path

import torch
from serving_engines import (
    FAMILIES,
    build_engine,
    build_sampling_params,
    draw_prompt,
    run_requests,
    save_random_adapters,
)

from align.rollout.continuous import PrefixCache
from align.rollout.serving_engine import Request

CONFIG = FAMILIES["llama"]


def test_a_prefix_is_read_once():
    llama_engine = build_engine(CONFIG, prefix_bytes=1 << 26)
    request = Request(draw_prompt(150), build_sampling_params(4))
    cold = run_requests(llama_engine, [request])[0]
    warm = run_requests(llama_engine, [request])[0]
    assert cold.tokens == warm.tokens
    assert (cold.outputs[0].cached_tokens, warm.outputs[0].cached_tokens) == (0, 128)
    longer = run_requests(
        llama_engine, [Request((*draw_prompt(150)[:70], *draw_prompt(80, 9)), build_sampling_params(4))]
    )[0]
    assert longer.outputs[0].cached_tokens == 64
    # The last token of a prompt is always computed.
    assert (
        run_requests(llama_engine, [Request(draw_prompt(64), build_sampling_params(4))])[0].outputs[0].cached_tokens
        == 0
    )
    assert (
        run_requests(llama_engine, [Request(draw_prompt(150), build_sampling_params(4, prompt_logprobs=0))])[0]
        .outputs[0]
        .cached_tokens
        == 0
    )


def test_no_other_tenant_or_adapter_reads_it(tmp_path: Path):
    llama_engine = build_engine(CONFIG, prefix_bytes=1 << 26)
    digests = [None, *(llama_engine.register(folder) for folder in save_random_adapters(CONFIG, tmp_path)[:2])]
    for digest in digests:
        for tenant in ("a", "b"):
            for cached in (0, 128):
                response = run_requests(
                    llama_engine, [Request(draw_prompt(150), build_sampling_params(1), digest, tenant)]
                )[0]
                assert response.outputs[0].cached_tokens == cached


def test_the_cache_has_its_bounds():
    cache = PrefixCache(4, 3 * 64)
    blocks = {bytes([i]): torch.zeros(16) for i in range(5)}
    for key in (b"\0", b"\1", b"\2"):
        cache.add(key, blocks[key])
    assert cache.get(b"\0") is blocks[b"\0"]
    cache.add(b"\3", blocks[b"\3"])
    assert cache.bytes == 3 * 64
    assert cache.get(b"\1") is None  # the least recently used
    cache.add(b"\4", torch.zeros(1000))
    assert cache.get(b"\4") is None
    assert cache.bytes == 3 * 64


def test_keys_name_all_that_a_block_depends_on():
    cache = PrefixCache(4, 0)
    ids = list(range(12))
    assert len(list(cache.keys("t", None, ids))) == 2  # none for the block of the last token
    keys = [
        key
        for tenant, digest, token_ids in (
            ("t", None, ids),
            ("u", None, ids),
            ("t", "d", ids),
            ("t", None, [9, *ids[1:]]),
            ("t', 'd", None, ids),
        )
        for key in cache.keys(tenant, digest, token_ids)
    ]
    assert len(set(keys)) == len(keys)
