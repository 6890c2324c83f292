"""Calls that replace or remove a file: functions outside `align.core.outputs` that do so without one of its guards are
listed here, each with its reason."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_file_reads import call_name

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "docs"))
from floors import MODULES, name_of

METHODS = {
    "write_text",
    "write_bytes",
    "rename",
    "rmtree",
    "unlink",
    "rmdir",
    "symlink_to",
    "hardlink_to",
    "touch",
    "save_pretrained",
    "save_file",
    "write_table",
    "ParquetWriter",
    "FileHandler",
}
QUALIFIED = {
    "os.replace",
    "os.rename",
    "os.remove",
    "os.link",
    "os.symlink",
    "os.truncate",
    "shutil.move",
    "shutil.copy",
    "shutil.copy2",
    "shutil.copyfile",
    "shutil.copytree",
    "sqlite3.connect",
    "torch.save",
}
ATOMIC = {"write_json", "replace_file", "open_atomic_file", "move_aside"}
"""Functions that replace an existing file of the same name."""
GUARD = re.compile("refuse_foreign_(file|log|database|folder)")
WRITING = re.compile(r"O_(WRONLY|RDWR|CREAT)|['\"](?:[wa]|r\+)[bt+]*['\"]")

RUN = "a file of a run's own folder: a run takes no folder with files of others, and holds it locked"
NEW = "in a folder that was just made, and takes its name by align.run.atomic"
SCRATCH = "in a temporary folder of this process"
WRITER = "a writer of align.run, whose callers are listed here"
MOVES = "replaces nothing: align.run.atomic.publish_folder has refused what is not align's"
PARSED = "refuses a file of others as it reads it, before it writes"
UNIQUE = "a new file: its name has a random part, a digest or a lock of its own"
DEVICE = "a device, or a file of the kernel's"
CACHE = "an entry of align's cache, named by a digest of a path"
SHOWN = "what align made by its manifest, name or base.json; shown first, and removed where the user asks for that"
ARTIFACT = "called for files of a run's artifact alone"
ASIDE = "renames a file that is no index, and changes nothing in it"
CREATED = "makes the file if there is none and cuts none; a database of others has been refused before"
OPENED = "packs into a file that align.core.outputs has opened, which replaces none"
APPENDS = "locks the file, and writes nothing to it"
EXCEPTIONS = {
    "align.annotate.exchange.archive:write_store_backup": OPENED,
    "align.__main__:entry": DEVICE,
    "align.__main__:open_standard_streams": DEVICE,
    "align.annotate.store.connections:serve_exclusively": APPENDS,
    "align.annotate.store.connections:_prepare_file": CREATED,
    "align.data.read.preferences:write_preferences": ARTIFACT,
    "align.data.sets.parallel:create_marker": RUN,
    "align.data.sets.parallel:write_parts_in_workers": RUN,
    "align.data.sets.report:write": RUN,
    "align.data.sets.forget:rewrite_without_rows": NEW,
    "align.data.sets.forget:delete_replaced_data_set": SHOWN,
    "align.data.sets.published:_flush": NEW,
    "align.data.sets.published:write_data_set": NEW,
    "align.data.sets.score_cuts:score_spool": RUN,
    "align.data.sets.spool:write": RUN,
    "align.data.sets.contamination:__init__": SCRATCH,
    "align.data.trained_ids:write_trained_ids": RUN,
    "align.data.chat.training_view:write_view": RUN,
    "align.evals.held_out:write_held_out_answers": RUN,
    "align.evals.held_out:write_held_out_pairs": RUN,
    "align.evals.suite.lm_eval:score_by_lm_eval": RUN,
    "align.evals.suite.samples:write_samples": ARTIFACT,
    "align.export.adapter:write_adapter": NEW,
    "align.export.bases:link_base_unless_on_hub": NEW,
    "align.export.vllm_adapters:__call__": RUN,
    "align.export.gguf:write_or_verify_cached_file": NEW,
    "align.export.gguf:convert": SCRATCH,
    "align.export.gguf:link_or_copy_file": NEW,
    "align.export.gguf:add_converter_settings": SCRATCH,
    "align.export.gguf:write_adapter_as_gguf": NEW,
    "align.export.gguf:write_whole_model_as_gguf": NEW,
    "align.export.kinds:export_gguf": NEW,
    "align.export.launch:write_chat_template": NEW,
    "align.export.launch:write_script": NEW,
    "align.export.merged:write_merged_model": NEW,
    "align.mirrors.wandb:log": RUN,
    "align.models.adapters:save_adapter": NEW,
    "align.models.dequantised:get_or_write_dequantised_base": NEW,
    "align.models.load:save_tokenizer": NEW,
    "align.models.plain_lora:write_plain_lora": NEW,
    "align.models.roles:save": NEW,
    "align.models.roles:save_critic": NEW,
    "align.models.sharded:save_full_model": NEW,
    "align.models.base:write_snapshot": SCRATCH,
    "align.ppo.checkpoint:save_state": NEW,
    "align.ranks:connect": DEVICE,
    "align.ranks:write_launcher_note": SCRATCH,
    "align.registry.forgetting:update_manifest_digests": RUN,
    "align.registry.forgetting:rewrite_file": SHOWN,
    "align.registry.forgetting:redraw_page": SHOWN,
    "align.registry.garbage:remove_pieces": SHOWN,
    "align.registry.garbage:remove_weights": SHOWN,
    "align.registry.index:_open": PARSED,
    "align.registry.forgetting:write": UNIQUE,
    "align.registry.index:try_move_aside": ASIDE,
    "align.registry.replay:run_align": SCRATCH,
    "align.reward.checkers.confinement:isolate_process": DEVICE,
    "align.reward.checkers.confinement:enter_namespaces": DEVICE,
    "align.reward.checkers.confinement:bind_path": SCRATCH,
    "align.rollout.ask_llama_cpp:main": SCRATCH,
    "align.rollout.ask_vllm:main": SCRATCH,
    "align.rollout.probes:write_probes": NEW,
    "align.rollout.vllm_engine:_drop": RUN,
    "align.rollout.vllm_sampler:close": RUN,
    "align.rollout.vllm_sampler:drop_snapshot": RUN,
    "align.rollout.vllm_sampler:load": RUN,
    "align.rollout.vllm_server:__init__": RUN,
    "align.rollout.vllm_server:remove_abandoned_folders": UNIQUE,
    "align.run.alias_log:append_change": PARSED,
    "align.run.atomic:replace_folder": MOVES,
    "align.run.atomic:scratch_folder": UNIQUE,
    "align.run.checkpoints:remove_unusable_checkpoints": RUN,
    "align.run.checkpoints:remove_old_checkpoints": RUN,
    "align.run.checkpoints:seal_checkpoint": NEW,
    "align.run.checkpoints:write_checkpoint": RUN,
    "align.run.digests:hash_with_cache": CACHE,
    "align.run.figures:write_figures": RUN,
    "align.run.files:write_json": WRITER,
    "align.run.files:write_json_lines": WRITER,
    "align.run.files:write_text": WRITER,
    "align.run.folder:__exit__": RUN,
    "align.run.folder:begin": RUN,
    "align.run.folder:read_same_run_or_empty_folder": RUN,
    "align.run.folder:open": RUN,
    "align.run.folder:publish": RUN,
    "align.run.manifest:write_manifest": RUN,
    "align.run.receipt:write_receipt": NEW,
    "align.run.signing:verify_signature": SCRATCH,
    "align.run.stale:mark_stale": RUN,
    "align.run.weights:link_files": SCRATCH,
    "align.serve.tenants:edit_key_file": PARSED,
    "align.serve.request_log:__init__": RUN,
    "align.serve.usage:_settle_dead_servers": UNIQUE,
    "align.serve.usage:close": UNIQUE,
    "align.serve.usage:has_server_ended": UNIQUE,
    "align.stages.annotate:run_export": RUN,
    "align.stages.annotate:run_assess": RUN,
    "align.stages.annotate:record_head": RUN,
    "align.stages.data:republish_without_rows": RUN,
    "align.stages.data:discard_spool_if_refused": RUN,
    "align.stages.data:build_data_set": RUN,
    "align.stages.eval.votes:fill_project_and_read_votes": RUN,
    "align.stages.eval.suite:compare_systems": RUN,
    "align.stages.eval.artifact:compare_with_start": RUN,
    "align.stages.eval.judge:measure_and_publish_judge": RUN,
    "align.stages.eval.suite:publish_verdicts": RUN,
    "align.stages.runner:attach_run_log": RUN,
    "align.stages.export:print_checks": RUN,
    "align.stages.export:run": RUN,
    "align.stages.export:write_export": NEW,
    "align.stages.sample:sample_for_people": RUN,
    "align.stages.sample:publish_best": RUN,
    "align.stages.serve:open_vllm_engine": RUN,
    "align.stages.verify:run": RUN,
    "align.track:__init__": RUN,
    "align.track:append_row": RUN,
    "align.trainers.common:on_save": NEW,
    "align.trainers.multi_rank:_save_optimizer_and_scheduler": NEW,
}


def writes_or_removes(call: ast.Call) -> bool:
    """Return True for a call that may replace, change or remove a file."""
    name = call_name(call)
    last = name.rpartition(".")[2]
    if name in QUALIFIED or name in ATOMIC or ("." in name and last in METHODS) or name in METHODS:
        return not any(keyword.arg == "replace" and ast.unparse(keyword.value) == "False" for keyword in call.keywords)
    if last == "replace" and "." in name and len(call.args) == 1 and not call.keywords:
        return True  # `Path.replace`; `str.replace` takes two arguments
    return last in ("open", "fdopen") and WRITING.search(ast.unparse(call)) is not None


def iter_writes(source: str, module: str) -> Iterator[str]:
    """Yield `module:function` for each function that writes or removes files and calls no guard, `module:` for calls at
    module level."""
    tree = ast.parse(source)
    guarded = set()
    places = set()
    waiting: list[tuple[ast.AST, str]] = [(tree, "")]
    while waiting:
        node, function = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not function:
            function = node.name
        if isinstance(node, ast.Call) and GUARD.fullmatch(call_name(node)):
            guarded.add(function)
        if isinstance(node, ast.Call) and writes_or_removes(node):
            places.add(function)
        waiting += [(child, function) for child in ast.iter_child_nodes(node)]
    yield from (f"{module}:{function}" for function in sorted(places - guarded))


def test_every_write_is_guarded_or_has_a_reason() -> None:
    places = {
        place
        for path in MODULES
        if name_of(path) != "align.core.outputs"
        for place in iter_writes(path.read_text(encoding="utf-8"), name_of(path))
    }
    assert sorted(places - EXCEPTIONS.keys()) == [], "ask a guard of align.core.outputs first, or list it with a reason"
    assert sorted(EXCEPTIONS.keys() - places) == [], "these write no file any more, or ask a guard"


@pytest.mark.parametrize(
    ("source", "writes"),
    [
        ("def f(p):\n    p.write_text('x')", True),
        ("def f(p):\n    refuse_foreign_file(p, 'stage.x', str)\n    p.write_text('x')", False),
        ("def f(p):\n    return open(p, 'ab')", True),
        ("def f(p):\n    return open(p, 'rb')", False),
        ("def f(p):\n    return p.open('r+b')", True),
        ("def f(p, q):\n    p.replace(q)", True),
        ("def f(p):\n    p.replace('a', 'b')", False),
        ("def f(p):\n    open_atomic_file(p)", True),
        ("def f(p):\n    open_atomic_file(p, replace=False)", False),
        ("class A:\n    def f(p):\n        shutil.rmtree(p)", True),
        ("def f(p):\n    os.fdopen(os.open(p, os.O_WRONLY))", True),
        ("def f(p):\n    model.save_pretrained(p)", True),
    ],
)
def test_the_finder_of_writes(source: str, writes: bool) -> None:
    assert list(iter_writes(source, "m")) == (["m:f"] if writes else [])
