"""The check `reasoning_gym`: the task that generated a prompt gives the answer its full score."""

from __future__ import annotations

from contextlib import redirect_stdout
from io import StringIO
from typing import Any

from align.core.errors import require
from align.core.spec import get_integer, get_text, require_keys
from align.data.generated_tasks import SOURCE, get_version, load_task, parse_task
from align.reward.checkers.checked import Checker, Part, make_part


def build(spec: Any, field: str) -> Checker:
    """Build the checker of an answer to a generated prompt: `{kind: reasoning_gym, version: 0.1.25,
    task: {name: gcd, seed: 0}, index: 7}`. `data=reasoning_gym` writes it into the rows of its prompts.

    The checker reads the text in the answer's last `<answer>…</answer>`, or the whole answer if it has no such tags.

    Raises:
        InputError: a key is wrong, or another version of reasoning-gym generated the prompt.
    """
    settings = require_keys(spec, field, ("kind", "version", "task", "index"))
    generated_by = get_text(settings, field, "version")
    problem = (
        f"generated the prompt, and reasoning-gym {get_version()} is installed, which may number its tasks otherwise"
    )
    remedy = f"Run: pip install reasoning-gym=={generated_by}"
    require(generated_by == get_version(), f"{field}.version", generated_by, problem, remedy)
    task = parse_task(settings["task"], f"{field}.task")
    dataset = load_task(task)
    entry = dataset[get_integer(settings, field, "index", maximum=len(dataset) - 1)]
    asks = f"the answer solves this task ({task['name']})"

    def check_answer(answer: str) -> list[Part]:
        from reasoning_gym.utils import extract_answer

        tagged = extract_answer(answer)
        text = answer.strip() if tagged is None else tagged
        with redirect_stdout(StringIO()):  # some tasks print what is wrong with an answer
            is_right = dataset.score_answer(text, entry) >= 1
        return [make_part(asks, is_right, "" if is_right else text, compared=text)]

    return Checker(SOURCE, (asks,), check_answer)
