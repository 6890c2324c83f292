"""The work of a benchmark's row, and the line by which a child process reports its figures. Imports only the standard
library, because environments without align import it."""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
from dataclasses import asdict, dataclass
from typing import Any

PROMPTS = (
    "Tell me about your day.",
    "What is a good breakfast?",
    "How do I make friends?",
    "Why is the sky blue?",
    "Where do swallows go in winter?",
    "Which book should I read?",
    "When did people first sail?",
    "Who wrote Hamlet?",
    "Is it going to rain?",
    "Can a dog eat rice?",
    "Do plants sleep at night?",
    "Name three rivers in Africa.",
    "How long is a marathon?",
    "What makes bread rise?",
    "Why do cats purr?",
    "Describe the taste of honey.",
    "How does a lock work?",
    "What is the moon made of?",
    "Should I learn to swim?",
    "Give me a riddle.",
    "Why are leaves green?",
    "Where is the oldest bridge?",
    "What do owls eat?",
    "How old is the Earth?",
    "Tell me a short joke.",
    "Which fruit has most sugar?",
    "When is harvest time?",
    "Who invented the zip?",
    "Is glass a liquid?",
    "Can you count to ten?",
    "Do fish hear sounds?",
    "Name a famous painter.",
)
"""All different: align computes a common beginning of rows only once, and these would flatter it if they were alike."""
RESULT = "RESULT "
"""Marks the line with a child's figures."""


@dataclass(frozen=True)
class Work:
    """The work of one row of the table.

    Attributes:
        model: folder of a chat model.
        batch: responses an update.
        tokens: maximum of new tokens a response.
        epochs: passes over a batch, one minibatch each.
        updates: number of updates. The first is a warm-up and is not counted.
        dtype: of the weights. `nf4`, which only align has, computes in bf16.
        fixed: True if every response has `tokens` tokens, False if it ends at the end of its turn.
        value_backbone: of align. The peer has a second model.
        micro_batch: rows of one pass in align, by default all.
        device: of align. The peer runs on the CPU.
        advantage: as `stage.advantage`.
        group: answers to each prompt.
        kl_coef: as `stage.kl_coef`.
        recompute: use gradient checkpointing in the peer.
        autocast: use autocast to bf16 in the peer.
    """

    model: str
    batch: int
    tokens: int
    epochs: int
    updates: int
    dtype: str
    fixed: bool = True
    value_backbone: str = "own"
    micro_batch: int | None = None
    device: str = "cpu"
    advantage: str = "gae"
    group: int = 1
    kl_coef: float = 0.05
    recompute: bool = False
    autocast: bool = False

    def text(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_text(cls, text: str) -> Work:
        return cls(**json.loads(text))


def result_of(command: list[str], environment: dict[str, str] | None = None) -> Any:
    """Run a child process and return the figures on its last line that begins with `RESULT`.

    Raises:
        SystemExit: there is no such line. The message has the end of the child's stderr.
    """
    process = subprocess.run(command, capture_output=True, text=True, env=environment)
    result_lines = [line for line in process.stdout.splitlines() if line.startswith(RESULT)]
    if not result_lines:
        raise SystemExit(f"{' '.join(command)} failed\n{process.stderr[-3000:]}")
    return json.loads(result_lines[-1].removeprefix(RESULT))


def report(work: Work, seconds: list[float], **more: float) -> None:
    """Print the line that `result_of` reads in the parent process.

    Args:
        seconds: of each update; the first is left out.
        more: further figures, which may replace `peak_rss_mb`.
    """
    median_seconds = statistics.median(seconds[1:])
    figures = {
        "s_per_update": median_seconds,
        "samples_per_s": work.batch / median_seconds,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        **more,
    }
    print(RESULT + json.dumps(figures), flush=True)
