"""What a container does, in a sandbox that stands for one: commands that come first, the server, its checks, its end.
Runs by itself in the sandbox, told what to do as JSON; tests/e2e/test_deployed.py starts it and reads what it
prints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from typing import Any

URL = "http://127.0.0.1:8000"
BODY = {"model": "support", "prompt": "Hello", "max_tokens": 200, "ignore_eos": True, "stream": True}


def asked(path: str, key: str | None = None, body: Any = None) -> Any:
    """The response, of whatever status; None where nobody listens."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    data = None if body is None else json.dumps(body).encode()
    try:
        return urllib.request.urlopen(urllib.request.Request(URL + path, data, headers), timeout=60)
    except urllib.error.HTTPError as error:
        return error
    except OSError:
        return None


def healthy(check: list[str] | str, server: subprocess.Popen[str]) -> bool:
    """Waits for a health check: a command that ends well, or a path that answers 200."""
    until = time.monotonic() + 120
    while time.monotonic() < until and server.poll() is None:
        if isinstance(check, str):
            answer = asked(check)
            well = answer is not None and answer.status == 200
        else:
            well = subprocess.run(check, stderr=subprocess.DEVNULL).returncode == 0
        if well:
            return True
        time.sleep(0.5)
    return False


def writable(folder: str) -> bool:
    try:
        with open(os.path.join(folder, "written"), "w"):
            return True
    except OSError:
        return False


def main(before: list[list[str]], server: list[str], checks: list[list[str] | str], key: str | None) -> None:
    """Args:
    before: commands that run one after the other; the key is read from what they print, where none is given.
    """
    said = "".join(subprocess.run(words, check=True, capture_output=True, text=True).stdout for words in before)
    key = key or said.partition("the key, shown once: ")[2].partition("\n")[0]
    running = subprocess.Popen(server, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    found: dict[str, Any] = {"user": os.getuid()}
    found["writable"] = [folder for folder in ("/", "/data", sys.argv[2], "/data/exports") if writable(folder)]
    found["healthy"] = [healthy(check, running) for check in checks]
    if all(found["healthy"]):
        found["without a key"] = asked("/v1/models").status
        found["models"] = [model["id"] for model in json.load(asked("/v1/models", key))["data"]]
        with asked("/v1/completions", key, BODY) as stream:
            found["adapter"] = stream.headers["x-align-adapter"]
            stream.readline()
            running.terminate()  # as Docker and Kubernetes do, while it answers
            found["ended"] = stream.read().decode()[-200:]
    running.terminate()
    found["printed"], _ = running.communicate(timeout=60)
    print(json.dumps({**found, "status": running.returncode}))


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
