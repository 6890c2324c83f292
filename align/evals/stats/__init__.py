"""Statistics of evaluations: pure functions over columns of numbers, with NumPy alone.

    from align.evals.stats.decisions import DecisionRule, decide_by_rule
    from align.evals.stats.paired import compare_shares

    result = compare_shares(right_new, right_old, clusters=prompt_ids)
    result.difference                      # Interval(value, low, high, n)
    decide_by_rule(DecisionRule("not_worse", margin=0.05, least_n=200), result.difference).outcome

Every figure is an `align.ops.intervals.Interval`, whose n counts clusters, the units that were sampled independently.
`benchmarks/evals/coverage.py` measures how often the intervals cover and how often the gates err.
"""
