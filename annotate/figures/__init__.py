"""What a project's votes say about its annotators and their agreement: the numbers, and plots of them.

    found = figures(store, "quickstart")          # JSON-ready
    (folder / "votes.svg").write_bytes(plots.per_day(found))
    (folder / "people.csv").write_text(people_csv(store, "quickstart"))

estimates   figures with their intervals, and those that are undefined
agreement   Krippendorff's alpha, Cohen's kappa, raw agreement, contradictions
people      a row an annotator, and how far place and length of answers sway them
project     what is read of the store, all at one moment, and all of its figures together
plots       drawn from what `figures` returns
"""

from align.annotate.figures.estimates import Undefined
from align.annotate.figures.project import figures, people_csv

__all__ = ["Undefined", "figures", "people_csv"]
