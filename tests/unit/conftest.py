"""A store with three items, and accounts with a fixed clock and a cheap password hash."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from annotation_store import add
from argon2 import PasswordHasher
from people import Time

from align.annotate.accounts import Accounts
from align.annotate.store import Store


@pytest.fixture
def store(store_url) -> Iterator[Store]:
    with Store.open(store_url) as store:
        for i in range(3):
            add(store, f"run/{i}")
        yield store


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
def accounts(store, time) -> Accounts:
    return Accounts(store, time, PasswordHasher(time_cost=1, memory_cost=8, parallelism=1))
