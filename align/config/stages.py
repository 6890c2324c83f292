"""The table of all stages, such as `sft` and `ppo`, with the parts of the configuration that each reads.

It names modules and schemas without importing them, so that `--help` is fast.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from types import MappingProxyType
from typing import Any

WEIGHTS = ("model", "method", "data")
LEARNS = (*WEIGHTS, "init", "project")
ALWAYS = ("stage", "seed", "device", "dtype", "schema_version")
"""Parts of the configuration that every stage reads."""


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage of the command line: its module, its settings class and the parts of the configuration it reads.

    Attributes:
        summary: one line for the list of stages.
        schema: the class of its own settings in `align.config`, as `module:class`.
        module: its module in `align.stages`.
        reads: the parts of the configuration that are part of a run's identity, besides `ALWAYS`. Other parts do not
            change the result.
        uses: parts that it reads too, and that are not part of the identity, because the inputs that they name are
            known by their digests: the artifact of `init`, the ledger's head in `store`.
        prints: its actions that print and make no run.
        runs: whether it has other actions.
        spreads: whether it works on several ranks (`devices=N`).
        only_with: part among `reads` → the key of the stage that must be set for the part to be read.
    """

    summary: str
    schema: str
    module: str
    reads: tuple[str, ...]
    uses: tuple[str, ...] = ()
    prints: tuple[str, ...] = ()
    runs: bool = True
    spreads: bool = False
    only_with: Mapping[str, str] = field(default_factory=dict)

    def reads_with(self, settings: Any) -> tuple[str, ...]:
        """Return the parts of the configuration, such as `model`, that the stage reads with these settings of its
        own."""
        values = settings if isinstance(settings, Mapping) else {}
        return tuple(p for p in self.reads if p not in self.only_with or values.get(self.only_with[p]) is not None)


STAGES = MappingProxyType(
    {
        "data": Stage(
            "clean, deduplicate, split and mix sources into one data set",
            "data:DataStageConfig",
            "data",
            ("model", "data", "reward"),
            ("store",),
        ),
        "sft": Stage(
            "SFT: instruction tuning of an adapter (QLoRA or LoRA)",
            "sft:SftConfig",
            "sft",
            WEIGHTS,
            ("init",),
            spreads=True,
        ),
        "full": Stage("SFT with every weight trained", "sft:SftConfig", "sft", WEIGHTS, ("init",), spreads=True),
        "sample": Stage(
            "sample several answers to each prompt for annotators, or rank them by a reward",
            "sample:SampleConfig",
            "sample",
            (*LEARNS, "store", "rollout", "reward"),
            spreads=True,
            only_with={"reward": "best_of"},
        ),
        "annotate": Stage(
            "rank answers in a browser; import, export, back up and erase votes",
            "annotate:AnnotateConfig",
            "annotate",
            ("project", "store", "data", "reward"),
        ),
        "reward": Stage(
            "train a reward model on preference pairs",
            "reward:RewardStageConfig",
            "reward",
            LEARNS,
            ("store",),
            spreads=True,
        ),
        "ppo": Stage(
            "PPO, GRPO, RLOO or REINFORCE++ against a reward",
            "ppo:PpoConfig",
            "ppo",
            (*LEARNS, "store", "reward", "rollout"),
            spreads=True,
        ),
        "dpo": Stage(
            "DPO, IPO, ORPO or SimPO: train on preference pairs, without a reward model",
            "dpo:DpoConfig",
            "dpo",
            LEARNS,
            ("store",),
            spreads=True,
        ),
        "kto": Stage(
            "KTO: train on single answers that are labelled as wanted or not",
            "kto:KtoConfig",
            "kto",
            LEARNS,
            ("store",),
            spreads=True,
        ),
        "eval": Stage(
            "evaluate an artifact against the model it started from, several systems, or a judge",
            "eval:EvalConfig",
            "eval",
            (*WEIGHTS, "artifact", "init", "reward", "rollout", "eval"),
            ("store", "project"),
            spreads=True,
        ),
        "export": Stage(
            "write an adapter or a model for other engines",
            "export:ExportStageConfig",
            "export",
            (*WEIGHTS, "artifact", "export"),
        ),
        "serve": Stage(
            "serve many adapters on one base with OpenAI's API; manage its tenants' keys",
            "serve:ServeConfig",
            "serve",
            ("model", "method", "serve"),
            ("export",),
            prints=("key", "tenants"),
        ),
        "verify": Stage(
            "check that PPO computes correctly with your base, method and precision",
            "verify:VerifyConfig",
            "verify",
            (*WEIGHTS, "init", "reward", "rollout"),
            spreads=True,
        ),
        "registry": Stage(
            "list, compare and trace runs; manage aliases of deployed artifacts",
            "registry:RegistryConfig",
            "registry",
            (),
            ("artifact", "store", "project"),
            prints=(
                "list",
                "show",
                "compare",
                "diff",
                "trace",
                "replay",
                "promote",
                "retire",
                "history",
                "forget",
                "gc",
                "rebuild",
                "serve",
            ),
            runs=False,
        ),
        "plan": Stage(
            "predict the memory, disk and time of another stage, before anything is loaded",
            "plan:PlanConfig",
            "plan",
            (*LEARNS, "store", "reward", "rollout"),
            ("devices",),
            prints=("plan",),
            runs=False,
        ),
    }
)
"""Name → Stage, in the order in which a project uses them."""
WITH_RUNS = tuple(name for name, stage in STAGES.items() if stage.runs)
"""Names of the stages that make runs with folders, which references such as `sft:latest` can name."""


def load_schema(stage: str) -> Any:
    """Import and return the settings class of a stage, such as `SftConfig`."""
    module, _, name = STAGES[stage].schema.partition(":")
    return getattr(import_module(f"align.config.{module}"), name)
