"""A stand-in for the API of the Hugging Face hub, over HTTP: repositories whose commits are folders of files."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class StandIn(ThreadingHTTPServer):
    """Serves on a free port of the loopback; `repositories` are lists of commits, each a file's content by its name."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, list[dict[str, bytes]]] = {}
        self.refused = 0  # commits refused because of another parent
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


def revision(files: dict[str, bytes], count: int) -> str:
    return hashlib.sha1(repr((count, sorted(files))).encode()).hexdigest()


class Handler(BaseHTTPRequestHandler):
    server: StandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, code: int, value: Any, headers: dict[str, str] | None = None) -> None:
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(code)
        for key, text in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(key, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def missing(self, kind: str) -> None:
        self.answer(404, {"error": kind}, {"X-Error-Code": kind})

    def commits(self, name: str) -> list[dict[str, bytes]] | None:
        return self.server.repositories.get(name)

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)/?(.*)", path):
            commits = self.commits(match[1])
            prefix = match[3].replace("%2F", "/").rstrip("/") + "/"
            entries = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in (commits[-1] if commits else {}).items()
                if name.startswith(prefix)
            ]
            if not entries:
                self.missing("EntryNotFound" if commits is not None else "RepoNotFound")
                return
            self.answer(200, entries)
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/[^/]+)?", path):
            commits = self.commits(match[1])
            if commits is None:
                self.missing("RepoNotFound")
                return
            self.answer(200, {"id": match[1], "sha": revision(commits[-1], len(commits)), "siblings": []})
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            commits = self.commits(match[1])
            if commits is None:
                self.missing("RepoNotFound")
                return
            content = commits[-1].get(match[3].replace("%2F", "/"))
            if content is None:
                self.missing("EntryNotFound")
                return
            etag = hashlib.sha256(content).hexdigest()
            commit = revision(commits[-1], len(commits))
            self.answer(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": commit})
        else:
            self.missing("EntryNotFound")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.partition("?")[0]
        if path == "/api/repos/create":
            value = json.loads(body)
            name = f"{value.get('organization') or 'user'}/{value['name']}"
            self.server.repositories.setdefault(name, [{}])
            self.answer(200, {"url": f"{self.server.url}/{name}"})
        elif path == "/api/validate-yaml":
            self.answer(200, {"errors": [], "warnings": []})
        elif path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            listed = [{"path": each["path"], "uploadMode": "regular", "shouldIgnore": False} for each in files]
            self.answer(200, {"files": listed})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            commits = self.server.repositories[match[1]]
            lines = [json.loads(line) for line in body.splitlines() if line.strip()]
            parent = next((line["value"].get("parentCommit") for line in lines if line["key"] == "header"), None)
            if parent and parent != revision(commits[-1], len(commits)):
                self.server.refused += 1
                self.answer(412, {"error": "A commit has happened since."})
                return
            files = dict(commits[-1])
            for line in lines:
                if line["key"] == "file":
                    files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            commits.append(files)
            oid = revision(files, len(commits))
            self.answer(200, {"commitUrl": f"{self.server.url}/{match[1]}/commit/{oid}", "commitOid": oid})
        else:
            self.missing("EntryNotFound")
