"""A small model hub on this machine, for `HF_ENDPOINT`: downloads run for real without a network.

It speaks the part of the Hub's protocol that reading needs: a repository's facts, its file tree, and its files with
ETag, commit, length and ranges. A file can be made to arrive wrong in one of the ways that files do.

    with HubServer() as hub:
        hub.publish("owner/name", folder)
        subprocess.run([...], env=hub.environment(tmp_path / "home"))
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import MappingProxyType, TracebackType
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

Kind = Literal["models", "datasets"]
Damage = Literal["interrupted", "interrupted once", "truncated"]
"""The connection breaks half-way, always or the first time; or the file ends early and says that this is all of it."""


@dataclass
class Repository:
    """The folders of a repository by revision, the token without which it is refused, and files that arrive wrong."""

    revisions: dict[str, Path] = field(default_factory=dict)
    token: str | None = None
    damaged: dict[str, Damage] = field(default_factory=dict)

    def commit(self, revision: str) -> str | None:
        """The 40 hex digits of a revision's name, or of a commit that is one already; None: there is no such one."""
        for name, folder in self.revisions.items():
            commit = hashlib.sha1(f"{name} {folder}".encode()).hexdigest()
            if revision in (name, commit):
                return commit
        return None

    def folder(self, commit: str) -> Path:
        """The folder of one of `commit`'s answers."""
        return next(folder for name, folder in self.revisions.items() if self.commit(name) == commit)


@dataclass(frozen=True)
class Address:
    """What a request is about: `/api/models/owner/name/revision/main` or `/owner/name/resolve/main/config.json`."""

    kind: Kind
    name: str
    action: str
    """"revision", "tree", "paths-info" or "resolve"."""
    revision: str
    path: str

    @classmethod
    def parse(cls, url: str) -> "Address | None":
        """None: no address of a repository."""
        parts = [unquote(part) for part in urlsplit(url).path.strip("/").split("/")]
        is_api = parts[0] == "api"
        parts = parts[1:] if is_api else parts
        kind: Kind = "datasets" if parts[0] == "datasets" else "models"
        parts = parts[1:] if parts[0] in ("models", "datasets") else parts
        if len(parts) < 2:
            return None
        action, revision, *path = [*parts[2:], "revision", "main"] if len(parts) == 2 else [*parts[2:], ""]
        return cls(kind, "/".join(parts[:2]), action, revision, "/".join(path).strip("/"))


class HubServer:
    """A hub on a free port of 127.0.0.1. `requests`: method and path of all that was asked of it."""

    def __init__(self) -> None:
        self.repositories: dict[tuple[Kind, str], Repository] = {}
        self.requests: list[str] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, self))
        self._thread = Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    @property
    def url(self) -> str:
        """What to set `HF_ENDPOINT` to."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def publish(
        self,
        name: str,
        folder: Path,
        kind: Kind = "models",
        revision: str = "main",
        token: str | None = None,
        damaged: Mapping[str, Damage] = MappingProxyType({}),
    ) -> None:
        """Offer a folder as the repository `owner/name`, to all or to those with the token.

        damaged: how files of some names arrive wrong.
        """
        repository = self.repositories.setdefault((kind, name), Repository())
        repository.revisions[revision] = folder
        repository.token, repository.damaged = token, dict(damaged)

    def environment(self, home: Path, **more: str) -> dict[str, str]:
        """The environment of a process that knows no hub but this one, and keeps what it downloads in `home`."""
        offline = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN", "HF_HUB_CACHE")
        inherited = {name: value for name, value in os.environ.items() if name not in offline}
        quick = {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "5", "HF_HUB_ETAG_TIMEOUT": "5"}
        return inherited | quick | {"HF_ENDPOINT": self.url, "HF_HOME": str(home)} | more

    def stop(self) -> None:
        """Answer nobody any more: connections to `url` are refused from now on."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()

    def __enter__(self) -> "HubServer":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()


class Handler(BaseHTTPRequestHandler):
    """Answers one connection of `hub`."""

    protocol_version = "HTTP/1.1"

    def __init__(self, hub: HubServer, *connection: Any) -> None:
        self.hub = hub
        super().__init__(*connection)

    def do_GET(self) -> None:
        self.answer()

    def do_HEAD(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer()

    def log_message(self, format: str, *args: Any) -> None:
        """Keep quiet: the tests read `hub.requests`."""

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.hub.requests.append(f"{self.command} {self.path}")
        address = Address.parse(self.path)
        repository = self.hub.repositories.get((address.kind, address.name)) if address else None
        if address is None or repository is None:
            return self.refuse(404, "RepoNotFound", "Repository not found")
        if repository.token and self.headers.get("Authorization") != f"Bearer {repository.token}":
            return self.refuse(401, "GatedRepo", f"Access to {address.name} is restricted: log in")
        commit = repository.commit(address.revision)
        if commit is None:
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {address.revision}")
        folder = repository.folder(commit)
        if address.action == "resolve":
            return self.send_file(folder / address.path, commit, repository.damaged)
        if address.action == "tree":
            return self.send_json(_entries(folder, address.path, "recursive=true" in self.path.lower()))
        if address.action == "paths-info":
            found = [folder / path for path in _asked_paths(body)]
            return self.send_json([_entry(folder, path) for path in found if path.exists()])
        return self.send_json(_facts(address, folder, commit))

    def refuse(self, status: int, code: str, message: str) -> None:
        self.send_json({"error": message}, status, {"X-Error-Code": code, "X-Error-Message": message})

    def send_json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_file(self, path: Path, commit: str, damaged: dict[str, Damage]) -> None:
        if not path.is_file():
            return self.refuse(404, "EntryNotFound", f"Entry not found: {path.name}")
        whole = path.read_bytes()
        damage = damaged.get(path.name)
        offered = whole[: len(whole) // 2] if damage == "truncated" and self.command == "GET" else whole
        start, end = _range(self.headers.get("Range"))
        part = offered[start or 0 : end]
        self.send_response(200 if start is None else 206)
        if start is not None:
            self.send_header("Content-Range", f"bytes {start}-{start + len(part) - 1}/{len(offered)}")
        self.send_header("ETag", f'"{hashlib.sha1(whole).hexdigest()}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        if self.command == "GET":
            self.send_content(part, damage)
            if damage == "interrupted once":
                damaged.pop(path.name)

    def send_content(self, content: bytes, damage: Damage | None) -> None:
        """Send it, or break the connection half-way."""
        if damage in ("interrupted", "interrupted once"):
            content = content[: len(content) // 2]
            self.close_connection = True
        self.wfile.write(content)


def _facts(address: Address, folder: Path, commit: str) -> dict[str, Any]:
    """What the Hub tells of a repository."""
    siblings = [{"rfilename": path.relative_to(folder).as_posix()} for path in _files(folder)]
    facts = {"private": False, "gated": False, "disabled": False, "downloads": 0, "likes": 0, "tags": []}
    return {"id": address.name, "modelId": address.name, "sha": commit, "siblings": siblings, **facts}


def _entries(folder: Path, path: str, recursive: bool) -> list[dict[str, Any]]:
    """The tree listing below `path`, folders included."""
    found = (folder / path).rglob("*") if recursive else (folder / path).glob("*")
    return [_entry(folder, entry) for entry in sorted(found)]


def _entry(folder: Path, path: Path) -> dict[str, Any]:
    name = path.relative_to(folder).as_posix()
    if path.is_dir():
        return {"type": "directory", "path": name, "oid": hashlib.sha1(name.encode()).hexdigest(), "size": 0}
    content = path.read_bytes()
    return {"type": "file", "path": name, "oid": hashlib.sha1(content).hexdigest(), "size": len(content)}


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _asked_paths(body: bytes) -> list[str]:
    """The paths of a paths-info request, which comes as JSON."""
    paths = json.loads(body)["paths"]
    return [paths] if isinstance(paths, str) else paths


def _range(header: str | None) -> tuple[int | None, int | None]:
    """First byte and the one after the last of `bytes=N-M` or `bytes=N-`; None: no range asked for, or to the end."""
    if not header:
        return None, None
    first, last = header.removeprefix("bytes=").split("-")
    return int(first), int(last) + 1 if last else None
