"""A stand-in for the Hugging Face Hub on loopback: the endpoints that its client uses for uploads and downloads."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

import pytest
import yaml

TOKEN = "hf_" + 34 * "s"


@dataclass
class Repository:
    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        content = {**self.commits.get(self.branches.get(branch, ""), {}), **files}
        sha = hashlib.sha256(repr((branch, len(self.commits), sorted(content))).encode()).hexdigest()[:40]
        self.commits[sha], self.branches[branch] = content, sha
        return sha


class StandIn(ThreadingHTTPServer):
    """Repositories in memory.

    Attributes:
        url: Address of the server.
        repositories: Repositories by name.
        requests: Method and path of every request.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, Repository] = {}
        self.uploads: dict[str, bytes] = {}
        self.requests: list[str] = []


class _Handler(BaseHTTPRequestHandler):
    server: StandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, *_arguments):
        pass

    def do_GET(self):
        self.answer()

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    def answer(self):
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(self.path.partition("?")[0])
        self.server.requests.append(f"{self.command} {path}")
        for pattern, method in (
            (r"/api/whoami-v2", self.whoami),
            (r"/api/repos/create", self.create),
            (r"/api/validate-yaml", self.validate),
            (r"/api/models/([^/]+/[^/]+)/preupload/(.+)", self.preupload),
            (r"/api/models/([^/]+/[^/]+)/commit/(.+)", self.commit),
            (r"/api/models/([^/]+/[^/]+)/branch/(.+)", self.branch),
            (r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", self.info),
            (r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", self.tree),
            (r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self.batch),
            (r"/upload/(\w+)", self.upload),
            (r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.resolve),
        ):
            if match := re.fullmatch(pattern, path):
                if self.command in ("POST", "PUT") and method != self.upload and not self.is_logged_in():
                    return self.send(401, {"error": "Invalid username or password."})
                return method(*match.groups())
        return self.send(404, {"error": "not found"})

    def is_logged_in(self):
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def send(self, status, content=None, headers=None):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def whoami(self):
        user = {"name": "jane", "type": "user", "auth": {}, "orgs": []}
        self.send(*((200, user) if self.is_logged_in() else (401, {"error": "Invalid token"})))

    def create(self):
        wish = json.loads(self.body)
        name = f"{wish['organization']}/{wish['name']}"
        if wish["organization"] != "jane":
            return self.send(403, {"error": f"You don't have the rights to create a model under {name}"})
        is_new = name not in self.server.repositories
        if is_new:
            private = wish.get("private") or wish.get("visibility") == "private"
            self.server.repositories[name] = Repository(bool(private))
            self.server.repositories[name].commit("main", {".gitattributes": b""})
        return self.send(200 if is_new else 409, {"url": f"{self.server.url}/{name}", "error": "exists"})

    def validate(self):
        block = json.loads(self.body)["content"].split("---\n")[1]
        errors = [] if "license" in yaml.safe_load(block) else [{"message": "no license"}]
        self.send(400 if errors else 200, {"errors": errors, "warnings": []})

    def preupload(self, name, _revision):
        files = [
            {
                "path": file["path"],
                "uploadMode": "regular" if file["path"].endswith(".md") else "lfs",
                "shouldIgnore": False,
            }
            for file in json.loads(self.body)["files"]
        ]
        self.send(200, {"files": files})

    def batch(self, _name):
        objects = [
            {**entry, "actions": {"upload": {"href": f"{self.server.url}/upload/{entry['oid']}", "header": {}}}}
            for entry in json.loads(self.body)["objects"]
        ]
        self.send(200, {"transfer": "basic", "objects": objects})

    def upload(self, oid):
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.server.uploads[oid] = self.body
        self.send(200, {})

    def commit(self, name, branch):
        files = {}
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.server.uploads[value["oid"]]
        sha = self.server.repositories[name].commit(branch, files)
        self.send(200, {"commitUrl": f"{self.server.url}/{name}/commit/{sha}", "commitOid": sha, "success": True})

    def branch(self, name, branch):
        repository = self.server.repositories[name]
        is_new = branch not in repository.branches
        if is_new:
            repository.branches[branch] = repository.branches["main"]
        self.send(200 if is_new else 409, {"error": "exists"})

    def info(self, name, revision):
        if found := self.find(name, revision or "main"):
            sha, files = found
            siblings = [{"rfilename": path} for path in sorted(files)]
            private = self.server.repositories[name].private
            self.send(200, {"id": name, "private": private, "sha": sha, "siblings": siblings, "tags": []})

    def tree(self, name, revision):
        if found := self.find(name, revision):
            self.send(
                200,
                [
                    {"type": "file", "path": path, "size": len(content), "oid": "0"}
                    for path, content in sorted(found[1].items())
                ],
            )

    def resolve(self, name, revision, path):
        if not (found := self.find(name, revision)):
            return
        sha, files = found
        headers = {"X-Repo-Commit": sha}
        if path not in files:
            self.send(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound", **headers})
            return
        self.send(200, files[path], {"ETag": f'"{hashlib.sha256(files[path]).hexdigest()}"', **headers})

    def find(self, name, revision):
        """Return commit and files of a revision; send the error and return None if there is none."""
        repository = self.server.repositories.get(name)
        if repository is None or (repository.private and not self.is_logged_in()):
            return self.send(401, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        sha = repository.branches.get(revision, revision)
        if sha not in repository.commits:
            return self.send(404, {"error": "Revision not found"}, {"X-Error-Code": "RevisionNotFound"})
        return sha, repository.commits[sha]


@contextmanager
def stand_in() -> Iterator[StandIn]:
    """Serve an empty Hub."""
    server = StandIn()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def serving(cache) -> Iterator[StandIn]:
    """Serve an empty Hub, and point the Hub's client in this process at it, with a token and a cache of its own."""
    with stand_in() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "ENDPOINT": server.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_CACHE": str(cache),
        }.items():
            patch.setattr(f"huggingface_hub.constants.{name}", value)
        patch.setattr("huggingface_hub.hf_api.api.endpoint", server.url, raising=False)
        patch.setenv("HF_TOKEN", TOKEN)
        yield server
