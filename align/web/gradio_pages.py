"""Settings of all pages that Gradio draws: what browsers may do on them, and which of its addresses are closed."""

from __future__ import annotations

UNUSED = ("/proxy=", "/heartbeat/")
"""Gradio's ways that no page of ours goes: it would fetch from elsewhere; and it would hold a connection for as long as
somebody likes, to know when to forget a session's state, of which our pages have none."""
# Gradio's templates are evaluated from strings; what models wrote never gets there.
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
QUIET = {"footer_links": [], "run_history": False, "ssr_mode": False, "enable_monitoring": False}
"""How an app of Gradio's is mounted."""
