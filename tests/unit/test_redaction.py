"""Secrets are masked in texts, URLs, settings and errors, and harmless texts stay as they are."""

from __future__ import annotations

import copy
import json
import logging
import pickle
import time
from dataclasses import asdict

import pytest
import yaml

from align.annotate.store.connections import open_store_engine
from align.config.root import StoreConfig
from align.core.errors import InputError
from align.core.redaction import (
    RedactingFormatter,
    drop_masks,
    hide_password,
    mask_argument,
    mask_secrets,
    redact,
    reveal_secret,
)

URL = "postgresql+psycopg://user:pl4nted@host:5432/name?sslmode=require"
SHOWN = "postgresql+psycopg://user:***@host:5432/name?sslmode=require"


def test_whatever_looks_at_a_secret_sees_its_mask():
    secret = hide_password(URL)
    conversions = (
        str,
        repr,
        "{}".format,
        "%s".__mod__,
        json.dumps,
        lambda s: json.dumps({s: [s]}),
        lambda s: "".join([s]),
        lambda s: s + "",
        lambda s: f"{s!r:>80}",
        lambda s: s.encode().decode(),
        lambda s: yaml.safe_dump(str(s)),
        lambda s: pickle.loads(pickle.dumps(s)),
        lambda s: str(asdict(StoreConfig(s))),
        lambda s: str(vars(StoreConfig(s))),
    )
    for convert in conversions:
        assert "***" in convert(secret)
        assert "pl4nted" not in convert(secret)
    assert reveal_secret(secret) == reveal_secret(copy.deepcopy(secret)) == reveal_secret(copy.copy(secret)) == URL
    assert secret == SHOWN == hide_password(URL.replace("pl4nted", "0ther-value"))
    assert hash(secret) == hash(SHOWN)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (URL, SHOWN),
        ("x postgresql://u:p/w@h/d y", "x postgresql://u:***@h/d y"),
        ("https://token@h/x.git", "https://***@h/x.git"),
        ("https://u:token@h/x.git", "https://***@h/x.git"),
        ("GET /invite?token=abc&x=1", "GET /invite?token=***&x=1"),
        ("/?key=abc", "/?key=***"),
        ("postgresql:///d?user=u&sslpassword=p", "postgresql:///d?user=u&sslpassword=***"),
        ("+WANDB_API_KEY=abc", "+WANDB_API_KEY=***"),
        ("HF_TOKEN: 'abc'", "HF_TOKEN: '***'"),
        ("Authorization: Bearer abcdefgh1", "Authorization: Bearer ***"),
        ("hf_" + "a1" * 17, "hf_***"),
        ("host=h password=abc user=u", "host=h password=*** user=u"),
        ("DRIVER%3Dx%3BPWD%3Dabc%3B", "DRIVER%3Dx%3BPWD%3D***%3B"),
    ],
)
def test_shapes_are_masked_once_and_for_all(text: str, shown: str):
    assert mask_secrets(text) == mask_secrets(mask_secrets(text)) == shown


@pytest.mark.parametrize(
    "text",
    [
        "sqlite:///runs/annotations.db",
        "sqlite:////home/a@b/x@y.db",
        "http://127.0.0.1:7861/x@y",
        "postgresql+psycopg://align@/postgres?host=/tmp/x&options=-csearch_path%3Dt",
        "hub:ORG/NAME@REV/file.jsonl",
        "sft:latest",
        "eos_token = '<eos>'",
        "my llama (v2)",
        "hf_model",
        "a?b=c",
    ],
)
def test_what_is_no_secret_stays(text: str):
    assert mask_secrets(text) == text


@pytest.mark.parametrize(
    "url",
    [
        "mysql+pymysql://bob@h/db?ssl_key_passphrase=pl4nted-1",
        "mssql+pyodbc:///?odbc_connect=UID%3Dsa%3BPWD%3Dpl4nted-1",
        "postgresql://bob@h/db?sslmode=require&unheard_of=pl4nted-1",
        "postgresql://bob@h/db?pl4nted-1",
        "snowflake://bob@h/db?private_key=pl4nted-1;x=pl4nted-1",
    ],
)
def test_a_parameter_is_hidden_unless_it_is_known_to_be_harmless(url: str):
    """Drivers have their own names for secret parameters."""
    store = StoreConfig(url)
    assert "pl4nted" not in f"{store.url} {mask_argument(f'store.url={url}')} {vars(store)}"
    assert store.url is not None
    assert reveal_secret(store.url) == url
    assert store.url.startswith(url.partition("?")[0])


def test_a_store_that_cannot_be_opened_is_told_without_its_parameters():
    for url in ("postgresql+psycopg://u@127.0.0.1:1/d?sslpassword=pl4nted-1", "postgresql://u:pl4nted-1@h:port/d"):
        with pytest.raises(InputError, match=r"store\.url=postgresql") as caught:
            open_store_engine(hide_password(url))
        assert "pl4nted" not in str(caught.value)


@pytest.mark.parametrize("url", ["host=h user=bob password=pl4nted-1", "pl4nted-1", "bob:pl4nted-1@h/db", "h/db"])
def test_what_is_no_url_is_refused_and_not_shown(url: str):
    with pytest.raises(InputError, match=r"store\.url=.* is no URL") as caught:
        StoreConfig(url)
    assert "pl4nted" not in str(caught.value)


def test_a_database_is_its_url_without_the_password():
    assert drop_masks({"a": [mask_secrets(URL)]}) == {"a": [URL.replace(":pl4nted", "")]} == drop_masks({"a": [SHOWN]})


@pytest.mark.parametrize("url", ["postgresql://u:p@ss@h/d", "postgresql://h/d?user=u&password=p@ss", "x://u:p?a@h"])
def test_a_password_that_cuts_the_url_is_refused(url: str):
    with pytest.raises(InputError, match="%40") as caught:
        StoreConfig(url)
    assert "p@" not in str(caught.value)
    assert "ss" not in mask_argument(f"store.url={url}").replace("pass", "")


@pytest.mark.parametrize(
    "url",
    ["sqlite://", "sqlite:///", "sqlite:///:memory:", "sqlite+pysqlite://", "sqlite:///file:x?mode=memory&uri=true"],
)
def test_a_store_in_memory_is_refused(url: str):
    with pytest.raises(InputError, match="in memory"):
        StoreConfig(url)
    assert StoreConfig("sqlite:///memory.db").url == "sqlite:///memory.db"


def test_known_values_are_masked_wherever_they_stand(monkeypatch: pytest.MonkeyPatch):
    hide_password("postgresql://u:kn0wn%21value@h/d")
    monkeypatch.setenv("SOME_API_KEY", "k3y-of-the-environment")
    monkeypatch.setenv("SOME_PATH", "harmless-value")
    text = "kn0wn%21value kn0wn!value k3y-of-the-environment harmless-value"
    assert redact(text) == "*** *** *** harmless-value"
    record = logging.LogRecord("n", logging.ERROR, "f", 1, "%s", (text,), None)
    assert RedactingFormatter("%(message)s").format(record) == "*** *** *** harmless-value"
    with pytest.raises(InputError) as caught:
        raise InputError("a", text, text, text)
    error = caught.value
    assert "kn0wn" not in f"{error} {error.value} {error.problem} {error.remedy} {error.args}"


def test_common_words_stay():
    """Masking a common word that is a password would make every message unreadable."""
    hide_password("postgresql://postgres:postgres@h/d")
    hide_password("postgresql://u:abc@h/d")
    assert redact("postgres abc") == "postgres abc"


@pytest.mark.parametrize("line", ["a" * 200_000, "A_" * 100_000, "x://" * 50_000, "?a" * 100_000, "aB+/" * 50_000])
def test_a_long_line_takes_no_minute(line: str):
    began = time.process_time()
    mask_secrets(line)
    assert time.process_time() - began < 5  # half a second of one core at most, measured; without the bounds, minutes
