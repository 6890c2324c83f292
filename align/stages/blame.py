"""Whose fault an unexpected error is."""

from __future__ import annotations

from align.config.root import Config
from align.errors import InputError
from align.run import out_of_memory, storage_error


def blame(error: Exception, config: Config) -> InputError | None:
    """An unexpected error as the user's own, where it is one: too little memory, a full or a locked disk."""
    if out_of_memory(error):
        return InputError(
            "memory", type(error).__name__, "the device has too little for this run",
            "Lower stage.micro_batch, rollout.batch_size or data.max_length, or use method=qlora; stage=export holds a "
            "model in fp32: give it device=cpu.",
        )  # fmt: skip
    return storage_error(error, config.run.root)
