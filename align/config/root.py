"""The root of the configuration, and the groups that every stage shares.

Each default stands once, here. A cross-field check runs in `__post_init__`, which `OmegaConf.to_object` calls before
any weights are touched.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from omegaconf import II

from align.config.settings import Settings
from align.errors import half_character, require
from align.redaction import STORE_URL, secret_url, tells_its_host, value_of

SCHEMA_VERSION = 1
IN_MEMORY = re.compile(r"sqlite[\w+]*:(//)?(/?(:memory:|file:.*(:memory:|mode=memory).*)?)?(\?|$)")


MOST = 1e37
"""Of a setting: what is ten times as much, as Adam's first step is beside its rate, is still a number in fp32."""


def positive(field_name: str, value: float) -> None:
    require(0 < value <= MOST, field_name, value, "must be above zero and finite", "Give a positive number.")


def one_of(field_name: str, value: str, choices: tuple[str, ...]) -> None:
    require(value in choices, field_name, value, "is not a choice here", f"Choose one of: {', '.join(choices)}.")


@dataclass
class ModelConfig(Settings):
    """Group `model`: the base weights.

    `path` is a folder, a hub id, or `pocket` for the built-in model. Empty means: the base of the artifact that the
    stage starts from, and `pocket` where it starts from none.
    """

    path: str | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        require(
            self.revision is None or bool(self.path), "model.revision", self.revision, "is of no model",
            "Name the model too: model=hub model.path=ORG/NAME.",
        )  # fmt: skip


@dataclass
class MethodConfig(Settings):
    """Group `method`: which weights train, and in what precision the others are kept.

    `auto` is what the artifact that a stage starts from was trained with, and `qlora` where there is none.
    """

    name: str = "auto"
    r: int = 16
    alpha: int = 32
    lr: float = 2e-4

    def __post_init__(self) -> None:
        one_of("method.name", self.name, ("auto", "qlora", "lora", "full"))
        positive("method.r", self.r)
        positive("method.alpha", self.alpha)
        positive("method.lr", self.lr)


@dataclass
class DataConfig(Settings):
    """Group `data`: where conversations, texts or preference pairs come from."""

    name: str = "chitchat"
    path: str | None = None
    part: str | None = None
    template: str | None = None
    max_length: int = 512
    held_out: float = 0.05
    limit: int | None = None
    allow_simulated: bool = False

    def __post_init__(self) -> None:
        one_of("data.name", self.name, ("chitchat", "jsonl", "annotations"))
        positive("data.max_length", self.max_length)
        require(
            0 <= self.held_out < 1,
            "data.held_out",
            self.held_out,
            "is no share of the data",
            "Give 0 or more, below 1.",
        )
        if self.template is not None:
            one_of("data.template", self.template, ("chatml",))
        if self.limit is not None:
            positive("data.limit", self.limit)
        require(
            self.path is None or self.name == "jsonl",
            "data.path",
            self.path,
            f"data={self.name} reads no file",
            "Add data=jsonl, or drop data.path.",
        )
        require(
            self.name != "jsonl" or bool(self.path),
            "data.path",
            self.path or "(empty)",
            "data=jsonl reads a file",
            "Add data.path=FILE.jsonl.",
        )


@dataclass
class RewardConfig(Settings):
    """Group `reward`: what PPO optimises, and what `stage=eval` judges by; its choices are in
    `align/config/scorers.py`."""

    name: str = "learned"


@dataclass
class RolloutConfig(Settings):
    """Group `rollout`: how responses are sampled. No top-k, top-p or penalty exists: samples must come from the
    distribution whose logprobs are used."""

    engine: str = "hf"
    max_new_tokens: int = 24
    temperature: float = 1.0
    batch_size: int = 128

    def __post_init__(self) -> None:
        one_of("rollout.engine", self.engine, ("hf",))
        positive("rollout.max_new_tokens", self.max_new_tokens)
        positive("rollout.temperature", self.temperature)
        positive("rollout.batch_size", self.batch_size)


@dataclass
class TrackConfig(Settings):
    """Group `track`: where metrics go besides `metrics.jsonl`."""

    name: str = "none"
    project: str = "align"

    def __post_init__(self) -> None:
        one_of("track.name", self.name, ("none", "wandb"))


@dataclass
class ExportConfig(Settings):
    """Group `export`: what leaves the workshop.

    `dtype` is that of a merged model, and of the base written beside an adapter. `into` is what `merged` merges into:
    the dequantised NF4 base that the adapter knows, or the `original` weights. `base=none` leaves the base beside an
    adapter out. `require` names engines that must have been asked for the receipt; `accept` the checks of it whose
    missed bounds do not matter. `path` is the folder that `check` measures again. `llama_cpp` and `vllm` are the Python
    that has the engine: `auto` is this one, `none` does not ask it. `converters` is a folder with llama.cpp's
    converters; `quantised` the variants of a GGUF base in fewer bits.
    """

    name: str = "adapter"
    dtype: str = "bfloat16"
    into: str = "auto"
    base: str = "auto"
    require: list[str] = field(default_factory=list)
    accept: list[str] = field(default_factory=list)
    path: str | None = None
    llama_cpp: str = "auto"
    vllm: str = "auto"
    converters: str | None = None
    quantised: list[str] = field(default_factory=lambda: ["q8_0", "q4_k_m"])

    def __post_init__(self) -> None:
        one_of("export.name", self.name, ("adapter", "merged", "gguf", "all", "check"))
        for weights in self.quantised:
            one_of("export.quantised", weights, ("q8_0", "q4_k_m"))
        one_of("export.dtype", self.dtype, ("float32", "bfloat16", "float16"))
        one_of("export.into", self.into, ("auto", "original"))
        one_of("export.base", self.base, ("auto", "none"))
        for engine in self.require:
            one_of("export.require", engine, ("transformers", "llama.cpp", "vLLM"))
        require(
            (self.path is not None) == (self.name == "check"),
            "export.path",
            self.path,
            "is the folder that export=check measures again",
            "Write export=check export.path=FOLDER, or leave it out.",
        )


@dataclass
class RunConfig(Settings):
    """`run.name` names the folder `<run.root>/<stage>/<run.name>`; empty derives it from what goes in."""

    name: str | None = None
    root: str = "runs"

    def __post_init__(self) -> None:
        require(
            self.name is None or re.fullmatch(r"[^/.\x00-\x1f\x7f][^/\x00-\x1f\x7f]*", self.name) is not None,
            "run.name",
            self.name,
            "cannot be a folder's name",
            "Use a name without slashes and line breaks that does not start with a dot.",
        )
        require(
            "://" not in self.root,
            "run.root",
            self.root,
            "is a URL; runs lie in a folder",
            "Give a folder, and store.url for a database.",
        )


@dataclass
class StoreConfig(Settings):
    """The annotation store, by SQLAlchemy URL, of the environment's `ALIGN_STORE_URL` where none is given. Empty means
    SQLite in the folder of the runs. Whoever reads `url` sees it without its password: `align.redaction.value_of`."""

    url: str | None = II(f"oc.env:{STORE_URL},null")

    def __post_init__(self) -> None:
        # Also of a frozen instance: a password is hidden where it comes in, so that nobody behind sees it.
        url = value_of(self.url) if self.url else ""
        if url.startswith("${"):  # not composed: nobody has looked into the environment yet
            return
        object.__setattr__(self, "url", secret_url(url) if url else None)
        require(half_character(url) is None, "store.url", self.url, "is no text in UTF-8", "Write it in UTF-8.")
        require(
            not url or re.match(r"[A-Za-z][\w+.\-]*://?", url) is not None,
            "store.url",
            self.url,
            "is no URL of SQLAlchemy's",
            "Write store.url=postgresql+psycopg://USER:PASSWORD@HOST/NAME or store.url=sqlite:///FILE.db.",
        )
        require(
            not url or tells_its_host(url),  # or a driver takes a piece of the password for the host, and says so
            "store.url",
            self.url,
            "has an @ too many to tell its password from its host",
            "Write @ as %40 and ? as %3F wherever they separate nothing, in the password above all.",
        )
        require(
            IN_MEMORY.match(url) is None,
            "store.url",
            self.url,
            "is a store in memory, which ends with the run",
            "Write store.url=sqlite:///FILE.db, or leave it out.",
        )


@dataclass
class Config(Settings):
    """Everything that one invocation of `python -m align` is told."""

    stage: Any = None
    model: ModelConfig = field(default_factory=ModelConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    data: DataConfig = field(default_factory=DataConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    track: TrackConfig = field(default_factory=TrackConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    init: str = "sft:latest"
    artifact: str = "ppo:latest"
    project: str = "default"
    store: StoreConfig = field(default_factory=StoreConfig)
    seed: int = 0
    run: RunConfig = field(default_factory=RunConfig)
    resume: str = "auto"
    device: str = "auto"
    dtype: str = "auto"
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        one_of("resume", self.resume, ("auto", "never", "must"))
        one_of("dtype", self.dtype, ("auto", "float32", "bfloat16", "float16"))
        require(0 <= self.seed < 2**32, "seed", self.seed, "is no 32-bit number", "Give a seed from 0 to 4294967295.")
        require(bool(self.project), "project", self.project, "is empty", "Name the annotation project.")
        plain = re.fullmatch(r"[^/\\\x00-\x1f.][^/\\\x00-\x1f]{0,99}", self.project) is not None
        problem = "cannot be part of a folder's name, which runs on it have"
        require(plain, "project", self.project, problem, "Use up to 100 characters, without slashes or a dot in front.")
        require(
            self.schema_version == SCHEMA_VERSION,
            "schema_version",
            self.schema_version,
            f"this version of align reads {SCHEMA_VERSION}",
            "Run it with the version of align that wrote it, or start from today's defaults.",
        )
        check = getattr(self.stage, "check", None)
        if check is not None:
            check(self)
