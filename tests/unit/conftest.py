"""A store with three items, accounts with a fixed clock and a cheap password hash, and artifacts of tiny roles."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from annotation_store import add_question
from annotator_accounts import Time
from argon2 import PasswordHasher

from align.annotate.accounts import Accounts
from align.annotate.store import Store

if TYPE_CHECKING:
    from tiny_roles import World


@pytest.fixture
def store(store_url) -> Iterator[Store]:
    with Store.open(store_url) as store:
        for i in range(3):
            add_question(store, f"run/{i}")
        yield store


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
def accounts(store, time) -> Accounts:
    return Accounts(store, time, PasswordHasher(time_cost=1, memory_cost=8, parallelism=1))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_tokenizer: Any) -> World:
    """A base, a supervised adapter and a reward model. Shared by the tests of a module: do not change them."""
    from tiny_roles import make_world

    return make_world(tmp_path_factory.mktemp("world"), tiny_model, tiny_tokenizer)
