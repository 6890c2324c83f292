"""Figures about a project's annotators and their agreement, as numbers and plots.

    figures = compute_figures(store, "quickstart")          # JSON-ready
    (folder / "votes.svg").write_bytes(plots.plot_per_day(figures))
    (folder / "people.csv").write_text(build_people_csv(store, "quickstart"))

estimates   figures with their intervals, and undefined figures
agreement   Krippendorff's alpha, Cohen's kappa, raw agreement, contradictions
people      a summary of each annotator, and position and length bias
alarms      traits of annotators by a model, and alarms about those who may not judge
project     one consistent read of the store, and all figures of a project
plots       plots of the result of `compute_figures`
"""

from align.annotate.figures.estimates import Undefined
from align.annotate.figures.project import build_people_csv, compute_figures

__all__ = ["Undefined", "build_people_csv", "compute_figures"]
