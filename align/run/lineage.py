"""Search in the graph of runs for the runs that made a run's inputs, and for the runs that were made from it.

An input is identified by its digest; its path and its run's name are hints. A parent that was removed is yielded as
`GoneRun`, never skipped, so that the caller decides how to treat it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from align.config.stages import STAGES
from align.core.errors import InputError
from align.run.artifacts import Artifact, find_run_by_digest, has_published, load_artifact, try_read_manifest
from align.run.figures import get_suite_collapse, load_published_figures
from align.run.manifest import FILE, Base, Input, Manifest, read_manifest

MADE_WEIGHTS = ("init", "artifact", "reward")
"""Names of the inputs that are weights of other runs, up to the first dot: `init`, `artifact`, `reward`."""


@dataclass(frozen=True, slots=True)
class GoneRun:
    """A deleted run, known only by the `stage:name` and the digest in the manifest of a run that read it."""

    ref: str
    digest: str


def iter_manifests(root: Path, stage: str = "*") -> Iterator[tuple[Path, Manifest]]:
    """Yield the folder and the manifest of each run of a stage, or of all stages, sorted by path.

    Raises:
        CorruptFile, InputError: As `read_manifest`.
    """
    for path in sorted(root.glob(f"{stage}/*/{FILE}")):
        yield path.parent, read_manifest(path.parent)


def find_producing_run(input: Input, root: Path) -> Path | None:
    """Return the folder of the run that published an input, or None if that run was removed.

    Searched are its recorded path, its name under `root`, and then all runs of its stage for the same digest.
    """
    for folder in dict.fromkeys((Path(input.path).parent, root / input.stage / input.name)):
        manifest = try_read_manifest(folder)
        if manifest is None or (manifest.stage, manifest.name) != (input.stage, input.name):
            continue
        if has_published(folder, manifest, input.digest):
            return folder
    return find_run_by_digest(input.digest, root, input.stage)


def find_base_producer(base: Base, root: Path) -> Path | GoneRun | None:
    """Return the folder of the run that published base weights, or None if they are not from a run.

    Returns `GoneRun` if their path is that of a run's artifact, but no run with their digest is found.
    """
    folder = Path(base.path).parent
    is_artifact = Path(base.path).name == "artifact"
    manifest = try_read_manifest(folder) if is_artifact else None
    if manifest and manifest.done:
        current_digest = load_artifact(folder, str(folder), verify=False).digest
        if base.digest in (manifest.digest, current_digest):
            return folder
    if (other_folder := find_run_by_digest(base.digest, root)) is not None:
        return other_folder
    if is_artifact and folder.parent.name in STAGES:
        return GoneRun(f"{folder.parent.name}:{folder.name}", base.digest)
    return None


def read_base_producer(base: Base, root: Path) -> Manifest | GoneRun | None:
    """Return the manifest of the run that published base weights, or None if they are not from a run.

    Returns `GoneRun` if that run was removed.
    """
    folder = find_base_producer(base, root)
    return read_manifest(folder) if isinstance(folder, Path) else folder


def find_origin(artifact: Artifact, base: Base, root: Path) -> Base:
    """Return the pretrained model that an artifact goes back to through all its training runs.

    For an adapter that is its base. For a whole model it is the model whose weights its first run trained, or the
    model itself if no run made it.

    Args:
        base: base of the artifact; a whole model itself.
    """
    manifest = artifact.manifest if artifact.whole else None
    while isinstance(manifest, Manifest) and manifest.base is not None:
        base = manifest.base
        manifest = read_base_producer(base, root)
    return base


def iter_ancestors(
    manifest: Manifest, root: Path, through: Sequence[str] | None = None
) -> Iterator[Manifest | GoneRun]:
    """Yield the manifest of a run and, recursively, of each run that made its inputs or its base, without repeats.

    A removed run is yielded as `GoneRun`.

    Args:
        root: the folder of runs.
        through: names of the inputs to follow, besides the base; None for all.
    """
    return (run for run, _ in walk_lineage(manifest, None, root, through))


def walk_lineage(
    manifest: Manifest, folder: Path | None, root: Path, through: Sequence[str] | None = None
) -> Iterator[tuple[Manifest | GoneRun, Path | None]]:
    """Yield (manifest, folder) of a run and, recursively, of each run that made its inputs or its base, without
    repeats.

    A removed run is yielded as `GoneRun` with None for the folder.

    Args:
        folder: the run's own.
        through: names of the inputs to follow, besides the base; None for all.
    """
    visited: set[tuple[str, str]] = set()

    def walk(
        run: Manifest | GoneRun, folder: Path | None, digest: str
    ) -> Iterator[tuple[Manifest | GoneRun, Path | None]]:
        if (run.ref, digest) in visited:
            return
        visited.add((run.ref, digest))
        yield run, folder
        if isinstance(run, GoneRun):
            return
        for name, input in run.inputs.items():
            if input.stage and (through is None or name in through):
                parent = find_producing_run(input, root)
                yield from walk(
                    read_manifest(parent) if parent else GoneRun(input.run, input.digest), parent, input.digest
                )
        if run.base is not None:
            parent = find_base_producer(run.base, root)
            if isinstance(parent, Path):
                yield from walk(read_manifest(parent), parent, run.base.digest)
            elif parent is not None:
                yield from walk(parent, None, run.base.digest)

    yield from walk(manifest, folder, manifest.digest)


def iter_artifact_ancestors(artifact: Artifact, root: Path) -> Iterator[tuple[Manifest | GoneRun, Path | None]]:
    """Yield the manifest and the folder of the run that made an artifact and of all runs that it depends on.

    The folder of a removed run is `None`. Yields nothing if no run made the artifact.
    """
    return walk_lineage(artifact.manifest, artifact.path.parent, root) if artifact.manifest else iter(())


def list_training_data(artifact: Artifact, root: Path) -> list[str]:
    """Return the names of all data sets that an artifact and its ancestors were trained on, each once, without folders.

    A run that is gone contributes a sentence that says so.
    """
    names: list[str] = []
    for manifest, _ in iter_artifact_ancestors(artifact, root):
        if isinstance(manifest, GoneRun):
            names.append(f"the training data of {manifest.ref}: that run is gone")
            continue
        data = manifest.config["data"]
        project = manifest.inputs.get("data", Input("")).project
        if project:
            names.append(f"annotations {project}")
        else:
            names.append(Path(data["path"]).name if data.get("path") else data["name"])
    return list(dict.fromkeys(names))


@dataclass(frozen=True, slots=True)
class LineageStep:
    """One run in the training history of a model's weights, with the digest of the weights it made.

    Attributes:
        digest: digest of the weights that it made.
        manifest: None if the run is gone.
    """

    stage: str
    name: str
    digest: str
    manifest: Manifest | None = None


def list_training_steps(manifest: Manifest, digest: str, root: Path) -> list[LineageStep]:
    """Return the runs that trained an artifact's weights, from the first to its own, each once.

    Args:
        manifest: the manifest of the artifact's run.

    Args:
        digest: the artifact's.
    """
    steps: list[LineageStep] = []
    if manifest.base is not None:
        base_run = read_base_producer(manifest.base, root)
        if isinstance(base_run, Manifest):
            steps += list_training_steps(base_run, manifest.base.digest, root)
        elif base_run is not None:
            stage, _, name = base_run.ref.partition(":")
            steps.append(LineageStep(stage, name, manifest.base.digest))
    for name, input in manifest.inputs.items():
        if input.stage and name.partition(".")[0] in MADE_WEIGHTS:
            if folder := find_producing_run(input, root):
                steps += list_training_steps(read_manifest(folder), input.digest, root)
            else:
                steps.append(LineageStep(input.stage, input.name, input.digest))
    steps.append(LineageStep(manifest.stage, manifest.name, digest, manifest))
    return [step for i, step in enumerate(steps) if step not in steps[:i]]


def find_evaluation(artifact: Input, root: Path) -> Manifest | None:
    """Return the manifest of the newest finished evaluation of an artifact with this digest, or None if none exists.

    One by a proxy judge ranks behind any other.
    """
    evaluations = []
    for _, manifest in iter_manifests(root, "eval"):
        subject = manifest.inputs.get("artifact")
        if not manifest.done or subject is None:
            continue
        if (subject.digest, subject.tokenizer) == (artifact.digest, artifact.tokenizer):
            evaluations.append(manifest)
    return max(evaluations, key=lambda run: (run.metrics.get("judge_is") != "proxy", run.publication), default=None)


def find_suite_collapse(artifact: Input, root: Path) -> Mapping[str, Any] | None:
    """Return the verdict on an artifact's mode collapse from the newest evaluation among other models, or None."""
    newest: tuple[tuple[int, str], Mapping[str, Any]] | None = None
    for folder, manifest in iter_manifests(root, "eval"):
        names = [
            name
            for name, input in manifest.inputs.items()
            if (input.digest, input.tokenizer) == (artifact.digest, artifact.tokenizer)
        ]
        if not manifest.done or not any(name.startswith("systems.") for name in names):
            continue
        metrics = load_published_figures(folder, manifest)
        for name in names:
            collapse = get_suite_collapse(metrics, name)
            if collapse and (newest is None or manifest.publication > newest[0]):
                newest = (manifest.publication, collapse)
    return newest[1] if newest else None


class RunsFound(NamedTuple):
    """The runs that a search through a folder of runs found, and the manifests that it could not read.

    Attributes:
        runs: `stage/name` of each.
        unreadable: paths of the manifests that cannot be read.
    """

    runs: list[str]
    unreadable: list[str]


def find_readers(root: Path, project: str, first: int, last: int) -> RunsFound:
    """Return the runs that read an annotation project while its ledger ended between two rows, and runs made from them.

    Included are runs that read it while its newest ledger row was one from `first` to `last - 1`, the runs made from
    them (see `find_users`), and the `sample` runs that filled it, whose files hold the same texts.
    """
    readers, unreadable = find_users(root, lambda input: input.project == project and first <= input.seq < last)
    for path in sorted(root.glob(f"sample/*/{FILE}")):
        sample = try_read_manifest(path.parent)
        if sample is None or sample.config.get("project") != project:
            continue
        name = f"sample/{path.parent.name}"
        if sample.config.get("stage", {}).get("best_of") is None and name not in readers:
            readers.append(name)
    return RunsFound(readers, unreadable)


def find_users(root: Path, matches: Callable[[Input], bool]) -> RunsFound:
    """Return the runs with an input for which `matches` is True, and all runs made from them.

    Each run is listed after the runs that it was made from.

    Args:
        matches: return whether an input matches.
    """
    runs: dict[str, Manifest] = {}
    unreadable: list[str] = []
    for path in sorted(root.glob(f"*/*/{FILE}")):
        try:
            manifest = read_manifest(path.parent)
            runs[f"{manifest.stage}/{manifest.name}"] = manifest
        except (InputError, KeyError):
            unreadable.append(str(path))
    users = [name for name, manifest in runs.items() if any(map(matches, manifest.inputs.values()))]
    for parent in users:  # grows during the loop
        files = {*runs[parent].outputs.values()}
        data_set = runs[parent].metrics.get("root")
        for name, manifest in runs.items():
            is_child = any(
                f"{input.stage}/{input.name}" == parent
                or input.digest in files
                or (data_set and input.details.get("root") == data_set)
                for input in manifest.inputs.values()
            )
            if is_child and name not in users:
                users.append(name)
    return RunsFound(users, unreadable)
