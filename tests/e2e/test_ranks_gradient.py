"""The gradient of one minibatch of PPO on two ranks, which may have different numbers of micro-batches."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import Forks
from rank_processes import build_rank_environments
from tiny_roles import CPU, World, build_ragged_rollout, make_world
from torch.testing import assert_close

from align import ranks
from align.ppo.experience import Estimator, assemble_experience
from align.ppo.update import Losses, accumulate_gradients
from align.run import Base, model_digest

ROWS = 6
FINDS_HELPERS = f"import sys\nsys.path.append({str(Path(__file__).parents[1])!r})"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_tokenizer: Any) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_world(folder, tiny_model, tiny_tokenizer)
    return folder


def compute_gradients(folder: Path, micro_batch: int) -> dict[str, torch.Tensor]:
    """Compute the gradient on this rank by parameter, and the figures by name."""
    base = Base("tiny", str(folder / "base"), None, model_digest(folder / "base"))
    roles = World(base, folder / "init", folder / "reward").roles("lora")
    rollout = build_ragged_rollout(ROWS)
    generator = torch.Generator(CPU).manual_seed(3)
    old, reference, values = torch.randn(3, *rollout.response_mask_BT.shape, generator=generator, device=CPU)
    experience, _ = assemble_experience(
        rollout,
        torch.randn(ROWS, generator=generator, device=CPU),
        old - 5,
        reference - 5,
        values,
        kl_coef=0.2,
        kl_estimator="k1",
        kl_in_reward=True,
        estimator=Estimator(lam=1.0),
    )
    figures = accumulate_gradients(
        roles,
        experience,
        micro_batch=micro_batch,
        temperature=0.8,
        losses=Losses(value_clip_range=0.3, kl_coef=0.1, kl_estimator="k3"),
    )
    gradients_by_name = {
        f"{role} {name}": p.grad
        for role in ("policy", "value")
        for name, p in roles.get_named_parameters(role).items()
        if p.grad is not None
    }
    return gradients_by_name | {name: torch.tensor(value, device=CPU) for name, value in figures.items()}


@pytest.mark.parametrize("micro_batch", [6, 2])  # micro-batches of the ranks: 1 and 0, 2 and 1
def test_each_rank_has_the_gradient_of_one_process(folder: Path, forks: Forks, tmp_path: Path, micro_batch: int):
    words = (str(folder), str(micro_batch), str(tmp_path))
    children = [
        forks.start(
            tmp_path, *words, before=f"import os\nos.environ |= {environment!r}\n{FINDS_HELPERS}", script=Path(__file__)
        )
        for environment in build_rank_environments(2)
    ]
    results = [child.wait(120) for child in children]
    assert [result.status for result in results] == [0, 0], results[0].err + results[1].err
    expected = compute_gradients(folder, micro_batch)
    for role in ("policy", "value"):
        assert sum(float(p.norm()) for name, p in expected.items() if name.startswith(f"{role} ")) > 1e-3
    for number in range(2):
        assert_close(torch.load(tmp_path / f"{number}.pt"), expected, rtol=1e-4, atol=1e-6)


if __name__ == "__main__":
    ranks.connect()
    ranks.init_group("cpu", 30.0)
    torch.save(compute_gradients(Path(sys.argv[1]), int(sys.argv[2])), Path(sys.argv[3], f"{ranks.rank()}.pt"))
    ranks.destroy_group()
