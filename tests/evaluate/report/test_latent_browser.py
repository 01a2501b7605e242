"""The page of one latent in a real browser: what can be copied, numbers, orders, own notes, other transcoders."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from evaluate.analyses.samples.files import Window, read_histograms, read_windows
from matryoshka.shards import ShardSet
from matryoshka.transcoder import Transcoder


@pytest.fixture
def full(browser: Any, measured: Path) -> Any:
    """The browser on the report of a run of which everything was measured."""
    return browser.on(measured)


def samples_of(index: Path, latent: int) -> list[Window]:
    return read_windows(index.parents[1] / "samples", latent)


def pasted(browser: Any) -> str:
    """What is in the clipboard."""
    from selenium.webdriver import ActionChains, Keys

    browser.driver.execute_script(
        "const f = document.createElement('textarea'); f.id = 'pasted'; document.body.append(f); f.focus()"
    )
    ActionChains(browser.driver).key_down(Keys.CONTROL).send_keys("v").key_up(Keys.CONTROL).perform()
    text = browser.wait(lambda _: browser.one("#pasted").get_attribute("value"))
    browser.driver.execute_script("document.getElementById('pasted').remove()")
    return text


def test_a_latent_is_copied_as_json(full: Any, evil: list[str], words: list[str]) -> None:
    full.go("#/latent/20", "latent/20")
    full.one("#copy").click()
    full.wait(lambda _: full.one("#copy").text == "copied")
    found = json.loads(pasted(full))
    assert set(found) == {"run", "latent", "prefix", "stats", "windows", "logits", "note"}
    report = json.loads((full.index.parents[1] / "report.json").read_text())
    assert found["run"]["name"] == "<b>run"
    assert found["run"]["sha256"] == report["transcoder"]["sha256"]
    assert found["latent"] == 20
    assert found["prefix"] == {"group": 3, "n_groups": 3, "prefix_end": 48}
    windows = samples_of(full.index, 20)
    (histogram,) = read_histograms(full.index.parents[1] / "samples")[20:21]
    assert found["stats"]["n_rows"] == histogram.n_rows
    assert found["stats"]["max_act"] == pytest.approx(max(window.act for window in windows), rel=1e-4)
    assert len(found["windows"]) == len(windows)
    for one, window in zip(found["windows"], windows, strict=True):
        assert (one["kind"], one["tenth"], one["rank"]) == (window.kind, window.decile, window.rank)
        assert (one["context"], one["position"], one["document"]) == (window.context, window.position, window.doc_id)
        assert one["tokens"] == [words[token] for token in window.tokens]
        assert one["activations"] == pytest.approx(window.acts, rel=1e-5)
        assert one["peak"] == window.peak
    assert found["logits"]["scale"] == 0.025
    assert found["logits"]["raised"][0] == {"token": words[20], "direction": 2.5, "logit": 0.0625}
    assert found["note"] == {"star": True, "text": f"mine: {evil[0]}{evil[1]}\nand more"}


def test_the_number_of_every_token(browser: Any, words: list[str]) -> None:
    from selenium.webdriver import ActionChains

    browser.go("#/latent/30", "latent/30")
    window = samples_of(browser.index, 30)[0]
    first = browser.driver.execute_script("return document.querySelector('#top-windows .window')")
    summary = first.find_element("css selector", ".numbers summary")
    assert summary.text == "numbers"
    assert first.find_elements("css selector", "td") == []
    summary.click()
    rows = browser.wait(lambda _: browser.cells("#top-windows .window .numbers"))
    assert [row[0] for row in rows] == [str(window.position - window.peak + i) for i in range(len(window.tokens))]
    assert [row[1] for row in rows] == [words[token] for token in window.tokens]
    assert [float(row[2]) for row in rows] == pytest.approx(window.acts, rel=1e-5)
    assert browser.texts("#top-windows .numbers th[scope=col]") == ["position", "token", "activation"]
    # The same under the pointer, of tokens on which it is silent too.
    silent = next(i for i in range(window.peak - 6, window.peak) if window.acts[i] == 0)
    for i in (window.peak, silent):
        token = first.find_elements("css selector", ".token")[i]
        ActionChains(browser.driver).move_to_element(token).perform()
        wanted = f"\u201c{words[window.tokens[i]]}\u201d"
        tip = browser.wait(lambda _, end=wanted: (text := browser.texts("#tip")[0]).endswith(end) and text)
        assert float(tip.split("\u201c")[0]) == pytest.approx(window.acts[i], rel=1e-5)


def test_windows_by_quantile(browser: Any, made: Any) -> None:
    latent = 30
    browser.go(f"#/latent/{latent}", f"latent/{latent}")
    sections = "return [...document.querySelectorAll('.contexts section')].map((s) => s.id)"
    assert browser.driver.execute_script(sections) == ["top-windows", "decile-windows", "random-windows"]
    browser.one('#order option[value="quantile"]').click()
    found = browser.driver.execute_script(sections)
    assert found == [f"tenth-{i}" for i in range(10, 0, -1) if f"tenth-{i}" in found] + ["random-windows"]
    assert len(found) > 6
    # Against every row of the shard set, one after the other.
    shards = ShardSet.open(browser.index.parents[4] / "l1")
    transcoder = Transcoder.load(browser.index.parents[3] / "checkpoints" / "step-000400")
    acts = transcoder.encode(made.kept_rows(shards)["source"].float())[:, latent]
    fires = sorted(acts[acts > 0].tolist())
    (histogram,) = read_histograms(browser.index.parents[1] / "samples")[latent : latent + 1]
    windows = [window for window in samples_of(browser.index, latent) if window.kind != "random"]
    in_bin = max(histogram.counts) / len(fires)
    shown = []
    for name in found[:-1]:
        part = int(name.removeprefix("tenth-"))
        labels = browser.texts(f"#{name} .window .label")
        pairs = [tuple(map(float, re.fullmatch(r"([\d.]+)q ([\d.]+)", label).groups())) for label in labels]  # type: ignore[union-attr]
        assert pairs == sorted(pairs, reverse=True)
        for act, quantile in pairs:
            below = sum(each <= act + 5e-4 for each in fires) / len(fires)
            assert quantile == pytest.approx(below, abs=in_bin + 1e-3)
            # A tenth of the saved sample is cut at its own rows, which differ a little from those of all.
            assert part / 10 - 0.25 <= below <= part / 10 + 0.15
        shown += [act for act, _ in pairs]
    assert sorted(shown) == pytest.approx(sorted(window.act for window in windows), abs=1e-3)
    # The order stays for the next latent, and can be taken back.
    browser.one("#next").click()
    browser.wait(lambda driver: driver.execute_script(sections)[-1:] == ["random-windows"] and browser.all("#tenth-10"))
    browser.one('#order option[value="activation"]').click()
    assert browser.driver.execute_script(sections) == ["top-windows", "decile-windows", "random-windows"]


def test_own_notes_are_shown_and_starred_latents_found(full: Any, evil: list[str]) -> None:
    full.go("#/latent/20", "latent/20")
    assert full.texts("#note") == [f"mine: {evil[0]}{evil[1]}\nand more"]
    assert full.texts("#star") == ["\u2605 starred"]
    assert full.all(".own textarea, .own script, .own img, button#star") == []
    full.go("#/latent/21", "latent/21")
    assert full.all("#note, #star") == []
    full.go("#/latents", "latents")
    full.count("47 of 48")
    full.one("#starred").click()
    full.count("2 of 48")
    assert set(full.latents()) == {7, 20}
    full.one('#group option[value="2"]').click()
    full.count("1 of 48")


def test_the_closest_latents_of_other_transcoders(full: Any, evil: list[str]) -> None:
    full.go("#/latent/20", "latent/20")
    assert full.texts("#matches h3") == [evil[1]]
    assert "blocks.4.<b>hook; 873 rows" in full.texts("#matches .note")[0]
    assert full.texts("#matches li") == ["27correlation0.40", "20decoder cosine0.20"]
    assert full.all("#matches img, #matches b") == []
    full.go("#/latent/9", "latent/9")
    assert full.all("#matches") == []


def test_without_a_server_there_are_commands(browser: Any) -> None:
    browser.go("#/latent/20", "latent/20")
    assert browser.texts("#change code") == [
        'evaluate steer RUN 20 --text "The" --scale 2',
        "evaluate ablate RUN 20",
    ]
    assert browser.all("#change textarea, #change button") == []
