"""A command line's options: those that exist, and the errors of Hydra's options that align does not have."""

from __future__ import annotations

from pathlib import Path

import pytest

from align.config.options import NOT_HERE, SHORT, CommandLine, parse_arguments
from align.core.errors import InputError


@pytest.fixture
def conf(tmp_path: Path) -> Path:
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    return tmp_path / "mine"


def test_options_stand_anywhere(conf: Path):
    words = ("stage=sft", "seed=1,2")
    assert parse_arguments(words) == CommandLine(words)
    assert (
        parse_arguments(("-m", *words))
        == parse_arguments(("stage=sft", "--multirun", "seed=1,2"))
        == CommandLine(words, multirun=True)
    )
    for option in (["--config-dir", str(conf)], [f"--config-dir={conf}"], ["-cd", str(conf)], [f"-cd={conf}"]):
        line = parse_arguments(["stage=sft", *option, "seed=1,2"])
        assert (line.words, line.search, line.options) == (words, conf, ("--config-dir", str(conf)))
    assert parse_arguments(words).search == Path("conf")
    assert parse_arguments(words).options == ()
    assert parse_arguments(["-c", "job", "--resolve", *words]) == CommandLine(words, print_job=True, resolve=True)
    assert parse_arguments(["--cfg=job"]) == CommandLine((), print_job=True)
    assert parse_arguments([]) == CommandLine(())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("--verbose", "argument=--verbose: is not an option. See python -m align --help."),
        ("--multirun=2", "argument=--multirun=2: is not an option"),
        ("-x", "argument=-x: is not an option"),
        ("--", "argument=--: is not an option"),
        ("-", "argument=-: stands alone"),
        ("-m -", "argument=-: stands alone: it reads command lines from the standard input. Write options into those"),
        ("--cfg hydra", "--cfg=hydra: prints only the job's configuration. Write: --cfg job"),
        ("--cfg all", "--cfg=all: prints only"),
        ("--cfg", "--cfg=(nothing)"),
        ("--resolve", "option=--resolve: says how --cfg job prints. Add --cfg job."),
        ("--config-dir", "--config-dir=(nothing): names a folder. Write: --config-dir DIR"),
        (
            "--config-dir nowhere",
            "--config-dir=nowhere: there is no such folder. Name the folder that holds one of data/",
        ),
        ("--config-dir {file}", "is no folder"),
        ("--config-dir {empty}", "holds no folder of group files. Name the folder that holds one of data/, "),
    ],
)
def test_options_that_are_refused(given: str, said: str, tmp_path: Path):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError) as caught:
        parse_arguments(given.format(file=tmp_path / "file", empty=tmp_path / "empty").split())
    assert said in str(caught.value)


@pytest.mark.parametrize("option", [*NOT_HERE, *(short for short, long in SHORT.items() if long in NOT_HERE)])
def test_hydras_other_options_are_refused_by_name(option: str):
    for arguments in ([option], [option, "stage=sft"], [f"{option}=x"]):
        with pytest.raises(InputError) as caught:
            parse_arguments(arguments)
        assert str(caught.value).startswith(f"option={arguments[0]}: ")
        assert caught.value.remedy.endswith(".")


def test_every_option_of_hydras_is_known():
    from hydra._internal.utils import get_args_parser

    hydra_options = {name for action in get_args_parser()._actions for name in action.option_strings}
    our_options = {*SHORT, *SHORT.values(), *NOT_HERE, "--resolve", "--help", "-h", "--version"}
    assert hydra_options <= our_options
