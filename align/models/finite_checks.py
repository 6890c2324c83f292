"""Checks that nothing that is not finite is read or published, in files and in memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from align.core.errors import CorruptFile, InputError
from align.core.files import check_readable
from align.ops.finite import count_not_finite, find_not_finite

FP32_MOST = torch.finfo(torch.float32).max
RESTORE = "Restore it from a copy, download it again, or train it again with a lower learning rate."


def check_file(path: Path, field: str, displayed: str, remedy: str = RESTORE, dtype: torch.dtype | None = None) -> None:
    """Check every tensor of a safetensors file, one after another.

    Args:
        field, displayed: what the user calls it.
        dtype: in which it will be held, if that is known.

    Raises:
        CorruptFile: a value is nan or infinite, or the file cannot be read.
        InputError: a value is more than `dtype` holds.
    """
    check_readable(path, field, remedy)
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (a safetensors handle is no mapping)
                tensor = file.get_tensor(name)
                if count_not_finite(tensor, dtype):
                    check_tensors(((f"{name} in {path.name}", tensor),), field, displayed, remedy)
                    problem = (
                        f"{name} in {path.name} holds {count_not_finite(tensor, dtype)} values beyond what it can hold"
                    )
                    raise InputError("dtype", str(dtype).removeprefix("torch."), problem, "Use bfloat16 or float32.")
    except SafetensorError as error:
        problem = f"its weights are corrupt ({path.name}: {str(error).splitlines()[0][:120]})"
        raise CorruptFile(field, displayed, problem, "Download or save them again.") from error


def check_tensors(tensors: Iterable[tuple[str, Tensor]], field: str, displayed: str, remedy: str = RESTORE) -> None:
    """Raise CorruptFile if a tensor holds nan or infinity."""
    if found := find_not_finite(tensors):
        name, count = found
        raise CorruptFile(field, displayed, f"{name} holds {count} values that are nan or infinite", remedy)


def check_published(artifact: Path, metrics: Mapping[str, Any], lr: float | None, dtype: str) -> None:
    """Check the files and figures that a run is about to publish.

    Args:
        lr, dtype: see `diverged`.

    Raises:
        InputError: a tensor in `artifact` or a figure is not finite.
    """
    for path in sorted(artifact.rglob("*.safetensors")):
        try:
            check_file(path, "artifact", str(path.relative_to(artifact)))
        except CorruptFile as error:
            raise diverged(f"in the end {error.problem}: nothing is published", lr, dtype) from error
    for name, value in iter_figures(metrics):
        if isinstance(value, float) and not math.isfinite(value):
            raise diverged(f"in the end {name} is {value}: nothing is published", lr, dtype)


def describe_non_finite(parameters: Mapping[str, nn.Parameter]) -> str:
    """Describe the first tensor among parameters and then their gradients that is not finite; else the greatest of
    those whose squares are not, so that a norm or a product of theirs overflows. Returns an empty text if all are
    finite."""
    gradients = [(f"the gradient of {n}", p.grad) for n, p in parameters.items() if p.grad is not None]
    tensors = [*parameters.items(), *gradients]
    if found := find_not_finite(tensors):
        return f" ({found[0]} holds {found[1]} such values)"
    most = {name: float(torch.stack(torch.aminmax(x.detach())).abs().max()) for name, x in tensors if x.numel()}
    greatest = max(most, key=most.__getitem__, default="")
    return f" ({greatest} reaches {most[greatest]:.1e})" if greatest and most[greatest] ** 2 > FP32_MOST else ""


def iter_figures(figures: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every figure of a tree, with the names that lead to it."""
    for name, value in figures.items():
        children = dict(enumerate(value)) if isinstance(value, list | tuple) else value
        if isinstance(children, Mapping):
            yield from iter_figures(children, f"{path}{name}.")
        else:
            yield f"{path}{name}", value


def diverged(problem: str, lr: float | None, dtype: str) -> InputError:
    """Return the error of finite weights whose results are not finite, with the setting to change.

    Args:
        lr: that the run trains with; None if nothing trains.
        dtype: as the user gave it.
    """
    if lr is None:
        remedy = "Use dtype=float32; if it stays so, what was loaded has diverged: train it with a lower stage.lr."
        return InputError("dtype", dtype, problem, remedy)
    return InputError("stage.lr", lr, problem, "Lower stage.lr or stage.max_grad_norm, or use dtype=float32.")
