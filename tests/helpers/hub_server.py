"""A small Hub on 127.0.0.1: models and data sets from memory, with the tokens, gates and faults that a test chooses."""

import base64
import hashlib
import json
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from huggingface_hub import constants

LFS_SUFFIXES = (".safetensors", ".bin", ".model", ".gguf")
CDN = "/cdn/"
PIECE = 100  # bytes of a body that trickles


@dataclass(frozen=True)
class Entry:
    """One file of a repository, as the Hub serves and lists it."""

    name: str
    content: bytes
    listed_size: int

    @property
    def is_lfs(self) -> bool:
        return self.name.endswith(LFS_SUFFIXES)

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def blob_id(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    def listing(self) -> dict[str, object]:
        lfs = {"lfs": {"size": self.listed_size, "sha256": self.sha256, "pointerSize": 130}} if self.is_lfs else {}
        return {"rfilename": self.name, "size": self.listed_size, "blobId": self.blob_id, **lfs}


@dataclass(frozen=True)
class Repository:
    """What a model or data set holds at each revision, and who may read it."""

    revisions: dict[str, dict[str, Entry]]
    gated: bool
    private: bool

    def find(self, revision: str) -> tuple[str, dict[str, Entry]] | None:
        """Return the commit and the files that a branch, or a commit itself, names."""
        for name, entries in self.revisions.items():
            commit = hashlib.sha1("".join(entry.name + entry.sha256 for entry in entries.values()).encode()).hexdigest()
            if revision in (name, commit):
                return commit, entries
        return None


@dataclass
class Fault:
    """What goes wrong with the next `times` requests whose path ends with `path`, redirects left out."""

    path: str
    times: int = 1
    status: int | None = None
    """Answer with this status and nothing else."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """What goes with that status."""
    body: bytes | None = None
    """Answer with this body, whatever was asked for."""
    cut_after: int | None = None
    """Close the connection after this many bytes of the body."""
    stall_after: int | None = None
    """Send nothing more after this many bytes of the body, and keep the connection open."""
    trickle: float | None = None
    """Send the body in small pieces, with as many seconds before each."""
    stalled: threading.Event = field(default_factory=threading.Event)
    """Set when the transfer stalls."""


class HubServer(ThreadingHTTPServer):
    """Speaks as much of the Hub's protocol as fetching and committing files takes, once it is entered as a context."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, Repository] = {}
        self.grants: dict[str, set[str]] = {}
        self.writers: dict[str, str] = {}
        """The namespaces to which tokens may write."""
        self.stored: dict[str, bytes] = {}
        """What was sent to large file storage, by its hash."""
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.ranges: list[str] = []
        self.events: dict[str, Callable[[], object]] = {}
        self.has_xet = False
        self.closing = threading.Event()

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.closing.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request: object, client_address: object) -> None:
        """Report an error, unless a client has had enough of a body."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    def add(
        self,
        repo_id: str,
        files: Mapping[str, bytes],
        revision: str = "main",
        gated: bool = False,
        private: bool = False,
        listed_sizes: Mapping[str, int] | None = None,
    ) -> None:
        """Add a revision of ORG/NAME, or of datasets/ORG/NAME, whose listing may lie about sizes."""
        repository = self.repositories.setdefault(repo_id, Repository({}, gated, private))
        sizes = {name: len(content) for name, content in files.items()} | dict(listed_sizes or {})
        repository.revisions[revision] = {name: Entry(name, files[name], sizes[name]) for name in sorted(files)}

    def grant(self, token: str, *repo_ids: str) -> None:
        """Make a token known, and let it read these gated or private repositories."""
        self.grants[token] = set(repo_ids)

    def commit(self, repo_id: str, revision: str, lines: list[dict[str, Any]]) -> str:
        """Add the files of a commit's operations to a revision, and return the commit."""
        repository = self.repositories[repo_id]
        entries = dict(repository.revisions[revision])
        for line in lines:
            name, value = line["value"].get("path"), line["value"]
            if line["key"] == "file":
                content = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                content = self.stored[value["oid"]]
            else:
                continue
            entries[name] = Entry(name, content, len(content))
        repository.revisions[revision] = entries
        commit, _ = repository.find(revision) or ("", {})
        return commit

    def fail(self, fault: Fault) -> Fault:
        """Let something go wrong."""
        self.faults.append(fault)
        return fault

    def when(self, path: str, event: Callable[[], object]) -> None:
        """Let something happen as soon as a path that ends so is asked for."""
        self.events[path] = event

    def fetched(self) -> list[str]:
        """Name the files whose content was asked for, and forget the requests so far."""
        paths = [request.removeprefix("GET ") for request in self.requests if request.startswith("GET ")]
        names = [path.rsplit("/", 1)[1] for path in paths if _is_content(path)]
        self.requests.clear()
        return names

    def take_fault(self, path: str) -> Fault | None:
        for fault in self.faults:
            if fault.times and path.endswith(fault.path) and (_is_content(path) or "/resolve/" not in path):
                fault.times -= 1
                return fault
        return None


def _front_matter(entries: Mapping[str, Entry]) -> re.Match[str] | None:
    """Return the YAML at the beginning of a repository's card."""
    card = entries["README.md"].content.decode(errors="replace") if "README.md" in entries else ""
    return re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)


def _is_content(path: str) -> bool:
    """Say whether what lies at a path is a file's content, and not a redirect to it."""
    return path.startswith(CDN) or ("/resolve/" in path and not path.endswith(LFS_SUFFIXES))


@contextmanager
def reachable_hub(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[HubServer]:
    """Run a Hub to which huggingface_hub turns, in this process and in those that it starts."""
    with HubServer() as hub:
        home = folder / "hf_home"
        settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "*"}
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        # huggingface_hub reads its settings when it is imported, which another test may have done long ago.
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
        yield hub


class _Handler(BaseHTTPRequestHandler):
    """Answers one connection; `self.fault` is what goes wrong with the request at hand."""

    server: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        self.server.ranges += self.headers.get_all("Range", []) if _is_content(path) else []
        for event in [event for end, event in self.server.events.items() if path.endswith(end)]:
            event()
        self.fault = self.server.take_fault(path) or Fault(path)
        if self.fault.status:
            self._send(self.fault.status, headers=self.fault.headers)
        elif path.startswith(CDN):
            self._serve_lfs(path.removeprefix(CDN).split("/")[0])
        elif path == "/xet":
            access = {
                "X-Xet-Cas-Url": self.server.url,
                "X-Xet-Access-Token": "xet",
                "X-Xet-Token-Expiration": "9999999999",
            }
            self._send(200, headers=access)
        elif match := re.fullmatch(r"/api/(models/|(?=datasets/))(.+)/revision/(.+)", path):
            self._serve_listing(match[2], match[3])
        elif match := re.fullmatch(r"/(.+?)/resolve/([^/]+|refs/pr/\d+|refs/convert/parquet)/(.+)", path):
            self._serve_file(match[1], match[2], match[3])
        else:
            self._send(404)

    def do_PUT(self) -> None:
        self.server.requests.append(f"PUT {self.path}")
        content = self._body()
        self.fault = Fault(self.path)
        oid = self.path.rsplit("/", 1)[1]
        known = hashlib.sha256(content).hexdigest() == oid
        if known:
            self.server.stored[oid] = content
        self._send(200 if known else 400)

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"POST {path}")
        body = self._body()
        self.fault = self.server.take_fault(path) or Fault(path)
        if self.fault.status:
            self._send(self.fault.status, headers=self.fault.headers)
        elif path == "/api/validate-yaml":
            self._send_json({"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(branch|preupload|commit)/(.+)", path):
            if self._may_write(match[1]):
                getattr(self, f"_{match[2]}")(match[1], match[3], body)
        elif match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            if self._may_write(match[1]):
                self._batch(json.loads(body)["objects"])
        else:
            self._send(404)

    def log_message(self, *args: object) -> None:
        pass

    def _body(self) -> bytes:
        """Read the body of a request, which may come in chunks."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _may_write(self, repo_id: str) -> bool:
        namespace = self.server.writers.get(self._token())
        if namespace is None:
            self._refuse(401, "", "Invalid credentials in Authorization header")
        elif namespace != repo_id.split("/")[0]:
            self._refuse(403, "", "You don't have the rights to create a model under this namespace")
        return namespace == repo_id.split("/")[0]

    def _create(self, request: dict[str, Any]) -> None:
        repo_id = f"{request.get('organization')}/{request['name']}"
        if not self._may_write(repo_id):
            return
        if repo_id in self.server.repositories:
            about = {"error": "You already created this model repo", "url": f"{self.server.url}/{repo_id}"}
            self._send_json(about, 409)
            return
        self.server.repositories[repo_id] = Repository(
            {"main": {}}, gated=False, private=request.get("visibility") == "private"
        )
        self.server.grants.setdefault(self._token(), set()).add(repo_id)
        self._send_json({"url": f"{self.server.url}/{repo_id}"})

    def _branch(self, repo_id: str, revision: str, _: bytes) -> None:
        revisions = self.server.repositories[repo_id].revisions
        known = revision in revisions
        revisions.setdefault(revision, dict(revisions["main"]))
        self._send_json({}, 409 if known else 200)

    def _preupload(self, _: str, __: str, body: bytes) -> None:
        files = [
            {"path": file["path"], "uploadMode": "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular",
             "shouldIgnore": False} for file in json.loads(body)["files"]
        ]  # fmt: skip
        self._send_json({"files": files})

    def _batch(self, objects: list[dict[str, Any]]) -> None:
        upload = [{**each, "actions": {"upload": {"href": f"{self.server.url}/lfs/{each['oid']}"}}} for each in objects]
        self._send_json({"transfer": "basic", "objects": upload})

    def _commit(self, repo_id: str, revision: str, body: bytes) -> None:
        commit = self.server.commit(repo_id, revision, [json.loads(line) for line in body.splitlines()])
        self._send_json({"commitUrl": f"{self.server.url}/{repo_id}/commit/{commit}", "commitOid": commit})

    def _send_json(self, content: object, status: int = 200) -> None:
        self._send(status, json.dumps(content).encode())

    def _serve_listing(self, repo_id: str, revision: str) -> None:
        if found := self._find(repo_id, revision):
            commit, entries = found
            listing = [entry.listing() for entry in entries.values()]
            card = yaml.safe_load(front[1]) if (front := _front_matter(entries)) else None
            private = self.server.repositories[repo_id].private
            about = {"id": repo_id, "sha": commit, "siblings": listing, "cardData": card, "private": private}
            self._send(200, json.dumps(about).encode())

    def _serve_file(self, repo_id: str, revision: str, name: str) -> None:
        if not (found := self._find(repo_id, revision)):
            return
        commit, entries = found
        if self.server.repositories[repo_id].gated and repo_id not in self._granted():
            self._refuse(403 if self._token() else 401, "GatedRepo", f"Access to {repo_id} is restricted.")
        elif name not in entries:
            self._refuse(404, "EntryNotFound", "Entry not found")
        else:
            self._send_entry(entries[name], commit)

    def _send_entry(self, entry: Entry, commit: str) -> None:
        if entry.is_lfs:
            # No Xet storage stands behind these, so that a client which takes them fails there.
            xet = {"X-Xet-Hash": entry.sha256, "X-Xet-Refresh-Route": f"{self.server.url}/xet"}
            # Another host than the Hub's, to which a client must not carry its token.
            location = f"http://localhost:{self.server.server_port}{CDN}{entry.sha256}/{entry.name}"
            size = str(len(entry.content))
            linked = {"Location": location, "X-Linked-Etag": f'"{entry.sha256}"', "X-Linked-Size": size}
            self._send(302, headers={"X-Repo-Commit": commit, **linked, **(xet if self.server.has_xet else {})})
        else:
            self._send(200, entry.content, {"X-Repo-Commit": commit, "ETag": f'"{entry.blob_id}"'})

    def _serve_lfs(self, sha256: str) -> None:
        if self._token():
            self._send(400)
            return
        trees = [tree for repository in self.server.repositories.values() for tree in repository.revisions.values()]
        content = next(entry.content for tree in trees for entry in tree.values() if entry.sha256 == sha256)
        if match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            rest = f"bytes {match[1]}-{len(content) - 1}/{len(content)}"
            self._send(206, content[int(match[1]) :], {"Content-Range": rest})
        else:
            self._send(200, content)

    def _find(self, repo_id: str, revision: str) -> tuple[str, dict[str, Entry]] | None:
        """Look a revision up, or answer as the Hub does when the asker may not know of it."""
        repository = self.server.repositories.get(repo_id)
        if self._token() and self._token() not in self.server.grants:
            self._refuse(401, "", "Invalid credentials in Authorization header")
        elif repository is None or (repository.private and repo_id not in self._granted()):
            self._refuse(404 if self._token() else 401, "RepoNotFound", "Repository not found")
        elif found := repository.find(revision):
            return found
        else:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return None

    def _token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def _granted(self) -> set[str]:
        return self.server.grants.get(self._token(), set())

    def _refuse(self, status: int, code: str, message: str) -> None:
        self._send(status, headers={"X-Error-Code": code, "X-Error-Message": message})

    def _send(self, status: int, body: bytes = b"", headers: Mapping[str, str] | None = None) -> None:
        body = body if self.fault.body is None else self.fault.body
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self._send_body(body)

    def _send_body(self, body: bytes) -> None:
        if self.fault.trickle is not None:
            for start in range(0, len(body), PIECE):
                self.server.closing.wait(self.fault.trickle)
                self.wfile.write(body[start : start + PIECE])
            return
        end = self.fault.cut_after if self.fault.stall_after is None else self.fault.stall_after
        self.wfile.write(body[:end])
        if end is not None:
            self.wfile.flush()
            self.close_connection = True
        if self.fault.stall_after is not None:
            self.fault.stalled.set()
            self.server.closing.wait()
