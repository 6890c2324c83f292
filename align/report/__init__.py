"""The `report.html` of a run: one self-contained HTML file that is updated while the run trains.

Everything on it is read from the run's folder: the manifest, the metrics stream and the files beside them. The package
does not import torch.

- `page`: a page to which blocks are appended, and its templates
- `figure_text`: formatting of numbers
- `figure_labels`: label, unit and explanation of every metric
- `plots`: matplotlib plots; matplotlib is imported inside its functions only
- `headlines`: the summary of a run in a few sentences
- `origins`: inputs, configuration, hardware and code of a run
- `stages`: curves and sections of each stage
- `live`: when the page is written
"""

from align.report.figure_text import format_figure, format_interval, note_small_sample
from align.report.page import Report

__all__ = ["Report", "format_figure", "format_interval", "note_small_sample"]
