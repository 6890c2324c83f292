"""Kill the server of `stage=annotate` repeatedly under fifty annotators: no acknowledged vote is lost."""

from __future__ import annotations

import random
import sys
import threading
from collections import Counter
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

from align.annotate.store import Store

ROOT = Path(__file__).resolve().parents[2]
ENOUGH = 300
KILLS = 3


def load_crowd_module() -> Any:
    spec = spec_from_file_location("crowd", ROOT / "benchmarks" / "annotation" / "crowd.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules["crowd"] = module  # dataclasses look up their module there
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_killed_under_load_it_loses_no_acknowledged_vote_and_gives_nothing_twice(
    store_url: str, tmp_path: Path
) -> None:
    module = load_crowd_module()
    rng = random.Random(1)
    with module.create_store(store_url, ENOUGH + 500) as store:
        people = module.create_accounts(store, 50)
    port = module.find_free_port()
    result = module.CrowdResult()
    errors: list[BaseException] = []

    def annotate() -> None:
        try:
            module.run_crowd(
                f"http://127.0.0.1:{port}",
                people,
                every_s=0,
                is_enough=lambda result: len(result.acknowledged) >= ENOUGH,
                result=result,
            )
        except BaseException as error:
            errors.append(error)

    crowd = threading.Thread(target=annotate, daemon=True)
    for kill in range(KILLS):
        with module.run_server(tmp_path, port, f"store.url={store_url}") as server:
            if kill == 0:
                crowd.start()
            target = (kill + rng.random()) * ENOUGH / KILLS
            while len(result.acknowledged) < target and not errors:
                crowd.join(0.01)
            server.kill()
            server.wait()
    with module.run_server(tmp_path, port, f"store.url={store_url}"):
        crowd.join(400)
    assert errors == []
    assert result.refused == []
    assert result.tries > KILLS  # clients had to try again after each kill
    assert len(result.acknowledged) >= ENOUGH
    with Store.open(store_url, create_if_missing=False) as store:
        store.verify()
        pseudonyms = ((store.pseudonym(module.PROJECT, name), name) for name in people)
        names = {pseudonym: name for pseudonym, name in pseudonyms if pseudonym}
        votes = store.rankings(module.PROJECT)
    names_by_seq = {vote.seq: names[vote.annotator] for vote in votes}
    assert [seq for seq, name in result.acknowledged if names_by_seq.get(seq) != name] == []
    assert len({seq for seq, _ in result.acknowledged}) == len(result.acknowledged)
    assert max(Counter(vote.item for vote in votes).values()) == 1  # overlap is 1, and no lease ran out
