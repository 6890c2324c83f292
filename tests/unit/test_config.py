"""Tests that a command line becomes a checked configuration, and that errors name field, value and remedy."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from align.config.compose import build_config, compose_tree
from align.config.group_files import find_conf_dir
from align.config.root import Config, to_plain_dict
from align.config.schemas import import_all_schemas
from align.config.values import parse_plain_value, quote_for_hydra
from align.core.errors import InputError

OWN = "model=pocket data=jsonl"


def compose_config(*arguments: str, search: Path | None = None) -> Config:
    return build_config(compose_tree(arguments, search))


def catch_input_error(*arguments: str, search: Path | None = None) -> InputError:
    with pytest.raises(InputError) as caught:
        compose_config(*arguments, search=search)
    assert caught.value.exit_status == 2
    assert str(caught.value).count("\n") == 0
    return caught.value


@pytest.mark.parametrize(
    ("wrong", "good", "field", "value", "said"),
    [
        ("foo=1", "seed=1", "foo", "1", "is not a key. `python -m align stage=sft --cfg job` shows every key."),
        ("stage.lrr=3", "stage.lr=3", "stage.lrr", "3", "is not a key. Did you mean stage.lr?"),
        (
            "stage=ppo stage.value_trunk=own",
            "stage=ppo stage.value_backbone=own",
            "stage.value_trunk",
            "own",
            "is called stage.value_backbone now. Write stage.value_backbone=own.",
        ),
        ("stage.learning_rate=1", "stage.lr=1", "stage.learning_rate", "1", "Did you mean stage.lr or method.lr?"),
        ("learning-rate=1", "stage.lr=1", "learning-rate", "1", "Did you mean stage.lr or method.lr?"),
        ("lora_r=4", "method.r=4", "lora_r", "4", "is not a key. Did you mean method.r?"),
        ("method.bias=none", "method.r=4", "method.bias", "none", "is not a key. `python -m align"),
        ("stage.bf16=true", "dtype=bfloat16", "stage.bf16", "true", "Did you mean dtype=bfloat16?"),
        ("stage=ppo stage.gae_lambda=1", "stage=ppo stage.lam=1", "stage.gae_lambda", "1", "Did you mean stage.lam?"),
        ("stage.gae_lambda=1", "stage.lr=1", "stage.gae_lambda", "1", "is not a key. `python -m align"),
        ("modle.path=x", "model.path=x", "modle.path", "x", "Did you mean model.path?"),
        ("exprt.path=x", "export.dtype=float32", "exprt.path", "x", "Did you mean export.path?"),
        ("stge.batch_size=4", "stage.batch_size=8", "stge.batch_size", "4", "Did you mean stage.batch_size?"),
        ("batch_size=4", "stage.batch_size=8", "batch_size", "4", "mean stage.batch_size or rollout.batch_size?"),
        (
            "stage=ppo value_trunk=own",
            "stage=ppo stage.value_backbone=own",
            "value_trunk",
            "own",
            "is called stage.value_backbone now",
        ),
        ("output_dir=x", "run.root=x", "output_dir", "x", "Did you mean run.root?"),
        ("modell=pocket", "model=pocket", "modell", "pocket", "Did you mean model?"),
        ("model.pth=x", "model.path=x", "model.pth", "x", "Did you mean model.path?"),
        ("stage.foo.bar=1", "stage.epochs=1", "stage.foo.bar", "1", "is not a key"),
        ("stage@foo=sft", "stage=sft", "stage@foo", "sft", "is not a key"),
        ("hydra.run.dir=x", "run.root=x", "hydra.run.dir", "x", "is not a key"),
        ("stage.kl_coef=1", "stage.lr=1", "stage.kl_coef", "1", "is not a key of stage=sft, but of stage=ppo"),
        ("stage=sfft", "stage=sft", "stage", "sfft", "Did you mean stage=sft? Choose one of: annotate, data, dpo,"),
        ("stage=", "stage=sft", "stage", "(empty)", "Choose one of: annotate, data, dpo,"),
        ("stage=[sft,ppo]", "stage=sft", "stage", "[sft,ppo]", "is not a choice here"),
        ("model=org/name", "model=hub model.path=org/name", "model", "org/name", "model=hub model.path=org/name?"),
        ("data=my.jsonl", f"{OWN} data.path=my.jsonl", "data", "my.jsonl", "data=files data.path=my.jsonl?"),
        ("method=7", "method=lora", "method", "7", "Choose one of: auto, full, lora, qlora."),
        ("stage.lr=abc", "stage.lr=1e-5", "stage.lr", "abc", "is not a number. Give a number."),
        ("stage.lr=", "stage.lr=0.1", "stage.lr", "(empty)", "is not a number"),
        ("stage.lr=[1,2]", "stage.lr=1", "stage.lr", "[1,2]", "is not a number"),
        ("stage.lr=1,2", "stage.lr=1", "stage.lr", "1,2", "is not a number"),
        ("stage.epochs=null", "stage.lr=null", "stage.epochs", "null", "is not a number"),
        ("stage.lr=inf", "stage.lr=10", "stage.lr", "inf", "is not a number"),
        ("stage.lr=nan", "stage.lr=10", "stage.lr", "nan", "is not a number"),
        ("seed=1.5", "seed=15", "seed", "1.5", "is not a whole number"),
        ("seed=${", "seed=0", "seed", "${", "is not a whole number"),
        ("seed=${foo}", "seed=${data.max_length}", "seed", "(given)", "Interpolation key 'foo' not found"),
        ("stage.packing=maybe", "stage.packing=true", "stage.packing", "maybe", "is not true or false"),
        (
            "stage=data stage.score.keep=0.9",
            "stage.packing=true",
            "stage.score.keep",
            "0.9",
            "is not a list. Write stage.score.keep=[0.9].",
        ),
        (
            "run=3",
            "run.name=3",
            "run",
            "3",
            "holds several keys. Set one of them: run.name, run.root, run.max_file_mb.",
        ),
        ("+new=1", "seed=1", "argument", "+new=1", "nothing can be added"),
        ("++new=1", "seed=1", "argument", "++new=1", "nothing can be added"),
        ("~method", "method=lora", "argument", "~method", "nothing can be added to the configuration or taken out"),
        ("project=a/b", "project=a-b", "project", "a/b", "cannot be part of a folder's name"),
        ("project=.hidden", "project=hidden", "project", ".hidden", "cannot be part of a folder's name"),
        ("hello", "project=hello", "argument", "hello", "is not of the form key=value"),
        ("=3", "seed=3", "argument", "=3", "is not of the form key=value"),
        ("model=hub", "model=hub model.path=org/x", "model.path", "(missing)", "Add model.path=VALUE."),
        ("data=jsonl", f"{OWN} data.path=x", "data.path", "(empty)", "Add data.path=FILE.jsonl."),
        ("data.path=x", f"{OWN} data.path=x", "data.path", "x", "Add data=files or data=manifest, or drop data.path."),
        ("method.lr=-1", "method.lr=1e-3", "stage.lr", -1.0, "where it is not given, method.lr counts"),
        ("data=jsonl data.path=", f"{OWN} data.path=x", "data.path", "(empty)", "Add data.path=FILE.jsonl."),
        ("seed=-1", "seed=0", "seed", -1, "Give a number from 0 to 4294967295"),
        ("stage.batch_size=0", "stage.batch_size=8", "stage.batch_size", 0, "is not above 0"),
        ("stage.publish=best", "stage.publish=best stage.eval_every=5", "stage.publish", "best", "stage.eval_every"),
        (
            "stage=reward stage.patience=3",
            "stage=reward stage.patience=3 stage.eval_every=5",
            "stage.patience",
            3,
            "stage.eval_every",
        ),
        (
            "stage.early_stopping_patience=3",
            "stage.patience=3 stage.eval_every=9",
            "stage.early_stopping_patience",
            "3",
            "Did you mean stage.patience?",
        ),
        ("stage.batch_size=12", "stage.batch_size=24", "stage.batch_size", 12, "stage.micro_batch=8"),
        ("method=full", "stage=full", "method", "full", "Use stage=full"),
        ("resume=perhaps", "resume=must", "resume", "perhaps", "auto, never, must"),
        ("schema_version=0", "schema_version=1", "schema_version", 0, "this version of align reads 1"),
        ("run.name=a/b", "run.name=a-b", "run.name", "a/b", "without slashes"),
        ("data=jsonl data.path=x", f"{OWN} data.path=x", "model", "(not given)", "Add model=hub model.path=ORG/NAME"),
        (
            f"{OWN} data.path=x data.eval_path=y data.held_out=0.2",
            f"{OWN} data.path=x data.eval_path=y",
            "data.held_out",
            0.2,
            "Drop one of the two.",
        ),
        (
            "data.eval_path=y",
            f"{OWN} data.path=x data.eval_path=y",
            "data.eval_path",
            "y",
            "has its own held-out split",
        ),
        ("data.held_out=1.5", "data.held_out=1", "data.held_out", 1.5, "from 0 to 1"),
        ("data.too_long=cut", "data.too_long=truncate", "data.too_long", "cut", "drop, truncate"),
        ("data.reasoning=off", "data.reasoning=hide", "data.reasoning", "off", "keep, mask, hide"),
        ("method.targets=q_proj", "method.targets=[q_proj]", "method.targets", "q_proj", "no list of names of layers"),
        ("method.dropout=1", "method.dropout=0.1", "method.dropout", 1.0, "below 1"),
        (
            "stage.gradient_accumulation=4 stage.batch_size=16",
            "stage.gradient_accumulation=2 stage.batch_size=16",
            "stage.batch_size",
            16,
            "Give one of the two.",
        ),
        (
            "stage.gradient_accumulation=4 stage.batch_size=24",
            "stage.gradient_accumulation=4",
            "stage.batch_size",
            24,
            "Give one of the two.",
        ),
        (
            "stage=reward data=jsonl data.path=x data.eval_path=y stage.held_out=0.2",
            "stage=reward data=jsonl data.path=x data.eval_path=y",
            "data.eval_path",
            "y",
            "held_out is given too",
        ),
    ],
)
def test_bad_input_beside_a_good_value(wrong: str, good: str, field: str, value: object, said: str):
    error = catch_input_error("stage=sft", *wrong.split())
    assert (error.field, error.value) == (field, value)
    assert said in str(error)
    compose_config("stage=sft", *good.split())


def test_impossible_values_of_other_stages():
    error = catch_input_error("stage=reward", "method.lr=1e-3", "data=annotations")
    assert (error.field, error.remedy) == ("method.lr", "Write stage.lr=1e-3.")
    assert catch_input_error("stage=export", "method.lr=1e-3").remedy == "Drop it."
    assert catch_input_error("stage=sample", "stage.candidates=1").field == "stage.candidates"
    assert compose_config("stage=sample", "stage.candidates=2").stage.candidates == 2
    error = catch_input_error("stage=ppo", "stage.batch_size=64", "stage.minibatches=3")
    assert (error.field, error.value) == ("stage.batch_size", 64)
    assert "not a multiple of stage.minibatches=3" in str(error)
    assert compose_config("stage=ppo", "stage.batch_size=64", "stage.minibatches=4").stage.minibatches == 4
    assert catch_input_error("stage=full", "method=lora").field == "method"


def test_a_stage_is_asked_for_where_a_stage_key_stands_alone():
    assert catch_input_error("stage.lr=1").field == "stage"


def test_of_two_arguments_the_later_counts():
    config = compose_config("stage=ppo", "seed=1", "method=lora", "stage=sft", "seed=2", "method=qlora")
    assert (config.stage.name, config.seed, config.method.name) == ("sft", 2, "qlora")


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("my data (é)/a.jsonl", "my data (é)/a.jsonl"),
        ("~/data.jsonl", "~/data.jsonl"),
        ("it's", "it's"),
        ("a\\'b\\", "a\\'b\\"),
        ("'a b'", "a b"),
        ("a,b.jsonl", "a,b.jsonl"),
        ("[draft].jsonl", "[draft].jsonl"),
        ("[draft]", "[draft]"),
        ("{a", "{a"),
        ("a=b", "a=b"),
        ("12e4567", "12e4567"),
        ("007", "007"),
        ("true", "true"),
        ("日本.jsonl", "日本.jsonl"),
        ("null", None),
    ],
)
def test_text_comes_through_as_written(written: str, read: str | None):
    where = "data=jsonl" if read is not None else "data=chitchat"
    assert compose_config("stage=sft", "model=pocket", where, f"data.path={written}").data.path == read


@pytest.mark.parametrize("text", ["plain", "it's", "\\", "a\\'", "\\\\' (é) '"])
def test_quote_is_undone_by_reading(text: str):
    assert parse_plain_value(quote_for_hydra(text)) == text


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("1e-5", 1e-5),
        ("true", True),
        ("null", None),
        ("[1,a]", [1, "a"]),
        ("{a:1}", {"a": 1}),
        ("'3'", "3"),
        ("1,2", "1,2"),
        ("range(1,3)", "range(1,3)"),
        ("choice(1,2)", "choice(1,2)"),
        ("a b", "a b"),
        ("", ""),
    ],
)
def test_values_are_read_as_hydra_reads_them_and_never_as_a_sweep(text: str, value: object):
    assert parse_plain_value(text) == value
    assert type(parse_plain_value(text)) is type(value)


def test_stages_and_groups_override_each_other_in_order():
    assert compose_config("stage=full").method.name == "full"
    assert compose_config("stage=full").stage.name == "full"
    assert compose_config("stage=reward").data.name == "annotations"
    assert compose_config("stage=sft", "method=lora", "method.lr=3e-4").stage.lr == 3e-4
    assert compose_config("stage=sft", "method.lr=3e-4", "stage.lr=1e-3").stage.lr == 1e-3


def test_plain_is_what_yaml_holds():
    config = compose_config("stage=sft", "run.name=x")
    assert OmegaConf.to_container(
        OmegaConf.create(OmegaConf.to_yaml(OmegaConf.create(to_plain_dict(config))))
    ) == to_plain_dict(config)
    assert to_plain_dict(config)["stage"]["lr"] == config.method.lr


# --- A user's ./conf folder


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    return tmp_path / "it's my (é) folder" / "conf"


def write_config_file(conf_dir: Path, name: str, text: str | bytes) -> None:
    path = conf_dir / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)


def test_own_group_files_work(mine: Path):
    write_config_file(mine, "model/mine.yaml", "defaults:\n  - hub\n  - _self_\npath: org/mine\n")
    write_config_file(mine, "model/sub/short.yaml", "path: org/short\n")
    write_config_file(mine, "data/mine.yaml", "defaults:\n  - jsonl\n  - _self_\npath: a b.jsonl\n")
    write_config_file(mine, "stage/slow.yaml", "defaults:\n  - sft\n  - _self_\nlr: 1e-5\n")
    write_config_file(mine, "db/mysql.yaml", "port: 1\n")  # a file of another tool is ignored
    assert compose_config("stage=sft", "model=mine", search=mine).model.path == "org/mine"
    assert compose_config("stage=sft", "model=sub/short", search=mine).model.path == "org/short"
    config = compose_config("stage=slow", "data=mine", "model=mine", "seed=3", search=mine)
    assert (config.stage.name, config.stage.lr, config.data.path, config.seed) == ("sft", 1e-5, "a b.jsonl", 3)
    assert catch_input_error("stage=sft", "db=mysql", search=mine).field == "db"
    assert "base, hub, mine, pocket, smollm2, sub/short" in str(
        catch_input_error("stage=sft", "model=nope", search=mine)
    )
    assert catch_input_error("stage=sft", "model=mine").field == "model"


def test_an_own_stage_file_is_the_stage_that_it_sets(mine: Path):
    write_config_file(mine, "stage/slow.yaml", "defaults:\n  - sft\n  - _self_\nepochs: 3\n")
    write_config_file(mine, "stage/careful.yaml", "defaults:\n  - ppo\n  - _self_\n")
    assert compose_config("stage=slow", "method.lr=1e-3", search=mine).stage.lr == 1e-3
    assert catch_input_error("stage=careful", "method.lr=1e-3", search=mine).remedy == "Write stage.lr=1e-3."


def test_own_files_replace_none_of_ours(mine: Path):
    write_config_file(mine, "config.yaml", "seed: 7\n")
    write_config_file(mine, "method/lora.yaml", "r: 3\n")
    write_config_file(mine, "model/pocket.yaml", "path: ???\n")
    config = compose_config("stage=sft", "method=lora", "model=pocket", search=mine)
    assert (config.seed, config.method.name, config.method.r, config.model.path) == (0, "lora", 16, "pocket")


def test_own_mandatory_value(mine: Path):
    write_config_file(mine, "model/ask.yaml", "path: ???\n")
    assert catch_input_error("stage=sft", "model=ask", search=mine).field == "model.path"
    assert compose_config("stage=sft", "model=ask", "model.path=x", search=mine).model.path == "x"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("path: [unclosed\n", "line 2"),
        ("pathh: x\n", "model.pathh is not a key. Did you mean model.path?"),
        ("path: {a: 1}\n", "Cannot convert"),
        ("defaults:\n  - nosuch\n  - _self_\n", "Could not load 'model/nosuch'"),
        ("defaults: 3\n", "defaults must be a list"),
        ("- a\n- b\n", "list"),
        (b"\xff\xfe\x00", "decode"),
    ],
)
def test_a_broken_own_file_is_named(mine: Path, text: str | bytes, said: str):
    write_config_file(mine, "model/mine.yaml", text)
    error = catch_input_error("stage=sft", "model=mine", search=mine)
    assert error.field == "configuration"
    assert error.value == str(mine / "model/mine.yaml")
    assert said in str(error)
    write_config_file(mine, "model/mine.yaml", "path: x\n")
    assert compose_config("stage=sft", "model=mine", search=mine).model.path == "x"


def test_an_own_stage_file_must_say_which_stage(mine: Path):
    write_config_file(mine, "stage/bare.yaml", "lr: 1e-5\n")
    assert "defaults: [sft, _self_]" in str(catch_input_error("stage=bare", search=mine))


def test_every_schema_is_reachable():
    files = {path.relative_to(find_conf_dir()).as_posix() for path in find_conf_dir().rglob("*.yaml")}
    assert {f"stage/{name}.yaml" for name in import_all_schemas()["stage"]} <= files
    assert {file.partition("/")[0] for file in files if "/" in file} == {
        "stage",
        "reward",
        *import_all_schemas()["group"],
    }


@pytest.mark.parametrize("group", ["stage", "model", "method", "data", "reward", "rollout", "track", "export"])
def test_what_a_group_chooses_is_not_set_by_itself(group: str):
    """`reward.name=learned` beside the default judge would be recorded without any effect."""
    with pytest.raises(InputError, match="decides nothing by itself") as caught:
        compose_config("stage=eval", f"{group}.name=learned")
    assert caught.value.remedy == f"Write {group}=learned."
