"""Settings classes of the groups that stages share: base model, method, data, rollout, tracking, export, serving."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar
from urllib.parse import urlsplit

from align.config.settings import MOST, Settings, get_defaults, setting
from align.core.errors import InputError, require


@dataclass
class ModelConfig(Settings):
    """The base weights."""

    AT: ClassVar[str] = "model"

    path: str | None = setting(
        None,
        "A folder, a hub id, or a model that comes with a package: `pocket`, `smollm2`. Empty: the base of the "
        "artifact that the stage starts from, or `pocket` if there is no artifact.",
        names="base",
    )
    revision: str | None = setting(None, "Commit, tag or branch of a hub id.", names="base")

    def check_together(self) -> None:
        remedy = "Name the model too: model=hub model.path=ORG/NAME."
        require(
            self.revision is None or bool(self.path), "model.revision", self.revision, "is set without a model", remedy
        )


ALL_LINEAR = "all-linear"
OF_ADAPTERS = ("r", "alpha", "dropout", "targets", "rslora", "dora")
"""Names of the `method` settings that describe a new adapter."""


@dataclass
class MethodConfig(Settings):
    """The weights that train, and the precision of the base: LoRA on an NF4 base (`qlora`), LoRA on the base in the
    compute dtype (`lora`), or every weight (`full`). `auto` is the method of the adapter that a stage starts
    from, and `qlora` if it starts from a whole model."""

    AT: ClassVar[str] = "method"

    name: str = setting("auto", "The method.", choices=("auto", "qlora", "lora", "full"))
    r: int = setting(16, "Rank of a new adapter.", above=0)
    alpha: int = setting(32, "Scale of a new adapter: its output is multiplied by alpha / r.", above=0)
    dropout: float = setting(
        0.0,
        "Dropout on an adapter's inputs, in supervised training only. Reward models, DPO, KTO and PPO use none.",
        at_least=0,
        below=1,
    )
    targets: Any = setting(
        ALL_LINEAR,
        "Layers that get a new adapter: `all-linear`, or a list of names, such as [q_proj, v_proj].",
    )
    rslora: bool = setting(False, "Scale by alpha / √r (rsLoRA); useful for ranks above about 64.")
    dora: bool = setting(
        False,
        "Train norm and direction of a weight's columns separately (DoRA). Slower, and exported only as a merged "
        "model.",
    )
    lr: float | None = setting(
        None,
        "Default of `stage.lr` in `stage=sft` and `stage=full`. To change the rate, set `stage.lr`. Empty: as "
        "`stage.lr` says.",
        above=0,
    )

    def check_together(self) -> None:
        are_names = isinstance(self.targets, list | tuple) and all(isinstance(t, str) and t for t in self.targets)
        is_valid = self.targets == ALL_LINEAR or (are_names and len(self.targets) > 0)
        remedy = "Write method.targets=all-linear, or method.targets=[q_proj,v_proj]."
        require(is_valid, "method.targets", self.targets, "is no list of names of layers", remedy)
        if are_names:  # another order is the same run
            object.__setattr__(self, "targets", sorted({*self.targets}))  # also if it is frozen
        if self.name == "full":
            self.refuse_others({}, "method=full trains every weight", "Drop it, or use method=lora.")

    def refuse_others(self, adapter: Mapping[str, Any], reason: str, remedy: str) -> None:
        """Raise InputError if a setting for new adapters, such as `method.r`, is neither the default nor `adapter`'s.

        Called if no new adapter is made.

        Args:
            adapter: settings of the existing adapter, which are allowed too.
            reason: why no new adapter is made, a clause.
        """
        for key in OF_ADAPTERS:
            value = getattr(self, key)
            comparable = list(value) if isinstance(value, tuple) else value
            is_allowed = comparable in (getattr(type(self), key), adapter.get(key))
            require(is_allowed, f"method.{key}", value, f"is a setting of new adapters: {reason}", remedy)


ALIAS = "jsonl"
"""Another name for `data=files`."""
BY_PATH = {"files": "files", "manifest": "a data set of stage=data"}
"""Choice of `data` that reads `data.path` → a phrase for the kind of source that the path names."""
OF_DATA = "data:"
"""Prefix of references to published data sets, such as `data:latest`."""
EXAMPLES = {"files": "FILE.jsonl", "manifest": "data:latest"}
VOTE_SELECTION_KEYS = ("annotators", "exclude_annotators", "min_gold_accuracy")
"""Settings of `data` that select the annotators whose votes count."""
KEYS_LEFT_OUT_IF_UNSET = (*VOTE_SELECTION_KEYS, "soft_labels")
"""Settings of `data` that are no part of a run's identity where they are empty or False."""


@dataclass
class DataConfig(Settings):
    """The source of conversations, texts or preference pairs: the corpus of the built-in model (`chitchat`), files of
    any format (`files`, which may be called `jsonl`), a data set that `stage=data` made (`manifest`), the votes of
    the annotation store (`annotations`), or tasks that the package reasoning-gym generates (`reasoning_gym`)."""

    AT: ClassVar[str] = "data"

    name: str = setting(
        "chitchat", "The source.", choices=("chitchat", "files", "manifest", "annotations", "reasoning_gym")
    )
    path: str | None = setting(
        None,
        "Files of data=files: a file, a folder, a pattern, hub:ORG/NAME, or hub:ORG/NAME/FILE. The data set of "
        "data=manifest: data:latest, data:NAME, or a folder.",
        names="data",
    )
    columns: Any = setting(
        None,
        "Other names of columns in the files of data.path and data.eval_path, ours first: {prompt: question, context: "
        "notes}. A context is written below the question.",
    )
    metadata: Any = setting(
        None,
        "Columns of these files that are kept as metadata and not read, whatever they hold: [notes, label].",
    )
    part: str | None = setting(
        None, "Part of the corpus chitchat: `base` is plain text. Empty: the part that the stage needs."
    )
    tasks: Any = setting(
        None,
        "Tasks of data=reasoning_gym with their settings: [{name: chain_sum, size: 2000, max_terms: 3}, gcd]. `read` "
        "is what the check `exact` reads of an answer.",
    )
    template: str | None = setting(
        None, "Chat template. Empty: the template of the artifact or the tokenizer.", choices=("chatml",)
    )
    template_kwargs: Any = setting(
        None,
        "Arguments of the chat template, a mapping such as {enable_thinking: false}. They are saved with the "
        "artifact. If you give them again, they replace the saved ones.",
    )
    reasoning: str = setting(
        "keep",
        "What happens to the reasoning before an answer (`<think>…</think>`, or a message's `reasoning_content`). "
        "`keep`: trained on. `mask`: read and not trained on. `hide`: left out.",
        choices=("keep", "mask", "hide"),
    )
    max_length: int = setting(1024, "Longest row.", unit="tokens", above=0)
    too_long: str = setting(
        "drop",
        "What happens to a longer conversation in supervised training. `drop`: left out. `truncate`: cut at "
        "max_length; its last answer then does not teach the model to stop. Longer prompts and pairs are always left "
        "out.",
        choices=("drop", "truncate"),
    )
    system: str | None = setting(
        None,
        "System prompt for conversations that have none. Not given: the system prompt of the run that the stage "
        "starts from, if it had one. Empty (`data.system=`): none.",
    )
    held_out: float = setting(
        0.05,
        "Share of a file's questions that is held out for measuring, chosen by a hash of the question. 0: all rows "
        "are trained on. 1: all rows are measured on.",
        at_least=0,
        at_most=1,
    )
    eval_path: str | None = setting(
        None,
        "A file to measure on, or hub:ORG/NAME/FILE. All of data.path is then trained on, except questions that are "
        "also in this file.",
        names="eval_data",
    )
    on_bad_row: str = setting(
        "error",
        "What happens to rows with content that align cannot represent. `error`: the file is refused. `skip`: such "
        "rows are left out and counted.",
        choices=("error", "skip"),
    )
    limit: int | None = setting(
        None,
        "Largest number of rows that are used for training, and of rows that are held out, after shuffling. Empty: "
        "all.",
        above=0,
    )
    allow_simulated: bool = setting(False, "Whether votes of simulated annotators count.")
    annotators: list[str] = setting(
        [],
        "Names or pseudonyms of the annotators whose votes alone count. The run's files hold the pseudonyms. "
        "Empty: all.",
    )
    exclude_annotators: list[str] = setting(
        [], "Names or pseudonyms of annotators whose votes do not count, also if data.annotators has them."
    )
    min_gold_accuracy: float | None = setting(
        None,
        "Smallest share of the pairs of gold items that an annotator orders as in the known answer, for their votes to "
        "count. Annotators without votes on gold items do not count then.",
        above=0,
        at_most=1,
    )
    soft_labels: bool = setting(
        False,
        "Whether training uses the probability that the chosen answer of a pair is better, instead of taking it for "
        "certain. With votes, the probability is the posterior of the model of annotators; in files and data sets it "
        "is the column `posterior`. For stage=reward, dpo with stage.loss=sigmoid, and kto; with stage=data, pairs of "
        "votes get the column.",
    )

    def __post_init__(self) -> None:
        if self.name == ALIAS:
            object.__setattr__(self, "name", "files")  # so that both spellings are one run; also if it is frozen
        super().__post_init__()

    def check_together(self) -> None:
        columns = self.columns or {}
        are_texts = isinstance(columns, dict) and all(
            isinstance(text, str) for pair in columns.items() for text in pair
        )
        remedy = 'Write "data.columns={prompt: question}": our name, then the file\'s.'
        require(are_texts, "data.columns", self.columns, "maps no columns", remedy)
        metadata = self.metadata or []
        are_names = isinstance(metadata, list | tuple) and all(isinstance(name, str) for name in metadata)
        require(are_names, "data.metadata", self.metadata, "is no list of columns", 'Write "data.metadata=[notes]".')
        for name, value in (("columns", self.columns), ("metadata", self.metadata)):
            problem = f"is about columns of files, which data={self.name} does not read"
            require(not value or self.name == "files", f"data.{name}", value, problem, "Add data=files, or drop it.")
        generates = self.name == "reasoning_gym"
        is_list = isinstance(self.tasks, list | tuple)
        remedy = 'Write data=reasoning_gym "data.tasks=[{name: chain_sum, size: 2000}]".'
        require(self.tasks is None or is_list, "data.tasks", self.tasks, "is no list of tasks", remedy)
        problem = f"data={self.name} {'generates tasks, and none is named' if generates else 'reads no tasks'}"
        require(bool(self.tasks) == generates, "data.tasks", self.tasks, problem, remedy)
        is_mapping = self.template_kwargs is None or isinstance(self.template_kwargs, dict)
        remedy = 'Write "data.template_kwargs={enable_thinking: false}".'
        require(is_mapping, "data.template_kwargs", self.template_kwargs, "is no mapping", remedy)
        for name, value in (self.template_kwargs or {}).items():
            key = f"data.template_kwargs.{name}"
            remedy = "Write for example enable_thinking."
            require(str(name).isidentifier(), key, value, "is no name of a variable", remedy)
            if isinstance(value, int | float):
                is_valid = abs(value) <= MOST
            else:
                is_valid = isinstance(value, str) and "#}" not in value
            remedy = "Give text, a number, true or false."
            require(is_valid, key, value, "is no value of a template's argument", remedy)
        if self.name == DataConfig.name and str(self.path).startswith(OF_DATA):
            object.__setattr__(self, "name", "manifest")  # only data sets have such references; also if it is frozen
        reads_path = self.name in BY_PATH
        remedy = "Add data=files or data=manifest, or drop data.path."
        require(self.path is None or reads_path, "data.path", self.path, f"data={self.name} reads no file", remedy)
        default_share = self.held_out in (0, DataConfig.held_out)
        if self.eval_path is not None:
            problem = f"data={self.name} has its own held-out split"
            remedy = "Add data=files and data.path, or drop it."
            require(reads_path, "data.eval_path", self.eval_path, problem, remedy)
            problem = "data.eval_path is measured on, and nothing is held out of data.path"
            require(default_share, "data.held_out", self.held_out, problem, "Drop one of the two.")
        if self.name == "manifest":
            remedy = "Drop it, or make another data set: stage=data data.held_out=…."
            require(default_share, "data.held_out", self.held_out, "a data set is divided already", remedy)
        if self.eval_path is not None:
            object.__setattr__(self, "held_out", 0.0)  # so that both spellings are one run
        is_blank = bool(self.system) and not str(self.system).strip()
        require(not is_blank, "data.system", self.system, "is blank", "Give its text, or leave it out.")
        if reads_path and not self.path:
            problem = f"data={self.name} reads {BY_PATH[self.name]}"
            raise InputError("data.path", self.path or "(empty)", problem, f"Add data.path={EXAMPLES[self.name]}.")


@dataclass
class TrackConfig(Settings):
    """The service that shows a run besides its own folder."""

    AT: ClassVar[str] = "track"

    name: str = setting("none", "The service.", choices=("none", "wandb", "mlflow", "trackio"))
    project: str = setting("align", "The project at the service: letters, digits, blanks, `.`, `_` and `-`.")

    def check_together(self) -> None:
        is_name = re.fullmatch(r"[\w][\w .-]*", self.project) is not None and len(self.project) <= 128
        remedy = "Use letters, digits, blanks, `.`, `_` and `-`, a letter or digit first; 128 at most."
        require(is_name, "track.project", self.project, "is no name that every service takes", remedy)


QUANTISED = ("q8_0", "q4_k_m")


@dataclass
class ExportConfig(Settings):
    """The format of an export: an adapter in PEFT's format (`adapter`), a merged or whole model (`merged`), files for
    llama.cpp (`gguf`), or all of these that are possible (`all`). `check` measures an export again."""

    AT: ClassVar[str] = "export"

    name: str = setting("adapter", "What is written.", choices=("adapter", "merged", "gguf", "all", "check"))
    dtype: str = setting(
        "bfloat16",
        "Dtype of a merged or whole model, and of the base beside an adapter.",
        choices=("float32", "bfloat16", "float16"),
    )
    into: str = setting(
        "auto",
        "The base to merge into. `auto`: the base that the adapter was trained on (NF4, dequantised). `original`: the "
        "original weights.",
        choices=("auto", "original"),
    )
    base: str = setting("auto", "`none` leaves out the base beside an adapter.", choices=("auto", "none"))
    require: list[str] = setting(
        [], "Engines that must check the export.", choices=("transformers", "llama.cpp", "vLLM")
    )
    accept: list[str] = setting(
        [],
        "Names of checks that may miss their bounds. The export is then still published, and its receipt says so.",
    )
    path: str | None = setting(None, "The folder that export=check measures again.")
    llama_cpp: str = setting(
        "auto", "The Python that has llama.cpp. `auto`: this one. `none`: llama.cpp checks nothing."
    )
    vllm: str = setting("auto", "The Python that has vLLM. `auto`: this one. `none`: vLLM checks nothing.")
    converters: str | None = setting(None, "Folder with llama.cpp's converters. Empty: the downloaded converters.")
    quantised: list[str] = setting(
        list(QUANTISED), "Quantised variants of a GGUF base or whole model.", choices=QUANTISED
    )
    sign: str | None = setting(
        None,
        "File with the private key that signs the export (PEM; curve P-256, P-384 or P-521). Empty: unsigned.",
        names="signer",
    )
    verify: str | None = setting(
        None,
        "File with a public key. The export that export=check measures, and each adapter that stage=serve loads, must "
        "be signed with the private key that belongs to it.",
        names="signer",
    )

    def check_together(self) -> None:
        is_used = (self.path is not None) == (self.name == "check")
        problem = "is the folder that export=check measures again"
        require(is_used, "export.path", self.path, problem, "Write export=check export.path=FOLDER, or leave it out.")
        remedy = "Write export.verify=PUBLIC_KEY, which it is checked with."
        require(self.sign is None or self.name != "check", "export.sign", self.sign, "is not for export=check", remedy)


SET_BY_ALIGN = {
    "model": "model=",
    "tokenizer": "model=",
    "served-model-name": "stage.adapters",
    "generation-config": "each request",
    "structured-outputs-config": "each request",
    "host": "stage.host",
    "port": "stage.port",
    "uds": "stage.port",
    "api-key": "stage.keys",
    "dtype": "serve.dtype",
    "enable-lora": "stage.adapters",
    "lora-modules": "stage.adapters",
    "max-lora-rank": "stage.max_rank",
    "lora-target-modules": "model=",
    "logprobs-mode": "each request",
    "max-logprobs": "each request",
    "trust-remote-code": "model=, whose code is never run",
    "max-loras": "stage.resident",
    "max-num-seqs": "stage.slots",
    "max-model-len": "stage.max_length",
    "enable-prefix-caching": "stage.prefix_cache_mb",
    "config": "serve.args",
}
"""Argument of `vllm serve` that users may not give with `serve=vllm` → the setting that decides it."""


@dataclass
class EngineConfig(Settings):
    """The engine that computes the answers of `stage=serve`: align's own (`serve=align`), or vLLM in a process beside
    it (`serve=vllm`). Clients, keys, names and the log are the same."""

    AT: ClassVar[str] = "serve"

    name: str = setting("align", "The engine.", choices=("align", "vllm"))
    python: str = setting("auto", "The Python that has vLLM. `auto`: this one.")
    dtype: str = setting(
        "bfloat16",
        "Dtype that vLLM computes in. The dequantised base of method=qlora is written in it.",
        choices=("float32", "bfloat16", "float16"),
    )
    args: Any = setting(
        None,
        "Further arguments of `vllm serve`, a mapping such as {tensor-parallel-size: 2, enforce-eager: true}. `true` "
        "and `false` are options without a value, `--NAME` and `--no-NAME`.",
    )
    start_s: float = setting(900.0, "Time that vLLM has to start.", unit="seconds", above=0)

    def check_together(self) -> None:
        if self.name == "align":
            for key in ("python", "dtype", "start_s", "args"):
                value = getattr(self, key)
                is_default = value == get_defaults(type(self))[key]
                require(is_default, f"serve.{key}", value, "is a setting of serve=vllm", "Add serve=vllm, or drop it.")
        check_args("serve.args", self.args, SET_BY_ALIGN)

    @property
    def words(self) -> list[str]:
        """`args` as words of the command line of `vllm serve`, such as `--gpu-memory-utilization=0.4`."""
        return format_arguments(self.args)


ARGUMENT = re.compile(r"[a-z][a-z0-9_-]*")


def check_args(field: str, arguments: Any, decided: Mapping[str, str]) -> None:
    """Raise InputError unless a value is a mapping of arguments of `vllm serve` that users may set, or None.

    Args:
        field: the setting that holds the mapping.
        decided: argument → the setting that decides it, for arguments that are not allowed.

    Raises:
        InputError: it is no mapping, or an argument is invalid or not allowed.
    """
    is_mapping = arguments is None or isinstance(arguments, dict)
    require(is_mapping, field, arguments, "is no mapping", f"Write for example {field}={{enforce-eager: true}}.")
    for name, value in (arguments or {}).items():
        key = f"{field}.{name}"
        decider = decided.get(str(name).replace("_", "-").removeprefix("no-"))
        require(decider is None, key, value, f"is decided by {decider}", "Leave it out.")
        is_valid = ARGUMENT.fullmatch(str(name)) is not None and isinstance(value, str | int | float)
        remedy = "Give a name without dashes before it, and text."
        require(is_valid, key, value, "is no argument of a command", remedy)


def format_arguments(arguments: Mapping[str, Any] | None) -> list[str]:
    """Convert a mapping of arguments to command-line words: `--name=value`, or for booleans `--name`, `--no-name`."""
    words = []
    for name, value in (arguments or {}).items():
        dashed = str(name).replace("_", "-")
        words.append(f"--{'' if value else 'no-'}{dashed}" if isinstance(value, bool) else f"--{dashed}={value}")
    return words


OF_VLLM = ("python", "urls", "replicas", "dtype", "args", "start_s", "max_gap")
DECIDED = {
    "model": "model=",
    "tokenizer": "model=",
    "served-model-name": "model=",
    "generation-config": "each request",
    "host": "align, at a socket",
    "port": "align, at a socket",
    "uds": "align",
    "api-key": "align, at a socket",
    "dtype": "rollout.dtype",
    "enable-lora": "method=",
    "lora-modules": "the policy",
    "max-lora-rank": "method.r",
    "lora-target-modules": "model=",
    "logprobs-mode": "the policy's loss",
    "max-logprobs": "each request",
    "trust-remote-code": "model=, whose code is never run",
    "max-loras": "the policy and its reference",
    "max-num-seqs": "rollout.batch_size",
    "max-model-len": "data.max_length and rollout.max_new_tokens",
    "enable-prefix-caching": "align: answers shall not depend on earlier ones",
    "config": "rollout.args",
}
"""Argument of `vllm serve` that users may not give with `rollout=vllm` → the setting that decides it."""


@dataclass
class RolloutConfig(Settings):
    """The sampling of responses. There is no top-k, top-p or penalty, because samples must come from the distribution
    whose logprobs are used."""

    AT: ClassVar[str] = "rollout"

    engine: str = setting(
        "hf",
        "The engine that generates: `hf` samples from the training model itself; `bank` from a copy of the base that "
        "serves many adapters in one batch, on a CPU; `vllm` asks a vLLM server.",
        choices=("hf", "bank", "vllm"),
    )
    max_new_tokens: int = setting(256, "Longest response.", unit="tokens", above=0)
    temperature: float = setting(
        1.0,
        "Divides the logits before sampling. 0: the likeliest token each time, only for stage=eval with stage.systems.",
        at_least=0,
    )
    batch_size: int = setting(128, "Number of responses that are generated together.", above=0)
    reasoning: str = setting(
        "keep",
        "Whether rewards, judges and annotators read the reasoning before an answer (`keep`), or only the answer "
        "(`hide`). With `hide`, train the reward model on answers only too: data.reasoning=hide.",
        choices=("keep", "hide"),
    )
    python: str = setting(
        "auto",
        "`vllm`: the Python that has vLLM, with which align starts the server. `auto`: this one.",
        identity=False,
    )
    urls: list[str] = setting(
        [],
        "`vllm`: servers that run already, such as [http://gpu1:8000]. They have to see the run's folder. Empty: "
        "align starts its own.",
        identity=False,
    )
    replicas: int = setting(
        1,
        "`vllm`: number of servers that align starts. Prompts are distributed over all servers in turn.",
        above=0,
        identity=False,
    )
    dtype: str = setting(
        "auto",
        "`vllm`: dtype that the server computes in. `auto`: the dtype of training. The dequantised base of "
        "method=qlora is written in it.",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    args: Any = setting(
        None,
        "`vllm`: further arguments of `vllm serve`, a mapping such as {gpu-memory-utilization: 0.4}.",
        identity=False,
    )
    start_s: float = setting(
        900.0,
        "`vllm`: time that a server has to start, or a server of `rollout.urls` to answer again.",
        unit="seconds",
        above=0,
        identity=False,
    )
    max_gap: float | None = setting(
        None,
        "`vllm`: largest mean of |log π − log p| over an update's tokens, where p is the probability of the token "
        "that the server reports. Beyond it the run stops. Empty: 0.001 with dtype=float32, 0.1 with bfloat16, 0.05 "
        "with float16.",
        unit="nats",
        above=0,
        identity=False,
    )

    def check_together(self) -> None:
        defaults = get_defaults(type(self))
        changes = {key: getattr(self, key) for key in OF_VLLM if getattr(self, key) != defaults[key]}
        for key, value in changes.items():
            is_read = self.engine == "vllm"
            require(is_read, f"rollout.{key}", value, "is a setting of rollout=vllm", "Add rollout=vllm, or drop it.")
        check_args("rollout.args", self.args, DECIDED)
        addresses = [url.rstrip("/") for url in self.urls]
        for url in self.urls:
            remedy = "Write http://HOST:PORT, without a path or a password."
            require(is_server_url(url), "rollout.urls", url, "is no address of a server", remedy)
        for address in addresses:
            is_unique = addresses.count(address) == 1
            require(is_unique, "rollout.urls", address, "is given twice", "Name each server once.")
        for key in ("python", "replicas", "args"):
            problem = "applies to servers that align starts, and rollout.urls names running servers"
            is_allowed = not self.urls or key not in changes
            require(is_allowed, f"rollout.{key}", changes.get(key), problem, "Leave one of the two out.")

    @property
    def words(self) -> Sequence[str]:
        """`args` as words of the command line of `vllm serve`, such as `--gpu-memory-utilization=0.4`."""
        return format_arguments(self.args)


def is_server_url(url: str) -> bool:
    """Return whether a URL has the form `http(s)://HOST[:PORT]`, with at most a slash behind it."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:  # an invalid port or IPv6 address
        return False
    has_more = parts.path not in ("", "/") or parts.query or parts.fragment or "@" in parts.netloc
    has_host = bool(parts.hostname) and re.search(r"[\s;,]", parts.netloc) is None
    return parts.scheme in ("http", "https") and has_host and not has_more and port != 0


SYSTEMS = "systems"
JUDGE = "judge"


@dataclass
class SuiteConfig(Settings):
    """The tasks for the systems of `stage.systems`, and the scoring of their answers."""

    AT: ClassVar[str] = "eval"

    name: str = setting("judged", "The suite's name.", identity=False)
    measures: str = setting(
        SYSTEMS,
        "What is measured: the systems of `stage.systems` (systems), or the judge, on pairs of `data=` (judge).",
        choices=(SYSTEMS, JUDGE),
    )
    asks: str = setting(
        "",
        "With `measures=judge`: the yes/no question about an answer on which the judge is measured: its text, or the "
        "name of a built-in question (refuses). `data=` then has answers with labels, true for yes. Empty: the judge "
        "is "
        "measured on pairs.",
    )
    tasks: Any = setting(
        None,
        "List of tasks, such as {name: NAME, path: FILE, check: {kind: regex, pattern: yes}, prompts: 200}. Without "
        "`path` a task asks the held-out prompts of `data=`; `set: harmful` and `set: harmless` are built-in sets of "
        "prompts. With `asks: QUESTION` a language model answers a yes/no question about each answer (`asks: "
        "refuses`). "
        "Without `asks`, without `check`, and without one in its rows, the judge of `reward=` scores. With `probe: "
        "choice` or `probe: loss` it asks for no answers and measures log-likelihoods; {name: NAME, lm_eval: TASK, "
        "include: FOLDER} is a task of lm-eval. Empty: one task with a judge.",
    )
    closed: bool | None = setting(
        None,
        "Whether many prompts may share one right answer, so that equal answers are no sign of collapse: the artifact "
        "must then beat the best constant answer. Empty: true with reward=check, and of tasks whose checks are of the "
        "kinds exact, regex or json_schema or that ask whether answers refuse.",
    )
    gates: Any = setting(
        None,
        "Conditions that the first system has to meet, such as {name: safe, task: support, against: old, is: "
        "not_worse, "
        "margin: 0.05, least_n: 200}. On a task that a judge scores, a gate requires the judge's card (`stage.card`), "
        "with an agreement above `min_agreement` (0.6). A gate fails if the system collapsed, unless the gate says "
        "`collapsed: true`. "
        "A gate that is not passed ends the run with status 3 (see `gate_family`). If the evaluation is repeated as "
        "data arrive, a gate's `max_n` plans the largest number of independent items.",
    )
    gate_family: str = setting(
        "all",
        "Gates that have to pass for exit status 0. `all`: every gate. `any`: at least one; Holm's rule then raises "
        "the gates' levels, so that the probability of any wrong pass stays that of one gate.",
        choices=("all", "any"),
    )
