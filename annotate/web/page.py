"""The Gradio page: one component, which the scripts in `static/` fill."""

from __future__ import annotations

import gradio

HEAD = """<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="stylesheet" href="/align/app.css"><script type="module" src="/align/rank.js"></script>"""


def page() -> gradio.Blocks:
    with gradio.Blocks(title="align", analytics_enabled=False, fill_width=True) as blocks:
        gradio.HTML('<div id="align-app"></div>', elem_id="align", padding=False)
    return blocks
