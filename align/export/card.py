"""The model card of an export: what it is, where it comes from, how good it is, and how to load it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from align.core.errors import InputError
from align.core.files import has_file, read_bytes
from align.data.sources import licence_of
from align.export.folder import ABSOLUTE, check_base
from align.export.history import SETTINGS
from align.export.launch import LAUNCH
from align.export.markdown import one_line, table
from align.export.receipt_rows import HEADS, Check, cells, gap_in
from align.export.snippet import loading, precision_of
from align.export.trained import Trained
from align.models.adapter_files import adapter_config
from align.models.base import named_base
from align.models.dequantised import DEQUANTISED
from align.models.load import name_of
from align.report import in_words
from align.report.words import FEW
from align.run import Base
from align.run.weights import local_base_name

KINDS = {
    "adapter": "A LoRA adapter",
    "merged": "A model with its adapter merged in",
    "gguf": "A model and its LoRA adapter as GGUF",
}
REQUIRED = ("name", "kind", "base")
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


def render_card(facts: Mapping[str, Any]) -> str:
    """`README.md` with the front matter that the hub reads.

    Args:
        facts: a plain mapping, everything but the first three optional:
            `name`; `kind` (`adapter`, `merged` or `gguf`); `base` (`id`, `revision`, `digest`);
            `method` (`qlora`, `lora`, `full`); `precision` of the base in training (`nf4`, `bfloat16`, `float32`);
            `computed`, the dtype that it was computed in, NF4 too;
            `dtype` of a merged model; `into`, `nf4-dequantised` or `original`;
            `parents` in order of training, each `{stage, name, digest}` and, where they are known, its `settings` as
            `align.export.history` has them; `system`, the prompt that they were trained with, as it has that; `seed`;
            `folded`, what became of the scale of the adapter that was trained;
            `data`, a list of data set names; `judge`, the gold scorer's name; `metrics`, the layout of
            `align.evals.suite.samples.summarise`; `losses` before and after supervised training; `measured`, the data
            that these, `metrics` or `accuracy` were measured on, and `sampled`, how answers were sampled; `licences`,
            pairs of what it was made of and that licence, the base first; `receipt`, a list of
            `align.export.receipt_rows.Check`; `served`, the name that the launch files give it; `launch`, their own
            names without `.sh`; `modelfile`, whether there is one; `linked`, what the link to an adapter's base leads
            to, `nf4-dequantised` or `original`, where there is one; `score`, of a reward model: the token that its
            score is read at, and `accuracy`, its figures on held-out pairs; `collapse`, the verdict on whether its
            answers are nearly the same whatever is asked;
            `license`, `language`, `tags`; `notes`, a paragraph.

    Raises:
        ValueError: a key or `kind` is unknown.
        InputError: a value names a path of this machine.
    """
    if unknown := facts.keys() - {*REQUIRED, *OPTIONAL}:
        raise ValueError(f"a card has no {sorted(unknown)[0]!r}; it has {', '.join((*REQUIRED, *OPTIONAL))}")
    if missing := {*REQUIRED} - facts.keys():
        raise ValueError(f"a card needs {sorted(missing)[0]!r}")
    if facts["kind"] not in KINDS:
        raise ValueError(f"kind={facts['kind']!r} is none of {', '.join(KINDS)}")
    check_base(facts["base"])
    contents = ("system", "collapse")
    for key, text in _texts({name: fact for name, fact in facts.items() if name not in contents}):
        if ABSOLUTE.search(text):
            raise InputError(key, text, "is a path of this machine, which means nothing elsewhere", "Name it instead.")
    sections = (_what(facts), _training(facts), _evaluation(facts), _fidelity(facts), _licences(facts), loading(facts))
    return _front_matter(facts) + f"\n# {one_line(facts['name'])}\n\n" + "\n".join(s for s in sections if s)


def _front_matter(facts: Mapping[str, Any]) -> str:
    kind = facts["kind"]
    whole, score = facts.get("method") == "full", "score" in facts
    tags = [*([] if whole or kind == "merged" else ["lora"]), *(["gguf"] if kind == "gguf" else [])]
    tags += ["reward-model"] if score else []
    library = {"adapter": "peft", "merged": "transformers"}.get(kind)  # GGUF is of no one library
    known = bool(facts["base"].get("revision"))  # a name that is no hub's would be linked to somebody's repository
    fields: dict[str, Any] = {
        **({"base_model": facts["base"]["id"]} if known else {}),
        **({"base_model_relation": "finetune" if whole or kind == "merged" else "adapter"} if known else {}),
        **({"library_name": library} if library else {}),
        "pipeline_tag": "text-classification" if score else "text-generation",
        "tags": list(dict.fromkeys(["align", *tags, *_stages(facts), *facts.get("tags", ())])),
    }
    base_licence = next((licence for _, licence in facts.get("licences", ())), "")
    fields |= {"license": base_licence} if base_licence else {}
    fields |= {key: facts[key] for key in ("license", "language") if facts.get(key)}
    # JSON is YAML: quoted so, no name can end the string it stands in.
    lines = (f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in fields.items())
    return "---\n" + "\n".join(lines) + "\n---\n"


def _what(facts: Mapping[str, Any]) -> str:
    base, merged = facts["base"], facts["kind"] == "merged"
    whole = "A model as GGUF" if facts["kind"] == "gguf" else "A model"
    what = whole if facts.get("method") == "full" else KINDS[facts["kind"]]
    rows = [("base model", base["id"]), ("base revision", base.get("revision")), ("base digest", base.get("digest"))]
    rows += [("weights", facts.get("dtype") if merged else None), ("seed", facts.get("seed"))]
    notes = f"\n{one_line(facts['notes'])}\n" if facts.get("notes") else ""
    use = "that scores chats, a reward model" if "score" in facts else "for chat"
    return f"{what} {use}, made with `align`.\n{notes}\n" + table(("", ""), [r for r in rows if r[1] not in (None, "")])


def _training(facts: Mapping[str, Any]) -> str:
    text = "## Training\n\n"
    for i, parent in enumerate(facts.get("parents", ()), 1):
        digest = f", sha256 `{one_line(parent['digest'])}`" if parent.get("digest") else ""
        title = TITLES.get(parent["stage"], parent["stage"])
        text += f"{i}. {one_line(title)}: `{one_line(parent['stage'])}/{one_line(parent['name'])}`{digest}\n"
    if facts.get("data"):
        text += f"\nData: {', '.join(one_line(name) for name in facts['data'])}.\n"
    known = [parent for parent in facts.get("parents", ()) if parent.get("settings")]
    if known:
        rows = [(f"{p['stage']}/{p['name']}", *(p["settings"].get(name, "") for name in SETTINGS)) for p in known]
        text += "\n" + table(("run", *SETTINGS), rows)
    if system := facts.get("system"):
        text += f"\n`{one_line(system['run'])}` was trained with a system prompt, which the code below says too"
        text += f"; `{one_line(system['without'])}` was trained without one" if system.get("without") else ""
        text += f":\n\n> {one_line(system['text'])}\n"
    folded = f" {facts['folded']}" if facts.get("folded") else ""
    return text + f"\n{_trained_on(facts)}{folded}\n"


def _trained_on(facts: Mapping[str, Any]) -> str:
    """Which numbers the adapter learnt to correct: put on others it is another model."""
    if facts.get("method") == "full":
        trained = "All weights were trained; there was no adapter."
        return trained if facts.get("parents") else "Nothing says how it was trained."
    precision = precision_of(facts)
    if precision != "nf4":
        return f"Trained on the base in {one_line(precision or 'the precision it is published in')}, not quantised."
    start = "Trained on the base quantised to NF4 (4 bits, double quantisation). "
    if facts["kind"] == "merged" and facts.get("into") == "original":
        return start + "Merged into the original weights, on which it is measurably another model."
    if facts["kind"] == "merged":
        return start + "Merged into that base dequantised, not into the original weights."
    if facts["kind"] == "gguf" and facts.get("into") == "original":
        return start + "The base here is of the original weights, on which it is measurably another model."
    if facts["kind"] == "gguf":
        return start + "The base here is that one dequantised, not the original weights."
    return start + "Load it on the same: on the original weights it is measurably another model."


PAIRS = {
    "accuracy": "pairs in the order of the labels", "accuracy_noiseless": "pairs in the order without the noise",
    "ceiling": "labels in that order",
}  # fmt: skip
"""What a reward model was found to be on held-out pairs."""


def _evaluation(facts: Mapping[str, Any]) -> str:
    if accuracy := facts.get("accuracy"):
        rows = [(words, _with_interval(accuracy[key])) for key, words in PAIRS.items() if key in accuracy]
        pairs = f"On held-out pairs{_of(facts)}; brackets are 95 % intervals."
        return f"## Evaluation\n\n{pairs}\n\n" + table(("", "share"), rows)
    collapse = facts.get("collapse", {})
    collapsed = ""
    if collapse.get("verdict") == "collapsed":
        reasons = "; ".join(map(one_line, collapse["reasons"]))
        collapsed = f"**This model collapsed:** {reasons}. A win rate is no evidence of its quality.\n\n"
    metrics = facts.get("metrics")
    if not metrics:
        losses = _losses(facts)
        return f"{losses or '## Evaluation'}\n\n{collapsed}" if collapsed else losses
    judge = f" by {one_line(facts['judge'])}" if facts.get("judge") else ""
    won = metrics["win_rate"]
    role = "proxy" if "proxy" in metrics else "gold"  # whose scores are optimised is no evidence of quality
    scores = metrics[role]
    rows = [
        ("win rate by a proxy" if role == "proxy" else "win rate", _with_interval(won), ""),
        (f"{role} score{judge}", _number(scores["policy"]), _number(scores["ref"])),
        (f"{role} difference", _with_interval(scores["difference"]), ""),
        ("KL from the start, nats a response", _with_interval(metrics.get("kl_interval", metrics["kl"])), ""),
    ]
    for key, label in (
        ("length", "length, tokens"),
        ("distinct1", "distinct-1"),
        ("distinct2", "distinct-2"),
    ):
        if key in metrics:
            rows.append((label, _number(metrics[key]["policy"]), _number(metrics[key]["ref"])))
    if ended := metrics.get("eos_rate"):
        cut = {who: f"{1 - share:.0%}" for who, share in ended.items()}
        rows.append(("answers cut at the most tokens", cut["policy"], cut["ref"]))
    notes = "".join(f" {note[0].upper()}{note[1:]}." for note in map(one_line, metrics.get("judge_notes", ())))
    sampled = f" {one_line(facts['sampled'][:1].upper() + facts['sampled'][1:])}." if facts.get("sampled") else ""
    return (
        f"## Evaluation\n\n{collapsed}Against the model it started from, on {_asked(metrics)}{_of(facts)}; "
        f"ties count as half a win, brackets are 95 % intervals over prompts.{_few(won['n'])}{sampled}{notes}\n\n"
        + table(("", "this model", "start"), rows)
    )


def _asked(metrics: Mapping[str, Any]) -> str:
    """The prompts of an evaluation, and how many of them training saw."""
    n, seen = metrics["win_rate"]["n"], metrics.get("seen")
    return f"{n} prompts, {seen} of which training saw" if seen else f"{n} held-out prompts"


def _of(facts: Mapping[str, Any]) -> str:
    return f" ({one_line(facts['measured'])})" if facts.get("measured") else ""


def _losses(facts: Mapping[str, Any]) -> str:
    """Of a model that was trained to imitate, and compared with nothing."""
    if not (losses := facts.get("losses")):
        return ""
    rows = [
        (words, _number(losses[f"{key}_after"]), _number(losses[f"{key}_before"]))
        for key, words in (("loss", "loss, nats a token"), ("perplexity", "perplexity"))
    ]
    change = f" The loss changed by {_with_interval(losses['loss_change'])}." if losses.get("loss_change") else ""
    said = f"On {losses['held_out_rows']} held-out rows{_of(facts)}, before and after supervised training.{change}"
    return f"## Evaluation\n\n{said}\n\n" + table(("", "this model", "before"), rows)


def _fidelity(facts: Mapping[str, Any]) -> str:
    checks: list[Check] = facts.get("receipt") or []
    if not checks:
        return ""
    apart = "in fp32" if facts.get("method") == "full" else "base and adapter apart, in fp32"
    text = (
        f"## Receipt\n\nThis export, loaded back, beside the model that was trained ({apart}), on fixed prompts; "
        "differences in nats. An engine that was not checked may say anything."
        + (f" {CHOICES}" if "score" in facts else "")
        + "\n\n"
        + table(HEADS, cells(checks))
    )
    if facts["kind"] != "adapter" and facts.get("into") == "original" and precision_of(facts) == "nf4":
        text += f"\n{MADE_ANEW}\n"
    gap = gap_in(checks)
    if gap is not None:
        text += (
            f"\nOn the **original** weights of the base the adapter is another model: KL {_number(gap.kl)} nats a "
            + ("choice" if "score" in facts else "token")
            + f" from what was trained, the same {'choice' if 'score' in facts else 'top token'} "
            + f"on {gap.top1:.1%} of {gap.tokens:,}.\n"
        )
    return text


def _licences(facts: Mapping[str, Any]) -> str:
    rows = facts.get("licences") or []
    if not rows:
        return ""
    return "## Licences\n\nOf what it was made of; it can be given away as all of these allow.\n\n" + table(
        ("", "licence"), [(what, licence or "not stated: ask whoever gave it") for what, licence in rows]
    )


def export_facts(
    trained: Trained, kind: str, folder: Path, name: str, checks: Sequence[Check], dtype: str, into: str
) -> dict[str, Any]:
    """What a card says of an export itself, for `render_card`.

    Args:
        folder: where it lies, its launch files and Modelfile too.
        name: that the launch files give it.
    """
    named = named_base(trained.origin)
    link = folder / local_base_name(named)
    about: dict[str, Any] = {}
    if kind != "merged" and trained.adapter is not None:
        about["folded"] = folded_scale(adapter_config(trained.adapter, "artifact", alone=True))
    if link.is_symlink():
        about["linked"] = "original" if link.resolve() == Path(trained.base.path).resolve() else DEQUANTISED
    if trained.asked.scores:
        about["score"] = trained.tokenizer.convert_ids_to_tokens(trained.rows[0][-1])
    return about | {
        "kind": kind, "base": named, "method": trained.method,
        "precision": "nf4" if trained.kind == "nf4" else name_of(trained.dtype), "computed": name_of(trained.dtype),
        "dtype": dtype, "into": into,
        "served": name if (folder / LAUNCH).is_dir() else "",
        "launch": sorted(path.stem for path in (folder / LAUNCH).glob("*.sh")),
        "modelfile": (folder / "Modelfile").is_file(),
        "receipt": checks,
    }  # fmt: skip


def folded_scale(config: Mapping[str, Any]) -> str:
    """What became of the scale of an adapter that was trained, since engines are given one of scale 1."""
    r, alpha, root = config.get("r"), config.get("lora_alpha"), config.get("use_rslora")
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        return "The scales of its layers, which differ, are folded into the weights here; alpha is the rank."
    if not r or alpha is None or alpha / (math.sqrt(r) if root else r) == 1:
        return ""
    kind, by = ("rsLoRA", f"√{r}") if root else ("LoRA", str(r))
    return f"Its scale, {kind}'s {alpha:g}/{by}, is folded into the weights here: alpha is the rank."


def licences(data: Sequence[str], base: Base) -> list[tuple[str, str]]:
    """What an export was made of, and under which licence that is; empty where nobody says."""
    made_of = [(f"base {named_base(base)['id']}", licence_in(Path(base.path)))]
    return made_of + [(f"data {name}", licence_of(name)) for name in data]


def licence_in(folder: Path) -> str:
    """The licence that a model's own card states in its front matter; empty where it states none."""
    card = folder / "README.md"
    text = read_bytes(card, card.name).decode("utf-8", "replace") if has_file(card, card.name) else ""
    front = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    try:
        metadata = yaml.safe_load(front[1]) if front else None
    except yaml.YAMLError:
        return ""
    return str(metadata.get("license") or "") if isinstance(metadata, dict) else ""


MADE_ANEW = (
    "Made of the original weights, it is another model: `merge-before-cast`, `merged` and `adapter` on `original` are "
    "beside the adapter on those weights, and `gap` is how far that lies from what was trained."
)
CHOICES = (
    "Scores are compared as the choices that they stand for: a token is a choice between two of the texts, or between "
    "one and a text whose score is 0."
)


def _stages(facts: Mapping[str, Any]) -> list[str]:
    return [str(parent["stage"]) for parent in facts.get("parents", ())]


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text in the facts, with the dotted key it stands at."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _texts(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, (list, tuple)):
        for i, inner in enumerate(value):
            yield from _texts(inner, f"{key}[{i}]")


def _number(value: float) -> str:
    if isinstance(value, int) or not math.isfinite(value):
        return str(value)
    return f"{value:.4g}"


def _with_interval(figure: Any) -> str:
    if not isinstance(figure, Mapping):
        return _number(figure)
    return in_words(figure, ".4g")


def _few(n: int) -> str:
    return f" Fewer than {FEW} prompts: the intervals say little." if n < FEW else ""
