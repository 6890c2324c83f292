"""Gates of an evaluation: conditions on its first model, decided by confidence intervals. Imports no torch.

    {name: safety, task: refusals, is: superior, margin: 0.95, least_n: 100} {name: no-regression, task: support,
    against: old, is: not_worse, margin: 0.05, least_n: 200}

The outcome is `pass`, `fail` or `undecided`, which does not count as a pass. Each outcome is written as a verdict file,
which gates of aliases require (`align.registry.gates`), and as a test case in JUnit's XML.

A gate may be evaluated again as data arrive. With `max_n` a group-sequential boundary keeps the total error at the
gate's level; without, gates on people's votes use a confidence sequence (`align.ops.looks`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import takewhile
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
from align.evals.stats.decisions import Decision, DecisionRule, Look, RuleKind, decide_by_rule, estimate_n_to_decide
from align.evals.stats.paired import compute_sample_size_for_pairs, compute_score_difference, compute_share_difference
from align.evals.stats.power import MAX_CLUSTERS, compute_sample_size_for_share, find_smallest_n
from align.evals.suite.people import PEOPLE
from align.evals.suite.probes import LM_EVAL, LOSS
from align.evals.suite.results import SHARE_ROLES, ScoredTask, compute_mean_score
from align.evals.suite.tasks import EvalTask
from align.ops.intervals import Interval, average_by_group
from align.ops.looks import compute_boundary_quantile, compute_sequence_quantile, quantile_to_level
from align.report.figure_text import format_interval, pluralize
from align.run import json_digest

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
        rule: see `align.evals.stats.decisions.DecisionRule`.
        min_agreement: lower bound of the judge's agreement, see `align.evals.judges.report`. None for its default.
        asks: the question of a graded task, whose figures are shares of yes.
        collapsed: True if the first system may have collapsed; `measured` if it must have been measured that it did
            not. False if it must not be known to have collapsed.
        max_n: planned largest number of clusters over all evaluations. None for no plan: the gate is then decided
            once, or by a confidence sequence if people judge.
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
    problem = "is 0, and a single right answer can show a score above 0"
    remedy = "Give the score that has to be exceeded as the margin, or name another system: against."
    require(kind != "superior" or bool(against) or margin > 0, f"{field}.margin", margin, problem, remedy)
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
    earlier_looks: Mapping[str, Sequence[Look]] = {},
) -> dict[str, Decision]:
    """Decide whether the first evaluated model passes each gate. Returns name of the gate → its decision.

    With `any`, Holm's step-down rule bounds the probability that any gate passes wrongly. Each round decides the m
    gates that have not passed at level 1 − (1 − level)/m, and the rounds end when no further gate passes.

    Args:
        family: `all` if every gate has to pass, `any` if one is enough.
        earlier_looks: name of a gate → its earlier evaluations, in order.
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
    """Return a copy of the gate whose error, 1 − level, is divided by the number of gates."""
    return set_level(gate, 1 - (1 - gate.rule.level) / gate_count)


def set_level(gate: EvalGate, level: float) -> EvalGate:
    return replace(gate, rule=replace(gate.rule, level=level))


def decide_gate(gate: EvalGate, tasks: Sequence[ScoredTask], earlier_looks: Sequence[Look] = ()) -> Decision:
    """Decide whether the first evaluated model passes a gate, from the scored answers to the gate's task.

    If verdicts of the judge are missing, the gate is decided only if the outcome is the same with all of them as wins
    and with all of them as losses. A judge without any verdict that is the same in both orders of the answers decides
    nothing.

    A gate that is evaluated again as data arrive stays decided once an evaluation decided it, with the figure of that
    evaluation. An evaluation of the same data is the same look, and one without more clusters than the look before it
    decides nothing.

    Args:
        earlier_looks: earlier evaluations of the gate, in order. Only gates with `max_n` and on people's votes use
            them.
    """
    task = next(task for task in tasks if task.name == gate.task)
    compared_task = task.select_compared_items(gate.against) if gate.against else task
    n = len({*compared_task.clusters})
    if gate.max_n is None and task.role != PEOPLE:
        return decide_at_level(gate, compared_task)
    decided = next((look for look in earlier_looks if look.outcome != "undecided"), None)
    if decided is not None:
        why = f"an earlier evaluation decided it, on {pluralize(decided.n, 'item')}"
        bound = gate.rule.bound
        return Decision(decided.outcome, decided.figure, bound, None, why, decided.level, tuple(earlier_looks))
    if not n:
        return decide_at_level(gate, compared_task)
    if n < gate.rule.least_n:  # no look
        decision = decide_at_level(gate, compared_task)
        return replace(decision, n_to_decide=None if decision.why else find_deciding_n(gate, compared_task, n, []))
    data = digest_values(gate, compared_task)
    looks = [*takewhile(lambda look: look.data != data, earlier_looks)]
    if problem := explain_no_look(gate, n, looks):
        decision = decide_at_level(gate, compared_task)
        return replace(decision, outcome="undecided", n_to_decide=None, why=problem, looks=tuple(looks))
    counts = [look.n for look in looks]
    decision = decide_at_level(set_level(gate, compute_look_level(gate, [*counts, n])), compared_task)
    look = Look(n, decision.outcome, data, decision.figure, decision.level)
    decision = replace(decision, looks=(*looks, look))
    if decision.outcome != "undecided" or decision.why:
        return decision
    if gate.max_n is not None and n >= gate.max_n:
        return replace(decision, n_to_decide=None, why=f"max_n={gate.max_n} is reached without a decision")
    n_to_decide = find_deciding_n(gate, compared_task, n, [*counts, n])
    why = "" if n_to_decide else f"no number of items up to max_n={gate.max_n} would probably decide it"
    return replace(decision, n_to_decide=n_to_decide, why="" if gate.max_n is None else why)


def digest_values(gate: EvalGate, task: ScoredTask) -> str:
    """Return the digest of the values that a gate decides on, with the ids of their items."""
    if not gate.against:
        values = [task.get_scores(next(iter(task.answers)))]
    elif task.role == "measured":
        values = [*task.get_compared_values(gate.against)]
    else:
        values = [*get_compared_shares(gate, task)]
    return json_digest([[item.id for item in task.items], [[float(value) for value in column] for column in values]])


def explain_no_look(gate: EvalGate, n: int, looks: Sequence[Look]) -> str:
    """Return why an evaluation of n clusters is no further look of an undecided gate, as text. Empty if it is one."""
    if looks and gate.max_n is not None and looks[-1].n >= gate.max_n:
        return f"an earlier evaluation reached max_n={gate.max_n}, so that this one cannot decide it"
    if looks and n <= looks[-1].n:
        return f"an earlier evaluation had {pluralize(looks[-1].n, 'item')}, and this one does not have more"
    return ""


def compute_look_level(gate: EvalGate, counts: Sequence[int]) -> float:
    """Return the level of the gate's interval at the last of several looks with these numbers of clusters."""
    level = gate.rule.level
    if gate.max_n is not None:
        return quantile_to_level(compute_boundary_quantile(counts, gate.max_n, level))
    tightest_n = max(SEQUENCE_TIGHTEST_N, gate.rule.least_n)
    return quantile_to_level(compute_sequence_quantile(counts[-1], tightest_n, level))


def find_deciding_n(gate: EvalGate, task: ScoredTask, n: int, counts: Sequence[int]) -> int | None:
    """Return the smallest number of clusters above n with which the gate's next look would probably decide, if the
    figure stays the same. Returns None if there is none, up to the gate's `max_n`.

    Args:
        counts: numbers of clusters at the looks so far.
    """

    def decides(count: int) -> bool:
        needed = estimate_items_to_decide(gate, task, compute_look_level(gate, [*counts, count]))
        return needed is not None and needed <= count

    return find_smallest_n(decides, n, gate.max_n or MAX_CLUSTERS)


def decide_at_level(gate: EvalGate, compared_task: ScoredTask) -> Decision:
    """Decide a gate at its rule's level, without regard to other evaluations. Returns `undecided` if the outcome
    changes with all missing verdicts as wins or as losses, or if every verdict of a judge changes with the order of the
    answers. People are not tested for the latter, because different people judge the two orders of a pair.

    Args:
        compared_task: the gate's task, restricted to the items on which both systems are compared.
    """
    decision = decide_from_verdicts(gate, compared_task)
    why = ""
    if compared_task.missing_verdicts:
        filled = [decide_from_verdicts(gate, compared_task.fill_missing_verdicts(value)) for value in (0.0, 1.0)]
        outcomes = {decision.outcome, *(filled_decision.outcome for filled_decision in filled)}
        why = (
            f"{pluralize(compared_task.missing_verdicts, 'judgement')} without a verdict could change it"
            if len(outcomes) > 1
            else ""
        )
    verdict_pairs = collect_both_orders(compared_task.verdicts.get(gate.against, ())).values()
    if compared_task.role != PEOPLE and verdict_pairs and not any(first == second for first, second in verdict_pairs):
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
    n = estimate_items_to_decide(gate, task, gate.rule.level)
    if n is not None and decision.figure.n >= gate.rule.least_n:
        n = max(n, decision.figure.n + 1)
    return replace(decision, n_to_decide=n)


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
        figure += f" at level {format_level(decision.level)}"
    if len(decision.looks) > 1:
        figure += f", evaluation {len(decision.looks)} of this gate"
    why = explain_undecided(decision) if decision.outcome == "undecided" else decision.why
    if why:
        figure = f"{figure}; {why}"
    return f"gate {gate.name}: {decision.outcome} ({gate.condition}: {figure})"


def format_level(level: float) -> str:
    """Format a level so that it does not look like 1: `0.975`, `0.999985`, `0.999999`."""
    return f"{min(level, 0.999999):.6g}"


def build_verdict_file(
    gate: EvalGate,
    decision: Decision,
    inputs: Mapping[str, str],
    plan: Mapping[str, Any],
    judged_by: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the JSON content of a gate's verdict file, which alias gates read later.

    Args:
        inputs: name → digest. The verdict is on `artifact`.
        plan: see `describe_plan`.
        judged_by: the judge that decided, with its report and agreement. None if checks decided.
    """
    return {
        "schema_version": 1,
        "gate": gate.name,
        "verdict": decision.outcome,
        "figure": decision.figure.as_dict(),
        "level": decision.level,
        "plan": dict(plan),
        "looks": [asdict(look) for look in decision.looks],
        "asked": gate.condition,
        "n_to_decide": decision.n_to_decide,
        "why": decision.why,
        "inputs": dict(inputs),
        **(judged_by or {}),
    }


def describe_plan(gate: EvalGate, gates: Iterable[EvalGate], family: str, against: str) -> dict[str, Any]:
    """Return the settings of a gate that must not change between evaluations of data that grow. With family `any` the
    names of all gates are among them, since their number decides the levels.

    Args:
        gates: all of `eval.gates`.
        against: digest of the system that the first one is compared with; empty without one.
    """
    return {
        "task": gate.task,
        "against": against,
        "is": gate.rule.kind,
        "margin": gate.rule.margin,
        "level": gate.rule.level,
        "least_n": gate.rule.least_n,
        "max_n": gate.max_n,
        "any_of": sorted(each.name for each in gates) if family == "any" else [],
    }


def is_family_passed(outcomes: Iterable[str], family: str) -> bool:
    """Return whether every gate passed, or, if `family` is `any`, at least one."""
    passed = [outcome == "pass" for outcome in outcomes]
    return any(passed) if family == "any" else all(passed)


def build_junit_xml(suite: str, decisions: Mapping[str, tuple[EvalGate, Decision]], family: str = "all") -> str:
    """Return the outcomes of all gates as JUnit XML. An outcome other than `pass` is a failure, with the outcome as its
    type. If one passed gate is enough and there is one, the others count as skipped."""
    outcomes = [decision.outcome for _, decision in decisions.values()]
    kind = "skipped" if family == "any" and is_family_passed(outcomes, family) else "failure"
    count = str(sum(outcome != "pass" for outcome in outcomes))
    counts = {"failures": count if kind == "failure" else "0", "skipped": count if kind == "skipped" else "0"}
    root = ElementTree.Element("testsuite", {"name": suite, "tests": str(len(decisions)), **counts})
    for name, (gate, decision) in decisions.items():
        case = ElementTree.SubElement(root, "testcase", classname=suite, name=name)
        if decision.outcome != "pass":
            ElementTree.SubElement(case, kind, type=decision.outcome, message=describe_decision(gate, decision))
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"
