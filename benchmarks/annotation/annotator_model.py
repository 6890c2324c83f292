"""Measure in simulated worlds how many annotators who do not judge the answers are found, how many attentive ones are
suspected, and how many true strengths lie within the posteriors' 90 % intervals.

    python benchmarks/annotation/annotator_model.py [--worlds 200] [--save FILE]

A world has ten annotators. Each ranks 60 items, three annotators an item. Three do not judge: one ranks at
random, one by the place on the screen, and one copies the item's first ranking. The others order two random answers as
their strengths do in `agreement` of the cases, on average; abilities differ by 20 %, and each has a position bias and a
readiness for ties of its own. Each also ranks 20 known pairs. A world with four answers takes about four seconds of one
core.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from align.annotate.figures.alarms import GOLD_LEVEL, compute_gold_p_value
from align.ops.annotator_tests import apply_attention_tests, leave_out_annotators
from align.ops.annotators import RankedItems, build_contrasts, draw_normals, fit_annotators
from align.ops.intervals import proportion_interval
from align.ops.rankings import draw_rankings

ANNOTATORS = 10
RANKINGS = 60
OVERLAP = 3
GOLD_PAIRS = 20
ABILITY_LOG_SD = 0.2
POSITION_SD = 0.3
LOG_NU = -1.5
LOG_NU_SD = 0.5
INATTENTIVE = {"random": 0, "side": 1, "copies": 2}
"""Kind → number of the annotator."""
ATTENTIVE = np.arange(len(INATTENTIVE), ANNOTATORS)
NORMAL_90 = 1.645


class World(NamedTuple):
    """Simulated rankings, and what they were drawn from.

    Attributes:
        strengths_IK: of the answers.
        gold_right_A: number of known pairs that each annotator orders rightly.
    """

    ranked: RankedItems
    strengths_IK: np.ndarray
    gold_right_A: np.ndarray


def compute_ability(agreement: float) -> float:
    """Return the ability with which an annotator orders a share `agreement` of random pairs as their strengths do."""
    differences = np.abs(draw_normals(4096, 2) @ np.array([1.0, -1.0]))
    low = 0.0
    high = 20.0
    for _ in range(50):
        middle = (low + high) / 2
        if (1 / (1 + np.exp(-middle * differences))).mean() < agreement:
            low = middle
        else:
            high = middle
    return low


def draw_world(seed: int, answers: int, agreement: float) -> World:
    random = np.random.default_rng([seed, answers, round(100 * agreement)])
    strengths_IK = random.normal(size=(ANNOTATORS * RANKINGS // OVERLAP, answers))
    ability_A = draw_abilities(random, compute_ability(agreement))
    ranked = draw_votes(random, strengths_IK, ability_A)
    differences_AG = np.abs(random.normal(size=(ANNOTATORS, GOLD_PAIRS)) * np.sqrt(2))
    chance_AG = 1 / (1 + np.exp(-ability_A[:, None] * differences_AG))
    gold_right_A = (random.random(chance_AG.shape) < chance_AG).sum(axis=1)
    return World(ranked, strengths_IK, gold_right_A)


def draw_abilities(random: np.random.Generator, mean_ability: float) -> np.ndarray:
    log_factors_A = ABILITY_LOG_SD * random.normal(size=ANNOTATORS) - ABILITY_LOG_SD**2 / 2
    ability_A = mean_ability * np.exp(log_factors_A)
    ability_A[INATTENTIVE["random"]] = 0
    return ability_A


def draw_votes(random: np.random.Generator, strengths_IK: np.ndarray, ability_A: np.ndarray) -> RankedItems:
    """Return rankings of items by ten annotators. Three of them do not judge the answers."""
    items, answers = strengths_IK.shape
    position_A = POSITION_SD * random.normal(size=ANNOTATORS)
    log_nu_A = LOG_NU + LOG_NU_SD * random.normal(size=ANNOTATORS)
    item_N = np.repeat(np.arange(items), OVERLAP)
    annotator_N = draw_assignment(random, items)
    places_NK = random.permuted(np.tile(np.linspace(0.5, -0.5, answers), (len(item_N), 1)), axis=1)
    utilities_NK = ability_A[annotator_N, None] * strengths_IK[item_N] + position_A[annotator_N, None] * places_NK
    tiers_NK = draw_rankings(random, utilities_NK, log_nu_A[annotator_N])
    by_place_NK = np.argsort(np.argsort(-places_NK, axis=1), axis=1)
    random_NK = draw_rankings(random, np.zeros_like(utilities_NK), log_nu_A[annotator_N])
    is_copier_N = annotator_N == INATTENTIVE["copies"]
    tiers_NK = np.where((annotator_N == INATTENTIVE["side"])[:, None], by_place_NK, tiers_NK)
    tiers_NK = np.where(is_copier_N[:, None], random_NK, tiers_NK)
    tiers_NK = np.where(is_copier_N[:, None], tiers_NK[item_N * OVERLAP], tiers_NK)
    return RankedItems(item_N, annotator_N, tiers_NK, places_NK)


def draw_assignment(random: np.random.Generator, items: int) -> np.ndarray:
    """Return the annotators of each item in random order, [items · OVERLAP]; each annotator has `RANKINGS` items."""
    counts = np.zeros(ANNOTATORS, int)
    rows = []
    for _ in range(items):
        least_busy = np.lexsort((random.random(ANNOTATORS), counts))[:OVERLAP]
        counts[least_busy] += 1
        rows.append(random.permutation(least_busy))
    return np.concatenate(rows)


def measure_world(world: World) -> dict[str, Any]:
    """Return the numbers of annotators with each alarm, and the share of the posteriors that cover."""
    tests = apply_attention_tests([world.ranked], ANNOTATORS)
    gold_total = GOLD_PAIRS * (ANNOTATORS - 1)
    gold_p_A = [
        compute_gold_p_value(int(right), GOLD_PAIRS, int(world.gold_right_A.sum() - right), gold_total)
        for right in world.gold_right_A
    ]
    alarms_A = {
        "disagrees": tests.disagrees_A,
        "side": tests.prefers_side_A,
        "copies": tests.copies_A,
        "gold": np.array(gold_p_A) < GOLD_LEVEL,
    }
    flagged_A = alarms_A["disagrees"] | alarms_A["side"] | alarms_A["copies"]
    is_inattentive_A = np.isin(np.arange(ANNOTATORS), list(INATTENTIVE.values()))
    (attentive,) = leave_out_annotators([world.ranked], is_inattentive_A)
    items = np.unique(world.ranked.item_N[~is_inattentive_A[world.ranked.annotator_N]])
    return {
        "found": {kind: bool(flagged_A[number]) for kind, number in INATTENTIVE.items()},
        "found_by_gold": bool(alarms_A["gold"][INATTENTIVE["random"]]),
        "suspected": {alarm: int(raised_A[ATTENTIVE].sum()) for alarm, raised_A in alarms_A.items()},
        "suspected_by_any": int(flagged_A[ATTENTIVE].sum()),
        "covered": measure_coverage(attentive, world.strengths_IK[items]),
    }


def measure_coverage(ranked: RankedItems, strengths_IK: np.ndarray) -> float:
    """Return the share of items whose first two answers differ by what the posterior's 90 % interval contains."""
    (strengths,) = fit_annotators([ranked], ANNOTATORS).strengths
    contrast_C = build_contrasts(strengths_IK.shape[1])[0] - build_contrasts(strengths_IK.shape[1])[1]
    means_I = strengths.means_IC @ contrast_C
    deviations_I = np.linalg.norm(contrast_C @ strengths.roots_ICC, axis=1)
    return float((np.abs(strengths_IK[:, 0] - strengths_IK[:, 1] - means_I) < NORMAL_90 * deviations_I).mean())


def summarize_worlds(worlds: list[dict[str, Any]]) -> dict[str, Any]:
    attentive = len(worlds) * len(ATTENTIVE)
    suspected = sum((Counter(world["suspected"]) for world in worlds), Counter())
    all_found = proportion_interval([float(all(world["found"].values())) for world in worlds])
    return {
        "worlds": len(worlds),
        "all_found": [round(value, 4) for value in (all_found.value, all_found.low or 0.0, all_found.high or 1.0)],
        "found": {kind: round(float(np.mean([world["found"][kind] for world in worlds])), 4) for kind in INATTENTIVE},
        "random_found_by_gold": round(float(np.mean([world["found_by_gold"] for world in worlds])), 4),
        "attentive_suspected": round(sum(world["suspected_by_any"] for world in worlds) / attentive, 4),
        "attentive_suspected_by": {alarm: round(suspected[alarm] / attentive, 4) for alarm in worlds[0]["suspected"]},
        "covered": round(float(np.mean([world["covered"] for world in worlds])), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=int, default=200)
    parser.add_argument("--answers", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--agreements", type=float, nargs="+", default=[0.73, 0.63])
    parser.add_argument("--save", type=Path, help="where to write the figures")
    options = parser.parse_args()
    report = []
    for answers in options.answers:
        for agreement in options.agreements:
            started = time.process_time()
            worlds = [measure_world(draw_world(seed, answers, agreement)) for seed in range(options.worlds)]
            seconds = round((time.process_time() - started) / options.worlds, 1)
            row = {"answers": answers, "agreement": agreement} | summarize_worlds(worlds) | {"cpu_s_a_world": seconds}
            print(json.dumps(row), flush=True)
            report.append(row)
    if options.save:
        options.save.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
