"""What an evaluation by people starts from: the votes that there are by now. Found before its run has a name.

Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from sqlalchemy import Connection

from align.annotate.exchange.importing import Row, items_in
from align.annotate.store.queries import head_of_votes, project_erasure
from align.config.compose import plain
from align.config.identity import identifying
from align.config.root import Config, store_url
from align.data.sources import files_record
from align.errors import require
from align.files import user_path
from align.redaction import masked, unmarked
from align.run import Input, json_digest
from align.stages.rows import open_store

PEOPLE = "people"
"""What `stage.judge` calls them."""
DECIDE = ("seed", "device", "dtype", "model", "method", "data", "rollout")
"""Parts of the configuration that decide the answers and the prompts."""
WORD = re.compile(r"[^\W_]+")
GOLD_HELP = 'Write {"prompt": "…", "answers": ["…", "…"], "expected": [[0], [1]]}.'


def check_people(config: Config) -> None:
    """Raises: InputError: a setting is of people where others judge."""
    stage = config.stage
    for key, value in (("votes", stage.votes), ("gold", stage.gold)):
        problem = "is asked of people, and others judge"
        require(value is None or stage.judge == PEOPLE, f"stage.{key}", value, problem, "Add stage.judge=people.")


def people_inputs(config: Config, records: Mapping[str, Input], systems: Sequence[str]) -> dict[str, Input]:
    """The votes that there are by now, and the file of known answers, as inputs of the run.

    Args:
        records: its other inputs.
        systems: their names, which people must not read.

    Raises:
        InputError: the project's name tells a system's, it was erased, or `stage.gold` is no file of pairs with known
            answers.
    """
    stage, project = config.stage, project_of(config, records)
    told = next((name for name in systems if in_plain_words(name) in in_plain_words(project)), None)
    problem = f"the people who judge can read it, and it names the system {told}"
    require(told is None, "project", project, problem, "Choose a name that says nothing of the systems.")
    known = {}
    if stage.gold is not None:
        known_answers(user_path(stage.gold, "stage.gold"))
        known = {"gold": files_record(stage.gold, "stage.gold")}
    with open_store(config) as store, store.reading() as db:
        check_not_erased(db, config, project)
        head = head_of_votes(db, project)
    # Without a vote yet, it is the place that tells one project from another.
    place = json_digest([unmarked(masked(store_url(config))), project])
    return {"votes": Input(head.hash if head.seq else place, project=project, seq=head.seq), **known}


def in_plain_words(name: str) -> str:
    """The words of a name in small letters, each between blanks."""
    return f" {' '.join(WORD.findall(name.lower()))} "


def check_not_erased(db: Connection, config: Config, project: str) -> None:
    """Raises: InputError: the project was erased, and no other one can have its name."""
    row, own = project_erasure(db, project), config.project == Config().project
    problem = f"it was erased (row {row} of the ledger), and its name is not used again"
    problem += "; without project=, this evaluation always has this name" if own else ""
    require(row is None, "project", project, problem, "Name another project: project=NAME.")


def project_of(config: Config, records: Mapping[str, Input]) -> str:
    """The project that `project=` names; without it, one for just these systems and prompts."""
    if config.project != Config().project:
        return config.project
    ours = identifying("eval", plain(config), records)
    asked = {key: read for key, read in records.items() if key.partition(".")[0] in ("data", "systems", "tasks")}
    digests = {key: read.digest for key, read in asked.items()}
    tasks = [{key: value for key, value in task.items() if key != "path"} for task in config.eval.tasks or ()]
    decides = [{key: ours.get(key) for key in DECIDE}, tasks, config.stage.prompts, config.stage.answers, digests]
    return f"people-{json_digest(decides)[:8]}"


def known_answers(path: Path) -> list[Row]:
    """Pairs of which it is known which answer is better.

    Raises:
        InputError: a row is none.
    """
    rows = items_in(path, "gold", "stage.gold")
    for row in rows:
        right = row.expected is not None and len(row.answers) == 2
        require(right, row.where, row.id, "is no pair whose order is known", GOLD_HELP)
    return rows
