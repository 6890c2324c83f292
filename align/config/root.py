"""The root settings class, `Config`: a stage, the groups, and the settings of every run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import yaml
from omegaconf import II, OmegaConf

from align.config.groups import (
    BY_PATH,
    VOTE_SELECTION_KEYS,
    DataConfig,
    EngineConfig,
    ExportConfig,
    MethodConfig,
    ModelConfig,
    RolloutConfig,
    SuiteConfig,
    TrackConfig,
)
from align.config.scorers import RewardConfig
from align.config.settings import Settings, setting
from align.config.stages import STAGES
from align.core.errors import find_lone_surrogate, require
from align.core.files import DEFAULT_MAX_FILE_MB, parse_user_path
from align.core.redaction import STORE_URL, has_clear_host, hide_password, mask_tree, reveal_secret

STORE = "annotations.db"
"""Default file name of the annotation store, in the folder of runs."""
SCHEMA_VERSION = 1
DEFAULT_ROOT = "runs"
LONGEST_NAME = 240
"""Maximum length of `run.name` in bytes. File systems allow 255, and `resume=never` may append a number."""
IN_MEMORY = re.compile(r"sqlite[\w+]*:(//)?(/?(:memory:|file:.*(:memory:|mode=memory).*)?)?(\?|$)")


@dataclass
class RunConfig(Settings):
    """The folder of a run, `<run.root>/<stage>/<run.name>`."""

    AT: ClassVar[str] = "run"

    name: str | None = setting(None, "The run's name. Empty: derived from the run's settings and inputs.")
    root: str = setting(DEFAULT_ROOT, "The folder of all runs.")
    max_file_mb: float = setting(
        DEFAULT_MAX_FILE_MB,
        "Largest file that is read whole: JSON, YAML, chat templates, keys, gates. Rows and weights are read piece by "
        "piece and may be larger.",
        unit="MiB",
        above=0,
        at_most=2**20,
        identity=False,
    )

    @property
    def folder(self) -> Path:
        """Path of the folder of all runs, `run.root`, with `~` expanded."""
        return parse_user_path(self.root, "run.root")

    def check_together(self) -> None:
        if self.name is not None:
            is_name = re.fullmatch(r"[^/.\x00-\x1f\x7f][^/\x00-\x1f\x7f]*", self.name) is not None
            remedy = "Use a name without slashes and line breaks that does not start with a dot."
            require(is_name, "run.name", self.name, "cannot be a folder's name", remedy)
            is_short = len(self.name.encode("utf-8", "replace")) <= LONGEST_NAME
            require(is_short, "run.name", self.name, f"is longer than {LONGEST_NAME} bytes", "Use a shorter name.")
        remedy = "Give a folder, and store.url for a database."
        require("://" not in self.root, "run.root", self.root, "is a URL; runs lie in a folder", remedy)
        parse_user_path(self.root, "run.root")


@dataclass
class StoreConfig(Settings):
    """The annotation store: prompts, answers and votes in a database."""

    AT: ClassVar[str] = "store"

    url: str | None = setting(
        II(f"oc.env:{STORE_URL},null"),
        f"SQLAlchemy URL of the database. Not given: the environment's {STORE_URL}, or else SQLite in the folder of "
        f"the runs.",
    )

    def check_together(self) -> None:
        url = reveal_secret(self.url) if self.url else ""
        if url.startswith("${"):  # not composed yet: the environment was not read
            return
        # The password is hidden here, so that no later code prints it. `reveal_secret` returns it.
        object.__setattr__(self, "url", hide_password(url) if url else None)  # also if it is frozen
        require(find_lone_surrogate(url) is None, "store.url", self.url, "is no text in UTF-8", "Write it in UTF-8.")
        if not url:
            return
        is_url = re.match(r"[A-Za-z][\w+.\-]*://?", url) is not None
        remedy = "Write store.url=postgresql+psycopg://USER:PASSWORD@HOST/NAME or store.url=sqlite:///FILE.db."
        require(is_url, "store.url", self.url, "is no URL of SQLAlchemy's", remedy)
        # Otherwise a driver takes a part of the password for the host, and prints it.
        problem = "has an @ too many to tell its password from its host"
        remedy = "Write @ as %40 and ? as %3F wherever they separate nothing, in the password above all."
        require(has_clear_host(url), "store.url", self.url, problem, remedy)
        problem = "is a store in memory, which ends with the run"
        remedy = "Write store.url=sqlite:///FILE.db, or leave it out."
        require(IN_MEMORY.match(url) is None, "store.url", self.url, problem, remedy)


GROUPS: Mapping[str, type[Settings]] = {
    "model": ModelConfig,
    "method": MethodConfig,
    "data": DataConfig,
    "rollout": RolloutConfig,
    "track": TrackConfig,
    "export": ExportConfig,
    "serve": EngineConfig,
    "eval": SuiteConfig,
}
"""Group → settings class of all its choices. Those of `reward` have their own classes (`align.config.scorers`)."""
PARTS: Mapping[str, type[Settings]] = {**GROUPS, "run": RunConfig, "store": StoreConfig}
"""Name of a part of the root configuration, besides stage and reward → its settings class."""


@dataclass
class Config(Settings):
    """The whole configuration of one command line."""

    stage: Any = None
    model: ModelConfig = field(default_factory=ModelConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    data: DataConfig = field(default_factory=DataConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    track: TrackConfig = field(default_factory=TrackConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    serve: EngineConfig = field(default_factory=EngineConfig)
    eval: SuiteConfig = field(default_factory=SuiteConfig)
    init: str = setting(
        "sft:latest",
        "What the stage starts from: a path, `base`, hub:ID, STAGE:latest, STAGE:NAME or @ALIAS. For sft, full and "
        "verify the default is `base`.",
        names="init",
    )
    artifact: str = setting(
        "ppo:latest", "What is evaluated, exported or promoted, in the same form as `init`.", names="artifact"
    )
    project: str = setting("default", "The annotation project.")
    store: StoreConfig = field(default_factory=StoreConfig)
    seed: int = setting(0, "Seed of all random draws.", at_least=0, at_most=2**32 - 1)
    run: RunConfig = field(default_factory=RunConfig)
    resume: str = setting(
        "auto",
        "`auto` continues an unfinished run, `never` makes a new run, `must` refuses to start a new run.",
        choices=("auto", "never", "must"),
    )
    device: str = setting("auto", "A torch device. `auto`: cuda if available, cpu otherwise.")
    devices: int | None = setting(
        None,
        "Number of ranks (processes with a GPU each) that work on the run on this machine. Empty: one.",
        above=0,
    )
    ddp_timeout: float = setting(
        1800.0,
        "Longest time that a rank waits for the others. Then the run ends.",
        unit="seconds",
        above=0,
    )
    dtype: str = setting(
        "auto",
        "The dtype of the computation. `auto`: bfloat16 on cuda, float32 on a CPU.",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    schema_version: int = setting(SCHEMA_VERSION, "Version of this configuration's keys.")

    def check_together(self) -> None:
        require(bool(self.project), "project", self.project, "is empty", "Name the annotation project.")
        is_name = re.fullmatch(r"[^/\\\x00-\x1f.][^/\\\x00-\x1f]{0,99}", self.project) is not None
        problem = "cannot be part of a folder's name, which runs on it have"
        remedy = "Use up to 100 characters, without slashes or a dot in front."
        require(is_name, "project", self.project, problem, remedy)
        version = self.schema_version
        problem = f"this version of align reads {SCHEMA_VERSION}"
        remedy = "Run it with the version of align that wrote it, or start from today's defaults."
        require(version == SCHEMA_VERSION, "schema_version", version, problem, remedy)
        name = getattr(self.stage, "name", None)
        is_allowed = name is None or self.devices in (None, 1) or STAGES[name].spreads
        remedy = f"Leave it out; it is for {', '.join(key for key, stage in STAGES.items() if stage.spreads)}."
        require(is_allowed, "devices", self.devices, f"stage={name} works in one process", remedy)
        from_base = self.init == "base" and name in ("sft", "full", "sample", "reward", "dpo", "kto", "ppo")
        is_own_data = self.data.name in (*BY_PATH, "reasoning_gym")
        require(
            not from_base or not is_own_data or self.model.path is not None,
            "model",
            "(not given)",
            f"{self.data.path or 'data.tasks'} is your own data, and no base model is named to train on it",
            "Add model=hub model.path=ORG/NAME or a folder; model=pocket is the built-in toy of 6 million weights.",
        )
        require(
            self.rollout.temperature > 0 or bool(getattr(self.stage, "systems", None)),
            "rollout.temperature",
            self.rollout.temperature,
            "is greedy decoding, which only stage=eval with stage.systems can use",
            "Set it above 0, or name the systems: stage.systems={new: …, old: …}.",
        )
        require(
            self.rollout.temperature > 0 or getattr(self.stage, "answers", 1) == 1,
            "stage.answers",
            getattr(self.stage, "answers", 1),
            "answers to a prompt would all be equal, because rollout.temperature=0 takes the likeliest tokens",
            "Set stage.answers=1, or rollout.temperature above 0.",
        )
        self._check_vote_selection()
        self._check_soft_labels()
        check = getattr(self.stage, "check", None)
        if check is not None:
            check(self)

    def _check_vote_selection(self) -> None:
        """Raise InputError if settings select votes, and the stage does not read votes as preference pairs."""
        stage = self.stage
        sources = [source for source in getattr(stage, "sources", None) or () if isinstance(source, Mapping)]
        name = getattr(stage, "name", None)
        reads_pairs = name in ("reward", "dpo", "kto") or (name == "eval" and self.eval.measures == "judge")
        selects_votes = (
            (self.data.name == "annotations" and reads_pairs)
            or getattr(stage, "action", None) == "export"
            or any("annotations" in source for source in sources)
        )
        remedy = (
            "Drop it. It is for stage=reward, dpo, kto and eval=judge with data=annotations, for stage.action=export, "
            "and for sources {annotations: PROJECT}. stage.action=quarantine is for every reader of votes."
        )
        for key in VOTE_SELECTION_KEYS:
            value = getattr(self.data, key)
            problem = f"selects votes that make preference pairs, and stage={name} with these settings reads none"
            require(not value or name is None or selects_votes, f"data.{key}", value, problem, remedy)

    def _check_soft_labels(self) -> None:
        """Raise InputError if labels are soft, and the stage neither trains on pairs nor makes them of votes."""
        stage = self.stage
        name = getattr(stage, "name", None)
        if not self.data.soft_labels or name is None:
            return
        sources = [source for source in getattr(stage, "sources", None) or () if isinstance(source, Mapping)]
        is_read = name in ("reward", "dpo", "kto") or any("annotations" in source for source in sources)
        remedy = "Drop it. It is for stage=reward, dpo and kto, and for stage=data with sources {annotations: PROJECT}."
        problem = f"is about preference pairs, and stage={name} with these settings trains on none"
        require(is_read, "data.soft_labels", True, problem, remedy)


def find_store_url(config: Config) -> str:
    """Return the URL of the annotation store: `store.url`, or by default a SQLite file in the folder of runs."""
    return config.store.url or f"sqlite:///{config.run.folder / STORE}"


def to_plain_dict(config: Config) -> dict[str, Any]:
    """Convert a configuration to nested dicts with secrets masked, for `config.yaml`, digests and tracking services."""
    return mask_tree(OmegaConf.to_container(OmegaConf.structured(config)))


def format_config(config: Config) -> str:
    """Return a configuration as YAML text with secrets masked, for a run's `config.yaml`."""
    return yaml.safe_dump(to_plain_dict(config), sort_keys=False, allow_unicode=True)
