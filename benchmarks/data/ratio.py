"""Measure how the share of general data changes losses, and how much duplicates and broken rows cost.

    apt-get download dict-jargon && dpkg -x dict-jargon_*.deb jargon
    python benchmarks/data/ratio.py jargon/usr/share/dictd [--seeds 0,1,2] [--save benchmarks/data/ratio.json]

Two real sources: the Jargon File (public domain; each entry as a question and its answer) is the domain, and chats of
people (`data=chitchat`) are general data. `stage=data` mixes them, `stage=sft` trains the built-in model on the
mixture, and the loss is measured on the held-out rows of each source, which are the same for every mixture.

`share`: mixtures with the same number of rows and steps, with 0 to 70 % general rows. `damage`: the domain alone, with
30 % planted duplicates and 10 % broken rows, read as it is and through `stage=data`. Both are measured on the same
clean rows.
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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from align.__main__ import main
from align.run import read_manifest

HERE = Path(__file__).resolve().parent
SHARES = (0.0, 0.1, 0.3, 0.5, 0.7)
ROWS = 640
"""Rows of a mixture."""
STEPS = 40
"""Training steps of 16 rows, one epoch of a mixture."""
HELD_OUT = 0.1
"""Share of each source that is held out."""
DUPLICATE_SHARE = 0.3
BROKEN_SHARE = 0.1
DICTD_DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
"""Digits of the numbers in a dictd index, in base 64."""
TRAINING = (
    "stage=sft",
    "model=pocket",
    "method=lora",
    "device=cpu",
    "method.lr=2e-3",
    "data.max_length=128",
    "data.too_long=truncate",
    f"stage.max_steps={STEPS}",
    "stage.epochs=100",
    "stage.batch_size=16",
    "stage.micro_batch=16",
    "stage.eval_size=160",
)


def read_jargon_file(folder: Path) -> Iterator[dict[str, str]]:
    """Yield the Jargon File's entries, each as a question and the first two sentences of its answer.

    Args:
        folder: has `jargon.index`, and `jargon.dict` or `jargon.dict.dz`.
    """
    dictionary = read_dictionary(folder)
    for line in (folder / "jargon.index").read_text(encoding="utf-8").splitlines():
        name, start_digits, size_digits = line.split("\t")
        start = parse_dictd_number(start_digits)
        entry = dictionary[start : start + parse_dictd_number(size_digits)].decode("utf-8", "replace")
        _, _, body = entry.partition("\n\n")
        body = re.sub(r"\s+", " ", re.sub(r"[{}]", "", re.sub(r"\[[^]]*\]", "", body))).strip()
        answer = " ".join(re.split(r"(?<=[.!?]) ", body)[:2])
        if not name.startswith("00-database") and 40 <= len(answer) <= 400:
            yield {"prompt": f"What does “{name}” mean?", "completion": answer}


def read_dictionary(folder: Path) -> bytes:
    import gzip

    if (folder / "jargon.dict").exists():
        return (folder / "jargon.dict").read_bytes()
    return gzip.decompress((folder / "jargon.dict.dz").read_bytes())


def parse_dictd_number(digits: str) -> int:
    number = 0
    for digit in digits:
        number = number * 64 + DICTD_DIGITS.index(digit)
    return number


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write rows as JSON lines. Returns the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def damage_rows(rows: Sequence[dict[str, str]], seed: int) -> list[dict[str, str]]:
    """Replace some rows by near-duplicates of others, and break some.

    The number of rows stays the same, because teams have a budget of rows.
    """
    draw = random.Random(seed)
    originals = draw.sample(rows, round(len(rows) * (1 - DUPLICATE_SHARE)))
    copied_rows = draw.sample(originals, max(1, len(originals) // 20))  # few rows with many copies each
    copies = [copy_with_changes(draw.choice(copied_rows), draw) for _ in range(len(rows) - len(originals))]
    damaged = originals + copies
    for i in draw.sample(range(len(damaged)), round(len(damaged) * BROKEN_SHARE)):
        damaged[i] = break_row(damaged[i], draw)
    draw.shuffle(damaged)
    return damaged


def copy_with_changes(row: dict[str, str], draw: random.Random) -> dict[str, str]:
    """Return a near-duplicate, as if the row had been pasted from another place."""
    endings = ["", " ", "\n", " Indeed.", " (see above)"]
    question = draw.choice([row["prompt"], row["prompt"].upper(), row["prompt"].lower()])
    return {"prompt": question, "completion": row["completion"] + draw.choice(endings)}


def break_row(row: dict[str, str], draw: random.Random) -> dict[str, str]:
    """Break a row's answer: wrongly decoded, empty, repetitive, with remains of a web page, or a refusal."""
    answer = row["completion"]
    broken_answers = [
        answer.replace(" ", " é", 3).encode().decode("latin-1"),
        "",
        " ".join([*answer.split()[:4]] * 25),
        f"Skip to content. Accept all cookies. {answer} Sign up for our newsletter. All rights reserved.",
        "As an AI language model, I cannot help with that. I'm sorry, but I can't assist with that request.",
    ]
    return row | {"completion": draw.choice(broken_answers)}


def run_align(root: Path, *arguments: str) -> dict[str, Any]:
    """Run a stage in this process. Returns the run's metrics."""
    output = io.StringIO()
    with redirect_stdout(output), redirect_stderr(output):
        status = main([*arguments, f"run.root={root}"])
    assert status == 0, f"{' '.join(arguments)}\n{output.getvalue()}"
    return dict(read_manifest(Path(output.getvalue().splitlines()[-1])).metrics)


def measure_share(root: Path, domain: Path, general: float, seed: int) -> dict[str, float]:
    """Train on a mixture with a share of general data. Returns the loss on each source's held-out rows."""
    name = f"share-{general:g}-{seed}"
    sources = (
        f"{{path: '{domain}', name: domain, weight: {1 - general:g}}}",
        f"{{data: chitchat, name: general, weight: {general:g}}}",
    )
    run_align(
        root,
        "stage=data",
        f"stage.sources=[{', '.join(sources)}]",
        f"stage.mix.total={ROWS}",
        f"data.held_out={HELD_OUT}",
        f"run.name={name}",
        f"seed={seed}",
        "stage.contamination.test=false",
    )
    training = (*TRAINING, "data=manifest", f"data.path=data:{name}", f"run.name={name}", f"seed={seed}")
    metrics = run_align(root, *training)
    return {source: losses["after"] for source, losses in metrics["loss_by_source"].items()}


def measure_damage(root: Path, rows: Sequence[dict[str, str]], seed: int) -> dict[str, float]:
    """Train on clean rows, on damaged ones, and on the output of `stage=data` for the damaged ones.

    Returns the loss of each on the same clean rows, and the loss on the damaged file's own held-out rows.
    """
    draw = random.Random(seed)
    order = draw.sample(list(rows), len(rows))
    test_path = write_rows(root / f"clean-{seed}.jsonl", order[: round(len(order) * HELD_OUT)])
    train_rows = order[round(len(order) * HELD_OUT) :]
    clean_path = write_rows(root / f"train-{seed}.jsonl", train_rows)
    damaged_path = write_rows(root / f"damaged-{seed}.jsonl", damage_rows(train_rows, seed))
    on_clean_rows = ("data.held_out=0", f"data.eval_path={test_path}", f"seed={seed}")
    skip_bad_rows = "data.on_bad_row=skip"
    steps = "[unicode, control, empty, {roles: {}}, repetition, boilerplate]"
    run_align(
        root,
        "stage=data",
        f"stage.sources=[{{path: '{damaged_path}'}}]",
        f"stage.clean={steps}",
        f"run.name=d-{seed}",
        "data.held_out=0.02",
        skip_bad_rows,
    )
    runs = {
        "clean": ("data=files", f"data.path={clean_path}", *on_clean_rows),
        "damaged": ("data=files", f"data.path={damaged_path}", *on_clean_rows, skip_bad_rows),
        "through stage=data": (
            "data=manifest",
            f"data.path=data:d-{seed}",
            f"data.eval_path={test_path}",
            f"seed={seed}",
        ),
        "damaged, by its own held-out rows": (
            "data=files",
            f"data.path={damaged_path}",
            f"data.held_out={HELD_OUT}",
            f"seed={seed}",
            skip_bad_rows,
        ),
    }
    return {
        name: run_align(root, *TRAINING, *arguments, f"run.name=damage-{i}-{seed}")["loss_after"]
        for i, (name, arguments) in enumerate(runs.items())
    }


def format_mean(values: Sequence[float]) -> str:
    """Return the mean and standard deviation."""
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}" if len(values) > 1 else f"{values[0]:.3f}"


def format_table(results: Mapping[str, Any]) -> str:
    """Return the results as the two Markdown tables of README.md: means over the seeds and standard deviations."""
    lines = ["| general data | loss, domain | loss, general |", "| --- | --- | --- |"]
    for general, by_seed in results["share"].items():
        domain_loss, general_loss = (
            format_mean([losses[source] for losses in by_seed.values()]) for source in ("domain", "general")
        )
        lines.append(f"| {float(general):.0%} | {domain_loss} | {general_loss} |")
    lines += ["", "| trained on | loss |", "| --- | --- |"]
    for name in next(iter(results["damage"].values()), {}):
        lines.append(f"| {name} | {format_mean([losses[name] for losses in results['damage'].values()])} |")
    return "\n".join(lines)


def plot_shares(results: Mapping[str, Any], path: Path) -> None:
    """Write a figure of the losses by share of general data."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "ratio"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.4), layout="constrained")
    percentages = [100 * float(general) for general in results["share"]]
    for source, label, colour in (("domain", "the domain", "#b3541e"), ("general", "general chats", "#1e6fb3")):
        losses_by_share = [[losses[source] for losses in by_seed.values()] for by_seed in results["share"].values()]
        means = [statistics.mean(values) for values in losses_by_share]
        lowest = [min(values) for values in losses_by_share]
        highest = [max(values) for values in losses_by_share]
        axes.plot(percentages, means, color=colour, marker="o", label=f"held-out rows of {label}")
        axes.fill_between(percentages, lowest, highest, color=colour, alpha=0.2)
    axes.set(xlabel="general data in the mixture, %", ylabel="held-out loss, nats a token")
    axes.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})


def run_benchmark() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jargon", type=Path, help="the folder with jargon.index and jargon.dict.dz")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--save", type=Path, default=HERE / "ratio.json")
    parser.add_argument("--plot", type=Path, default=HERE.parents[1] / "docs" / "ratio.svg")
    options = parser.parse_args()
    rows = list(read_jargon_file(options.jargon))
    start = time.perf_counter()
    results: dict[str, Any] = {
        "machine": {"python": platform.python_version(), "threads": 1},
        "domain_rows": len(rows),
        "rows": ROWS,
        "steps": STEPS,
        "share": {f"{general:g}": {} for general in SHARES},
        "damage": {},
    }

    def save_losses(case: str, by_seed: dict[int, dict[str, float]], seed: int, losses: dict[str, float]) -> None:
        by_seed[seed] = losses
        print(f"{case}, seed {seed}: {losses}", flush=True)
        results["machine"]["minutes"] = round((time.perf_counter() - start) / 60, 1)
        options.save.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        domain = write_rows(root / "jargon.jsonl", rows)
        seeds = list(map(int, options.seeds.split(",")))
        for seed in seeds:
            for general in SHARES:
                key = f"{general:g}"
                losses = measure_share(root, domain, general, seed)
                save_losses(f"share {key}", results["share"][key], seed, losses)
        for seed in seeds:
            save_losses("damage ", results["damage"], seed, measure_damage(root, rows, seed))
    plot_shares(results, options.plot)
    print("\n" + format_table(results))


if __name__ == "__main__":
    run_benchmark()
