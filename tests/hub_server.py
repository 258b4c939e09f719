"""A small Hub on this machine: the endpoints that huggingface_hub calls to push and to download.

Repositories live in memory. Accounts are tokens: token -> the user whose repositories it may write.
Faults are injected by route, see `Fault`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlparse

import yaml


@dataclass
class Repository:
    """Branches of files; a commit is a dictionary from path to content."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    lfs: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.branches["main"] = self.add({}, "start")

    def add(self, files: dict[str, bytes], message: str) -> str:
        sha = hashlib.sha1(f"{len(self.commits)}{message}".encode()).hexdigest()
        self.commits[sha] = files
        return sha

    def resolve(self, revision: str) -> str | None:
        sha = self.branches.get(revision, revision)
        return sha if sha in self.commits else None


@dataclass
class Fault:
    """What goes wrong: requests that match `route` (regular expression on "METHOD /path").

    `status` is answered, or with `status=None` the connection is dropped half way through the body.
    """

    route: str
    status: int | None = 500
    times: int = 1000


@dataclass
class LocalHub:
    """The state of the server; tests read and change it."""

    endpoint: str = ""
    accounts: dict[str, str] = field(default_factory=lambda: {"hf_me": "me"})
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        repository = self.repositories[repo_id]
        return repository.commits[repository.resolve(revision) or ""]

    def called(self, route: str) -> int:
        return sum(re.search(route, call) is not None for call in self.calls)


class Refused(Exception):
    def __init__(self, status: int, code: str = "", message: str = "refused") -> None:
        self.status, self.code, self.message = status, code, message


class Dropped(Exception):
    pass


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LocalHub
    routes: tuple[tuple[str, str], ...] = (
        (r"POST /api/repos/create", "create"),
        (r"POST /api/validate-yaml", "validate"),
        (r"POST /api/models/([^/]+/[^/]+)/branch/(.+)", "branch"),
        (r"POST /api/models/([^/]+/[^/]+)/preupload/(.+)", "preupload"),
        (r"POST /api/models/([^/]+/[^/]+)/commit/(.+)", "commit"),
        (r"POST /([^/]+/[^/]+)\.git/info/lfs/objects/batch", "batch"),
        (r"PUT /lfs/([0-9a-f]{64})", "put_object"),
        (r"POST /lfs/verify", "verify"),
        (r"GET /api/models/([^/]+/[^/]+)/tree/([^/]+)", "tree"),
        (r"GET /api/models/([^/]+/[^/]+)(?:/revision/(.+))?", "info"),
        (r"(?:GET|HEAD) /([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "resolve"),
    )

    def log_message(self, *_: object) -> None:
        pass

    def answer(self) -> None:
        path = urlparse(self.path).path
        call = f"{self.command} {unquote(path)}"
        self.hub.calls.append(call)
        try:
            self.break_if_asked(call)
            self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.dispatch(call)
        except Refused as refused:
            headers = {"X-Error-Message": refused.message}
            if refused.code:
                headers["X-Error-Code"] = refused.code
            self.reply({"error": refused.message}, refused.status, headers)
        except Dropped:
            self.close_connection = True

    def dispatch(self, call: str) -> None:
        for route, name in self.routes:
            if found := re.fullmatch(route, call):
                getattr(self, name)(*found.groups())
                return
        raise Refused(404, message=f"no route for {call}")

    do_GET = do_HEAD = do_POST = do_PUT = answer  # noqa: N815 - http.server's names

    def break_if_asked(self, call: str) -> None:
        for fault in self.hub.faults:
            if fault.times > 0 and re.search(fault.route, call):
                fault.times -= 1
                if fault.status is None:
                    self.rfile.read(int(self.headers.get("Content-Length") or 0) // 2)
                    raise Dropped
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                raise Refused(fault.status, message="injected fault")

    def reply(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def user(self) -> str | None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in self.hub.accounts:
            raise Refused(401, message="Invalid credentials in Authorization header")
        return self.hub.accounts.get(token)

    def readable(self, repo_id: str) -> Repository:
        user, repository = self.user(), self.hub.repositories.get(repo_id)
        hidden = repository is not None and repository.private and user != repo_id.partition("/")[0]
        if repository is None or hidden:
            raise Refused(401 if user is None else 404, "RepoNotFound", "Repository not found")
        return repository

    def writable(self, repo_id: str) -> Repository:
        user = self.user()
        if user is None:
            raise Refused(401, message="Invalid username or password.")
        if user != repo_id.partition("/")[0]:
            raise Refused(403, message="You don't have the rights to write there")
        return self.readable(repo_id)

    def create(self) -> None:
        asked, user = json.loads(self.body), self.user()
        owner = asked["organization"] or user
        if user is None:
            raise Refused(401, message="Invalid username or password.")
        if owner != user:
            raise Refused(403, message=f"You don't have the rights to create a model under {owner}")
        repo_id = f"{owner}/{asked['name']}"
        known = repo_id in self.hub.repositories
        if not known:
            private = asked.get("visibility") == "private" or bool(asked.get("private"))
            self.hub.repositories[repo_id] = Repository(private)
        self.reply({"url": f"{self.hub.endpoint}/{repo_id}"}, 409 if known else 200)

    def validate(self) -> None:
        front = re.match(r"---\n(.*?)\n---\n", json.loads(self.body)["content"], re.DOTALL)
        try:
            metadata = yaml.safe_load(front.group(1)) if front else None
        except yaml.YAMLError as error:
            self.reply({"errors": [{"message": str(error)}], "warnings": []}, 400)
            return
        warnings = [] if metadata else [{"message": "empty or missing yaml metadata"}]
        self.reply({"errors": [], "warnings": warnings})

    def branch(self, repo_id: str, name: str) -> None:
        repository = self.writable(repo_id)
        known = name in repository.branches
        repository.branches.setdefault(name, repository.branches["main"])
        self.reply({}, 409 if known else 200)

    def preupload(self, repo_id: str, revision: str) -> None:
        files = self.files_at(self.writable(repo_id), revision)
        self.reply(
            {
                "files": [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                        "shouldIgnore": False,
                        "oid": blob_id(files[file["path"]]) if file["path"] in files else None,
                    }
                    for file in json.loads(self.body)["files"]
                ]
            }
        )

    def batch(self, repo_id: str) -> None:
        self.writable(repo_id)
        answers = []
        for wanted in json.loads(self.body)["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.objects:
                answer["actions"] = {
                    "upload": {"href": f"{self.hub.endpoint}/lfs/{wanted['oid']}"},
                    "verify": {"href": f"{self.hub.endpoint}/lfs/verify"},
                }
            answers.append(answer)
        self.reply({"transfer": "basic", "objects": answers})

    def put_object(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refused(400, message="content does not match its name")
        self.hub.objects[oid] = self.body
        self.reply({})

    def verify(self) -> None:
        asked = json.loads(self.body)
        if len(self.hub.objects.get(asked["oid"], b"")) != asked["size"]:
            raise Refused(400, message="size differs")
        self.reply({})

    def commit(self, repo_id: str, revision: str) -> None:
        repository = self.writable(repo_id)
        files = dict(self.files_at(repository, revision))
        lines = [json.loads(line) for line in self.body.splitlines()]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
                repository.lfs.add(value["path"])
        sha = repository.add(files, lines[0]["value"]["summary"])
        repository.branches[revision] = sha
        url = f"{self.hub.endpoint}/{repo_id}/commit/{sha}"
        self.reply({"commitUrl": url, "commitOid": sha, "pullRequestUrl": None})

    def info(self, repo_id: str, revision: str | None) -> None:
        repository = self.readable(repo_id)
        sha = self.sha_at(repository, revision or "main")
        siblings = [{"rfilename": name} for name in repository.commits[sha]]
        facts = {"id": repo_id, "sha": sha, "private": repository.private, "siblings": siblings}
        self.reply(facts)

    def tree(self, repo_id: str, revision: str) -> None:
        repository = self.readable(repo_id)
        entries = []
        for path, data in self.files_at(repository, revision).items():
            entry = {"type": "file", "path": path, "size": len(data), "oid": blob_id(data)}
            if path in repository.lfs:
                digest = hashlib.sha256(data).hexdigest()
                entry["lfs"] = {"oid": digest, "size": len(data), "pointerSize": 134}
            entries.append(entry)
        self.reply(entries)

    def resolve(self, repo_id: str, revision: str, path: str) -> None:
        repository = self.readable(repo_id)
        sha = self.sha_at(repository, revision)
        data = repository.commits[sha].get(path)
        if data is None:
            raise Refused(404, "EntryNotFound", "Entry not found")
        digest = hashlib.sha256(data).hexdigest() if path in repository.lfs else blob_id(data)
        self.reply(data, headers={"ETag": f'"{digest}"', "X-Repo-Commit": sha})

    def sha_at(self, repository: Repository, revision: str) -> str:
        sha = repository.resolve(revision)
        if sha is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha

    def files_at(self, repository: Repository, revision: str) -> dict[str, bytes]:
        return repository.commits[self.sha_at(repository, revision)]


def blob_id(data: bytes) -> str:
    """What git calls this content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextmanager
def serving() -> Iterator[LocalHub]:
    """A Hub on a free port of this machine, gone when the block ends."""
    hub = LocalHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("HubHandler", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
