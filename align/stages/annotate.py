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
from align.annotate.store import Head, Settings, configure, publish_guidelines
from align.annotate.store.projects import state_of
from align.annotate.store.queries import known_projects
from align.config.addresses import in_the_clear, origins
from align.config.annotate import AnnotateConfig
from align.config.command import written
from align.config.root import Config
from align.config.settings import changed
from align.core.errors import InputError, require
from align.core.files import has_file, read_text, user_path
from align.core.types import Result
from align.run import Input, Run, json_digest, resolve, write_json
from align.run.atomic import publish
from align.run.lineage import readers_of
from align.stages.rows import open_store
from align.stages.starting import Inputs

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
        there = given is None or has_file(user_path(given, f"stage.{name}"), f"stage.{name}")
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
            config = changed(config, stage=changed(stage, annotator=known(config.project, stage.annotator)))
    # The others look at a store that changes, or change it: asked again, each is done again.
    return Inputs(config, label, None, {"asked": Input(secrets.token_hex(8))})


def run(run: Run, config: Config) -> Result:
    stage: AnnotateConfig = config.stage
    return DO[stage.action](run, config)


def served(run: Run, config: Config) -> Result:
    from align.annotate.web.access import AccountAuthenticator
    from align.annotate.web.queues import AssignmentQueues
    from align.annotate.web.server import application  # Gradio takes seconds to import
    from align.web.key_link import KeyAuthenticator, key_in
    from align.web.listening import serve

    stage: AnnotateConfig = config.stage
    url, others = origins(stage.host, stage.port, stage.url)
    cookie = f"align_{{}}_{stage.port}".format
    with open_store(config, create=False) as store, store.alone():
        before = store.head(config.project).seq  # and whether there is such a project
        queues = AssignmentQueues(store)
        if stage.demo:
            key = key_in(config.run.folder / "annotate.key")
            person = Person(getuser(), {config.project: "admin"})
            authenticator, links = KeyAuthenticator(key, person, cookie("key")), [f"open {url}/?key={key}"]
        else:
            accounts = Accounts(store)
            first = accounts.first_admin(config.project)
            authenticator = AccountAuthenticator(accounts, cookie("session"))
            links = [f"open {url}/?project={quote(config.project)}"]
            if first is not None:
                links.append(f"nobody manages it yet; the first admin, once, within a day: {url}/invite?token={first}")
        links += in_the_clear(url)
        links.append("Ctrl+C ends it, and what was said stays")
        app = application(queues, authenticator, [url, *others])
        serve(app, stage.host, stage.port, lambda: print(*links, sep="\n", flush=True))
        done = AssignmentQueue(store, config.project).progress("")  # the project's sums; nobody's own
        added = sum(vote.seq > before for vote in store.rankings(config.project))
        note_head(run, config.project, store.head(config.project))
    metrics = {"rankings": added, "done": done.done, "wanted": done.wanted}
    return Result(metrics, (f"{added} rankings; all: {done.done} of {done.wanted}",))


def invited(run: Run, config: Config) -> Result:
    stage: AnnotateConfig = config.stage
    with open_store(config, create=False) as store:
        accounts = Accounts(store)
        name = "" if stage.annotator is None else accounts.behind(config.project, stage.annotator)
        token = accounts.invite(config.project, stage.role, name)
    # Printed, and not in the run's folder, which others may read.
    print(f"once, within a week: {origins(stage.host, stage.port, stage.url)[0]}/invite?token={token}")
    return Result({}, (f"an invitation to project {config.project}, as {stage.role}",))


def simulated(run: Run, config: Config) -> Result:
    from align.reward.rules import Sentiment  # and torch with it, which serving the pages does without

    stage: AnnotateConfig = config.stage
    with open_store(config, create=False) as store:
        done = [
            simulate(store, config.project, Sentiment(), config.seed + SEEDS * who, stage.agreement)
            for who in range(stage.annotators)
        ]
        note_head(run, config.project, store.head(config.project))
    metrics = {
        "annotators": len(done), "items": done[0].items, "rankings": sum(d.items for d in done),
        "added": sum(d.added for d in done), "pairs": sum(d.pairs for d in done), "tie_share": done[0].tie_share,
        "agreement": sum(d.agreement for d in done) / len(done), "slope": done[0].slope,
    }  # fmt: skip
    line = (
        f"{metrics['rankings']} rankings of {metrics['items']} items, {metrics['pairs']} pairs, "
        f"{metrics['tie_share']:.0%} tied; agreement {metrics['agreement']:.3f}"
    )
    return Result(metrics, (line,))


def imported(run: Run, config: Config) -> Result:
    path = user_path(config.stage.path, "stage.path")
    with open_store(config) as store:
        found = import_items(store, config.project, path, config.stage.source)
        note_head(run, config.project, store.head(config.project))
    line = f"{found.rows} rows, {found.added} of them new in project {config.project}"
    return Result({"rows": found.rows, "added": found.added}, (line,))


def configured(run: Run, config: Config) -> Result:
    stage: AnnotateConfig = config.stage
    with open_store(config) as store, store.transaction() as db:
        new = config.project not in known_projects(db)
        settings = configure(store, config.project, stage.settings, stage.state)
        version = None
        if stage.guidelines:
            version = publish_guidelines(store, config.project, text_of(stage.guidelines))
        state = state_of(db, config.project)
    made = "a new project" if new else "project"
    lines = (f"{made} {config.project}: {state}, {in_words(settings)}",)
    lines += (f"guidelines, version {version}",) if version else ()
    return Result({"guidelines": version} if version else {}, lines)


def in_words(settings: Settings) -> str:
    """What differs from the defaults, as it is typed."""
    usual = asdict(Settings())
    changed = {name: value for name, value in asdict(settings).items() if value != usual[name]}
    changed = {name: list(value) if isinstance(value, tuple) else value for name, value in changed.items()}
    return f"stage.settings={written(changed)}" if changed else "with every setting at its default"


def text_of(path: str) -> str:
    field = "stage.guidelines"
    return read_text(user_path(path, field), field, "Name a Markdown file in UTF-8.")


def exported(run: Run, config: Config) -> Result:
    with open_store(config, create=False) as store:
        shutil.rmtree(run.artifact, ignore_errors=True)  # of an export that was cut off
        with publish(run.artifact) as folder:
            rows = export(store, config.project, folder, config.data.allow_simulated)
        note_head(run, config.project, store.head(config.project))
    return Result(rows, tuple(f"{run.artifact / name}: {number} rows" for name, number in rows.items()))


def verified(run: Run, config: Config) -> Result:
    with open_store(config, create=False) as store:
        store.head(config.project)  # whether there is such a project
        head = store.verify(head_in(config.stage.head, config.run.folder, config.project))
    return Result({"rows": head.seq}, (f"{head.seq} rows, each what was written; the head is {head.hash}",))


def backed_up(run: Run, config: Config) -> Result:
    path = user_path(config.stage.path, "stage.path")
    with open_store(config, create=False) as store:
        about = backup(store, path)
    line = f"{path}: {about['rows']} rows, the ledger up to row {about['seq']}"
    return Result({"rows": about["rows"], "seq": about["seq"]}, (line,))


def restored(run: Run, config: Config) -> Result:
    with open_store(config) as store:
        head = restore(store, user_path(config.stage.path, "stage.path"))
    return Result({"seq": head.seq}, (f"the ledger up to row {head.seq}, each what was written",))


def erased(run: Run, config: Config) -> Result:
    stage: AnnotateConfig = config.stage
    root = config.run.folder
    with open_store(config, create=False) as store:
        named = {"item": stage.item, "annotator": stage.annotator}
        which = {what: name for what, name in named.items() if name is not None}
        first = store.first_row(config.project, **which) if which else 0
        used, unread = readers_of(root, config.project, first or 0, store.head().seq + 1)
        if stage.whole:
            tombstone = store.erase_project(config.project)
        elif stage.item is not None:
            tombstone = store.erase_content(config.project, stage.item)
        else:
            tombstone = store.erase_annotator(config.project, stage.annotator or "")
    what = " ".join(*which.items()) if which else f"project {config.project}"
    lines = [f"{what} is erased; row {tombstone} of the ledger says so"]
    lines += ["runs that read it or filled it, or what was made from it:" if used else "no run read it", *used]
    lines += ["runs that cannot be read, so look yourself:", *unread] if unread else []
    return Result({"tombstone": tombstone, "runs": used, "unreadable": unread}, tuple(lines))


DO: dict[str, Callable[[Run, Config], Result]] = {
    "serve": served,
    "invite": invited,
    "simulate": simulated,
    "import": imported,
    "configure": configured,
    "export": exported,
    "verify": verified,
    "backup": backed_up,
    "restore": restored,
    "erase": erased,
}


def note_head(run: Run, project: str, head: Head) -> None:
    write_json(run.artifact / "ledger.json", {"project": project, "seq": head.seq, "hash": head.hash})


def head_in(ref: str | None, root: Path, project: str) -> Head | None:
    """The head of the project's ledger that a run noted when it read the store.

    Raises:
        InputError: no such run, or it did not read the project.
    """
    if ref is None:
        return None
    manifest = resolve(ref, root, field_name="stage.head").manifest
    inputs = manifest.inputs.values() if manifest else ()
    found = next((read for read in inputs if read.project == project and read.seq >= 0), None)
    if found is None:
        problem = f"it did not read project {project}"
        raise InputError("stage.head", ref, problem, "Name a run of stage=reward, stage=dpo or stage=kto that did.")
    return Head(found.seq, found.digest)
