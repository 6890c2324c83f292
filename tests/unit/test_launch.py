"""The launch files, run: with stand-ins for the engines on the PATH that print what they were started with."""

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
    """A folder with `vllm`, `llama-server` and `python` that print their arguments, one a line, vLLM's settings, and
    where."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("vllm", "llama-server", "python"):
        script = folder / name
        script.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\nenv | grep ^VLLM_ | grep -v API_KEY | sort && pwd\n")
        script.chmod(0o755)
    return folder


def started(script: Path, engines: Path, *more: str, **settings: str) -> list[str]:
    env = {"PATH": f"{engines}:{os.environ['PATH']}", "VLLM_API_KEY": KEY} | settings
    done = subprocess.run(["sh", str(script), *more], env=env, capture_output=True, text=True, cwd="/", check=True)
    return done.stdout.splitlines()


def refused(script: Path, engines: Path, **settings: str) -> str:
    with pytest.raises(subprocess.CalledProcessError) as error:
        started(script, engines, **settings)
    return error.value.stderr


def gap_told(script: Path) -> bool:
    return "KL 0.41 nats a token from what was trained" in said_in(script)


def said_in(script: Path) -> str:
    return " ".join(script.read_text().replace("\n# ", " ").split())


def test_an_adapter_on_the_base_that_it_knows(engines: Path, tmp_path: Path):
    folder, beside = tmp_path / "my runs" / "export" / "x" / "artifact", tmp_path / "my runs" / "bases" / "pocket-nf4"
    for path in (folder, beside):
        path.mkdir(parents=True)
    write_adapter_scripts(folder, "ppo-x", ServedBase("org/pocket", "../../../../bases/pocket-nf4"), 12, GAP, CHAT)
    script = folder / "launch" / "vllm.sh"
    *said, _ = started(script, engines, "--port", "8001")
    assert Path(said[1]).samefile(beside)
    name, _, adapter = said[12].partition("=")
    assert name == "ppo-x"
    assert Path(adapter).samefile(folder)
    assert said[:1] + said[2:10] + said[11:12] + said[13:] == [
        "serve", *LOCAL, "--served-model-name", "org/pocket", "--enable-lora", "--max-lora-rank", "16",
        "--chat-template", "--lora-modules", "--port", "8001",
    ]  # fmt: skip
    assert Path(said[10]).read_text() == CHAT
    other = tmp_path / "other"
    other.mkdir()
    assert started(script, engines, BASE=str(other))[1] == str(other)
    shutil.move(beside, tmp_path / "elsewhere")
    assert "the base is not there; bring it along, or set BASE" in refused(script, engines)
    assert started(script, engines, BASE="org/other")[1] == "org/other"  # a hub's
    assert gap_told(script)
    assert str(tmp_path) not in script.read_text()


def test_adapters_that_vllm_finds_by_their_names(engines: Path, tmp_path: Path):
    folder, beside = tmp_path / "my runs" / "export" / "x" / "artifact", tmp_path / "my runs" / "bases" / "pocket-nf4"
    for path in (folder, beside):
        path.mkdir(parents=True)
    write_adapter_scripts(folder, "ppo-x", ServedBase("org/pocket", "../../../../bases/pocket-nf4"), 64, None, CHAT)
    script, adapters = folder / "launch" / "vllm-resolver.sh", tmp_path / "adapters"
    adapters.mkdir()
    wanted = [
        "serve", "org/pocket", *LOCAL, "--served-model-name", "org/pocket", "--enable-lora", "--max-lora-rank", "64",
        "--chat-template", str(folder / "launch" / "chat_template.jinja"),
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True", f"VLLM_LORA_RESOLVER_CACHE_DIR={adapters}",
        "VLLM_PLUGINS=lora_filesystem_resolver",
    ]  # fmt: skip
    assert "RUNTIME_LORA: set it to yes" in refused(script, engines, ADAPTERS=str(adapters))
    allowed = {"ADAPTERS": str(adapters), "RUNTIME_LORA": "yes"}
    *said, where = started(script, engines, TMPDIR=str(tmp_path), **allowed)
    assert said == wanted
    assert (Path(where) / "org" / "pocket").samefile(beside)
    write_adapter_scripts(folder, "ppo-x", ServedBase("org/pocket", revision="abc"), 64, None, CHAT)  # the hub's
    *said, where = started(script, engines, **allowed)
    assert said == [*wanted[:11], "--revision", "abc", *wanted[11:]]
    assert where == "/"
    *said, _ = started(script, engines, BASE="org/pocket", **allowed)
    assert said == wanted
    write_adapter_scripts(folder, "ppo-x", ServedBase("pocket"), 64, None, CHAT)  # a name of ours
    assert "BASE: names the folder of the base" in refused(folder / "launch" / "vllm.sh", engines)
    assert "ADAPTERS: names the folder of the adapters" in refused(
        script, engines, BASE=str(beside), RUNTIME_LORA="yes"
    )


def test_vllm_is_started_for_this_machine_with_a_key_and_loads_nothing(engines: Path, tmp_path: Path):
    for name in ("adapter", "merged"):
        (tmp_path / name).mkdir()
    write_adapter_scripts(tmp_path / "adapter", "ppo-x", ServedBase("org/pocket", revision="abc"), 12, None, CHAT)
    write_model_script(tmp_path / "merged", "ppo-x", None, True, "")
    names = ("adapter/launch/vllm.sh", "adapter/launch/vllm-resolver.sh", "merged/launch/vllm.sh")
    for script in (tmp_path / name for name in names):
        given = {"ADAPTERS": str(tmp_path), "RUNTIME_LORA": "yes"} if "resolver" in script.name else {}
        assert "VLLM_API_KEY: holds the key" in refused(script, engines, VLLM_API_KEY="", **given)
        said = started(script, engines, **given)
        assert said[said.index("--host") + 1] == "127.0.0.1"
        assert KEY not in said
        said = started(script, engines, LISTEN="10.0.0.1", **given)
        assert said[said.index("--host") + 1] == "10.0.0.1"
    # What the environment happens to allow is not allowed by it.
    loading, script = "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True", tmp_path / "adapter" / "launch" / "vllm.sh"
    plugins = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "VLLM_PLUGINS": "lora_filesystem_resolver"}
    assert [line for line in started(script, engines, **plugins) if line.startswith("VLLM_")] == []
    assert loading in started(script, engines, RUNTIME_LORA="yes")


def test_aligns_own_server_with_an_adapter_and_with_a_model(engines: Path, tmp_path: Path):
    folder = tmp_path / "my runs" / "artifact"
    folder.mkdir(parents=True)
    script, serve = folder / "launch" / "align.sh", ["-m", "align", "stage=serve"]
    write_align_script(folder, "ppo-x", ServedBase("org/pocket", revision="abc"))
    adapters = f"stage.adapters={{ppo-x: '{folder}'}}"
    assert started(script, engines, "stage.port=8001")[:-1] == [*serve, adapters, "stage.port=8001"]
    assert parsed_line(adapters) == {"ppo-x": str(folder)}
    write_align_script(folder, "ppo-x", ServedBase("mine"))  # of a folder, whose path is nobody's business
    assert "BASE: names the folder of the base that it was trained on" in refused(script, engines)
    assert started(script, engines, BASE="/b")[:-1] == [*serve, adapters, "model=hub", "model.path=/b"]
    write_align_script(folder, "n" * 80, None)
    name = "n" * 64
    *said, _ = started(script, engines)
    assert said == [*serve, f"stage.adapters={{{name}: base}}", "model=hub", f"model.path={folder}"]
    assert parse_aliases(parsed_line(said[3]), "stage.adapters")  # the name is none that is refused
    assert str(tmp_path) not in script.read_text()


def parsed_line(word: str) -> Any:
    """The value of `key=value`, as Hydra reads it."""
    return OverridesParser.create().parse_override(word).value()


def test_a_merged_model_and_gguf(engines: Path, tmp_path: Path):
    write_model_script(tmp_path, "ppo-x", GAP, True, CHAT)
    assert "which are in this export" in said_in(tmp_path / "launch" / "vllm.sh")
    *said, _ = started(tmp_path / "launch" / "vllm.sh", engines)
    assert Path(said[1]).samefile(tmp_path)
    assert said[2:7] == [*LOCAL, "--served-model-name", "ppo-x", "--chat-template"]
    assert Path(said[7]).read_text() == CHAT
    (tmp_path / "launch" / "chat_template.jinja").unlink()
    write_model_script(tmp_path, "ppo-x", GAP, True, "")  # a model that has none
    *said, _ = started(tmp_path / "launch" / "vllm.sh", engines, "--port", "8001")
    assert said[2:] == [*LOCAL, "--served-model-name", "ppo-x", "--port", "8001"]
    assert gap_told(tmp_path / "launch" / "vllm.sh")
    for name in ("base-f16.gguf", "base-q8_0.gguf", "adapter-f16.gguf"):
        (tmp_path / name).touch()
    write_llama_script(tmp_path, "ppo-x", "adapter-f16.gguf", GAP, original=False)
    script = tmp_path / "launch" / "llama-server.sh"
    assert gap_told(script)
    assert "WEIGHTS is that of the base: f16, q8_0." in said_in(script)
    assert "reads special tokens in whatever a content spells out" in said_in(script)
    assert "base-q2.gguf is not there" in refused(script, engines, WEIGHTS="q2")
    for settings, base in (({}, "base-f16.gguf"), ({"WEIGHTS": "q8_0"}, "base-q8_0.gguf")):
        *said, _ = started(script, engines, "-c", "512", **settings)
        assert (said[0], said[2], said[4:]) == ("--model", "--lora", ["--alias", "ppo-x", "--jinja", "-c", "512"])
        assert Path(said[1]).samefile(tmp_path / base)
        assert Path(said[3]).samefile(tmp_path / "adapter-f16.gguf")


def test_ranks_and_names_are_those_that_engines_take(tmp_path: Path):
    assert [choose_vllm_rank(rank) for rank in (1, 8, 9, 64, 257, 512)] == [8, 8, 16, 64, 320, 512]
    with pytest.raises(InputError, match="r=513"):
        choose_vllm_rank(513)
    write_adapter_scripts(tmp_path, "x", ServedBase("b"), 513, None, CHAT)
    assert not (tmp_path / "launch").exists()  # no file that cannot work
    assert make_served_name("ppo", "größer & 'so'") == "ppo-gr-er-so"
    assert make_served_name("", "") == ""
