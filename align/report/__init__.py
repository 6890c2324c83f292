"""A run's `report.html`: one self-contained file, readable anywhere, safe to open, alive while the run trains.

`page` is a page that grows block by block, `words` writes figures out, `plots` draws (matplotlib is imported there and
nowhere else), `figures` says what each figure is called and how it is read, `origins` what a run was made of, `stages`
what a stage shows, and `live` when it is written. Everything is read from the run's folder: its manifest, its streams
and the evidence beside them. No torch in here.
"""

from align.report.figure_text import few, format_figure, in_words
from align.report.page import Report

__all__ = ["Report", "few", "format_figure", "in_words"]
