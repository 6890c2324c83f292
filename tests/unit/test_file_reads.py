"""Calls that read a file outside `align.core.files` are listed here, each with its reason."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "docs"))
from floors import MODULES, name_of

READING_METHODS = {"read_text", "read_bytes", "expanduser"}
LIBRARY_CALLS = {
    "safe_open",
    "load_file",
    "from_pretrained",
    "ParquetFile",
    "read_table",
    "load_dataset",
    "OSFile",
    "memory_map",
}
QUALIFIED = {
    "json.load",
    "yaml.load",
    "yaml.safe_load",
    "torch.load",
    "tarfile.open",
    "zipfile.ZipFile",
    "OmegaConf.load",
    "os.open",
}
MODE_SECOND = {"open", "io.open", "gzip.open", "bz2.open", "lzma.open"}
WRITING = set("wax+")
OPENED_OTHERWISE = {"Store", "Run", "replica", "self"}
"""Objects whose `open` opens a database, a run, or an engine."""
CHECKED = "the files of the folder have passed align.core.files.require_readable_folder or require_readable"
DIGEST = "its digest was taken by align.core.files just before, and is the expected one"
SHIPPED = "a file of an installed package"
OWN = "a file that this process or its own child wrote"
PARSES = "parses a text that align.core.files has read"
STANDARD_INPUT = "the standard input of a process that align started"
SYSTEM = "a file of the kernel's"
NOT_READ = "opens a folder, a lock or a device to hold it, and reads nothing"
EXCEPTIONS = {
    "align.annotate.web.templating:": SHIPPED,
    "align.config.data:parse_list": "parses a value of the command line",
    "align.config.group_files:iter_loaded_files": PARSES,
    "align.data.chitchat:load_records": SHIPPED,
    "align.data.chat.fixed_prompts:render_fixed_prompts": SHIPPED,
    "align.data.read.arrow_rows:iter_parquet_batches": "reads a file that align.data.read.files opened",
    "align.data.clean.pii:load_top_level_domains": SHIPPED,
    "align.data.chat.probe_pattern:main": STANDARD_INPUT,
    "align.data.chat.probe_template:main": STANDARD_INPUT,
    "align.data.sets.published:iter_tables": CHECKED,
    "align.data.sets.score_cuts:score_spool": OWN,
    "align.data.sets.spool:groups": OWN,
    "align.data.sets.spool:write": OWN,
    "align.data.trained_ids:add_question_ids": DIGEST,
    "align.core.distribution:find_reinstall_command": SHIPPED,
    "align.evals.suite.probes:iter_data_files": PARSES,
    "align.export.card:read_licence": PARSES,
    "align.export.converters:unpack_converters": "unpacks what align.core.files has opened",
    "align.export.engines:compute_adapter_logits": CHECKED,
    "align.export.engines:load_with_transformers": CHECKED,
    "align.export.gguf:write_adapter_as_gguf": OWN,
    "align.export.merged:_attach_whole_adapter": CHECKED,
    "align.export.ollama:build_modelfile": OWN,
    "align.export.reward:make_test_conversations": SHIPPED,
    "align.export.trained_model:require_same_tokenization": CHECKED,
    "align.models.adapters:read_tensors": CHECKED,
    "align.models.actors:save_snapshot": NOT_READ,
    "align.models.adapters:load_with_peft": CHECKED,
    "align.models.architectures:load_architecture_table": SHIPPED,
    "align.models.dequantised:require_plain_weights": OWN,
    "align.models.dequantised:read_weights_dtype": DIGEST,
    "align.models.finite_checks:require_finite_file": CHECKED,
    "align.models.load:read_configurations": CHECKED,
    "align.models.load:load_base": CHECKED,
    "align.models.load:load_tokenizer": CHECKED,
    "align.models.base:find_pocket_folder": SHIPPED,
    "align.models.sharded:load_unsharded_weights": DIGEST,
    "align.models.base:write_snapshot": SHIPPED,
    "align.core.outputs:open_atomic_file": "opens a new file to write it",
    "align.planning.shapes:build_shape": CHECKED,
    "align.planning.shapes:is_named_in_transformers": SHIPPED,
    "align.ppo.checkpoint:restore_state": DIGEST,
    "align.registry.differences:read_content_ids": CHECKED,
    "align.registry.index:read_locked_inodes": SYSTEM,
    "align.registry.gates:read_gate": PARSES,
    "align.registry.index:compute_version": SHIPPED,
    "align.registry.replay:replay": OWN,
    "align.registry.forget_selection:find_reason_by_ids": CHECKED,
    "align.rollout.ask_llama_cpp:main": STANDARD_INPUT,
    "align.rollout.ask_vllm:main": STANDARD_INPUT,
    "align.rollout.vllm_server:try_lock_folder": NOT_READ,
    "align.run.atomic:_sync_files": NOT_READ,
    "align.run.checkpoints:write_checkpoint": NOT_READ,
    "align.reward.checkers.confinement:add_landlock_rule": NOT_READ,
    "align.reward.checkers.run_tests:main": STANDARD_INPUT,
    "align.run.environment:read_cpuinfo": SYSTEM,
    "align.run.folder:lock_folder": NOT_READ,
    "align.run.hub:split_files": "downloads from the hub into the cache of `datasets`",
    "align.serve.tenants:edit_key_file": NOT_READ,
    "align.trainers.multi_rank:_load_optimizer_and_scheduler": DIGEST,
}


def call_name(call: ast.Call) -> str:
    """Return the dotted name of the called function, with "?" for a part that is no name."""
    parts = []
    node: ast.expr = call.func
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    parts.append(node.id if isinstance(node, ast.Name) else "?")
    return ".".join(reversed(parts))


def opens_to_read(call: ast.Call) -> bool:
    """Return True for a call that may read a file by another way than `align.core.files`."""
    name = call_name(call)
    last = name.rpartition(".")[2]
    if name == "os.open" and {"O_WRONLY", "O_RDWR"} & set(re.findall(r"\w+", ast.unparse(call))):
        return False
    if name in QUALIFIED or last in LIBRARY_CALLS or ("." in name and last in READING_METHODS):
        return True
    if name == "open" or (last == "open" and name.split(".")[0] not in OPENED_OTHERWISE and "." in name):
        if any(keyword.arg == "opener" for keyword in call.keywords):
            return False
        mode = next((keyword.value for keyword in call.keywords if keyword.arg == "mode"), None)
        position = int(name in MODE_SECOND)
        if mode is None and len(call.args) > position:
            mode = call.args[position]
        writes = isinstance(mode, ast.Constant) and bool(WRITING & set(str(mode.value)))
        return not writes
    return False


def iter_reads(source: str, module: str) -> Iterator[str]:
    """Yield `module:function` for each call that reads a file, `module:` if it is at module level."""

    waiting: list[tuple[ast.AST, str]] = [(ast.parse(source), "")]
    while waiting:
        node, function = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not function:
            function = node.name
        if isinstance(node, ast.Call) and opens_to_read(node):
            yield f"{module}:{function}"
        waiting += [(child, function) for child in ast.iter_child_nodes(node)]


def test_every_read_goes_through_the_one_reader() -> None:
    places = {
        place
        for path in MODULES
        if name_of(path) != "align.core.files"
        for place in iter_reads(path.read_text(encoding="utf-8"), name_of(path))
    }
    assert sorted(places - EXCEPTIONS.keys()) == [], "read it by align.core.files, or list it with a reason"
    assert sorted(EXCEPTIONS.keys() - places) == [], "these read no file any more"


@pytest.mark.parametrize(
    ("source", "reads"),
    [
        ("def f(p):\n    return p.read_text()", True),
        ("def f(p):\n    return read_text(p, 'x')", False),
        ("def f(p):\n    return open(p)", True),
        ("def f(p):\n    return open(p, 'w')", False),
        ("def f(p):\n    return open(p, 'rb', opener=open_regular)", False),
        ("def f(p):\n    return p.open('rb')", True),
        ("def f(p):\n    return p.open('ab')", False),
        ("class A:\n    def f(p):\n        return json.load(p)", True),
        ("def f(p):\n    return AutoTokenizer.from_pretrained(p)", True),
        ("def f(p):\n    return Path(p).expanduser()", True),
    ],
)
def test_the_finder_of_reads(source: str, reads: bool) -> None:
    assert list(iter_reads(source, "m")) == (["m:f"] if reads else [])
