"""Judgements of the sampled answers; for now by the simulated annotator, through the store's own door."""

from __future__ import annotations

from align.config.annotate import AnnotateConfig
from align.config.root import Config
from align.report import Report
from align.run import Run, json_digest, write_json
from align.stages import Inputs, open_store
from align.types import Result
from annotate.simulate import simulate
from reward.rules import Sentiment

SEEDS = 2**32
"""How many seeds a run can have: the next annotator's begin behind them."""


def inputs(config: Config) -> Inputs:
    """What is to be judged is the input, not what has been judged already: a continued run is the same run."""
    with open_store(config, create=False) as store:
        items = json_digest([item.id for item in store.items(config.project)])
    stage: AnnotateConfig = config.stage
    return Inputs(f"{config.project}-{stage.annotator}", None, {"items": {"project": config.project, "digest": items}})


def run(run: Run, config: Config) -> Result:
    stage: AnnotateConfig = config.stage
    with open_store(config, create=False) as store:
        done = [
            simulate(store, config.project, Sentiment(), config.seed + SEEDS * who, stage.agreement)
            for who in range(stage.annotators)
        ]
        head = store.head(config.project)
    metrics = {
        "annotators": len(done), "items": done[0].items, "rankings": sum(d.items for d in done),
        "added": sum(d.added for d in done), "pairs": sum(d.pairs for d in done), "tie_share": done[0].tie_share,
        "agreement": sum(d.agreement for d in done) / len(done), "slope": done[0].slope,
    }  # fmt: skip
    write_json(run.artifact / "ledger.json", {"project": config.project, "seq": head.seq, "hash": head.hash})
    report = Report(f"annotate: {run.manifest['name']}", f"project {config.project}, simulated by VADER's sentiment")
    report.text(
        "A **simulated** annotator, a stand-in for a person: it ranks by a sentiment score with Bradley–Terry noise, "
        "so that near ties come out at random and clear cases do not. Every record says `source: simulated`."
    )
    report.figures_table(metrics)
    report.write(run.folder / "report.html")
    line = (
        f"{metrics['rankings']} rankings of {metrics['items']} items, {metrics['pairs']} pairs, "
        f"{metrics['tie_share']:.0%} tied; agreement {metrics['agreement']:.3f}"
    )
    return Result(metrics, (line,))
