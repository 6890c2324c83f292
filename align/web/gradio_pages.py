"""Settings that all Gradio pages share: their content security policy, and Gradio's routes that are closed."""

from __future__ import annotations

CLOSED_PATHS = ("/proxy=", "/heartbeat/")
"""Parts of the paths of Gradio's routes that are closed: the proxy fetches from other hosts, and the heartbeat holds a
connection to know when a session's state can be dropped, which our pages do not have."""
# Gradio evaluates its templates from strings, hence 'unsafe-eval'. Texts of models never reach a template.
POLICY = "; ".join(
    (
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval'",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data:",
        "font-src 'self' data:",
        "frame-ancestors 'none'",
        "base-uri 'self'",
        "form-action 'self'",
    )
)
MOUNT_SETTINGS = {"footer_links": [], "run_history": False, "ssr_mode": False, "enable_monitoring": False}
"""Keyword arguments of every call that mounts a Gradio app."""
