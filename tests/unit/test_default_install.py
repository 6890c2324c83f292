"""Tests of the size and the licences of the default installation."""

from __future__ import annotations

import sys
from importlib.metadata import Distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks" / "install"))
import count  # pyright: ignore[reportMissingImports]

PACKAGES = count.closure(count.default_requirements())


def test_it_is_small_beside_torch():
    packages = count.exclude_torch(PACKAGES)
    assert {"transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate"} <= set(packages)
    assert len(packages) <= count.MOST_PACKAGES <= 55
    assert sum(count.size_of(package).files for package in packages.values()) <= count.MOST_MB * 1e6 <= 620e6


def test_it_has_nothing_that_only_some_stages_need():
    heavy = {"gradio", "fastapi", "uvicorn", "matplotlib", "phonenumbers", "py3langid", "llguidance"}
    assert not heavy & set(PACKAGES)


@pytest.mark.parametrize("name", sorted(PACKAGES))
def test_each_package_has_a_known_licence_without_copyleft(name: str):
    licence = count.licence_of(PACKAGES[name])
    assert licence, f"{name} has no licence in its metadata: list it in benchmarks/install/count.py with its source"
    assert not count.is_copyleft(licence), f"{name} is under {licence}"


@pytest.mark.parametrize(
    ("licence", "copyleft"),
    [
        ("GPL-3.0-or-later", True),
        ("LGPL-2.1-only", True),
        ("AGPL-3.0", True),
        ("GNU Lesser General Public License v3 (LGPLv3)", True),
        ("GNU General Public License v3 or later (GPLv3+)", True),
        ("MIT AND GPL-2.0-only", True),
        ("GPL-2.0-only OR MIT", False),
        ("MPL-2.0 AND MIT", False),
        ("Apache-2.0", False),
        ("BSD License", False),
    ],
)
def test_copyleft_licences(licence: str, copyleft: bool):
    assert count.is_copyleft(licence) is copyleft


def write_package(folder: Path, name: str, *lines: str) -> Distribution:
    metadata = folder / f"{name.replace('-', '_')}-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("\n".join(("Metadata-Version: 2.4", f"Name: {name}", "Version: 1.0", *lines)))
    return Distribution.at(metadata)


def test_where_a_licence_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    gpl = "Classifier: License :: OSI Approved :: GNU General Public License v3 (GPLv3)"
    by_expression = write_package(tmp_path, "a", "License-Expression: MIT", gpl)
    by_classifier = write_package(tmp_path, "b", "License: see below", gpl)
    by_text = write_package(tmp_path, "c", "License: Apache 2.0 License")
    assert count.licence_of(by_expression) == "MIT"
    assert count.is_copyleft(count.licence_of(by_classifier))
    assert count.licence_of(by_text) == "Apache 2.0 License"
    no_licence = write_package(tmp_path, "d")
    assert count.licence_of(no_licence) == ""
    monkeypatch.setitem(count.LICENCES_BY_HAND, "d", "MIT, by its file LICENSE")
    assert count.licence_of(no_licence) == "MIT, by its file LICENSE"


def test_the_closure_follows_extras_and_markers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_package(tmp_path, "top-a", "Requires-Dist: part-b[more]", 'Requires-Dist: absent; python_version < "3"')
    write_package(tmp_path, "part-b", 'Requires-Dist: part-c; extra == "more"', 'Requires-Dist: absent; extra == "x"')
    write_package(tmp_path, "part-c", "Requires-Dist: top-a")
    monkeypatch.syspath_prepend(tmp_path)
    assert set(count.closure([Requirement("top-a")])) == {"top-a", "part-b", "part-c"}
    assert set(count.closure([Requirement("part-b")])) == {"part-b"}
