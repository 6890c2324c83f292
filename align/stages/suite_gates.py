"""What the gates of a suite ask of the judge that would decide them, before anything is generated. Imports no torch."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from align.config.root import Config
from align.errors import require
from align.evals.card_gate import MIN_AGREEMENT, Card, admit
from align.evals.gates import FIELD, Gate
from align.evals.judge_identity import JudgeIdentity

DROP = "Drop it."


def check_gates(
    config: Config, gates: Sequence[Gate], judged: Collection[str], judge: JudgeIdentity | None, card: Card | None,
    proxy: bool,
) -> None:  # fmt: skip
    """
    Args:
        judged: the tasks whose answers a judge compares.
        judge: who that is; None of people, who need no card.
        card: the one that is named; None where none is.
        proxy: some system was optimised against the judge.

    Raises:
        InputError: a gate asks what its task does not say, or would be decided by a judge that may not decide it.
    """
    by_judge = [gate for gate in gates if gate.task in judged]
    with_card = by_judge if judge is not None else []
    for gate in gates:
        problem = f"is of judges, and task {gate.task} has {'checks' if gate not in by_judge else 'people'}"
        said = gate in with_card or gate.min_agreement is None
        require(said, f"{FIELD}, {gate.name}, min_agreement", gate.min_agreement, problem, DROP)
    for gate in by_judge:
        problem, remedy = "asks for a mean score of a judge, which has units of its own", "Name a system in `against`."
        require(bool(gate.against), f"{FIELD}, {gate.name}", gate.task, problem, remedy)
    problem = "is the card of a judge, and no gate is decided by one"
    require(bool(with_card) or not config.stage.card, "stage.card", config.stage.card, problem, DROP)
    for gate in with_card:
        assert judge is not None
        problem = f"would decide gate {gate.name}, and some system was optimised against it: a proxy decides nothing"
        require(not proxy, "reward", judge.title, problem, "Judge by another scorer.")
        least = MIN_AGREEMENT if gate.min_agreement is None else gate.min_agreement
        admit(gate.name, judge, card, config.stage.card, least)
