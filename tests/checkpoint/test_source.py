"""What people call a model: paths, folders of the Hub's cache, ids of the Hub. The Hub is a small fake one on
127.0.0.1, asked by huggingface_hub itself in a fresh process (it reads its settings when it is imported).
"""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import nanohybrid
from nanohybrid.checkpoint import display_name, load_config, resolve, save
from nanohybrid.errors import CheckpointError

ID, COMMIT, OLDER = "org/tiny-model", "a" * 40, "b" * 40


@pytest.fixture
def files(tmp_path, model):
    """A repository: a checkpoint, and what must not be downloaded."""
    folder = tmp_path / "repository"
    save(model, folder)
    (folder / "modeling_tiny.py").write_text("raise SystemExit('never')")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    (folder / "consolidated.safetensors").write_bytes(b"the same again")
    (folder / "README.md").write_text("# tiny")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "config.json").write_text("{}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")
    (folder / "tiny-Q8_0.gguf").write_bytes(b"GGUF")
    return folder


NEEDED = {
    "config.json", "generation_config.json", "model.safetensors", "additional_chat_templates/tool_use.jinja",
}  # fmt: skip


@pytest.fixture
def cached(tmp_path, model):
    """The cache's folder of a repository as huggingface_hub lays it out: blobs, refs, snapshots of links."""
    save(model, tmp_path / "plain")
    save(model.bfloat16(), tmp_path / "older")
    folder = tmp_path / "hub" / "models--org--tiny-model"
    for commit, source in ((COMMIT, tmp_path / "plain"), (OLDER, tmp_path / "older")):
        (folder / "snapshots" / commit).mkdir(parents=True)
        (folder / "blobs").mkdir(exist_ok=True)
        for file in source.iterdir():
            blob = folder / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
            blob.write_bytes(file.read_bytes())
            (folder / "snapshots" / commit / file.name).symlink_to(f"../../blobs/{blob.name}")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    (folder / "refs" / "v1").write_text(OLDER)
    return folder


class Hub(http.server.BaseHTTPRequestHandler):
    """One repository at one commit: the requests that huggingface_hub makes, and a record of them."""

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        hub, path = self.server.hub, self.path.partition("?")[0]
        hub.requests.append((self.command, path, self.headers.get("Authorization")))
        listed = [file for file in sorted(hub.files.rglob("*")) if file.is_file()]
        names = {file.relative_to(hub.files).as_posix(): file for file in listed}
        if hub.token is not None and self.headers.get("Authorization") != f"Bearer {hub.token}":
            return self.send(401, b'{"error": "who are you?"}', {"X-Error-Code": "RepoNotFound"}, body)
        if path.startswith(f"/api/models/{ID}/revision/"):
            if path.rpartition("/")[2] not in ("main", COMMIT):
                return self.send(404, b'{"error": "none"}', {"X-Error-Code": "RevisionNotFound"}, body)
            siblings = [{"rfilename": name} for name in names]
            found = {"id": ID, "sha": COMMIT, "siblings": siblings, "private": False}
            return self.send(200, json.dumps(found).encode(), {}, body)
        if path.startswith(f"/api/models/{ID}/tree/"):
            tree = [
                {"type": "file", "path": name, "size": file.stat().st_size, "oid": etag(file)}
                for name, file in names.items()
            ]
            return self.send(200, json.dumps(tree).encode(), {}, body)
        name = path.removeprefix(f"/{ID}/resolve/{COMMIT}/").removeprefix(f"/{ID}/resolve/main/")
        if name in names:
            headers = {"ETag": f'"{etag(names[name])}"', "X-Repo-Commit": COMMIT}
            if hub.gated:
                return self.send(403, b"", {"X-Error-Code": "GatedRepo"}, body)
            return self.send(200, names[name].read_bytes(), headers, body)
        code = "EntryNotFound" if path.startswith(f"/{ID}/") else "RepoNotFound"
        return self.send(404, b'{"error": "none"}', {"X-Error-Code": code}, body)

    def send(self, status, content, headers, body):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)


def etag(file):
    return hashlib.sha1(file.read_bytes()).hexdigest()


class FakeHub:
    """The server, and calls of ours that use it."""

    def __init__(self, files, home):
        self.files, self.home, self.requests, self.token, self.gated = files, home, [], None, False
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
        self.server.hub = self
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def stop(self):
        self.server.shutdown()
        self.server.server_close()

    def run(self, *command, **environment):
        """Run Python in a fresh process that asks this hub."""
        settings = {
            **os.environ, "HF_HUB_OFFLINE": "0", "HF_HOME": str(self.home), "HF_HUB_DISABLE_XET": "1",
            "HF_ENDPOINT": f"http://127.0.0.1:{self.server.server_port}", "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1", **environment,
        }  # fmt: skip
        settings.pop("HF_HUB_CACHE", None)
        return subprocess.run(
            [sys.executable, *command], env=settings, capture_output=True, text=True, timeout=120
        )

    def nanohybrid(self, *command, **environment):
        return self.run("-m", "nanohybrid", *command, **environment)

    def resolve(self, model, weights=True, **environment):
        code = f"from nanohybrid.checkpoint.source import resolve; print(resolve({model!r}, {weights}))"
        done = self.run("-c", code, **environment)
        assert done.returncode == 0, done.stderr
        return Path(done.stdout.strip().splitlines()[-1])


@pytest.fixture
def hub(files, tmp_path):
    running = FakeHub(files, tmp_path / "home")
    yield running
    running.stop()


def error_of(done):
    """The one line of an error; no traceback."""
    lines = [line for line in done.stderr.splitlines() if line.startswith("nanohybrid: error: ")]
    assert done.returncode == 2 and len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
    return lines[0]


def test_a_path_that_exists_wins_over_an_id(tmp_path, good, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    good.rename(tmp_path / "org" / "tiny-model")
    assert resolve(ID) == Path(ID) and load_config(ID).vocab_size == 48
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert resolve(tmp_path / "model.gguf") == tmp_path / "model.gguf"


@pytest.mark.parametrize("name", ["nowhere", "./org/model", "/org/model", "a/b/c", "org/"])
def test_what_is_neither_a_path_nor_an_id_is_a_missing_directory(name):
    assert resolve(name) == Path(name)
    with pytest.raises(CheckpointError, match="no such directory"):
        load_config(name)


def test_a_name_that_no_file_can_have_is_one_line():
    with pytest.raises(CheckpointError, match=r"^x{57}\.\.\.: cannot be looked up"):
        load_config("x" * 5000)


def test_a_cache_folder_is_its_newest_snapshot(cached):
    assert resolve(cached) == cached / "snapshots" / COMMIT
    assert load_config(cached) == load_config(cached / "snapshots" / COMMIT)
    for revision, commit in (("v1", OLDER), (COMMIT, COMMIT), ("bbbb", OLDER)):
        assert resolve(f"{cached}@{revision}") == cached / "snapshots" / commit
    loaded = nanohybrid.load(cached, quantize="int8")
    assert loaded.config.vocab_size == 48
    assert display_name(resolve(cached)) == "org/tiny-model"
    (cached / "refs" / "main").unlink()
    with pytest.raises(CheckpointError, match=r"no single snapshot of main; .*@REVISION: aaaa"):
        resolve(cached)
    with pytest.raises(CheckpointError, match="no single snapshot of v9"):
        resolve(f"{cached}@v9")
    with pytest.raises(CheckpointError, match="no single snapshot of"):
        resolve(f"{cached}@../../../secret")


def test_a_cache_folder_with_one_snapshot_needs_no_reference(cached):
    for link in (cached / "snapshots" / OLDER).iterdir():
        link.unlink()
    (cached / "snapshots" / OLDER).rmdir()
    (cached / "refs" / "main").unlink()
    assert resolve(cached) == cached / "snapshots" / COMMIT


def test_a_filled_cache_serves_an_id_without_a_connection(cached, hub):
    offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cached.parent)}
    settings = {**os.environ, **offline}
    inspect = [sys.executable, "-m", "nanohybrid", "inspect", ID, "--json"]
    done = subprocess.run(inspect, env=settings, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["config"]["vocab_size"] == 48
    inspect[4] = f"{ID}@v1"
    done = subprocess.run(inspect, env=settings, capture_output=True, text=True, timeout=120)
    assert json.loads(done.stdout)["dtype"] == "bfloat16"
    assert not hub.requests


def test_an_id_is_downloaded_once_and_is_there_offline(hub):
    path = hub.resolve(ID)
    assert path.name == COMMIT and display_name(path) == ID
    found = {file.relative_to(path).as_posix() for file in path.rglob("*") if not file.is_dir()}
    assert found == NEEDED
    assert nanohybrid.load(path).config.vocab_size == 48
    before = [request for request in hub.requests if "/resolve/" in request[1]]
    assert hub.resolve(ID) == path
    assert [request for request in hub.requests if "/resolve/" in request[1]] == before
    assert hub.resolve(ID, HF_HUB_OFFLINE="1") == path
    hub.stop()
    assert hub.resolve(ID) == path


def test_only_texts_are_downloaded_where_no_weights_are_needed(hub):
    done = hub.nanohybrid("inspect", ID, "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["weights"] == "none beside config.json" and facts["config"]["vocab_size"] == 48
    assert not [path for _, path, _ in hub.requests if path.endswith((".safetensors", ".py", ".bin"))]
    done = hub.nanohybrid("verify", ID, HF_HUB_OFFLINE="1")
    assert f"hf download {ID}" in error_of(done)


def test_one_gguf_file_of_a_repository(hub):
    path = hub.resolve(f"{ID}/tiny-Q8_0.gguf")
    assert path.name == "tiny-Q8_0.gguf" and path.read_bytes() == b"GGUF"
    assert display_name(path) == "tiny-Q8_0"
    assert hub.resolve(f"{ID}/tiny-Q8_0.gguf", HF_HUB_OFFLINE="1") == path


def test_a_private_repository_takes_the_token_of_the_environment(hub):
    hub.token = "hf_secret"
    assert "HF_TOKEN" in error_of(hub.nanohybrid("inspect", ID))
    assert hub.resolve(ID, HF_TOKEN="hf_secret").name == COMMIT
    assert "hf_secret" not in error_of(hub.nanohybrid("inspect", "org/other", HF_TOKEN="hf_secret"))


def test_errors_of_the_hub_are_one_line_with_the_way_out(hub):
    assert "no such model on the Hub" in error_of(hub.nanohybrid("generate", "org/none", "--prompt", "x"))
    assert "no revision v9" in error_of(hub.nanohybrid("inspect", f"{ID}@v9"))
    assert "no file other.gguf" in error_of(hub.nanohybrid("inspect", f"{ID}/other.gguf"))
    offline = error_of(hub.nanohybrid("serve", "org/none@v2", HF_HUB_OFFLINE="1"))
    assert offline.endswith("hf download org/none --revision v2")
    hub.gated = True
    assert "accept the terms" in error_of(hub.nanohybrid("verify", ID))
    hub.gated = False
    (hub.files / "model.safetensors").unlink()
    assert "lists a file that it does not have" in error_of(hub.nanohybrid("verify", ID))
    hub.stop()
    assert "the Hub cannot be reached" in error_of(hub.nanohybrid("inspect", "org/none"))


def test_a_repository_without_a_configuration_says_how_to_name_its_gguf_file(hub):
    (hub.files / "config.json").unlink()
    assert f"{ID}/FILE.gguf" in error_of(hub.nanohybrid("inspect", ID))
