"""Forgetting an item, annotator, row or source everywhere: no file of the runs keeps it, and runs that learned from it
are marked stale."""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import shutil
import signal
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from data_sets import build_data_set
from json_lines import write_rows
from sqlalchemy import select
from stage_commands import Workshop, run_in_fork
from synthetic_runs import build_run_input, find_record, query_records, write_run_folder
from vote_data import SECRET, build_data_command, find_secret_ids, open_filled_store, read_artifact_pairs

from align.__main__ import main
from align.annotate.store import Candidate, Store
from align.annotate.store.tables import annotators
from align.core.types import Conversation, Message
from align.rollout.answer_cache import FILE as ANSWERS
from align.rollout.answer_cache import AnswerKey, AnswerStore, CachedAnswer
from align.run import resolve
from align.run.manifest import read_manifest
from align.run.stale import read_stale_mark

ANN = "ann@example.org"
PAGE_OF_OTHERS = "<html><p>Ottilie Gr&#252;nberg lives at the old mill</p></html>"


def run_forget(root: Path, *arguments: str, status: int = 0) -> str:
    shop = Workshop(root, root)
    command = ["stage=registry", "stage.action=forget", "project=greetings", f"run.root={root}", *arguments]
    assert shop.run_command(*command) == status, shop.output
    return shop.output


def find_files_with(root: Path, *needles: str) -> list[str]:
    """Return every file below a folder that holds a text in any form, weights and databases included."""
    paths = []
    for path in root.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            if path.name == "manifest.json":  # its git diff may have these lines
                data = json.dumps(json.loads(data) | {"git": None}, ensure_ascii=False).encode()
            if path.suffix == ".parquet":
                data += str(pq.read_table(path).to_pylist()).encode()
            forms = [form for text in needles for form in (text, json.dumps(text)[1:-1], text.replace("ü", "&#252;"))]
            if any(form.encode() in data for form in forms):
                paths.append(str(path.relative_to(root)))
    return sorted(paths)


def write_sampled_run(root: Path) -> None:
    """Write a run that filled the project, and an old page that shows its samples."""
    folder = write_run_folder(root, "sample:answers", {"init": "sft:start"}, digest="")
    lines = [
        {
            "step": 1,
            "prompt": [{"role": "user", "content": f"What of day {i}?"}],
            "answer": SECRET if i == 4 else f"no {i}",
        }
        for i in range(8)
    ]
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (folder / "log.txt").write_text(f"began\n  What of day 4? → {SECRET}\nended\n", encoding="utf-8")
    (folder / "report.html").write_text(PAGE_OF_OTHERS, encoding="utf-8")
    (folder / "other.html").write_text(PAGE_OF_OTHERS, encoding="utf-8")


@pytest.fixture(scope="module")
def loop(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A folder with votes, a data set of them, two reward models, an export of the votes, and manifests of runs made
    from these."""
    folder = tmp_path_factory.mktemp("loop")
    root = folder / "runs"
    root.mkdir()
    url = f"sqlite:///{root / 'annotations.db'}"
    with open_filled_store(url):
        pass
    build_data_set(folder, *build_data_command(folder, url), "run.name=old")
    shop = Workshop(root, root)
    reward = [
        "stage=reward",
        "init=base",
        "model=hub",
        f"model.path={tiny_model}",
        "method=lora",
        "device=cpu",
        "stage.epochs=1",
        "stage.batch_size=64",
        f"run.root={root}",
        "project=greetings",
    ]
    for command in (
        [*reward, "data=manifest", "data.path=data:old", "run.name=saw"],
        [*reward, "data=annotations", "run.name=direct"],
        ["stage=annotate", "stage.action=export", "project=greetings", f"run.root={root}", "run.name=votes"],
    ):
        assert shop.run_command(*command) == 0, shop.output
    write_run_folder(root, "sft:start")
    write_sampled_run(root)
    digest = read_manifest(root / "reward" / "saw").digest
    write_run_folder(root, "ppo:p", {"init": "sft:start", "reward": build_run_input(root, "reward:saw", digest)}, day=3)
    write_run_folder(root, "eval:e", {"artifact": "ppo:p"}, day=4)
    write_run_folder(root, "ppo:other", {"init": "sft:start"}, day=5)
    return root


@pytest.fixture
def runs(loop: Path, tmp_path: Path) -> Path:
    """A copy of `loop`."""
    return Path(shutil.copytree(loop, tmp_path / "runs"))


def find_item(root: Path) -> str:
    with Store.open(f"sqlite:///{root / 'annotations.db'}") as store:
        return next(item.id for item in store.items("greetings") if any(c.text == SECRET for c in item.candidates))


def read_files(root: Path) -> dict[str, bytes]:
    return {
        str(path): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and ".registry" not in path.name and not path.name.startswith("annotations.db")
    }


def list_stale_runs(root: Path) -> set[str]:
    return {record["run"] for record in query_records(root, stale="!=null")}


def test_an_item_is_forgotten_everywhere(runs: Path) -> None:
    item = find_item(runs)
    [row] = {*find_secret_ids(runs / "data" / "old")}
    assert len(find_files_with(runs, SECRET)) > 8
    other_files = [runs / name for name in ("mine.txt", "compare/x.jsonl", "sample/half/samples.jsonl")]
    for path in other_files:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"said": SECRET}, ensure_ascii=False) + "\n")
    cache_key = AnswerKey("b", "", "lora", "float32", "t", (1, 2), 8, 1.0, (2,), 0, "hf")
    AnswerStore(runs / ANSWERS).add([(cache_key, CachedAnswer((5, 2), SECRET, True))])
    assert ANSWERS in find_files_with(runs, SECRET)
    before = read_files(runs)
    stdout = run_forget(runs, f"stage.item={item}")
    assert read_files(runs) == before  # the plan was printed, and nothing changed
    lines = stdout.splitlines()
    assert "store, project greetings: 1 item, 2 answers, 1 judgement" in lines
    assert [line for line in lines if "contains it too" in line] == [
        f"note: {name} contains it too, and is not changed"
        for name in ("mine.txt", "compare/x.jsonl", "sample/half/samples.jsonl")
    ]
    order = [line.split(": ")[0] for line in lines if line.startswith(("reward:", "ppo:", "eval:", "data:old: held"))]
    assert order.index("data:old") < order.index("reward:saw") < order.index("ppo:p") < order.index("eval:e")
    assert "ppo:other" not in stdout

    for path in other_files:  # the operator has to delete these
        path.unlink()
    stdout = run_forget(runs, f"stage.item={item}", "stage.apply=true", "stage.who=the operator")
    assert "data:old: 1 row forgotten; data:old-2 takes its place" in stdout
    assert find_files_with(runs, SECRET, "Ottilie Gr") == []
    assert find_files_with(runs / "data", row) == []
    assert list_stale_runs(runs) == {"data:old", "reward:saw", "reward:direct", "annotate:votes", "ppo:p", "eval:e"}
    mark = read_stale_mark(runs / "ppo" / "p")
    assert mark is not None
    assert mark.because == "made from reward:saw"
    assert find_record(runs, "ppo:p")["stale"] == mark.since
    samples = (runs / "sample" / "answers" / "samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["answer"] for line in samples] == [f"no {i}" for i in range(8) if i != 4]
    assert (runs / "sample" / "answers" / "log.txt").read_text() == "began\nended\n"
    assert not (runs / "sample" / "answers" / "other.html").exists()
    # The files are those of the manifests.
    for ref in (
        "reward:saw",
        "reward:direct",
        "annotate:votes",
        "data:old-2",
    ):
        assert resolve(ref, runs)
    with Store.open(f"sqlite:///{runs / 'annotations.db'}") as store:
        assert store.verify()
    [receipt] = (runs / "forgotten").glob("*.json")
    receipt_fields = json.loads(receipt.read_text())
    assert receipt_fields["kind"] == "item"
    assert receipt_fields["who"] == "the operator"
    assert receipt_fields["ended"]
    assert not {"salt", "check"} & receipt_fields.keys()
    assert receipt_fields["store"]["item"] == 1
    assert receipt_fields["data"]["data:old"]["rows"] == 1
    assert receipt_fields["data"]["data:old"]["root"] == read_manifest(runs / "data" / "old-2").metrics["root"]
    for text in (item, row, SECRET, ANN, "What of day"):
        assert text not in receipt.read_text()

    assert "nothing was left to erase" in run_forget(runs, f"stage.item={item}", "stage.apply=true")
    commands = [read_rerun_command(runs / "reward" / name) for name in ("saw", "direct")]
    for command in commands:
        assert main(shlex.split(command)[3:]) == 0
    assert "data:old-2" in commands[0]
    assert not list_stale_runs(runs) & {"reward:saw-2", "reward:direct-2"}
    assert find_files_with(runs, SECRET) == []
    assert "nothing was left to erase" in run_forget(runs, f"stage.item={item}", "stage.apply=true")
    assert not list_stale_runs(runs) & {"data:old-2", "reward:saw-2", "reward:direct-2"}  # these never had the item


def read_rerun_command(folder: Path) -> str:
    """Return the command that runs a stale run again."""
    mark = read_stale_mark(folder)
    assert mark is not None
    return mark.again


def test_an_annotator_is_forgotten_with_their_votes(runs: Path) -> None:
    url = f"sqlite:///{runs / 'annotations.db'}"
    with Store.open(url) as store:
        pseudonym = store.pseudonym("greetings", ANN)
        assert sum(vote.annotator == pseudonym for vote in store.rankings("greetings")) == 30
    plan = json.loads(run_forget(runs, f"stage.annotator={pseudonym}", "stage.format=json"))
    assert plan["store"] == {"project": "greetings", "name": 1, "judgement": 30, "remark": 0}
    assert plan["data"] == {"data:old": 60}
    assert plan["done"] is None
    stdout = run_forget(runs, f"stage.annotator={ANN}", "stage.apply=true")
    assert "1 name, 30 judgements; erased" in stdout
    assert find_files_with(runs, ANN) == []
    with Store.open(url) as store:
        assert store.verify()
        assert {vote.annotator for vote in store.rankings("greetings")} == {store.pseudonym("greetings", "bob")}
    assert {row["annotator"] for row in read_artifact_pairs(runs / "data" / "old-2")} == {
        read_pseudonym(url, "bob"),
        "",
    }
    assert {"reward:saw", "reward:direct", "ppo:p"} <= list_stale_runs(runs)
    assert "has no such annotator" in run_forget(runs, f"stage.annotator={ANN}", status=2)
    assert "nothing is left" in run_forget(runs, f"stage.annotator={pseudonym}", "stage.apply=true")


def read_pseudonym(url: str, name: str) -> str:
    with Store.open(url) as store:
        return store.pseudonym("greetings", name)


def test_a_simulated_annotator_is_forgotten_with_their_identity(loop: Path, tmp_path: Path) -> None:
    """A simulated annotator is forgotten as a person is: no ledger, export, run folder, log or page keeps the name."""
    root = tmp_path / "runs"
    shutil.copytree(loop, root)
    shop = Workshop(root, root)
    annotate = ["stage=annotate", "project=greetings", f"run.root={root}"]
    export = ["stage.action=export", "data.allow_simulated=true", "run.name=simulated-votes"]
    for arguments in (["stage.action=simulate", "stage.annotators=2", "run.name=stand-ins"], export):
        assert shop.run_command(*annotate, *arguments) == 0, shop.output
    with Store.open(f"sqlite:///{root / 'annotations.db'}") as store:
        identities = [name for name in list_identities(store) if name.startswith("simulated/")]
    assert len(identities) == 2, identities
    for path in ("annotate/stand-ins/log.txt", "annotate/simulated-votes/log.txt"):
        with (root / path).open("a") as log:
            log.write("".join(f"ranked by {name} today\n" for name in identities))
    assert "annotations.db" in find_files_with(root, identities[0])
    stdout = run_forget(root, f"stage.annotator={identities[0]}", "stage.apply=true")
    assert "1 name" in stdout, stdout
    assert find_files_with(root, identities[0]) == []
    assert "annotations.db" in find_files_with(root, identities[1])
    with Store.open(f"sqlite:///{root / 'annotations.db'}") as store:
        store.verify()


def list_identities(store: Store) -> list[str]:
    with store.reading() as connection:
        return sorted(connection.execute(select(annotators.c.identity)).scalars())


def test_rows_and_sources(runs: Path) -> None:
    """A row is forgotten by its content id, and all rows by their source."""
    ids = {row["source"]: row["content_id"] for row in read_artifact_pairs(runs / "data" / "old")}
    stdout = run_forget(runs, f"stage.content_id={ids['file']}")
    assert "data:old: 1 row; data:old-2 takes its place" in stdout
    assert "reward:direct" not in stdout
    assert "remove the rows from these files" not in stdout  # a new data set replaces the one that they read
    assert "ppo:p: made from reward:saw" in stdout
    stdout = run_forget(runs, f"stage.content_id={ids['greetings']}")
    assert "store, project greetings: 1 item" in stdout
    assert "reward:direct: trained on what is forgotten" in stdout
    assert "Did you mean file" in run_forget(runs, "stage.source=files", status=2)
    with Store.open(f"sqlite:///{runs / 'annotations.db'}") as store:
        prompt = Conversation((Message("user", "file 7? Nobody else asks so."),))
        store.add_item("greetings", "copied", prompt, [Candidate("a"), Candidate("b")])
    write_rows(
        runs / "again.jsonl", [{"prompt": "file 7? Nobody else asks so.", "chosen": "yes, so", "rejected": "no, so"}]
    )
    command = ["stage=data", f"stage.sources=[{{path: {runs / 'again.jsonl'}, name: file}}]", f"run.root={runs}"]
    assert main([*command, "run.name=again", "data.held_out=0"]) == 0
    stdout = run_forget(runs, "stage.source=file")
    assert "project greetings has the same texts, and keeps them: stage.item=" in stdout
    shutil.rmtree(runs / "data" / "again")
    stdout = run_forget(runs, "stage.source=file", "stage.apply=true")
    assert "40 rows forgotten" in stdout
    assert {row["source"] for row in read_artifact_pairs(runs / "data" / "old-2")} == {"greetings"}
    assert list_stale_runs(runs) == {"data:old", "reward:saw", "ppo:p", "eval:e"}
    write_run_folder(runs, "sft:old", day=1)  # by a version that kept no ids
    assert "sft:old: may have read what is forgotten" in run_forget(runs, f"stage.content_id={ids['file']}")


def test_what_cannot_be_named(runs: Path) -> None:
    for arguments, says in {
        (): "names nothing to forget",
        ("stage.item=x", "stage.source=y"): "and so does stage.source",
        ("stage.item=x",): "has no such item",
        ("stage.content_id=12",): "is no content id",
        (f"stage.content_id={'0' * 64}",): "it was found neither in a run under",
        ("stage.source=''",): "names nothing",
    }.items():
        assert says in run_forget(runs, *arguments, "stage.apply=true", status=2)
    assert list_stale_runs(runs) == set()


def test_two_at_once_and_a_run_at_work(runs: Path) -> None:
    item = find_item(runs)
    (runs / "forgotten").mkdir()
    for folder, says in (
        (runs / "forgotten", "another stage.action=forget is running"),
        (runs / "annotate" / "votes", "works in it"),
    ):
        descriptor = os.open(folder, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        assert says in run_forget(runs, f"stage.item={item}", "stage.apply=true", status=2)
        os.close(descriptor)
    assert find_files_with(runs, SECRET)
    run_forget(runs, f"stage.item={item}", "stage.apply=true")
    assert len([*(runs / "forgotten").glob("*.json")]) == 1  # the second one went on with the receipt of the first
    assert find_files_with(runs, SECRET) == []


def test_a_folder_that_cannot_be_written_is_still_told_about(runs: Path) -> None:
    item = find_item(runs)
    if os.geteuid() == 0:
        (runs / "forgotten").write_text("in the way")
    else:
        runs.chmod(0o555)
    assert "reward:saw" in run_forget(runs, f"stage.item={item}")
    assert "cannot be written" in run_forget(runs, f"stage.item={item}", "stage.apply=true", status=2)
    runs.chmod(0o755)
    assert list_stale_runs(runs) == set()


@pytest.mark.parametrize("selector", ["item", "annotator"])
def test_killed_at_any_step_the_same_command_ends_it(loop: Path, tmp_path: Path, selector: str) -> None:
    """The command is killed before each replacement of a file and each commit, one after the other."""
    value = find_item(loop) if selector == "item" else ANN
    kills = 0
    for step in range(0, 60, 4):
        root = Path(shutil.copytree(loop, tmp_path / f"runs{step}"))
        shutil.rmtree(root / "data")  # `test_data_forget` kills the command of data sets
        shutil.rmtree(root / "reward" / "saw")
        arguments = [f"stage.{selector}={value}", "stage.apply=true"]
        status = run_until_killed(root, arguments, step)
        if status == 0:
            break
        assert status == -signal.SIGKILL
        kills += 1
        run_forget(root, *arguments, status=0)
        assert find_files_with(root, SECRET if selector == "item" else ANN) == []
        assert list_stale_runs(root) == {"reward:direct", "annotate:votes"}
        [receipt] = (root / "forgotten").glob("*.json")
        assert json.loads(receipt.read_text())["ended"]
        assert resolve("annotate:votes", root)
    else:
        pytest.fail("it never came to an end")
    assert kills > 2


def run_until_killed(root: Path, options: list[str], step: int) -> int:
    """Return the exit status of a child that is killed before it replaces a file or erases the store, after `step` such
    calls."""
    command = ["stage=registry", "stage.action=forget", "project=greetings", f"run.root={root}", *options]
    deadly = ("os.replace", "pathlib.Path.replace", "align.registry.forgetting.erase_target")
    return run_in_fork(command, deadly, step)


def test_gates_and_promotions(runs: Path) -> None:
    (runs / "gates").mkdir()
    (runs / "gates" / "live.yaml").write_text("alias: live\nconditions:\n  - {stale: false}\n")
    shop = Workshop(runs, runs)
    promote = ["stage=registry", "stage.action=promote", f"run.root={runs}", "stage.why=so"]
    assert shop.run_command(*promote, "stage.alias=live", "artifact=reward:saw") == 0, shop.output
    run_forget(runs, "stage.source=file", "stage.apply=true")
    assert shop.run_command(*promote, "stage.alias=live", "artifact=reward:direct") == 0, shop.output
    assert shop.run_command(*promote, "stage.alias=live", "artifact=reward:saw") == 2
    assert "reward:saw is stale since" in shop.output
    assert "data.path=data:old-2" in shop.output  # the command that makes it again
    assert shop.run_command(*promote, "stage.alias=elsewhere", "artifact=reward:saw") == 0
    assert "warning: stale" in shop.output
    assert shop.run_command("stage=registry", f"run.root={runs}") == 0
    assert "done, stale" in shop.output
    assert shop.run_command("stage=registry", "stage.action=trace", "artifact=reward:saw", f"run.root={runs}") == 0
    assert "stale since" in shop.output.splitlines()[0]
    command = shlex.split(read_rerun_command(runs / "reward" / "saw"))[3:]
    assert shop.run_command(*command) == 0, shop.output
    assert shop.run_command(*promote, "stage.alias=live", "artifact=reward:saw-2") == 0, shop.output
