"""Secrets are planted in every setting that takes one. All stages run, and all files and outputs are searched."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from file_search import read_all_text
from free_ports import pick_free_port
from omegaconf import OmegaConf
from postgres import create_schema
from processes import Forks
from sqlalchemy import create_engine
from stage_commands import Workshop
from waiting import becomes_true

from align.__main__ import STAGES, main
from align.config.compose import build_config, compose_tree
from align.config.compose import format_tree as configuration
from align.config.root import to_plain_dict
from align.config.schemas import import_all_schemas
from align.config.values import find_declared_type, iter_dotted_keys
from align.core.errors import InputError
from align.run import read_manifest

ROOT = Path(__file__).resolve().parents[2]
PLANTED = {
    "store.url": "pl4nted/w1th@sl4sh",  # without the encoding that a URL needs, as people write it
    "ALIGN_STORE_URL": "pl4nted-environment",
    "conf": "pl4nted-group-file",
    "HF_TOKEN": "hf_" + "pL4nTeDhUb" * 4,
    "HUGGING_FACE_HUB_TOKEN": "pl4nted-old-hub-token",
    "WANDB_API_KEY": "91a47ed0" * 5,
    "PGPASSWORD": "pl4nted-libpq",
    "VLLM_API_KEY": "pl4nted-vllm-servers",
    "uncommitted": "pl4nted-uncommitted",
}
SHORT = "rollout.max_new_tokens=8 data.max_length=128 device=cpu"


class UserFolder(NamedTuple):
    """A working folder of a user: a checkout with uncommitted lines, and a group file."""

    folder: Path
    environment: dict[str, str]

    def process(self, *arguments: str, stdin: str = "", **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "align", *arguments],
            cwd=self.folder,
            env=self.environment | more,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=580,
        )

    def find_planted(self, *outputs: str, allowed: tuple[str, ...] = ()) -> list[str]:
        """List the places of planted secrets: files of the runs and of the user's home, outputs, names of files."""
        needles = {n: {v, *re.split("[/@]", v)} - {"pl4nted"} for n, v in PLANTED.items()}
        texts = {f"output {i}": text for i, text in enumerate(outputs)}
        for root in ("runs", "home"):
            texts |= {str(path): "" for path in (self.folder / root).rglob("*")} | read_all_text(self.folder / root)
        return [
            f"{name} in {where}"
            for where, text in texts.items()
            for name, values in needles.items()
            if any(value in text or value in where for value in values) and name not in allowed
        ]


@pytest.fixture
def place(tmp_path: Path) -> UserFolder:
    def git(*words: str) -> None:
        subprocess.run(["git", "-c", "user.name=u", "-c", "user.email=u@h", *words], cwd=tmp_path, check=True)

    home = tmp_path / "home"
    home.mkdir()
    (tmp_path / "settings.env").write_text("A=1\n")
    (tmp_path / ".gitignore").write_text("runs\nhome\nconf\n")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    planted = PLANTED["uncommitted"]
    (tmp_path / "settings.env").write_text(
        f"A=2\nMY_API_KEY={planted}\nurl: postgresql://u:{planted}@h/d\nHF={PLANTED['HF_TOKEN']}\n"
    )
    names = "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "PGPASSWORD", "VLLM_API_KEY"
    keys = {name: PLANTED[name] for name in names}
    quiet = {"WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    folders = {"HOME": str(home), "XDG_CACHE_HOME": str(home / "c"), "XDG_CONFIG_HOME": str(home / "f")}
    return UserFolder(tmp_path, {**os.environ, **keys, **quiet, **folders})


def with_password(url: str, password: str) -> str:
    return url.replace("://align@", f"://align:{password}@")


def write_group_file(place: UserFolder, url: str) -> None:
    """Write the user's group file, which names the store for every line with `track=mine`."""
    (place.folder / "conf" / "track").mkdir(parents=True, exist_ok=True)
    text = f"# @package _global_\ndefaults: [/track/none]\nstore:\n  url: '{url}'\n"
    (place.folder / "conf" / "track" / "mine.yaml").write_text(text)


@pytest.mark.slow
def test_no_file_of_any_stage_holds_a_secret(place: UserFolder, postgres: str, tiny_model: Path, chats: Path):
    """Each stage runs once, some with a tracking service.

    The store's URL comes from the command line, the environment or a group file in turn.
    """
    for service in ("wandb", "mlflow", "trackio"):
        pytest.importorskip(service, reason=f"{service} is not installed: pip install 'align-rlhf[{service}]'")
    schema = create_schema(postgres, "secrets_of_stages")
    store_word = shlex.quote("store.url=" + with_password(schema, "pl4nted%2Fw1th%40sl4sh"))
    write_group_file(place, with_password(schema, PLANTED["conf"]))
    data = f"data=jsonl data.path={chats} data.held_out=0.25 {SHORT}"
    # The tiny model's answers are noise, which the simulated annotator ties, so training needs other answers too.
    items = [{"prompt": f"Was it good, day {i}?", "answers": ["I love it.", "I hate it."]} for i in range(12)]
    (place.folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    sft = "stage.max_steps=2 stage.batch_size=4 stage.micro_batch=4 stage.eval_size=2"
    ppo = "stage.updates=1 stage.batch_size=4 stage.micro_batch=4 stage.normalise_on=8"
    model = f"model=hub model.path={tiny_model}"
    annotate = "stage=annotate stage.action="
    votes = "data=annotations data.allow_simulated=true stage.batch_size=8 stage.held_out=0.3"
    actions = (
        *("import stage.path=items.jsonl", "simulate", "configure stage.state=open"),
        *("export data.allow_simulated=true", "verify", "backup stage.path=backup.gz", "invite"),
    )
    lines = [
        f"stage=data data=jsonl data.path={chats} {store_word}",
        f"stage=sft {model} {data} {sft} track=wandb {store_word}",
        f"stage=full {model} {data} {sft} track=mlflow {store_word}",
        f"stage=sample {data} stage.prompts=24 init=sft:latest model=base track=mine",
        *(f"{annotate}{action} {store_word if i % 2 else ''}" for i, action in enumerate(actions)),
        *(
            f"stage={stage} {votes} {SHORT} {url}"
            for stage, url in (("reward", "track=mine"), ("dpo", store_word), ("kto", store_word))
        ),
        f"stage=ppo {data} {ppo} track=trackio {store_word}",
        f"stage=eval {data} stage.prompts=4 {store_word}",
        f"stage=export {store_word} device=cpu",
        f"stage=verify {model} {SHORT} {store_word}",
        f"stage=serve stage.action=key stage.tenant=acme stage.keys=keys/keys.json {store_word}",
        f"stage=registry stage.format=json {store_word}",
        f"stage=plan {SHORT} {store_word}",
    ]
    assert {line.split()[0].removeprefix("stage=") for line in lines} == set(STAGES)
    environment = {"ALIGN_STORE_URL": with_password(schema, PLANTED["ALIGN_STORE_URL"])}
    process = place.process("-", stdin="\n".join(lines), **environment)
    assert process.returncode == 0, process.stdout + process.stderr
    # A key, a list and a plan are no runs.
    assert len(list(place.folder.glob("runs/*/*/manifest.json"))) == len(lines) - 3
    assert list(place.folder.glob("runs/sft/*/wandb/offline-run-*/*.wandb"))
    assert (place.folder / "runs/mlflow/mlflow.db").is_file()
    assert (place.folder / "runs/trackio/align.db").is_file()
    (token,) = re.findall(r"token=([\w-]+)", process.stdout)  # printed once, and written nowhere
    PLANTED["invitation"] = token
    try:
        assert place.find_planted(process.stdout, process.stderr, allowed=()) == ["invitation in output 0"]
    finally:
        del PLANTED["invitation"]

    # A process of its own, with its arguments on the command line, which wandb and others read.
    command = shlex.split(f"stage=sft {model} {data} {sft} track=wandb run.name=alone {store_word}")
    process = place.process(*command, **environment)
    assert process.returncode == 0, process.stderr
    assert place.find_planted(process.stdout, process.stderr) == []
    manifest = read_manifest(place.folder / "runs/sft/alone")
    assert "A=2" in manifest.git["diff"]
    # The database is part of a run's identity; the password and where it came from are not.
    sample = [*shlex.split(f"stage=sample {data} stage.prompts=4 init=sft:alone run.name=asked"), "project=asked"]
    first = place.process(*sample, **environment)
    assert first.returncode == 0, first.stderr
    for url in (with_password(schema, "another-password"), schema):
        repeated = place.process(*sample, **environment | {"ALIGN_STORE_URL": url})
        assert "finished already" in repeated.stdout, repeated.stderr
    elsewhere = f"store.url={schema.replace('/postgres?', '/template1?')}"
    refused = place.process(*sample, elsewhere)
    assert (refused.returncode, "store.url" in refused.stderr) == (2, True)
    assert "finished already" in place.process(*command[:-1], elsewhere).stdout  # supervised training reads no store


def test_no_failure_tells_a_secret(place: UserFolder, postgres: str, tiny_model: Path, chats: Path):
    """Wrong passwords, unreachable databases, malformed URLs and misplaced secrets are refused without showing one."""
    locked = create_schema(postgres, "secrets_of_failures").replace("align@", "locked:{}@")
    engine = create_engine(postgres)
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("CREATE ROLE locked LOGIN PASSWORD 'right'")
        hba = Path(connection.exec_driver_sql("SHOW hba_file").scalar_one())
        rules = hba.read_text()
        hba.write_text("local all locked scram-sha-256\n" + rules)
        connection.exec_driver_sql("SELECT pg_reload_conf()")
    secret = PLANTED["store.url"]
    with closing(socket.socket()) as idle_socket:
        idle_socket.bind(("127.0.0.1", 0))
        closed = f"127.0.0.1:{idle_socket.getsockname()[1]}"
        urls = [
            locked.format("pl4nted%2Fw1th%40sl4sh"),
            f"postgresql+psycopg://u:{secret}@{closed}/d",
            f"postgresql+psycopg://u:pl4nted%2Fw1th%40sl4sh@{closed}/d",
            f"postgresql+psycopg://{closed}/d?user=u&password={secret}",
            f"postgresql+nodriver://u:{secret}@h/d",
            f"nodialect://u:{secret}@h/d",
            f"postgresql:u:{secret}@h/d",
            f"u:{secret}@h/d",
            f"postgresql://u:{secret}@h:port/d",
            f"sqlite:///nowhere/x.db?password={secret}",
        ]
        secret_url = f"https://{PLANTED['ALIGN_STORE_URL']}:{secret}@h/x.git"
        wrong = [
            *([f"stage={s}", f"store.url={url}", "data=annotations"] for s in ("reward", "dpo", "kto") for url in urls),
            *(["stage=annotate", f"stage.action={a}", f"store.url={u}"] for a in ("verify", "export") for u in urls),
            [
                "stage=sample",
                "init=base",
                "model=hub",
                f"model.path={tiny_model}",
                "data=jsonl",
                f"data.path={chats}",
                f"store.url={urls[0]}",
            ],
            ["stage=sft", f"stor.url={urls[1]}"],
            ["stage=sft", f"store={urls[1]}"],
            [f"stage={urls[1]}"],
            [urls[1]],
            ["stage=sft", "model=hub", f"model.path={secret_url}"],
            ["stage=sft", "data=jsonl", f"data.path={secret_url}"],
            ["stage=ppo", f"init={secret_url}"],
            ["stage=eval", f"artifact={secret_url}"],
            ["stage=ppo", f"reward.ref={secret_url}"],
            ["stage=annotate", f"stage.url={secret_url}"],
            ["stage=annotate", "stage.action=import", f"stage.path={secret_url}"],
            ["stage=export", "export=check", f"export.path={secret_url}"],
            ["stage=sft", f"run.root={secret_url}"],
            ["stage=sft", f"run.name={secret_url}"],
            ["stage=sft", f"seed={secret_url}"],
            ["--cfg", secret_url],
            [f"--{secret_url}"],
        ]
        try:
            for words in wrong:
                outcome = run_in_place(place, words)
                assert outcome.status == 2, (words, outcome)
                assert place.find_planted(outcome.output) == [], (words, outcome.output)
            # Lines of a batch, and an unexpected error, in processes of their own.
            for stdin in (
                shlex.join(wrong[1]),
                f"stage=annotate stage.action=verify store.url={urls[0]}",
                "'" + secret_url,
            ):
                outcome = place.process("-", stdin=stdin)
                assert outcome.returncode == 2, outcome
                assert place.find_planted(outcome.stdout, outcome.stderr) == []
        finally:
            with engine.connect() as connection:
                hba.write_text(rules)
                connection.exec_driver_sql("SELECT pg_reload_conf()")
            engine.dispose()


class Outcome(NamedTuple):
    status: int
    output: str


def run_in_place(place: UserFolder, words: list[str]) -> Outcome:
    """Run one command in this process, in the place's folder."""
    shop = Workshop(place.folder / "runs", place.folder)
    previous_folder = Path.cwd()
    os.chdir(place.folder)
    try:
        root_words = [] if any(w.startswith(("run.root", "--")) for w in words) else [f"run.root={shop.root}"]
        return Outcome(shop.run_command(*words, *root_words), shop.output)
    finally:
        os.chdir(previous_folder)


def test_a_fault_of_ours_tells_no_secret(
    place: UserFolder, tiny_model: Path, chats: Path, monkeypatch: pytest.MonkeyPatch
):
    """Secrets in a library's error are masked in the log's traceback, in the manifest and on the terminal."""
    url = f"postgresql+psycopg://u:{PLANTED['conf']}@h/d"

    def raise_error(*_: Any, **__: Any) -> None:
        raise LookupError(f"cannot connect with password {PLANTED['conf']} and {PLANTED['HF_TOKEN']}")

    monkeypatch.setattr("align.evals.held_out.compute_held_out_loss", raise_error)
    monkeypatch.setenv("HF_TOKEN", PLANTED["HF_TOKEN"])
    words = f"stage=sft model=hub model.path={tiny_model} data=jsonl data.path={chats} data.max_length=128"
    outcome = run_in_place(place, [*words.split(), f"store.url={url}"])
    assert outcome.status == 1
    assert "cannot connect with password ***" in outcome.output
    assert "cannot connect with password ***" in next(place.folder.glob("runs/sft/*/log.txt")).read_text()
    assert place.find_planted(outcome.output) == []
    code = "from align.__main__ import entry; import align.cli.batch; align.cli.batch.run_batch = None; entry()"
    arguments = [sys.executable, "-c", f"import sys; sys.argv = ['align', '-']; {code}"]
    broken = subprocess.run(arguments, capture_output=True, text=True, env=place.environment, cwd=place.folder)
    assert broken.returncode == 1
    assert "TypeError" in broken.stderr


def list_text_keys() -> list[tuple[str, str]]:
    """Return (stage, key) of every setting that takes a text. Settings that stages share are listed once."""
    stage_by_key: dict[str, str] = {}
    for stage in import_all_schemas()["stage"]:
        tree = compose_tree([f"stage={stage}"])
        keys = iter_dotted_keys(OmegaConf.to_container(tree))  # type: ignore[arg-type]
        stage_by_key |= {key: stage for key in keys if find_declared_type(tree, key) is str}
    return [(stage, key) for key, stage in stage_by_key.items()]


def test_no_setting_shows_what_stands_in_a_url():
    """A password in a URL is masked in all that is printed, stored, mirrored and hashed, for every setting."""
    secret = PLANTED["conf"]
    keys = list_text_keys()
    assert {"store.url", "data.path", "model.path", "run.name", "stage.path"} <= {key for _, key in keys}
    for stage, key in keys:
        words = [f"stage={stage}", f"{key}=https://u:{secret}@h/x?token={secret}"]
        if (key.endswith(".name") and key != "run.name") or key == "stage.of":  # keys that a group sets
            with pytest.raises(InputError) as refused:
                compose_tree(words)
            assert secret not in str(refused.value), key
            continue
        raw = compose_tree(words)
        text = configuration(raw)
        assert "https://***@h/x?token=***" in text, key
        try:
            text += repr(to_plain_dict(build_config(raw)))
        except InputError as error:
            text += str(error)
        assert secret not in text, key


@pytest.mark.parametrize("demo", ["true", "false"])
def test_the_pages_of_annotation_write_no_key(place: UserFolder, forks: Forks, demo: str):
    """The demo's key and an invitation are in the addresses that browsers request."""
    (place.folder / "items.jsonl").write_text('{"prompt": "a", "answers": ["b", "c"]}\n')
    assert run_in_place(place, ["stage=annotate", "stage.action=import", "stage.path=items.jsonl"]).status == 0
    port = pick_free_port()
    words = ["stage=annotate", f"stage.demo={demo}", f"stage.port={port}"]
    server = forks.start(place.folder, *words, before=f"import os; os.environ.update({place.environment!r})")
    try:
        assert becomes_true(lambda: "Ctrl+C" in server.printed or server.poll() is not None)
        link, key = next(iter(re.findall(r"(http\S+(?:key|token)=([\w-]+))", server.printed)))
        assert becomes_true(lambda: is_answering(port, link.partition(str(port))[2]) or server.poll() is not None)
        server.send_signal(signal.SIGINT)
        result = server.wait()
    finally:
        if server.poll() is None:
            server.send_signal(signal.SIGKILL)
    assert result.status == 0, result.err
    files = [p for p in (place.folder / "runs/annotate").rglob("*") if p.is_file()]
    assert files
    assert [p for p in files if key.encode() in p.read_bytes()] == []
    assert key not in result.err


def is_answering(port: int, path: str) -> bool:
    """Return whether the server takes connections. If it does, it must serve the page."""
    try:
        with closing(HTTPConnection("127.0.0.1", port, timeout=60)) as browser:
            browser.request("GET", path)
            assert browser.getresponse().status in (200, 303)
    except ConnectionRefusedError:
        return False
    return True


def test_the_command_says_where_a_store_is_by_the_environment(place: UserFolder, monkeypatch: pytest.MonkeyPatch):
    """The configuration is the same either way, and the command line takes precedence."""
    monkeypatch.setenv("ALIGN_STORE_URL", "sqlite:///from-environment.db")
    assert to_plain_dict(build_config(compose_tree(["stage=sft"])))["store"]["url"] == "sqlite:///from-environment.db"
    tree = to_plain_dict(build_config(compose_tree(["stage=sft", "store.url=sqlite:///told.db"])))
    assert tree["store"]["url"] == "sqlite:///told.db"
    monkeypatch.delenv("ALIGN_STORE_URL")
    assert to_plain_dict(build_config(compose_tree(["stage=sft"])))["store"]["url"] is None
    assert main(["stage=sft", "--cfg", "job"]) == 0
