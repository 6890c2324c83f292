"""The registry from the command line (`stage=registry`), on real runs and on made-up folders."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from datetime import datetime
from pathlib import Path

import pytest
from stage_commands import Ready, Workshop
from synthetic_runs import write_run_folder, write_two_policies

from align.annotate.store import Store
from align.registry.comparison import get_figure_value
from align.registry.formatting import as_csv, as_table, clean_text, format_age
from align.registry.index import INDEX
from align.run import read_manifest


def run_registry(root: Path, *words: str) -> Workshop:
    shop = Workshop(root, root)
    assert shop.run_command("stage=registry", f"run.root={root}", *words) == 0, shop.output
    return shop


def read_refusal(root: Path, *words: str) -> str:
    shop = Workshop(root, root)
    assert shop.run_command("stage=registry", f"run.root={root}", *words) == 2
    return shop.output


def test_real_runs(ready: Ready, tmp_path: Path) -> None:
    """Every run is listed, with the values of its manifest."""
    (ready.root / INDEX).unlink(missing_ok=True)
    before = {path: path.read_bytes() for path in ready.root.rglob("*") if path.is_file()}
    records = json.loads(run_registry(ready.root, "stage.format=json").output)
    folders = [path.parent for path in ready.root.glob("*/*/manifest.json")]
    assert {record["run"] for record in records} == {f"{path.parent.name}:{path.name}" for path in folders}
    by_run = {record["run"]: record for record in records}
    for folder in folders:
        manifest = read_manifest(folder)
        record = by_run[manifest.ref]
        assert (record["status"], record["seed"], record["finished"]) == (
            manifest.status,
            manifest.seed,
            manifest.times["finished"],
        )
        assert record["base"] is None or record["base"]["digest"] == manifest.base.digest  # type: ignore[union-attr]
        for key, value in manifest.metrics.items():
            assert record["metrics"][key] == json.loads(json.dumps(value))
        init = manifest.inputs.get("init")
        if init and init.stage:
            assert init.run in record["parents"]
            assert record["gone"] == []
            assert manifest.ref in by_run[init.run]["children"]
    assert by_run["reward:a"]["method"]["r"] == 16
    (ready.root / INDEX).unlink()
    assert {path: path.read_bytes() for path in ready.root.rglob("*") if path.is_file()} == before


def test_the_table(tmp_path: Path) -> None:
    write_two_policies(tmp_path)
    write_run_folder(
        tmp_path, "ppo:bad", status="failed", error="stage.lr=3.0: gives\na NaN \x1b[31m" + "x" * 99, digest="", day=8
    )
    lines = run_registry(tmp_path).output.splitlines()
    assert lines[0].split() == ["run", "status", "age", "base", "method", "data", "score", "KL", "from", "error"]
    assert len(lines) == 9
    by_run = {line.split()[0]: line for line in lines[1:]}
    assert [*by_run][:2] == ["ppo:bad", "export:one"]  # the newest first
    assert "win_rate 0.81 [0.75, 0.87]  " in by_run["ppo:first"]
    assert re.search(r"sft:start, reward:votes +–$", by_run["ppo:first"])
    assert by_run["ppo:bad"].endswith("stage.lr=3.0: gives\\na NaN \\x1b[31m" + "x" * 99)  # the last column is not cut
    limited = run_registry(tmp_path, "stage.limit=3").output.splitlines()
    assert (len(limited), limited[-1]) == (5, "3 of 8 runs: stage.limit=N shows more.")
    chosen_columns = run_registry(
        tmp_path, "stage.columns=[run, base, age, seed, score.low]", "stage.where={run: 'ppo:first'}"
    ).output
    head, line = (line.split() for line in chosen_columns.splitlines())
    assert head == ["run", "base", "age", "seed", "score.low"]
    assert line == ["ppo:first", "pocket", *by_run["ppo:first"].split()[2:4], "0", "0.75"]
    assert run_registry(tmp_path, "stage.where={stage: dpo}").output == "no run matches\n"
    (tmp_path / "empty").mkdir()
    assert run_registry(tmp_path / "empty").output == "no runs yet\n"


def test_formats(tmp_path: Path) -> None:
    write_two_policies(tmp_path)
    conditions = "stage.where={stage: ppo, metrics.win_rate.low: '>=0.7'}"
    columns = "stage.columns=[run, metrics.win_rate.low, method.targets, error]"
    expected = {"run": "ppo:first", "metrics.win_rate.low": 0.75, "method.targets": ["q_proj", "v_proj"], "error": None}
    assert json.loads(run_registry(tmp_path, conditions, columns, "stage.format=json").output) == [expected]
    rows = [*csv.reader(io.StringIO(run_registry(tmp_path, conditions, columns, "stage.format=csv").output))]
    assert rows == [[*expected], ["ppo:first", "0.75", '["q_proj", "v_proj"]', ""]]
    table = run_registry(tmp_path, conditions, columns).output.splitlines()
    assert [line.split() for line in table] == [[*expected], ["ppo:first", "0.75", "q_proj,", "v_proj", "–"]]
    records = [*csv.DictReader(io.StringIO(run_registry(tmp_path, "stage.format=csv").output))]
    assert {row["run"]: row["score.value"] for row in records}["ppo:first"] == "0.81"
    assert [*records[0]][:4] == ["run", "aliases", "status", "error"]
    empty_csv = run_registry(tmp_path, "stage.format=csv", "stage.where={run: nope}").output
    assert (empty_csv.startswith("run,aliases,status,"), len(empty_csv.splitlines())) == (True, 1)
    assert json.loads(run_registry(tmp_path, "stage.format=json", "stage.where={run: nope}").output) == []
    listed = json.loads(run_registry(tmp_path, "stage.format=json", "stage.sort=[stage, -name]").output)
    assert [record["run"] for record in listed][-4:] == ["ppo:second", "ppo:first", "reward:votes", "sft:start"]


@pytest.mark.parametrize("given", ["ppo:first", "ppo:latest", "{root}/ppo/second", "{root}/ppo/second/"])
def test_one_run(tmp_path: Path, given: str) -> None:
    write_two_policies(tmp_path)
    write_run_folder(tmp_path, "ppo:unfinished", status="interrupted", times={}, day=30)
    name = "first" if given == "ppo:first" else "second"
    stdout = run_registry(tmp_path, "stage.action=show", f"stage.run={given.format(root=tmp_path)}").output
    fields = dict(re.split(r"  +", line, maxsplit=1) for line in stdout.splitlines())
    assert fields["run"] == f"ppo:{name}"
    assert fields["parents"] == "sft:start, reward:votes"
    assert ("exports" in fields) == (name == "first")
    if name == "first":
        assert (fields["children"], fields["exports"]) == ("eval:one, export:one", "export:one")
    assert [*fields][:3] == ["run", "status", "score.name"]


def test_the_latest_is_that_of_references(tmp_path: Path) -> None:
    """The latest run has the highest number of publication, not the latest time. `sft:` includes `full` runs."""
    write_two_policies(tmp_path)
    write_run_folder(tmp_path, "ppo:by a clock set back", published=99)
    write_run_folder(tmp_path, "full:whole", published=50)
    for reference, run in (("ppo:latest", "ppo:by a clock set back"), ("sft:latest", "full:whole")):
        stdout = run_registry(tmp_path, "stage.action=show", f"stage.run={reference}", "stage.format=json").output
        assert json.loads(stdout)["run"] == run


def test_what_differs(ready: Ready) -> None:
    """Two reward models that differ in their seed."""
    lines = run_registry(ready.root, "stage.action=diff", "stage.runs=[reward:a, reward:b]").output.splitlines()
    words = ["stage.action=diff", "stage.runs=[reward:a, reward:b]", "stage.format=json"]
    differences = json.loads(run_registry(ready.root, *words).output)
    assert lines[0] == "reward:a → reward:b"
    assert differences["settings"].keys() == {"seed"}
    assert (
        lines[lines.index("settings") + 1]
        == f"  seed  {differences['settings']['seed'][0]} → {differences['settings']['seed'][1]}"
    )
    assert (differences["inputs"], differences["packages"], differences["code"], differences["hardware"]) == (
        {},
        {},
        {},
        {},
    )
    data = differences["data"]  # other pairs are held out under another seed
    assert data["before"] - data["removed"] + data["added"] == data["after"]
    assert data["before"] > data["removed"] > 0


def test_runs_side_by_side(ready: Ready, tmp_path: Path) -> None:
    """Two reward models that differ in their seed are one row, with the mean of their figures and its interval."""
    page = tmp_path / "page.html"
    words = ["stage.action=compare", "stage.runs=[reward:a, reward:b]"]
    lines = run_registry(ready.root, *words, f"stage.html={page}").output.splitlines()
    assert lines[0].split()[:3] == ["run", "seed", "accuracy"]
    assert lines[1].startswith("reward:a +1 ")
    assert lines[-1] == f"curves and plots: {page}"
    accuracies = [read_manifest(ready.root / "reward" / name).metrics["accuracy"]["value"] for name in "ab"]
    (row,) = json.loads(run_registry(ready.root, *words, "stage.format=json").output)["rows"]
    assert row["runs"] == ["reward:a", "reward:b"]
    # Equal figures are one number.
    assert get_figure_value(row["figures"]["accuracy"]) == pytest.approx(sum(accuracies) / 2)
    cells = dict(
        zip(*csv.reader(io.StringIO(run_registry(ready.root, *words, "stage.format=csv").output)), strict=True)
    )
    assert float(cells["accuracy"]) == pytest.approx(sum(accuracies) / 2)
    html = page.read_text()
    assert "2 runs side by side" in html
    assert "<script" not in html


REFUSED = {
    "stage.action=show": "stage.run=(not given): names no run to show",
    "stage.action=show stage.run=ppo:frist": "Did you mean ppo:first?",
    "stage.action=show stage.run=dpo:latest": "is no run under",
    "stage.action=show stage.run=ppo:first stage.limit=3": "stage.limit=3: is not read by",
    "stage.action=diff stage.runs=[ppo:first]": "does not name two runs",
    "stage.action=diff stage.runs=[ppo:first,ppo:x]": "stage.runs=ppo:x: is no run under",
    "stage.action=diff stage.runs=[ppo:first,sft:start]": "belong to different stages",
    "stage.runs=[ppo:first,ppo:second]": "Add stage.action=compare or diff",
    "stage.action=compare": "names no runs to compare",
    "stage.action=compare stage.runs=[ppo:first,ppo:first]": "names a run twice",
    "stage.action=compare stage.runs=[ppo:first] stage.where={stage:ppo}": "Drop one of the two.",
    "stage.action=compare stage.sweep=latest": "A sweep (-m) of two runs",
    "stage.action=compare stage.where={stage:dpo}": "matches no run",
    "stage.action=compare stage.runs=[ppo:first] stage.columns=[metrics.win]": "a key that no run here has",
    "stage.action=compare stage.where={stage:ppo} stage.html=no/page.html": "Make no first.",
    "stage.html=page.html": "is not read by stage.action=list. Add stage.action=compare,",
    "stage.action=trace artifact=ppo:frist": "Did you mean ppo:first?",
    "stage.action=trace artifact=@production": "artifact=@production: is no alias under",
    "stage.action=trace stage.response=req-1": "is in no server's log under",
    "stage.action=trace stage.format=csv": "is not a format of stage.action=trace",
    "stage.action=gc stage.kinds=[runs]": "stage.kinds",
    "stage.action=gc stage.days=-1": "stage.days=-1",
    "stage.apply=true": "stage.apply=True: is not read by stage.action=list. Add stage.action=forget or gc",
    "stage.port=9000": "stage.action=serve",
    "stage.where={metrics.winrate:1}": "Did you mean metrics.win_rate",
    "stage.where=3": "is no mapping of keys to conditions",
    "stage.where={stage:ppo,score.value:>=1}": "a comparison in quotes of its own",
    "stage.sort=-metric.kl": "stage.sort=metric.kl: is a key that no run here has. Did you mean metrics.kl?",
    "stage.columns=[run,metrics.win]": "stage.columns=metrics.win: is a key that no run here has",
    "stage.limit=0": "is not above 0",
    "stage.format=xml": "stage.format=xml",
    "stage.columns=run": "Write stage.columns=[run].",
    "run.root=nowhere": "run.root=nowhere: is no folder",
}
"""Words → text of the message."""


def test_what_cannot_be_answered(tmp_path: Path) -> None:
    root = write_two_policies(tmp_path)
    for words, says in REFUSED.items():
        assert says in read_refusal(root, *words.split()), words


def test_rebuilding_says_what_it_read(tmp_path: Path) -> None:
    write_two_policies(tmp_path)
    assert re.fullmatch(
        rf"7 runs in \d+\.\d s; {re.escape(str(tmp_path / INDEX))}\n",
        run_registry(tmp_path, "stage.action=rebuild").output,
    )


def test_nothing_heavy_is_imported(tmp_path: Path) -> None:
    write_two_policies(tmp_path)
    code = "import sys; from align.__main__ import main; "
    code += f"assert main(['stage=registry', {f'run.root={tmp_path}'!r}]) == 0; "
    code += (
        "print([m for m in ('torch', 'numpy', 'pyarrow', 'pandas', 'sqlalchemy', 'transformers') if m in sys.modules])"
    )
    stdout = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert stdout.splitlines()[-1] == "[]"


def test_ages() -> None:
    now = datetime.fromisoformat("2026-11-28T12:00:00+00:00")
    started = {
        "2026-11-28T11:59:59+00:00": "now",
        "2026-11-28T12:00:30+00:00": "now",
        "2026-11-28T13:00:00+00:00": "in the future",
        "2026-11-28T11:01:00+00:00": "59 min",
        "2026-11-28T10:00:00+00:00": "2 h",
        "2026-11-26T12:00:00+02:00": "2 d",
        "2026-11-28T09:00:00": "3 h",
        "yesterday": "–",
    }
    assert {when: format_age({"started": when}, now) for when in started} == started
    assert format_age({"started": None}, now) == "–"


def test_text_of_files_cannot_move_the_cursor() -> None:
    assert clean_text("a\x1b[2J\r\n\tb\u202eé日") == "a\\x1b[2J\\r\\n\\tb\\u202eé日"
    record = {"run": "sft:\x1b[2J", "status": "done\n", "started": None, "metrics": {"x": "\x07"}, "error": "\x1b"}
    for columns in ([], ["run", "metrics.x"]):
        assert all(line.isprintable() for line in as_table([record], columns, datetime.now()))
    (row,) = csv.DictReader(io.StringIO(next(as_csv([{"run": 'a"b,c\nd', "n": [1], "on": True}], []))))
    assert (row["run"], row["n"], row["on"]) == ('a"b,c\nd', "[1]", "true")


def test_where_it_came_from(ready: Ready, tmp_path: Path) -> None:
    """The trace of a reward model of real votes ends at pseudonyms and the answers that they judged."""
    root = tmp_path / "runs"
    shutil.copytree(ready.root, root)
    words = ["stage.action=trace", "artifact=reward:a"]
    (node,) = json.loads(run_registry(root, *words, "stage.verify=full", "stage.format=json").output)
    sources = {source["as"]: source for source in node["sources"]}
    assert {"base", "init", "data"} <= sources.keys()
    votes = sources["data"]
    assert (votes["kind"], votes["whole"]) == ("votes", True)
    assert votes["state"] == "every row of the ledger and every content hashed now: as written"
    people = [source for source in votes["sources"] if source["kind"] == "annotator"]
    with Store.open(f"sqlite:///{root / 'annotations.db'}", create_if_missing=False) as store:
        counts = Counter(vote.annotator for vote in store.rankings(votes["name"]))
        assert {person["name"]: person["facts"] for person in people} == {
            name: [f"{count} judgement{'s' * (count != 1)}"] for name, count in counts.items()
        }
        assert [source["name"] for source in votes["sources"]][-1].startswith("sample:")
        last = store.rankings(votes["name"])[-1]
        store.retract(votes["name"], last.seq)  # later rows do not affect this run
    assert "the last row that was read is in the ledger" in run_registry(root, *words).output
    assert "NOT WHOLE" not in run_registry(root, *words).output
    manifest = root / "reward" / "a" / "manifest.json"
    manifest_text = manifest.read_text()
    manifest.write_text(manifest_text.replace(votes["digest"], "f" * 64))
    assert "of its ledger was changed or removed" in run_registry(root, *words).output.splitlines()[-1]
    manifest.write_text(manifest_text)
    (root / "annotations.db").unlink()
    assert "the store cannot be read: " in run_registry(root, *words).output
    weights = next((root / "reward/a/artifact").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    lines = run_registry(root, *words, "stage.verify=full").output.splitlines()
    assert "NOT WHOLE: reward:a: artifact/adapter_model.safetensors is changed" in lines


def test_what_nothing_needs(ready: Ready, tmp_path: Path) -> None:
    """Files that no run needs are listed, and removed on request; artifacts only by name."""
    root = tmp_path / "runs"
    shutil.copytree(ready.root, root)
    for path in root.rglob("*"):
        os.utime(path, (1e9, 1e9), follow_symlinks=False)
    (root / "reward" / "a" / "checkpoints").mkdir()
    (root / "reward" / "a" / "checkpoints" / "x").write_bytes(b"12")
    output = run_registry(root, "stage.action=gc").output.splitlines()
    assert output[0].split() == ["kind", "size", "what", "why"]
    assert "reward/a/checkpoints" in output[1]
    assert "reward/a/artifact" in output[2]
    assert output[-1] == 'Artifacts go only by name: "stage.kinds=[artifacts]".'
    output = run_registry(root, "stage.action=gc", "stage.apply=true", "stage.who=ann").output
    assert "1 thing removed, 2 B; removed.jsonl says which." in output
    assert not (root / "reward" / "a" / "checkpoints").exists()
    (piece,) = json.loads(run_registry(root, "stage.action=gc", "stage.format=json").output)
    assert (piece["kind"], piece["run"], piece["removed"]) == ("artifacts", "reward:a", False)
    assert "removed" in run_registry(root, "stage.action=gc", "stage.apply=true", "stage.kinds=[artifacts]").output
    assert run_registry(root, "stage.action=gc").output == "nothing of these kinds to remove\n"
    assert (
        "NOT WHOLE: reward:a: was removed by stage=registry"
        in run_registry(root, "stage.action=trace", "artifact=reward:a").output
    )
    (root / "aliases.jsonl").write_text("{}\n")
    assert "is no record of an alias change" in read_refusal(root, "stage.action=gc")
