"""Judges, which compare or grade answers: their identities, verdicts and reports."""
