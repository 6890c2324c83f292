"""The Gradio page: one component, which the script in `static/` fills."""

from __future__ import annotations

import gradio

HEAD = """<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="stylesheet" href="/align/app.css"><script src="/align/rank.js" defer></script>"""


def page() -> gradio.Blocks:
    with gradio.Blocks(title="align", analytics_enabled=False, fill_width=True) as blocks:
        gradio.HTML('<div id="align-app"></div>', elem_id="align", padding=False)
    return blocks
