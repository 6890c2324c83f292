"""Models: loading, adapters, the roles on one base."""

import torch


def without_compiler() -> None:
    """Import bitsandbytes, but not torch's compiler with it: 2 s and 40 MB of every process, for three functions of its
    slow paths, which it takes uncompiled where `torch.compile` fails."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise RuntimeError("not while bitsandbytes is imported")

    kept, torch.compile = torch.compile, refuse  # pyright: ignore[reportAttributeAccessIssue]
    try:
        import bitsandbytes  # noqa: F401
    finally:
        torch.compile = kept


without_compiler()
