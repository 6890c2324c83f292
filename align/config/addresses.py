"""Addresses of a server: where it listens, and the one that browsers and clients use."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from align.core.errors import require

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def check_address(host: str, url: str | None) -> None:
    """Check `stage.host` and `stage.url` of a server.

    Raises:
        InputError: other machines can reach the server and no address is set, or the address is invalid.
    """
    problem = "other machines can reach the server, and its address is not set"
    remedy = "Set the address that they use, such as stage.url=https://align.example.org."
    require(host in LOOPBACK or url is not None, "stage.url", url, problem, remedy)
    # A scheme, a host and perhaps a port, as a browser's `Origin` has them.
    is_origin = url is None or re.fullmatch(r"https?://([\w.-]+|\[[0-9a-fA-F:]+\])(:[0-9]{1,5})?", url) is not None
    remedy = "Write https://HOST or https://HOST:PORT, without a path."
    require(is_origin, "stage.url", url, "is no address of a server of its own", remedy)


def list_origins(host: str, port: int, url: str | None) -> tuple[str, list[str]]:
    """Return the address of a server in browsers, and further addresses that work too."""
    if url is not None:  # as browsers write it
        url = url.lower()
        return url.removesuffix(":443" if url.startswith("https:") else ":80"), []
    name = f"[{host}]" if ":" in host else host
    return f"http://{name}:{port}", [f"http://localhost:{port}"]


def warn_without_tls(url: str) -> list[str]:
    """Return a warning if other machines use the address and it has no TLS."""
    if not url.startswith("http:") or urlsplit(url).hostname in LOOPBACK:
        return []
    return ["passwords and answers travel in the clear: put a proxy with TLS in front of it"]
