"""Estimators of KL(π ‖ π_ref), the distance of the policy from the reference, and a controller of the KL coefficient.

Estimators after Schulman, "Approximating KL divergence" (2020), from samples of π, with log-ratio
d = log π − log π_ref of the sampled token:

    k1 = d                 unbiased, may be negative
    k2 = d² / 2            biased, never negative; differentiated at samples of π it gives the gradient of KL
    k3 = exp(−d) − 1 + d   unbiased, never negative, lower variance

The controller is that of Ziegler et al., "Fine-tuning language models from human preferences" (2019), section 2.2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

ERROR_CLIP = 0.2


def kl_k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Return the k1 estimate of KL, log π − log π_ref, elementwise, in nats."""
    return logprobs - ref_logprobs


def kl_k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Return the k2 estimate of KL, (log π − log π_ref)² / 2, elementwise, in nats."""
    return (logprobs - ref_logprobs).square() / 2


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Return the k3 estimate of KL, exp(log π_ref − log π) − 1 + (log π − log π_ref), elementwise, in nats."""
    d = logprobs - ref_logprobs
    return (-d).expm1() + d


ESTIMATORS = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}


def update_kl_coef(kl_coef: float, kl: float, target: float, horizon: float, samples: int) -> float:
    """Return the next KL coefficient: it rises if the measured KL is above its target, and falls if it is below.

        e = clip(kl / target − 1, −0.2, 0.2),   coef ← coef · (1 + e · samples / horizon)

    Args:
        kl: mean KL of whole sequences, nats.
        samples: number of sequences since the last change; `horizon` has the same unit.
    """
    error = min(max(kl / target - 1.0, -ERROR_CLIP), ERROR_CLIP)
    return kl_coef * (1.0 + error * samples / horizon)
