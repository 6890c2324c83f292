"""Figures about a project's annotators and their agreement, as numbers and plots.

    project_figures = figures(store, "quickstart")          # JSON-ready
    (folder / "votes.svg").write_bytes(plots.per_day(project_figures))
    (folder / "people.csv").write_text(people_csv(store, "quickstart"))

estimates   figures with their intervals, and undefined figures
agreement   Krippendorff's alpha, Cohen's kappa, raw agreement, contradictions
people      a summary of each annotator, and position and length bias
project     one consistent read of the store, and all figures of a project
plots       plots of the result of `figures`
"""

from align.annotate.figures.estimates import Undefined
from align.annotate.figures.project import figures, people_csv

__all__ = ["Undefined", "figures", "people_csv"]
