"""The commands of the files in deploy/, run with their own arguments, users, variables and mounts by bubblewrap in
place of Docker and Kubernetes. The root file system is read-only, and there is no network and no git."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from deploy_files import ROOT, find_instruction, find_stateful_set, read_compose_file, read_image_environment
from serving import write_adapters

from align.run import read_json

CONTAINER_SCRIPT = str(Path(__file__).with_name("container_script.py"))
ALIGN = find_instruction("ENTRYPOINT").words
KEY = [*ALIGN, "stage=serve", "stage.action=key", "stage.keys=keys/keys.json", "stage.tenant=acme"]


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapters(tmp_path_factory.mktemp("exports"), "support", "legal")


def run_contained(
    mounts: Mapping[str, tuple[Path, bool]], variables: Mapping[str, str], request: Mapping[str, Any]
) -> dict[str, Any]:
    """Run `container_script.py` as the image's user in its working folder, and return its report.

    Args:
        mounts: a folder for each path, and whether it is writable; other paths are empty and in memory.
        variables: added to those of the image.
        request: the commands, checks and key that `container_script.py` reads.
    """
    if (bwrap := shutil.which("bwrap")) is None:
        pytest.skip("bubblewrap is not installed (Debian's package `bubblewrap`)")
    python = Path(sys.executable).parent
    (user, group) = find_instruction("USER").arguments.split(":")
    isolated = [bwrap, "--unshare-user", "--unshare-net", "--unshare-pid", "--die-with-parent", "--uid", user]
    system = [path for path in Path("/").iterdir() if path.name not in ("proc", "dev", "sys", "tmp", "data")]
    command = [*isolated, "--gid", group, *(w for path in system for w in ("--ro-bind", str(path), str(path)))]
    command += ["--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp"]
    command += [w for path in (ROOT, Path(sys.prefix)) for w in ("--ro-bind", str(path), str(path))]
    for path, (folder, may_write) in mounts.items():
        command += ["--bind" if may_write else "--ro-bind", str(folder), path]
    env = {**read_image_environment(), **variables, "PATH": str(python), "PYTHONPATH": str(ROOT)}
    command += ["--remount-ro", "/", "--clearenv", *(w for pair in env.items() for w in ("--setenv", *pair))]
    if subprocess.run([*command, sys.executable, "-c", ""], capture_output=True).returncode:
        pytest.skip("this machine lets no user make namespaces")
    command += [
        "--chdir",
        find_instruction("WORKDIR").arguments,
        sys.executable,
        CONTAINER_SCRIPT,
        json.dumps(request),
        str(ROOT),
    ]
    process = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


def make_mounts(folder: Path, *names: str) -> dict[str, tuple[Path, bool]]:
    """Make writable folders, and return them by the paths of their mounts."""
    for name in names:
        (folder / name).mkdir()
    return {f"{find_instruction('WORKDIR').arguments}/{name}": (folder / name, True) for name in names}


def check_served(report: Mapping[str, Any], exports: Path, runs: Path, name: str) -> None:
    """Check that a server ran well and left the right files in the folder of runs."""
    assert all(report["healthy"]), report["printed"]
    assert (report["user"], report["writable"]) == (int(find_instruction("USER").arguments.split(":")[0]), [])
    assert (report["without a key"], report["models"]) == (401, ["pocket", "support", "legal"])
    assert report["ended"].endswith("data: [DONE]\n\n")  # the stream could finish
    assert '"finish_reason":"length"' in report["ended"]
    assert report["status"] == 0, report["printed"]
    (line,) = (runs / "serve" / name / "requests.jsonl").read_text().splitlines()
    assert (json.loads(line)["tenant"], json.loads(line)["adapter"]) == ("acme", report["adapter"])
    assert read_json(runs / "serve" / name / "manifest.json", "")["status"] == "done"
    assert {path.name for path in exports.iterdir()} == {"support", "legal"}


def fill_variables(command: Sequence[str], **variables: str) -> list[str]:
    """Return a command with its variables filled in, as Compose and Kubernetes do."""
    arguments = list(command)
    for name, value in variables.items():
        arguments = [word.replace(name, value) for word in arguments]
    assert not any("$" in word for word in arguments)
    return arguments


@pytest.mark.slow
def test_the_server_of_the_compose_file(exports: Path, tmp_path: Path) -> None:
    server = read_compose_file()["services"]["server"]
    volumes = dict(volume.split(":", 1)[::-1] for volume in server["volumes"])
    mounts = make_mounts(tmp_path, "runs", "keys", "cache")
    assert set(volumes) == {*mounts, "/data/exports:ro"}
    arguments = fill_variables(server["command"], **{"${DOMAIN:-models.example.org}": "models.example.org"})
    health = find_instruction("HEALTHCHECK").words
    request = {"before": [KEY], "server": [*ALIGN, *arguments], "checks": [health], "key": None}
    report = run_contained({**mounts, "/data/exports": (exports, False)}, server["environment"], request)
    check_served(report, exports, tmp_path / "runs", "server")
    assert "open https://models.example.org" in report["printed"]
    assert {path.name for path in (tmp_path / "keys").iterdir()} >= {"keys.json", "keys.json.usage.db"}


@pytest.mark.slow
def test_the_server_of_the_kubernetes_manifest(exports: Path, tmp_path: Path) -> None:
    from align.serve.tenants import change_tenant

    pod = find_stateful_set()["spec"]["template"]["spec"]
    (init_container,), (server,) = pod["initContainers"], pod["containers"]
    secret = tmp_path / "secret"
    key = change_tenant(secret / "keys.json", "acme").key
    (secret / "keys.json").chmod(0o440)  # the mode of a mounted Secret, which the server refuses
    mounts = make_mounts(tmp_path, "runs", "keys", "cache")
    mounts |= {"/data/exports": (exports, False), "/secret": (secret, False)}
    mount_paths = {mount["mountPath"] for container in (init_container, server) for mount in container["volumeMounts"]}
    assert mount_paths == {*mounts, "/tmp"}
    install = [shutil.which(init_container["command"][0]), *init_container["command"][1:]]
    arguments = fill_variables(server["args"], **{"$(POD_NAME)": "align-0"})
    checks = [server[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "liveness", "readiness")]
    variables = {entry["name"]: entry.get("value", "align-0") for entry in server["env"]}
    request = {"before": [install], "server": [*ALIGN, *arguments], "checks": checks, "key": key}
    report = run_contained(mounts, variables, request)
    check_served(report, exports, tmp_path / "runs", "align-0")
    assert (tmp_path / "keys" / "keys.json").stat().st_mode & 0o777 == 0o600
