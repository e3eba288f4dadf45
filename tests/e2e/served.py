"""The real server as a child process, driven over a real socket."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.request
from typing import Any


class Server:
    """A running ``haast serve`` on a free port."""

    def __init__(self, *arguments: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "engine.cli.main", "serve", "--port", "0", *arguments],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "HAAST_API_KEY": ""},
        )
        self.lines: list[str] = []
        self._address = threading.Event()
        self.url = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stderr is not None
        with self._process.stderr as stream:
            for line in stream:
                self.lines.append(line)
                found = re.search(r"Ready on (http://\S+)", line)
                if found:
                    self.url = found[1].rstrip(",")
                    self._address.set()
        self._address.set()

    def wait(self) -> None:
        assert self._address.wait(120), "the server was not ready within two minutes"
        assert self.url, "the server ended: " + "".join(self.lines[-5:])

    def post(self, path: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        return urllib.request.urlopen(request, timeout=120)

    def open(self, path: str) -> Any:
        return urllib.request.urlopen(self.url + path, timeout=120)

    def chat(self, **body: Any) -> dict[str, Any]:
        """A conversation of one message, ``prompt``, unless ``messages`` are given."""
        if "prompt" in body:
            body["messages"] = [{"role": "user", "content": body.pop("prompt")}]
        with self.post("/v1/chat/completions", {"max_tokens": 48, **body}) as response:
            answer: dict[str, Any] = json.load(response)
            return answer

    def stop(self) -> int:
        self._process.send_signal(signal.SIGTERM)
        code = self._process.wait(60)
        self._reader.join(10)
        return code


def events(response: Any) -> list[Any]:
    """The data of a server-sent event stream, decoded but for [DONE]."""
    found = []
    for raw in response:
        line = raw.decode().strip()
        if line.startswith("data: "):
            found.append(line[6:] if line[6:] == "[DONE]" else json.loads(line[6:]))
    return found
