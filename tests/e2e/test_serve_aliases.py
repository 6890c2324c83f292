"""A server follows aliases: the models that its names refer to change while it answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from processes import Forks
from serving import Server, run_serve_stage, write_adapters
from synthetic_runs import find_record, write_run_folder
from waiting import becomes_true

from align.__main__ import main
from align.data.chat.tools import encode_tool_prompt
from align.models.base import find_base
from align.models.load import load_tokenizer
from align.run import read_manifest
from align.run.weights import adapter_digest

NAMES = ("one", "two", "three")
WITHIN_S = 20.0
SERVED = """# @package _global_
stage:
  adapters: {chat: "@production", fixed: "sft:two", mixed: {"@production": 1, base: 1}}
"""


class Home:
    """Runs of adapters on pocket, and a server of one of them by an alias."""

    def __init__(self, root: Path, server: Server) -> None:
        self.root = root
        self.server = server
        self.asked = encode_tool_prompt(
            load_tokenizer(find_base("pocket")), [{"role": "user", "content": "Good morning!"}]
        )

    def digest(self, name: str) -> str:
        return read_manifest(self.root / "sft" / name).digest

    def promote(self, *words: str, alias: str = "production") -> None:
        settings = ("stage=registry", f"run.root={self.root}", f"stage.alias={alias}", "stage.why=test")
        assert main([*settings, *words]) == 0

    def says(self) -> str:
        return (self.server.folder / "log.txt").read_text()

    def model(self, name: str = "chat") -> Any:
        status, models = self.server.get("/v1/models")
        assert status == 200
        return next(model for model in models["data"] if model["id"] == name)

    def until(self, happened: Callable[[], bool]) -> None:
        assert becomes_true(happened, WITHIN_S), self.says()

    def until_it_means(self, **shares: float) -> None:
        """Wait until both names have followed to adapters with these shares of `chat`."""
        self.until(lambda: self.shares("chat") == shares and self.shares("mixed") == {**shares, "base": 1.0})

    def shares(self, name: str) -> dict[str, float]:
        """Return adapter → its share of a name's users."""
        names = {self.digest(adapter): adapter for adapter in NAMES}
        model = self.model(name)
        arms = model["arms"] or [{"adapter": model["adapter"], "weight": 1.0}]
        return {names.get(arm["adapter"], "base"): arm["weight"] for arm in arms}

    def logprobs(self, name: str = "chat") -> list[float]:
        return self.server.logprobs(name, self.asked)


@pytest.fixture(scope="module")
def home(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    folder = tmp_path_factory.mktemp("home")
    weights = write_adapters(folder / "adapters", *NAMES)
    root = folder / "runs"
    base = find_base("pocket")
    for i, name in enumerate(NAMES):
        config = {"stage": {"name": "sft"}, "data": {"name": "chitchat"}, "method": {"name": "lora"}}
        fields = {"base": base, "config": config, "digest": adapter_digest(weights / name), "day": i}
        run = write_run_folder(root, f"sft:{name}", **fields)
        for path in (weights / name).iterdir():
            (run / "artifact" / path.name).write_bytes(path.read_bytes())
    plain = {**config, "method": {"name": "qlora"}}
    write_run_folder(root, "sft:other", base=base, config=plain, digest=adapter_digest(weights / "one"), day=9)
    for path in (weights / "one").iterdir():
        (root / "sft" / "other" / "artifact" / path.name).write_bytes(path.read_bytes())
    promotion = [
        "stage=registry",
        "stage.action=promote",
        f"run.root={root}",
        "stage.alias=production",
        "stage.why=first",
    ]
    assert main([*promotion, "artifact=sft:one"]) == 0
    (folder / "conf" / "experiment").mkdir(parents=True)
    (folder / "conf" / "experiment" / "served.yaml").write_text(SERVED)
    with run_serve_stage(forks, folder, "+experiment=served", f"stage.roots=[{folder / 'adapters'}]") as server:
        yield Home(root, server)


def test_it_follows(home: Home) -> None:
    """The digest, the answers and the log change with the alias; the old adapter gives the same logprobs again."""
    assert home.model()["adapter"] == home.digest("one")
    before = home.logprobs()
    home.promote("stage.action=promote", "artifact=sft:two")
    home.until_it_means(two=1.0)
    assert home.logprobs() == home.logprobs("fixed") != before
    home.until(lambda: "chat follows: sft:two" in home.says())
    line = f"chat follows: sft:two ({home.digest('two')[:12]}), was sft:one ({home.digest('one')[:12]})"
    assert line in home.says()
    server = find_record(home.root, f"serve:{home.server.folder.name}")
    assert server["serves"]["chat"] == [{"label": "sft:two", "adapter": home.digest("two"), "weight": 1.0}]
    assert {home.digest("one"), home.digest("two")} <= {*server["loaded"]}
    assert server["run"] in find_record(home.root, "sft:two")["servers"]  # not loaded when the server started
    home.promote("stage.action=promote", "artifact=sft:one")
    home.until_it_means(one=1.0)
    assert home.logprobs() == before
    assert find_record(home.root, server["run"])["serves"]["chat"][0]["label"] == "sft:one"


def test_what_cannot_be_followed_changes_nothing(home: Home) -> None:
    """The name keeps its adapter, and the log says why, if the new one has another precision or the alias has no
    target."""
    before = home.logprobs()
    home.promote("stage.action=promote", "artifact=sft:other")
    home.until(lambda: "chat stays with sft:one" in home.says())
    assert "was trained with method=qlora, and this server has method=lora" in home.says()
    home.promote("stage.action=retire")
    home.until(lambda: "was retired by" in home.says())
    assert home.logprobs() == before
    log = home.root / "aliases.jsonl"
    text = log.read_text()
    log.write_text(text.splitlines(keepends=True)[1])
    home.until(lambda: "the row is missing" in home.says())
    log.write_text(text)
    home.promote("stage.action=promote", "artifact=sft:three")
    home.until_it_means(three=1.0)
    home.promote("stage.action=promote", "artifact=sft:one")
    home.until_it_means(one=1.0)


def test_nobody_else_loads_what_follows(home: Home) -> None:
    body = {"lora_name": "chat", "lora_path": "two", "load_inplace": True}
    status, error = home.server.post("/v1/load_lora_adapter", body)
    assert status == 400
    assert "refers to other names or an alias" in str(error)


def test_requests_under_way_keep_their_weights(home: Home) -> None:
    """Each answer comes from one adapter only while the alias switches back and forth."""
    expected = {}
    for name in ("two", "one"):
        home.promote("stage.action=promote", f"artifact=sft:{name}")
        home.until_it_means(**{name: 1.0})
        expected[home.digest(name)] = home.logprobs()
    for i in range(6):
        home.promote("stage.action=promote", f"artifact=sft:{('two', 'one')[i % 2]}")
        for _ in range(12):
            assert home.logprobs() in [*expected.values()]
    for entry in home.server.log[-72:]:
        assert entry["adapter"] in expected
