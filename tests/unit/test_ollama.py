"""Ollama's Go templates render the same text as the chat templates, compared in Python and rendered by Go."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from align.data.chat.template import CHATML
from align.export.ollama import Turns, build_go_template, build_modelfile, is_quotable, split_chat_template
from align.models.base import find_builtin_folder

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content"
    " + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n'"
    " }}{% endif %}"
)
DEFAULT_SYSTEM = (
    '{% for m in messages %}{% if loop.first and m.role != \'system\' %}{{ \'<|system|>You {{are}} """kind""".\t\''
    " + '<|end|>\n' }}{% endif %}{{ '<|' + m.role + '|>' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
INST = (  # the system's text is inside the first turn, not a turn with text around it
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}{% else %}{{ raise_exception('no') }}{% endif %}"
    "{% endfor %}"
)
TRIMS = CHATML.replace("message['content']", "message['content'] | trim")
COUNTS = "{% for m in messages %}{{ loop.index ~ m.content }}{% endfor %}{% if add_generation_prompt %}:{% endif %}"
# Special characters in Modelfiles and Go templates.
BRACES = CHATML.replace("<|im_start|>", '<{"').replace("<|im_end|>", '"}>"')
SAID = [CHATML, LLAMA3, DEFAULT_SYSTEM, BRACES, INST]
TALK: Turns = [("user", "Hi!"), ("assistant", "Hello {{ you }}."), ("user", "Bye\n“now”")]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(find_builtin_folder("pocket"))


def render(tokenizer, turns: Turns, is_reply_due: bool) -> str | None:
    try:
        messages = [{"role": role, "content": text} for role, text in turns]
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=is_reply_due)
    except Exception:
        return None


def find_template_pieces(tokenizer, template: str):
    tokenizer.chat_template = template
    return split_chat_template(lambda turns, is_reply_due: render(tokenizer, turns, is_reply_due))


@pytest.mark.parametrize("template", SAID, ids=["chatml", "llama3", "default", "braces", "inst"])
def test_a_template_is_what_stands_around_each_turn(tokenizer, template: str):
    pieces = find_template_pieces(tokenizer, template)
    assert pieces is not None
    assert pieces.text(TALK) == render(tokenizer, TALK, True)
    turns = [("system", "Be brief."), *TALK]
    if template == INST:
        assert pieces.head_of_system is None
    else:
        assert pieces.text(turns) == render(tokenizer, turns, True)


@pytest.mark.parametrize("template", [TRIMS, COUNTS, "{{ raise_exception('no') }}"])
def test_a_template_that_is_more_is_not_guessed_at(tokenizer, template: str):
    assert find_template_pieces(tokenizer, template) is None


def test_a_modelfile(tokenizer, tmp_path: Path):
    tokenizer.chat_template = AutoTokenizer.from_pretrained(find_builtin_folder("pocket")).chat_template
    shutil.copy(find_builtin_folder("pocket") / "generation_config.json", tmp_path)
    text = build_modelfile(tmp_path, tokenizer, True, "base-f16.gguf", "adapter-f16.gguf")
    assert "# Ollama reads special tokens in whatever a content spells out" in text
    assert text.splitlines()[3:5] == ["FROM ./base-f16.gguf", "ADAPTER ./adapter-f16.gguf"]
    assert 'PARAMETER stop "<|end|>"' in text
    assert "<s>" not in text  # llama.cpp adds it
    assert 'TEMPLATE """<s>' not in text
    assert "<s><|system|>{{ .System }}" in build_modelfile(tmp_path, tokenizer, False, "b", "a")
    tokenizer.chat_template = TRIMS
    assert "# No TEMPLATE" in build_modelfile(tmp_path, tokenizer, True, "b", "a")


def test_a_stop_that_the_file_cannot_say_is_left_out(tokenizer, tmp_path: Path):
    assert [is_quotable(stop) for stop in ("<|end|>", "{{ end }}", 'a"b', '"""', "a\nb", "\x07", "")] == [
        True,
        True,
        False,
        False,
        False,
        False,
        True,
    ]
    tokenizer.add_special_tokens({"eos_token": 'the "end"'})
    text = build_modelfile(tmp_path, tokenizer, True, "b", "a")
    assert 'PARAMETER stop "the' not in text
    assert "# No stop for 'the \"end\"', which this file cannot express." in text


GO = """
package main

import (
	"encoding/json"
	"os"
	"text/template"
)

func main() {
	var asked []map[string]any
	if err := json.NewDecoder(os.Stdin).Decode(&asked); err != nil {
		panic(err)
	}
	for _, one := range asked {
		parsed := template.Must(template.New("").Option("missingkey=zero").Parse(one["Template"].(string)))
		parsed.Execute(os.Stdout, one)
		os.Stdout.WriteString("\\x00")
	}
}
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("go") is None, reason="Go is not installed (Debian's package `golang-go`)")
def test_go_renders_the_same(tokenizer, tmp_path: Path):
    """Go renders the data that Ollama passes: the system's text in `.System`, all turns including it in `.Messages`."""
    requests = []
    expected = []
    for template in SAID:
        pieces = find_template_pieces(tokenizer, template)
        assert pieces is not None
        for system in ([], [("system", "Be “brief”.")]):
            if system and pieces.head_of_system is None:
                continue
            turns = [*system, *TALK]
            messages = [{"Role": role, "Content": text} for role, text in turns]
            text = system[0][1] if system else ""
            text_in_go = build_go_template(pieces, "")
            assert '"""' not in f'{text_in_go}"'  # also not with the quote that ends it
            requests.append({"Template": text_in_go, "System": text, "Messages": messages})
            expected.append(render(tokenizer, turns, True))
    (tmp_path / "main.go").write_text(GO)
    process = subprocess.run(
        ["go", "run", str(tmp_path / "main.go")],
        input=json.dumps(requests),
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    assert process.stdout.split("\x00")[:-1] == expected
    assert len(expected) == 9
