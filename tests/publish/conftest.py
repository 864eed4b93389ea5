"""A small stand-in for the Hub that answers over HTTP on this machine, and a merge to publish."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from helpers.cards import HUB, make_output
from huggingface_hub import constants
from transformers import AutoModelForCausalLM

LFS = (".safetensors",)


class Hub(ThreadingHTTPServer):
    """Creates repositories and takes commits, by the Hub's own upload protocol with LFS.

    Attributes:
        repos: `"models/me/name"` -> its files.
        created: the bodies of all requests to create a repository.
        large: whether weights go through LFS, or small enough into the commit itself.
    """

    def __init__(self, large: bool = True):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.created: list[dict] = []
        self.objects: dict[str, bytes] = {}
        self.large = large
        self.refused = ""  # what the path of a request that fails holds
        self.asked: list[str] = []
        self.endpoint = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *args) -> None:
        pass

    def _body(self) -> bytes:
        if "content-length" in self.headers:
            return self.rfile.read(int(self.headers["content-length"]))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _answer(self, answer: dict | None = None, status: int = 200, **headers: str) -> None:
        data = json.dumps(answer or {}).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def _fails(self) -> bool:
        self.server.asked.append(self.path)
        fails = bool(self.server.refused) and self.server.refused in self.path
        if fails:
            self._answer({"error": "no space left"}, 400)
        return fails

    def do_PUT(self) -> None:
        body = self._body()
        # Some have arrived by then.
        if len(self.server.objects) > 1 and self._fails():
            return
        oid = self.path.rpartition("/")[2]
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.objects[oid] = body
        self._answer()

    def do_POST(self) -> None:
        body = self._body()
        token = self.headers.get("authorization", "")
        if self._fails():
            return
        if token != "Bearer hf_write":
            self._answer({"error": "no"}, 403 if token else 401)
        elif self.path.endswith("/commit/main"):
            self._commit([json.loads(line) for line in body.splitlines()])
        else:
            self._route(json.loads(body))

    def do_GET(self) -> None:
        self._answer({"error": "not found"}, 404)

    def _route(self, body: dict) -> None:
        if self.path == "/api/repos/create":
            self._create(body)
        elif self.path == "/api/validate-yaml":
            assert isinstance(yaml.safe_load(body["content"].split("---")[1]), dict)
            self._answer({"warnings": [], "errors": []})
        elif self.path.endswith("/preupload/main"):
            self._answer({"files": [
                {"path": f["path"], "shouldIgnore": False, "uploadMode":
                 "lfs" if self.server.large and f["path"].endswith(LFS) else "regular"}
                for f in body["files"]]})
        elif self.path.endswith(".git/info/lfs/objects/batch"):
            self._answer({"transfer": "basic", "objects": [
                {"oid": o["oid"], "size": o["size"], "actions":
                 {"upload": {"href": f"{self.server.endpoint}/objects/{o['oid']}"}}}
                for o in body["objects"]]})
        else:
            self._answer({"error": f"unknown {self.path}"}, 404)

    def _create(self, body: dict) -> None:
        self.server.created.append(body)
        kind = body.get("type", "model") + "s"
        name = f"{body['organization'] or 'me'}/{body['name']}"
        url = "/".join([self.server.endpoint, *(["datasets"] if kind == "datasets" else []), name])
        exists = f"{kind}/{name}" in self.server.repos
        self.server.repos.setdefault(f"{kind}/{name}", {})
        self._answer({"url": url}, 409 if exists else 200)

    def _commit(self, lines: list[dict]) -> None:
        repo = self.path.removeprefix("/api/").removesuffix("/commit/main")
        files = self.server.repos[repo]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
        url = f"{self.server.endpoint}/{repo.removeprefix('models/')}/commit/{'0' * 40}"
        self._answer({"commitUrl": url, "commitOid": "0" * 40})


@pytest.fixture
def hub(monkeypatch):
    """A stand-in that this process takes for the Hub, with somebody logged in."""
    server = Hub()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("HF_TOKEN", "hf_write")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    # Its large-file protocol is a service of its own; LFS is the one every client falls back to.
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True, raising=False)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def merged(tmp_path_factory, families) -> Path:
    """A merge as mergekit leaves it: card, configuration, and weights in shards."""
    folder = make_output(tmp_path_factory.mktemp("merged") / "out", HUB)
    model = AutoModelForCausalLM.from_pretrained(families("llama")["expert0"])
    model.save_pretrained(folder, max_shard_size="60KB")
    assert (folder / "model.safetensors.index.json").exists()
    return folder


@pytest.fixture
def out(tmp_path, merged) -> Path:
    return Path(shutil.copytree(merged, tmp_path / "out"))
