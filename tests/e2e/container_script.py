"""Run a container's commands in a sandbox: setup commands, then the server with its health checks and its end.

Runs as a script in the sandbox, with its arguments as JSON; tests/e2e/test_deployed.py starts it and reads its output.
"""

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


def send_request(path: str, key: str | None = None, body: Any = None) -> Any:
    """Send a request. Returns the response with any status, or None if no server listens."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    data = None if body is None else json.dumps(body).encode()
    try:
        return urllib.request.urlopen(urllib.request.Request(URL + path, data, headers), timeout=60)
    except urllib.error.HTTPError as error:
        return error
    except OSError:
        return None


def wait_until_healthy(check: list[str] | str, server: subprocess.Popen[str]) -> bool:
    """Wait until a health check passes: a command with exit status 0, or a path that answers 200."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and server.poll() is None:
        if isinstance(check, str):
            response = send_request(check)
            passed = response is not None and response.status == 200
        else:
            passed = subprocess.run(check, stderr=subprocess.DEVNULL).returncode == 0
        if passed:
            return True
        time.sleep(0.5)
    return False


def is_writable(folder: str) -> bool:
    try:
        with open(os.path.join(folder, "written"), "w"):
            return True
    except OSError:
        return False


def main(before: list[list[str]], server: list[str], checks: list[list[str] | str], key: str | None) -> None:
    """Run the commands and the server, and print a report as JSON.

    Args:
        before: commands to run first, in order; the API key is read from their output if no `key` is given.
    """
    setup_output = "".join(
        subprocess.run(command, check=True, capture_output=True, text=True).stdout for command in before
    )
    key = key or setup_output.partition("the key, shown once: ")[2].partition("\n")[0]
    process = subprocess.Popen(server, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    report: dict[str, Any] = {"user": os.getuid()}
    report["writable"] = [folder for folder in ("/", "/data", sys.argv[2], "/data/exports") if is_writable(folder)]
    report["healthy"] = [wait_until_healthy(check, process) for check in checks]
    if all(report["healthy"]):
        report["without a key"] = send_request("/v1/models").status
        report["models"] = [model["id"] for model in json.load(send_request("/v1/models", key))["data"]]
        with send_request("/v1/completions", key, BODY) as stream:
            report["adapter"] = stream.headers["x-align-adapter"]
            stream.readline()
            process.terminate()  # as Docker and Kubernetes do, during an answer
            report["ended"] = stream.read().decode()[-200:]
    process.terminate()
    report["printed"], _ = process.communicate(timeout=60)
    print(json.dumps({**report, "status": process.returncode}))


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
