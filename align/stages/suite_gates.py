"""What the gates of a suite ask of the judge that would decide them, before anything is generated. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from align.config.root import Config
from align.errors import require
from align.evals.gates import FIELD, Gate
from align.evals.judge_identity import JudgeIdentity
from align.evals.judge_report import MIN_AGREEMENT, JudgeReport, choose_report

DROP = "Drop it."


def check_gates(
    config: Config, gates: Sequence[Gate], judges: Mapping[str, JudgeIdentity | None], cards: Sequence[JudgeReport],
    proxy: bool,
) -> dict[str, JudgeReport]:  # fmt: skip
    """The cards by which judges decide gates, by gate.

    Args:
        gates: all of `eval.gates`, in their order there.
        judges: task → who judges its answers, of the tasks that have no checks; None of people, who need no card.
        cards: those that are named.
        proxy: some system was optimised against the judge.

    Raises:
        InputError: a gate asks what its task does not say, or would be decided by a judge that may not decide it.
    """
    by_judge = [gate for gate in gates if gate.task in judges]
    with_card = [(gate, judge) for gate in by_judge if (judge := judges[gate.task]) is not None]
    named = {gate.name for gate, _ in with_card}
    for i, gate in enumerate(gates):
        problem = f"is of judges, and task {gate.task} has {'checks' if gate not in by_judge else 'people'}"
        said = gate.name in named or gate.min_agreement is None
        require(said, f"{FIELD}[{i}].min_agreement", gate.min_agreement, problem, DROP)
        problem, remedy = "asks for a mean score of a judge, which has units of its own", "Name a system in `against`."
        compared = gate.task not in judges or bool(gate.against or gate.asks)
        require(compared, f"{FIELD}[{i}].task", gate.task, problem, remedy)
    problem = "is the card of a judge, and no gate is decided by one"
    require(bool(with_card) or not config.stage.card, "stage.card", config.stage.card, problem, DROP)
    found = dict[str, JudgeReport]()
    for gate, judge in with_card:
        problem = f"would decide gate {gate.name}, and some system was optimised against it: a proxy decides nothing"
        require(not proxy or bool(gate.asks), "reward", judge.title, problem, "Judge by another scorer.")
        least = MIN_AGREEMENT if gate.min_agreement is None else gate.min_agreement
        found[gate.name] = choose_report(gate.name, judge, cards, config.stage.card, least)
    return found
