"""`stage=data`: sources cleaned, deduplicated, divided and mixed into one data set."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import yaml

from align.config.settings import Settings, defaults_of, setting
from align.core.errors import require

if TYPE_CHECKING:
    from align.config.root import Config

ACTIONS = ("remove", "report")
MAKE, FORGET = "make", "forget"
EMBEDDED, DAFT, RAY = "embedded", "daft", "ray"
LOSS, REWARD = "loss", "reward"
SURE = 0.7
"""Jaccard similarity from which MinHash finds at least 999 of 1,000 pairs of near-duplicates."""
NOT_KEPT = "(not kept)"
"""What a run that forgets keeps of which rows it forgot."""


@dataclass
class DuplicatesConfig(Settings):
    """Rows that say the same, or nearly the same, as a row that is kept."""

    AT: ClassVar[str] = "stage.duplicates"

    exact: bool = setting(True, "Whether copies are looked for: rows whose words are the same.")
    near: float | None = setting(
        0.7,
        "Jaccard similarity of word 3-grams from which two documents are near-duplicates, if their numbers and "
        "operators are the same. Text that many rows share does not count. Empty: they are not looked for. Preference "
        "pairs and feedback have copies only.",
        above=0, at_most=1,
    )  # fmt: skip
    over: str = setting(
        "both",
        "What is compared of a conversation: `prompts` (what users say), `answers`, or `both`. System prompts are "
        "never compared.",
        choices=("both", "prompts", "answers"),
    )  # fmt: skip
    among: str = setting(
        "all", "Which rows are compared: `all`, those `within` one source, or those `across` sources.",
        choices=("all", "within", "across"),
    )  # fmt: skip
    prefer: list[str] = setting(
        [], "Names of sources whose rows survive, the first before the second. The others follow in their order."
    )
    action: str = setting(
        "remove", "`remove` leaves duplicates out. `report` only counts and shows them.", choices=ACTIONS
    )

    def finds_all(self, near: float) -> bool:
        """Return whether all near-duplicates at this similarity, as a whole and of all sources, are found and removed.

        MinHash finds them from `SURE` on. Where duplicates are only reported, each is linked to one kept document, and
        two of them may be as similar and on two sides.
        """
        all_of_them = (self.over, self.among, self.action) == ("both", "all", "remove")
        return all_of_them and self.near is not None and self.near <= near and near >= SURE


@dataclass
class ContaminationConfig(Settings):
    """Rows that give away what is measured."""

    AT: ClassVar[str] = "stage.contamination"

    against: Any = setting(
        [],
        "Files of evaluation sets, such as [gsm8k.jsonl, {path: mmlu.parquet, columns: [question, choices]}]. Rows "
        "that share 8 to 13 words in a row with one, hold a whole question, or are nearly the same, are found.",
    )
    test: bool = setting(True, "Whether rows to train on are compared with those to measure on too.")
    near: float | None = setting(
        0.7, "Jaccard similarity from which rows are nearly the same. Empty: near-duplicates are not looked for.",
        above=0, at_most=1,
    )  # fmt: skip
    action: str = setting("remove", "`remove` leaves such rows out. `report` only counts them.", choices=ACTIONS)

    def __post_init__(self) -> None:
        self.against = listed(self.against)
        super().__post_init__()


@dataclass
class SplitConfig(Settings):
    """Which rows are measured on. Rows that ask the same question, rows of one group (a column `group_id` or `group`)
    and near-duplicates are always on one side. The share is `data.held_out`."""

    AT: ClassVar[str] = "stage.split"

    by: str = setting(
        "question",
        "`question` divides by a hash of what rows ask, as for a plain file. `time` measures on rows that were written "
        "at `since` or later. `column` goes by a column that says train or test.",
        choices=("question", "time", "column"),
    )  # fmt: skip
    column: str | None = setting(
        None, "The column of times or of sides. Not given: created_at for `time`, split for `column`."
    )
    since: str | None = setting(None, "Time from which on rows are measured on, such as 2026-11-01.")

    def check_together(self) -> None:
        dated = self.by == "time"
        require(
            dated == (self.since is not None), "stage.split.since", self.since,
            "says when rows to measure on begin, which stage.split.by=time needs and nothing else",
            "Write stage.split.by=time stage.split.since=2026-11-01.",
        )  # fmt: skip
        require(
            self.column is None or self.by != "question", "stage.split.column", self.column,
            "is read by stage.split.by=time and stage.split.by=column alone", "Add one of them, or drop it.",
        )  # fmt: skip

    @property
    def read(self) -> dict[str, str]:
        """What is read of rows for it: `split` or `time` → the column."""
        named = {"time": ("time", "created_at"), "column": ("split", "split")}
        if self.by not in named:
            return {}
        what, default = named[self.by]
        return {what: self.column or default}


@dataclass
class MixConfig(Settings):
    """How sources are mixed, by the `weight` of each. Without weights, a temperature and a total, every row is seen
    once."""

    AT: ClassVar[str] = "stage.mix"

    by: str = setting(
        "rows", "What weights are shares of: `rows`, `turns` or `tokens` (of `model=`).",
        choices=("rows", "turns", "tokens"),
    )  # fmt: skip
    total: int | None = setting(
        None,
        "Rows, turns or tokens to train on. Empty: as many as there can be without seeing a row more than `repeat` "
        "times.",
        above=0,
    )  # fmt: skip
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
        "What scores rows. `loss`: that of the model of `model=` on what is trained on, in nats a token; of a pair, on "
        "its chosen answer. `reward`: what `reward=` names, of the last answer; of a pair, the score of the chosen "
        "answer less that of the rejected one. Empty: rows have no score.",
        choices=(LOSS, REWARD),
    )  # fmt: skip
    keep: list[float] = setting(
        [0.0, 1.0],
        "The two quantiles of the score between which rows are kept: [0.05, 0.9] leaves out the lowest 5 % and the "
        "highest 10 %.",
    )
    within: str = setting(
        "source", "Whose quantiles these are: those of each `source`, or of `all` rows together.",
        choices=("source", "all"),
    )  # fmt: skip
    least: float | None = setting(None, "The lowest score that is kept.")
    most: float | None = setting(None, "The highest score that is kept.")
    max_length: int = setting(
        2048, "Tokens that are read at once for `loss`. Conversations are cut there, texts are read in pieces.",
        unit="tokens", above=1,
    )  # fmt: skip
    batch_size: int = setting(16, "Rows that go through a model at once.", unit="rows", above=0)

    def check_together(self) -> None:
        keep, least, most = list(self.keep), self.least, self.most
        two = len(keep) == 2 and all(isinstance(share, int | float) and 0 <= share <= 1 for share in keep)
        remedy = "Write two shares from 0 to 1, such as [0.05, 0.9]."
        require(two and keep[0] < keep[1], "stage.score.keep", keep, "are no two quantiles in their order", remedy)
        for key, value in (("least", least), ("most", most)):
            finite = value is None or abs(value) < float("inf")
            require(finite, f"stage.score.{key}", value, "is no finite number", "Give a number.")
        problem = f"is more than stage.score.most={most}, and nothing is kept"
        in_order = least is None or most is None or least <= most
        require(in_order, "stage.score.least", least, problem, "Exchange the two.")
        if self.by is None:
            for key in ("keep", "within", "least", "most"):
                value, usual = getattr(self, key), defaults_of(ScoreConfig)[key]
                same = (list(value) if key == "keep" else value) == usual
                remedy = "Add stage.score.by=loss or stage.score.by=reward."
                require(same, f"stage.score.{key}", value, "has no effect without stage.score.by", remedy)


def listed(given: Any) -> Any:
    """A list that was written as JSON or YAML: the grammar of command lines takes one with quoted keys for a text."""
    if isinstance(given, str) and given.lstrip().startswith("["):
        with suppress(yaml.YAMLError):
            return yaml.safe_load(given)
    return given


@dataclass
class DataStageConfig(Settings):
    """Makes a data set from sources: reads, cleans, removes duplicates and what gives evaluation sets away, divides and
    mixes. Later stages read it by `data=manifest data.path=data:latest`."""

    AT: ClassVar[str] = "stage"

    name: str = "data"
    action: str = setting(
        MAKE,
        "`make` makes a data set. `forget` makes the one of `data.path` again without some rows, and removes the old "
        "one.",
        choices=(MAKE, FORGET),
    )  # fmt: skip
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
        "Where the work is done: `embedded`, in this process; `daft`, in several of this machine; `ray`, on a Ray "
        "cluster, by Daft. The data set is the same.",
        choices=(EMBEDDED, DAFT, RAY), identity=False,
    )  # fmt: skip
    workers: int | None = setting(
        None, "Processes that work at once, with stage.engine=daft or ray. Empty: as many as there are processors.",
        at_least=1, identity=False,
    )  # fmt: skip
    ray: str | None = setting(
        None, "Address of the Ray cluster: `auto`, HOST:PORT, or ray://HOST:PORT. Empty: one on this machine, for this "
        "run.",
        identity=False,
    )  # fmt: skip

    def check_together(self) -> None:
        require(
            self.workers is None or self.engine != EMBEDDED, "stage.workers", self.workers,
            "is for other processes, and stage.engine=embedded has none", "Add stage.engine=daft, or drop it.",
        )  # fmt: skip
        require(
            self.ray is None or self.engine == RAY, "stage.ray", self.ray,
            f"is a cluster, and stage.engine={self.engine} does not ask for one", "Add stage.engine=ray, or drop it.",
        )  # fmt: skip

    def __post_init__(self) -> None:
        self.sources, self.clean = listed(self.sources), listed(self.clean)
        super().__post_init__()

    @property
    def counts_tokens(self) -> bool:
        """Whether anything goes by tokens, which are those of `model=`."""
        listed = self.clean if isinstance(self.clean, list | tuple) else ()
        steps = [step for step in listed if isinstance(step, Mapping)]
        by = [arguments.get("by") for step in steps for arguments in step.values() if isinstance(arguments, Mapping)]
        return self.mix.by == "tokens" or "tokens" in by

    def named(self, key: str) -> list[str]:
        """The values of a key (`fn`, `patterns`) anywhere in the list of cleaning steps."""
        found: list[str] = []
        for step in self.clean if isinstance(self.clean, list | tuple) else ():
            for name, given in step.items() if isinstance(step, Mapping) else ():
                arguments = given if isinstance(given, Mapping) else {name: given}
                found += [value for at, value in arguments.items() if at == key and isinstance(value, str)]
        return found

    def check(self, config: Config) -> None:
        """Raises: InputError: the stage has no sources, or some that it does not read."""
        require(
            (self.action == FORGET) == (self.forget is not None), "stage.forget", self.forget,
            "goes with stage.action=forget, and with no other action",
            "Write stage.action=forget data.path=data:NAME stage.forget=[CONTENT_ID].",
        )  # fmt: skip
        if self.action == FORGET:
            self.check_forget(config)
            return
        for key in ("limit", "system", "eval_path", "part", "reasoning", "max_length", "too_long"):
            value, default = getattr(config.data, key), getattr(type(config.data), key)
            remedy = "Give a source a cap." if key == "limit" else "Give it to the stage that trains."
            require(value == default, f"data.{key}", value, "is not read by stage=data", remedy)
        usual = config.data.held_out == type(config.data).held_out
        require(
            usual or self.split.by == "question", "data.held_out", config.data.held_out,
            f"says nothing where stage.split.by={self.split.by}", "Drop it.",
        )  # fmt: skip
        require(
            not self.counts_tokens or config.model.path is not None, "model", "(not given)",
            "something goes by tokens, and nothing says whose", "Add model=hub model.path=ORG/NAME or a folder.",
        )  # fmt: skip
        require(
            self.score.by != LOSS or config.model.path is not None, "model", "(not given)",
            "stage.score.by=loss, and nothing says whose loss",
            "Add model=hub model.path=ORG/NAME or a folder; model=pocket is the built-in one.",
        )  # fmt: skip
        require(
            self.score.by == REWARD or (config.reward.name == "learned" and config.reward == type(config.reward)()),
            "reward",
            config.reward.name, "is not read by stage=data without stage.score.by=reward", "Add it, or drop reward=.",
        )  # fmt: skip
        name, path = config.data.name, config.data.path
        require(
            name in ("chitchat", "files"), "data", name, "is no source of a data set",
            'Write "stage.sources=[{path: a.jsonl}, {annotations: PROJECT}]".',
        )  # fmt: skip
        require(
            path is None or self.sources is None, "data.path", path, "is given beside stage.sources",
            f'Write it among these: "stage.sources=[…, {{path: {path}}}]".',
        )  # fmt: skip
        require(
            self.sources is None or not (config.data.columns or config.data.metadata),
            "data.columns" if config.data.columns else "data.metadata", config.data.columns or config.data.metadata,
            "is of data.path, and sources have their own", "Write it there: {path: …, columns: {…}, metadata: […]}.",
        )  # fmt: skip
        require(
            self.sources is not None or path is not None, "stage.sources", None, "names nothing to make a data set of",
            'Write "stage.sources=[{path: a.jsonl}, {path: b.parquet, weight: 0.3}]".',
        )  # fmt: skip

    def check_forget(self, config: Config) -> None:
        """Raises: InputError: there is no data set, or a setting says how one is made."""
        require(
            config.data.name == "manifest", "data.path", config.data.path, "is no data set that rows are in",
            "Write data.path=data:NAME.",
        )  # fmt: skip
        for key in ("sources", "clean", "score", "duplicates", "contamination", "split", "mix"):
            value, usual = getattr(self, key), getattr(DataStageConfig(), key)
            problem = "is not read by stage.action=forget, which cleans and divides nothing anew"
            require(untyped(value) == untyped(usual), f"stage.{key}", untyped(value), problem, "Drop it.")


def untyped(value: Any) -> Any:
    """A value without the types that say where it came from."""
    return asdict(value) if isinstance(value, Settings) else list(value) if isinstance(value, list | tuple) else value
