"""The model card (`README.md`) of an export: its kind, training history, measurements, and code to load it.

`templates/card.md` holds the text, and this module computes its values.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment
from markupsafe import Markup

from align.core.errors import InputError
from align.core.files import has_file, read_bytes
from align.data.sources import get_licence
from align.export.bases import require_findable_base
from align.export.history import SETTINGS
from align.export.launch import LAUNCH, TEMPLATES
from align.export.receipt_rows import (
    CHOICES,
    HEADS,
    MADE_ANEW,
    ReceiptCheck,
    build_table_rows,
    find_divergence_on_original,
)
from align.export.trained_model import TrainedModel
from align.models.adapters import read_adapter_config
from align.models.base import to_public_base
from align.models.dequantised import DEQUANTISED
from align.models.load import get_dtype_name
from align.report import format_interval
from align.report.figure_text import FEW
from align.report.page import create_template_environment
from align.run import Base
from align.run.weights import build_local_base_name

# Absolute paths: at the start or after a blank, quote or bracket, so that https://… and org/name do not match.
ABSOLUTE = re.compile(r"""(?:^|(?<=[\s"'`(=\[]))(?:/[\w.@+-]+/[\w./@+-]+|~/\S+|[A-Za-z]:\\\S+)|file://\S+""")
KINDS = {
    "adapter": "A LoRA adapter",
    "merged": "A model with its adapter merged in",
    "gguf": "A model and its LoRA adapter as GGUF",
}
OPTIONAL = (
    *("method", "precision", "computed", "dtype", "into", "parents", "system", "folded", "seed", "data", "judge"),
    *("metrics", "losses", "measured", "sampled", "receipt", "licences", "license", "language", "tags", "notes"),
    *("served", "launch", "modelfile", "linked", "score", "accuracy", "collapse"),
)
TITLES = {
    "sft": "Supervised fine-tuning",
    "full": "Supervised fine-tuning of all weights",
    "reward": "Reward model on preferences",
    "ppo": "PPO against the reward model",
    "dpo": "Direct preference optimisation",
    "kto": "KTO on labelled answers",
}
PAIRS = {
    "accuracy": "pairs in the order of the labels",
    "accuracy_noiseless": "pairs in the order without the noise",
    "ceiling": "labels in that order",
}
"""Metric of a reward model on held-out preference pairs → its label in the model card."""
SERVERS = {"align": "align, on a CPU", "vllm": "vLLM", "llama-server": "llama.cpp's own server"}
"""Name of a launch script without its suffix → the server that it starts, in the order of the model card."""


def render_card(facts: Mapping[str, Any]) -> str:
    """Render the text of an export's `README.md`, a model card with YAML front matter, from the given facts.

    Args:
        facts: values of the card, all optional except the first three:
            `name`; `kind` (`adapter`, `merged` or `gguf`); `base` (`id`, `revision`, `digest`);
            `method` (`qlora`, `lora`, `full`); `precision` of the base in training (`nf4`, `bfloat16`, `float32`);
            `computed`, the dtype of computation, also on NF4; `dtype` of a merged model; `into`, `nf4-dequantised` or
            `original`;
            `parents` in order of training, each `{stage, name, digest}` and, if known, `settings` from
            `align.export.history`; `system`, the system prompt from there; `seed`; `data`, names of data sets;
            `folded`, a sentence from `describe_folded_scale`;
            `judge`, the gold scorer's name; `metrics`, as `align.evals.suite.samples.summarise_samples` returns them;
            `losses` before and after supervised training; `measured`, the data that `losses`, `metrics` or `accuracy`
            were measured on; `sampled`, the sampling settings; `accuracy`, metrics on held-out pairs; `score`, of a
            reward model: the token that its score is read at; `collapse`, the verdict on whether its answers hardly
            depend on the prompt;
            `receipt`, a list of `align.export.receipt_rows.ReceiptCheck`;
            `served`, the name in the launch files; `launch`, their names without `.sh`; `modelfile`, True if the export
            has one; `linked`, the base that the export's link leads to, `nf4-dequantised` or `original`;
            `licences`, pairs of source and licence, the base first; `license`, `language`, `tags`; `notes`, a
            paragraph.

    Raises:
        InputError: A value names a path of this machine.
    """
    base = facts["base"]
    require_findable_base(base)
    contents = ("system", "collapse")
    for key, text in iter_texts({name: fact for name, fact in facts.items() if name not in contents}):
        if ABSOLUTE.search(text):
            raise InputError(key, text, "is a path of this machine, which does not exist on others", "Name it instead.")
    checks = facts.get("receipt") or []
    accuracy = facts.get("accuracy") or {}
    identity_values = {
        "base model": base["id"],
        "base revision": base.get("revision"),
        "base digest": base.get("digest"),
        "weights": facts.get("dtype") if facts["kind"] == "merged" else None,
        "seed": facts.get("seed"),
    }
    # QLoRA means NF4.
    precision = facts.get("precision") or ("nf4" if facts.get("method") == "qlora" else "")
    values = dict.fromkeys(OPTIONAL) | dict(facts) | {"precision": precision}
    return (
        load_card_templates()
        .get_template("card.md")
        .render(
            values,
            scores="score" in facts,
            front_matter=build_front_matter(facts),
            kinds=KINDS,
            titles=TITLES,
            identity=[row for row in identity_values.items() if row[1] not in (None, "")],
            settings_headers=list(SETTINGS),
            settings=[
                (f"{run['stage']}/{run['name']}", *(run["settings"].get(name, "") for name in SETTINGS))
                for run in facts.get("parents", ())
                if run.get("settings")
            ],
            pair_figures=[(label, format_metric(accuracy[key])) for key, label in PAIRS.items() if key in accuracy],
            few=FEW,
            receipt_headers=HEADS,
            receipt_rows=build_table_rows(checks),
            gap=find_divergence_on_original(checks),
            choices=CHOICES,
            made_anew=MADE_ANEW,
            load=build_load_values(facts, precision),
            base_name=build_local_base_name(base),
            dequantised=DEQUANTISED,
            servers=[(script, server) for script, server in SERVERS.items() if script in facts.get("launch", ())],
        )
    )


@cache
def load_card_templates() -> Environment:
    environment = create_template_environment(TEMPLATES)
    environment.keep_trailing_newline = True
    environment.finalize = lambda value: value if isinstance(value, Markup) else Markup(to_one_line(value))
    environment.filters |= {
        "json": lambda value: Markup(quote_json(value)),
        "code": lambda text: Markup(" ".join(text.replace("`", "'").split())),
        "figure": format_metric,
        "sentence": lambda text: text[:1].upper() + text[1:],
    }
    return environment


def to_one_line(value: Any) -> str:
    """Return a value as one line of text with `|`, backticks and `<` escaped or replaced, for a Markdown table or code
    span."""
    text = str(value).replace("|", "\\|").replace("`", "'").replace("<", "&lt;")
    return " ".join(text.split())


def quote_json(value: Any) -> str:
    """Return a value as a JSON literal, which is also valid in Python and YAML.

    The quotes keep a name from ending its string.
    """
    return json.dumps(value, ensure_ascii=False)


def format_metric(figure: Any) -> str:
    if isinstance(figure, Mapping):
        return format_interval(figure, ".4g")
    return str(figure) if isinstance(figure, int) or not math.isfinite(figure) else f"{figure:.4g}"


def iter_texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield (dotted key, text) for each string in nested mappings and lists."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield from iter_texts(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, (list, tuple)):
        for i, inner in enumerate(value):
            yield from iter_texts(inner, f"{key}[{i}]")


def build_front_matter(facts: Mapping[str, Any]) -> dict[str, Any]:
    kind = facts["kind"]
    is_finetune = facts.get("method") == "full" or kind == "merged"
    tags = ["align"]
    if not is_finetune:
        tags.append("lora")
    if kind == "gguf":
        tags.append("gguf")
    if "score" in facts:
        tags.append("reward-model")
    fields: dict[str, Any] = {}
    if facts["base"].get("revision"):  # the hub would link any other name to a repository
        fields["base_model"] = facts["base"]["id"]
        fields["base_model_relation"] = "finetune" if is_finetune else "adapter"
    if kind != "gguf":  # GGUF belongs to no single library
        fields["library_name"] = "peft" if kind == "adapter" else "transformers"
    fields["pipeline_tag"] = "text-classification" if "score" in facts else "text-generation"
    stages = [str(parent["stage"]) for parent in facts.get("parents", ())]
    fields["tags"] = list(dict.fromkeys([*tags, *stages, *facts.get("tags", ())]))
    base_licence = next((licence for _, licence in facts.get("licences", ())), "")
    if base_licence:
        fields["license"] = base_licence
    return fields | {key: facts[key] for key in ("license", "language") if facts.get(key)}


def build_load_values(facts: Mapping[str, Any], precision: str) -> dict[str, Any]:
    """Return the template values for the Python code that loads an export, such as its model class, imports and
    arguments.

    An adapter on the base it was trained on is loaded in the dtype of training, as in the receipt. Weights that were
    written for the export, a merged model or a dequantised base, are loaded in their own dtype.

    Args:
        precision: precision of the base in training.
    """
    base = facts["base"]
    merged = facts["kind"] == "merged"
    scores = "score" in facts
    linked = facts.get("linked")
    dtype = facts.get("computed") or {"nf4": "bfloat16"}.get(precision, precision)
    dtype_arguments = ['dtype="auto"']
    if not (merged or linked == DEQUANTISED or not dtype):
        dtype_arguments = [f"dtype=torch.{dtype}", *(["quantization_config=nf4"] if precision == "nf4" else [])]
    nf4 = "quantization_config=nf4" in dtype_arguments
    headless = scores and not merged
    labels = ["num_labels=1"] if headless else []
    if merged:
        location = ["folder"]
    else:
        location = [f"folder + {quote_json('/' + build_local_base_name(base))}" if linked else quote_json(base["id"])]
        if base.get("revision"):
            location.append(f"revision={quote_json(base['revision'])}")
    model_class = "AutoModelForSequenceClassification" if scores else "AutoModelForCausalLM"
    return {
        "model_class": model_class,
        "imports": [
            model_class,
            "AutoTokenizer",
            *(["BitsAndBytesConfig"] if nf4 else []),
            *(["logging"] if headless else []),
        ],
        "arguments": [*location, *labels, *dtype_arguments],
        "auto_arguments": ['"."', *labels, *dtype_arguments],
        "numbers": dtype_arguments,
        "nf4": nf4,
        "dtype": dtype,
        "headless": headless,
    }


def collect_export_facts(
    trained: TrainedModel,
    kind: str,
    folder: Path,
    name: str,
    checks: Sequence[ReceiptCheck],
    dtype: str,
    base_weights: str,
) -> dict[str, Any]:
    """Return the facts about an export's model, precision and files that `render_card` needs.

    Args:
        folder: its folder, with launch files and Modelfile.
        name: its name in the launch files.
    """
    base = to_public_base(trained.origin)
    link = folder / build_local_base_name(base)
    facts: dict[str, Any] = {}
    if kind != "merged" and trained.adapter is not None:
        facts["folded"] = describe_folded_scale(read_adapter_config(trained.adapter, "artifact", is_only_adapter=True))
    if link.is_symlink():
        facts["linked"] = "original" if link.resolve() == Path(trained.base.path).resolve() else DEQUANTISED
    if trained.prompts.is_reward_model:
        facts["score"] = trained.tokenizer.convert_ids_to_tokens(trained.rows[0][-1])
    return facts | {
        "kind": kind,
        "base": base,
        "method": trained.method,
        "precision": "nf4" if trained.kind == "nf4" else get_dtype_name(trained.dtype),
        "computed": get_dtype_name(trained.dtype),
        "dtype": dtype,
        "into": base_weights,
        "served": name if (folder / LAUNCH).is_dir() else "",
        "launch": sorted(path.stem for path in (folder / LAUNCH).glob("*.sh")),
        "modelfile": (folder / "Modelfile").is_file(),
        "receipt": checks,
    }


def describe_folded_scale(config: Mapping[str, Any]) -> str:
    """Return a sentence on the LoRA scale that was folded into an adapter's exported weights, or an empty text for
    scale 1.

    Engines get scale 1, as alpha is the rank.
    """
    r = config.get("r")
    alpha = config.get("lora_alpha")
    is_rslora = config.get("use_rslora")
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        return "The scales of its layers, which differ, are folded into the weights here; alpha is the rank."
    if not r or alpha is None or alpha / (math.sqrt(r) if is_rslora else r) == 1:
        return ""
    scale = f"rsLoRA's {alpha:g}/√{r}" if is_rslora else f"LoRA's {alpha:g}/{r}"
    return f"Its scale, {scale}, is folded into the weights here: alpha is the rank."


def list_licences(data: Sequence[str], base: Base) -> list[tuple[str, str]]:
    """Return (source, licence) for the base model and each data set of an export, with an empty licence if unknown."""
    base_licence = read_licence(Path(base.path))
    return [
        (f"base {to_public_base(base)['id']}", base_licence),
        *((f"data {name}", get_licence(name)) for name in data),
    ]


def read_licence(folder: Path) -> str:
    """Return the `license` field in the front matter of a model folder's `README.md`, or an empty text if there is
    none."""
    card = folder / "README.md"
    text = read_bytes(card, card.name).decode("utf-8", "replace") if has_file(card, card.name) else ""
    front = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    try:
        metadata = yaml.safe_load(front[1]) if front else None
    except yaml.YAMLError:
        return ""
    return str(metadata.get("license") or "") if isinstance(metadata, dict) else ""
