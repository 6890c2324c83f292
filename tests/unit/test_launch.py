"""Launch scripts start engines with the right arguments, which stubs of the engines on the PATH print."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from align.core.aliases import parse_aliases
from align.core.errors import InputError
from align.export.launch import (
    ServedBase,
    choose_vllm_rank,
    make_served_name,
    write_adapter_scripts,
    write_align_script,
    write_llama_script,
    write_model_script,
)
from align.ops.divergence import Divergence

CHAT = "{{ messages }}"
KEY = "key-of-the-launch"
LOCAL = ["--host", "127.0.0.1"]
GAP = Divergence(0.41, 0.69, 15.0, 818)


@pytest.fixture
def engines(tmp_path: Path) -> Path:
    """A folder with `vllm`, `llama-server` and `python`, which print their arguments, one a line, vLLM's settings and
    the working directory."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("vllm", "llama-server", "python"):
        script = folder / name
        script.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\nenv | grep ^VLLM_ | grep -v API_KEY | sort && pwd\n")
        script.chmod(0o755)
    return folder


def run_script(script: Path, engines: Path, *arguments: str, **settings: str) -> list[str]:
    env = {"PATH": f"{engines}:{os.environ['PATH']}", "VLLM_API_KEY": KEY} | settings
    completed = subprocess.run(
        ["sh", str(script), *arguments], env=env, capture_output=True, text=True, cwd="/", check=True
    )
    return completed.stdout.splitlines()


def run_failing_script(script: Path, engines: Path, **settings: str) -> str:
    with pytest.raises(subprocess.CalledProcessError) as error:
        run_script(script, engines, **settings)
    return error.value.stderr


def mentions_gap(script: Path) -> bool:
    return "KL 0.41 nats a token from the trained model" in read_joined_lines(script)


def read_joined_lines(script: Path) -> str:
    return " ".join(script.read_text().replace("\n# ", " ").split())


def test_an_adapter_on_the_base_that_it_knows(engines: Path, tmp_path: Path):
    folder = tmp_path / "my runs" / "export" / "x" / "artifact"
    base = tmp_path / "my runs" / "bases" / "pocket-nf4"
    for path in (folder, base):
        path.mkdir(parents=True)
    write_adapter_scripts(folder, "ppo-x", ServedBase("org/pocket", "../../../../bases/pocket-nf4"), 12, GAP, CHAT)
    script = folder / "launch" / "vllm.sh"
    *arguments, _ = run_script(script, engines, "--port", "8001")
    assert Path(arguments[1]).samefile(base)
    name, _, adapter = arguments[12].partition("=")
    assert name == "ppo-x"
    assert Path(adapter).samefile(folder)
    assert arguments[:1] + arguments[2:10] + arguments[11:12] + arguments[13:] == [
        "serve",
        *LOCAL,
        "--served-model-name",
        "org/pocket",
        "--enable-lora",
        "--max-lora-rank",
        "16",
        "--chat-template",
        "--lora-modules",
        "--port",
        "8001",
    ]
    assert Path(arguments[10]).read_text() == CHAT
    other_base = tmp_path / "other"
    other_base.mkdir()
    assert run_script(script, engines, BASE=str(other_base))[1] == str(other_base)
    shutil.move(base, tmp_path / "elsewhere")
    assert "the base is not there; bring it along, or set BASE" in run_failing_script(script, engines)
    assert run_script(script, engines, BASE="org/other")[1] == "org/other"  # a base on the hub
    assert mentions_gap(script)
    assert str(tmp_path) not in script.read_text()


def test_adapters_that_vllm_finds_by_their_names(engines: Path, tmp_path: Path):
    folder = tmp_path / "my runs" / "export" / "x" / "artifact"
    base = tmp_path / "my runs" / "bases" / "pocket-nf4"
    for path in (folder, base):
        path.mkdir(parents=True)
    write_adapter_scripts(folder, "ppo-x", ServedBase("org/pocket", "../../../../bases/pocket-nf4"), 64, None, CHAT)
    script = folder / "launch" / "vllm-resolver.sh"
    adapters = tmp_path / "adapters"
    adapters.mkdir()
    expected = [
        "serve",
        "org/pocket",
        *LOCAL,
        "--served-model-name",
        "org/pocket",
        "--enable-lora",
        "--max-lora-rank",
        "64",
        "--chat-template",
        str(folder / "launch" / "chat_template.jinja"),
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True",
        f"VLLM_LORA_RESOLVER_CACHE_DIR={adapters}",
        "VLLM_PLUGINS=lora_filesystem_resolver",
    ]
    assert "RUNTIME_LORA: set it to yes" in run_failing_script(script, engines, ADAPTERS=str(adapters))
    settings = {"ADAPTERS": str(adapters), "RUNTIME_LORA": "yes"}
    *stdout, working_directory = run_script(script, engines, TMPDIR=str(tmp_path), **settings)
    assert stdout == expected
    assert (Path(working_directory) / "org" / "pocket").samefile(base)
    write_adapter_scripts(folder, "ppo-x", ServedBase("org/pocket", revision="abc"), 64, None, CHAT)  # the hub's
    *stdout, working_directory = run_script(script, engines, **settings)
    assert stdout == [*expected[:11], "--revision", "abc", *expected[11:]]
    assert working_directory == "/"
    *stdout, _ = run_script(script, engines, BASE="org/pocket", **settings)
    assert stdout == expected
    write_adapter_scripts(folder, "ppo-x", ServedBase("pocket"), 64, None, CHAT)  # a name of ours
    assert "BASE: names the folder of the base" in run_failing_script(folder / "launch" / "vllm.sh", engines)
    assert "ADAPTERS: names the folder of the adapters" in run_failing_script(
        script, engines, BASE=str(base), RUNTIME_LORA="yes"
    )


def test_vllm_is_started_for_this_machine_with_a_key_and_loads_nothing(engines: Path, tmp_path: Path):
    for name in ("adapter", "merged"):
        (tmp_path / name).mkdir()
    write_adapter_scripts(tmp_path / "adapter", "ppo-x", ServedBase("org/pocket", revision="abc"), 12, None, CHAT)
    write_model_script(tmp_path / "merged", "ppo-x", None, True, "")
    names = ("adapter/launch/vllm.sh", "adapter/launch/vllm-resolver.sh", "merged/launch/vllm.sh")
    for script in (tmp_path / name for name in names):
        settings = {"ADAPTERS": str(tmp_path), "RUNTIME_LORA": "yes"} if "resolver" in script.name else {}
        assert "VLLM_API_KEY: holds the key" in run_failing_script(script, engines, VLLM_API_KEY="", **settings)
        arguments = run_script(script, engines, **settings)
        assert arguments[arguments.index("--host") + 1] == "127.0.0.1"
        assert KEY not in arguments
        arguments = run_script(script, engines, LISTEN="10.0.0.1", **settings)
        assert arguments[arguments.index("--host") + 1] == "10.0.0.1"
    # Variables of the environment do not allow loading.
    loading = "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"
    script = tmp_path / "adapter" / "launch" / "vllm.sh"
    plugins = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "VLLM_PLUGINS": "lora_filesystem_resolver"}
    assert [line for line in run_script(script, engines, **plugins) if line.startswith("VLLM_")] == []
    assert loading in run_script(script, engines, RUNTIME_LORA="yes")


def test_aligns_own_server_with_an_adapter_and_with_a_model(engines: Path, tmp_path: Path):
    folder = tmp_path / "my runs" / "artifact"
    folder.mkdir(parents=True)
    script = folder / "launch" / "align.sh"
    serve = ["-m", "align", "stage=serve"]
    write_align_script(folder, "ppo-x", ServedBase("org/pocket", revision="abc"))
    adapters = f"stage.adapters={{ppo-x: '{folder}'}}"
    assert run_script(script, engines, "stage.port=8001")[:-1] == [*serve, adapters, "stage.port=8001"]
    assert parse_override(adapters) == {"ppo-x": str(folder)}
    write_align_script(folder, "ppo-x", ServedBase("mine"))  # the path of a base's folder is not written
    assert "BASE: names the folder of the base that it was trained on" in run_failing_script(script, engines)
    assert run_script(script, engines, BASE="/b")[:-1] == [*serve, adapters, "model=hub", "model.path=/b"]
    write_align_script(folder, "n" * 80, None)
    name = "n" * 64
    *arguments, _ = run_script(script, engines)
    assert arguments == [*serve, f"stage.adapters={{{name}: base}}", "model=hub", f"model.path={folder}"]
    assert parse_aliases(parse_override(arguments[3]), "stage.adapters")  # the name is valid
    assert str(tmp_path) not in script.read_text()


def parse_override(word: str) -> Any:
    """Return the value of `key=value`, parsed by Hydra."""
    return OverridesParser.create().parse_override(word).value()


def test_a_merged_model_and_gguf(engines: Path, tmp_path: Path):
    write_model_script(tmp_path, "ppo-x", GAP, True, CHAT)
    assert "which are in this export" in read_joined_lines(tmp_path / "launch" / "vllm.sh")
    *arguments, _ = run_script(tmp_path / "launch" / "vllm.sh", engines)
    assert Path(arguments[1]).samefile(tmp_path)
    assert arguments[2:7] == [*LOCAL, "--served-model-name", "ppo-x", "--chat-template"]
    assert Path(arguments[7]).read_text() == CHAT
    (tmp_path / "launch" / "chat_template.jinja").unlink()
    write_model_script(tmp_path, "ppo-x", GAP, True, "")  # a model without a chat template
    *arguments, _ = run_script(tmp_path / "launch" / "vllm.sh", engines, "--port", "8001")
    assert arguments[2:] == [*LOCAL, "--served-model-name", "ppo-x", "--port", "8001"]
    assert mentions_gap(tmp_path / "launch" / "vllm.sh")
    for name in ("base-f16.gguf", "base-q8_0.gguf", "adapter-f16.gguf"):
        (tmp_path / name).touch()
    write_llama_script(tmp_path, "ppo-x", "adapter-f16.gguf", GAP, has_original_weights=False)
    script = tmp_path / "launch" / "llama-server.sh"
    assert mentions_gap(script)
    assert "WEIGHTS is that of the base: f16, q8_0." in read_joined_lines(script)
    assert "reads special tokens in whatever a content spells out" in read_joined_lines(script)
    assert "base-q2.gguf is not there" in run_failing_script(script, engines, WEIGHTS="q2")
    for settings, base in (({}, "base-f16.gguf"), ({"WEIGHTS": "q8_0"}, "base-q8_0.gguf")):
        *arguments, _ = run_script(script, engines, "-c", "512", **settings)
        assert (arguments[0], arguments[2], arguments[4:]) == (
            "--model",
            "--lora",
            ["--alias", "ppo-x", "--jinja", "-c", "512"],
        )
        assert Path(arguments[1]).samefile(tmp_path / base)
        assert Path(arguments[3]).samefile(tmp_path / "adapter-f16.gguf")


def test_ranks_and_names_are_those_that_engines_take(tmp_path: Path):
    assert [choose_vllm_rank(rank) for rank in (1, 8, 9, 64, 257, 512)] == [8, 8, 16, 64, 320, 512]
    with pytest.raises(InputError, match="r=513"):
        choose_vllm_rank(513)
    write_adapter_scripts(tmp_path, "x", ServedBase("b"), 513, None, CHAT)
    assert not (tmp_path / "launch").exists()  # no script is written that cannot work
    assert make_served_name("ppo", "größer & 'so'") == "ppo-gr-er-so"
    assert make_served_name("", "") == ""
