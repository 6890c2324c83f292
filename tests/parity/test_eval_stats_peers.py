"""Evaluation statistics equal other packages' results for the same data.

The expected values are from statsmodels 0.15.0, SciPy 1.17.1 and scikit-learn 1.9.1, which are no dependencies. The fit
is also compared with an optimiser of torch, which does not use Newton's steps.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from align.evals.stats.judge_agreement import compute_agreement
from align.evals.stats.logistic import fit_logistic
from align.evals.stats.paired import adjust_by_holm, compute_sign_flip_p
from align.evals.stats.power import compute_sample_size
from align.ops.agreement import cohen_kappas

ROW = np.arange(36)
FIRST = 40.0 + (ROW * 37) % 211
SECOND = 40.0 + (ROW * 53) % 167
VERDICTS = np.array([1, 0, 0.5, 1, 1, 0, 0, 1, 1, 1, 0.5, 0] * 3)[(ROW * 7) % 36]
RATIO = np.log1p(FIRST) - np.log1p(SECOND)
X = np.column_stack([np.ones(36), np.arctan(RATIO / RATIO.std())])


def test_a_logistic_fit_is_that_of_statsmodels() -> None:
    """The peer is `GLM(y, X, Binomial()).fit(cov_type="cluster")` over twelve prompts of three rows, without its
    correction, times C/(C − 1). A tie is ½ in both."""
    fit = fit_logistic(X, VERDICTS, np.ones(36), ROW // 3, np.zeros(2))
    assert fit.coefficients == pytest.approx([0.296601884025142, 0.30030024456220367])
    model = [[0.11933173197066432, -0.03199636026800118], [-0.03199636026800118, 0.2605489118347245]]
    sandwich = [[0.07823373435711888, -0.10395721334109136], [-0.10395721334109133, 0.258419884019202]]
    assert fit.model == pytest.approx(np.array(model))
    assert fit.sandwich == pytest.approx(np.array(sandwich))


@pytest.mark.parametrize("ridge", [[0.0, 0.1], [2.0, 0.5]])
def test_a_ridge_is_that_of_an_optimiser(ridge: list[float]) -> None:
    weights = 1 / (1 + ROW % 3)
    x, y, w, r = (torch.tensor(of, dtype=torch.float64, device="cpu") for of in (X, VERDICTS, weights, ridge))
    beta = torch.zeros(2, dtype=torch.float64, device="cpu", requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [beta], max_iter=200, tolerance_grad=1e-12, tolerance_change=0.0, line_search_fn="strong_wolfe"
    )

    def compute_loss() -> torch.Tensor:
        optimiser.zero_grad()
        per_row = torch.nn.functional.binary_cross_entropy_with_logits(x @ beta, y, reduction="none")
        total = (w * per_row).sum() + (r * beta**2).sum() / 2
        total.backward()
        return total

    optimiser.step(compute_loss)  # type: ignore[arg-type]
    fit = fit_logistic(X, VERDICTS, weights, ROW, np.array(ridge))
    assert fit.coefficients == pytest.approx(beta.detach().numpy(), abs=1e-7)


def test_mcnemar_is_that_of_statsmodels() -> None:
    for better, worse, p in ((9, 1, 0.021484375), (5, 0, 0.0625), (30, 14, 0.022628841205914796), (7, 7, 1.0)):
        assert compute_sign_flip_p([1.0] * better + [-1.0] * worse + [0.0] * 20) == pytest.approx(p)


def test_flips_of_signs_are_scipys_permutations() -> None:
    """The peer is `permutation_test((d,), mean, permutation_type="samples", n_resamples=inf)`."""
    assert compute_sign_flip_p([0.3, -0.1, 0.7, 0.2, 0.45, -0.25, 0.6, 0.15]) == pytest.approx(0.078125)


def test_holm_is_that_of_statsmodels() -> None:
    p_values = dict(zip("abcde", (0.01, 0.04, 0.03, 0.005, 0.2), strict=True))
    assert list(adjust_by_holm(p_values).values()) == pytest.approx([0.04, 0.09, 0.09, 0.025, 0.2])


def test_the_number_needed_is_near_that_of_the_noncentral_t() -> None:
    """`TTestPower` gives 127.5 for an effect of 0.25 with a known deviation. An estimated one needs a few more."""
    sample_size = compute_sample_size(1.0, 0.25)
    assert sample_size is not None
    assert 128 <= sample_size <= 132


def test_kappa_is_that_of_scikit_learn() -> None:
    first = [0, 1, 2, 2, 1, 0, 2, 2, 1, 1, 0, 2]
    second = [0, 1, 2, 1, 1, 0, 2, 2, 2, 1, 1, 2]
    table = np.zeros((3, 3))
    np.add.at(table, (first, second), 1)
    assert cohen_kappas(table[None])[0] == pytest.approx(0.6129032258064516)
    assert cohen_kappas(table[None], quadratic=True)[0] == pytest.approx(0.7857142857142857)
    halves = compute_agreement(np.array(first) / 2, np.array(second) / 2).kappa
    assert halves is not None
    assert halves.value == pytest.approx(0.6129032258064516)
