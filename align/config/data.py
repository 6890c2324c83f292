"""Settings of `stage=data`, which cleans, deduplicates, splits and mixes sources into one data set."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import yaml

from align.config.settings import Settings, get_defaults, setting
from align.core.errors import require

if TYPE_CHECKING:
    from align.config.root import Config

ACTIONS = ("remove", "report")
MAKE = "make"
FORGET = "forget"
EMBEDDED = "embedded"
DAFT = "daft"
RAY = "ray"
LOSS = "loss"
REWARD = "reward"
SURE = 0.7
"""Jaccard similarity at and above which MinHash finds at least 999 of 1,000 pairs of near-duplicates."""
NOT_KEPT = "(not kept)"
"""Value that replaces the row ids in `stage.forget` in a manifest, which must not name the forgotten rows."""


@dataclass
class DuplicatesConfig(Settings):
    """Rows that say the same, or nearly the same, as a row that is kept."""

    AT: ClassVar[str] = "stage.duplicates"

    exact: bool = setting(True, "Look for exact duplicates: rows with the same words.")
    near: float | None = setting(
        0.7,
        "Jaccard similarity of word 3-grams from which two documents are near-duplicates, if their numbers and "
        "operators are the same. Text that many rows share does not count. Empty: they are not looked for. In "
        "preference pairs and feedback only exact duplicates are looked for.",
        above=0,
        at_most=1,
    )
    over: str = setting(
        "both",
        "The part of a conversation that is compared: `prompts` (what users say), `answers`, or `both`. System "
        "prompts are "
        "never compared.",
        choices=("both", "prompts", "answers"),
    )
    among: str = setting(
        "all",
        "Which rows are compared: `all`, those `within` one source, or those `across` sources.",
        choices=("all", "within", "across"),
    )
    prefer: list[str] = setting(
        [],
        "Names of sources whose rows are kept when duplicates are removed, in order of preference. Other sources "
        "follow in their own order.",
    )
    action: str = setting(
        "remove", "`remove` leaves duplicates out. `report` only counts and shows them.", choices=ACTIONS
    )

    def finds_all(self, near: float) -> bool:
        """Return whether deduplication with these settings removes all near-duplicates of similarity `near` or more.

        MinHash finds them from `SURE` on. If duplicates are only reported, each is linked to one kept document, and two
        of them may be as similar and in different splits.
        """
        all_of_them = (self.over, self.among, self.action) == ("both", "all", "remove")
        return all_of_them and self.near is not None and self.near <= near and near >= SURE


@dataclass
class ContaminationConfig(Settings):
    """The removal of rows that contain evaluation data."""

    AT: ClassVar[str] = "stage.contamination"

    against: Any = setting(
        [],
        "Files of evaluation sets, such as [gsm8k.jsonl, {path: mmlu.parquet, columns: [question, choices]}]. A row "
        "counts as contaminated if it shares 8 to 13 consecutive words with one of theirs, contains a whole question, "
        "or is nearly the same.",
    )
    test: bool = setting(True, "Also compare training rows with the held-out rows.")
    near: float | None = setting(
        0.7,
        "Jaccard similarity from which rows are nearly the same. Empty: near-duplicates are not looked for.",
        above=0,
        at_most=1,
    )
    action: str = setting("remove", "`remove` leaves such rows out. `report` only counts them.", choices=ACTIONS)

    def __post_init__(self) -> None:
        self.against = parse_list(self.against)
        super().__post_init__()


@dataclass
class SplitConfig(Settings):
    """The rows that are measured on. Rows that ask the same question, rows of one group (a column `group_id` or
    `group`) and near-duplicates are always in one split. The share is `data.held_out`."""

    AT: ClassVar[str] = "stage.split"

    by: str = setting(
        "question",
        "How rows are split into train and test. `question`: by a hash of the question, as for a plain file. `time`: "
        "rows that were written at `since` or later are held out. `column`: by a column that says train or test.",
        choices=("question", "time", "column"),
    )
    column: str | None = setting(
        None,
        "The column with times, or with the names of the splits. Not given: created_at for `time`, split for `column`.",
    )
    since: str | None = setting(None, "Rows written at or after this time are held out, such as 2026-11-01.")

    def check_together(self) -> None:
        is_used = (self.by == "time") == (self.since is not None)
        problem = f"is {'required by' if self.since is None else 'read only with'} stage.split.by=time"
        remedy = "Write stage.split.by=time stage.split.since=2026-11-01."
        require(is_used, "stage.split.since", self.since, problem, remedy)
        is_used = self.column is None or self.by != "question"
        problem = "is read by stage.split.by=time and stage.split.by=column alone"
        require(is_used, "stage.split.column", self.column, problem, "Add one of them, or drop it.")

    @property
    def read(self) -> dict[str, str]:
        """Mapping from `split` or `time` to the column that the split is read from; empty for a split by question."""
        if self.by == "question":
            return {}
        field, default = ("time", "created_at") if self.by == "time" else ("split", "split")
        return {field: self.column or default}


@dataclass
class MixConfig(Settings):
    """The mixture of sources, by the `weight` of each. Without weights, a temperature and a total, every row is seen
    once."""

    AT: ClassVar[str] = "stage.mix"

    by: str = setting(
        "rows",
        "What weights are shares of: `rows`, `turns` or `tokens` (of `model=`).",
        choices=("rows", "turns", "tokens"),
    )
    total: int | None = setting(
        None,
        "Rows, turns or tokens to train on. Empty: as many as there can be without seeing a row more than `repeat` "
        "times.",
        above=0,
    )
    repeat: int = setting(1, "How often a row may be seen in one pass.", at_least=1, at_most=100_000)
    temperature: float | None = setting(
        None, "Sources without a weight count by size^(1/temperature). Empty: by their size.", above=0
    )


@dataclass
class ScoreConfig(Settings):
    """A score of each row that the cleaning leaves, and which rows are kept by it. The data set's column `score` has
    them. Rows without a score are kept."""

    AT: ClassVar[str] = "stage.score"

    by: str | None = setting(
        None,
        "What scores rows. `loss`: the loss of the model of `model=` on the tokens that are trained on, in nats a "
        "token; for a pair, on its chosen answer. `reward`: the score of the last answer by the reward of `reward=`; "
        "for a pair, the chosen answer's score minus the rejected one's. Empty: rows have no score.",
        choices=(LOSS, REWARD),
    )
    keep: list[float] = setting(
        [0.0, 1.0],
        "The two quantiles of the score between which rows are kept: [0.05, 0.9] leaves out the lowest 5 % and the "
        "highest 10 %.",
    )
    within: str = setting(
        "source",
        "Where the quantiles are computed: in each `source` separately, or over `all` rows together.",
        choices=("source", "all"),
    )
    least: float | None = setting(None, "The lowest score that is kept.")
    most: float | None = setting(None, "The highest score that is kept.")
    max_length: int = setting(
        2048,
        "Tokens that are read at once for `loss`. Conversations are cut there, texts are read in pieces.",
        unit="tokens",
        above=1,
    )
    batch_size: int = setting(16, "Rows that go through a model at once.", unit="rows", above=0)

    def check_together(self) -> None:
        keep = list(self.keep)
        are_shares = len(keep) == 2 and all(isinstance(share, int | float) and 0 <= share <= 1 for share in keep)
        in_order = are_shares and keep[0] < keep[1]
        remedy = "Write two shares from 0 to 1, such as [0.05, 0.9]."
        require(in_order, "stage.score.keep", keep, "are no two quantiles in their order", remedy)
        for key in ("least", "most"):
            value = getattr(self, key)
            is_finite = value is None or abs(value) < float("inf")
            require(is_finite, f"stage.score.{key}", value, "is no finite number", "Give a number.")
        problem = f"is more than stage.score.most={self.most}, and nothing is kept"
        in_order = self.least is None or self.most is None or self.least <= self.most
        require(in_order, "stage.score.least", self.least, problem, "Exchange the two.")
        if self.by is None:
            for key in ("keep", "within", "least", "most"):
                value = getattr(self, key)
                is_default = (list(value) if key == "keep" else value) == get_defaults(ScoreConfig)[key]
                remedy = "Add stage.score.by=loss or stage.score.by=reward."
                require(is_default, f"stage.score.{key}", value, "has no effect without stage.score.by", remedy)


def parse_list(value: Any) -> Any:
    """Parse a text that begins with `[` as a YAML or JSON list, and return any other value unchanged.

    Hydra's grammar takes a list with quoted keys for a text.
    """
    if isinstance(value, str) and value.lstrip().startswith("["):
        with suppress(yaml.YAMLError):
            return yaml.safe_load(value)
    return value


@dataclass
class DataStageConfig(Settings):
    """Makes a data set from sources: reads and cleans rows, removes duplicates and overlaps with evaluation sets,
    splits and mixes. Later stages read it by `data=manifest data.path=data:latest`."""

    AT: ClassVar[str] = "stage"

    name: str = "data"
    action: str = setting(
        MAKE,
        "`make` makes a data set. `forget` makes the data set of `data.path` again without some rows, and removes the "
        "old one.",
        choices=(MAKE, FORGET),
    )
    forget: Any = setting(
        None,
        "Rows to forget: a list of content ids, a file with one a line, or `erased` for those whose vote or item the "
        "annotation store no longer has.",
    )
    sources: Any = setting(
        None,
        "A list of sources, such as [{path: support.jsonl}, {path: general.parquet, weight: 0.3}]. Keys of a source: "
        "path, or data: chitchat with part, or annotations: PROJECT; name, weight, cap (rows at most), columns "
        "({ours: theirs}), licence. Not given: data.path.",
    )
    clean: Any = setting(
        ["unicode", "control", "empty"],
        "Cleaning steps in order: a name, or a name with its arguments, such as {pii: {action: mask}}.",
    )
    score: ScoreConfig = field(default_factory=ScoreConfig)
    duplicates: DuplicatesConfig = field(default_factory=DuplicatesConfig)
    contamination: ContaminationConfig = field(default_factory=ContaminationConfig)
    split: SplitConfig = field(default_factory=SplitConfig)
    mix: MixConfig = field(default_factory=MixConfig)
    engine: str = setting(
        EMBEDDED,
        "What runs the work: `embedded`, this process; `daft`, several processes on this machine; `ray`, a Ray "
        "cluster, by Daft. The data set is the same with each.",
        choices=(EMBEDDED, DAFT, RAY),
        identity=False,
    )
    workers: int | None = setting(
        None,
        "Processes that work at once, with stage.engine=daft or ray. Empty: as many as there are processors.",
        at_least=1,
        identity=False,
    )
    ray: str | None = setting(
        None,
        "Address of the Ray cluster: `auto`, HOST:PORT, or ray://HOST:PORT. Empty: one on this machine, for this run.",
        identity=False,
    )

    def check_together(self) -> None:
        is_used = self.workers is None or self.engine != EMBEDDED
        problem = "sets the number of worker processes, and stage.engine=embedded has none"
        require(is_used, "stage.workers", self.workers, problem, "Add stage.engine=daft, or drop it.")
        is_used = self.ray is None or self.engine == RAY
        problem = f"names a cluster, and stage.engine={self.engine} does not use one"
        require(is_used, "stage.ray", self.ray, problem, "Add stage.engine=ray, or drop it.")

    def __post_init__(self) -> None:
        self.sources = parse_list(self.sources)
        self.clean = parse_list(self.clean)
        super().__post_init__()

    @property
    def counts_tokens(self) -> bool:
        """True if the mixture or a cleaning step counts tokens, and so needs the tokenizer of `model=`."""
        return self.mix.by == "tokens" or "tokens" in self.list_step_arguments("by")

    def list_step_arguments(self, key: str) -> list[str]:
        """Return the text values of one argument, such as `fn` or `patterns`, from all cleaning steps that have it."""
        texts: list[str] = []
        for step in self.clean if isinstance(self.clean, list | tuple) else ():
            for name, value in step.items() if isinstance(step, Mapping) else ():
                arguments = value if isinstance(value, Mapping) else {name: value}
                if isinstance(text := arguments.get(key), str):
                    texts.append(text)
        return texts

    def check(self, config: Config) -> None:
        """Raise InputError if the stage has no sources, or a setting of another group has no effect on it."""
        is_used = (self.action == FORGET) == (self.forget is not None)
        problem = "goes with stage.action=forget, and with no other action"
        remedy = "Write stage.action=forget data.path=data:NAME stage.forget=[CONTENT_ID]."
        require(is_used, "stage.forget", self.forget, problem, remedy)
        if self.action == FORGET:
            self.check_forget(config)
            return
        data = config.data
        for key in ("limit", "system", "eval_path", "part", "reasoning", "max_length", "too_long"):
            value = getattr(data, key)
            remedy = "Give a source a cap." if key == "limit" else "Give it to the stage that trains."
            require(value == getattr(type(data), key), f"data.{key}", value, "is not read by stage=data", remedy)
        is_used = data.held_out == type(data).held_out or self.split.by == "question"
        problem = f"has no effect with stage.split.by={self.split.by}"
        require(is_used, "data.held_out", data.held_out, problem, "Drop it.")
        has_model = config.model.path is not None
        problem = "the mix or a cleaning step counts tokens, and no model is named whose tokens these are"
        remedy = "Add model=hub model.path=ORG/NAME or a folder."
        require(has_model or not self.counts_tokens, "model", "(not given)", problem, remedy)
        problem = "stage.score.by=loss, and no model is named to compute the loss"
        remedy = "Add model=hub model.path=ORG/NAME or a folder; model=pocket is the built-in one."
        require(has_model or self.score.by != LOSS, "model", "(not given)", problem, remedy)
        is_default = config.reward.name == "learned" and config.reward == type(config.reward)()
        problem = "is not read by stage=data without stage.score.by=reward"
        remedy = "Add it, or drop reward=."
        require(is_default or self.score.by == REWARD, "reward", config.reward.name, problem, remedy)
        remedy = 'Write "stage.sources=[{path: a.jsonl}, {annotations: PROJECT}]".'
        require(data.name in ("chitchat", "files"), "data", data.name, "is no source of a data set", remedy)
        if self.sources is None:
            remedy = 'Write "stage.sources=[{path: a.jsonl}, {path: b.parquet, weight: 0.3}]".'
            require(data.path is not None, "stage.sources", None, "names nothing to make a data set of", remedy)
            return
        remedy = f'Write it among these: "stage.sources=[…, {{path: {data.path}}}]".'
        require(data.path is None, "data.path", data.path, "is given beside stage.sources", remedy)
        for key in ("columns", "metadata"):
            value = getattr(data, key)
            problem = "applies to data.path, and sources have their own setting"
            remedy = "Write it there: {path: …, columns: {…}, metadata: […]}."
            require(not value, f"data.{key}", value, problem, remedy)

    def check_forget(self, config: Config) -> None:
        """Raise InputError if `stage.action=forget` names no data set, or comes with settings for building one."""
        data = config.data
        remedy = "Write data.path=data:NAME."
        require(data.name == "manifest", "data.path", data.path, "is no data set that rows are in", remedy)
        for key in ("sources", "clean", "score", "duplicates", "contamination", "split", "mix"):
            value = to_plain(getattr(self, key))
            is_default = value == to_plain(getattr(DataStageConfig(), key))
            problem = "is not read by stage.action=forget, which cleans and divides nothing anew"
            require(is_default, f"stage.{key}", value, problem, "Drop it.")


def to_plain(value: Any) -> Any:
    """Convert a settings object to a dict and a tuple to a list, and return any other value unchanged."""
    if isinstance(value, Settings):
        return asdict(value)
    return list(value) if isinstance(value, list | tuple) else value
