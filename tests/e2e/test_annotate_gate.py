"""Access to the annotation app, and requests that are refused from visitors with access."""

from __future__ import annotations

import asyncio
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from align.annotate.accounts import Person
from align.annotate.store import Candidate, Store
from align.annotate.web.templating import STATIC
from align.core.errors import InputError
from align.core.types import Conversation, Message

PAGE = {"X-Align": "a page"}
KEY = {"Cookie": f"align_key_7861={'k' * 32}"}
UNCHANGED = {"version": 0, "mode": "work", "guidelines": None}
"""The terms of a project with unchanged settings."""
SCRIPTS = sorted(f"/align/{path.name}" for path in STATIC.glob("*.js"))


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory):
    from align.annotate.web.server import build_app
    from align.web.key_link import KeyAuthenticator

    folder: Path = tmp_path_factory.mktemp("gate")
    with Store.open(f"sqlite:///{folder / 'annotations.db'}") as store:
        for i in range(5):
            prompt = Conversation((Message("user", f"q{i}"),))
            store.add_item("p", f"{i}", prompt, [Candidate("yes", "model-x", "adapter-y"), Candidate("no")])
        authenticator = KeyAuthenticator("k" * 32, Person("ann", {"p": "annotator"}), "align_key_7861")
        app = build_app(store, authenticator, ["http://127.0.0.1:7861", "http://localhost:7861"])
        client = TestClient(app, base_url="http://127.0.0.1:7861", follow_redirects=False)
        yield client


@pytest.mark.parametrize("key", ["", "short"])
def test_a_key_that_keeps_nobody_out_is_refused(key):
    from align.web.key_link import KeyAuthenticator

    with pytest.raises(InputError, match="too short"):
        KeyAuthenticator(key, Person("ann", {}), "c")


def test_the_link_gives_a_cookie_that_no_script_and_no_other_site_has(client):
    answer = client.get(f"/?key={'k' * 32}")
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    assert {"HttpOnly", "SameSite=Strict"} <= set(answer.headers["set-cookie"].split("; "))
    client.cookies.clear()


@pytest.mark.parametrize("path", ["/", "/api/task", "/api/project", SCRIPTS[0], "/config", "/gradio_api/info", "/docs"])
@pytest.mark.parametrize("cookie", [None, "", "wrong", "k" * 31])
def test_without_the_key_nothing_is_to_be_had(client, path, cookie):
    client.cookies.clear()
    headers = {} if cookie is None else {"Cookie": f"align_key_7861={cookie}"}
    assert client.get(path, headers=headers).status_code == 403
    assert client.get(f"{path}?key=wrong", headers=headers).status_code == 403
    assert client.post(path, headers=headers | PAGE, json={}).status_code == 403


@pytest.mark.parametrize("host", ["evil.example:7861", "127.0.0.1", "localhost:80"])
def test_another_name_is_refused_though_the_cookie_is_right(client, host):
    assert client.get("/api/task", headers={"Host": host, **KEY}).status_code == 421


@pytest.mark.parametrize("path", ["/api/vote", "/api/undo", "/api/draft", "/api/renew"])
def test_what_a_form_of_another_site_could_send_is_refused(client, path):
    for headers, content in (
        (KEY, b"{}"),
        (KEY | {"Content-Type": "application/json"}, b"{}"),
        (KEY | PAGE | {"Content-Type": "text/plain"}, b"{}"),
        (KEY | PAGE | {"Content-Type": "application/json"}, b" " * 1_000_001),
    ):
        assert client.post(path, headers=headers, content=content).status_code == 415


def test_a_page_of_another_project_is_told_to_keep_what_it_has(client):
    headers = {**KEY, "X-Align": "another", "Content-Type": "application/json"}
    assert client.post("/api/vote", headers=headers, json={}).status_code == 403


@pytest.mark.parametrize("path", ["/", "/api/task", "/gradio_api/info"])
def test_another_port_of_this_machine_is_another_page(client, path):
    assert client.get(path, headers=KEY | {"Origin": "http://localhost:3000"}).status_code == 403
    assert client.get("/api/projects", headers=KEY | {"Origin": "http://127.0.0.1:7861"}).status_code == 200


@pytest.mark.parametrize("other", ['foo={"a": "b"}', "p=a b", "x", "a[b]=1", "a/b=1", "align_key=old"])
def test_other_programs_cookies_lock_nobody_out(client, other):
    client.cookies.clear()
    headers = {"Cookie": f"{other}; align_key_7861={'k' * 32}"}
    assert client.get("/api/projects", headers=headers).status_code == 200


def test_every_answer_forbids_what_it_can_and_scripts_are_called_scripts(client):
    assert "/align/rank.js" in SCRIPTS
    for path in ("/", "/api/projects", *SCRIPTS):
        answer = client.get(path, headers=KEY)
        assert answer.status_code == 200
        assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cache-control"] == "no-store"  # after an upgrade no old script meets a new one
        media_type = answer.headers["content-type"].split(";")[0]
        assert path not in SCRIPTS or media_type in ("text/javascript", "application/javascript")


@pytest.fixture
def ask(client):
    def send_request(path: str, body: dict | None = None):
        headers = KEY | {"X-Align": client.get("/api/projects", headers=KEY).json()["projects"][0]["id"]}
        return client.get(path, headers=headers) if body is None else client.post(path, headers=headers, json=body)

    return send_request


def test_an_item_says_nothing_of_who_wrote_what(ask):
    text = ask("/api/task").text
    task = ask("/api/task").json()["task"]
    assert not any(word in text for word in ("model-x", "adapter-y", "gold", "purpose"))
    assert len(task["answers"]) == 2


@pytest.mark.parametrize(
    "said",
    [
        {"tiers": [[0], [2]]},
        {"tiers": [[0], [0, 1]]},
        {"tiers": [[0], [1]], "strength": 9},
        {"tiers": [[0], [1]], "ratings": {"²": {"nope": 1}}},
        {"tiers": [[0], [1]], "flagged": [7]},
        {"skipped": "because I am Ann"},
        {"tiers": [[0], [1]], "rationale": "x" * 20_001},
        {"tiers": [[0], [1]], "purpose": "gold"},
        {},
    ],
)
def test_a_vote_that_makes_no_sense_is_refused_and_leaves_the_item(ask, said):
    step = ask("/api/task").json()
    task = step["task"]
    answer = ask("/api/vote", {"token": task["token"], "key": "0" * 32, "terms": step["terms"], "said": said})
    assert answer.status_code == 422
    assert ask("/api/task").json()["task"]["token"] == task["token"]


def test_a_vote_sent_twice_counts_once_and_brings_the_next(ask):
    task = ask("/api/task").json()["task"]
    vote = {"tiers": [[1], [0]], "strength": 2, "seconds": 3.5}
    body = {"token": task["token"], "key": "1" * 32, "terms": UNCHANGED, "said": vote}
    first = ask("/api/vote", body).json()
    second = ask("/api/vote", body).json()
    assert first["seq"] == second["seq"]
    assert first["task"]["token"] == second["task"]["token"] != task["token"]
    conflict = ask("/api/vote", body | {"key": "2" * 32})
    assert conflict.status_code == 409
    undone = ask("/api/undo", {"seq": first["seq"]}).json()["task"]
    assert undone["token"] == task["token"]
    assert (undone["draft"]["tiers"], undone["draft"]["strength"]) == ([[1], [0]], 2)


def test_a_taken_port_is_named_and_answers_do_not_wait_for_acknowledgements():
    from align.web.server import open_listener

    with open_listener("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        taken.listen()
        with pytest.raises(InputError, match="it cannot be had"):
            open_listener("127.0.0.1", port)

        async def read_no_delay_option() -> int:
            accepted = asyncio.get_running_loop().create_future()
            server = await asyncio.start_server(lambda _, writer: accepted.set_result(writer), sock=taken)
            _, client_writer = await asyncio.open_connection("127.0.0.1", port)
            server_writer = await accepted
            client_writer.close()
            server.close()
            return server_writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)

        with ThreadPoolExecutor(1) as executor:  # this thread may have a loop of its own already
            assert executor.submit(asyncio.run, read_no_delay_option()).result() != 0


def test_gradios_heartbeat_is_not_to_be_had_and_no_page_asks_for_it(client):
    from align.annotate.web.manage import Manager, build_manage_page
    from align.annotate.web.server import build_page

    for start in ("", "/manage"):
        assert client.get(f"{start}/gradio_api/heartbeat/x", headers=KEY).status_code == 404
    with Store.open("sqlite://") as store:
        manager = Manager(store, None, None, "http://127.0.0.1")  # type: ignore[arg-type]
        for page in (build_page(), build_manage_page(manager)):
            assert page.get_config_file()["connect_heartbeat"] is False


def test_one_person_has_so_many_answers_without_an_end_and_all_of_them_so_many():
    from align.annotate.web.access import STREAMS, require_login
    from align.web.key_link import KeyAuthenticator

    async def stream_endlessly(scope, receive, send):
        content_type = b"text/event-stream; charset=utf-8" if scope["path"] == "/stream" else b"text/plain"
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", content_type)]})
        while (await receive())["type"] != "http.disconnect":
            pass
        await send({"type": "http.response.body", "body": b""})

    people = {name * 32: Person(name, {"p": "annotator"}) for name in "abc"}

    class ThreeKeys(KeyAuthenticator):
        def find_visitor(self, cookies):
            return people.get(cookies.get("c", ""))

    gate = require_login(
        stream_endlessly, ThreeKeys("k" * 32, people["a" * 32], "c"), ["http://x"], streams=STREAMS + 2
    )

    async def request_stream(name: str, path: str, is_over: asyncio.Event, statuses: list[int]) -> None:
        async def receive():
            await is_over.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            statuses.extend([message["status"]] if "status" in message else [])

        headers = [(b"host", b"x"), (b"cookie", f"c={name * 32}".encode())]
        scope = {"type": "http", "method": "GET", "path": path, "query_string": b"", "headers": headers}
        await gate(scope, receive, send)

    async def start_request(name: str, path: str, is_over: asyncio.Event) -> tuple[list[int], asyncio.Task[None]]:
        statuses: list[int] = []
        task = asyncio.create_task(request_stream(name, path, is_over, statuses))
        while not statuses:
            await asyncio.sleep(0)
        return statuses, task

    async def open_streams() -> list[list[int]]:
        is_over = asyncio.Event()
        requests = (
            [("a", "/stream")] * (STREAMS + 1) + [("a", "/plain")] * 3 + [("b", "/stream")] * 2 + [("c", "/stream")]
        )
        answers = [await start_request(name, path, is_over) for name, path in requests]
        is_over.set()
        await asyncio.gather(*(task for _, task in answers))
        assert gate.streams.total() == 0
        is_over.clear()
        last = await start_request("a", "/stream", is_over)
        is_over.set()
        await last[1]
        return [statuses for statuses, _ in [*answers, last]]

    with ThreadPoolExecutor(1) as executor:  # this thread may have a loop of its own already
        answers = executor.submit(asyncio.run, open_streams()).result()
    assert answers == [[200]] * STREAMS + [[429]] + [[200]] * 5 + [[429]] + [[200]]


@pytest.mark.parametrize(
    "path", ["/gradio_api/upload", "/gradio_api/queue/join", "/login", "//api/vote", "/api%2fvote"]
)
def test_gradios_own_routes_change_nothing(client, path):
    headers = {"Cookie": f"align_key_7861={'k' * 32}", **PAGE}
    assert client.post(path, headers=headers, json={}).status_code in (403, 415, 404)
    assert client.post(path, headers=headers, files={"files": b"x"}).status_code == 415


def test_another_annotators_token_is_of_no_use(ask):
    for path, fields in (
        ("vote", {"key": "0" * 32, "terms": UNCHANGED, "said": {"tiers": [[0], [1]]}}),
        ("renew", {}),
        ("draft", {"draft": {}}),
    ):
        assert ask(f"/api/{path}", {"token": "t" * 32, **fields}).status_code == 422
    assert ask("/api/undo", {"seq": 1}).status_code == 422
