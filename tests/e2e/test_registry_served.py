"""The registry's server from the command line: its address, its access, and what it leaves."""

from __future__ import annotations

import signal
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from free_ports import pick_free_port
from processes import Forks
from stage_commands import Workshop
from starlette.testclient import TestClient
from synthetic_runs import write_two_policies
from waiting import becomes_true

SERVE = ("stage=registry", "stage.action=serve")


def fetch_page(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=20) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except OSError:
        return 0, ""


def test_it_serves_until_it_is_interrupted_and_leaves_nothing(forks: Forks, tmp_path: Path) -> None:
    root = write_two_policies(tmp_path / "runs")
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    port = pick_free_port()
    child = forks.start(tmp_path, *SERVE, f"run.root={root}", f"stage.port={port}")
    url = f"http://127.0.0.1:{port}"
    assert becomes_true(lambda: fetch_page(f"{url}/view/aliases")[0] == 200 or child.poll() is not None)
    status, text = fetch_page(f"{url}/view/runs")
    assert (status, "ppo:first" in text) == (200, True)
    assert fetch_page(f"{url}/")[0] == 200
    assert "sft:start" in fetch_page(f"{url}/view/run?run=ppo:first")[1]
    child.send_signal(signal.SIGINT)
    result = child.wait()
    assert result.status in (0, 130), result
    assert result.out.splitlines()[0] == f"open {url}"
    (root / ".registry.db").unlink()
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before


@pytest.fixture
def visited(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Collect a page's status without and with the link, for each server. The server ends at once."""
    statuses: list[tuple[int, int]] = []
    key: list[str] = []

    def visit_pages(app, host, port, report_ready) -> None:
        report_ready()
        client = TestClient(app, base_url="https://runs.example.org", follow_redirects=False)
        status_without_link = client.get("/view/runs").status_code
        key[:] = [path.read_text() for path in Path.cwd().glob("runs/registry.key")]
        client.get(f"/?key={key[0] if key else ''}")
        statuses.append((status_without_link, client.get("/view/runs").status_code))

    monkeypatch.setattr("align.web.server.serve_app", visit_pages)
    return statuses


def test_whoever_comes_from_elsewhere_needs_the_link(tmp_path: Path, visited, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    shop = Workshop(write_two_policies(tmp_path / "runs"), tmp_path)
    line = (*SERVE, f"run.root={shop.root}", "stage.host=0.0.0.0", "stage.url=https://runs.example.org")
    assert shop.run_command(*line) == 0, shop.output
    key = (shop.root / "registry.key").read_text()
    assert visited == [(403, 200)]
    assert f"open https://runs.example.org/?key={key}" in shop.output
    assert (shop.root / "registry.key").stat().st_mode & 0o777 == 0o600
    assert shop.run_command(*line) == 0
    assert (shop.root / "registry.key").read_text() == key
    plain = [*line[:-1], "stage.url=http://192.168.1.5:7862"]
    assert shop.run_command(*plain) == 0
    assert "in the clear" in shop.output


def test_behind_a_proxy_on_this_machine_the_link_is_needed_too(tmp_path: Path, visited, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    shop = Workshop(write_two_policies(tmp_path / "runs"), tmp_path)
    assert shop.run_command(*SERVE, f"run.root={shop.root}", "stage.url=https://runs.example.org") == 0
    assert visited == [(403, 200)]


@pytest.mark.parametrize(
    ("words", "field"),
    [
        (["stage.host=0.0.0.0"], "stage.url"),
        (["stage.url=runs.example.org"], "stage.url"),
        (["stage.port=80"], "stage.port"),
        (["stage.where={stage: ppo}"], "stage.where"),
        (["run.root=none"], "run.root"),
    ],
)
def test_a_server_that_cannot_be_started(tmp_path: Path, words: list[str], field: str) -> None:
    shop = Workshop(write_two_policies(tmp_path / "runs"), tmp_path)
    assert shop.run_command(*SERVE, f"run.root={shop.root}", *words) == 2
    assert field in shop.output
