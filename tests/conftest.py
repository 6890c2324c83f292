"""Fixtures for all tests: a model small enough to train in a second, its tokenizer, and conversations to train on."""

from __future__ import annotations

import gc
import json
import os
import socket
import sys
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, settings
from isolation import user_converters

# It replaces the environment, so it is imported before every module that imports the package, which sets variables.
# isort: split
from chat_templates import TOOL_TEMPLATE
from postgres import create_schema, find_postgres_programs, run_postgres
from shared_folders import MadeOnce

# An assistant turn is `<|assistant|>ANSWER<eos>`; the generation markers enclose the tokens with loss.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
OTHER_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ '<say>' + message['content'] + '</s>\n' }}"
    "{% else %}{{ '<ask>' + message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<say>' }}{% endif %}"
)
SPECIAL = ["<pad>", "<bos>", "<eos>", "<|system|>", "<|user|>", "<|assistant|>"]
VOCABULARY = 320  # the 256 bytes, the special tokens and some merges; a multiple of 64

# Every run draws the same examples, and a slow machine fails no test. `--hypothesis-profile=default` draws others.
settings.register_profile("repeatable", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("repeatable")

# If a test uses two threads, a thread that waits for the other leaves its processor to the tests that run in parallel.
# The variable is read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

ROOT = Path(__file__).resolve().parents[1]
MOODS = ("happy", "tired", "hungry", "curious", "late")
THINGS = ("my dog", "the rain", "a good book", "this soup", "the train", "our garden", "old music", "the sea")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--no-skips", action="store_true", help="fail where a test skips: for machines that have it all")
    parser.addoption("--write-passed", metavar="FILE", type=Path, help="write the ids of the tests that passed")
    parser.addoption("--leave-out", metavar="FILE", type=Path, help="leave out the tests whose ids are in FILE")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if path := config.getoption("--leave-out"):
        passed = set(path.read_text(encoding="utf-8").splitlines())
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in passed])
        items[:] = [item for item in items if item.nodeid not in passed]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Show llama.cpp's converters to tests marked `llama_cpp` alone. Such a test skips if they are not installed."""
    link = Path.home() / ".cache" / "align" / "llama.cpp"
    link.unlink(missing_ok=True)
    if item.get_closest_marker("llama_cpp"):
        pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (make llama-cpp)")
        if (converters := user_converters()) is None:
            pytest.skip("llama.cpp's converters are not installed (make llama-cpp)")
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(converters)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail a run under `--no-skips` that skipped a test, and write the ids of the tests that passed."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None:  # a worker of pytest-xdist
        return
    if session.config.getoption("--no-skips") and session.exitstatus == 0 and reporter.stats.get("skipped"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    if path := session.config.getoption("--write-passed"):
        passed = [f"{report.nodeid}\n" for report in reporter.stats.get("passed", [])]
        path.write_text("".join(passed), encoding="utf-8")


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Run torch on one thread. Tiny tensors gain nothing from more, and results repeat only with a fixed number."""
    import torch

    from align.models.cpu_memory import limit_kernel_cache

    torch.set_num_threads(1)
    limit_kernel_cache()  # a command calls it too, but many tests would build kernels before one runs a command


@pytest.fixture(autouse=True, scope="module")
def frozen() -> None:
    """Freeze the objects that exist by now (those of torch and transformers). A garbage collection, which runs whenever
    a model is released, then skips them and takes milliseconds instead of a third of a second. The garbage of the
    previous module is collected first, and its memory is returned to the system."""
    from align.models.cpu_memory import return_freed_memory_once

    gc.collect()
    return_freed_memory_once()
    if resident_bytes() > SEARCHED["resident"] + (200 << 20):  # frozen objects may be garbage by now
        gc.unfreeze()
        gc.collect()
        return_freed_memory_once()
        SEARCHED["resident"] = resident_bytes()
    gc.freeze()


SEARCHED = {"resident": 0}
"""Resident bytes of this process after its last complete garbage collection."""


def resident_bytes() -> int:
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0


@pytest.fixture(autouse=True, scope="module")
def own_modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Forget the modules that a test module wrote and imported, so that the next one can reuse their names."""
    yield
    bare = {"annotate", "reward"} & set(sys.modules)  # folders of the checkout, imported as well as `align.annotate`
    assert not [name for name in bare if (sys.modules[name].__file__ or "").startswith(str(ROOT))]
    base = str(tmp_path_factory.getbasetemp())
    for name, module in list(sys.modules.items()):
        if (getattr(module, "__file__", None) or "").startswith(base):
            del sys.modules[name]


@pytest.fixture(scope="module")
def blank_plots() -> Iterator[None]:
    """Build plots without rendering them, which takes a third of a short run. Tests of reports render them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("align.report.plots.render_figure", lambda *_, **__: b'<svg xmlns="http://www.w3.org/2000/svg"/>')
        yield


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> MadeOnce:
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "made-once"
    root.mkdir(exist_ok=True)
    return MadeOnce(root)


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """The URL of a PostgreSQL server."""
    if (binaries := find_postgres_programs()) is None:
        pytest.skip("no PostgreSQL server is installed (Debian's package `postgresql`)")
    pytest.importorskip("psycopg", reason="psycopg is not installed (the extra `postgres`)")
    with run_postgres(binaries) as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an annotation store that does not exist yet, in each kind of database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'annotations.db'}"
    return create_schema(request.getfixturevalue("postgres"), f"t{uuid4().hex}")


def conversations() -> list[dict[str, Any]]:
    """Build forty short conversations, each with a different question."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"I am {mood}. What about {thing}?"},
                {"role": "assistant", "content": f"I like {thing} when you are {mood}!"},
            ]
        }
        for mood, thing in product(MOODS, THINGS)
    ]


@pytest.fixture(scope="session")
def chats(made_once: MadeOnce) -> Path:
    """A JSON Lines file of forty short conversations. Shared: copy it before changing it."""

    def write(folder: Path) -> None:
        text = "".join(json.dumps(row) + "\n" for row in conversations())
        (folder / "chats.jsonl").write_text(text, encoding="utf-8")

    return made_once("chats", write) / "chats.jsonl"


@pytest.fixture(scope="module")
def no_network() -> Iterator[None]:
    """Refuse connections to other machines and look-ups of host names. Fails at the end if there was an attempt, even
    if the code swallowed the error."""

    connect = socket.socket.connect
    attempts = []

    def connect_locally(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1"):
            attempts.append(address)
            raise OSError(f"something calls out to {address}")
        connect(self, address)

    def refuse_lookup(host: Any, *rest: Any, **options: Any) -> Any:
        attempts.append(host)
        raise socket.gaierror(f"something asks for {host}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", connect_locally)
        patch.setattr(socket.socket, "connect_ex", connect_locally)
        patch.setattr(socket, "getaddrinfo", refuse_lookup)
        yield
    assert not attempts


def byte_bpe(special: Sequence[str], template: str, size: int, **named: str) -> Any:
    """Train a byte-level BPE on `conversations()`, and give it a chat template.

    Args:
        special: special tokens, which get the first ids.
        named: those of them that are `pad_token`, `bos_token` and `eos_token`.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((m["content"] for row in conversations() for m in row["messages"]), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        additional_special_tokens=[s for s in special if s not in named.values()],
        chat_template=template,
        model_max_length=256,
        **named,
    )


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """A byte-level BPE of 320 tokens with a chat template. Pad, BOS and EOS are three different tokens."""
    return byte_bpe(SPECIAL, CHAT_TEMPLATE, VOCABULARY, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


@pytest.fixture(scope="session")
def tool_tokenizer() -> Any:
    """A tokenizer of 320 tokens whose chat template accepts tools."""
    special = ["<pad>", "<end>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"]
    return byte_bpe(special, TOOL_TEMPLATE, VOCABULARY, pad_token="<pad>", eos_token="<end>")


@pytest.fixture(scope="session")
def other_tokenizer() -> Any:
    """A tokenizer of 384 tokens, all with other ids than in `tiny_tokenizer`. Its template has no BOS, no generation
    markers, and a line break behind the `</s>` of an answer."""
    special = ["<ask>", "<none>", "<say>", "</s>"]
    return byte_bpe(special, OTHER_TEMPLATE, 384, pad_token="<none>", eos_token="</s>")


@pytest.fixture(scope="session")
def tiny_model(made_once: MadeOnce, tiny_tokenizer: Any) -> Path:
    """A folder with a random Llama of 78,144 weights and its tokenizer. Shared: copy it before changing it.

    The sizes of all linear layers are multiples of 64, the block size of NF4.
    """
    return made_once("tiny", lambda folder: save_tiny_model(folder, tiny_tokenizer))


def save_tiny_model(folder: Path, tokenizer: Any) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
