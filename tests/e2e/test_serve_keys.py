"""`stage=serve` before it listens: its actions on keys, and the run of a server."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from stage_commands import Ready, Workshop

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


def run_action(shop: Workshop, action: str, *settings: str) -> str:
    """Run an action of `stage=serve` and return what it printed."""
    path = shop.root.parent / "secrets" / "keys.json"
    assert shop.status("stage=serve", f"stage.action={action}", f"stage.keys={path}", *settings) == 0, shop.output
    return shop.output


def run_key_action(shop: Workshop, *settings: str) -> str:
    """Return the key that the action printed, or an empty string."""
    keys = re.findall(r"shown once: (al-\S+)", run_action(shop, "key", *settings))
    return keys[0] if keys else ""


def test_a_key_is_printed_once_and_written_nowhere(shop: Workshop) -> None:
    key = run_key_action(
        shop, "stage.tenant=acme", "stage.token_budget=1000", "stage.allow=[support]", "stage.admin=true"
    )
    keys = KeyFile(shop.root.parent / "secrets" / "keys.json")
    tenant = keys.find_tenant(key)
    assert tenant is not None
    assert (tenant.admin, tenant.limits, tenant.allow) == (True, Limits(token_budget=1000), {"support"})
    assert shop.output.count(key) == 1
    second = run_key_action(shop, "stage.tenant=acme")
    assert second not in ("", key)
    key_id = re.findall(r"keys: (\w{8}) \(", shop.output)[0]
    assert run_key_action(shop, "stage.tenant=acme", f"stage.revoke={key_id}", "stage.lift=[allow]") == ""
    assert keys.find_tenant(key) is None
    changed = keys.find_tenant(second)
    assert changed is not None
    assert changed.allow is None
    files = [path for path in shop.root.parent.rglob("*") if path.is_file()]
    assert files == [keys.path]  # no run folder
    for secret in (key, second):
        assert secret[3:].encode() not in keys.path.read_bytes()


def test_a_look_at_the_tenants_changes_nothing(shop: Workshop) -> None:
    key = run_key_action(
        shop, "stage.tenant=acme", "stage.token_budget=1000", "stage.allow=[support]", "stage.admin=true"
    )
    run_key_action(shop, "stage.tenant=ben", "stage.requests_per_minute=60", "stage.concurrency=4")
    keys = KeyFile(shop.root.parent / "secrets" / "keys.json")
    tenant = keys.find_tenant(key)
    file_before = keys.path.read_bytes()
    assert tenant is not None
    head, *rows = run_action(shop, "tenants").splitlines()
    acme, ben = map(str.split, rows)
    assert [row.rindex(last) for row, last in zip(rows, ("1,000", "-"), strict=True)] == [head.index("tokens left")] * 2
    assert acme == ["acme", tenant.key[:8], "support", "(admin)", "-", "-", "-", "0", "0", "1,000", "1,000"]
    assert ben[2:] == ["every", "name", "60", "-", "4", "0", "0", "-", "-"]
    assert [path for path in shop.root.parent.rglob("*") if path.is_file()] == [keys.path]
    with UsageDatabase(build_usage_path(keys.path)) as usage:
        usage.reserve(tenant, "r", 100)
        usage.settle("r", 40, 2)
        usage.reserve(tenant, "under way", 100)
        (_, acme) = run_action(shop, "tenants", "stage.tenant=acme").splitlines()
    assert acme.split()[-4:] == ["1", "42", "1,000", "858"]
    assert keys.path.read_bytes() == file_before


def build_inputs(ready: Ready, *settings: str) -> StageInputs:
    settings = ("stage=serve", f"run.root={ready.root}", *settings)
    return serve.inputs(build_config(compose_tree(settings)))


def open_run(inputs: StageInputs) -> Run:
    return Run.open(to_plain_dict(inputs.config), inputs.records, inputs.base, inputs.label, again=inputs.again)


def test_what_a_server_is_known_by(ready: Ready) -> None:
    inputs = build_inputs(ready, "stage.adapters={support: sft:latest, chat: {support: 3, base: 1}}")
    assert inputs.base is not None
    assert inputs.config.method.name == "qlora"
    assert inputs.records["adapters.sft:latest"].run == "sft:s"
    assert inputs.records["base"].digest == inputs.base.digest
    same_inputs = build_inputs(ready, "stage.adapters={support: sft:latest, chat: {support: 3, base: 1}}")
    with open_run(inputs) as run, pytest.raises(RunBusy, match=r"use another run\.name"):
        open_run(same_inputs)
    assert run.name == f"{inputs.label}-{run.name[-8:]}"


def test_a_server_that_ended_is_started_again_by_the_same_line_in_its_folder(ready: Ready) -> None:
    settings = ("stage.adapters={support: sft:s}", "stage.port=8001")
    for attempt in (1, 2):
        with open_run(build_inputs(ready, *settings)) as run:
            assert (run.done, run.resumed) == (False, attempt == 2)
            run.begin("a: 1\n")
            assert json.loads((run.folder / "manifest.json").read_text())["status"] == "running"
            (run.artifact / "served.json").write_text(str(attempt))
            run.publish({"requests": attempt})
    manifest = json.loads((run.folder / "manifest.json").read_text())
    assert (manifest["status"], manifest["metrics"], run.folder.parent.name) == ("done", {"requests": 2}, "serve")
    assert len(list((ready.root / "serve").glob("*-qlora-*"))) >= 1


def test_a_key_file_that_is_none_is_refused_before_anything_is_looked_for(ready: Ready, tmp_path: Path) -> None:
    (tmp_path / "keys.json").write_text("{")
    (tmp_path / "keys.json").chmod(0o600)
    with pytest.raises(CorruptFile) as caught:
        build_inputs(ready, "stage.adapters={a: sft:nothing}", f"stage.keys={tmp_path / 'keys.json'}")
    assert caught.value.field == "stage.keys"


def test_whoever_needs_no_key_may_do_everything() -> None:
    assert Tenant("local", admin=True) == LOCAL
    assert LOCAL.allow is None
