"""The URLs of the web servers of stages: checks of `stage.url`, and the addresses that browsers and clients use."""

from __future__ import annotations

import re
from typing import NamedTuple
from urllib.parse import urlsplit

from align.core.errors import require

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def require_valid_url(host: str, url: str | None) -> None:
    """Raise InputError if `url` is not `http(s)://HOST[:PORT]`, or is `None` although `host` is not a loopback address.

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


class ServerUrls(NamedTuple):
    """The URL of a server for links, and further URLs by which a browser may reach it, without a path.

    Attributes:
        url: the one to print and to link to.
        others: further ones that work too.
    """

    url: str
    others: list[str]


def build_server_urls(host: str, port: int, url: str | None) -> ServerUrls:
    """Return the URLs by which browsers reach a server: the public URL alone if it is set, or else local ones.

    Args:
        url: the public URL, `stage.url`; None for a server that only this machine reaches.
    """
    if url is not None:  # as browsers write it
        url = url.lower()
        return ServerUrls(url.removesuffix(":443" if url.startswith("https:") else ":80"), [])
    name = f"[{host}]" if ":" in host else host
    return ServerUrls(f"http://{name}:{port}", [f"http://localhost:{port}"])


def list_tls_warnings(url: str) -> list[str]:
    """Return a list with a warning if a server's URL is http and not local, so that it has no TLS; otherwise empty."""
    if not url.startswith("http:") or urlsplit(url).hostname in LOOPBACK:
        return []
    return ["passwords and answers travel in the clear: put a proxy with TLS in front of it"]
