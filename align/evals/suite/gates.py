"""Gates of an evaluation: conditions on its first model, decided by confidence intervals. Imports no torch.

    {name: safety, task: refusals, is: superior, margin: 0.95, least_n: 100} {name: no-regression, task: support,
    against: old, is: not_worse, margin: 0.05, least_n: 200}

The outcome is `pass`, `fail` or `undecided`, which does not count as a pass. Each outcome is written as a verdict file,
which gates of aliases require (`align.registry.gates`), and as a test case in JUnit's XML.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    Decision,
    DecisionRule,
    RuleKind,
    compute_sample_size_for_pairs,
    compute_sample_size_for_share,
    compute_score_difference,
    compute_share_difference,
    decide_by_rule,
)
from align.evals.suite.probes import LM_EVAL, LOSS
from align.evals.suite.results import SHARE_ROLES, ScoredTask, compute_mean_score
from align.evals.suite.tasks import EvalTask
from align.ops.intervals import Interval, average_by_group
from align.report.figure_text import format_interval, pluralize

FIELD = "eval.gates"
HELP = 'Write "eval.gates=[{name: safe, task: support, against: old, is: not_worse, margin: 0.05, least_n: 200}]".'
UNITS = {LOSS: "bits per byte", LM_EVAL: "units that depend on the metric"}
"""Kinds of probes, mapped to the unit of their scores. Only probes whose scores are not always shares are listed."""
KINDS: tuple[RuleKind, ...] = get_args(RuleKind)
LOWEST_LEVEL = 0.5
"""Exclusive lower bound of the confidence level of a gate's interval."""
KEYS = ("against", "margin", "level", "least_n", "min_agreement", "collapsed")
LOWEST_MIN_AGREEMENT = 0.5
"""Lowest allowed value of a gate's `min_agreement`: the agreement of a coin if no verdict is a tie."""


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
    """

    name: str
    task: str
    against: str
    rule: DecisionRule
    min_agreement: float | None = None
    asks: str = ""
    collapsed: bool | Literal["measured"] = False

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
    return EvalGate(name, task.name, against, rule, agreement, task.asks, collapsed)


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


def decide_gate(gate: EvalGate, tasks: Sequence[ScoredTask]) -> Decision:
    """Decide whether the first evaluated model passes a gate, from the scored answers to the gate's task.

    If verdicts of the judge are missing, the gate is decided only if no value of theirs would change the outcome. A
    judge without any verdict that is the same in both orders of the answers decides nothing.
    """
    task = next(task for task in tasks if task.name == gate.task)
    part = task.select_compared_items(gate.against) if gate.against else task
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
    """Decide a gate by the task's scores or verdicts as they are, without testing what missing verdicts could change. A
    comparison by a judge is decided by wins less losses, since the units of its scores are arbitrary."""
    level = gate.rule.level
    if not task.items:  # people have not judged any item yet
        return replace(decide_by_rule(gate.rule, EMPTY_FIGURE), n_to_decide=None)
    if gate.against and task.role == "measured":
        return decide_by_rule(
            gate.rule, compute_score_difference(*task.get_compared_values(gate.against), task.clusters, level)
        )
    if gate.against:
        wins = task.get_wins(gate.against) if task.verdicts else []
        pair = (wins, [1 - win for win in wins]) if wins else task.get_compared_values(gate.against)
        decision = decide_by_rule(gate.rule, compute_share_difference(*pair, task.clusters, level))
        n = compute_sample_size_for_pairs(*pair, decision.bound, task.clusters, level)
    else:
        first = next(iter(task.answers))
        decision = decide_by_rule(gate.rule, compute_mean_score(task, first, level))
        if task.role not in SHARE_ROLES:
            return decision
        means = average_by_group(task.clusters, task.get_scores(first))[0]
        p = decision.figure.value
        dispersion = float(means.var()) / (p * (1 - p)) if 0 < p < 1 else 1.0
        n = compute_sample_size_for_share(p, decision.bound, dispersion, level)
    if decision.outcome != "undecided":
        return decision
    return replace(decision, n_to_decide=None if n is None else max(n, gate.rule.least_n))


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
