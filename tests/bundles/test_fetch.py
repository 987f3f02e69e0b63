"""Bundles that are fetched by their digest, from a folder and over HTTP, and checked."""

from __future__ import annotations

import functools
import http.server
import subprocess
import sys
import threading

import pytest

from lcm_compile.bundles.bundle import open_bundle
from lcm_compile.bundles.fetch import fetch_bundle
from lcm_compile.errors import BundleError

pytestmark = pytest.mark.usefixtures("own_home")


@pytest.fixture
def place(bundle, tmp_path):
    """A folder that has a bundle by its digest, and the digest."""
    digest = open_bundle(bundle).digest
    (tmp_path / "place").mkdir()
    bundle.rename(tmp_path / "place" / digest)
    return tmp_path / "place", digest


@pytest.fixture
def served(place):
    """The URL of that folder, the digest, and the paths that were asked for."""
    paths = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, form, *values):
            paths.append(self.path)

    handler = functools.partial(Handler, directory=str(place[0]))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/", place[1], paths
        server.shutdown()


def test_processes_of_a_machine_fetch_it_once(served, own_home):
    url, digest, paths = served
    code = f"from lcm_compile.bundles.fetch import fetch_bundle; fetch_bundle({digest!r}, {url!r})"
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    own = fetch_bundle(digest, url)
    assert own.digest == digest and own.folder == own_home / "fetched" / digest
    assert sorted(paths) == sorted(f"/{digest}/{name}" for name in ("manifest.json", *own.manifest.files))


def test_a_copy_that_was_damaged_is_fetched_again(place):
    folder, digest = place
    own = fetch_bundle(digest, str(folder))
    file = own.path(own.manifest.stages[0].file)
    file.write_bytes(b"damaged")
    assert open_bundle(fetch_bundle(digest, str(folder)).folder).digest == digest


def test_what_is_not_what_the_digest_says_is_refused_and_not_kept(place, own_home):
    folder, digest = place
    with pytest.raises(BundleError, match="can't be fetched"):
        fetch_bundle("0" * 64, str(folder))
    file = next((folder / digest / "engines").iterdir())
    content = file.read_bytes()
    file.write_bytes(content + b"more")
    with pytest.raises(BundleError, match="not what its sha256 says"):
        fetch_bundle(digest, str(folder))
    file.write_bytes(content)
    manifest = folder / digest / "manifest.json"
    manifest.write_bytes(manifest.read_bytes() + b"\n")
    with pytest.raises(BundleError, match="not what its sha256 says"):
        fetch_bundle(digest, str(folder))
    assert [*(own_home / "fetched").iterdir()] == []


def test_a_server_that_answers_with_an_error_or_not_at_all_is_told(served, refused):
    url, digest, _ = served
    with pytest.raises(BundleError, match=r"manifest\.json can't be fetched: .*404|Not Found"):
        fetch_bundle("0" * 64, url)
    with pytest.raises(BundleError, match="can't be fetched"):
        fetch_bundle(digest, "http://127.0.0.1:9/")
