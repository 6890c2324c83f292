"""Accounts over HTTP: invitations, logging in and out, and the requests that each role may send."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex
from typing import NamedTuple

import pytest
from argon2 import PasswordHasher
from starlette.testclient import TestClient
from starlette.types import ASGIApp

from align.annotate.accounts import Accounts
from align.annotate.store import Candidate, Judgement, Store, configure_project
from align.annotate.store.ledger import read_quarantined
from align.core.errors import StorageError
from align.core.types import Conversation, Message

GOOD = "correct horse battery"
URL = "https://annotate.example.org"
FROM_PAGE = {"Origin": URL}
UNCHANGED = {"version": 0, "mode": "work", "guidelines": None}
"""The terms of a project with unchanged settings."""


class Site(NamedTuple):
    """The app on a store with two projects."""

    store: Store
    accounts: Accounts
    app: ASGIApp

    def browser(self) -> TestClient:
        """Return a new browser."""
        return TestClient(self.app, base_url=URL, follow_redirects=False)

    def someone(self, name: str, role: str = "annotator", project: str = "p") -> TestClient:
        """Return a browser that is logged in to a new account."""
        client = self.browser()
        form = {"token": self.accounts.invite(project, role), "name": name, "password": GOOD, "again": GOOD}
        assert client.post("/invite", data=form, headers=FROM_PAGE).headers["location"] == "/"
        return client


@contextmanager
def open_site(folder: Path) -> Iterator[Site]:
    from align.annotate.web.access import AccountAuthenticator
    from align.annotate.web.server import build_app

    with Store.open(f"sqlite:///{folder / 'annotations.db'}") as store:
        for project in ("p", "q"):
            for i in range(4):
                prompt = Conversation((Message("user", f"{project}{i}"),))
                store.add_item(project, f"{i}", prompt, [Candidate("yes"), Candidate("no")])
        accounts = Accounts(store, hasher=PasswordHasher(time_cost=1, memory_cost=8, parallelism=1))
        authenticator = AccountAuthenticator(accounts, "align_session_7861")
        yield Site(store, accounts, build_app(store, authenticator, [URL]))


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with open_site(tmp_path) as site:
        yield site


@pytest.fixture
def store(site: Site) -> Store:
    return site.store


@pytest.fixture
def accounts(site: Site) -> Accounts:
    return site.accounts


@pytest.fixture
def browser(site: Site) -> Callable[[], TestClient]:
    return site.browser


@pytest.fixture
def someone(site: Site) -> Callable[..., TestClient]:
    return site.someone


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A site for requests that are refused: building the app takes longer than a hundred requests."""
    with open_site(tmp_path_factory.mktemp("site")) as site:
        yield site


@pytest.fixture(scope="module")
def ann(shared: Site) -> TestClient:
    return shared.someone("ann")


def read_project_ids(client: TestClient) -> dict[str, str]:
    return {row["name"]: row["id"] for row in client.get("/api/projects").json()["projects"]}


def send_request(client: TestClient, path: str, body: dict | None = None, project: str = "p"):
    headers = {"X-Align": read_project_ids(client)[project]}
    return client.get(path, headers=headers) if body is None else client.post(path, headers=headers, json=body)


def test_an_invitation_makes_an_account_and_its_cookie_no_script_sees(browser, accounts):
    client = browser()
    token = accounts.invite("p", "annotator")
    page = client.get("/invite", params={"token": token})
    assert (page.status_code, "project p as annotator" in page.text) == (200, True)
    form = {"token": token, "name": "Ann", "password": GOOD, "again": GOOD}
    answer = client.post("/invite", data=form, headers=FROM_PAGE)
    assert {"HttpOnly", "SameSite=Lax", "Secure", "Path=/"} <= set(answer.headers["set-cookie"].split("; "))
    assert client.get("/api/projects").json()["person"] == "ann"
    assert send_request(client, "/api/task").json()["task"]["answers"]
    reused = browser().post("/invite", data=form, headers=FROM_PAGE)
    assert (reused.status_code, "expired or was used" in reused.text) == (403, True)


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/", 303),
        ("/logout", 303),
        ("/manage", 303),
        ("/manage/", 303),
        ("/password", 303),
        ("/docs", 401),
        ("/api/projects", 401),
        ("/api/task", 401),
        ("/align/rank.js", 401),
        ("/config", 401),
        ("/openapi.json", 401),
        ("/manage/config", 401),
        ("/gradio_api/info", 401),
        ("/manage/gradio_api/queue/data?session_hash=x", 401),
    ],
)
@pytest.mark.parametrize("cookie", [None, "align_session_7861=", f"align_session_7861={'x' * 43}"])
def test_a_stranger_gets_the_log_in_page_and_nothing_else(shared, path, status, cookie):
    answer = shared.browser().get(path, headers={} if cookie is None else {"Cookie": cookie})
    assert answer.status_code == status
    assert status != 303 or answer.headers["location"] == "/login"
    assert shared.browser().get("/login").status_code == 200


def test_log_in_and_out(someone, browser):
    someone("ann")
    client = browser()
    wrong = client.post("/login", data={"name": "ann", "password": "wrong"}, headers=FROM_PAGE)
    assert (wrong.status_code, "no such name and password" in wrong.text) == (403, True)
    answer = client.post("/login", data={"name": "ann", "password": GOOD}, headers=FROM_PAGE)
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    cookies = dict(client.cookies)
    assert client.post("/logout", data={"yes": "1"}, headers=FROM_PAGE).headers["location"] == "/login"
    stolen = browser()
    stolen.cookies.update(cookies)
    assert stolen.get("/api/projects").status_code == 401  # the session is over, not only forgotten by the browser


@pytest.mark.parametrize("path", ["/login", "/logout", "/invite", "/password"])
@pytest.mark.parametrize(
    "origin", [{}, {"Origin": "null"}, {"Origin": "https://evil.example"}, {"Origin": "http://annotate.example.org"}]
)
def test_a_form_of_another_site_is_refused(ann, path, origin):
    assert ann.post(path, data={"name": "ann", "password": GOOD}, headers=origin).status_code in (403, 415)
    assert ann.get("/api/projects").status_code == 200


def test_a_form_is_a_form_and_no_larger_than_one(shared):
    assert shared.browser().post("/login", json={"name": "ann"}, headers=FROM_PAGE).status_code == 415
    assert shared.browser().post("/login", data={"name": "x" * 30_000}, headers=FROM_PAGE).status_code == 415
    assert shared.browser().post("/login", files={"name": b"x"}, headers=FROM_PAGE).status_code == 415


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "</title><b>"])
def test_what_somebody_types_is_shown_as_text(shared, name):
    token = shared.accounts.invite("p", "annotator")
    form = {"name": name, "password": "x", "again": "y", "token": token}
    for path in ("/login", "/invite"):
        text = shared.browser().post(path, data=form, headers=FROM_PAGE).text
        assert name not in text
        assert not re.search(r"<(script|img|b)\b", text)
    assert name not in shared.browser().get("/login", params={"invite": name}).text


@pytest.mark.parametrize("invite", ["https://evil.example", "//evil.example", "\r\nSet-Cookie: a=b"])
@pytest.mark.usefixtures("ann")
def test_a_log_in_leads_nowhere_else(shared, invite):
    form = {"name": "ann", "password": GOOD, "invite": invite}
    answer = shared.browser().post("/login", data=form, headers=FROM_PAGE)
    assert answer.headers["location"].startswith("/invite?token=")


def test_a_project_of_others_is_none_of_theirs(someone):
    ann = someone("ann")
    bob = someone("bob", project="q")
    project_id = read_project_ids(bob)["q"]
    assert ann.get("/api/task", headers={"X-Align": project_id}).status_code == 403
    assert ann.post("/api/vote", headers={"X-Align": project_id}, json={}).status_code == 403


def test_anothers_lease_and_vote_cannot_be_used(someone, store):
    ann = someone("ann")
    bob = someone("bob")
    task = send_request(ann, "/api/task").json()["task"]
    assert send_request(bob, "/api/task").json()["task"]["token"] != task["token"]
    body = {"token": task["token"], "key": "1" * 32, "terms": UNCHANGED, "said": {"tiers": [[0], [1]], "strength": 1}}
    assert send_request(bob, "/api/vote", body).status_code == 422
    for path in ("renew", "draft"):
        fields = {"draft": {}} if path == "draft" else {}
        assert send_request(bob, f"/api/{path}", {"token": task["token"], **fields}).status_code == 422
    assert send_request(bob, f"/api/difference?token={task['token']}&a=0&b=1").status_code == 422
    seq = send_request(ann, "/api/vote", body).json()["seq"]
    assert send_request(bob, "/api/undo", {"seq": seq}).status_code == 422
    assert len(store.rankings("p")) == 1


@pytest.mark.parametrize("path", ["/api/vote", "/api/task", "/manage/gradio_api/queue/join", "/password"])
def test_a_stranger_posts_nothing(shared, path):
    response = shared.browser().post(path, json={}, headers=FROM_PAGE | {"X-Align": "x"})
    assert response.status_code in (303, 401)


def test_an_invitation_for_another_account_offers_to_log_out_first(someone, accounts):
    client = someone("ann")
    token = accounts.invite("p", "annotator", "bob")
    page = client.get(f"/invite?token={token}").text
    assert "I am not ann" in page
    assert "Join as" not in page
    response = client.post("/logout", data={"invite": token}, headers=FROM_PAGE)
    assert response.headers["location"] == f"/invite?token={token}"
    assert "new-password" in client.get(f"/invite?token={token}").text


def test_a_vote_of_somebody_who_was_removed_counts_after_a_new_invitation(someone, accounts):
    ann = someone("ann")
    headers = {"X-Align": read_project_ids(ann)["p"]}
    token = send_request(ann, "/api/task").json()["task"]["token"]
    vote = {"token": token, "key": "1" * 32, "terms": UNCHANGED, "said": {"tiers": [[0], [1]]}}
    accounts.set_role("p", "ann", None)
    assert ann.post("/api/vote", headers=headers, json=vote).status_code == 401
    accounts.accept(accounts.invite("p", "annotator", "ann"), "ann", GOOD)
    ann.post("/login", data={"name": "ann", "password": GOOD}, headers=FROM_PAGE)
    assert ann.post("/api/vote", headers=headers, json=vote).status_code == 200


def test_half_a_character_in_a_vote_is_refused_with_its_field(someone):
    ann = someone("ann")
    token = send_request(ann, "/api/task").json()["task"]["token"]
    judgement = {"tiers": [[1], [0]], "rationale": "cut \ud83d"}
    vote = {"token": token, "key": "3" * 32, "terms": UNCHANGED, "said": judgement}
    headers = {"X-Align": read_project_ids(ann)["p"], "Content-Type": "application/json"}
    response = ann.post("/api/vote", headers=headers, content=json.dumps(vote))
    assert response.status_code == 422
    assert response.json()["field"] == "said.rationale"


def test_disagreements_are_settled_by_reviewers_only(someone, store, accounts):
    ann = someone("ann")
    bob = someone("bob")
    reviewer = someone("rev", "reviewer")
    configure_project(store, "p", {"overlap": 2})
    for client, preferred in ((ann, "yes"), (bob, "no")):
        for _ in range(4):
            step = send_request(client, "/api/task").json()
            token = step["task"]["token"]
            answers = step["task"]["answers"]
            first = next(place for place, answer in enumerate(answers) if preferred in answer["html"])
            judgement = {"tiers": [[first], [1 - first]], "strength": 1}
            vote = {"token": token, "key": token_hex(16), "terms": step["terms"], "said": judgement}
            assert send_request(client, "/api/vote", vote).is_success
    assert send_request(ann, "/api/review").status_code == 403
    step = send_request(reviewer, "/api/review").json()
    assert len(step["task"]["others"]) == 2
    judgement = {"tiers": [[0], [1]], "strength": 3}
    vote = {"token": step["task"]["token"], "key": "1" * 32, "terms": step["terms"], "said": judgement}
    accounts.set_role("p", "rev", "annotator")
    assert send_request(reviewer, "/api/vote", vote).status_code == 403
    accounts.set_role("p", "rev", "reviewer")
    assert send_request(reviewer, "/api/vote", vote).json()["seq"] == store.rankings("p")[-1].seq
    assert store.rankings("p")[-1].purpose == "review"


@pytest.mark.parametrize("role", ["annotator", "reviewer", "admin"])
def test_the_managers_pages_are_for_them(someone, role):
    client = someone("ann", role)
    status = 403 if role == "annotator" else 200
    for path in ("/manage/", "/manage/config", "/manage/gradio_api/info"):
        assert client.get(path).status_code == status
    assert client.get("/api/projects").json()["manages"] is (role != "annotator")


def call_function(client: TestClient, fn: str, data: list) -> str:
    """Call a function of the managers' page as its script does: join the queue and return the events. The queue works
    while the client is open, in one event loop."""
    config = client.get("/manage/config").json()
    index = next(d["id"] for d in config["dependencies"] if d["api_name"] == fn)
    session = token_hex(8)
    body = {"data": data, "fn_index": index, "session_hash": session, "trigger_id": None, "event_data": None}
    response = client.post("/manage/gradio_api/queue/join", json=body, headers=FROM_PAGE)
    if response.status_code != 200:
        return response.text
    return client.get("/manage/gradio_api/queue/data", params={"session_hash": session}).text


def test_a_reviewer_may_look_and_not_manage(someone, accounts):
    with someone("ann", "reviewer") as client:
        check_read_only(client, accounts)


def check_read_only(client: TestClient, accounts: Accounts) -> None:
    accounts.invite("p", "annotator")
    for fn, data in (
        ("revoke", ["p", accounts.list_invitations("p")[0].id]),
        ("invite", ["p", "admin", ""]),
        ("change", ["p", "ann", "admin"]),
        ("publish", ["p", "x"]),
        ("quarantine", ["p", "somebody"]),
        ("release", ["p", "somebody"]),
    ):
        assert "for admins of the project" in call_function(client, fn, data)
    assert accounts.list_members("p") == {"ann": "reviewer"}
    assert len(accounts.list_invitations("p")) == 1
    accounts.accept(accounts.invite("p", "annotator"), "somebody", GOOD)
    for fn in ("overview", "project"):  # the page calls these by itself, and reviewers see nothing of others
        loaded = call_function(client, fn, ["p"])
        assert "process_completed" in loaded
        assert not any(word in loaded for word in ("somebody", "for admins", accounts.list_invitations("p")[0].id))


def test_alarms_are_raised_and_an_annotator_is_left_out_in_the_browser(someone, store):
    """Three annotators agree on 24 items; a fourth, with a name of markup, always prefers the first answer shown."""
    for i in range(24):
        item = store.add_item(
            "p", f"alarm {i}", Conversation((Message("user", f"{i}"),)), [Candidate("a"), Candidate("b")]
        )
        ids = [f"{item}-{(i + k) % 2}" for k in range(2)]
        for name in ("one", "two", "three", "<b>side</b>"):
            shown = ids if i % 3 else ids[::-1]
            tiers = tuple((id,) for id in (shown if "side" in name else ids))
            judgement = Judgement(tiers, display_order=tuple(shown))
            store.record("p", item, judgement, annotator=name, key=f"{name} {i}")
    pseudonym = store.pseudonym("p", "<b>side</b>")
    with someone("rev", "reviewer") as client:
        shown = call_function(client, "alarms", ["p"])
        assert "prefers one side of the screen" in shown
        assert "<td>&lt;b&gt;side&lt;/b&gt;</td>" in shown
        assert "for admins" in call_function(client, "quarantine", ["p", pseudonym])
        assert "for admins" in call_function(client, "alarms", ["q"])
    with someone("boss", "admin") as client:
        assert f"({pseudonym})" in call_function(client, "annotators", ["p"])
        assert f"({pseudonym}, in quarantine)" in call_function(client, "quarantine", ["p", "<b>side</b>"])
        with store.reading() as db:
            assert read_quarantined(db, "p") == {pseudonym}
        shown = call_function(client, "alarms", ["p"])
        assert "prefers one side" not in shown
        assert "<td>three</td>" in shown
        assert "in quarantine already" in call_function(client, "quarantine", ["p", pseudonym])
        assert f"({pseudonym})" in call_function(client, "release", ["p", pseudonym])
        assert "prefers one side of the screen" in call_function(client, "alarms", ["p"])
        for annotator in ("", "nobody", None, ["one"]):
            assert "Annotator:" in call_function(client, "quarantine", ["p", annotator])
        with store.reading() as db:
            assert not read_quarantined(db, "p")


def test_an_admin_of_one_project_is_none_of_another(someone, accounts, store):
    with someone("ann", "admin") as client:
        assert "for admins of the project" in call_function(client, "invite", ["q", "admin", ""])
        link = re.search(rf"{URL}/invite\?token=([\w-]+)", call_function(client, "invite", ["p", "reviewer", ""]))
    assert link is not None
    assert accounts.find_invitation(link[1]).role == "reviewer"


@pytest.mark.parametrize("path", ["upload", "run/invite", "call/invite", "api/invite", "component_server", "stream/1"])
def test_gradios_other_ways_in_are_closed(shared, path):
    client = shared.someone(f"admin {path}", "admin")
    for start in ("/manage/gradio_api", "/gradio_api"):
        assert client.post(f"{start}/{path}", json={"data": []}, headers=FROM_PAGE).status_code == 415
    assert client.post("/gradio_api/queue/join", json={}, headers=FROM_PAGE).status_code == 415
    assert client.get("/gradio_api/proxy=https://example.org/").status_code == 404


def test_figures_are_for_reviewers_of_the_project(someone):
    ann = someone("ann")
    rev = someone("rev", "reviewer")
    for path in ("/manage/figures.json", "/manage/people.csv"):
        assert ann.get(path, params={"project": "p"}).status_code == 403
        assert rev.get(path, params={"project": "q"}).status_code == 403
        assert rev.get(path, params={"project": "p"}).status_code == 200
    assert rev.get("/manage/figures.json", params={"project": "p"}).json()["agreement"]["alpha"].startswith("undefined")
    assert "attachment" in rev.get("/manage/people.csv", params={"project": "p"}).headers["content-disposition"]


def test_the_printed_links_project_is_kept_over_the_log_in(someone, browser):
    someone("ann")
    client = browser()
    location = client.get("/", params={"project": "p&q=/x"}).headers["location"]
    assert location == "/login?project=p%26q%3D%2Fx"
    assert 'name="project" value="p&amp;q=/x"' in client.get(location).text
    form = {"name": "ann", "password": GOOD, "project": "p&q=/x"}
    assert client.post("/login", data=form, headers=FROM_PAGE).headers["location"] == "/?project=p%26q%3D%2Fx"


def test_strangers_do_not_read_what_the_database_says(browser, store, monkeypatch):
    client = browser()

    def raise_storage_error():
        raise StorageError("store.url", "secret", "the secret database is down", "Mend it.")

    monkeypatch.setattr(store, "reading", raise_storage_error)
    answers = [
        client.get("/api/projects", headers={"Cookie": "align_session_7861=x"}),
        client.get("/invite?token=x"),
        client.post("/login", data={"name": "ann", "password": GOOD}, headers=FROM_PAGE),
    ]
    assert [answer.status_code for answer in answers] == [503] * 3
    assert not any("secret" in answer.text for answer in answers)


def test_a_body_whose_length_is_not_said_is_refused(someone):
    client = someone("ann")
    headers = {"X-Align": read_project_ids(client)["p"], "Content-Type": "application/json"}
    for length_headers in ({"Transfer-Encoding": "chunked"}, {"Transfer-Encoding": "chunked", "Content-Length": "5"}):
        assert client.post("/api/vote", headers=headers | length_headers, content=iter([b"{}"])).status_code == 415


def test_a_cookie_in_two_headers_is_read(someone):
    client = someone("ann")
    session = client.cookies["align_session_7861"]
    client.cookies.clear()
    headers = [("Cookie", f"align_session_7861={session}"), ("Cookie", "other=1")]
    assert client.get("/api/projects", headers=headers).status_code == 200


def test_another_password(someone, browser):
    client = someone("ann")
    other_client = browser()
    other_client.post("/login", data={"name": "ann", "password": GOOD}, headers=FROM_PAGE)
    form = {"old": GOOD, "password": "another good one", "again": "another good one"}
    mismatch = client.post("/password", data=form | {"again": "another"}, headers=FROM_PAGE)
    assert (mismatch.status_code, "differ" in mismatch.text) == (422, True)
    assert client.post("/password", data=form, headers=FROM_PAGE).status_code == 303
    assert client.get("/api/projects").status_code == 200
    assert other_client.get("/api/projects").status_code == 401
