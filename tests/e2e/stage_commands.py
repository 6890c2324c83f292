"""Run stage commands that share one `run.root`, with settings short enough for a random model of 78k weights."""

from __future__ import annotations

import io
import itertools
import os
import pkgutil
import signal
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

from align.__main__ import main

EVERY_RUN = {"artifact", "config.yaml", "log.txt", "manifest.json", "metrics.json", "report.html"}
STREAMS = {"metrics.jsonl", "timing.jsonl"}
SHORT = ("rollout.max_new_tokens=16", "device=cpu")
SFT = ("stage.batch_size=8", "stage.epochs=10", "stage.lr=0.01", "stage.log_every=5")
PPO = ("stage.updates=2", "stage.batch_size=8", "stage.micro_batch=4", "stage.normalise_on=16")


class Ready(NamedTuple):
    """Finished runs for tests to start from.

    Attributes:
        root: folder with runs of `sft`, `sample`, `annotate` and two of `reward`, named `a` and `b`.
        ppo: arguments of a PPO command on these runs that takes a second or two; later arguments override them.
        data: arguments that name the data.
    """

    root: Path
    ppo: list[str]
    data: list[str]


class Workshop:
    """A runner of commands that share one `run.root` and one data set."""

    def __init__(self, root: Path, data: Path, *defaults: str) -> None:
        self.root = root
        self.data = data
        self.defaults = defaults
        self.output = ""
        self.outputs = dict[Path, str]()

    def status(self, *arguments: str) -> int:
        """Run a command with the default arguments and return its exit status. Its output is kept in `output`."""
        return self.run_command(*arguments, *self.defaults, *SHORT, f"run.root={self.root}")

    def run_command(self, *words: str) -> int:
        """Run a command with exactly these arguments and return its exit status."""
        out = io.StringIO()
        with redirect_stdout(out), redirect_stderr(out):
            status = main(words)
        self.output = out.getvalue()
        return status

    def refuses(self, *arguments: str, says: str | tuple[str, ...]) -> None:
        """Assert that a command ends with status 2 and a message with these texts, without a traceback."""
        assert self.status(*arguments) == 2, self.output
        for text in (says,) if isinstance(says, str) else says:
            assert text in self.output, self.output
        assert "Traceback" not in self.output

    def run(self, stage: str, *arguments: str) -> Path:
        """Run a stage that must succeed. Returns its folder, and keeps its output in `outputs`."""
        data = () if stage in ("annotate", "data") or "data=annotations" in arguments else self.data_words
        assert self.status(f"stage={stage}", *data, *arguments) == 0, self.output
        folder = Path(self.output.splitlines()[-1])
        assert folder.parent == self.root / stage
        self.outputs.setdefault(folder, self.output)
        return folder

    @property
    def data_words(self) -> tuple[str, ...]:
        return ("data=jsonl", f"data.path={self.data}", "data.held_out=0.25")

    def run_up_to_reward(self) -> dict[str, Path]:
        return {
            "sample": self.run("sample", "stage.prompts=24", "stage.candidates=4"),
            "annotate": self.run("annotate", "stage.action=simulate"),
            "reward": self.run(
                "reward",
                "data=annotations",
                "data.allow_simulated=true",
                "stage.batch_size=8",
                "stage.micro_batch=8",
                "stage.held_out=0.3",
                "stage.log_every=1",
            ),
        }


def list_file_names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


def run_in_fork(words: Sequence[str], deadly: Sequence[str] = (), times: int = 0) -> int:
    """Run a command in a forked child without output, and return its exit status.

    Args:
        deadly: dotted names of functions; the child kills itself when they have been called more than `times` times.
        times: number of calls that are allowed.
    """
    if (child := os.fork()) == 0:
        try:
            calls_left = itertools.count(times, -1)

            def guard(act: Callable[..., Any]) -> Callable[..., Any]:
                def call_or_die(*arguments: Any, **keywords: Any) -> Any:
                    if next(calls_left) == 0:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return act(*arguments, **keywords)

                return call_or_die

            for name in deadly:
                owner, _, function = name.rpartition(".")
                place = pkgutil.resolve_name(owner)
                setattr(place, function, guard(getattr(place, function)))
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), 1)
                os.dup2(nowhere.fileno(), 2)
            os._exit(main(words))
        finally:
            os._exit(1)  # otherwise an exception here would make the child a second test runner
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
