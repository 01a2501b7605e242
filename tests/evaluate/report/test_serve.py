"""`evaluate serve`: what it answers, whom it refuses, the search, and a text of one's own through a tiny model."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
import torch
from warm_processes import WarmPython

from evaluate.analyses.steer.steer import Writing, steer
from evaluate.config import EvaluateConfig
from evaluate.report.build import make_report
from evaluate.report.http_pages import MAX_BODY, PageApi, PageServer
from evaluate.report.live_text import N_WRITTEN, Change
from evaluate.report.notes import Notes
from evaluate.report.page_set import asset_files
from evaluate.report.serve import FIRST_PORT, ReportServer, serve_report
from evaluate.report.window_search import CONTEXTS, Found, WindowIndex
from matryoshka.errors import UserError
from matryoshka.lm import LanguageModel
from matryoshka.norms import apply_convention
from matryoshka.runs import publish_json
from matryoshka.shards import ShardSet
from matryoshka.transcoder import Transcoder


@pytest.fixture(scope="module")
def place(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, tiny_text: Path, made: Any, warm_python: WarmPython
) -> Path:
    """A folder with a shard set l1 that was harvested from a tiny model, and a run with a report."""
    folder = tmp_path_factory.mktemp("served")
    words = ["--model", tiny_llama, "--dataset", tiny_text, "--layer", "1", "--tokens", "3k", "--out", "l1"]
    words += ["--set", "harvest.ctx_len=32", "--set", "harvest.val_fraction=0.3", "--device", "cpu", "--dtype", "fp32"]
    done = warm_python.run(["-m", "harvest", "run", *words], folder)
    assert done.returncode == 0, done.stderr
    hooks = {"source_hook": "blocks.1.hook_resid_mid", "target_hook": "blocks.1.hook_mlp_out"}
    model = {"model": str(tiny_llama), "model_revision": None, "input": "normalized"}
    run = made.run(folder / "l1-k9", made.transcoder(d_in=24, d_out=24, **hooks, **model))
    publish_json(run / "run.json", {"format_version": 1, "config": {"shards": "l1"}})
    config = EvaluateConfig.model_validate({"shards": folder / "l1", "device": "cpu", "samples": {"before": 6}})
    assert make_report(run, config).notes == ()
    return folder


@pytest.fixture(scope="module")
def server(place: Path) -> Iterator[PageServer]:
    served = serve_report(place / "l1-k9", EvaluateConfig(device="cpu"))
    thread = threading.Thread(target=served.server.serve_forever, daemon=True)
    thread.start()
    yield served.server
    served.server.shutdown()
    served.server.server_close()
    thread.join(10)


def ask(server: PageServer, method: str, path: str, body: bytes | None = None, **headers: str | None) -> Any:
    """(status, headers, body); headers replace those of our own page, None leaves one out."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    own = {"Host": f"127.0.0.1:{server.port}"}
    if method == "POST":
        own |= {"Origin": f"http://127.0.0.1:{server.port}", "Content-Type": "application/json"}
    own |= {name.replace("_", "-"): value for name, value in headers.items()}  # type: ignore[misc]
    try:
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        for name, value in own.items():
            if value is not None:
                connection.putheader(name, value)
        if body is not None and "Content-Length" not in own:
            connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body)
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()
    finally:
        connection.close()


def text(content: Any) -> bytes:
    return json.dumps({"text": content}).encode()


def test_the_files_of_the_folder_and_nothing_else(server: PageServer, place: Path) -> None:
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
    secret = place / "l1-k9" / "run.json"
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


def test_the_search_asks_the_windows(server: PageServer, place: Path) -> None:
    words = json.loads((Path(model_folder(place)) / "tokenizer.json").read_text())["model"]["vocab"]
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


def model_folder(place: Path) -> str:
    return str(ShardSet.open(place / "l1").manifest.model["model"])


def by_hand(place: Path, words: str) -> list[dict[int, float]]:
    """Latent -> activation of each token, from the model and the transcoder themselves."""
    shards = ShardSet.open(place / "l1")
    model = LanguageModel.load(model_folder(place), dtype="float32", device="cpu")
    tokens = [model.bos_id, *model.tokenizer.convert_tokens_to_ids(words.split())]
    hook = "blocks.1.hook_resid_mid"
    raw = model.capture(torch.tensor([tokens]), [hook])[hook][0]
    transcoder = Transcoder.load(place / "l1-k9" / "checkpoints" / "step-000400")
    x = apply_convention(raw, "normalized", source_site="resid_mid", norm=shards.norm)
    return [{i: act for i, act in enumerate(row) if act > 0} for row in transcoder.encode(x).tolist()][1:]


def test_a_text_of_ones_own(server: PageServer, place: Path) -> None:
    status, _, body = ask(server, "POST", "/api/try", text("w5 w17 <script> w80"))
    assert status == 200
    tokens = json.loads(body)["tokens"]
    assert [token["text"] for token in tokens] == ["w5", "w17", "<unk>", "w80"]
    # <unk> is a special token: harvested sets hold none, and no transcoder is applied to it.
    assert tokens[2]["latents"] == []
    wanted = by_hand(place, "w5 w17 <unk> w80")
    for i in (0, 1, 3):
        found = tokens[i]["latents"]
        assert {latent: pytest.approx(act, rel=1e-3) for latent, act in found} == wanted[i]
        assert [act for _, act in found] == sorted((act for _, act in found), reverse=True)


def test_when_the_shard_set_is_gone_the_page_says_so(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "l1-k9", tmp_path / "l1-k9")
    served = serve_report(tmp_path / "l1-k9", EvaluateConfig(device="cpu"))
    try:
        with pytest.raises(UserError, match="no shard set is there any more; name where it is now with --shards"):
            served.server.api.try_text("w1")
    finally:
        served.server.server_close()


def test_pages_are_made_when_there_are_none(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "l1-k9", tmp_path / "l1-k9")
    (report,) = (tmp_path / "l1-k9").glob("eval/*/report")
    (report / "pages.json").unlink()
    config = EvaluateConfig.model_validate({"shards": place / "l1", "device": "cpu", "samples": {"before": 6}})
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


def test_the_port_stays_the_same_until_it_is_taken(place: Path) -> None:
    run, config = place / "l1-k9", EvaluateConfig(device="cpu")
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


def test_no_port_that_is_free(server: PageServer, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evaluate.report.serve.FIRST_PORT", server.port)
    monkeypatch.setattr("evaluate.report.serve._PORTS", 1)
    with pytest.raises(UserError, match=f"the ports {server.port} to {server.port} of 127.0.0.1 are all taken"):
        serve_report(place / "l1-k9", EvaluateConfig(device="cpu"))


@pytest.mark.kill
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_ctrl_c_is_the_ordinary_end(number: signal.Signals, place: Path, warm_python: WarmPython) -> None:
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with warm_python.start(["-m", "evaluate", "serve", "l1-k9"], place, environment=environment) as process:
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


@pytest.fixture
def live(browser: Any, server: PageServer) -> Any:
    """The browser on the served pages."""
    return browser.on(f"http://127.0.0.1:{server.port}/")


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


def test_a_text_in_a_browser(live: Any, place: Path) -> None:
    live.go("#/try", "try")
    live.one("#text").send_keys("w5 w17 <img src=x onerror=window.hacked=1> w80")
    live.one("#go").click()
    live.wait(lambda _: live.texts("#typed .token"))
    assert live.texts("#typed .token") == ["w5", "w17", "<unk>", "<unk>", "<unk>", "w80"]
    assert live.all("#typed img, #typed unk") == []
    live.all("#typed .token")[1].click()
    wanted = by_hand(place, "w5 w17")[1]
    shown = [int(text) for text in live.texts("#of-token li a")]
    assert set(shown) == set(wanted)
    assert [wanted[latent] for latent in shown] == sorted(wanted.values(), reverse=True)
    before = live.all("#typed .token")[1].get_attribute("style")
    # By keys: the lists are drawn anew, and what had the focus has it still.
    for _ in range(2):
        live.driver.switch_to.active_element.send_keys(" ")
        assert live.driver.switch_to.active_element.text == "w17"
    assert shown == [int(text) for text in live.texts("#of-token li a")]
    live.one("#theme").click()
    live.at("try")
    assert live.one("#text").get_attribute("value").startswith("w5 w17")
    live.all("#of-token li button")[-1].click()
    assert live.driver.switch_to.active_element.text == "shade"
    assert live.all("#typed .token")[1].get_attribute("style") != before
    live.resize(390, 800)
    assert live.fits(390)
    live.all("#of-token li a")[0].click()
    live.at(f"latent/{shown[0]}")
    live.driver.back()
    live.at("try")
    assert live.texts("#typed .token")[0] == "w5"


def test_a_text_that_cannot_be_tried(live: Any) -> None:
    live.go("#/try", "try")
    live.one("#go").click()
    live.wait(lambda _: "type a few words" in live.one("#state").text)
    assert live.all("#typed .token") == []
    # The refusal itself is what the browser logs.
    assert all("400" in entry["message"] for entry in live.driver.get_log("browser"))


def asked(**content: Any) -> bytes:
    return json.dumps(content).encode()


STEER = {"latent": 20, "text": "w5 w17 w80", "how": "steer", "strength": 40}


def test_a_text_with_a_latent_changed(server: PageServer, place: Path) -> None:
    config = EvaluateConfig.model_validate({"shards": place / "l1", "device": "cpu"})
    own = steer(place / "l1-k9", 20, STEER["text"], config, scale=40, writing=Writing(N_WRITTEN))  # type: ignore[arg-type]
    status, _, body = ask(server, "POST", "/api/change", asked(**STEER))
    found = json.loads(body)
    assert status == 200
    assert (found["prompt"], found["plain"], found["changed"]) == (STEER["text"], own.plain, own.steered)
    assert found["plain"] != found["changed"]
    assert found["max_act"] == pytest.approx(own.max_act, rel=1e-2)
    # Multiplied with 1 nothing changes, with something else it does.
    same = json.loads(ask(server, "POST", "/api/change", asked(**{**STEER, "how": "ablate", "strength": 1}))[2])
    assert same["changed"] == same["plain"] == found["plain"]
    fires = server.api.try_text(str(STEER["text"]))["tokens"][1]["latents"][0][0]
    scaled = {**STEER, "latent": fires, "how": "ablate", "strength": -400}
    other = json.loads(ask(server, "POST", "/api/change", asked(**scaled))[2])
    assert other["changed"] != other["plain"] == found["plain"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latent": 48}, "the latents 0 to 47, and no latent 48"),
        ({"latent": -1}, "latent: Input should be greater than or equal to 0"),
        ({"latent": "20"}, "latent: Input should be a valid integer"),
        ({"strength": 1001}, "strength: Input should be less than or equal to 1000"),
        ({"strength": "NaN"}, "strength: "),
        ({"how": "more"}, "how: Input should be 'steer' or 'ablate'"),
        ({"text": 5}, "text: Input should be a valid string"),
        ({"text": "  "}, "type a few words"),
        ({"text": "w1 " * 300}, "the text has 300 tokens, and"),
        ({"more": 1}, "more: Extra inputs are not permitted"),
    ],
)
def test_a_change_that_cannot_be_made(change: dict[str, Any], message: str, server: PageServer) -> None:
    status, _, body = ask(server, "POST", "/api/change", asked(**{**STEER, **change}))
    assert status == 400
    assert message in json.loads(body)["error"]


def test_the_model_of_a_change_must_be_there(place: Path, tmp_path: Path) -> None:
    """A set that names a folder which is gone: a sentence, and the pages go on."""
    shutil.copytree(place / "l1-k9", tmp_path / "l1-k9")
    config = EvaluateConfig.model_validate(
        {"shards": place / "l1", "device": "cpu", "lm": {"model": str(tmp_path / "gone")}}
    )
    served = serve_report(tmp_path / "l1-k9", config)
    try:
        with pytest.raises(UserError, match=r"the language model of .*l1 is needed.*gone.*name it with --model"):
            served.server.api.change(Change.model_validate(STEER))
    finally:
        served.server.server_close()


def test_notes_are_kept_and_a_stale_one_is_refused(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "l1-k9", tmp_path / "l1-k9")
    served = serve_report(tmp_path / "l1-k9", EvaluateConfig.model_validate({"shards": place / "l1", "device": "cpu"}))
    server = served.server
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    new = {"latent": 4, "star": True, "text": "<b>mine</b>", "changes": 0}
    try:
        assert json.loads(ask(server, "GET", "/api/notes")[2]) == {"notes": {}}
        status, _, body = ask(server, "POST", "/api/note", asked(**new))
        kept = {"star": True, "text": "<b>mine</b>", "changes": 1}
        assert (status, json.loads(body)) == (200, kept)
        status, _, body = ask(server, "POST", "/api/note", asked(**{**new, "text": "another tab"}))
        assert (status, json.loads(body)["note"]) == (409, kept)
        assert json.loads(ask(server, "GET", "/api/notes")[2]) == {"notes": {"4": kept}}
        assert Notes(tmp_path / "l1-k9", 48).shown() == {"4": kept}
        for wrong in ({"text": "x" * 4001}, {"latent": 48}, {"star": 1}, {"changes": None}):
            assert ask(server, "POST", "/api/note", asked(**{**new, **wrong}))[0] == 400
        assert ask(server, "GET", "/notes.json")[0] == 404
        (tmp_path / "l1-k9" / "notes.json").write_text("{")
        status, _, body = ask(server, "GET", "/api/notes")
        assert status == 400
        assert "cannot be read as notes" in json.loads(body)["error"]
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


def test_other_pages_can_neither_change_nor_note(server: PageServer) -> None:
    for path, body in (("/api/change", asked(**STEER)), ("/api/note", asked(latent=1, star=True, text="", changes=0))):
        assert ask(server, "POST", path, body, Host="evil.example")[0] == 421
        for origin in (None, "null", "http://evil.example"):
            assert ask(server, "POST", path, body, Origin=origin)[0] == 403
        assert ask(server, "POST", path, body, Sec_Fetch_Site="cross-site")[0] == 403
        assert ask(server, "POST", path, body, Content_Type="text/plain")[0] == 415
        assert ask(server, "POST", path, b"[1]")[0] == 400
    assert ask(server, "GET", "/api/notes", Sec_Fetch_Site="cross-site")[0] == 403
    assert ask(server, "GET", "/api/notes", Host="evil.example")[0] == 421
    assert server.api.notes.read() == {}


def test_a_change_in_a_browser(live: Any, place: Path) -> None:
    live.go("#/latent/20", "latent/20")
    live.one("#change-text").send_keys(str(STEER["text"]))
    live.one("#strength").clear()
    live.one("#strength").send_keys("40")
    # Another theme draws the page anew; what was typed stays.
    live.one("#theme").click()
    live.at("latent/20")
    assert live.one("#strength").get_attribute("value") == "40"
    live.one("#change-go").click()
    live.wait(lambda _: live.all("#changed"))
    config = EvaluateConfig.model_validate({"shards": place / "l1", "device": "cpu"})
    own = steer(place / "l1-k9", 20, str(STEER["text"]), config, scale=40, writing=Writing(N_WRITTEN))
    assert live.texts("#plain, #changed") == [STEER["text"] + own.plain, STEER["text"] + own.steered]
    live.one('#how option[value="ablate"]').click()
    assert live.one("#strength").get_attribute("value") == "0"
    live.one("#strength").clear()
    live.one("#strength").send_keys("1")
    live.one("#change-go").click()
    live.wait(lambda _: live.one("#change-state").text == "nothing changes")
    # The text is there again for the next latent, and a refusal is said.
    live.driver.execute_script("scrollTo(0, 0)")
    live.one("#next").click()
    live.wait(lambda driver: "latent/20" not in driver.current_url and live.all("#change-text"))
    assert live.one("#change-text").get_attribute("value") == STEER["text"]
    live.one("#change-text").clear()
    live.one("#change-go").click()
    live.wait(lambda _: "type a few words" in live.one("#change-state").text)
    assert all("400" in entry["message"] for entry in live.driver.get_log("browser"))
    live.resize(390, 800)
    assert live.fits(390)


def test_notes_of_two_tabs_in_a_browser(live: Any, server: PageServer) -> None:
    evil = "<img src=x onerror=window.hacked=1>"
    live.go("#/latent/20", "latent/20")
    live.one("#star").click()
    live.wait(lambda _: live.one("#note-state").text == "saved")
    first = live.driver.current_window_handle
    live.driver.switch_to.new_window("tab")
    try:
        # The other tab has the star, and is the first to write a text.
        live.go("#/latent/20", "latent/20")
        assert live.one("#star").get_attribute("aria-pressed") == "true"
        live.one("#note").send_keys("of the other tab")
        live.one("#save-note").click()
        live.wait(lambda _: live.one("#note-state").text == "saved")
        live.driver.close()
        live.driver.switch_to.window(first)
        live.one("#note").send_keys(evil)
        live.one("#save-note").click()
        live.wait(lambda _: "changed elsewhere" in live.one("#note-state").text)
        assert live.texts("#other-note") == ["\u2605 of the other tab"]
        assert live.one("#note").get_attribute("value") == evil
        assert server.api.notes.read()[20].text == "of the other tab"
        live.one("#save-note").click()
        live.wait(lambda _: live.one("#note-state").text == "saved")
        assert server.api.notes.read()[20].text == evil
        assert live.texts("#other-note") == [""]
        # A click on a link leaves the field, which saves it.
        live.one("#note").send_keys(" and more")
        live.one("nav [data-page=latents]").click()
        live.at("latents")
        live.wait(lambda _: server.api.notes.read()[20].text == f"{evil} and more")
        live.one("#starred").click()
        live.count("1 of 48")
        assert live.latents() == [20]
        assert all("409" in entry["message"] for entry in live.driver.get_log("browser"))
    finally:
        server.api.notes.path.unlink(missing_ok=True)
