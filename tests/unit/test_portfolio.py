"""Choosing the weights of a name, by tenant, by digest and by share of users."""

from __future__ import annotations

import threading
from dataclasses import replace
from math import sqrt
from pathlib import Path

import pytest
from run_folders import BASE
from served_adapters import METHOD, write_exported_adapter

from align.core.errors import InputError
from align.run import Base
from align.serve.adapter_folders import Version
from align.serve.errors import Refusal, UnknownModel
from align.serve.model_names import Arm, ChosenModel, Portfolio, assign_arm, build_public_id
from align.serve.tenants import Tenant


def build_version(digit: str) -> Version:
    return Version(digit * 64, Path("/adapters", digit))


A = build_version("a")
B = build_version("b")
ALIKE = replace(build_version("a"), digest="a" * 20 + "b" * 44)


def build_portfolio(**names: list[Arm]) -> Portfolio:
    return Portfolio(BASE, METHOD, names)


def build_single_arm(name: str, weights: Version | None) -> list[Arm]:
    return [Arm(name, name, weights)]


def choose(
    portfolio: Portfolio, model: str, user: str | None = "u", tenant: str = "t", allow: frozenset[str] | None = None
) -> ChosenModel:
    return portfolio.choose(model, Tenant(tenant, allow=allow), user)


def test_a_name_its_digest_and_the_base() -> None:
    portfolio = build_portfolio(support=build_single_arm("support", A), legal=build_single_arm("legal", B))
    assert choose(portfolio, "support") == ChosenModel("support", A)
    assert choose(portfolio, f"support@sha256:{A.digest}") == ChosenModel("support", A)
    assert choose(portfolio, f"support@sha256:{'a' * 12}") == ChosenModel("support", A)
    assert choose(portfolio, "tiny") == ChosenModel("tiny", None)
    assert choose(portfolio, f"tiny@sha256:{BASE.digest[:12]}") == ChosenModel("tiny", None)


@pytest.mark.parametrize(
    "model",
    [
        "",
        "nobody",
        "Support",
        "support ",
        "support@",
        "support@sha256:",
        f"support@sha256:{'a' * 11}",
        f"support@sha256:{'A' * 12}",
        f"support@sha256:{'b' * 12}",
        f"support@sha256:{'a' * 65}",
        f"support@sha256:{'a' * 64}@x",
        f"@sha256:{'a' * 12}",
        f"nobody@sha256:{'a' * 12}",
        "base",
        "secret",
        f"secret@sha256:{'b' * 64}",
        "support/../legal",
        "\0",
        "\udc00",
        f"tiny@sha256:{'a' * 12}",
    ],
)
def test_what_is_not_there_and_what_is_another_tenants_are_answered_alike_and_never_by_the_base(model: str) -> None:
    portfolio = build_portfolio(support=build_single_arm("support", A), secret=build_single_arm("secret", B))
    allow = frozenset({"support", "tiny"})
    with pytest.raises(UnknownModel) as caught:
        choose(portfolio, model, allow=allow)
    with pytest.raises(UnknownModel) as unknown:
        choose(portfolio, "unheard", allow=allow)
    assert (caught.value.message[:11], caught.value.message[-40:]) == (
        unknown.value.message[:11],
        unknown.value.message[-40:],
    )
    assert {**caught.value.body["error"], "message": ""} == {**unknown.value.body["error"], "message": ""}


def test_the_base_is_a_name_like_another_where_names_are_listed() -> None:
    portfolio = build_portfolio(support=build_single_arm("support", A))
    with pytest.raises(UnknownModel):
        choose(portfolio, "tiny", allow=frozenset({"support"}))
    assert [*portfolio.names(Tenant("t", allow=frozenset({"support"})))] == ["support"]
    assert [*portfolio.names(Tenant("t"))] == ["tiny", "support"]


def test_a_digest_that_begins_like_two_names_none() -> None:
    portfolio = build_portfolio(chat=[Arm("x", "x", A), Arm("y", "y", ALIKE)])
    with pytest.raises(UnknownModel):
        choose(portfolio, f"chat@sha256:{'a' * 20}")
    assert choose(portfolio, f"chat@sha256:{'a' * 21}") == ChosenModel("chat", A, "x")
    assert choose(portfolio, f"chat@sha256:{ALIKE.digest[:21]}") == ChosenModel("chat", ALIKE, "y")


def test_shares_are_right_over_many_users() -> None:
    """Chi-square with 3 degrees of freedom exceeds 16.27 once in a thousand. Draws are fixed, so the test is stable."""
    weights = (5.0, 3.0, 1.5, 0.5)
    n = 20_000
    arms = [Arm(f"r{i}", f"l{i}", None, weight) for i, weight in enumerate(weights)]
    for name in ("chat", "other"):
        counts = dict.fromkeys((arm.ref for arm in arms), 0)
        for user in range(n):
            counts[assign_arm(arms, name, "acme", f"user-{user}").ref] += 1
        expected = [n * weight / sum(weights) for weight in weights]
        assert sum((c - e) ** 2 / e for c, e in zip(counts.values(), expected, strict=True)) < 16.27


def test_a_user_stays_and_moves_only_to_what_is_new() -> None:
    arms = [Arm("r0", "a", A, 1), Arm("r1", "b", B, 1)]
    before = [assign_arm(arms, "chat", "t", str(user)).ref for user in range(2000)]
    assert before == [assign_arm(arms[::-1], "chat", "t", str(user)).ref for user in range(2000)]
    more_arms = [*arms, Arm("r2", "c", None, 0.5)]
    after = [assign_arm(more_arms, "chat", "t", str(user)).ref for user in range(2000)]
    assert {new for old, new in zip(before, after, strict=True) if old != new} == {"r2"}
    share = after.count("r2") / 2000
    assert abs(share - 0.2) < 4 * sqrt(0.2 * 0.8 / 2000)


def test_another_name_or_tenant_divides_users_anew() -> None:
    arms = [Arm("r0", "a", A), Arm("r1", "b", B)]
    first = [assign_arm(arms, "chat", "t", str(user)).ref for user in range(1000)]
    for name, tenant in (("other", "t"), ("chat", "s")):
        other_refs = [assign_arm(arms, name, tenant, str(user)).ref for user in range(1000)]
        assert 400 < sum(a == b for a, b in zip(first, other_refs, strict=True)) < 600


def test_the_arm_is_said_where_there_are_several_and_a_tenant_without_users_is_one() -> None:
    portfolio = build_portfolio(
        chat=[Arm("sft:a", "sft:a", A), Arm("base", "base", None)], support=build_single_arm("support", A)
    )
    choices = {choose(portfolio, "chat", str(user)) for user in range(50)}
    assert choices == {ChosenModel("chat", A, "sft:a"), ChosenModel("chat", None, "base")}
    assert len({choose(portfolio, "chat", None) for _ in range(50)}) == 1
    assert len({choose(portfolio, "chat", None, tenant=str(t)) for t in range(50)}) == 2
    assert choose(portfolio, "support").arm == ""


@pytest.fixture
def served(tmp_path: Path) -> Portfolio:
    for name, value in (("one", 1.0), ("two", 2.0)):
        write_exported_adapter(tmp_path / name, value=value)
    return Portfolio(BASE, METHOD, roots=[tmp_path])


def test_a_request_keeps_the_version_that_it_was_resolved_to(served: Portfolio) -> None:
    events = record_events(served)
    first = served.load("support", "one")
    choice = choose(served, "support")
    second = served.load("support", "two")
    assert (choice.version, choose(served, "support").version) == (first, second)
    assert first.digest != second.digest
    with pytest.raises(UnknownModel):
        choose(served, f"support@sha256:{first.digest}")
    served.unload("support")
    assert choice.version == first
    with pytest.raises(UnknownModel):
        choose(served, "support")
    with pytest.raises(Refusal) as caught:
        served.unload("support")
    assert (caught.value.status, caught.value.param) == (404, "lora_name")
    ready = "ready"
    gone = "gone"
    assert events == [(ready, first.digest), (ready, second.digest), (gone, first.digest), (gone, second.digest)]


def record_events(portfolio: Portfolio) -> list[tuple[str, str]]:
    events: list[tuple[str, str]] = []
    portfolio.on_new_version = lambda loaded: events.append(("ready", loaded.digest))
    portfolio.on_unused_version = lambda loaded: events.append(("gone", loaded.digest))
    return events


def test_weights_that_another_name_stands_for_are_not_gone(served: Portfolio) -> None:
    served.load("a", "one")
    served.load("b", "one")
    events = record_events(served)
    served.unload("a")
    assert events == []
    served.load("b", "one")  # the same again
    assert [kind for kind, _ in events] == ["ready"]
    events.clear()
    served.unload("b")
    assert len(events) == 1


def test_what_cannot_be_made_ready_leaves_the_name_as_it_was(served: Portfolio) -> None:
    first = served.load("support", "one")

    def raise_error(_: Version) -> None:
        raise InputError("adapter", "x", "is broken", "Train it again.")

    served.on_new_version = raise_error
    for name in ("support", "new"):
        with pytest.raises(InputError, match="is broken"):
            served.load(name, "two")
    assert choose(served, "support").version == first
    assert set(served.versions()) == {first.digest}


def test_names_that_follow_another(tmp_path: Path) -> None:
    for name, value in (("one", 1.0), ("two", 2.0)):
        write_exported_adapter(tmp_path / name, value=value)
    follows = [Arm("support", "support", None, 1.0, follows="support"), Arm("base", "base", None)]
    portfolio = Portfolio(BASE, METHOD, {"support": build_single_arm("support", A), "chat": follows}, [tmp_path])
    user = next(str(u) for u in range(50) if choose(portfolio, "chat", str(u)).arm == "support")
    assert choose(portfolio, "chat", user).version == A
    new = portfolio.load("support", "one")
    assert choose(portfolio, "chat", user).version == new
    for change in (lambda: portfolio.unload("support"), lambda: portfolio.load("chat", "two")):
        with pytest.raises(InputError, match=r"is the target of|refers to other names"):
            change()
    portfolio.unload("chat")
    portfolio.unload("support")


@pytest.mark.parametrize("name", ["", "a b", "../x", "a@b", "tiny", "base", "x" * 65, "a\n"])
def test_names_that_cannot_be_loaded(served: Portfolio, name: str) -> None:
    with pytest.raises(InputError) as caught:
        served.load(name, "one")
    assert caught.value.field == "lora_name"


@pytest.mark.parametrize(
    ("base", "said"),
    [
        (Base("pocket", "/x/pocket_model", None, ""), "pocket"),
        (Base("org/m", "/hub/abc", "abc", ""), "org/m"),
        (Base("/srv/models/llama", "/srv/models/llama", None, ""), "llama"),
        (Base("runs/full/mine", "/srv/runs/full/mine/artifact", None, ""), "mine"),
    ],
)
def test_the_base_is_called_by_no_path(base: Base, said: str) -> None:
    assert build_public_id(base) == said


def test_choices_and_changes_at_once(served: Portfolio) -> None:
    """A choice sees one of the two states, complete, while another thread changes the name."""
    digests = {served.load("support", name).digest for name in ("one", "two")}
    errors = []
    stop = threading.Event()

    def choose_until_stopped() -> None:
        while not stop.is_set():
            try:
                choice = choose(served, "support")
                assert choice.version is not None
                assert choice.version.digest in digests
            except BaseException as error:
                errors.append(error)

    threads = [threading.Thread(target=choose_until_stopped) for _ in range(4)]
    for thread in threads:
        thread.start()
    for i in range(60):
        served.load("support", ("one", "two")[i % 2])
        served.load("other", "one")
        served.unload("other")
    stop.set()
    for thread in threads:
        thread.join()
    assert not errors
