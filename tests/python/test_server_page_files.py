"""The page's files, what they may do and who gets them; no browser is needed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest

pytest.importorskip("fastapi", reason="needs tidaldecode[serve]")

import tidaldecode  # noqa: E402
from serving import serving  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]


def test_the_files_and_what_they_may_do(demo_model: Path):
    with serving(demo_model) as served:
        response = httpx.get(served.url + "/")
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/html")
        policy = response.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert not any(word in policy for word in ("unsafe", "data:", "http", "*"))
        for name in ("main.js", "style.css", "icon.svg", "vendor/preact.js", "vendor/LICENSES.txt"):
            assert httpx.get(f"{served.url}/web/{name}").status_code == 200, name
        assert httpx.head(served.url + "/").status_code == 200
        for name in ("nothing.js", "../app.py", "..%2fapp.py", "%2e%2e/app.py", ""):
            assert httpx.get(f"{served.url}/web/{name}").status_code == 404, name


def test_without_the_page(demo_model: Path):
    with serving(demo_model, web=False) as served:
        for route in ("/", "/web/main.js"):
            assert httpx.get(served.url + route).status_code == 404


def test_a_key_as_password_is_not_taken_from_other_sites(demo_model: Path):
    with serving(demo_model, api_keys=("first",)) as served:
        host = served.url.removeprefix("http://")
        for headers, status in (
            ({}, 200),
            ({"sec-fetch-site": "same-origin", "origin": "https://front"}, 200),
            ({"sec-fetch-site": "cross-site"}, 401),
            ({"sec-fetch-site": "same-site"}, 401),
            ({"origin": f"http://{host}"}, 200),
            ({"origin": "http://other"}, 401),
            ({"origin": "null"}, 401),
        ):
            url = served.url + "/v1/models"
            assert httpx.get(url, auth=("", "first"), headers=headers).status_code == status
            keyed = headers | {"authorization": "Bearer first"}
            assert httpx.get(url, headers=keyed).status_code == 200


def test_make_serve_demo_serves_until_it_is_interrupted():
    """The make rule as it is, but for its installing."""
    venv = Path(sys.prefix)
    there = [part for name in (".installed", ".serve-deps") for part in ("-o", f"{venv}/{name}")]
    command = ["make", f"VENV={venv}", *there, "serve-demo", "SERVE=--port 0 --device cpu"]
    path = Path(tidaldecode.__file__).parents[1]
    make = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(path)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    watchdog = threading.Timer(90, os.killpg, (make.pid, signal.SIGKILL))
    watchdog.start()
    try:
        lines = iter(make.stdout.readline, "")  # the server says where it is once it is ready
        url = next(found[1] for line in lines if (found := re.search(r"at (http\S+)$", line)))
        assert httpx.get(url + "/live").json() == {"status": "live"}
        assert "<title>tidaldecode</title>" in httpx.get(url + "/").text
        os.killpg(make.pid, signal.SIGINT)
        make.wait(30)
    finally:
        watchdog.cancel()
        if make.poll() is None:
            os.killpg(make.pid, signal.SIGKILL)
        make.communicate()
