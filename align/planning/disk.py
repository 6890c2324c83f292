"""What a run leaves on disk, and holds there while it goes. Pure."""

from __future__ import annotations

from align.planning.memory import ADAM, adapter_bytes, value_bytes
from align.planning.shapes import Shape
from align.planning.workload import Workload


def disk_bytes(shape: Shape, work: Workload) -> tuple[float, float]:
    """Bytes of one checkpoint, and of what is published: adapters in fp32 with their moments; whole models."""
    head = 4 * shape.width
    adapter = float(adapter_bytes(shape, work))
    if work.stage == "ppo":
        policy = 4.0 * shape.weights if work.method == "full" else adapter
        value = value_bytes(shape, work)
        kept = (policy + value) * (1 + ADAM / 4) + policy * work.keeps_best
        return kept, (work.size * float(shape.weights) if work.method == "full" else adapter) + value
    if work.method == "full":
        return (4.0 + work.moments) * shape.weights, work.size * float(shape.weights)
    trained = adapter + head * (work.stage == "reward")
    return trained * (1 + work.moments / 4), trained
