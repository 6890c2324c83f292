"""Is PPO right here? The anchors of `align/ppo/anchors.py` on the user's own base, method and precision."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import align
from align.config.root import Config
from align.config.verify import VerifyConfig
from align.errors import AlignError
from align.models.base import find_base
from align.models.load import choose_device, choose_dtype, load_tokenizer
from align.models.roles import Roles
from align.ppo.anchors import Anchor, Setting, maths, on_model
from align.report import Report
from align.rollout.randomness import generator_for
from align.run import Base, Run, file_digest, json_digest
from align.run.folder import package_versions
from align.stages import Inputs
from align.stages.cast import roles_on
from align.stages.lineage import label
from align.stages.sampling import engine_of
from align.track import peak_rss_mb
from align.types import Result, Rollout

PASSES = 60
"""About how many forward passes of the batch the anchors on the model cost, a backward pass counted as two."""
TEXTS = ("Hello, how are you?", "What did you do today?", "Tell me something about the sea.", "Why?")


def inputs(config: Config) -> Inputs:
    base = find_base(config.model)
    config.method.name = "qlora" if config.method.name == "auto" else config.method.name
    return Inputs(label(base, config), base, {"code": {"digest": code_digest()}})


def code_digest() -> str:
    """Of what is verified: this package and the versions of those it rests on. Another code is another run."""
    package = Path(align.__file__).parent
    files = {str(p.relative_to(package)): file_digest(p) for p in sorted(package.rglob("*.py"))}
    return json_digest([package_versions(), files])


def run(run: Run, config: Config) -> Result:
    stage: VerifyConfig = config.stage
    base, device = Base(**run.manifest["base"]), choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    tokenizer = load_tokenizer(base)
    roles = roles_on(base, config, None, (), stage.value_trunk, device)
    shake(roles)
    rollout = config.rollout
    engine = engine_of(config, tokenizer, roles.model.generation_config)
    asked = [list(tokenizer(TEXTS[i % len(TEXTS)])["input_ids"]) for i in range(stage.rows)]
    drawn = 0

    def draw(rows: int = 4) -> Rollout:
        nonlocal drawn
        drawn += 1
        with roles.use("policy") as model:
            return engine.generate(model, asked * rows, generator_for(device, config.seed, "verify", drawn))

    setting = Setting(roles, draw(1), rollout.temperature, stage.micro_batch, loose=dtype != torch.float32)
    began = time.perf_counter()
    roles.logprobs("policy", setting.rollout, rollout.temperature)
    print(f"{base.id}, {config.method.name}, {dtype}: about {PASSES * (time.perf_counter() - began):.0f} s")

    found: list[Anchor] = []
    verdicts = ("FAILS", "holds")
    for anchor in every(setting, draw):
        found.append(anchor)
        measured = f"{anchor.measured:>9.1e} of {anchor.tolerance:<6g}"
        print(f"  {verdicts[anchor.holds]}  {anchor.name:<15}{measured}  {anchor.claim}")

    report = Report(f"verify: {run.manifest['name']}", f"{base.id}, {config.method.name}, {dtype}")
    rows = [(a.name, a.claim, f"{a.measured:.1e}", f"{a.tolerance:g}", verdicts[a.holds]) for a in found]
    report.table(("anchor", "claim", "measured", "tolerance", "verdict"), rows).write(run.folder / "report.html")
    if failed := [a.name for a in found if not a.holds]:
        raise AlignError(f"PPO is not right here: {', '.join(failed)}. The table is in {run.folder / 'report.html'}")
    metrics = {**{a.name.replace(" ", "_"): a.measured for a in found}, "peak_rss_mb": peak_rss_mb()}
    return Result(metrics, (f"all {len(found)} anchors hold",))


def every(setting: Setting, draw: Callable[[], Rollout]) -> Iterator[Anchor]:
    """Those that need no model first."""
    yield from maths()
    yield from on_model(setting, draw)


@torch.no_grad()
def shake(roles: Roles) -> None:
    """Move what trains: a fresh adapter and a fresh head say nothing, and hide a swapped role."""
    for role in ("policy", "value"):
        for parameter in roles.parameters_of(role):
            parameter.add_(0.02 * torch.randn_like(parameter))
