"""Engines in separate processes: finding their interpreters, and reporting their failures."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from align.core.errors import InputError
from align.rollout import ask_vllm, engine_process
from align.rollout.engine_process import (
    LLAMA_CPP,
    VLLM,
    find_engine_version,
    find_error_line,
    find_interpreter,
    read_engine_version,
    run_and_capture,
    run_engine_script,
)


def write_python(path: Path, body: str) -> str:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


def test_an_engine_is_there_where_its_python_finds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert find_interpreter(VLLM, "none", "engine.vllm") is None
    assert find_engine_version(VLLM, "none", "engine.vllm") == ""
    installed = write_python(tmp_path / "has", "echo 9.9")
    assert find_interpreter(VLLM, installed, "engine.vllm") == installed
    assert find_engine_version(VLLM, installed, "engine.vllm") == "9.9"
    # A folder of that name in the working directory, or on PYTHONPATH, is no engine: an isolated Python ignores it.
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    read_engine_version.cache_clear()
    bare = write_python(tmp_path / "bare", f'exec "{sys.executable}" -S "$@"')
    with pytest.raises(InputError, match=rf"engine\.vllm={bare}: it has no vllm"):
        find_interpreter(VLLM, bare, "engine.vllm")


@pytest.mark.parametrize(
    ("body", "problem"),
    [("exit 3", r"no Python of 3\.8 or newer \(status 3\)"), (None, "it does not run"), ("", "it has no")],
)
def test_what_is_no_python_is_told_by_its_field(tmp_path: Path, body: str | None, problem: str):
    interpreter = write_python(tmp_path / "python", body) if body is not None else str(tmp_path / "nowhere")
    with pytest.raises(InputError, match=rf"engine\.llama_cpp=.*{problem}"):
        find_interpreter(LLAMA_CPP, interpreter, "engine.llama_cpp")


def test_what_an_engine_answers_and_what_it_says_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    script = tmp_path / "ask_llama_cpp.py"
    monkeypatch.setattr(engine_process, "__file__", str(tmp_path / "engine_process.py"))
    script.write_text(
        "import json, sys, numpy as np\n"
        "from pathlib import Path\n"
        "asked = json.load(sys.stdin)\n"
        "np.savez(Path(asked['out']) / 'logits.npz', **{'0': np.eye(2), '1': np.ones((1, 2))})\n"
        "answer = {'version': '1.2', 'heard': asked['rows'], 'threads': asked['threads'], 'path': sys.path[0]}\n"
        "(Path(asked['out']) / 'answer.json').write_text(json.dumps(answer))\n"
        "sys.exit('falls while it is taken down')\n"
    )
    answer = run_engine_script(LLAMA_CPP, sys.executable, "engine.llama_cpp", rows=[[1, 2], [3]])
    assert (answer.version, answer.output["heard"], answer.output["threads"]) == ("1.2", [[1, 2], [3]], 1)
    assert [tuple(logits.shape) for logits in answer.logits] == [(2, 2), (1, 2)]
    assert answer.output["path"] != str(tmp_path)  # isolated
    script.write_text(
        "import os, sys\nsys.stderr.write('error: no such tensor\\nbye\\n')\nsys.stderr.flush()\nos.abort()\n"
    )
    with pytest.raises(
        InputError,
        match=r"engine\.llama_cpp=.*llama\.cpp.*status -6: error: no such tensor"
        r".*engine\.llama_cpp=none.*the export is then not checked by it",
    ):
        run_engine_script(LLAMA_CPP, sys.executable, "engine.llama_cpp", rows=[])
    script.write_text("")  # exits with status 0 and without output
    with pytest.raises(InputError, match="no reason given"):
        run_engine_script(LLAMA_CPP, sys.executable, "engine.llama_cpp", rows=[])


def test_what_takes_hours_is_ended(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("align.rollout.engine_process.LONGEST", 0.2)
    with pytest.raises(RuntimeError, match="waiting took more than"):
        run_and_capture([sys.executable, "-c", "import time; time.sleep(60)"], "waiting")
    assert find_error_line("") == "no reason given"
    assert find_error_line("a\n\nValueError: b\nc\n") == "ValueError: b"


def test_vllms_lists_become_rows_by_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The library is replaced: its stand-in lists the sampled token first, and then all tokens by rank."""
    truth = np.log(np.array([[0.5, 0.25, 0.125, 0.125], [0.1, 0.2, 0.3, 0.4], [0.7, 0.1, 0.1, 0.1]], dtype=np.float32))

    def build_logprobs(positions: list[tuple[int, np.ndarray] | None]) -> SimpleNamespace:
        output = SimpleNamespace(start_indices=[], end_indices=[], token_ids=[], logprobs=[])
        for position in positions:
            output.start_indices.append(len(output.token_ids))
            if position is not None:
                token_id, row = position
                ids = [token_id, *np.argsort(-row)]
                output.token_ids += ids
                output.logprobs += [row[id] for id in ids]
            output.end_indices.append(len(output.token_ids))
        return output

    class Model:
        def __init__(self, model: str, **options):
            assert (model, options["max_lora_rank"], options["dtype"]) == ("base", 16, "float32")

        def generate(self, asked, sampling, lora_request, use_tqdm):
            assert (asked, lora_request) == ([{"prompt_token_ids": [3, 1, 2]}], ("adapter", 1, "folder"))
            prompt = build_logprobs([None, (1, truth[0]), (2, truth[1])])
            return [
                SimpleNamespace(
                    prompt_logprobs=prompt, outputs=[SimpleNamespace(logprobs=build_logprobs([(0, truth[2])]))]
                )
            ]

    library = SimpleNamespace(LLM=Model, SamplingParams=lambda **options: options, __version__="0.32.0")
    requests = SimpleNamespace(LoRARequest=lambda *arguments: arguments)
    for name, module in (("vllm", library), ("vllm.lora", SimpleNamespace()), ("vllm.lora.request", requests)):
        monkeypatch.setitem(sys.modules, name, module)
    request = {
        "out": str(tmp_path),
        "model": "base",
        "adapter": "folder",
        "rank": 16,
        "rows": [[3, 1, 2]],
        "threads": 1,
    }
    monkeypatch.setattr(ask_vllm.json, "load", lambda source: request)
    ask_vllm.main()
    assert json.loads((tmp_path / "answer.json").read_text()) == {"version": "0.32.0"}
    with np.load(tmp_path / "logits.npz") as logits_file:
        assert np.array_equal(logits_file["0"], truth)
