"""Count the packages and megabytes of the default installation, and list their licences.

    python -m venv /tmp/default && /tmp/default/bin/pip install .
    /tmp/default/bin/python benchmarks/install/count.py

The packages are those that pyproject.toml asks for without extras, and theirs in turn, as the metadata in this
environment has them. torch and its own dependencies are counted apart. Megabytes are 10⁶ bytes of installed files;
bytecode, which Python writes at the installation or at the first import, is given apart.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
MOST_PACKAGES = 55
MOST_MB = 620

LICENCES_BY_HAND: dict[str, str] = {}
"""Distribution → licence and its source, of those whose metadata say nothing."""
COPYLEFT = re.compile(r"\b[AL]?GPL|GNU (?:Affero |Lesser |Library |General )", re.IGNORECASE)
"""Licences that nothing in the default installation has. MPL-2.0 is none of them."""


@dataclass(frozen=True, slots=True)
class Size:
    """Bytes of a distribution's installed files.

    Attributes:
        files: of all files but bytecode.
        bytecode: of `.pyc` files.
    """

    files: int
    bytecode: int


def default_requirements(pyproject: Path = ROOT / "pyproject.toml") -> list[Requirement]:
    """Return what the project requires without extras."""
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    return [Requirement(line) for line in project["dependencies"]]


def closure(requirements: Iterable[Requirement]) -> dict[str, Distribution]:
    """Return the installed distributions that requirements need, directly or through others, by canonical name.

    Raises:
        PackageNotFoundError: one of them is not installed.
    """
    packages: dict[str, Distribution] = {}
    visited: set[tuple[str, str]] = set()
    waiting = [requirement for requirement in requirements if applies(requirement, "")]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        package = packages.setdefault(name, distribution(requirement.name))
        for extra in ("", *requirement.extras):
            if (name, extra) in visited:
                continue
            visited.add((name, extra))
            waiting += [
                dependency for dependency in map(Requirement, package.requires or []) if applies(dependency, extra)
            ]
    return packages


def applies(requirement: Requirement, extra: str) -> bool:
    """Return whether a requirement applies to this Python and platform, with one extra of its distribution."""
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def size_of(package: Distribution) -> Size:
    """Add up the files that a distribution's RECORD lists and that are there."""
    files = bytecode = 0
    for path in package.files or ():
        place = Path(str(package.locate_file(path)))
        if place.is_file():
            size = place.stat().st_size
            if place.suffix == ".pyc":
                bytecode += size
            else:
                files += size
    return Size(files, bytecode)


def licence_of(package: Distribution) -> str:
    """Return the licence that a distribution's metadata state, else the one listed by hand, else an empty text."""
    metadata = package.metadata
    if expression := metadata.get("License-Expression"):
        return expression
    classifiers = [line for line in metadata.get_all("Classifier") or () if line.startswith("License ::")]
    if classifiers:
        return ", ".join(line.rpartition("::")[2].strip() for line in classifiers)
    text = (metadata.get("License") or "").strip()
    return text.partition("\n")[0] or LICENCES_BY_HAND.get(canonicalize_name(package.name), "")


def is_copyleft(licence: str) -> bool:
    """Return whether every choice that a licence offers is the GPL, LGPL or AGPL, or holds a part under it."""
    return all(COPYLEFT.search(choice) for choice in re.split(r"\bOR\b", licence))


def exclude_torch(packages: dict[str, Distribution]) -> dict[str, Distribution]:
    """Return the packages without torch and what torch itself requires."""
    torch_packages = closure([Requirement("torch")])
    return {name: package for name, package in packages.items() if name not in torch_packages}


def main() -> int:
    try:
        packages = closure(default_requirements())
    except PackageNotFoundError as error:
        print(f"{error.name} is not installed here: install the project into this environment first", file=sys.stderr)
        return 2
    counted = exclude_torch(packages)
    sizes = {name: size_of(package) for name, package in packages.items()}
    for name in sorted(packages, key=lambda name: -sizes[name].files):
        mark = " " if name in counted else "t"
        megabytes = f"{sizes[name].files / 1e6:7.1f} {sizes[name].bytecode / 1e6:6.1f}"
        print(f"{mark} {megabytes}  {name} {packages[name].version}  {licence_of(packages[name])}")
    files = sum(sizes[name].files for name in counted) / 1e6
    bytecode = sum(sizes[name].bytecode for name in counted) / 1e6
    copyleft = sorted(name for name, package in packages.items() if is_copyleft(licence_of(package)))
    print(f"beside torch and its own dependencies (t): {len(counted)} packages of at most {MOST_PACKAGES},")
    print(f"  {files:.0f} MB of at most {MOST_MB}, and {bytecode:.0f} MB of bytecode")
    print(f"GPL, LGPL or AGPL: {', '.join(copyleft) or 'none'}")
    return int(len(counted) > MOST_PACKAGES or files > MOST_MB or bool(copyleft))


if __name__ == "__main__":
    sys.exit(main())
