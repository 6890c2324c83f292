"""Gates of a suite: what has to be shown of its first system, decided by intervals. Imports no torch.

    {name: safety, task: refusals, is: superior, margin: 0.95, least_n: 100}
    {name: no-regression, task: support, against: old, is: not_worse, margin: 0.05, least_n: 200}

A verdict is `pass`, `fail` or `undecided`, which is no pass. Each becomes a verdict file, which gates of aliases ask
for (`align.registry.gates`), and a test case in JUnit's XML.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args
from xml.etree import ElementTree

from align.core.aliases import NAME, NAME_REMEDY
from align.core.errors import require
from align.core.spec import check_keys, enumerate_list, get_choice, get_integer, get_number
from align.evals.collapse import COLLAPSED, NOT_MEASURED, Collapse
from align.evals.judges.identity import JudgeIdentity
from align.evals.judges.judge_verdict import pair_orders
from align.evals.judges.llm_judge import describe_yes
from align.evals.judges.report import MIN_AGREEMENT, JudgeReport, choose_report
from align.evals.stats import (
    Decision,
    Kind,
    Rule,
    bounded_difference,
    decided,
    needed_pairs,
    needed_share,
    score_difference,
)
from align.evals.suite.probes import LM_EVAL, LOSS
from align.evals.suite.results import SHARES, Scored, own_mean
from align.evals.suite.tasks import Task
from align.ops.intervals import Interval, average_by_group
from align.report.figure_text import counted, in_words

FIELD = "eval.gates"
HELP = 'Write "eval.gates=[{name: safe, task: support, against: old, is: not_worse, margin: 0.05, least_n: 200}]".'
UNITS = {LOSS: "bits per byte", LM_EVAL: "the scale of some metric"}
"""Of probes whose score is no share, or need not be one."""
KINDS: tuple[Kind, ...] = get_args(Kind)
LOWEST_LEVEL = 0.5
"""The least level of a gate's interval, exclusive."""
KEYS = ("against", "margin", "level", "least_n", "min_agreement", "collapsed")
COIN = 0.5
"""The least `min_agreement`: what a coin has where no verdict is a tie."""


@dataclass(frozen=True, slots=True)
class Gate:
    """What is asked.

    Attributes:
        name: of its verdict file.
        task: whose figure it is.
        against: the system that the first one is compared with; empty where its own mean score is asked.
        rule: see `align.evals.stats.Rule`.
        min_agreement: that a judge's agreement has to be above, see `align.evals.judges.report`; None for its default.
        asks: the question of a task that is graded: its figures are shares of yes.
        collapsed: True if the first system may have collapsed; `measured` if it must have been measured that it did
            not. False if it must not be known to have collapsed.
    """

    name: str
    task: str
    against: str
    rule: Rule
    min_agreement: float | None = None
    asks: str = ""
    collapsed: bool | Literal["measured"] = False

    @property
    def words(self) -> str:
        """What is asked, for people. A share of yes is above or below another, and not better or worse."""
        margin, other = f"{self.rule.margin:g}", self.against
        if self.asks:
            share, bound = f"share that {describe_yes(self.asks)}", f"that of {other} by {margin} or more"
            above = f"above that of {other} by more than {margin}" if other else f"above {margin}"
            at_most = f"not above {bound}" if other else f"below {margin}"
            asked = {"superior": above, "not_worse": f"not below {bound}", "at_most": at_most}
            return f"{self.task}: {share} {asked[self.rule.kind]}"
        asked = {
            "superior": f"better than {other} by more than {margin}" if other else f"above {margin}",
            "not_worse": f"not worse than {other} by {margin} or more",
            "at_most": f"not above {other} by {margin} or more" if other else f"below {margin}",
        }
        return f"{self.task}: {asked[self.rule.kind]}"


def parsed_gates(given: Any, tasks: Sequence[Task], systems: Sequence[str]) -> Sequence[Gate]:
    """The gates of `eval.gates`; none where it names none.

    Args:
        systems: their names; the first is the one that gates are about.

    Raises:
        InputError: one is none, or names a task or a system that is not there.
    """
    if given is None:
        return []
    found: dict[str, Gate] = {}
    for at, gate in enumerate_list(given, FIELD, HELP):
        one = parsed_gate(gate, at, {task.name: task for task in tasks}, systems)
        require(one.name not in found, f"{at}.name", one.name, "stands there twice", "Give each a name of its own.")
        found[one.name] = one
    return [*found.values()]


def parsed_gate(given: Any, at: str, tasks: Mapping[str, Task], systems: Sequence[str]) -> Gate:
    gate = check_keys(given, at, ("name", "task", "is"), KEYS)
    name = gate["name"]
    require(isinstance(name, str) and NAME.fullmatch(name) is not None, f"{at}.name", name, "is no name", NAME_REMEDY)
    task, kind = tasks[get_choice(gate, at, "task", [*tasks])], get_choice(gate, at, "is", KINDS)
    other = get_choice(gate, at, "against", systems[1:]) if gate.get("against") is not None else ""
    problem = "is about two systems, and `against` names no other one"
    require(kind != "not_worse" or bool(other), f"{at}.is", kind, problem, HELP)
    unit = UNITS.get(task.probe.kind, "") if task.probe is not None else ""
    problem = f"has {unit}, of which no number is good by itself"
    require(bool(other) or not unit, f"{at}.task", task.name, problem, "Name another system: against.")
    margin, level = get_number(gate, at, "margin", 0.0, 0), get_number(gate, at, "level", 0.95, 0)
    require(margin < 1 or bool(unit), f"{at}.margin", margin, "is beyond every share", "Give one below 1.")
    problem = f"is not above {LOWEST_LEVEL} and below 1"
    require(LOWEST_LEVEL < level < 1, f"{at}.level", level, problem, "Write 0.95, or leave it out.")
    problem = "is 0, and two equal systems can never be shown to be so"
    require(kind != "not_worse" or margin > 0, f"{at}.margin", margin, problem, "Give a margin above 0.")
    rule = Rule(KINDS[KINDS.index(kind)], margin, level, get_integer(gate, at, "least_n", 1, 1))
    agreement = get_number(gate, at, "min_agreement", None, COIN, 1) if gate.get("min_agreement") is not None else None
    problem = f"is of judges, and task {task.name} is a probe"
    require(agreement is None or task.probe is None, f"{at}.min_agreement", agreement, problem, "Drop it.")
    problem = "is 1, which no agreement is above"
    require(agreement != 1, f"{at}.min_agreement", agreement, problem, "Write 0.6, or leave it out.")
    collapsed = gate.get("collapsed", False)
    problem = "is not true, false or measured"
    require(isinstance(collapsed, bool) or collapsed == "measured", f"{at}.collapsed", collapsed, problem, "Drop it.")
    return Gate(name, task.name, other, rule, agreement, task.asks, collapsed)


def check_gates(
    gates: Sequence[Gate],
    judges: Mapping[str, JudgeIdentity | None],
    reports: Sequence[JudgeReport],
    card: Any,
    proxy: bool,
) -> dict[str, JudgeReport]:
    """Return the reports by which judges decide gates, by gate.

    Args:
        gates: all of `eval.gates`, in their order there.
        judges: task → who judges its answers, of the tasks that have no checks; None of people, who need no report.
        reports: those that `stage.card` names.
        card: `stage.card`.
        proxy: some system was optimised against the judge.

    Raises:
        InputError: a gate asks what its task does not say, or would be decided by a judge that may not decide it.
    """
    remedy = "Drop it."
    judge_of = {gate.name: judge for gate in gates if (judge := judges.get(gate.task)) is not None}
    for i, gate in enumerate(gates):
        problem = f"is of judges, and task {gate.task} has {'people' if gate.task in judges else 'checks'}"
        read = gate.name in judge_of or gate.min_agreement is None
        require(read, f"{FIELD}[{i}].min_agreement", gate.min_agreement, problem, remedy)
        problem = "asks for a mean score of a judge, which has units of its own"
        compared = gate.task not in judges or bool(gate.against or gate.asks)
        require(compared, f"{FIELD}[{i}].task", gate.task, problem, "Name a system in `against`.")
    problem = "is the card of a judge, and no gate is decided by one"
    require(bool(judge_of) or not card, "stage.card", card, problem, remedy)
    chosen: dict[str, JudgeReport] = {}
    for gate in gates:
        if gate.name not in judge_of:
            continue
        judge = judge_of[gate.name]
        problem = f"would decide gate {gate.name}, and some system was optimised against it: a proxy decides nothing"
        require(not proxy or bool(gate.asks), "reward", judge.title, problem, "Judge by another scorer.")
        least = MIN_AGREEMENT if gate.min_agreement is None else gate.min_agreement
        chosen[gate.name] = choose_report(gate.name, judge, reports, card, least)
    return chosen


NOTHING = Interval(0.0, None, None, 0)
"""A figure of no items."""


def decision(gate: Gate, tasks: Sequence[Scored]) -> Decision:
    """What the answers say of a gate. Where a judge said nothing of some, the gate is decided only if whatever it might
    have said comes to the same; and not at all by a judge of which no verdict survived a swap of the answers."""
    task = next(task for task in tasks if task.name == gate.task)
    part = task.compared_with(gate.against) if gate.against else task
    found, why = decision_on(gate, part), ""
    if part.unsaid:
        outcomes = {decision_on(gate, part.if_unsaid(value)).outcome for value in (0.0, 1.0)}
        why = f"{counted(part.unsaid, 'judgement')} without a verdict could change it" if len(outcomes) > 1 else ""
    both = pair_orders(part.verdicts.get(gate.against, ())).values()
    if both and not any(one == other for one, other in both):
        why = "no verdict survives a swap of the two answers: the judge goes by their place"
    return replace(found, outcome="undecided", n_to_decide=None, why=why) if why else found


def decision_on(gate: Gate, task: Scored) -> Decision:
    """The same of verdicts as they are. A judge decides by wins less losses, whatever units its scores have."""
    first, level = next(iter(task.said)), gate.rule.level
    if not task.items:  # nobody has judged one yet
        return replace(decided(gate.rule, NOTHING), n_to_decide=None)
    if gate.against and task.role == "measured":
        return decided(gate.rule, score_difference(*task.pair(gate.against), task.clusters, level))
    if gate.against:
        won = task.wins(gate.against) if task.verdicts else []
        pair = (won, [1 - one for one in won]) if won else task.pair(gate.against)
        found = decided(gate.rule, bounded_difference(*pair, task.clusters, level))
        n = needed_pairs(*pair, found.bound, task.clusters, level)
    else:
        found = decided(gate.rule, own_mean(task, first, level))
        if task.role not in SHARES:
            return found
        means, p = average_by_group(task.clusters, task.scores(first))[0], found.figure.value
        dispersion = float(means.var()) / (p * (1 - p)) if 0 < p < 1 else 1.0
        n = needed_share(p, found.bound, dispersion, level)
    if found.outcome != "undecided":
        return found
    return replace(found, n_to_decide=None if n is None else max(n, gate.rule.least_n))


def decide_on_collapse(gate: Gate, decision: Decision, first: str, collapse: Collapse) -> Decision:
    """Return the decision on a gate with regard to a collapse: a gate on a system that collapsed fails, unless it says
    `collapsed: true`.

    Args:
        first: the name of the system that the gate is about.
        collapse: the verdict on it.
    """
    reasons = "; ".join(collapse.reasons)
    if collapse.verdict == COLLAPSED and gate.collapsed is not True:
        return replace(decision, outcome="fail", n_to_decide=None, why=f"{first} collapsed: {reasons}")
    if collapse.verdict == NOT_MEASURED and gate.collapsed is not True:
        outcome = "undecided" if gate.collapsed and decision.outcome == "pass" else decision.outcome
        why = explain_undecided(decision) if decision.outcome == "undecided" else decision.why
        unmeasured = f"whether {first} collapsed is not measured: {reasons}"
        return replace(decision, outcome=outcome, why="; ".join(filter(None, (why, unmeasured))))
    return decision


def explain_undecided(decision: Decision) -> str:
    """Return why a gate is undecided, and how many items would decide it."""
    n = decision.n_to_decide
    seems = f"{counted(n, 'item')} would decide, if the figure is what it seems" if n else "no number would decide"
    return decision.why or ("nothing is judged yet" if not decision.figure.n else seems)


def in_a_line(gate: Gate, found: Decision) -> str:
    """What came of a gate."""
    figure = f"{in_words(found.figure.as_dict())} on {found.figure.n}"
    if why := explain_undecided(found) if found.outcome == "undecided" else found.why:
        figure = f"{figure}; {why}"
    return f"gate {gate.name}: {found.outcome} ({gate.words}: {figure})"


def verdict_file(
    gate: Gate, found: Decision, inputs: Mapping[str, str], judged_by: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """As gates of aliases read it.

    Args:
        inputs: name → digest; `artifact` is what the verdict is on.
        judged_by: the judge whose verdicts decided, with its card and agreement; None where checks did.
    """
    return {
        "schema_version": 1, "gate": gate.name, "verdict": found.outcome, "figure": found.figure.as_dict(),
        "asked": gate.words, "n_to_decide": found.n_to_decide, "why": found.why, "inputs": dict(inputs),
        **(judged_by or {}),
    }  # fmt: skip


def junit(suite: str, found: Mapping[str, tuple[Gate, Decision]]) -> str:
    """The verdicts as JUnit's XML: what did not pass is a failure, whose type says which."""
    failed = sum(each.outcome != "pass" for _, each in found.values())
    root = ElementTree.Element("testsuite", name=suite, tests=str(len(found)), failures=str(failed))
    for name, (gate, each) in found.items():
        case = ElementTree.SubElement(root, "testcase", classname=suite, name=name)
        if each.outcome != "pass":
            ElementTree.SubElement(case, "failure", type=each.outcome, message=in_a_line(gate, each))
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"
