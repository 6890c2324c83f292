"""The groups that stages share: base weights, method, data, rollouts, tracking, exports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from align.config.settings import MOST, Settings, setting
from align.errors import require


@dataclass
class ModelConfig(Settings):
    """The base weights."""

    AT: ClassVar[str] = "model"

    path: str | None = setting(
        None,
        "A folder, a hub id, or a model that comes with a package: `pocket`, `smollm2`. Empty: the base of the "
        "artifact that the stage starts from, and `pocket` where it starts from none.",
        names="base",
    )
    revision: str | None = setting(None, "Commit, tag or branch of a hub id.", names="base")

    def check_together(self) -> None:
        require(
            self.revision is None or bool(self.path), "model.revision", self.revision, "is of no model",
            "Name the model too: model=hub model.path=ORG/NAME.",
        )  # fmt: skip


ALL_LINEAR = "all-linear"
OF_ADAPTERS = ("r", "alpha", "dropout", "targets", "rslora", "dora")
"""Keys of `method` that say how a fresh adapter is made."""


@dataclass
class MethodConfig(Settings):
    """Which weights train, and in what precision the others are kept: LoRA on an NF4 base (`qlora`), LoRA on the base
    as it is (`lora`), every weight (`full`). `auto` is the method of the adapter that a stage starts from, and `qlora`
    where it starts from a whole model."""

    AT: ClassVar[str] = "method"

    name: str = setting("auto", "The method.", choices=("auto", "qlora", "lora", "full"))
    r: int = setting(16, "Rank of a fresh adapter.", above=0)
    alpha: int = setting(32, "Scale of a fresh adapter: what it adds is multiplied by alpha / r.", above=0)
    dropout: float = setting(
        0.0,
        "Share of an adapter's inputs that supervised training leaves out at random; rewards, DPO and PPO never do.",
        at_least=0, below=1,
    )  # fmt: skip
    targets: Any = setting(
        ALL_LINEAR,
        "Layers that a fresh adapter is put on: `all-linear`, or a list of their names, such as [q_proj, v_proj].",
    )
    rslora: bool = setting(False, "Scale by alpha / √r (rsLoRA), for ranks above some 64.")
    dora: bool = setting(
        False, "Train the norm of each column of a weight apart from its direction (DoRA). Slower; exported merged."
    )
    lr: float = setting(
        2e-4,
        "Learning rate of `stage=sft` and `stage=full`, a default for each method. `stage.lr` overrides it.",
        above=0,
    )

    def check_together(self) -> None:
        names = isinstance(self.targets, list | tuple) and all(isinstance(t, str) and t for t in self.targets)
        require(
            self.targets == ALL_LINEAR or (names and len(self.targets) > 0), "method.targets", self.targets,
            "is no list of names of layers", "Write method.targets=all-linear, or method.targets=[q_proj,v_proj].",
        )  # fmt: skip
        if names:  # their order says nothing: the same run however they are written
            object.__setattr__(self, "targets", sorted({*self.targets}))  # also of a frozen instance
        if self.name == "full":
            self.refuse_others({}, "method=full trains every weight", "Drop it, or use method=lora.")

    def refuse_others(self, made: Mapping[str, Any], why: str, remedy: str) -> None:
        """Raises: InputError: a setting of fresh adapters is given, where none is made, and is not what was made.

        Args:
            made: such settings of the adapter that is there.
            why: none is made.
        """
        for key in OF_ADAPTERS:
            value = getattr(self, key)
            plain = list(value) if isinstance(value, tuple) else value
            same = plain in (getattr(type(self), key), made.get(key))
            require(same, f"method.{key}", value, f"is of a fresh adapter: {why}", remedy)


@dataclass
class DataConfig(Settings):
    """Where conversations, texts or preference pairs come from: the corpus of the built-in model (`chitchat`), a file
    (`jsonl`), or the votes of the annotation store (`annotations`)."""

    AT: ClassVar[str] = "data"

    name: str = setting("chitchat", "The source.", choices=("chitchat", "jsonl", "annotations"))
    path: str | None = setting(None, "The file of data=jsonl, or hub:ORG/NAME/FILE.", names="data")
    part: str | None = setting(None, "Part of the corpus chitchat: `base` is plain text. Empty: what the stage needs.")
    template: str | None = setting(
        None, "Chat template. Empty: that of the tokenizer, or of the artifact.", choices=("chatml",)
    )
    template_kwargs: Any = setting(
        None,
        "Arguments of the chat template, a mapping such as {enable_thinking: false}. They travel with the artifact; "
        "given again, they replace those that it has.",
    )
    reasoning: str = setting(
        "keep",
        "What becomes of the reasoning that an answer begins with (`<think>…</think>`, or a message's "
        "`reasoning_content`): trained on (`keep`), read and not trained on (`mask`), or left out (`hide`).",
        choices=("keep", "mask", "hide"),
    )
    max_length: int = setting(1024, "Longest row.", unit="tokens", above=0)
    too_long: str = setting(
        "drop",
        "What becomes of a conversation that is longer: left out (`drop`), or cut there (`truncate`), in supervised "
        "training; its last answer then teaches no end. Prompts and pairs that are longer are left out.",
        choices=("drop", "truncate"),
    )
    system: str | None = setting(
        None,
        "System prompt of conversations that have none. Not given: that of the run that the stage starts from, if it "
        "had one. Empty (`data.system=`): none.",
    )
    held_out: float = setting(
        0.05,
        "Share of a file that is kept for measuring, by the hash of what each row asks. 0: all of it is trained on; 1: "
        "all of it is measured on.",
        at_least=0, at_most=1,
    )  # fmt: skip
    eval_path: str | None = setting(
        None,
        "A file to measure on, or hub:ORG/NAME/FILE. All of data.path is then trained on, except rows that ask what "
        "this file asks.",
        names="eval_data",
    )
    on_bad_row: str = setting(
        "error",
        "What becomes of rows that cannot be kept as they are: their file is refused (`error`), or they are left out "
        "and counted (`skip`).",
        choices=("error", "skip"), later=True,
    )  # fmt: skip
    limit: int | None = setting(
        None, "Most rows of each side that are used, after they were shuffled. Empty: all.", above=0
    )
    allow_simulated: bool = setting(False, "Whether votes of simulated annotators count.")

    def check_together(self) -> None:
        require(
            self.template_kwargs is None or isinstance(self.template_kwargs, dict), "data.template_kwargs",
            self.template_kwargs, "is no mapping", 'Write "data.template_kwargs={enable_thinking: false}".',
        )  # fmt: skip
        for name, value in (self.template_kwargs or {}).items():
            key, number = f"data.template_kwargs.{name}", isinstance(value, int | float)
            require(
                str(name).isidentifier(), key, value, "is no name of a variable", "Write for example enable_thinking."
            )
            plain = abs(value) <= MOST if number else isinstance(value, str) and "#}" not in value
            require(plain, key, value, "is no value of a template's argument", "Give text, a number, true or false.")
        require(
            self.path is None or self.name == "jsonl", "data.path", self.path, f"data={self.name} reads no file",
            "Add data=jsonl, or drop data.path.",
        )  # fmt: skip
        require(
            self.eval_path is None or self.name == "jsonl", "data.eval_path", self.eval_path,
            f"data={self.name} has a side of its own to measure on", "Add data=jsonl and data.path, or drop it.",
        )  # fmt: skip
        require(
            self.eval_path is None or self.held_out in (0, DataConfig.held_out), "data.held_out", self.held_out,
            "data.eval_path is measured on, and nothing is held out of data.path", "Drop one of the two.",
        )  # fmt: skip
        if self.eval_path is not None:
            object.__setattr__(self, "held_out", 0.0)  # however it is said, it is the same run
        blank = bool(self.system) and not str(self.system).strip()
        require(not blank, "data.system", self.system, "is blank", "Give its text, or leave it out.")
        require(
            self.name != "jsonl" or bool(self.path), "data.path", self.path or "(empty)", "data=jsonl reads a file",
            "Add data.path=FILE.jsonl.",
        )  # fmt: skip


@dataclass
class RolloutConfig(Settings):
    """How responses are sampled. No top-k, top-p or penalty exists: samples must come from the distribution whose
    logprobs are used."""

    AT: ClassVar[str] = "rollout"

    engine: str = setting("hf", "What generates.", choices=("hf",))
    max_new_tokens: int = setting(256, "Longest response.", unit="tokens", above=0)
    temperature: float = setting(1.0, "Divides the logits before sampling.", above=0)
    batch_size: int = setting(128, "Responses that are generated together.", above=0)
    reasoning: str = setting(
        "keep",
        "Whether rewards, judges and annotators read the reasoning that an answer begins with (`keep`), or the answer "
        "alone (`hide`). A reward model is then to be trained on answers alone: data.reasoning=hide.",
        choices=("keep", "hide"),
    )


@dataclass
class TrackConfig(Settings):
    """Where metrics go besides `metrics.jsonl`."""

    AT: ClassVar[str] = "track"

    name: str = setting("none", "The service.", choices=("none", "wandb"))
    project: str = setting("align", "The project at the service.")


QUANTISED = ("q8_0", "q4_k_m")


@dataclass
class ExportConfig(Settings):
    """What an export writes: an adapter in PEFT's format (`adapter`), a model with it merged in or one that is whole
    (`merged`), either for llama.cpp (`gguf`), or `all` of these that there are. `check` measures an export again."""

    AT: ClassVar[str] = "export"

    name: str = setting("adapter", "What is written.", choices=("adapter", "merged", "gguf", "all", "check"))
    dtype: str = setting(
        "bfloat16",
        "Number format of a merged or whole model, and of the base beside an adapter.",
        choices=("float32", "bfloat16", "float16"),
    )
    into: str = setting(
        "auto",
        "What is merged into: `auto` is the base as the adapter knows it, NF4 dequantised; or the original weights.",
        choices=("auto", "original"),
    )  # fmt: skip
    base: str = setting("auto", "`none` leaves the base beside an adapter out.", choices=("auto", "none"))
    require: list[str] = setting(
        [], "Engines that must have been asked for the receipt.", choices=("transformers", "llama.cpp", "vLLM")
    )
    accept: list[str] = setting(
        [],
        "Names of checks that may miss their bounds: the export is published all the same, and its receipt says so.",
    )
    path: str | None = setting(None, "The folder that export=check measures again.")
    llama_cpp: str = setting("auto", "The Python that has llama.cpp: `auto` is this one, `none` does not ask it.")
    vllm: str = setting("auto", "The Python that has vLLM: `auto` is this one, `none` does not ask it.")
    converters: str | None = setting(None, "Folder with llama.cpp's converters. Empty: those that were downloaded.")
    quantised: list[str] = setting(
        list(QUANTISED), "Variants of a GGUF base, or whole model, in fewer bits.", choices=QUANTISED
    )

    def check_together(self) -> None:
        require(
            (self.path is not None) == (self.name == "check"), "export.path", self.path,
            "is the folder that export=check measures again",
            "Write export=check export.path=FOLDER, or leave it out.",
        )  # fmt: skip
