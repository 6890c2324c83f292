"""Suites of evaluation tasks: the evaluated models, their answers, scores, results and gates."""
