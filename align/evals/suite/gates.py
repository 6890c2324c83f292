"""Gates of an evaluation: conditions on its first model, decided by confidence intervals. Imports no torch.

    {name: safety, task: refusals, is: superior, margin: 0.95, least_n: 100} {name: no-regression, task: support,
    against: old, is: not_worse, margin: 0.05, least_n: 200}

The outcome is `pass`, `fail` or `undecided`, which does not count as a pass. Each outcome is written as a verdict file,
which gates of aliases require (`align.registry.gates`), and as a test case in JUnit's XML.

A gate that decides again whenever data arrive looks at them several times. With `max_n` its looks share the error of a
single one; without, gates on people's votes use a confidence sequence (`align.ops.looks`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args
from xml.etree import ElementTree

from align.core.aliases import NAME, NAME_REMEDY
from align.core.errors import require
from align.core.spec import enumerate_list, get_choice, get_integer, get_number, require_keys
from align.evals.collapse import COLLAPSED, NOT_MEASURED, Collapse
from align.evals.judges.identity import JudgeIdentity
from align.evals.judges.judge_verdict import collect_both_orders
from align.evals.judges.llm_judge import describe_yes_answer
from align.evals.judges.report import MIN_AGREEMENT, JudgeReport, choose_report
from align.evals.stats import (
    MAX_CLUSTERS,
    Decision,
    DecisionRule,
    RuleKind,
    compute_sample_size_for_pairs,
    compute_sample_size_for_share,
    compute_score_difference,
    compute_share_difference,
    decide_by_rule,
    estimate_n_to_decide,
)
from align.evals.suite.people import PEOPLE
from align.evals.suite.probes import LM_EVAL, LOSS
from align.evals.suite.results import SHARE_ROLES, ScoredTask, compute_mean_score
from align.evals.suite.tasks import EvalTask
from align.ops.intervals import Interval, average_by_group
from align.ops.looks import compute_boundary_quantile, compute_sequence_quantile, quantile_to_level
from align.report.figure_text import format_interval, pluralize

FIELD = "eval.gates"
HELP = 'Write "eval.gates=[{name: safe, task: support, against: old, is: not_worse, margin: 0.05, least_n: 200}]".'
UNITS = {LOSS: "bits per byte", LM_EVAL: "units that depend on the metric"}
"""Kinds of probes, mapped to the unit of their scores. Only probes whose scores are not always shares are listed."""
KINDS: tuple[RuleKind, ...] = get_args(RuleKind)
LOWEST_LEVEL = 0.5
"""Exclusive lower bound of the confidence level of a gate's interval."""
KEYS = ("against", "margin", "level", "least_n", "max_n", "min_agreement", "collapsed")
LOWEST_MIN_AGREEMENT = 0.5
"""Lowest allowed value of a gate's `min_agreement`: the agreement of a coin if no verdict is a tie."""
SEQUENCE_TIGHTEST_N = 100
"""Number of clusters at which a gate's confidence sequence is narrowest, if its `least_n` is smaller."""


@dataclass(frozen=True, slots=True)
class EvalGate:
    """A condition that the first model of an evaluation has to meet, such as not to be worse than another model on a
    task.

    Attributes:
        name: of its verdict file.
        task: the task whose figure is decided on.
        against: the system that the first one is compared with. Empty if the gate is about the first system's own mean
            score.
        rule: see `align.evals.stats.DecisionRule`.
        min_agreement: lower bound of the judge's agreement, see `align.evals.judges.report`. None for its default.
        asks: the question of a graded task, whose figures are shares of yes.
        collapsed: True if the first system may have collapsed; `measured` if it must have been measured that it did
            not. False if it must not be known to have collapsed.
        max_n: the number of clusters at which the gate looks for the last time. None if it looks once, or if a
            confidence sequence decides.
    """

    name: str
    task: str
    against: str
    rule: DecisionRule
    min_agreement: float | None = None
    asks: str = ""
    collapsed: bool | Literal["measured"] = False
    max_n: int | None = None

    @property
    def condition(self) -> str:
        """The condition in words, such as `support: better than old by more than 0.05`. Shares of yes are called above
        or below others instead of better or worse."""
        margin = f"{self.rule.margin:g}"
        against = self.against
        if self.asks:
            share = f"share that {describe_yes_answer(self.asks)}"
            bound = f"that of {against} by {margin} or more"
            conditions = {
                "superior": f"above that of {against} by more than {margin}" if against else f"above {margin}",
                "not_worse": f"not below {bound}",
                "at_most": f"not above {bound}" if against else f"below {margin}",
            }
            return f"{self.task}: {share} {conditions[self.rule.kind]}"
        conditions = {
            "superior": f"better than {against} by more than {margin}" if against else f"above {margin}",
            "not_worse": f"not worse than {against} by {margin} or more",
            "at_most": f"not above {against} by {margin} or more" if against else f"below {margin}",
        }
        return f"{self.task}: {conditions[self.rule.kind]}"


def parse_gates(value: Any, tasks: Sequence[EvalTask], systems: Sequence[str]) -> Sequence[EvalGate]:
    """Parse the setting `eval.gates`, a list of conditions on the first evaluated model, into EvalGate objects.

    Args:
        systems: names of the systems. Gates are about the first.

    Raises:
        InputError: a gate is invalid, or names an unknown task or system.
    """
    if value is None:
        return []
    gates: dict[str, EvalGate] = {}
    for at, spec in enumerate_list(value, FIELD, HELP):
        gate = parse_gate(spec, at, {task.name: task for task in tasks}, systems)
        require(gate.name not in gates, f"{at}.name", gate.name, "is given twice", "Give each a name of its own.")
        gates[gate.name] = gate
    return [*gates.values()]


def parse_gate(value: Any, field: str, tasks: Mapping[str, EvalTask], systems: Sequence[str]) -> EvalGate:
    """Parse one condition of `eval.gates` into an EvalGate. Raises InputError if it is invalid."""
    spec = require_keys(value, field, ("name", "task", "is"), KEYS)
    name = spec["name"]
    require(
        isinstance(name, str) and NAME.fullmatch(name) is not None, f"{field}.name", name, "is no name", NAME_REMEDY
    )
    task = tasks[get_choice(spec, field, "task", [*tasks])]
    kind = get_choice(spec, field, "is", KINDS)
    against = get_choice(spec, field, "against", systems[1:]) if spec.get("against") is not None else ""
    problem = "compares two systems, and `against` names no second one"
    require(kind != "not_worse" or bool(against), f"{field}.is", kind, problem, HELP)
    unit = UNITS.get(task.probe.kind, "") if task.probe is not None else ""
    problem = f"has scores in {unit}, which have no absolute scale"
    require(bool(against) or not unit, f"{field}.task", task.name, problem, "Name another system: against.")
    margin = get_number(spec, field, "margin", 0.0, 0)
    level = get_number(spec, field, "level", 0.95, 0)
    require(
        margin < 1 or bool(unit),
        f"{field}.margin",
        margin,
        "is larger than any possible difference of shares",
        "Give one below 1.",
    )
    problem = f"is not above {LOWEST_LEVEL} and below 1"
    require(LOWEST_LEVEL < level < 1, f"{field}.level", level, problem, "Write 0.95, or leave it out.")
    problem = "is 0, but no evaluation can show that two systems are exactly equal"
    require(kind != "not_worse" or margin > 0, f"{field}.margin", margin, problem, "Give a margin above 0.")
    rule = DecisionRule(KINDS[KINDS.index(kind)], margin, level, get_integer(spec, field, "least_n", 1, 1))
    max_n = get_integer(spec, field, "max_n", 1, 1) if spec.get("max_n") is not None else None
    problem = f"is below least_n={rule.least_n}, so that no look would decide"
    require(max_n is None or max_n >= rule.least_n, f"{field}.max_n", max_n, problem, "Give a larger one.")
    has_agreement = spec.get("min_agreement") is not None
    agreement = get_number(spec, field, "min_agreement", None, LOWEST_MIN_AGREEMENT, 1) if has_agreement else None
    problem = f"applies to tasks with a judge, and task {task.name} is a probe"
    require(agreement is None or task.probe is None, f"{field}.min_agreement", agreement, problem, "Drop it.")
    problem = "is 1, and no agreement can be above 1"
    require(agreement != 1, f"{field}.min_agreement", agreement, problem, "Write 0.6, or leave it out.")
    collapsed = spec.get("collapsed", False)
    problem = "is not true, false or measured"
    require(
        isinstance(collapsed, bool) or collapsed == "measured", f"{field}.collapsed", collapsed, problem, "Drop it."
    )
    return EvalGate(name, task.name, against, rule, agreement, task.asks, collapsed, max_n)


def choose_gate_reports(
    gates: Sequence[EvalGate],
    judges: Mapping[str, JudgeIdentity | None],
    reports: Sequence[JudgeReport],
    card: Any,
    is_proxy: bool,
) -> dict[str, JudgeReport]:
    """Return gate name → the report of the judge that decides it, or raise InputError if a gate cannot be decided by
    its task's judge.

    Args:
        gates: all of `eval.gates`, in their order there.
        judges: task → the judge of its answers, for tasks without checks. None for people, who need no report.
        reports: those that `stage.card` names.
        card: `stage.card`.
        is_proxy: True if some system was optimised against the judge.

    Raises:
        InputError: the task of a gate does not give the figure that it needs, or its judge may not decide gates.
    """
    remedy = "Drop it."
    judge_of = {gate.name: judge for gate in gates if (judge := judges.get(gate.task)) is not None}
    for i, gate in enumerate(gates):
        problem = (
            f"applies to tasks with a judge, and task {gate.task} has {'people' if gate.task in judges else 'checks'}"
        )
        is_used = gate.name in judge_of or gate.min_agreement is None
        require(is_used, f"{FIELD}[{i}].min_agreement", gate.min_agreement, problem, remedy)
        problem = "is a bound on a judge's mean score, which has no absolute scale"
        is_comparable = gate.task not in judges or bool(gate.against or gate.asks)
        require(is_comparable, f"{FIELD}[{i}].task", gate.task, problem, "Name a system in `against`.")
    problem = "is a judge's card, and no gate needs it"
    require(bool(judge_of) or not card, "stage.card", card, problem, remedy)
    report_by_gate: dict[str, JudgeReport] = {}
    for gate in gates:
        if gate.name not in judge_of:
            continue
        judge = judge_of[gate.name]
        problem = (
            f"would decide gate {gate.name}, but a system was optimised against it: such a proxy may not decide gates"
        )
        require(not is_proxy or bool(gate.asks), "reward", judge.title, problem, "Judge by another scorer.")
        least = MIN_AGREEMENT if gate.min_agreement is None else gate.min_agreement
        report_by_gate[gate.name] = choose_report(gate.name, judge, reports, card, least)
    return report_by_gate


EMPTY_FIGURE = Interval(0.0, None, None, 0)
"""The figure of a task of which no item has been judged."""


def decide_gates(
    gates: Sequence[EvalGate],
    tasks: Sequence[ScoredTask],
    family: str = "all",
    earlier_looks: Mapping[str, Sequence[int]] = {},
) -> dict[str, Decision]:
    """Decide whether the first evaluated model passes each gate. Returns name of the gate → its decision.

    If one passed gate is enough, Holm's rule keeps the error of all gates together: of m gates that are not passed yet,
    each is decided at level 1 − (1 − level)/m, until none passes at that level.

    Args:
        family: `all` if every gate has to pass, `any` if one is enough.
        earlier_looks: name of a gate → numbers of clusters at its earlier looks.
    """
    if family == "all":
        return {gate.name: decide_gate(gate, tasks, earlier_looks.get(gate.name, ())) for gate in gates}
    passed: dict[str, Decision] = {}
    while True:
        rest = [gate for gate in gates if gate.name not in passed]
        decisions = {
            gate.name: decide_gate(divide_error(gate, len(rest)), tasks, earlier_looks.get(gate.name, ()))
            for gate in rest
        }
        newly_passed = {name: decision for name, decision in decisions.items() if decision.outcome == "pass"}
        passed |= newly_passed
        if not newly_passed or len(passed) == len(gates):
            decisions = {**decisions, **passed}
            return {gate.name: decisions[gate.name] for gate in gates}


def divide_error(gate: EvalGate, gate_count: int) -> EvalGate:
    """Return the gate with its share of an error that several gates have together."""
    level = 1 - (1 - gate.rule.level) / gate_count
    return replace(gate, rule=replace(gate.rule, level=level))


def decide_gate(gate: EvalGate, tasks: Sequence[ScoredTask], earlier_looks: Sequence[int] = ()) -> Decision:
    """Decide whether the first evaluated model passes a gate, from the scored answers to the gate's task.

    If verdicts of the judge are missing, the gate is decided only if no value of theirs would change the outcome. A
    judge without any verdict that is the same in both orders of the answers decides nothing.

    Args:
        earlier_looks: numbers of clusters at the gate's earlier looks. Only looks at fewer clusters than now count.
    """
    task = next(task for task in tasks if task.name == gate.task)
    part = task.select_compared_items(gate.against) if gate.against else task
    n = len({*part.clusters})
    looks = sorted({look for look in earlier_looks if 0 < look < n})
    max_n = gate.max_n
    compute_level = plan_looks(gate, part.role, looks)
    if compute_level is None or not n:
        return decide_at_level(gate, part)
    leveled_gate = replace(gate, rule=replace(gate.rule, level=compute_level(n)))
    decision = replace(decide_at_level(leveled_gate, part), looks=(*looks, n))
    if max_n is not None and looks and looks[-1] >= max_n:
        why = f"the last of the planned looks, at {max_n:,} items or more, was made before"
        return replace(decision, outcome="undecided", n_to_decide=None, why=why)
    if decision.outcome != "undecided" or decision.why:
        return decision
    if max_n is not None and n >= max_n:
        return replace(decision, n_to_decide=None, why=f"{max_n:,} items were planned, and this is the last look")
    n_to_decide = find_deciding_n(gate, part, n, compute_level)
    why = "" if n_to_decide or max_n is None else f"no number up to the planned {max_n:,} would decide it"
    return replace(decision, n_to_decide=n_to_decide, why=why)


def plan_looks(gate: EvalGate, role: str, looks: Sequence[int]) -> Callable[[int], float] | None:
    """Return the level of the gate's interval at its next look, as a function of the number of clusters then. Returns
    None if the gate looks once.

    Args:
        role: of the gate's task.
        looks: numbers of clusters at the looks so far.
    """
    max_n = gate.max_n
    if max_n is not None:
        before = [look for look in looks if look < max_n]  # data that exceed the plan count as the last look
        return lambda n: quantile_to_level(compute_boundary_quantile([*before, min(n, max_n)], max_n, gate.rule.level))
    if role == PEOPLE:
        tightest_n = max(SEQUENCE_TIGHTEST_N, gate.rule.least_n)
        return lambda n: quantile_to_level(compute_sequence_quantile(n, tightest_n, gate.rule.level))
    return None


def find_deciding_n(gate: EvalGate, task: ScoredTask, n: int, compute_level: Callable[[int], float]) -> int | None:
    """Return the smallest number of clusters above n with which the gate's next look would decide, if the figure stays
    the same. Returns None if there is none, up to the gate's `max_n`."""

    def decides(count: int) -> bool:
        needed = estimate_items_to_decide(gate, task, compute_level(count))
        return needed is not None and needed <= count

    highest = gate.max_n or MAX_CLUSTERS
    low = n
    high = min(2 * n, highest)
    while not decides(high):
        if high == highest:
            return None
        low = high
        high = min(2 * high, highest)
    while high - low > 1:
        middle = (low + high) // 2
        if decides(middle):
            high = middle
        else:
            low = middle
    return high


def decide_at_level(gate: EvalGate, part: ScoredTask) -> Decision:
    """Decide a gate at its rule's level, as `decide_gate` does.

    Args:
        part: the gate's task, with the compared items alone.
    """
    decision = decide_from_verdicts(gate, part)
    why = ""
    if part.missing_verdicts:
        outcomes = {decide_from_verdicts(gate, part.fill_missing_verdicts(value)).outcome for value in (0.0, 1.0)}
        why = (
            f"{pluralize(part.missing_verdicts, 'judgement')} without a verdict could change it"
            if len(outcomes) > 1
            else ""
        )
    verdict_pairs = collect_both_orders(part.verdicts.get(gate.against, ())).values()
    if verdict_pairs and not any(first == second for first, second in verdict_pairs):
        why = "every verdict changes when the two answers swap places: the judge decides by their position"
    return replace(decision, outcome="undecided", n_to_decide=None, why=why) if why else decision


def decide_from_verdicts(gate: EvalGate, task: ScoredTask) -> Decision:
    """Decide a gate by the task's scores or verdicts as they are, without testing what missing verdicts could
    change."""
    if not task.items:  # people have not judged any item yet
        return replace(decide_by_rule(gate.rule, EMPTY_FIGURE), n_to_decide=None)
    decision = decide_by_rule(gate.rule, compute_figure(gate, task, gate.rule.level))
    if decision.outcome != "undecided":
        return decision
    return replace(decision, n_to_decide=estimate_items_to_decide(gate, task, gate.rule.level))


def compute_figure(gate: EvalGate, task: ScoredTask, level: float) -> Interval:
    """Return the figure that a gate decides on, with its interval. A comparison by a judge is about wins less losses,
    since the units of its scores are arbitrary."""
    if gate.against and task.role == "measured":
        return compute_score_difference(*task.get_compared_values(gate.against), task.clusters, level)
    if gate.against:
        return compute_share_difference(*get_compared_shares(gate, task), task.clusters, level)
    return compute_mean_score(task, next(iter(task.answers)), level)


def get_compared_shares(gate: EvalGate, task: ScoredTask) -> tuple[Sequence[float], Sequence[float]]:
    """Return the wins of both models on each item if a judge compared them, else their scores."""
    if not task.verdicts:
        return task.get_compared_values(gate.against)
    wins = task.get_wins(gate.against)
    return wins, [1 - win for win in wins]


def estimate_items_to_decide(gate: EvalGate, task: ScoredTask, level: float) -> int | None:
    """Return the number of clusters with which an interval at a level would exclude the gate's bound in four of five
    cases, if the figure stays the same. Returns None if no number suffices."""
    bound = gate.rule.bound
    if gate.against and task.role != "measured":
        n = compute_sample_size_for_pairs(*get_compared_shares(gate, task), bound, task.clusters, level)
    elif not gate.against and task.role in SHARE_ROLES:
        means = average_by_group(task.clusters, task.get_scores(next(iter(task.answers))))[0]
        p = float(means.mean())
        dispersion = float(means.var()) / (p * (1 - p)) if 0 < p < 1 else 1.0
        n = compute_sample_size_for_share(p, bound, dispersion, level)
    else:
        return estimate_n_to_decide(replace(gate.rule, level=level), compute_figure(gate, task, level))
    return None if n is None else max(n, gate.rule.least_n)


def decide_on_collapse(gate: EvalGate, decision: Decision, system: str, collapse: Collapse) -> Decision:
    """Change a gate's decision to `fail` if the model's answers collapsed to few texts, unless the gate has `collapsed:
    true`. Returns the decision.

    Args:
        system: the name of the system that the gate is about.
        collapse: the verdict on this system.
    """
    reasons = "; ".join(collapse.reasons)
    if collapse.verdict == COLLAPSED and gate.collapsed is not True:
        return replace(decision, outcome="fail", n_to_decide=None, why=f"{system} collapsed: {reasons}")
    if collapse.verdict == NOT_MEASURED and gate.collapsed is not True:
        outcome = "undecided" if gate.collapsed and decision.outcome == "pass" else decision.outcome
        why = explain_undecided(decision) if decision.outcome == "undecided" else decision.why
        unmeasured = f"whether {system} collapsed is not measured: {reasons}"
        return replace(decision, outcome=outcome, why="; ".join(filter(None, (why, unmeasured))))
    return decision


def explain_undecided(decision: Decision) -> str:
    """Return the reason for which a gate is undecided, or the number of items that would decide it, as text."""
    if decision.why:
        return decision.why
    if not decision.figure.n:
        return "no answer is judged yet"
    if not decision.n_to_decide:
        return "no number of items would decide it"
    return f"{pluralize(decision.n_to_decide, 'item')} would decide it, if the figure stays the same"


def describe_decision(gate: EvalGate, decision: Decision) -> str:
    """Format a gate's outcome, condition and figure as one line of text."""
    figure = f"{format_interval(decision.figure.as_dict())} on {decision.figure.n}"
    if decision.level != gate.rule.level:
        figure += f" at level {decision.level:.4g}"
    if len(decision.looks) > 1:
        figure += f", look {len(decision.looks)}"
    why = explain_undecided(decision) if decision.outcome == "undecided" else decision.why
    if why:
        figure = f"{figure}; {why}"
    return f"gate {gate.name}: {decision.outcome} ({gate.condition}: {figure})"


def build_verdict_file(
    gate: EvalGate, decision: Decision, inputs: Mapping[str, str], judged_by: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the JSON content of a gate's verdict file, which alias gates read later.

    Args:
        inputs: name → digest. The verdict is on `artifact`.
        judged_by: the judge that decided, with its report and agreement. None if checks decided.
    """
    return {
        "schema_version": 1,
        "gate": gate.name,
        "verdict": decision.outcome,
        "figure": decision.figure.as_dict(),
        "level": decision.level,
        "looks": [*decision.looks],
        "asked": gate.condition,
        "n_to_decide": decision.n_to_decide,
        "why": decision.why,
        "inputs": dict(inputs),
        **(judged_by or {}),
    }


def build_junit_xml(suite: str, decisions: Mapping[str, tuple[EvalGate, Decision]]) -> str:
    """Return the outcomes of all gates as JUnit XML. An outcome other than `pass` is a failure, with the outcome as its
    type."""
    failures = sum(decision.outcome != "pass" for _, decision in decisions.values())
    root = ElementTree.Element("testsuite", name=suite, tests=str(len(decisions)), failures=str(failures))
    for name, (gate, decision) in decisions.items():
        case = ElementTree.SubElement(root, "testcase", classname=suite, name=name)
        if decision.outcome != "pass":
            ElementTree.SubElement(case, "failure", type=decision.outcome, message=describe_decision(gate, decision))
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"
