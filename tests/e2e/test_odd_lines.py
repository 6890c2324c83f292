"""Odd command lines and files: each ends with status 0 or 2 and one message, never with an internal error."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from stage_commands import Workshop

from align.core.redaction import MASK, SECRET_KEY, mask_secrets, mask_tree, redact

SECRET = "sk-4f9a0c77b1e2d3c4"
KEYS = (
    "stage.lr",
    "seed",
    "stage.max_steps",
    "run.name",
    "data.path",
    "stage.judge",
    "init",
    "method.r",
    "data.held_out",
)
VALUES = (
    "",
    "null",
    "???",
    "[",
    "{",
    "]",
    "}",
    "{a: {",
    "[[[[",
    "'",
    '"',
    "\\",
    "\\'",
    "$",
    "${",
    "${oc.env:HOME}",
    "${seed}",
    "${stage.lr}",
    "${a.b.c}",
    "${oc.decode:x}",
    "~",
    "!",
    "!!python/object:os.system",
    "&a",
    "*a",
    "- 1",
    "a: b",
    "range(0,1,0)",
    "range(1,0)",
    "range(0,3,-1)",
    "range(0)",
    "range(a,b)",
    "choice()",
    "choice(1,2",
    "interval(0,1)",
    "glob(*)",
    "shuffle(range(0,0))",
    "sort(3,a)",
    "tag(a,1,2)",
    "1,2,",
    ",",
    ",,",
    "1e308",
    "1e-400",
    "nan",
    "-inf",
    "123456789012345678901234567890",
    "[1, 123456789012345678901234567890]",
    "{a: -123456789012345678901234567890}",
    "0x10",
    "0o7",
    "1_000",
    "१२",
    "é",
    "\u202e",
    "\udce9",
    "a\nb",
    "a\tb",
    "\x01",
    "x" * 5000,
    "[" * 300,
    "(" * 300,
    "{a: " * 200,
    "a=b",
    "=",
    "==",
    "@production",
    "@",
    "sft:latest",
    "hub:",
    "..",
    "/dev/null/x",
)
FORMS = (
    *["{key}={value}"] * 6,
    "+{key}={value}",
    "++{key}={value}",
    "~{key}",
    "{key}",
    "{key}[0]={value}",
    "{key}.a={value}",
)


def iter_odd_lines() -> Iterator[list[str]]:
    """Yield 240 command lines: some forms of each value, with and without -m, some with two odd words."""
    rng = random.Random(35)
    stages = ("sft", "eval", "data", "registry", "annotate", "ppo", "plan", "nothing", "'sft'", "sft,eval", "[sft]")
    for number in range(240):
        words = [f"stage={rng.choice(stages)}"]
        for _ in range(rng.choice((1, 1, 2))):
            value = VALUES[(number + rng.randrange(3)) % len(VALUES)]
            words.append(rng.choice(FORMS).format(key=rng.choice(KEYS), value=value))
        yield [*(["-m"] if rng.random() < 0.4 else []), *words, "--cfg", "job"]


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    monkeypatch.chdir(tmp_path)
    return Workshop(tmp_path / "runs", tmp_path)


def test_no_odd_command_line_is_a_fault_of_ours(shop: Workshop) -> None:
    statuses: dict[int, int] = {}
    for line in iter_odd_lines():
        try:
            status = shop.run_command(*line)
        except Exception as error:
            raise AssertionError(line) from error
        assert status in (0, 2), (line, shop.output)
        assert "Traceback" not in shop.output, (line, shop.output)
        if status:
            assert shop.output.count("align: ") >= 1, (line, shop.output)
        statuses[status] = statuses.get(status, 0) + 1
    assert statuses[0] > 5
    assert statuses[2] > 100


FILES = {
    "itself": "# @package _global_\ndefaults:\n  - itself\n",
    "each": "# @package _global_\ndefaults:\n  - other\n",
    "other": "# @package _global_\ndefaults:\n  - each\n",
    "circle": "# @package _global_\nstage: &a\n  lr: *a\n",
    "list": "# @package _global_\nstage:\n  lr: &a [*a]\n",
    "keys": "# @package _global_\n? [1, 2]\n: 3\n",
    "number": "# @package _global_\nseed: 123456789012345678901234567890\n",
    "nothing": "# @package _global_\n...\n---\n",
    "two": "# @package _global_\nseed: 1\n---\nseed: 2\n",
    "tag": "# @package _global_\nseed: !!python/object/apply:os.getpid []\n",
    "date": "# @package _global_\nseed: 2026-11-29\n",
    "binary": "# @package _global_\nseed: !!binary aGk=\n",
    "merge": "# @package _global_\n<<: 3\n",
    "cycle": "# @package _global_\nseed: ${seed}\n",
    "text": "seed",
    "deep": "# @package _global_\nseed: " + "[" * 3000 + "]" * 3000 + "\n",
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("more", [[], ["-m"]])
def test_no_odd_experiment_is_a_fault_of_ours(shop: Workshop, tmp_path: Path, name: str, more: list[str]) -> None:
    folder = tmp_path / "conf" / "experiment"
    folder.mkdir(parents=True)
    for file, text in FILES.items():
        (folder / f"{file}.yaml").write_text(text)
    status = shop.run_command(*more, "stage=sft", f"+experiment={name}", "--cfg", "job")
    assert status == (0 if name in ("nothing",) and status == 0 else 2), shop.output
    assert "Traceback" not in shop.output
    if name in ("itself", "each", "circle", "list"):
        assert "includes itself, or holds an alias" in shop.output


def test_an_integer_of_thirty_digits_is_refused_by_its_key(shop: Workshop) -> None:
    shop.refuses(
        "stage=sft",
        "seed=123456789012345678901234567890",
        "--cfg",
        "job",
        says="seed=123456789012345678901234567890: is no whole number below 2^63",
    )
    shop.refuses(
        "stage=annotate",
        "stage.settings={overlap: 123456789012345678901234567890}",
        "--cfg",
        "job",
        says="stage.settings.overlap=",
    )


@pytest.mark.parametrize("key", ["api-key", "OPENAI_API_KEY", "password"])
def test_an_inline_secret_is_masked_everywhere(shop: Workshop, key: str) -> None:
    judge = f"stage.judge={{url: 'http://127.0.0.1:9/v1', model: m, {key}: {SECRET}}}"
    for line in (["stage=eval", judge, "--cfg", "job"], ["stage=eval", judge], ["-m", "stage=eval", judge, "seed=0,1"]):
        shop.run_command(*line)
        assert SECRET not in shop.output
        assert MASK in shop.output
    assert SECRET not in redact(f"the server said: {SECRET} is unknown")  # it was seen as a secret
    assert mask_secrets(f'{{"{key}": "{SECRET}", "model": "m"}}') == f'{{"{key}": "{MASK}", "model": "m"}}'


def build_argv(*words: str) -> list[str]:
    return [sys.executable, "-m", "align", *words]


@pytest.mark.parametrize(
    ("words", "closed"),
    [
        (["--help"], ">&-"),
        (["stage=registry", "run.root=."], ">&- 2>&-"),
        (["stage=sft", "--cfg", "job"], "<&- >&-"),
    ],
)
def test_closed_standard_streams_leave_no_traceback(tmp_path: Path, words: list[str], closed: str) -> None:
    stderr_path = tmp_path / "told"
    line = f'"$@" {closed}' if "2>&-" in closed else f'"$@" {closed} 2>told'
    process = subprocess.run(["sh", "-c", line, "sh", *build_argv(*words)], cwd=tmp_path, check=False)
    assert process.returncode == 0
    assert not stderr_path.exists() or stderr_path.read_text() == ""


def test_names_that_are_no_secrets_stay_as_they_are() -> None:
    plain = {
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "api_key_env": "OPENAI_API_KEY",
        "max_new_tokens": 64,
        "keys": "keys.yaml",
        "token": "",
        "secret": None,
        "password": False,
        "key": "a",
    }
    assert mask_tree(plain) == plain
    assert not SECRET_KEY.fullmatch("tokens")
    assert mask_tree({"a": [{"api_key": ["one", {"b": "two"}]}]}) == {"a": [{"api_key": [MASK, {"b": MASK}]}]}
