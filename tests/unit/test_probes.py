"""Probes of an adapter: how much of its effect an engine shows, and the file that stores them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from align.core.errors import CorruptFile, InputError
from align.rollout.probes import (
    PROBES,
    Agreement,
    Probes,
    compute_agreement,
    read_probes,
    require_agreement,
    write_probes,
)

SOME = Probes([[*range(1, 31)], [4, 5]], [[-1.5] * 29, [-0.25]], [[-1.0] * 29, [-0.5]])


def test_the_share_of_an_adapter_that_is_in_force():
    generator = np.random.default_rng(0)
    base = -5 * generator.random((4, 50))
    effect = 0.05 * generator.standard_normal((4, 50))
    probes = Probes([[0] * 51] * 4, (base + effect).tolist(), base.tolist())
    for share in (0.0, 0.5, 1.0, 2.0):
        noise, noise_base = 0.02 * generator.standard_normal((2, 4, 50))  # half as large as the adapter's effect
        agreement = compute_agreement((base + share * effect + noise).tolist(), (base + noise_base).tolist(), probes)
        assert agreement.share == pytest.approx(share, abs=3 * agreement.error)
        assert agreement.error < 0.1
    exact_agreement = compute_agreement(probes.adapter, probes.base, probes)
    assert exact_agreement == Agreement(0.0, pytest.approx(1.0), pytest.approx(0.0, abs=1e-9))


def test_an_agreement_is_judged_by_what_its_noise_can_tell():
    require_agreement(Agreement(0.01, 1.2, 0.01), "bfloat16", "adapter", "x")
    require_agreement(Agreement(0.01, 0.0, 0.5), "bfloat16", "adapter", "x")  # the adapter's effect is within the noise
    require_agreement(Agreement(0.01, float("nan"), float("inf")), "bfloat16", "adapter", "x")
    for wrong in (Agreement(0.01, 0.7, 0.01), Agreement(0.01, 1.4, 0.1), Agreement(0.2, 1.0, 0.01)):
        with pytest.raises(InputError, match="adapter=x"):
            require_agreement(wrong, "bfloat16", "adapter", "x")
    with pytest.raises(InputError, match="nats from those that were trained"):
        require_agreement(Agreement(0.01, 1.0, 0.0), "float32", "adapter", "x")
    with pytest.raises(InputError):
        require_agreement(Agreement(float("nan"), float("nan"), float("nan")), "float32", "adapter", "x")


def test_probes_are_read_as_they_were_written(tmp_path: Path):
    probes = SOME
    assert read_probes(tmp_path, "a", "b") is None
    write_probes(tmp_path, probes, "a", "b")
    assert read_probes(tmp_path, "a", "b") == probes
    for adapter, base in (("x", "b"), ("a", "x")):
        with pytest.raises(CorruptFile, match="another adapter or base"):
            read_probes(tmp_path, adapter, base)


def too_few(document: dict[str, Any]) -> None:
    for name in ("rows", "adapter", "base"):
        document[name].pop(0)


def drop_field(name: str) -> Callable[[dict[str, Any]], object]:
    return lambda document: document.pop(name)


@pytest.mark.parametrize(
    "spoil",
    [
        drop_field("rows"),
        drop_field("base"),
        lambda document: document["rows"].pop(),
        lambda document: document["adapter"][0].pop(),
        lambda document: document["rows"][1].append("x"),
        lambda document: document["base"][0].__setitem__(0, None),
        lambda document: document["base"][0].__setitem__(3, float("nan")),
        too_few,
        lambda document: document.update(rows=[], adapter=[], base=[]),
        lambda document: document.update(rows=3),
        lambda document: document["rows"].__setitem__(0, [-1, *range(29)]),
        lambda document: document["rows"].__setitem__(1, 7),
    ],
)
def test_probes_that_are_none_are_refused(tmp_path: Path, spoil: Callable[[dict[str, Any]], object]):
    write_probes(tmp_path, SOME, "a", "b")
    document = json.loads((tmp_path / PROBES).read_text())
    spoil(document)
    (tmp_path / PROBES).write_text(json.dumps(document))
    with pytest.raises(CorruptFile, match="holds no rows of tokens"):
        read_probes(tmp_path, "a", "b")
