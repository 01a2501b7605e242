"""`evaluate serve`: own notes on latents, kept beside the run."""

from __future__ import annotations

import errno
import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
from served import STEER, ask, asked

from evaluate.config import EvaluateConfig
from evaluate.report.http_pages import PageServer
from evaluate.report.notes import NewNote, Notes
from evaluate.report.serve import serve_report
from matryoshka.errors import UserError


def test_notes_are_kept_and_a_stale_one_is_refused(harvested: Path, tmp_path: Path) -> None:
    shutil.copytree(harvested / "l1-k9", tmp_path / "l1-k9")
    served = serve_report(
        tmp_path / "l1-k9", EvaluateConfig.model_validate({"shards": harvested / "l1", "device": "cpu"})
    )
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


def test_a_note_that_cannot_be_written_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("evaluate.report.notes.publish_json", full)
    notes = Notes(tmp_path, 48)
    with pytest.raises(UserError, match=r"notes cannot be kept in .* \(No space left on device\); free some space"):
        notes.keep(NewNote(latent=1, star=True, text="", changes=0))
    assert notes.read() == {}


def test_what_is_asked_while_another_note_is_sent_in_a_browser(live: Any, server: PageServer) -> None:
    """Each builds on what the one before left: the star does not bring back the text of before."""
    try:
        live.go("#/latent/21", "latent/21")
        slow = "const keep = Report.keepNote; Report.keepNote = async (note) => "
        live.driver.execute_script(slow + "{ await new Promise((done) => setTimeout(done, 400)); return keep(note); };")
        live.one("#note").send_keys("mine")
        live.one("#save-note").click()
        live.one("#star").click()
        live.wait(lambda _: live.one("#star").get_attribute("aria-pressed") == "true")
        assert (server.api.notes.read()[21].text, server.api.notes.read()[21].star) == ("mine", True)
    finally:
        server.api.notes.path.unlink(missing_ok=True)


def test_a_text_that_was_refused_stays_in_a_browser(live: Any, server: PageServer) -> None:
    """Until it is saved: over another theme and another page."""
    try:
        live.go("#/latent/22", "latent/22")
        server.api.notes.keep(NewNote(latent=22, star=False, text="of another tab", changes=0))
        live.one("#note").send_keys("mine")
        live.one("#save-note").click()
        live.wait(lambda _: "changed elsewhere" in live.one("#note-state").text)
        live.driver.execute_script("scrollTo(0, 0)")
        live.one("#theme").click()
        live.wait(lambda _: live.all("#note") and live.one("#note-state").text == "not saved yet")
        assert live.one("#note").get_attribute("value") == "mine"
        live.one("#save-note").click()
        live.wait(lambda _: live.one("#note-state").text == "saved")
        assert server.api.notes.read()[22].text == "mine"
        assert all("409" in entry["message"] for entry in live.driver.get_log("browser"))
    finally:
        server.api.notes.path.unlink(missing_ok=True)


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
