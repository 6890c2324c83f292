"""The graph of runs: which run made what another one read, and what follows from that.

An input is known by its digest; its path and its run's name are hints. A parent that is no longer there is yielded as
`Gone`, never skipped: whoever asks decides what not knowing means.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.config.stages import STAGES
from align.core.errors import InputError
from align.run.artifacts import Artifact, artifact_in, publishes, readable, with_digest
from align.run.figures import load_published_figures, suite_collapse
from align.run.manifest import FILE, Base, Input, Manifest, read_manifest

MADE_WEIGHTS = ("init", "artifact", "reward")
"""The inputs, by the beginning of their names, that are weights of other runs."""


@dataclass(frozen=True, slots=True)
class Gone:
    """A run that is not in the folder of runs any more, as a later one's manifest knows it."""

    ref: str
    digest: str


def manifests(root: Path, stage: str = "*") -> Iterator[tuple[Path, Manifest]]:
    """Every run's folder and manifest, in order of their names.

    Raises:
        CorruptFile, InputError: as `read_manifest`.
    """
    for path in sorted(root.glob(f"{stage}/*/{FILE}")):
        yield path.parent, read_manifest(path.parent)


def made_in(found: Input, root: Path) -> Path | None:
    """The folder of the run that made an input: where it lay then, under its name in this root, or wherever in this
    root a run of its stage published that very digest. None where there is none."""
    for folder in dict.fromkeys((Path(found.path).parent, root / found.stage / found.name)):
        manifest = readable(folder)
        named = manifest is not None and (manifest.stage, manifest.name) == (found.stage, found.name)
        if manifest is not None and named and publishes(folder, manifest, found.digest):
            return folder
    return with_digest(found.digest, root, found.stage)


def maker(found: Input, root: Path) -> Manifest | None:
    """The manifest of that run."""
    folder = made_in(found, root)
    return read_manifest(folder) if folder else None


def base_made_in(base: Base, root: Path) -> Path | Gone | None:
    """The folder of the run that made base weights; `Gone` where their path says that one did and it is not there;
    None where no run did."""
    place = Path(base.path).parent
    here = readable(place) if Path(base.path).name == "artifact" else None
    if here and here.done and base.digest in (here.digest, artifact_in(place, str(place), verify=False).digest):
        return place
    if (found := with_digest(base.digest, root)) is not None:
        return found
    by_run = Path(base.path).name == "artifact" and place.parent.name in STAGES
    return Gone(f"{place.parent.name}:{place.name}", base.digest) if by_run else None


def maker_of_base(base: Base, root: Path) -> Manifest | Gone | None:
    """The manifest of that run."""
    found = base_made_in(base, root)
    return read_manifest(found) if isinstance(found, Path) else found


def origin_of(artifact: Artifact, base: Base, root: Path) -> Base:
    """The model that an artifact grew from: the base of an adapter; of a whole model the one that its first run trained
    every weight of, itself where no run made it.

    Args:
        base: that the artifact is on; a whole model itself.
    """
    manifest = artifact.manifest if artifact.whole else None
    while isinstance(manifest, Manifest) and manifest.base is not None:
        base = manifest.base
        manifest = maker_of_base(base, root)
    return base


def ancestors(manifest: Manifest, root: Path, through: Sequence[str] | None = None) -> Iterator[Manifest | Gone]:
    """A run, and those that it came through, each once: its inputs' and its base's.

    Args:
        root: the folder of runs.
        through: the inputs to follow, besides the base; None for all.
    """
    return (found for found, _ in walked(manifest, None, root, through))


def walked(
    manifest: Manifest, folder: Path | None, root: Path, through: Sequence[str] | None = None
) -> Iterator[tuple[Manifest | Gone, Path | None]]:
    """The same, each with its folder; None of one that is gone.

    Args:
        folder: of the run itself.
    """
    seen: set[tuple[str, str]] = set()

    def walk(found: Manifest | Gone, folder: Path | None, digest: str) -> Iterator[tuple[Manifest | Gone, Path | None]]:
        if (found.ref, digest) in seen:
            return
        seen.add((found.ref, digest))
        yield found, folder
        if isinstance(found, Gone):
            return
        for name, given in found.inputs.items():
            if given.stage and (through is None or name in through):
                made = made_in(given, root)
                yield from walk(read_manifest(made) if made else Gone(given.run, given.digest), made, given.digest)
        if found.base is not None:
            made = base_made_in(found.base, root)
            if isinstance(made, Path):
                yield from walk(read_manifest(made), made, found.base.digest)
            elif made is not None:
                yield from walk(made, None, found.base.digest)

    yield from walk(manifest, folder, manifest.digest)


def folders_behind(artifact: Artifact, root: Path) -> Iterator[tuple[Manifest | Gone, Path | None]]:
    """The same, each with its folder; None of one that is gone."""
    return walked(artifact.manifest, artifact.path.parent, root) if artifact.manifest else iter(())


def data_behind(artifact: Artifact, root: Path) -> list[str]:
    """The names of the data that an artifact was trained on, each once, as other machines may know them. Of a run that
    is gone, that nobody knows."""
    found = []
    for manifest, _ in folders_behind(artifact, root):
        if isinstance(manifest, Gone):
            found.append(f"whatever {manifest.ref} was trained on: that run is gone")
            continue
        data, read = manifest.config["data"], manifest.inputs.get("data", Input(""))
        name = read.project or (Path(data["path"]).name if data.get("path") else data["name"])
        found.append(f"annotations {name}" if read.project else name)
    return list(dict.fromkeys(found))


@dataclass(frozen=True, slots=True)
class Step:
    """A run that weights came through.

    Attributes:
        digest: of the weights that it made.
        manifest: None of a run that is gone.
    """

    stage: str
    name: str
    digest: str
    manifest: Manifest | None = None


def trained_through(manifest: Manifest, digest: str, root: Path) -> list[Step]:
    """The runs that an artifact's weights came through, in order of training, itself last.

    Args:
        digest: the artifact's.
    """
    before: list[Step] = []
    if manifest.base is not None and (base := maker_of_base(manifest.base, root)) is not None:
        stage, _, name = base.ref.partition(":")
        gone = Step(stage, name, manifest.base.digest)
        before += [gone] if isinstance(base, Gone) else trained_through(base, manifest.base.digest, root)
    for name, given in manifest.inputs.items():
        if given.stage and name.partition(".")[0] in MADE_WEIGHTS:
            made = maker(given, root)
            gone = Step(given.stage, given.name, given.digest)
            before += trained_through(made, given.digest, root) if made else [gone]
    found = [*before, Step(manifest.stage, manifest.name, digest, manifest)]
    return [step for i, step in enumerate(found) if step not in found[:i]]


def evaluated_by(artifact: Input, root: Path) -> Manifest | None:
    """The newest finished evaluation of exactly this artifact, one by a proxy only where there is no other."""
    found = [
        manifest
        for _, manifest in manifests(root, "eval")
        if manifest.done
        and (of := manifest.inputs.get("artifact")) is not None
        and (of.digest, of.tokenizer) == (artifact.digest, artifact.tokenizer)
    ]
    return max(found, key=lambda m: (m.metrics.get("judge_is") != "proxy", m.publication), default=None)


def suite_collapse_of(artifact: Input, root: Path) -> Mapping[str, Any] | None:
    """Return the verdict of the newest finished evaluation of several systems on whether exactly this artifact
    collapsed. None if none measured it."""
    newest: tuple[tuple[int, str], Mapping[str, Any]] | None = None
    for folder, manifest in manifests(root, "eval"):
        names = [
            name
            for name, read in manifest.inputs.items()
            if (read.digest, read.tokenizer) == (artifact.digest, artifact.tokenizer)
        ]
        if not manifest.done or not any(name.startswith("systems.") for name in names):
            continue
        metrics = load_published_figures(folder, manifest)
        for name in names:
            collapse = suite_collapse(metrics, name)
            if collapse and (newest is None or manifest.publication > newest[0]):
                newest = (manifest.publication, collapse)
    return newest[1] if newest else None


def readers_of(root: Path, project: str, first: int, last: int) -> tuple[list[str], list[str]]:
    """The runs that read an annotation project while rows `first` to `last` of its ledger were its newest, and those
    that were made from them, see `users_of`; and the runs of `sample` that filled it, whose files hold the same
    texts."""
    used, unread = users_of(root, lambda read: read.project == project and first <= read.seq < last)
    folders = [path.parent for path in sorted(root.glob(f"sample/*/{FILE}"))]
    filled = [f"sample/{folder.name}" for folder in folders
              if (made := readable(folder)) and made.config.get("project") == project
              and made.config.get("stage", {}).get("best_of") is None]  # fmt: skip
    return [*used, *(name for name in filled if name not in used)], unread


def users_of(root: Path, which: Callable[[Input], bool]) -> tuple[list[str], list[str]]:
    """The runs of which an input is one of those that are asked for, and those that were made from them: `stage/name`,
    each after what it came from. And the manifests that cannot be read."""
    found: dict[str, Manifest] = {}
    unread = []
    for path in sorted(root.glob(f"*/*/{FILE}")):
        try:
            manifest = read_manifest(path.parent)
            found[f"{manifest.stage}/{manifest.name}"] = manifest
        except (InputError, KeyError):
            unread.append(str(path))
    used = [name for name, manifest in found.items() if any(map(which, manifest.inputs.values()))]
    for parent in used:  # grows while we walk it
        files, data_set = {*found[parent].outputs.values()}, found[parent].metrics.get("root")
        for name, manifest in found.items():
            read = manifest.inputs.values()
            child = any(
                f"{r.stage}/{r.name}" == parent or r.digest in files or (data_set and r.details.get("root") == data_set)
                for r in read
            )
            if child and name not in used:
                used.append(name)
    return used, unread
