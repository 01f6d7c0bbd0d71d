"""A hub on this machine, for tests: local folders as repositories, spoken to as huggingface_hub speaks to the real one.

    with HubServer() as hub:
        hub.add("owner/name", tmp_path / "files")       # a data set; kind="model" for a model
        hub.connect(monkeypatch)                        # huggingface_hub of this process asks it
        subprocess.run(..., env=os.environ | hub.environment)   # or of another one

What the real hub does and this one, too: a commit's files never change and stay when a branch moves on; large files are
redirected to another origin (`redirects`), which must not see the user's key; a gated repository can be listed by all
and read by few; listings come in pages; who has a key makes repositories and commits small files to them. What can go
wrong is ordered beforehand: `fail`, `listed_sizes`, `has_ranges`. `requests` counts what was asked.
"""

import hashlib
import json
import re
import socket
import sys
import threading
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qs, quote, unquote, urlsplit

import pytest

from tests.hub_answers import entries_of, upload_modes, uploaded

Kind = Literal["dataset", "model"]
ROUTE = re.compile(
    r"/api/(?P<kind>dataset|model)s/(?P<name>[^/]+/[^/]+)"
    r"(?:/(?P<verb>revision|tree|paths-info|refs|preupload|commit)(?:/(?P<revision>[^/]+)(?:/(?P<path>.+))?)?)?"
)
RESOLVE = re.compile(r"/(?P<datasets>datasets/)?(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")


@dataclass(frozen=True)
class StoredFile:
    data: bytes
    sha256: str

    @classmethod
    def of(cls, file: Path | bytes) -> "StoredFile":
        data = file if isinstance(file, bytes) else file.read_bytes()
        return cls(data, hashlib.sha256(data).hexdigest())


@dataclass
class HubRepository:
    """A repository: its commits by name, and what its branches stand for now.

    Attributes:
        readers: the keys that may read the files of a gated repository; None if everybody may.
        private: whether it does not exist for everybody else.
        listed_sizes: sizes that listings tell in place of the true ones, by path.
        redirects: whether files are served by another origin.
    """

    name: str
    kind: Kind
    readers: set[str] | None = None
    private: bool = False
    redirects: bool = False
    listed_sizes: dict[str, int] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, StoredFile]] = field(default_factory=dict)

    def files(self, revision: str) -> dict[str, StoredFile] | None:
        return self.commits.get(self.branches.get(revision, revision))

    def commit(self, files: dict[str, StoredFile], branch: str) -> str:
        digests = [(path, file.sha256) for path, file in files.items()]
        commit = hashlib.sha1(repr(digests).encode()).hexdigest()
        self.commits[commit] = files
        self.branches[branch] = commit
        return commit


class HubServer:
    """Serves repositories on a free port of the loopback interface until the `with` block ends."""

    def __init__(self) -> None:
        self.repositories: dict[tuple[Kind, str], HubRepository] = {}
        self.requests: Counter[str] = Counter()  # "GET data/a.parquet", or "GET /api/..." for what is no file
        self.has_ranges = True
        self.page_size = 1000
        self._failures: list[tuple[re.Pattern[str], int]] = []
        self._lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = _Server(("127.0.0.1", 0), handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def other_origin(self) -> str:
        """The same server under another name, as the hub's storage is another host."""
        return f"http://localhost:{self._server.server_port}/storage"

    @property
    def environment(self) -> dict[str, str]:
        """What makes huggingface_hub of a new process ask this server."""
        return {"HF_ENDPOINT": self.url, "HF_HUB_DISABLE_TELEMETRY": "1"}

    def __enter__(self) -> "HubServer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """From now on the port refuses connections; those that a client kept open end, too."""
        self._server.shutdown()
        self._server.server_close()
        self._server.end_connections()

    def connect(self, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
        """Make huggingface_hub of this process, which reads its environment at import, ask this server.

        Args:
            home: takes the files it keeps; a user's own key is in none of them.
        """
        from huggingface_hub import constants

        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        template = self.url + "/{repo_id}/resolve/{revision}/{filename}"
        for name, value in {
            "ENDPOINT": self.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": template,
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_TOKEN_PATH": str(home / "token"),
            "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
            "AGENT_HARNESSES_PATH": str(home / "agents.json"),
        }.items():
            monkeypatch.setattr(constants, name, value, raising=False)

    def add(self, name: str, folder: Path, kind: Kind = "dataset", branch: str = "main") -> HubRepository:
        """Commit what is in `folder` now to a branch of a repository; both are made if they are new."""
        files = {str(f.relative_to(folder)): StoredFile.of(f) for f in sorted(folder.rglob("*")) if f.is_file()}
        repository = self.repositories.setdefault((kind, name), HubRepository(name, kind))
        repository.commit(files, branch)
        return repository

    def fail(self, status: int, times: int = 1, url: str = "") -> None:
        """Answer the next requests whose address holds `url`, a regular expression, with an error."""
        self._failures.extend([(re.compile(url), status)] * times)

    def count(self, what: str) -> None:
        with self._lock:
            if what != "GET /api/agent-harnesses":  # once a day the client asks for this, whatever it is to do
                self.requests[what] += 1

    def next_failure(self, url: str) -> int | None:
        with self._lock:
            for index, (pattern, status) in enumerate(self._failures):
                if pattern.search(url):
                    del self._failures[index]
                    return status
        return None

    def stored(self, sha256: str) -> tuple[str, StoredFile] | None:
        """A file and its path by its digest, as the storage finds it."""
        for repository in self.repositories.values():
            for files in repository.commits.values():
                for path, file in files.items():
                    if file.sha256 == sha256:
                        return path, file
        return None


class _Server(ThreadingHTTPServer):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._open: set[socket.socket] = set()

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def end_connections(self) -> None:
        for connection in list(self._open):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        # A client that is killed, or has read enough, closes its end.
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Refused(Exception):
    def __init__(self, status: int, code: str) -> None:
        super().__init__(code)
        self.status, self.code = status, code


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer  # set by HubServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answer(self) -> None:
        url = urlsplit(self.path)
        self._body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        status = self.hub.next_failure(url.path)
        try:
            if status is not None:
                self._count(url.path)
                raise _Refused(status, "")
            if match := ROUTE.fullmatch(url.path):
                self._count(url.path)
                self._describe(match, parse_qs(url.query))
            elif url.path == "/api/repos/create" and self._key():
                self._create()
            elif url.path == "/api/validate-yaml":
                self._send_json({})
            elif match := RESOLVE.fullmatch(url.path):
                self._resolve(match)
            elif url.path.startswith("/storage/"):
                self._storage(url.path.rpartition("/")[2])
            else:
                self._count(url.path)
                raise _Refused(404, "")
        except _Refused as refusal:
            self._send(b"{}", status=refusal.status, headers={"X-Error-Code": refusal.code})

    def _count(self, what: str) -> None:
        self.hub.count(f"{self.command} {what}")

    def _repository(self, kind: Kind, name: str) -> HubRepository:
        repository = self.hub.repositories.get((kind, name))
        if repository is None or (repository.private and not self._is_reader(repository)):
            raise _Refused(404, "RepoNotFound")
        return repository

    def _key(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def _is_reader(self, repository: HubRepository) -> bool:
        return repository.readers is None or self._key() in repository.readers

    def _files(self, repository: HubRepository, revision: str) -> dict[str, StoredFile]:
        files = repository.files(revision)
        if files is None:
            raise _Refused(404, "RevisionNotFound")
        return files

    def _describe(self, match: re.Match[str], query: dict[str, list[str]]) -> None:
        """What the API tells about a repository."""
        repository = self._repository("dataset" if match["kind"] == "dataset" else "model", match["name"])
        verb = match["verb"]
        if verb == "refs":
            refs = [
                {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commit}
                for name, commit in repository.branches.items()
            ]
            self._send_json({"branches": refs, "tags": [], "converts": []})
            return
        revision = unquote(match["revision"] or "main")
        if verb in ("preupload", "commit") and self._key():
            self._take(repository, verb, revision)
            return
        files = self._files(repository, revision)
        entries = entries_of(files, repository)
        if verb == "tree":
            self._send_tree(entries, unquote(match["path"] or ""), query)
        elif verb == "paths-info":
            self._send_json([entries[path] for path in parse_qs(self._body).get("paths", []) if path in entries])
        else:
            commit = repository.branches.get(revision, revision)
            gated = False if repository.readers is None else "manual"
            names = [{"rfilename": path} for path in files]
            values = {"id": repository.name, "sha": commit, "private": repository.private, "gated": gated}
            self._send_json({**values, "siblings": names, "tags": [], "downloads": 0, "likes": 0})

    def _create(self) -> None:
        asked = json.loads(self._body)
        name, kind = f"{asked['organization']}/{asked['name']}", asked.get("type", "model")
        if (kind, name) not in self.hub.repositories:
            self.hub.repositories[kind, name] = HubRepository(name, kind)
            self.hub.repositories[kind, name].commit({}, "main")
        self._send_json({"url": f"{self.hub.url}/{name}"})

    def _take(self, repository: HubRepository, verb: str, revision: str) -> None:
        """Files that a client uploads: first how, then what they hold."""
        if verb == "preupload":
            self._send_json(upload_modes(self._body))
            return
        files = {path: StoredFile.of(data) for path, data in uploaded(self._body).items()}
        commit = repository.commit(self._files(repository, revision) | files, revision)
        self._send_json({"commitUrl": f"{self.hub.url}/{repository.name}/commit/{commit}", "commitOid": commit})

    def _send_tree(self, entries: dict[str, dict[str, Any]], folder: str, query: dict[str, list[str]]) -> None:
        if folder and entries.get(folder, {}).get("type") != "directory":
            raise _Refused(404, "EntryNotFound")
        inside = [entry for path, entry in entries.items() if not folder or path.startswith(f"{folder}/")]
        if query.get("recursive", ["false"])[0].lower() != "true":
            depth = folder.count("/") + 2 if folder else 1
            inside = [entry for entry in inside if entry["path"].count("/") + 1 == depth]
        start = int(query.get("cursor", ["0"])[0])
        end = start + self.hub.page_size
        headers = {}
        if end < len(inside):
            more = "&".join(f"{k}={v[0]}" for k, v in query.items() if k != "cursor")
            headers["Link"] = f'<{self.hub.url}{urlsplit(self.path).path}?{more}&cursor={end}>; rel="next"'
        self._send_json(inside[start:end], headers)

    def _resolve(self, match: re.Match[str]) -> None:
        repository = self._repository("dataset" if match["datasets"] else "model", match["name"])
        revision, path = unquote(match["revision"]), unquote(match["path"])
        files = self._files(repository, revision)
        if not self._is_reader(repository):
            self._count(path)
            raise _Refused(403 if self._key() else 401, "GatedRepo")
        if path not in files:
            self._count(path)
            raise _Refused(404, "EntryNotFound")
        file = files[path]
        about = {
            "X-Repo-Commit": repository.branches.get(revision, revision),
            "X-Linked-Etag": f'"{file.sha256}"',
            "X-Linked-Size": str(len(file.data)),
        }
        if repository.redirects:
            self._send(b"", status=302, headers={**about, "Location": f"{self.hub.other_origin}/{file.sha256}"})
        else:
            self._send_file(path, file, about)

    def _storage(self, sha256: str) -> None:
        if self._key():
            raise _Refused(400, "")  # as the real storage does: its addresses are signed
        found = self.hub.stored(sha256)
        if found is None:
            raise _Refused(404, "")
        self._send_file(*found, {})

    def _send_file(self, path: str, file: StoredFile, headers: dict[str, str]) -> None:
        self._count(path)
        data = file.data
        status, start, end = 200, 0, len(data)
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked and self.hub.has_ranges:
            start, end = int(asked[1]), min(int(asked[2] or len(data)) + 1, len(data))
            if start >= len(data):
                raise _Refused(416, "")
            status = 206
            headers = {**headers, "Content-Range": f"bytes {start}-{end - 1}/{len(data)}"}
        if self.hub.has_ranges:
            headers = {**headers, "Accept-Ranges": "bytes"}
        self._send_head(status, end - start, {"ETag": f'"{file.sha256}"', **headers})
        if self.command != "HEAD":
            self.wfile.write(data[start:end])

    def _send_json(self, value: Any, headers: dict[str, str] | None = None) -> None:
        self._send(json.dumps(value).encode(), headers={"Content-Type": "application/json", **(headers or {})})

    def _send(self, body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send_head(status, len(body), headers or {})
        if self.command != "HEAD":
            self.wfile.write(body)

    def _send_head(self, status: int, length: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        for name, value in headers.items():
            if value:
                self.send_header(name, quote(value, safe="/:;=<>\"' ?&-*,"))
        self.end_headers()
