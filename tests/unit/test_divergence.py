"""KL divergence of two models by token, compared with sums done by hand."""

from __future__ import annotations

import pytest
import torch

from align.ops.divergence import kl_between


def test_kl_by_hand():
    # Token 0: p = (½, ½), q = (¼, ¾): KL = ½ ln 2 + ½ ln ⅔ = ½ ln 4/3. Token 1: equal. Token 2 is masked.
    a = torch.tensor([[[0.5, 0.5], [0.9, 0.1], [0.5, 0.5]]]).log()
    b = torch.tensor([[[0.25, 0.75], [0.9, 0.1], [0.001, 0.999]]]).log()
    divergence = kl_between(a, b + 5, torch.tensor([[True, True, False]]))  # logits are free up to a constant
    assert divergence.kl == pytest.approx(0.5 * torch.log(torch.tensor(4 / 3)).item() / 2, abs=1e-7)
    assert divergence.max_logprob == pytest.approx(torch.log(torch.tensor(2.0)).item(), abs=1e-6)
    assert divergence.top1 == 0.5
    assert divergence.tokens == 2


def test_kl_with_tokens_ruled_out():
    inf = float("inf")
    a = torch.tensor([[[0.0, -inf, 0.0]]])
    assert kl_between(a, a, torch.ones(1, 1)).kl == 0
    # (½, 0, ½) against (⅔, 0, ⅓): ln ½ − ln ⅓ = ln 3/2 at most; the token that both rule out takes no part.
    tilted = torch.tensor([[[2.0, 0.0, 1.0]]]).log()
    assert kl_between(a, tilted, torch.ones(1, 1)).max_logprob == pytest.approx(0.405465, abs=1e-6)
    divergence = kl_between(a, torch.zeros(1, 1, 3), torch.ones(1, 1))
    assert divergence.kl == pytest.approx(torch.log(torch.tensor(1.5)).item(), abs=1e-7)
    assert kl_between(torch.zeros(1, 1, 3), a, torch.ones(1, 1)).kl == inf


def test_kl_does_not_depend_on_chunks_or_on_masked_rows(monkeypatch):
    torch.manual_seed(0)
    a = torch.randn(3, 7, 11)
    b = torch.randn(3, 7, 11)
    mask = torch.rand(3, 7) > 0.4
    unchunked = kl_between(a, b, mask)
    monkeypatch.setattr("align.ops.divergence.DIVERGENCE_ELEMENTS", 22)
    a[~mask] = torch.nan
    chunked = kl_between(a, b, mask)
    assert chunked.kl == pytest.approx(unchunked.kl, rel=1e-12)
    assert (chunked.top1, chunked.max_logprob, chunked.tokens) == (
        unchunked.top1,
        unchunked.max_logprob,
        int(mask.sum()),
    )
    with pytest.raises(ValueError, match="no token"):
        kl_between(a, b, torch.zeros(3, 7))
    with pytest.raises(ValueError, match="belong together"):
        kl_between(a, b, torch.zeros(3, 6))
