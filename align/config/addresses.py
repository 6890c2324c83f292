"""Where a server listens, and under which address browsers and clients know it."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from align.core.errors import require

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def check_address(host: str, url: str | None) -> None:
    """Checks `stage.host` and `stage.url` of a server.

    Raises:
        InputError: other machines can reach the server and no address is given, or the address is none.
    """
    require(
        host in LOOPBACK or url is not None, "stage.url", url,
        "others than this machine are to reach the server, and nobody said under which name",
        "Say what they will be told, such as stage.url=https://align.example.org.",
    )  # fmt: skip
    require(
        url is None or is_origin(url), "stage.url", url, "is no address of a server of its own",
        "Write https://HOST or https://HOST:PORT, without a path.",
    )  # fmt: skip


def origins(host: str, port: int, url: str | None) -> tuple[str, list[str]]:
    """Under which addresses browsers know a server: the one that people are told, and further ones."""
    if url is not None:  # as browsers write it
        url = url.lower()
        return url.removesuffix(":443" if url.startswith("https:") else ":80"), []
    named = f"[{host}]" if ":" in host else host
    return f"http://{named}:{port}", [f"http://localhost:{port}"]


def in_the_clear(url: str) -> list[str]:
    """What is to be said of an address that others than this machine use, and that has no TLS."""
    if not url.startswith("http:") or urlsplit(url).hostname in LOOPBACK:
        return []
    return ["passwords and answers travel in the clear: put a proxy with TLS in front of it"]


def is_origin(url: str) -> bool:
    """Whether a URL names a scheme, a host and perhaps a port, as a browser's `Origin` does."""
    return re.fullmatch(r"https?://([\w.-]+|\[[0-9a-fA-F:]+\])(:[0-9]{1,5})?", url) is not None
