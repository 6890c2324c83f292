"""`stage=annotate` from the command line: import, export, backup, and the runs that an erasure lists."""

from __future__ import annotations

import json
import random
import re
import shlex
import shutil
import sqlite3
from dataclasses import replace
from pathlib import Path
from secrets import token_hex

import pytest
from stage_commands import EVERY_RUN, Workshop, list_file_names
from starlette.testclient import TestClient

from align.annotate.accounts import Accounts
from align.annotate.store import Candidate, Judgement, Store
from align.config.addresses import build_server_urls
from align.config.annotate import AnnotateConfig
from align.core.types import Conversation, Message
from align.data.training_overlap import read_trained_rows
from align.run import Input, read_manifest
from align.run.manifest import write_manifest
from align.web.key_link import load_or_create_key

ITEMS = [{"id": str(i), "prompt": f"q {i}", "answers": ["wonderful", "awful", "a table"]} for i in range(6)]


@pytest.fixture
def shop(tmp_path: Path) -> Workshop:
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
    return Workshop(tmp_path / "runs", tmp_path / "none", "project=p")


def open_store(shop: Workshop) -> Store:
    return Store.open(f"sqlite:///{shop.root / 'annotations.db'}", create_if_missing=False)


def run_action(shop: Workshop, action: str, *arguments: str) -> Path:
    return shop.run("annotate", f"stage.action={action}", *arguments)


def test_from_a_file_to_pairs_to_a_backup_and_back(shop: Workshop, tmp_path: Path) -> None:
    folder = run_action(shop, "import", f"stage.path={tmp_path / 'items.jsonl'}")
    assert list_file_names(folder) >= EVERY_RUN
    assert read_manifest(folder).metrics == {"rows": 6, "added": 6}
    guide = tmp_path / "guide.md"
    guide.write_text("# Be fair")
    run_action(shop, "configure", "stage.settings={overlap: 2}", "stage.state=paused", f"stage.guidelines={guide}")
    assert "project p: paused, stage.settings={overlap: 2}\n" in shop.output
    assert "version 1" in shop.output
    run_action(shop, "simulate")
    shop.refuses("stage=annotate", "stage.action=export", says="data.allow_simulated=true")
    pairs = run_action(shop, "export", "data.allow_simulated=true") / "artifact" / "preferences.jsonl"
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    assert len(rows) == 18
    assert {row["source"] for row in rows} == {"simulated"}
    no_folder = ("stage=annotate", "stage.action=backup", "stage.path=no/such/folder/b.gz")
    shop.refuses(*no_folder, says="no/such/folder")
    backup = tmp_path / "b.jsonl.gz"
    other_store = f"store.url=sqlite:///{tmp_path / 'other.db'}"
    run_action(shop, "backup", f"stage.path={backup}")
    run_action(shop, "restore", f"stage.path={backup}", other_store)
    run_action(shop, "verify")
    head_line = shop.output.splitlines()[-2]
    run_action(shop, "verify", other_store)
    assert shop.output.splitlines()[-2] == head_line


def test_simulated_annotators_have_their_own_rewards_and_noise(shop: Workshop, tmp_path: Path) -> None:
    run_action(shop, "import", f"stage.path={tmp_path / 'items.jsonl'}")
    longest = "{agreement: 0.95, position_bias: 0.5, reward: {name: rules, rules: [{rule: length, low: 2, high: 9}]}}"
    folder = run_action(
        shop,
        "simulate",
        f"stage.annotators=[{longest}, {{agreement: 0.6}}]",
        "reward=rules",
        "reward.rules=[{rule: regex, pattern: awful}]",
    )
    assert read_manifest(folder).metrics["rankings"] == 12
    with open_store(shop) as store:
        scorers = {vote.scorer for vote in store.rankings("p")}
    assert len(scorers) == 2, scorers
    rules = ("reward=rules", "reward.rules=[{rule: regex, pattern: table}]")
    other = run_action(shop, "simulate", f"stage.annotators=[{longest}, {{agreement: 0.6}}]", *rules)
    assert other != folder
    assert read_manifest(other).metrics["added"] == 6  # by the annotator with the other reward
    assert read_manifest(folder).config["stage"]["annotators"][0]["position_bias"] == 0.5


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("stage.annotators=0", "stage.annotators=0"),
        ("stage.annotators=[]", "stage.annotators"),
        ("stage.annotators=[{agreement: 0.4}]", "stage.annotators[0].agreement"),
        ("stage.annotators=[{bias: 1}]", "stage.annotators[0].bias"),
        ("stage.annotators=[{position_bias: much}]", "stage.annotators[0].position_bias"),
        ("stage.annotators=[{agreement: [0.8]}]", "stage.annotators[0].agreement"),
        ("stage.annotators=[{}, {reward: {name: taste}}]", "stage.annotators[1].reward.name"),
        ("stage.annotators=[{reward: sentiment}]", "stage.annotators[0].reward"),
        ("stage.annotators=[{reward: {name: ensemble, refs: [a, b]}}]", "stage.annotators[0].name"),
    ],
)
def test_a_simulated_annotator_with_wrong_settings_is_refused(
    shop: Workshop, tmp_path: Path, setting: str, says: str
) -> None:
    run_action(shop, "import", f"stage.path={tmp_path / 'items.jsonl'}")
    shop.refuses("stage=annotate", "stage.action=simulate", setting, says=says)


def test_settings_are_printed_as_they_are_typed(shop: Workshop, tmp_path: Path) -> None:
    run_action(shop, "import", f"stage.path={tmp_path / 'items.jsonl'}")
    run_action(shop, "configure", "stage.state=open")
    assert "project p: open, with every setting at its default\n" in shop.output
    settings = (
        r"stage.settings={title: 'It\'s, here', attributes: [helpful, 'to the point'], "
        "overlap_share: 0.25, quota: 12, blurred: true}"
    )
    run_action(shop, "configure", settings)
    assert f"project p: open, {settings}\n" in shop.output
    run_action(shop, "configure", "stage.settings={attributes: [], quota: 0, blurred: false, overlap_share: 1}")
    assert r"project p: open, stage.settings={title: 'It\'s, here'}" in shop.output


def test_a_key_that_a_crash_cut_short_is_made_anew(tmp_path: Path) -> None:
    first = load_or_create_key(tmp_path / "annotate.key")
    assert load_or_create_key(tmp_path / "annotate.key") == first
    assert len(first) >= 32
    (tmp_path / "annotate.key").write_text("")
    assert len(load_or_create_key(tmp_path / "annotate.key")) >= 32
    assert (tmp_path / "annotate.key").stat().st_mode & 0o777 == 0o600


def test_the_same_command_again_is_done_again(shop: Workshop, tmp_path: Path) -> None:
    run_action(shop, "import", f"stage.path={tmp_path / 'items.jsonl'}")
    first = run_action(shop, "verify")
    assert run_action(shop, "verify") != first
    with sqlite3.connect(shop.root / "annotations.db") as connection:
        connection.execute("UPDATE candidates SET text = 'forged' WHERE text = 'awful'")
    connection.close()
    shop.refuses("stage=annotate", "stage.action=verify", says="ledger.seq=1: the contents of item")


def test_a_cut_tail_shows_against_the_run_that_read_it_and_an_erasure_is_none(
    shop: Workshop, tmp_path: Path, chats: Path, tiny_model
) -> None:
    model = Workshop(shop.root, chats, "project=p")
    model.run("sft", "model=hub", f"model.path={tiny_model}", "data.template=chatml", "stage.max_steps=2")
    run_action(shop, "import", f"stage.path={tmp_path / 'items.jsonl'}")
    run_action(shop, "simulate")
    train = ("data=annotations", "data.allow_simulated=true", "stage.held_out=0.3", "stage.batch_size=8")
    reward = model.run("reward", *train)
    run_action(shop, "verify", f"stage.head={reward}")
    cut_path = tmp_path / "cut.db"
    shutil.copy(shop.root / "annotations.db", cut_path)
    with open_store(shop) as store:
        last = store.head().seq
        item = store.rankings("p")[0].item
    with sqlite3.connect(cut_path) as connection:
        connection.execute("DROP TRIGGER ledger_no_delete")
        connection.execute(f"DELETE FROM ledger WHERE seq = {last}")
    connection.close()
    url = f"store.url=sqlite:///{cut_path}"
    run_action(shop, "verify", url)
    shop.refuses(
        "stage=annotate",
        "stage.action=verify",
        f"stage.head={reward}",
        url,
        says=f"ledger.seq={last}: the ledger's tail is cut",
    )

    store_url = f"sqlite:///{shop.root / 'annotations.db'}"
    trained_rows = read_trained_rows(read_manifest(reward), store_url)
    run_action(shop, "quarantine", "stage.annotator=simulated/vader/0.75/0")
    # An evaluation compares its questions with the rows that the run read, and not with those that it would read now.
    assert read_trained_rows(read_manifest(reward), store_url) == trained_rows
    training = ("stage=reward", "data.allow_simulated=true")
    shop.refuses(*training, says="none of its rankings counts")
    run_action(shop, "release", "stage.annotator=simulated/vader/0.75/0")
    run_action(shop, "erase", f"stage.item={item}")
    assert f"reward/{reward.name}" in shop.output
    run_action(shop, "erase", "stage.annotator=simulated/vader/0.75/0")
    assert f"reward/{reward.name}" in shop.output
    shop.status("stage=annotate", "stage.action=erase", "stage.annotator=simulated/vader/0.75/0")
    assert "knows no such annotator" in shop.output
    folders = [folder for act in ("erase", "quarantine", "release") for folder in shop.root.glob(f"annotate/*{act}*")]
    assert len(folders) == 4
    for folder in folders:  # no run folder names the annotator
        texts = {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}
        manifest = json.loads(texts.pop("manifest.json"))
        del manifest["git"]  # its diff quotes this test while the test is being edited
        assert "simulated/vader" not in json.dumps([texts, manifest])
    run_action(shop, "verify", "stage.head=reward:latest")  # an erasure is not reported as tampering


def test_assess_prints_names_and_alarms_and_writes_pseudonyms(shop: Workshop) -> None:
    shop.root.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    with Store.open(f"sqlite:///{shop.root / 'annotations.db'}") as store, store.transaction():
        for i in range(60):
            answers = [Candidate(f"answer {k} of {i}") for k in range(3)]
            item = store.add_item("p", str(i), Conversation((Message("user", f"q {i}"),)), answers)
            ids = [f"{item}-{k}" for k in range(3)]
            for name in ("ann", "bea", "leo"):
                order = draw.sample(ids, 3)
                tiers = tuple((id,) for id in (order if name == "leo" else ids))
                store.record("p", item, Judgement(tiers, display_order=tuple(order)), annotator=name, key=f"{name}{i}")
        leo = store.pseudonym("p", "leo")
    folder = run_action(shop, "assess")
    assert re.search(r"^leo +60 .*prefers one side of the screen .what comes first, ", shop.output, re.MULTILINE)
    assert re.search(r"^ann +60 .*none$", shop.output, re.MULTILINE)
    (command,) = re.findall(r"^To leave out leo: python -m align (.*)$", shop.output, re.MULTILINE)
    assert shlex.split(command)[:4] == [
        "stage=annotate",
        "project=p",
        "stage.action=quarantine",
        f"stage.annotator={leo}",
    ]
    assert shlex.split(command)[4:] == [f"run.root={shop.root}"]
    assert read_manifest(folder).metrics == {"annotators": 3, "alarms": {leo: ["side"]}}
    rows = json.loads((folder / "artifact" / "annotators.json").read_text())
    assert {row["pseudonym"] for row in rows if row["alarms"]} == {leo}
    for path in folder.rglob("*"):
        if path.is_file() and path.name != "manifest.json":  # whose diff quotes this test
            assert "leo" not in path.read_text(errors="replace")
    run_action(shop, "quarantine", f"stage.annotator={leo}")
    run_action(shop, "assess")
    assert "2 annotators, 0 with alarms" in shop.output


def test_an_erasure_lists_what_was_made_from_it_and_nothing_else(shop: Workshop, tmp_path: Path) -> None:
    run_action(shop, "import", f"stage.path={tmp_path / 'items.jsonl'}")
    simulated = read_manifest(run_action(shop, "simulate"))
    with open_store(shop) as store:
        item = store.rankings("p")[0].item
        head = store.head().seq

    def write_run(stage: str, name: str, **inputs: dict) -> None:
        folder = shop.root / stage / name
        folder.mkdir(parents=True)
        manifest = replace(simulated, stage=stage, name=name, inputs={k: Input(**v) for k, v in inputs.items()})
        write_manifest(folder, manifest)

    write_run("reward", "mine", data={"project": "p", "seq": head, "digest": "d"})
    write_run("reward", "others", data={"project": "q", "seq": head, "digest": "d"})
    write_run("reward", "before", data={"project": "p", "seq": 0, "digest": "d"})
    write_run("ppo", "mine", reward={"stage": "reward", "name": "mine", "digest": "d"})
    write_run("ppo", "others", reward={"stage": "reward", "name": "others", "digest": "d"})
    write_run("export", "mine", artifact={"stage": "ppo", "name": "mine", "digest": "d"})
    exported = run_action(shop, "export", "data.allow_simulated=true")
    pairs = read_manifest(exported).outputs["artifact/preferences.jsonl"]
    write_run("dpo", "from-file", data={"path": "a-copy.jsonl", "digest": pairs})
    unreadable = shop.root / "ppo" / "strange"
    unreadable.mkdir()
    (unreadable / "manifest.json").write_text("{}")
    folder = run_action(shop, "erase", f"stage.item={item}")
    metrics = read_manifest(folder).metrics
    export_ref = f"annotate/{exported.name}"
    assert metrics["runs"] == [export_ref, "reward/mine", "dpo/from-file", "ppo/mine", "export/mine"]
    assert metrics["unreadable"] == [str(unreadable / "manifest.json")]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ({"url": "https://Annotate.Example.org:443"}, "https://annotate.example.org"),
        ({"url": "http://127.0.0.1:80"}, "http://127.0.0.1"),
        ({"url": "https://a.example:8443"}, "https://a.example:8443"),
        ({"host": "::1", "port": 7000}, "http://[::1]:7000"),
        ({}, "http://127.0.0.1:7861"),
    ],
)
def test_the_address_is_as_browsers_write_it(words: dict, expected: str) -> None:
    stage = AnnotateConfig(**words)
    assert build_server_urls(stage.host, stage.port, stage.url)[0] == expected


def test_an_invitation_names_nobody_in_the_runs_folder(shop: Workshop, tmp_path: Path) -> None:
    run_action(shop, "import", f"stage.path={tmp_path / 'items.jsonl'}")
    name = f"{token_hex(8)}@example.org"
    folder = run_action(shop, "invite", "stage.role=admin")
    token = shop.output.split("/invite?token=")[1].split()[0]
    with open_store(shop) as store:
        Accounts(store).accept(token, name, "correct horse battery")
    second = run_action(shop, "invite", f"stage.annotator={name.upper()}")
    assert "/invite?token=" in shop.output
    erasure = run_action(shop, "erase", f"stage.annotator={name}")
    with open_store(shop) as store:
        assert Accounts(store).list_members("p") == {}
        store.verify()
    for path in (path for run in (folder, second, erasure) for path in run.rglob("*") if path.is_file()):
        text = path.read_text(errors="replace").lower()
        assert [secret for secret in (name, token.lower()) if secret in text] == [], path
    assert (shop.root / "annotations.db").stat().st_mode & 0o777 == 0o600


def test_the_first_admins_link_is_printed_and_lets_them_in(shop: Workshop, tmp_path: Path, monkeypatch) -> None:
    run_action(shop, "import", f"stage.path={tmp_path / 'items.jsonl'}")
    statuses = []

    def serve_once(app, host, port, on_start) -> None:
        on_start()
        client = TestClient(app, base_url="http://127.0.0.1:7861", follow_redirects=False)
        statuses.append(client.get("/login").status_code)

    monkeypatch.setattr("align.web.server.serve_app", serve_once)
    run_action(shop, "serve")
    assert statuses == [200]
    assert "/?project=p" in shop.output
    token = shop.output.split("/invite?token=")[1].split()[0]
    with open_store(shop) as store:
        Accounts(store).accept(token, "root", "correct horse battery")
        assert Accounts(store).list_members("p") == {"root": "admin"}
    run_action(shop, "serve", "stage.url=http://192.168.1.5:7861", "stage.host=0.0.0.0")
    assert "/invite" not in shop.output
    assert "in the clear" in shop.output
