"""The work that both sides do, and how each says what it took. Imports nothing but the standard library."""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
from dataclasses import asdict, dataclass
from typing import Any

PROMPTS = (
    "Tell me about your day.", "What is a good breakfast?", "How do I make friends?", "Why is the sky blue?",
    "Where do swallows go in winter?", "Which book should I read?", "When did people first sail?", "Who wrote Hamlet?",
    "Is it going to rain?", "Can a dog eat rice?", "Do plants sleep at night?", "Name three rivers in Africa.",
    "How long is a marathon?", "What makes bread rise?", "Why do cats purr?", "Describe the taste of honey.",
    "How does a lock work?", "What is the moon made of?", "Should I learn to swim?", "Give me a riddle.",
    "Why are leaves green?", "Where is the oldest bridge?", "What do owls eat?", "How old is the Earth?",
    "Tell me a short joke.", "Which fruit has most sugar?", "When is harvest time?", "Who invented the zip?",
    "Is glass a liquid?", "Can you count to ten?", "Do fish hear sounds?", "Name a famous painter.",
)  # fmt: skip
"""All different, as prompts are: rows that begin alike share what they begin with."""
RESULT = "RESULT "


@dataclass(frozen=True)
class Work:
    """One row of the table.

    Attributes:
        model: a folder with a chat model.
        batch, tokens: responses an update, and new tokens each at most.
        epochs: passes over a batch, one minibatch each.
        updates: how many; the first warms up and is not counted.
        dtype: of the weights; `nf4` on our side is bf16 compute.
        fixed: True where every response has `tokens` tokens, False where it ends with its own end of turn.
        value_backbone: ours; the peer has a second model.
        micro_batch: ours; rows of one pass, all of them unless said.
        device: ours; the peer runs on the CPU.
        advantage, group: `stage.advantage`, and how many answers a prompt has.
        kl_coef: price of KL, as `stage.kl_coef`.
        recompute, autocast: the peer's gradient checkpointing, and its autocast to bf16.
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
    def of(cls, text: str) -> Work:
        return cls(**json.loads(text))


def result_of(command: list[str], environment: dict[str, str] | None = None) -> Any:
    """What a child process printed behind `RESULT`.

    Raises:
        SystemExit: it printed nothing; with the end of what it complained of.
    """
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    found = [line for line in done.stdout.splitlines() if line.startswith(RESULT)]
    if not found:
        raise SystemExit(f"{' '.join(command)} failed\n{done.stderr[-3000:]}")
    return json.loads(found[-1].removeprefix(RESULT))


def report(work: Work, seconds: list[float], **more: float) -> None:
    """Print one line that the other process reads."""
    took = statistics.median(seconds[1:])
    figures = {
        "s_per_update": took,
        "samples_per_s": work.batch / took,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        **more,
    }
    print(RESULT + json.dumps(figures), flush=True)
