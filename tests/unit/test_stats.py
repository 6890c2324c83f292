"""What an evaluation counts before there is an interval of it; `test_intervals.py` has those."""

from __future__ import annotations

import numpy as np
import pytest

from align.evals.stats import per_prompt, win_rate


def test_win_rate_counts_ties_as_half():
    assert win_rate([2, 1, 0], [1, 1, 1]).tolist() == [1, 0.5, 0]
    with pytest.raises(ValueError, match="NaN"):
        win_rate([np.nan], [1])
    with pytest.raises(ValueError, match="differ"):
        win_rate([1, 2], [1])


def test_per_prompt_means_in_order_of_appearance():
    assert per_prompt(["b", "a", "b"], [1, 5, 2]).tolist() == [1.5, 5]
