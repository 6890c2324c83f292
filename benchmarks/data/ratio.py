"""What the share of general data costs and gains, and what duplicates and broken rows cost.

    apt-get download dict-jargon && dpkg -x dict-jargon_*.deb jargon
    python benchmarks/data/ratio.py jargon/usr/share/dictd [--seeds 0,1,2] [--save benchmarks/data/ratio.json]

Two real sources: the Jargon File (public domain; each entry as a question and its answer) is the domain, people who
chat (`data=chitchat`) are general. `stage=data` mixes them, `stage=sft` trains the built-in model on the mixture, and
the loss is that of each source's own held-out rows, which no mixture changes.

`share`: the same number of rows and steps, of which 0 to 70 % are general. `damage`: the domain alone, with 30 %
planted duplicates and 10 % broken rows; read as it is, and through `stage=data`. Both are measured on the same clean
rows.
"""

from __future__ import annotations

import argparse
import io
import json
import platform
import random
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from align.__main__ import main
from align.run import read_manifest

HERE = Path(__file__).resolve().parent
SHARES = (0.0, 0.1, 0.3, 0.5, 0.7)
ROWS, STEPS, HELD_OUT = 640, 40, 0.1
"""Rows of a mixture, steps of training on it (of 16 rows: it is seen once), and the share of each source that is held
out."""
DUPLICATES, BROKEN = 0.3, 0.1
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
"""Digits of a dictd index."""
TRAINING = (
    "stage=sft", "model=pocket", "method=lora", "device=cpu", "method.lr=2e-3", "data.max_length=128",
    "data.too_long=truncate", f"stage.max_steps={STEPS}", "stage.epochs=100", "stage.batch_size=16",
    "stage.micro_batch=16", "stage.eval_size=160",
)  # fmt: skip


def entries(folder: Path) -> Iterator[dict[str, str]]:
    """The Jargon File's entries, each as a question and the first two sentences of its answer."""
    text = (folder / "jargon.dict").read_bytes() if (folder / "jargon.dict").exists() else unpacked(folder)
    for line in (folder / "jargon.index").read_text(encoding="utf-8").splitlines():
        name, start, size = line.split("\t")
        begin = number(start)
        entry = text[begin : begin + number(size)].decode("utf-8", "replace")
        _, _, body = entry.partition("\n\n")
        body = re.sub(r"\s+", " ", re.sub(r"[{}]", "", re.sub(r"\[[^]]*\]", "", body))).strip()
        answer = " ".join(re.split(r"(?<=[.!?]) ", body)[:2])
        if not name.startswith("00-database") and 40 <= len(answer) <= 400:
            yield {"prompt": f"What does “{name}” mean?", "completion": answer}


def unpacked(folder: Path) -> bytes:
    import gzip

    return gzip.decompress((folder / "jargon.dict.dz").read_bytes())


def number(digits: str) -> int:
    found = 0
    for digit in digits:
        found = found * 64 + ALPHABET.index(digit)
    return found


def written(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def damaged(rows: Sequence[dict[str, str]], seed: int) -> list[dict[str, str]]:
    """The rows with so many broken ones among them, and so many more that nearly repeat another: as many as before,
    because a budget of rows is what a team has."""
    draw = random.Random(seed)
    kept = draw.sample(rows, round(len(rows) * (1 - DUPLICATES)))
    favourites = draw.sample(kept, max(1, len(kept) // 20))  # what is copied is copied often
    found = kept + [nearly(draw.choice(favourites), draw) for _ in range(len(rows) - len(kept))]
    for place in draw.sample(range(len(found)), round(len(found) * BROKEN)):
        found[place] = broken(found[place], draw)
    draw.shuffle(found)
    return found


def nearly(row: dict[str, str], draw: random.Random) -> dict[str, str]:
    """The same row as somebody else would have pasted it."""
    ends = ["", " ", "\n", " Indeed.", " (see above)"]
    question = draw.choice([row["prompt"], row["prompt"].upper(), row["prompt"].lower()])
    return {"prompt": question, "completion": row["completion"] + draw.choice(ends)}


def broken(row: dict[str, str], draw: random.Random) -> dict[str, str]:
    """One of the ways in which rows break: text decoded wrongly, an answer that says nothing or the same again and
    again, remains of a web page, a refusal."""
    answer = row["completion"]
    spoilt = [
        answer.replace(" ", " é", 3).encode().decode("latin-1"),
        "",
        " ".join([*answer.split()[:4]] * 25),
        f"Skip to content. Accept all cookies. {answer} Sign up for our newsletter. All rights reserved.",
        "As an AI language model, I cannot help with that. I'm sorry, but I can't assist with that request.",
    ]
    return row | {"completion": draw.choice(spoilt)}


def align(root: Path, *words: str) -> dict[str, Any]:
    """The metrics of a run."""
    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        status = main([*words, f"run.root={root}"])
    assert status == 0, f"{' '.join(words)}\n{said.getvalue()}"
    return dict(read_manifest(Path(said.getvalue().splitlines()[-1])).metrics)


def share(root: Path, domain: Path, general: float, seed: int) -> dict[str, float]:
    """Loss after training on a mixture, of each source's held-out rows."""
    name = f"share-{general:g}-{seed}"
    sources = (
        f"{{path: '{domain}', name: domain, weight: {1 - general:g}}}",
        f"{{data: chitchat, name: general, weight: {general:g}}}",
    )
    align(
        root, "stage=data", f"stage.sources=[{', '.join(sources)}]", f"stage.mix.total={ROWS}",
        f"data.held_out={HELD_OUT}", f"run.name={name}", f"seed={seed}", "stage.contamination.test=false",
    )  # fmt: skip
    found = align(root, *TRAINING, "data=manifest", f"data.path=data:{name}", f"run.name={name}", f"seed={seed}")
    return {source: figures["after"] for source, figures in found["loss_by_source"].items()}


def damage(root: Path, rows: Sequence[dict[str, str]], seed: int) -> dict[str, float]:
    """Loss on the same clean rows after training on clean rows, on damaged ones, and on what `stage=data` makes of the
    damaged ones; and what the damaged file's own held-out rows say."""
    draw = random.Random(seed)
    order = draw.sample(list(rows), len(rows))
    test = written(root / f"clean-{seed}.jsonl", order[: round(len(order) * HELD_OUT)])
    train = order[round(len(order) * HELD_OUT) :]
    clean = written(root / f"train-{seed}.jsonl", train)
    worse = written(root / f"damaged-{seed}.jsonl", damaged(train, seed))
    measured = ("data.held_out=0", f"data.eval_path={test}", f"seed={seed}")
    skipping = "data.on_bad_row=skip"
    cleaned = "[unicode, control, empty, {roles: {}}, repetition, boilerplate]"
    align(root, "stage=data", f"stage.sources=[{{path: '{worse}'}}]", f"stage.clean={cleaned}", f"run.name=d-{seed}",
          "data.held_out=0.02", skipping)  # fmt: skip
    runs = {
        "clean": ("data=files", f"data.path={clean}", *measured),
        "damaged": ("data=files", f"data.path={worse}", *measured, skipping),
        "through stage=data": ("data=manifest", f"data.path=data:d-{seed}", f"data.eval_path={test}", f"seed={seed}"),
        "damaged, by its own held-out rows": (
            "data=files", f"data.path={worse}", f"data.held_out={HELD_OUT}", f"seed={seed}", skipping,
        ),
    }  # fmt: skip
    return {name: align(root, *TRAINING, *words, f"run.name=damage-{i}-{seed}")["loss_after"]
            for i, (name, words) in enumerate(runs.items())}  # fmt: skip


def spread(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}" if len(values) > 1 else f"{values[0]:.3f}"


def format_table(found: Mapping[str, Any]) -> str:
    """The tables of README.md: means over the seeds and standard deviations."""
    lines = ["| general data | loss, domain | loss, general |", "| --- | --- | --- |"]
    for general, by_seed in found["share"].items():
        both = [[each[source] for each in by_seed.values()] for source in ("domain", "general")]
        lines.append(f"| {float(general):.0%} | {spread(both[0])} | {spread(both[1])} |")
    lines += ["", "| trained on | loss |", "| --- | --- |"]
    names = next(iter(found["damage"].values()), {})
    lines += [f"| {name} | {spread([each[name] for each in found['damage'].values()])} |" for name in names]
    return "\n".join(lines)


def plot(found: Mapping[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "ratio"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.4), layout="constrained")
    at = [100 * float(general) for general in found["share"]]
    for source, label, colour in (("domain", "the domain", "#b3541e"), ("general", "general chats", "#1e6fb3")):
        by_share = [[each[source] for each in by_seed.values()] for by_seed in found["share"].values()]
        middle = [statistics.mean(values) for values in by_share]
        axes.plot(at, middle, color=colour, marker="o", label=f"held-out rows of {label}")
        axes.fill_between(at, [min(v) for v in by_share], [max(v) for v in by_share], color=colour, alpha=0.2)
    axes.set(xlabel="general data in the mixture, %", ylabel="held-out loss, nats a token")
    axes.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})


def measure() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jargon", type=Path, help="the folder with jargon.index and jargon.dict.dz")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--save", type=Path, default=HERE / "ratio.json")
    parser.add_argument("--plot", type=Path, default=HERE.parents[1] / "docs" / "ratio.svg")
    given = parser.parse_args()
    rows, began = list(entries(given.jargon)), time.perf_counter()
    found: dict[str, Any] = {
        "machine": {"python": platform.python_version(), "threads": 1}, "domain_rows": len(rows),
        "rows": ROWS, "steps": STEPS, "share": {f"{general:g}": {} for general in SHARES}, "damage": {},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        domain = written(root / "jargon.jsonl", rows)
        seeds = list(map(int, given.seeds.split(",")))
        cases: list[Callable[[], tuple[str, str, int, dict[str, float]]]] = [
            *(lambda g=g, s=s: ("share", f"{g:g}", s, share(root, domain, g, s)) for s in seeds for g in SHARES),
            *(lambda s=s: ("damage", "", s, damage(root, rows, s)) for s in seeds),
        ]
        for case in cases:
            what, general, seed, losses = case()
            (found[what][general] if general else found[what])[seed] = losses
            print(f"{what} {general}, seed {seed}: {losses}", flush=True)
            found["machine"]["minutes"] = round((time.perf_counter() - began) / 60, 1)
            given.save.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    plot(found, given.plot)
    print("\n" + format_table(found))


if __name__ == "__main__":
    measure()
