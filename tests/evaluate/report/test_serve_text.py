"""`evaluate serve`: a text of one's own through a tiny model, as it is and with a latent changed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from served import STEER, ask, asked, model_folder, text

from evaluate.analyses.steer.steer import Writing, steer
from evaluate.config import EvaluateConfig
from evaluate.report.http_pages import PageServer
from evaluate.report.live_text import N_WRITTEN, Change
from evaluate.report.serve import serve_report
from matryoshka.errors import UserError
from matryoshka.lm import LanguageModel
from matryoshka.norms import apply_convention
from matryoshka.shards import ShardSet
from matryoshka.transcoder import Transcoder


def by_hand(harvested: Path, words: str) -> list[dict[int, float]]:
    """Latent -> activation of each token, from the model and the transcoder themselves."""
    shards = ShardSet.open(harvested / "l1")
    model = LanguageModel.load(model_folder(harvested), dtype="float32", device="cpu")
    tokens = [model.bos_id, *model.tokenizer.convert_tokens_to_ids(words.split())]
    hook = "blocks.1.hook_resid_mid"
    raw = model.capture(torch.tensor([tokens]), [hook])[hook][0]
    transcoder = Transcoder.load(harvested / "l1-k9" / "checkpoints" / "step-000400")
    x = apply_convention(raw, "normalized", source_site="resid_mid", norm=shards.norm)
    return [{i: act for i, act in enumerate(row) if act > 0} for row in transcoder.encode(x).tolist()][1:]


def test_a_text_of_ones_own(server: PageServer, harvested: Path) -> None:
    status, _, body = ask(server, "POST", "/api/try", text("w5 w17 <script> w80"))
    assert status == 200
    tokens = json.loads(body)["tokens"]
    assert [token["text"] for token in tokens] == ["w5", "w17", "<unk>", "w80"]
    # <unk> is a special token: harvested sets hold none, and no transcoder is applied to it.
    assert tokens[2]["latents"] == []
    wanted = by_hand(harvested, "w5 w17 <unk> w80")
    for i in (0, 1, 3):
        found = tokens[i]["latents"]
        assert {latent: pytest.approx(act, rel=1e-3) for latent, act in found} == wanted[i]
        assert [act for _, act in found] == sorted((act for _, act in found), reverse=True)


def test_when_the_shard_set_is_gone_the_page_says_so(harvested: Path, tmp_path: Path) -> None:
    shutil.copytree(harvested / "l1-k9", tmp_path / "l1-k9")
    served = serve_report(tmp_path / "l1-k9", EvaluateConfig(device="cpu"))
    try:
        with pytest.raises(UserError, match="no shard set is there any more; name where it is now with --shards"):
            served.server.api.try_text("w1")
    finally:
        served.server.server_close()


def test_a_text_in_a_browser(live: Any, harvested: Path) -> None:
    live.go("#/try", "try")
    live.one("#text").send_keys("w5 w17 <img src=x onerror=window.hacked=1> w80")
    live.one("#go").click()
    live.wait(lambda _: live.texts("#typed .token"))
    assert live.texts("#typed .token") == ["w5", "w17", "<unk>", "<unk>", "<unk>", "w80"]
    assert live.all("#typed img, #typed unk") == []
    live.all("#typed .token")[1].click()
    wanted = by_hand(harvested, "w5 w17")[1]
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


def test_a_text_with_a_latent_changed(server: PageServer, harvested: Path) -> None:
    config = EvaluateConfig.model_validate({"shards": harvested / "l1", "device": "cpu"})
    own = steer(harvested / "l1-k9", 20, STEER["text"], config, scale=40, writing=Writing(N_WRITTEN))  # type: ignore[arg-type]
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


def test_memory_that_ends_is_said_on_the_page(server: PageServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("evaluate.report.live_text.LiveText.tokens", full)
    monkeypatch.setattr("evaluate.report.live_text.LiveText.changed", full)
    for path, body in (("/api/try", text("w5")), ("/api/change", asked(**STEER))):
        status, _, answer = ask(server, "POST", path, body)
        assert status == 400
        assert "the memory of the device is not enough for this text" in json.loads(answer)["error"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latent": 48}, "the latents 0 to 47, and no latent 48"),
        ({"latent": -1}, "latent: Input should be greater than or equal to 0"),
        ({"latent": "20"}, "latent: Input should be a valid integer"),
        ({"strength": 1001}, "strength: Input should be less than or equal to 1000"),
        ({"strength": "NaN"}, "strength: "),
        ({"strength": None}, "strength: Input should be a valid number"),
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


def test_the_model_of_a_change_must_be_there(harvested: Path, tmp_path: Path) -> None:
    """A set that names a folder which is gone: a sentence, and the pages go on."""
    shutil.copytree(harvested / "l1-k9", tmp_path / "l1-k9")
    config = EvaluateConfig.model_validate(
        {"shards": harvested / "l1", "device": "cpu", "lm": {"model": str(tmp_path / "gone")}}
    )
    served = serve_report(tmp_path / "l1-k9", config)
    try:
        with pytest.raises(UserError, match=r"the language model of .*l1 is needed.*gone.*name it with --model"):
            served.server.api.change(Change.model_validate(STEER))
    finally:
        served.server.server_close()


def test_a_change_in_a_browser(live: Any, harvested: Path) -> None:
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
    config = EvaluateConfig.model_validate({"shards": harvested / "l1", "device": "cpu"})
    own = steer(harvested / "l1-k9", 20, str(STEER["text"]), config, scale=40, writing=Writing(N_WRITTEN))
    assert live.texts("#plain, #changed") == [STEER["text"] + own.plain, STEER["text"] + own.steered]
    live.one('#how option[value="ablate"]').click()
    assert live.one("#strength").get_attribute("value") == "0"
    live.one("#strength").clear()
    live.one("#strength").send_keys("1")
    live.one("#change-go").click()
    live.wait(lambda _: live.one("#change-state").text == "nothing changes")
    # No strength is not a strength of 0.
    live.one("#strength").clear()
    live.one("#change-go").click()
    live.wait(lambda _: "strength: Input should be a valid number" in live.one("#change-state").text)
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
