"""What an export's folder says: a base that another machine finds, and no path of this one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from align.core.errors import InputError

# An absolute path: at the start or after a blank, quote or bracket, so that https://… and org/name are none.
ABSOLUTE = re.compile(r"""(?:^|(?<=[\s"'`(=\[]))(?:/[\w.@+-]+/[\w./@+-]+|~/\S+|[A-Za-z]:\\\S+)|file://\S+""")


def check_base(base: Mapping[str, str]) -> None:
    """A base must be named so that another machine finds it.

    Args:
        base: `id` (a hub id or a built-in model's name), `revision` and `digest`, the last two may be empty.

    Raises:
        InputError: the id is empty or a path, or a key is unknown.
    """
    if unknown := base.keys() - {"id", "revision", "digest"}:
        raise InputError("base", sorted(unknown)[0], "is not one of id, revision and digest", "Leave it out.")
    name = base.get("id") or ""
    if not name or Path(name).is_absolute() or name.startswith((".", "~")) or "\\" in name:
        raise InputError(
            "base.id",
            name or "(empty)",
            "names no model that another machine could find",
            "Give ORG/NAME or a model's name.",
        )
