"""`evaluate serve`: what it answers, whom it refuses, the search, and a text of one's own through a tiny model."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from served import ask, model_folder, text
from warm_processes import WarmPython

from evaluate.config import EvaluateConfig
from evaluate.report.http_pages import MAX_BODY, PageApi, PageServer
from evaluate.report.notes import Notes
from evaluate.report.page_set import asset_files
from evaluate.report.serve import FIRST_PORT, ReportServer, serve_report
from evaluate.report.window_search import CONTEXTS, Found, WindowIndex
from matryoshka.errors import UserError


def test_the_files_of_the_folder_and_nothing_else(server: PageServer, harvested: Path) -> None:
    folder = server.api.folder
    for name in ("data/overview.js", "data/chunk-0.js", "pages.json"):
        status, headers, body = ask(server, "GET", f"/{name}")
        assert (status, body) == (200, (folder / name).read_bytes())
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
    status, headers, body = ask(server, "GET", "/")
    assert status == 200
    assert b"assets/live.js" in body
    assert b"assets/live.js" not in (folder / "index.html").read_bytes()
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert "unsafe" not in headers["Content-Security-Policy"]
    assert ask(server, "GET", "/assets/live.js")[2] == asset_files()["live.js"]
    assert ask(server, "HEAD", "/")[2] == b""
    secret = harvested / "l1-k9" / "run.json"
    for path in (
        "/../../../run.json",
        "/..%2f..%2f..%2frun.json",
        "//etc/passwd",
        "/assets/../../../../run.json",
        f"/{secret}",
        "/data",
        "/data/",
        "/assets/../pages.json",
    ):
        status, headers, body = ask(server, "GET", path)
        assert status == 404
        assert b"format_version" not in body
        assert "default-src 'none'" in headers["Content-Security-Policy"]


def test_other_pages_cannot_ask(server: PageServer) -> None:
    port = server.port
    assert server.server_address[0] == "127.0.0.1"
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1", f"0.0.0.0:{port}", None):
        assert ask(server, "GET", "/", Host=host)[0] == 421
        assert ask(server, "POST", "/api/try", text("w1"), Host=host)[0] == 421
    assert ask(server, "GET", "/", Host=f"localhost:{port}")[0] == 200
    for origin in (None, "null", "http://evil.example", f"https://127.0.0.1:{port}", f"http://127.0.0.1:{port + 1}"):
        assert ask(server, "POST", "/api/try", text("w1"), Origin=origin)[0] == 403
    for site in ("cross-site", "same-site"):
        assert ask(server, "POST", "/api/try", text("w1"), Sec_Fetch_Site=site)[0] == 403
        assert ask(server, "GET", "/api/search?q=w1", Sec_Fetch_Site=site)[0] == 403
    assert ask(server, "GET", "/api/search?q=w1", Sec_Fetch_Site="same-origin")[0] == 200


@pytest.mark.parametrize(
    ("status", "body", "headers"),
    [
        (415, text("w1"), {"Content_Type": "text/plain"}),
        (415, text("w1"), {"Content_Type": "application/x-www-form-urlencoded"}),
        (411, None, {}),
        (411, None, {"Content_Length": "-5"}),
        (413, None, {"Content_Length": str(MAX_BODY + 1)}),
        (400, b"{", {}),
        (400, b"\xff\xfe", {}),
        (400, b"[" * 60_000, {}),
        (400, b"[1]", {}),
        (400, text(5), {}),
        (400, text("   "), {}),
        (400, text("w1 " * 1030), {}),
    ],
)
def test_bodies_that_are_refused(
    server: PageServer, status: int, body: bytes | None, headers: dict[str, str | None]
) -> None:
    found, _, answer = ask(server, "POST", "/api/try", body, **headers)
    assert found == status
    assert json.loads(answer)["error"]


def test_methods_that_are_not_there(server: PageServer) -> None:
    assert ask(server, "PUT", "/")[0] == 501
    assert ask(server, "POST", "/", text("w1"))[0] == 404
    assert ask(server, "POST", "/api/search", text("w1"))[0] == 404
    status, headers, _ = ask(server, "OPTIONS", "/api/try")
    assert status == 501
    assert "Access-Control-Allow-Origin" not in headers


def test_the_search_asks_the_windows(server: PageServer, harvested: Path) -> None:
    words = json.loads((Path(model_folder(harvested)) / "tokenizer.json").read_text())["model"]["vocab"]
    names = {number: word for word, number in words.items()}
    index = WindowIndex.read(server.api.folder.parent / "samples", names.__getitem__)
    for query in ("w17", "W17 w5", " w3", "w1w2", "<bos>", "nowhere", "w", ""):
        for where in ("fires", "contexts"):
            status, _, body = ask(server, "GET", f"/api/search?{urlencode({'q': query, 'in': where})}")
            wanted = index.find(query, where)
            assert (status, json.loads(body)) == (200, {"latents": wanted.latents, "shares": wanted.shares})
    assert json.loads(ask(server, "GET", "/api/search?q=w17")[2])["shares"]
    assert ask(server, "GET", f"/api/search?q={'w' * 201}")[0] == 400
    assert ask(server, "GET", "/api/search?q=w&in=nowhere")[0] == 400
    assert json.loads(ask(server, "GET", "/api/search")[2]) == {"latents": [], "shares": []}


def test_pages_are_made_when_there_are_none(harvested: Path, tmp_path: Path) -> None:
    shutil.copytree(harvested / "l1-k9", tmp_path / "l1-k9")
    (report,) = (tmp_path / "l1-k9").glob("eval/*/report")
    (report / "pages.json").unlink()
    config = EvaluateConfig.model_validate({"shards": harvested / "l1", "device": "cpu", "samples": {"before": 6}})
    served = serve_report(tmp_path / "l1-k9", config)
    served.server.server_close()
    assert (report / "pages.json").is_file()
    shutil.rmtree(report.parent)
    with pytest.raises(UserError, match="was trained on l1, and no shard set is there any more"):
        serve_report(tmp_path / "l1-k9", EvaluateConfig(device="cpu"))


def test_a_port_that_is_taken(server: PageServer, tmp_path: Path) -> None:
    api = PageApi("", tmp_path, {}, lambda *_: Found([], None), lambda _: {}, lambda _: {}, Notes(tmp_path, 48))
    with pytest.raises(UserError, match=f"port {server.port} of 127.0.0.1 is not available"):
        PageServer(api, server.port)


def test_the_port_stays_the_same_until_it_is_taken(harvested: Path) -> None:
    run, config = harvested / "l1-k9", EvaluateConfig(device="cpu")
    served: list[ReportServer] = []
    try:
        served += [serve_report(run, config) for _ in range(2)]
        first, second = (one.server.port for one in served)
        assert FIRST_PORT == 8765
        # A stranger may have the first ones: then the next.
        assert FIRST_PORT <= first < second < FIRST_PORT + 100
        assert served[0].tunnel.startswith(f"ssh -N -L {first}:127.0.0.1:{first} ")
        with pytest.raises(UserError, match=f"port {first} of 127.0.0.1 is not available"):
            serve_report(run, config, port=first)
    finally:
        for one in served:
            one.server.server_close()


def test_no_port_that_is_free(server: PageServer, harvested: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evaluate.report.serve.FIRST_PORT", server.port)
    monkeypatch.setattr("evaluate.report.serve._PORTS", 1)
    with pytest.raises(UserError, match=f"the ports {server.port} to {server.port} of 127.0.0.1 are all taken"):
        serve_report(harvested / "l1-k9", EvaluateConfig(device="cpu"))


@pytest.mark.kill
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_ctrl_c_is_the_ordinary_end(number: signal.Signals, harvested: Path, warm_python: WarmPython) -> None:
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with warm_python.start(["-m", "evaluate", "serve", "l1-k9"], harvested, environment=environment) as process:
        process.until(lambda: process.stdout.count("\n") == 2)
        found = re.search(r"http://127\.0\.0\.1:(\d+)/", process.stdout)
        assert found is not None
        connection = http.client.HTTPConnection("127.0.0.1", int(found[1]), timeout=60)
        connection.request("GET", "/data/overview.js")
        assert connection.getresponse().status == 200
        process.send_signal(number)
        assert process.wait() == 0
    _, tunnel, end = process.stdout.splitlines()
    assert tunnel.startswith(f"from another machine: ssh -N -L {found[1]}:127.0.0.1:{found[1]} ")
    assert end == "stopped"
    assert "Traceback" not in process.stderr


def test_the_live_search_in_a_browser(live: Any, server: PageServer) -> None:
    live.go("#/latents", "latents")
    live.one("#search").send_keys("W17 w5")
    wanted = server.api.search("w17 w5", "fires").latents
    live.count(f"{len(wanted)} of 48")
    shown = live.latents()
    assert shown == wanted[: len(shown)]
    pairs = (f"w{i}w{j}" for i in range(93) for j in range(93))
    answers = ((pair, server.api.search(pair, CONTEXTS).latents) for pair in pairs)
    query, wanted = next((pair, found) for pair, found in answers if 0 < len(found) < 12)
    live.one('#where option[value="contexts"]').click()
    live.one("#search").clear()
    live.one("#search").send_keys(query.upper())
    live.count(f"{len(wanted)} of 48")
    assert set(live.latents()) == set(wanted)
    loaded = live.driver.execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert not any("/text-" in name or "/fires-" in name for name in loaded)
    live.one("#search").clear()
    live.one("#search").send_keys("nothing like it")
    live.count("0 of 48")
