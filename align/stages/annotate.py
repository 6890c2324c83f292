"""The annotation store from the command line: what goes in and out of it, and whether it is what was written."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable
from dataclasses import asdict
from getpass import getuser
from pathlib import Path
from urllib.parse import quote

from align.annotate.accounts import Accounts, Person
from align.annotate.assignment import AssignmentQueue
from align.annotate.exchange.archive import backup, restore
from align.annotate.exchange.exporting import export
from align.annotate.exchange.importing import import_items
from align.annotate.simulate import simulate
from align.annotate.store import ChainHead, Settings, configure, publish_guidelines
from align.annotate.store.projects import state_of
from align.config.addresses import list_origins, warn_without_tls
from align.config.annotate import AnnotateConfig
from align.config.command import format_value
from align.config.root import Config
from align.config.settings import replace_values
from align.core.errors import InputError, require
from align.core.files import has_file, parse_user_path, read_text
from align.core.types import StageResult
from align.run import Input, Run, json_digest, resolve, write_json
from align.run.atomic import publish_folder
from align.run.lineage import find_readers
from align.stages.runner import Inputs, open_store

SEEDS = 2**32
"""How many seeds a run can have: the next annotator's begin behind them."""


def inputs(config: Config) -> Inputs:
    stage: AnnotateConfig = config.stage
    label = f"{config.project}-{stage.action}"
    if stage.action == "simulate":
        # What is to be judged is the input, not what has been judged already: a continued run is the same run.
        with open_store(config, create=False) as store:
            items = json_digest([item.id for item in store.items(config.project)])
        return Inputs(config, label, None, {"items": Input(items, project=config.project)})
    read = {"guidelines": stage.guidelines} | ({} if stage.action == "backup" else {"path": stage.path})
    for name, given in read.items():
        there = given is None or has_file(parse_user_path(given, f"stage.{name}"), f"stage.{name}")
        require(there, f"stage.{name}", given, "there is no such file", "Check the path.")
    if stage.action == "export":  # the run reads the project, as a run of stage=reward does: an erasure concerns it
        with open_store(config, create=False) as store:
            head = store.head(config.project)
        return Inputs(config, label, None, {"annotations": Input(head.hash, project=config.project, seq=head.seq)})
    # From here on people have no name: what the run writes down must not say whom it concerned.
    if stage.annotator is not None and stage.action in ("erase", "invite"):
        with open_store(config, create=False) as store:
            accounts = Accounts(store)
            known = accounts.pseudonym if stage.action == "erase" else accounts.handle
            config = replace_values(
                config, stage=replace_values(stage, annotator=known(config.project, stage.annotator))
            )
    # The others look at a store that changes, or change it: asked again, each is done again.
    return Inputs(config, label, None, {"asked": Input(secrets.token_hex(8))})


def run(run: Run, config: Config) -> StageResult:
    return ACTIONS[config.stage.action](run, config)


def run_serve(run: Run, config: Config) -> StageResult:
    from align.annotate.web.access import AccountAuthenticator
    from align.annotate.web.server import application  # Gradio takes seconds to import
    from align.web.key_link import KeyAuthenticator, key_in
    from align.web.server import serve

    stage: AnnotateConfig = config.stage
    url, others = list_origins(stage.host, stage.port, stage.url)
    with open_store(config, create=False) as store, store.alone():
        before = store.head(config.project).seq  # and whether there is such a project
        if stage.demo:
            key = key_in(config.run.folder / "annotate.key")
            person = Person(getuser(), {config.project: "admin"})
            authenticator = KeyAuthenticator(key, person, f"align_key_{stage.port}")
            links = [f"open {url}/?key={key}"]
        else:
            accounts = Accounts(store)
            first = accounts.first_admin(config.project)
            authenticator = AccountAuthenticator(accounts, f"align_session_{stage.port}")
            links = [f"open {url}/?project={quote(config.project)}"]
            if first is not None:
                links.append(f"nobody manages it yet; the first admin, once, within a day: {url}/invite?token={first}")
        links += warn_without_tls(url)
        links.append("Ctrl+C ends it, and what was said stays")
        app = application(store, authenticator, [url, *others])
        serve(app, stage.host, stage.port, lambda: print(*links, sep="\n", flush=True))
        sums = AssignmentQueue(store, config.project).progress("")  # the project's; nobody's own
        added = sum(vote.seq > before for vote in store.rankings(config.project))
        note_head(run, config.project, store.head(config.project))
    metrics = {"rankings": added, "done": sums.done, "wanted": sums.wanted}
    return StageResult(metrics, (f"{added} rankings; all: {sums.done} of {sums.wanted}",))


def run_invite(run: Run, config: Config) -> StageResult:
    stage: AnnotateConfig = config.stage
    with open_store(config, create=False) as store:
        accounts = Accounts(store)
        name = "" if stage.annotator is None else accounts.behind(config.project, stage.annotator)
        token = accounts.invite(config.project, stage.role, name)
    # Printed, and not in the run's folder, which others may read.
    print(f"once, within a week: {list_origins(stage.host, stage.port, stage.url)[0]}/invite?token={token}")
    return StageResult({}, (f"an invitation to project {config.project}, as {stage.role}",))


def run_simulate(run: Run, config: Config) -> StageResult:
    from align.reward.rules import Sentiment  # and torch with it, which serving the pages does without

    stage: AnnotateConfig = config.stage
    with open_store(config, create=False) as store:
        done = [
            simulate(store, config.project, Sentiment(), config.seed + SEEDS * who, stage.agreement)
            for who in range(stage.annotators)
        ]
        note_head(run, config.project, store.head(config.project))
    metrics = {
        "annotators": len(done),
        "items": done[0].items,
        "rankings": sum(d.items for d in done),
        "added": sum(d.added for d in done),
        "pairs": sum(d.pairs for d in done),
        "tie_share": done[0].tie_share,
        "agreement": sum(d.agreement for d in done) / len(done),
        "slope": done[0].slope,
    }
    line = (
        f"{metrics['rankings']} rankings of {metrics['items']} items, {metrics['pairs']} pairs, "
        f"{metrics['tie_share']:.0%} tied; agreement {metrics['agreement']:.3f}"
    )
    return StageResult(metrics, (line,))


def run_import(run: Run, config: Config) -> StageResult:
    path = parse_user_path(config.stage.path, "stage.path")
    with open_store(config) as store:
        rows, added = import_items(store, config.project, path, config.stage.source)
        note_head(run, config.project, store.head(config.project))
    line = f"{rows} rows, {added} of them new in project {config.project}"
    return StageResult({"rows": rows, "added": added}, (line,))


def run_configure(run: Run, config: Config) -> StageResult:
    stage: AnnotateConfig = config.stage
    with open_store(config) as store, store.transaction() as db:
        new = config.project not in store.projects()
        settings = configure(store, config.project, stage.settings, stage.state)
        version = None
        if stage.guidelines:
            field = "stage.guidelines"
            text = read_text(parse_user_path(stage.guidelines, field), field, "Name a Markdown file in UTF-8.")
            version = publish_guidelines(store, config.project, text)
        state = state_of(db, config.project)
    defaults = asdict(Settings())
    changed = {name: value for name, value in asdict(settings).items() if value != defaults[name]}
    if "attributes" in changed:
        changed["attributes"] = list(changed["attributes"])
    typed = f"stage.settings={format_value(changed)}" if changed else "with every setting at its default"
    lines = [f"{'a new project' if new else 'project'} {config.project}: {state}, {typed}"]
    if version is None:
        return StageResult({}, tuple(lines))
    return StageResult({"guidelines": version}, (*lines, f"guidelines, version {version}"))


def run_export(run: Run, config: Config) -> StageResult:
    with open_store(config, create=False) as store:
        shutil.rmtree(run.artifact, ignore_errors=True)  # of an export that was cut off
        with publish_folder(run.artifact) as folder:
            rows = export(store, config.project, folder, config.data.allow_simulated)
        note_head(run, config.project, store.head(config.project))
    return StageResult(rows, tuple(f"{run.artifact / name}: {number} rows" for name, number in rows.items()))


def run_verify(run: Run, config: Config) -> StageResult:
    with open_store(config, create=False) as store:
        store.head(config.project)  # whether there is such a project
        head = store.verify(head_in(config.stage.head, config.run.folder, config.project))
    return StageResult({"rows": head.seq}, (f"{head.seq} rows, each what was written; the head is {head.hash}",))


def run_backup(run: Run, config: Config) -> StageResult:
    path = parse_user_path(config.stage.path, "stage.path")
    with open_store(config, create=False) as store:
        about = backup(store, path)
    line = f"{path}: {about['rows']} rows, the ledger up to row {about['seq']}"
    return StageResult({"rows": about["rows"], "seq": about["seq"]}, (line,))


def run_restore(run: Run, config: Config) -> StageResult:
    with open_store(config) as store:
        head = restore(store, parse_user_path(config.stage.path, "stage.path"))
    return StageResult({"seq": head.seq}, (f"the ledger up to row {head.seq}, each what was written",))


def run_erase(run: Run, config: Config) -> StageResult:
    stage: AnnotateConfig = config.stage
    project = config.project
    with open_store(config, create=False) as store:
        named = {"item": stage.item, "annotator": stage.annotator}
        which = {what: name for what, name in named.items() if name is not None}
        first = store.first_row(project, **which) if which else 0
        used, unread = find_readers(config.run.folder, project, first or 0, store.head().seq + 1)
        if stage.whole:
            tombstone = store.erase_project(project)
        elif stage.item is not None:
            tombstone = store.erase_content(project, stage.item)
        else:
            tombstone = store.erase_annotator(project, stage.annotator or "")
    what = " ".join(*which.items()) if which else f"project {project}"
    lines = [f"{what} is erased; row {tombstone} of the ledger says so"]
    lines += ["runs that read it or filled it, or what was made from it:" if used else "no run read it", *used]
    lines += ["runs that cannot be read, so look yourself:", *unread] if unread else []
    return StageResult({"tombstone": tombstone, "runs": used, "unreadable": unread}, tuple(lines))


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
    "erase": run_erase,
}


def note_head(run: Run, project: str, head: ChainHead) -> None:
    write_json(run.artifact / "ledger.json", {"project": project, "seq": head.seq, "hash": head.hash})


def head_in(ref: str | None, root: Path, project: str) -> ChainHead | None:
    """Return the head of the project's ledger that a run noted when it read the store.

    Raises:
        InputError: no such run, or it did not read the project.
    """
    if ref is None:
        return None
    manifest = resolve(ref, root, field_name="stage.head").manifest
    inputs = manifest.inputs.values() if manifest else ()
    noted = next((read for read in inputs if read.project == project and read.seq >= 0), None)
    if noted is None:
        problem = f"it did not read project {project}"
        raise InputError("stage.head", ref, problem, "Name a run of stage=reward, stage=dpo or stage=kto that did.")
    return ChainHead(noted.seq, noted.digest)
