"""What the files of deploy/ start, run: their own command lines, users, variables and mounts, by bubblewrap in place of
Docker and Kubernetes. The root file system is read-only, and there is no network and no git."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from deploy_files import ROOT, compose, environment, only, stateful_set
from serving import adapters

from align.run import read_json

CONTAINED = str(Path(__file__).with_name("contained.py"))
ALIGN = only("ENTRYPOINT").words
KEY = [*ALIGN, "stage=serve", "stage.action=key", "stage.keys=keys/keys.json", "stage.tenant=acme"]


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return adapters(tmp_path_factory.mktemp("exports"), "support", "legal")


def contained(
    mounts: Mapping[str, tuple[Path, bool]], variables: Mapping[str, str], told: Mapping[str, Any]
) -> dict[str, Any]:
    """Runs `contained.py` as the image's user in its working folder, and gives what it found.

    Args:
        mounts: a folder for each path, and whether it may be written; paths without one are empty and in memory.
        variables: beside those of the image.
    """
    if (bwrap := shutil.which("bwrap")) is None:
        pytest.skip("bubblewrap is not installed (Debian's package `bubblewrap`)")
    python, (user, group) = Path(sys.executable).parent, only("USER").rest.split(":")
    isolated = [bwrap, "--unshare-user", "--unshare-net", "--unshare-pid", "--die-with-parent", "--uid", user]
    system = [path for path in Path("/").iterdir() if path.name not in ("proc", "dev", "sys", "tmp", "data")]
    words = [*isolated, "--gid", group, *(w for path in system for w in ("--ro-bind", str(path), str(path)))]
    words += ["--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp"]
    words += [w for path in (ROOT, Path(sys.prefix)) for w in ("--ro-bind", str(path), str(path))]
    for path, (folder, may_write) in mounts.items():
        words += ["--bind" if may_write else "--ro-bind", str(folder), path]
    given = {**environment(), **variables, "PATH": str(python), "PYTHONPATH": str(ROOT)}
    words += ["--remount-ro", "/", "--clearenv", *(w for pair in given.items() for w in ("--setenv", *pair))]
    if subprocess.run([*words, sys.executable, "-c", ""], capture_output=True).returncode:
        pytest.skip("this machine lets no user make namespaces")
    words += ["--chdir", only("WORKDIR").rest, sys.executable, CONTAINED, json.dumps(told), str(ROOT)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def fresh(folder: Path, *names: str) -> dict[str, tuple[Path, bool]]:
    """Empty folders that may be written, by the paths where they are mounted."""
    for name in names:
        (folder / name).mkdir()
    return {f"{only('WORKDIR').rest}/{name}": (folder / name, True) for name in names}


def served_well(found: Mapping[str, Any], exports: Path, runs: Path, name: str) -> None:
    """A server that ran as it should, and left what it should in the folder of runs."""
    assert all(found["healthy"]), found["printed"]
    assert (found["user"], found["writable"]) == (int(only("USER").rest.split(":")[0]), [])
    assert (found["without a key"], found["models"]) == (401, ["pocket", "support", "legal"])
    assert found["ended"].endswith("data: [DONE]\n\n")  # it was let finish
    assert '"finish_reason":"length"' in found["ended"]
    assert found["status"] == 0, found["printed"]
    (line,) = (runs / "serve" / name / "requests.jsonl").read_text().splitlines()
    assert (json.loads(line)["tenant"], json.loads(line)["adapter"]) == ("acme", found["adapter"])
    assert read_json(runs / "serve" / name / "manifest.json", "")["status"] == "done"
    assert {path.name for path in exports.iterdir()} == {"support", "legal"}


def words_of(command: Sequence[str], **variables: str) -> list[str]:
    """A command's words with their variables put in, as Compose and Kubernetes do."""
    found = list(command)
    for name, value in variables.items():
        found = [word.replace(name, value) for word in found]
    assert not any("$" in word for word in found)
    return found


@pytest.mark.slow
def test_the_server_of_the_compose_file(exports: Path, tmp_path: Path) -> None:
    server = compose()["services"]["server"]
    volumes = dict(volume.split(":", 1)[::-1] for volume in server["volumes"])
    mounts = fresh(tmp_path, "runs", "keys", "cache")
    assert set(volumes) == {*mounts, "/data/exports:ro"}
    given = words_of(server["command"], **{"${DOMAIN:-models.example.org}": "models.example.org"})
    health = only("HEALTHCHECK").words
    told = {"before": [KEY], "server": [*ALIGN, *given], "checks": [health], "key": None}
    found = contained({**mounts, "/data/exports": (exports, False)}, server["environment"], told)
    served_well(found, exports, tmp_path / "runs", "server")
    assert "open https://models.example.org" in found["printed"]
    assert {path.name for path in (tmp_path / "keys").iterdir()} >= {"keys.json", "keys.json.usage.db"}


@pytest.mark.slow
def test_the_server_of_the_kubernetes_manifest(exports: Path, tmp_path: Path) -> None:
    from align.serve.tenants import change_tenant

    pod = stateful_set()["spec"]["template"]["spec"]
    (first,), (server,) = pod["initContainers"], pod["containers"]
    secret = tmp_path / "secret"
    key = change_tenant(secret / "keys.json", "acme").key
    (secret / "keys.json").chmod(0o440)  # as a Secret is mounted, which the server would refuse
    mounts = fresh(tmp_path, "runs", "keys", "cache")
    mounts |= {"/data/exports": (exports, False), "/secret": (secret, False)}
    asked = {mount["mountPath"] for one in (first, server) for mount in one["volumeMounts"]}
    assert asked == {*mounts, "/tmp"}
    install = [shutil.which(first["command"][0]), *first["command"][1:]]
    given = words_of(server["args"], **{"$(POD_NAME)": "align-0"})
    checks = [server[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "liveness", "readiness")]
    variables = {one["name"]: one.get("value", "align-0") for one in server["env"]}
    told = {"before": [install], "server": [*ALIGN, *given], "checks": checks, "key": key}
    found = contained(mounts, variables, told)
    served_well(found, exports, tmp_path / "runs", "align-0")
    assert (tmp_path / "keys" / "keys.json").stat().st_mode & 0o777 == 0o600
