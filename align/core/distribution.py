"""The name of this project's distribution on PyPI, its extras, and the commands that install them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distribution, version
from importlib.util import find_spec
from types import MappingProxyType

from align.core.errors import InputError

DISTRIBUTION = "align-rlhf"

FOREIGN_DISTRIBUTION = "align"
"""A linguistics tool of other authors on PyPI, whose import package has the same name as ours."""

EXTRA_MODULES = MappingProxyType(
    {
        "annotate": ("argon2", "fastapi", "gradio", "markdown_it", "matplotlib", "uvicorn"),
        "data": ("ftfy", "phonenumbers", "py3langid"),
        "demo": ("chitchat_dataset",),
        "evals": ("lm_eval",),
        "mlflow": ("alembic", "mlflow"),
        "plots": ("matplotlib",),
        "postgres": ("psycopg",),
        "reasoning": ("reasoning_gym",),
        "serve": ("fastapi", "llguidance", "prometheus_client", "uvicorn"),
        "sign": ("OpenSSL", "model_signing"),
        "trackio": ("trackio",),
        "wandb": ("wandb",),
    }
)
"""Extra of pyproject.toml → the modules that this project's code imports and that only the extra installs."""


def build_install_command(extra: str) -> str:
    """Return the `pip install` command that installs this project with an extra, such as `serve`."""
    return f"pip install '{DISTRIBUTION}[{extra}]'"


def find_reinstall_command() -> str | None:
    """Return the `pip` command that reinstalls this project from its original source, or None if it is editable.

    An editable installation has its files in the checkout. Returns None also if the project is not installed.
    """
    try:
        origin = json.loads(distribution(DISTRIBUTION).read_text("direct_url.json") or "{}")
    except PackageNotFoundError:  # a checkout that is not installed
        return None
    if origin.get("dir_info", {}).get("editable"):
        return None
    source = f"'{DISTRIBUTION} @ {origin['url']}'" if "url" in origin else DISTRIBUTION
    return f"pip install --force-reinstall --no-deps {source}"


def find_missing_modules(extra: str, modules: Sequence[str] | None = None) -> list[str]:
    """Return the names of an extra's modules that are not installed. Nothing is imported.

    Only `modules` are checked if they are given, else all modules that the extra installs.
    """
    return [module for module in modules or EXTRA_MODULES[extra] if find_spec(module) is None]


def require_extra(extra: str, field: str, value: str, modules: Sequence[str] | None = None) -> None:
    """Raise InputError with the `pip` command to run if modules that a setting's value needs are not installed.

    Args:
        extra: the extra, as pyproject.toml names it.
        field: the setting that needs the extra.
        value: the setting's value.
        modules: the modules that the value needs; all that the extra installs if None.

    Raises:
        InputError: names the missing modules and the command that installs them.
    """
    missing = find_missing_modules(extra, modules)
    if missing:
        problem = f"needs packages that are not installed ({', '.join(missing)})"
        raise InputError(field, value, problem, f"Run: {build_install_command(extra)}")


def describe_foreign_distribution() -> str | None:
    """Return a warning if another project's distribution called `align` is installed in this environment, else None.

    A wheel of ours writes to the folder `align/` of site-packages as theirs does, so the remedy puts our files back
    after the uninstallation. Beside an editable installation theirs may be imported in the place of ours.
    """
    try:
        foreign_version = version(FOREIGN_DISTRIBUTION)
    except PackageNotFoundError:
        return None
    foreign = f"'{FOREIGN_DISTRIBUTION}' {foreign_version}"
    fact = f"the distribution {foreign} of other authors is installed beside {DISTRIBUTION}"
    uninstall = f"pip uninstall -y {FOREIGN_DISTRIBUTION}"
    reinstall = find_reinstall_command()
    if reinstall is None:
        return f"{fact}. Outside of this checkout it may be imported in the place of ours. Run: {uninstall}"
    return (
        f"{fact}. Both write to one folder, so uninstalling it removes files of ours too. Run: "
        f"{uninstall} && {reinstall}"
    )
