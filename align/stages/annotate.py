"""`stage=annotate`: serve the annotation app, and import, export, verify, back up and erase its data."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from getpass import getuser
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote

from align.annotate.accounts import Accounts, Person
from align.annotate.assignment import AssignmentQueue
from align.annotate.exchange.archive import restore_store, write_store_backup
from align.annotate.exchange.exporting import export_votes
from align.annotate.exchange.importing import import_items
from align.annotate.figures.alarms import ALARMS, AnnotatorAssessment, assess_annotators
from align.annotate.figures.estimates import as_json
from align.annotate.figures.project import read_view
from align.annotate.simulate import simulate_annotator
from align.annotate.store import ChainHead, ProjectSettings, Store, configure_project, publish_guidelines
from align.annotate.store.projects import read_state
from align.annotate.store.quarantine import find_pseudonym, quarantine_annotator, release_annotator
from align.annotate.store.vote_selection import VoteSelection
from align.config.addresses import build_server_urls, list_tls_warnings
from align.config.annotate import AnnotateConfig, SimulatedAnnotator
from align.config.command import format_hydra_value
from align.config.root import Config
from align.config.scorers import build_reward_spec
from align.config.settings import replace_values
from align.core.errors import InputError, require
from align.core.files import has_file, parse_user_path, read_text
from align.core.types import StageResult
from align.evals.judges.identity import build_voter_name, identify_scorer
from align.report.figure_text import align_columns, pluralize
from align.reward.inputs import load_reward_artifacts, resolve_reward_inputs
from align.run import Input, Run, json_digest, resolve, write_json
from align.run.atomic import publish_folder
from align.run.lineage import find_readers
from align.stages.runner import StageInputs, format_annotate_command, open_store

if TYPE_CHECKING:
    from align.reward.scorer import Scorer

SCORED_AT_ONCE = 32
"""Number of answers in a batch that a reward model scores."""
SEEDS = 2**32
"""Number of different values of `seed`. Each simulated annotator uses seeds from a range of this size of its own."""


def inputs(config: Config) -> StageInputs:
    """Resolve the inputs of an action of `stage=annotate`, and replace a person's name in `stage.annotator` by a
    pseudonym.

    `stage.action=invite` uses a handle instead. Nothing that the run writes may contain the name.
    """
    stage: AnnotateConfig = config.stage
    label = f"{config.project}-{stage.action}"
    if stage.action == "simulate":
        # The items are the input, and not the votes, so that a resumed run is the same run.
        with open_store(config, create=False) as store:
            items = json_digest([item.id for item in store.items(config.project)])
        records = {"items": Input(items, project=config.project)}
        for prefix, reward in list_simulated_rewards(config).items():
            for name, record in resolve_reward_inputs(reward, config.run.folder, None).items():
                records[f"{prefix}{name}"] = record
        return StageInputs(config, label, None, records)
    paths = {"guidelines": stage.guidelines}
    if stage.action != "backup":  # which writes its path
        paths["path"] = stage.path
    for name, path in paths.items():
        exists = path is None or has_file(parse_user_path(path, f"stage.{name}"), f"stage.{name}")
        require(exists, f"stage.{name}", path, "there is no such file", "Check the path.")
    if stage.action == "export":  # it reads the project, so that a later erasure lists this run
        with open_store(config, create=False) as store:
            head = store.head(config.project)
        return StageInputs(config, label, None, {"annotations": Input(head.hash, project=config.project, seq=head.seq)})
    # The person's name is replaced here, because nothing that the run writes may contain it.
    if stage.annotator is not None and stage.action in ("erase", "quarantine", "release", "invite"):
        with open_store(config, create=False) as store:
            accounts = Accounts(store)
            if stage.action == "invite":
                alternative_name = accounts.get_handle(config.project, stage.annotator)
            elif stage.action == "erase":
                alternative_name = accounts.ensure_pseudonym(config.project, stage.annotator)
            else:
                alternative_name = find_voter(store, config.project, stage.annotator)
            config = replace_values(config, stage=replace_values(stage, annotator=alternative_name))
    # The other actions read or change a store that changes. A random input makes each call a new run.
    return StageInputs(config, label, None, {"asked": Input(secrets.token_hex(8))})


def find_voter(store: Store, project: str, name: str) -> str:
    """Return the pseudonym of an annotator of a project, who is given by name or by pseudonym.

    Raises:
        InputError: the project has no such annotator.
    """
    with store.reading() as connection:
        return find_pseudonym(connection, project, name)


def run(run: Run, config: Config) -> StageResult:
    return ACTIONS[config.stage.action](run, config)


def run_serve(run: Run, config: Config) -> StageResult:
    """Serve the annotation web app until the process is interrupted, and count the rankings that were added."""
    from align.annotate.web.access import AccountAuthenticator
    from align.annotate.web.server import build_app  # Gradio takes seconds to import
    from align.web.key_link import KeyAuthenticator, load_or_create_key
    from align.web.server import serve_app

    stage: AnnotateConfig = config.stage
    url, other_origins = build_server_urls(stage.host, stage.port, stage.url)
    with open_store(config, create=False) as store, store.serve_exclusively():
        seq_before = store.head(config.project).seq  # raises InputError if there is no such project
        if stage.demo:
            key = load_or_create_key(config.run.folder / "annotate.key")
            person = Person(getuser(), {config.project: "admin"})
            authenticator = KeyAuthenticator(key, person, f"align_key_{stage.port}")
            links = [f"open {url}/?key={key}"]
        else:
            accounts = Accounts(store)
            token = accounts.invite_first_admin(config.project)
            authenticator = AccountAuthenticator(accounts, f"align_session_{stage.port}")
            links = [f"open {url}/?project={quote(config.project)}"]
            if token is not None:
                link = f"{url}/invite?token={token}"
                links.append(f"the project has no admin yet; this link, valid once and for a day, makes one: {link}")
        links += list_tls_warnings(url)
        links.append("Ctrl+C ends it; all votes are saved")
        app = build_app(store, authenticator, [url, *other_origins])
        serve_app(app, stage.host, stage.port, lambda: print(*links, sep="\n", flush=True))
        progress = AssignmentQueue(store, config.project).read_progress("")  # of the project, and not of one person
        added = sum(vote.seq > seq_before for vote in store.rankings(config.project))
        record_head(run, config.project, store.head(config.project))
    metrics = {"rankings": added, "done": progress.votes, "wanted": progress.votes_wanted}
    return StageResult(metrics, (f"{added} rankings; all: {progress.votes} of {progress.votes_wanted}",))


def run_invite(run: Run, config: Config) -> StageResult:
    """Create an invitation to an annotation project and print its link, which is valid once and for a week."""
    stage: AnnotateConfig = config.stage
    with open_store(config, create=False) as store:
        accounts = Accounts(store)
        name = "" if stage.annotator is None else accounts.resolve_handle(config.project, stage.annotator)
        token = accounts.invite(config.project, stage.role, name)
    # The link is printed only: other people may read the run's folder.
    url, _ = build_server_urls(stage.host, stage.port, stage.url)
    print(f"the invitation, valid once and for a week: {url}/invite?token={token}")
    return StageResult({}, (f"an invitation to project {config.project}, as {stage.role}",))


def get_input_prefix(number: int, annotator: SimulatedAnnotator) -> str:
    return "" if annotator.reward is None else f"annotators[{number}]."


def list_simulated_rewards(config: Config) -> dict[str, dict[str, Any]]:
    """Return a mapping from a prefix of input names to the description of a reward that simulated annotators rank by.

    The prefix is empty for `reward=`, and `annotators[i].` for the reward that annotator i has of its own.

    Raises:
        InputError: a reward is an ensemble or a sum, which are standardised on a policy's answers.
    """
    rewards = {}
    for number, annotator in enumerate(config.stage.parse_annotators()):
        prefix = get_input_prefix(number, annotator)
        field = f"stage.{prefix.removesuffix('.')}" if prefix else "reward"
        reward = annotator.parse_reward(field) if prefix else config.reward
        problem = "is standardised on a policy's answers, and annotators have none"
        remedy = "Let each annotator rank by one reward, or write a function."
        require(reward.name not in ("ensemble", "sum"), f"{field}.name", reward.name, problem, remedy)
        rewards[prefix] = build_reward_spec(reward)
    return rewards


class SimulatedScorer(NamedTuple):
    """A scorer by which simulated annotators rank.

    Attributes:
        name: in the votes, see `build_voter_name`.
        digest: of all that decides its scores. Empty for the sentiment score.
    """

    scorer: Scorer
    name: str
    digest: str


def build_simulated_scorers(run: Run, config: Config) -> dict[str, SimulatedScorer]:
    """Build the scorers of the simulated annotators, with the keys of `list_simulated_rewards`."""
    from align.models.load import choose_device, choose_dtype
    from align.reward.build import build_scorer, load_reward_model

    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    built: dict[str, SimulatedScorer] = {}
    scorers = {}
    for prefix, reward in list_simulated_rewards(config).items():
        start = f"{prefix}reward"
        records = {name.removeprefix(prefix): run.inputs[name] for name in run.inputs if name.startswith(start)}
        digest = identify_scorer(reward, records).digest[:8]
        if digest not in built:
            artifacts = load_reward_artifacts(records)
            models = (load_reward_model(artifact, device, dtype, SCORED_AT_ONCE) for artifact in artifacts)
            shown_digest = "" if reward["name"] == "sentiment" else digest
            built[digest] = SimulatedScorer(
                build_scorer(reward, models), build_voter_name(reward, records), shown_digest
            )
        scorers[prefix] = built[digest]
    return scorers


def run_simulate(run: Run, config: Config) -> StageResult:
    """Add votes of simulated annotators, who rank all items of a project by a reward, with noise."""
    scorers = build_simulated_scorers(run, config)
    results = []
    with open_store(config, create=False) as store:
        for number, annotator in enumerate(config.stage.parse_annotators()):
            scorer, name, digest = scorers[get_input_prefix(number, annotator)]
            summary = simulate_annotator(
                store,
                config.project,
                scorer,
                config.seed + SEEDS * number,
                annotator.agreement,
                annotator.position_bias,
                name,
                digest,
            )
            results.append(summary)
        record_head(run, config.project, store.head(config.project))
    pairs = sum(result.pairs for result in results)
    metrics = {
        "annotators": len(results),
        "items": results[0].items,
        "rankings": sum(result.items for result in results),
        "added": sum(result.added for result in results),
        "pairs": pairs,
        "tie_share": sum(result.tie_share * result.pairs for result in results) / pairs if pairs else 0.0,
        "agreement": sum(result.agreement for result in results) / len(results),
        "slope": sum(result.slope for result in results) / len(results),
    }
    line = (
        f"{metrics['rankings']} rankings of {metrics['items']} items, {metrics['pairs']} pairs, "
        f"{metrics['tie_share']:.0%} tied; agreement {metrics['agreement']:.3f}"
    )
    return StageResult(metrics, (line,))


def run_import(run: Run, config: Config) -> StageResult:
    """Add the rows of the file `stage.path` as items to a project of the annotation store. Known rows are skipped."""
    path = parse_user_path(config.stage.path, "stage.path")
    with open_store(config) as store:
        rows, added = import_items(store, config.project, path, config.stage.source)
        record_head(run, config.project, store.head(config.project))
    line = f"{rows} rows, {added} of them new in project {config.project}"
    return StageResult({"rows": rows, "added": added}, (line,))


def run_configure(run: Run, config: Config) -> StageResult:
    """Change the settings, state and guidelines of an annotation project, which is created if it is missing."""
    stage: AnnotateConfig = config.stage
    with open_store(config) as store, store.transaction() as db:
        is_new = config.project not in store.projects()
        settings = configure_project(store, config.project, stage.settings, stage.state)
        version = None
        if stage.guidelines:
            field = "stage.guidelines"
            text = read_text(parse_user_path(stage.guidelines, field), field, "Name a Markdown file in UTF-8.")
            version = publish_guidelines(store, config.project, text)
        state = read_state(db, config.project)
    defaults = asdict(ProjectSettings())
    changed = {name: value for name, value in asdict(settings).items() if value != defaults[name]}
    if "attributes" in changed:
        changed["attributes"] = list(changed["attributes"])
    described = f"stage.settings={format_hydra_value(changed)}" if changed else "with every setting at its default"
    lines = [f"{'a new project' if is_new else 'project'} {config.project}: {state}, {described}"]
    if version is None:
        return StageResult({}, tuple(lines))
    return StageResult({"guidelines": version}, (*lines, f"guidelines, version {version}"))


def run_export(run: Run, config: Config) -> StageResult:
    """Write the votes of a project to files in the run's artifact, and record the ledger's head."""
    with open_store(config, create=False) as store:
        shutil.rmtree(run.artifact, ignore_errors=True)  # of an export that was interrupted
        with publish_folder(run.artifact) as folder:
            rows = export_votes(store, config.project, folder, VoteSelection.from_settings(config.data))
        record_head(run, config.project, store.head(config.project))
    return StageResult(rows, tuple(f"{run.artifact / name}: {number} rows" for name, number in rows.items()))


def run_verify(run: Run, config: Config) -> StageResult:
    """Verify the hash chain of the annotation ledger, and that it continues the head that an earlier run recorded."""
    with open_store(config, create=False) as store:
        store.head(config.project)  # raises InputError if there is no such project
        head = store.verify(read_head_recorded_by_run(config.stage.head, config.run.folder, config.project))
    return StageResult({"rows": head.seq}, (f"{head.seq} rows of the ledger are unchanged; the head is {head.hash}",))


def run_backup(run: Run, config: Config) -> StageResult:
    """Write a backup of the whole annotation store to the file `stage.path`."""
    path = parse_user_path(config.stage.path, "stage.path")
    with open_store(config, create=False) as store:
        info = write_store_backup(store, path)
    line = f"{path}: {info['rows']} rows, the ledger up to row {info['seq']}"
    return StageResult({"rows": info["rows"], "seq": info["seq"]}, (line,))


def run_restore(run: Run, config: Config) -> StageResult:
    """Restore the annotation store from the backup file `stage.path`, and verify its ledger."""
    with open_store(config) as store:
        head = restore_store(store, parse_user_path(config.stage.path, "stage.path"))
    return StageResult({"seq": head.seq}, (f"the ledger is restored and verified up to row {head.seq}",))


def run_erase(run: Run, config: Config) -> StageResult:
    """Erase an annotator, an item or a project from the annotation store, and list the runs that read the data."""
    stage: AnnotateConfig = config.stage
    project = config.project
    with open_store(config, create=False) as store:
        selector = {}
        if stage.item is not None:
            selector["item"] = stage.item
        if stage.annotator is not None:
            selector["annotator"] = stage.annotator
        first_row = store.find_first_row(project, **selector) if selector else 0
        readers, unreadable = find_readers(config.run.folder, project, first_row or 0, store.head().seq + 1)
        if stage.whole:
            tombstone = store.erase_project(project)
        elif stage.item is not None:
            tombstone = store.erase_content(project, stage.item)
        else:
            tombstone = store.erase_annotator(project, stage.annotator or "")
    erased = " ".join(*selector.items()) if selector else f"project {project}"
    lines = [f"{erased} is erased; row {tombstone} of the ledger records it"]
    lines.append("runs that read or filled it, and runs made from those:" if readers else "no run read it")
    lines += readers
    if unreadable:
        lines += ["runs that cannot be read; check them yourself:", *unreadable]
    return StageResult({"tombstone": tombstone, "runs": readers, "unreadable": unreadable}, tuple(lines))


def run_assess(run: Run, config: Config) -> StageResult:
    """Print the traits of a project's annotators, and alarms about those who may not judge the answers."""
    with open_store(config, create=False) as store:
        view = read_view(store, config.project)
    assessments = assess_annotators(view)
    # The names are printed only: nothing that the run writes may contain them.
    print(*format_assessments(assessments, view.identities), sep="\n")
    alarms = {
        assessment.pseudonym: [alarm.kind for alarm in assessment.alarms]
        for assessment in assessments
        if assessment.alarms
    }
    for pseudonym in alarms:
        settings = ("stage.action=quarantine", f"stage.annotator={pseudonym}")
        command = format_annotate_command(config, config.project, *settings)
        print(f"To leave out {view.identities.get(pseudonym, pseudonym)}: {command}")
    write_json(run.artifact / "annotators.json", as_json(assessments))
    line = f"{pluralize(len(assessments), 'annotator')}, {len(alarms)} with alarms"
    return StageResult({"annotators": len(assessments), "alarms": alarms}, (line,))


def format_assessments(assessments: Sequence[AnnotatorAssessment], identities: Mapping[str, str]) -> Iterator[str]:
    """Yield the lines of a table of annotators, and the evidence of their alarms.

    Args:
        identities: name by pseudonym.
    """
    rows = [["annotator", "rankings", "accuracy", "first", "ties", "alarms"]]
    for assessment in assessments:
        shares = (assessment.accuracy, assessment.first_share, assessment.tie_share)
        alarms = [f"{ALARMS[alarm.kind]} ({alarm.evidence})" for alarm in assessment.alarms]
        name = identities.get(assessment.pseudonym, assessment.pseudonym)
        rows.append(
            [name, str(assessment.rankings), *(f"{share:.2f}" for share in shares), "; ".join(alarms) or "none"]
        )
    return align_columns(rows)


def run_quarantine(run: Run, config: Config) -> StageResult:
    """Put an annotator into quarantine."""
    with open_store(config, create=False) as store:
        row = quarantine_annotator(store, config.project, config.stage.annotator)
    return StageResult({"row": row}, (f"{config.stage.annotator} is in quarantine by row {row} of the ledger",))


def run_release(run: Run, config: Config) -> StageResult:
    """Release an annotator from quarantine."""
    with open_store(config, create=False) as store:
        row = release_annotator(store, config.project, config.stage.annotator)
    return StageResult({"row": row}, (f"{config.stage.annotator} is released by row {row} of the ledger",))


ACTIONS: dict[str, Callable[[Run, Config], StageResult]] = {
    "serve": run_serve,
    "invite": run_invite,
    "simulate": run_simulate,
    "import": run_import,
    "configure": run_configure,
    "export": run_export,
    "verify": run_verify,
    "backup": run_backup,
    "restore": run_restore,
    "assess": run_assess,
    "quarantine": run_quarantine,
    "release": run_release,
    "erase": run_erase,
}


def record_head(run: Run, project: str, head: ChainHead) -> None:
    """Write the number and the hash of the ledger's last row to `ledger.json` in the run's artifact."""
    write_json(run.artifact / "ledger.json", {"project": project, "seq": head.seq, "hash": head.hash})


def read_head_recorded_by_run(ref: str | None, root: Path, project: str) -> ChainHead | None:
    """Return the ledger head that the run `ref` recorded when it read the project, or None if `ref` is `None`.

    Raises:
        InputError: there is no such run, or it did not read the project.
    """
    if ref is None:
        return None
    manifest = resolve(ref, root, field_name="stage.head").manifest
    inputs = manifest.inputs.values() if manifest else ()
    recorded = next((record for record in inputs if record.project == project and record.seq >= 0), None)
    if recorded is None:
        problem = f"it did not read project {project}"
        raise InputError("stage.head", ref, problem, "Name a run of stage=reward, stage=dpo or stage=kto that did.")
    return ChainHead(recorded.seq, recorded.digest)
