"""Fetching weights: already there, from a server of the test's own, and without a connection."""

import hashlib
import http.server
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import constants, file_download

from ldm.cli import run_command
from ldm.commands import fetch as fetch_weights
from ldm.errors import UserError
from ldm.features import weights as known

COMMIT = "0123456789abcdef0123456789abcdef01234567"
DINOV2 = "timm/vit_small_patch14_dinov2.lvd142m"


@pytest.fixture
def caches(tmp_path, monkeypatch) -> Path:
    """Empty caches of torch and Hugging Face."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    return tmp_path


@pytest.fixture
def server():
    """Serves what is in its `files`, by path, as the hub does (a commit and an etag)."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self._answer(body=False)

        def do_GET(self):
            self._answer(body=True)

        def _answer(self, body: bool):
            content = self.server.files.get(self.path.partition("?")[0])
            self.server.asked.append(self.path)
            self.send_response(200 if content is not None else 404)
            content = content or b""
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", hashlib.sha256(content).hexdigest())
            self.send_header("X-Repo-Commit", COMMIT)
            if not content:
                self.send_header("X-Error-Code", "EntryNotFound")
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, *args):
            pass

    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    running.files, running.asked = {}, []
    running.url = f"http://127.0.0.1:{running.server_port}"
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    yield running
    running.shutdown()
    running.server_close()
    thread.join()


def published(monkeypatch, server, content: bytes, prefix: str) -> known.Weights:
    """Inception's entry, with its file on the test's server."""
    url = f"{server.url}/weights-inception-{prefix}.pth"
    server.files[f"/weights-inception-{prefix}.pth"] = content
    entry = replace(known.WEIGHTS["inception"], url=url, hash_prefix=prefix)
    monkeypatch.setitem(known.WEIGHTS, "inception", entry)
    return entry


def test_a_file_is_fetched_once_into_the_cache_of_torch(caches, server, monkeypatch, capsys):
    digest = hashlib.sha256(b"weights").hexdigest()
    entry = published(monkeypatch, server, b"weights", digest[:8])
    with pytest.raises(UserError, match="not on this machine"):
        entry.require()
    fetch_weights.main(["inception"])
    line = f"inception: {entry.place} sha256 {digest}"
    assert capsys.readouterr().out.strip() == line
    assert entry.place.read_bytes() == b"weights" and entry.require() == entry.place
    asked = len(server.asked)
    fetch_weights.main(["inception"])  # already there
    assert capsys.readouterr().out.strip() == line
    assert len(server.asked) == asked


def test_a_file_of_another_hash_is_not_kept(caches, server, monkeypatch):
    entry = published(monkeypatch, server, b"an error page", "6726825d")
    with pytest.raises(UserError, match="inception: .*invalid hash value"):
        fetch_weights.main(["inception"])
    assert not entry.place.exists() and not list(entry.place.parent.iterdir())


def test_dinov2_goes_into_the_cache_of_hugging_face(caches, server, monkeypatch, capsys):
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    for module in (constants, file_download):  # releases before 1.0 use a copy
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    # This repository has the second of the two usual names only.
    for revision in ("main", COMMIT):
        server.files[f"/{DINOV2}/resolve/{revision}/pytorch_model.bin"] = b"dino"
    fetch_weights.main(["dinov2"])
    name, path, _, digest = capsys.readouterr().out.split()
    assert name == "dinov2:" and Path(path).read_bytes() == b"dino"
    assert digest == hashlib.sha256(b"dino").hexdigest()
    assert caches / "hub" in Path(path).parents
    assert known.WEIGHTS["dinov2"].find() == Path(path)


def test_offline_is_one_line_that_names_every_file(caches, monkeypatch, capfd):
    # A port that nobody listens on, for both ways of fetching.
    dead = "http://127.0.0.1:9"
    monkeypatch.setattr(constants, "ENDPOINT", dead)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", dead + "/{repo_id}/resolve/{revision}/{filename}"
    )
    for name in ("inception", "lpips"):
        entry = known.WEIGHTS[name]
        monkeypatch.setitem(known.WEIGHTS, name, replace(entry, url=f"{dead}/{entry.place.name}"))
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: fetch_weights.main([]))
    error = capfd.readouterr().err
    assert stop.value.code == 2 and len(error.splitlines()) == 1
    for name in fetch_weights.USUAL:
        assert f"{name}: " in error
    assert f"put it at {known.WEIGHTS['lpips'].place}" in error
    assert "refused" in error


def test_the_offline_switch_of_hugging_face_is_followed(caches, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="dinov2: .*cannot be fetched"):
        fetch_weights.main(["dinov2"])


def test_list_shows_what_is_here_and_fetches_nothing(caches, monkeypatch, capsys):
    place = known.WEIGHTS["lpips"].place
    place.parent.mkdir(parents=True)
    place.write_bytes(b"vgg")
    fetch_weights.main(["--list"])
    lines = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert set(lines) == set(fetch_weights.NAMES) == set(known.WEIGHTS)
    assert lines["lpips"] == f"{place} sha256 {hashlib.sha256(b'vgg').hexdigest()}"
    assert lines["inception"].startswith("not here") and "torch-fidelity" in lines["inception"]


def test_places_are_those_that_the_libraries_look_into(caches):
    from torchvision.models import VGG16_Weights

    from ldm.models.perceptual import read_backbone

    assert known.WEIGHTS["lpips"].url == VGG16_Weights.IMAGENET1K_V1.url
    with pytest.raises(UserError, match=str(known.WEIGHTS["lpips"].place)):
        read_backbone(None)
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    assert known.WEIGHTS["inception"].url == URL_INCEPTION_V3


def test_unknown_names():
    with pytest.raises(UserError, match="unknown weights clip; choose among inception"):
        fetch_weights.main(["clip"])
