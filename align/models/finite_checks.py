"""Checks that weights and metrics are finite, before they are used or published."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from align.core.errors import CorruptFile, InputError
from align.core.files import require_readable
from align.ops.finite import count_not_finite, find_not_finite

FP32_MOST = torch.finfo(torch.float32).max
RESTORE = "Restore it from a copy, download it again, or train it again with a lower learning rate."


def require_finite_file(
    path: Path, field: str, displayed: str, remedy: str = RESTORE, dtype: torch.dtype | None = None
) -> None:
    """Raise CorruptFile if a tensor in a safetensors file has a value that is NaN or infinite. Reads one tensor at a
    time.

    Args:
        field, displayed: field and value for error messages.
        dtype: dtype in which the weights will be loaded; None if unknown.

    Raises:
        CorruptFile: a value is nan or infinite, or the file cannot be read.
        InputError: a value exceeds the range of `dtype`.
    """
    require_readable(path, field, remedy)
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (a safetensors handle is no mapping)
                tensor = file.get_tensor(name)
                if count_not_finite(tensor, dtype):
                    require_finite_tensors(((f"{name} in {path.name}", tensor),), field, displayed, remedy)
                    problem = (
                        f"{name} in {path.name} holds {count_not_finite(tensor, dtype)} values beyond what it can hold"
                    )
                    raise InputError("dtype", str(dtype).removeprefix("torch."), problem, "Use bfloat16 or float32.")
    except SafetensorError as error:
        problem = f"its weights are corrupt ({path.name}: {str(error).splitlines()[0][:120]})"
        raise CorruptFile(field, displayed, problem, "Download or save them again.") from error


def require_finite_tensors(
    tensors: Iterable[tuple[str, Tensor]], field: str, displayed: str, remedy: str = RESTORE
) -> None:
    """Raise CorruptFile if one of the named tensors holds NaN or infinity."""
    if first := find_not_finite(tensors):
        name, count = first
        raise CorruptFile(field, displayed, f"{name} holds {count} values that are nan or infinite", remedy)


def require_finite_results(artifact: Path, metrics: Mapping[str, Any], lr: float | None, dtype: str) -> None:
    """Raise InputError if a weight or metric that a run is about to publish is not finite.

    Args:
        lr, dtype: see `build_divergence_error`.

    Raises:
        InputError: a tensor in `artifact` or a figure is not finite.
    """
    for path in sorted(artifact.rglob("*.safetensors")):
        try:
            require_finite_file(path, "artifact", str(path.relative_to(artifact)))
        except CorruptFile as error:
            raise build_divergence_error(f"in the end {error.problem}: nothing is published", lr, dtype) from error
    for name, value in iter_figures(metrics):
        if isinstance(value, float) and not math.isfinite(value):
            raise build_divergence_error(f"in the end {name} is {value}: nothing is published", lr, dtype)


def describe_non_finite(parameters: Mapping[str, nn.Parameter]) -> str:
    """Describe the first parameter or gradient with a value that is not finite, for an error message. Otherwise,
    describe the tensor with the largest value if its square overflows fp32, so that its norm is infinite. Returns an
    empty string if there is no such tensor."""
    gradients = [(f"the gradient of {n}", p.grad) for n, p in parameters.items() if p.grad is not None]
    tensors = [*parameters.items(), *gradients]
    if first := find_not_finite(tensors):
        return f" ({first[0]} holds {first[1]} such values)"
    largest = {name: float(torch.stack(torch.aminmax(x.detach())).abs().max()) for name, x in tensors if x.numel()}
    name = max(largest, key=largest.__getitem__, default="")
    return f" ({name} reaches {largest[name]:.1e})" if name and largest[name] ** 2 > FP32_MOST else ""


def iter_figures(figures: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested mappings and lists of metrics as pairs of a dotted name and a value."""
    for name, value in figures.items():
        children = dict(enumerate(value)) if isinstance(value, list | tuple) else value
        if isinstance(children, Mapping):
            yield from iter_figures(children, f"{path}{name}.")
        else:
            yield f"{path}{name}", value


def build_divergence_error(problem: str, lr: float | None, dtype: str) -> InputError:
    """Return the InputError for a run whose results are not finite although the loaded weights are, with the setting to
    change.

    Args:
        problem: the problem for the message.
        lr: learning rate of the run; None if it does not train.
        dtype: value of the setting `dtype`.
    """
    if lr is None:
        remedy = "Use dtype=float32; if it stays so, what was loaded has diverged: train it with a lower stage.lr."
        return InputError("dtype", dtype, problem, remedy)
    return InputError("stage.lr", lr, problem, "Lower stage.lr or stage.max_grad_norm, or use dtype=float32.")
