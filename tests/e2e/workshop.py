"""Commands of one `run.root`, short enough for a random model of 78k weights."""

from __future__ import annotations

import io
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

from align.__main__ import main

EVERY_RUN = {"artifact", "config.yaml", "log.txt", "manifest.json", "metrics.json", "report.html"}
STREAMS = {"metrics.jsonl", "timing.jsonl"}
SHORT = ("rollout.max_new_tokens=16", "device=cpu")
SFT = ("stage.batch_size=8", "stage.epochs=10", "stage.lr=0.01", "stage.log_every=5")
PPO = ("stage.updates=2", "stage.batch_size=8", "stage.micro_batch=4", "stage.normalise_on=16")


class Ready(NamedTuple):
    """Attributes:
    root: runs of `sft`, `sample`, `annotate` and two of `reward`, named `a` and `b`.
    ppo: the words of a command that trains on them in a second or two; later words override.
    data: the words that name the data.
    """

    root: Path
    ppo: list[str]
    data: list[str]


class Workshop:
    """Runs commands in one `run.root`, all on the same data."""

    def __init__(self, root: Path, data: Path, *given: str) -> None:
        self.root, self.data, self.given = root, data, given
        self.said, self.told = "", dict[Path, str]()

    def status(self, *arguments: str) -> int:
        """The exit status of one command; what it printed is kept in `said`, and of a run that
        ended well in `told`."""
        return self.ended(*arguments, *self.given, *SHORT, f"run.root={self.root}")

    def ended(self, *words: str) -> int:
        """The same of these words and no others."""
        out = io.StringIO()
        with redirect_stdout(out), redirect_stderr(out):
            status = main(words)
        self.said = out.getvalue()
        return status

    def run(self, stage: str, *arguments: str) -> Path:
        """The folder of a run that ended well: the last line that it printed."""
        where = () if stage in ("annotate", "data") or "data=annotations" in arguments else self.on_file
        assert self.status(f"stage={stage}", *where, *arguments) == 0, self.said
        folder = Path(self.said.splitlines()[-1])
        assert folder.parent == self.root / stage
        self.told.setdefault(folder, self.said)
        return folder

    @property
    def on_file(self) -> tuple[str, ...]:
        return ("data=jsonl", f"data.path={self.data}", "data.held_out=0.25")

    def up_to_reward(self) -> dict[str, Path]:
        return {
            "sample": self.run("sample", "stage.prompts=24", "stage.candidates=4"),
            "annotate": self.run("annotate", "stage.action=simulate"),
            "reward": self.run(
                "reward", "data=annotations", "data.allow_simulated=true", "stage.batch_size=8", "stage.micro_batch=8",
                "stage.held_out=0.3", "stage.log_every=1",
            ),
        }  # fmt: skip


def files(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}
