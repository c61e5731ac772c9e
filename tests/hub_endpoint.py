"""A stand-in for the Hugging Face hub on loopback: serves the revisions of repositories from folders."""

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@contextmanager
def serving(revisions):
    """Serve repositories while the block runs; yield the address for HF_ENDPOINT and the list of requested paths.

    Args:
        revisions: Folder of files by (repository, revision), such as ("user/name", "v1").
    """
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            requests.append(self.path)
            parts = self.path.split("?")[0].strip("/").split("/")
            if parts[:2] == ["api", "models"]:
                self.answer_api("/".join(parts[2:4]), parts[5] if len(parts) > 5 else "main", parts[4:5] == ["tree"])
            elif parts[2:3] != ["resolve"]:
                self.answer(404, b"", {})
            else:
                self.answer_file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))

        do_GET = do_HEAD  # noqa: N815  (the name that the library calls)

        def answer_api(self, repository, revision, is_tree):
            if folder := self.find(repository, revision):
                files = [file for file in sorted(Path(folder).iterdir()) if file.is_file()]
                tree = [{"type": "file", "path": file.name, "size": file.stat().st_size, "oid": "0"} for file in files]
                names = [{"rfilename": file.name} for file in files]
                facts = {"id": repository, "sha": commit(repository, folder), "siblings": names, "tags": []}
                self.answer(200, json.dumps(tree if is_tree else facts).encode(), {"Content-Type": "application/json"})

        def answer_file(self, repository, revision, name):
            if not (folder := self.find(repository, revision)):
                return
            headers = {"X-Repo-Commit": commit(repository, folder)}
            if not (file := Path(folder) / name).is_file():
                self.answer(404, b"", headers | {"X-Error-Code": "EntryNotFound"})
                return
            content = file.read_bytes()
            self.answer(200, content, headers | {"ETag": f'"{hashlib.sha256(content).hexdigest()}"'})

        def find(self, repository, revision):
            for (name, version), folder in revisions.items():
                if name == repository and revision in (version, commit(repository, folder)):
                    return folder
            known = any(name == repository for name, _ in revisions)
            self.answer(404, b"", {"X-Error-Code": "RevisionNotFound" if known else "RepoNotFound"})
            return None

        def answer(self, status, content, headers):
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(content))}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        server.server_close()


def commit(repository, folder):
    """Return the commit of a folder: 40 hexadecimal digits."""
    return hashlib.sha1(f"{repository} {folder}".encode()).hexdigest()  # noqa: S324  (as git does)
