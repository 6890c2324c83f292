"""`stage=serve` before it listens: keys from the command line, and a server's run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from workshop import Ready, Workshop

from align.config.compose import build_config, compose_tree
from align.config.root import to_plain_dict
from align.core.errors import CorruptFile, RunBusy
from align.run import Run
from align.serve.tenants import LOCAL, KeyFile, Limits, Tenant
from align.serve.usage import UsageDatabase, build_usage_path
from align.stages import serve
from align.stages.runner import StageInputs


@pytest.fixture
def shop(tmp_path: Path) -> Workshop:
    return Workshop(tmp_path / "runs", tmp_path)


def asked(shop: Workshop, action: str, *words: str) -> str:
    """What such an action printed."""
    keys = shop.root.parent / "secrets" / "keys.json"
    assert shop.status("stage=serve", f"stage.action={action}", f"stage.keys={keys}", *words) == 0, shop.said
    return shop.said


def key_action(shop: Workshop, *words: str) -> str:
    """The key that it printed; empty for none."""
    found = re.findall(r"shown once: (al-\S+)", asked(shop, "key", *words))
    return found[0] if found else ""


def test_a_key_is_printed_once_and_written_nowhere(shop: Workshop) -> None:
    key = key_action(shop, "stage.tenant=acme", "stage.token_budget=1000", "stage.allow=[support]", "stage.admin=true")
    keys = KeyFile(shop.root.parent / "secrets" / "keys.json")
    tenant = keys.find_tenant(key)
    assert tenant is not None
    assert (tenant.admin, tenant.limits, tenant.allow) == (True, Limits(token_budget=1000), {"support"})
    assert shop.said.count(key) == 1
    second = key_action(shop, "stage.tenant=acme")
    assert second not in ("", key)
    ident = re.findall(r"keys: (\w{8}) \(", shop.said)[0]
    assert key_action(shop, "stage.tenant=acme", f"stage.revoke={ident}", "stage.lift=[allow]") == ""
    assert keys.find_tenant(key) is None
    changed = keys.find_tenant(second)
    assert changed is not None
    assert changed.allow is None
    files = [path for path in shop.root.parent.rglob("*") if path.is_file()]
    assert files == [keys.path]  # no folder of a run
    for secret in (key, second):
        assert secret[3:].encode() not in keys.path.read_bytes()


def test_a_look_at_the_tenants_changes_nothing(shop: Workshop) -> None:
    key = key_action(shop, "stage.tenant=acme", "stage.token_budget=1000", "stage.allow=[support]", "stage.admin=true")
    key_action(shop, "stage.tenant=ben", "stage.requests_per_minute=60", "stage.concurrency=4")
    keys = KeyFile(shop.root.parent / "secrets" / "keys.json")
    tenant, written = keys.find_tenant(key), keys.path.read_bytes()
    assert tenant is not None
    head, *rows = asked(shop, "tenants").splitlines()
    acme, ben = map(str.split, rows)
    assert [row.rindex(last) for row, last in zip(rows, ("1,000", "-"), strict=True)] == [head.index("tokens left")] * 2
    assert acme == ["acme", tenant.key[:8], "support", "(admin)", "-", "-", "-", "0", "0", "1,000", "1,000"]
    assert ben[2:] == ["every", "name", "60", "-", "4", "0", "0", "-", "-"]
    assert [path for path in shop.root.parent.rglob("*") if path.is_file()] == [keys.path]
    with UsageDatabase(build_usage_path(keys.path)) as usage:
        usage.reserve(tenant, "r", 100)
        usage.settle("r", 40, 2)
        usage.reserve(tenant, "under way", 100)
        (_, acme) = asked(shop, "tenants", "stage.tenant=acme").splitlines()
    assert acme.split()[-4:] == ["1", "42", "1,000", "858"]
    assert keys.path.read_bytes() == written


def inputs(ready: Ready, *words: str) -> StageInputs:
    words = ("stage=serve", f"run.root={ready.root}", *words)
    return serve.inputs(build_config(compose_tree(words)))


def opened(found: StageInputs) -> Run:
    return Run.open(to_plain_dict(found.config), found.records, found.base, found.label, again=found.again)


def test_what_a_server_is_known_by(ready: Ready) -> None:
    found = inputs(ready, "stage.adapters={support: sft:latest, chat: {support: 3, base: 1}}")
    assert found.base is not None
    assert found.config.method.name == "qlora"
    assert found.records["adapters.sft:latest"].run == "sft:s"
    assert found.records["base"].digest == found.base.digest
    again = inputs(ready, "stage.adapters={support: sft:latest, chat: {support: 3, base: 1}}")
    with opened(found) as run, pytest.raises(RunBusy, match=r"use another run\.name"):
        opened(again)
    assert run.name == f"{found.label}-{run.name[-8:]}"


def test_a_server_that_ended_is_started_again_by_the_same_line_in_its_folder(ready: Ready) -> None:
    words = ("stage.adapters={support: sft:s}", "stage.port=8001")
    for times in (1, 2):
        with opened(inputs(ready, *words)) as run:
            assert (run.done, run.resumed) == (False, times == 2)
            run.begin("a: 1\n")
            assert json.loads((run.folder / "manifest.json").read_text())["status"] == "running"
            (run.artifact / "served.json").write_text(str(times))
            run.publish({"requests": times})
    manifest = json.loads((run.folder / "manifest.json").read_text())
    assert (manifest["status"], manifest["metrics"], run.folder.parent.name) == ("done", {"requests": 2}, "serve")
    assert len(list((ready.root / "serve").glob("*-qlora-*"))) >= 1


def test_a_key_file_that_is_none_is_refused_before_anything_is_looked_for(ready: Ready, tmp_path: Path) -> None:
    (tmp_path / "keys.json").write_text("{")
    (tmp_path / "keys.json").chmod(0o600)
    with pytest.raises(CorruptFile) as caught:
        inputs(ready, "stage.adapters={a: sft:nothing}", f"stage.keys={tmp_path / 'keys.json'}")
    assert caught.value.field == "stage.keys"


def test_whoever_needs_no_key_may_do_everything() -> None:
    assert Tenant("local", admin=True) == LOCAL
    assert LOCAL.allow is None
