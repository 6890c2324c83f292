"""Where a server listens, and under which address browsers and clients know it."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from align.core.errors import require

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def check_address(host: str, url: str | None) -> None:
    """Check `stage.host` and `stage.url` of a server.

    Raises:
        InputError: other machines can reach the server and no address is given, or the address is none.
    """
    problem = "others than this machine are to reach the server, and nobody said under which name"
    remedy = "Say what they will be told, such as stage.url=https://align.example.org."
    require(host in LOOPBACK or url is not None, "stage.url", url, problem, remedy)
    # A scheme, a host and perhaps a port, as a browser's `Origin` has them.
    origin = url is None or re.fullmatch(r"https?://([\w.-]+|\[[0-9a-fA-F:]+\])(:[0-9]{1,5})?", url) is not None
    remedy = "Write https://HOST or https://HOST:PORT, without a path."
    require(origin, "stage.url", url, "is no address of a server of its own", remedy)


def origins(host: str, port: int, url: str | None) -> tuple[str, list[str]]:
    """Return the addresses under which browsers know a server: the one that people are told, and further ones."""
    if url is not None:  # as browsers write it
        url = url.lower()
        return url.removesuffix(":443" if url.startswith("https:") else ":80"), []
    named = f"[{host}]" if ":" in host else host
    return f"http://{named}:{port}", [f"http://localhost:{port}"]


def in_the_clear(url: str) -> list[str]:
    """Return a warning for an address that others than this machine use, and that has no TLS."""
    if not url.startswith("http:") or urlsplit(url).hostname in LOOPBACK:
        return []
    return ["passwords and answers travel in the clear: put a proxy with TLS in front of it"]
