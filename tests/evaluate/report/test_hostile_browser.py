"""What a person may do to the pages, and what a run may hold: keys, names, torn files, texts of any kind and length."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from evaluate.analyses.hierarchy.hierarchy import HierarchyAnalysis
from evaluate.analysis import answer
from evaluate.config import EvaluateConfig, HierarchyConfig
from evaluate.report.build import make_report


def test_each_page_has_a_name_of_its_own(browser: Any) -> None:
    names = {"": "<b>run", "#/latents": "Latents \u00b7 <b>run", "#/latent/20": "Latent 20 \u00b7 <b>run"}
    names |= {"#/map": "Map \u00b7 <b>run", "#/run": "Run card \u00b7 <b>run", "#/latent/99": "Latent \u00b7 <b>run"}
    for route, name in names.items():
        browser.go(route, route.removeprefix("#/") or "overview")
        assert browser.driver.title == name


@pytest.mark.parametrize("latent", ["48", "-1", "1e1", "0x10", "", "%20", "9007199254740993"])
def test_a_latent_that_is_none(browser: Any, latent: str) -> None:
    browser.go(f"#/latent/{latent}", f"latent/{latent}" if latent else "latent")
    assert "There is no latent" in browser.one(".error").text
    assert "0 to 47" in browser.one(".error").text
    browser.one(".error a").click()
    browser.at("latents")


def test_files_that_are_torn_or_gone(browser: Any, index: Path, tmp_path: Path) -> None:
    folder = tmp_path / "report"
    shutil.copytree(index.parent, folder)
    (folder / "data" / "chunk-0.js").write_text("")
    (folder / "data" / "fires-0.js").unlink()
    torn = browser.on(folder / "index.html")
    torn.go("#/latent/20", "latent/20")
    assert "data/chunk-0.js is damaged; make the pages again" in torn.one(".error").text
    torn.go("#/latents", "latents")
    torn.one("#search").send_keys("word5")
    torn.wait(lambda _: torn.all(".error"))
    assert "data/fires-0.js cannot be read" in torn.one(".error").text
    # The page goes on, and says so once.
    torn.one('#where option[value="contexts"]').click()
    torn.wait(lambda _: not torn.all(".error"))
    torn.wait(lambda _: torn.latents() and torn.one("#count").text.endswith(" of 48"))
    logged = torn.driver.get_log("browser")
    assert [entry for entry in logged if "fires-0.js" not in entry["message"]] == []


def test_the_keyboard_alone(browser: Any, measured: Path) -> None:
    from selenium.webdriver import ActionChains, Keys

    def press(*keys: str) -> None:
        ActionChains(browser.driver).send_keys(*keys).perform()

    def focused() -> Any:
        return browser.driver.switch_to.active_element

    browser.go("#/latents", "latents")
    press("/")
    assert focused().get_attribute("id") == "search"
    press("word6", Keys.TAB)
    browser.wait(lambda _: browser.driver.current_url.endswith("?q=word6"))
    browser.wait(lambda _: " of 48" in browser.one("#count").text)
    for _ in range(30):
        if "row" in (focused().get_attribute("class") or ""):
            break
        press(Keys.TAB)
    latent = focused().get_attribute("href").rpartition("/")[2]
    assert int(latent) == browser.latents()[0]
    press(Keys.ENTER)
    browser.at(f"latent/{latent}")
    browser = browser.on(measured)
    browser.go("#/hierarchy", "hierarchy")
    browser.driver.execute_script("document.querySelector('#nest .fold').focus()")
    press(Keys.ENTER)
    browser.wait(lambda _: browser.all("#nest > li .nest-contexts .window"))
    assert focused().get_attribute("aria-expanded") == "true"
    browser.go("#/map", "map")

    def picture() -> str:
        """After the next frame, in which the map is painted."""
        return browser.driver.execute_async_script(
            "const done = arguments[0], canvas = document.getElementById('map');"
            "requestAnimationFrame(() => requestAnimationFrame(() => done(canvas.toDataURL())));"
        )

    browser.driver.execute_script("document.getElementById('map').focus()")
    whole = picture()
    pictures = {whole}
    for key in (Keys.ARROW_LEFT, "+", Keys.ARROW_DOWN, "-"):
        press(key)
        pictures.add(picture())
    assert len(pictures) == 5
    press("0")
    assert picture() == whole


def test_one_latent_and_one_group(browser: Any, made: Any, index: Path, tmp_path: Path) -> None:
    shards = index.parents[4] / "l1"
    run = made.run(tmp_path / "one", made.transcoder(group_sizes=(1,), k=1))
    hierarchy = HierarchyConfig(clusters=False, min_rows=2)
    config = EvaluateConfig(shards=shards, device="cpu", bootstrap=10, hierarchy=hierarchy)
    answer(HierarchyAnalysis(), [run], config)
    pages = make_report(run, config, tokenizer=str(index.parents[4] / "tokenizer"))
    one = browser.on(pages.index)
    pages_of_it = {"": "overview", "#/latents": "latents", "#/latent/0": "latent/0", "#/run": "run", "#/map": "map"}
    for route, page in {**pages_of_it, "#/hierarchy/0": "hierarchy/0"}.items():
        one.go(route, page)
        assert one.all(".error") == []
        assert "undefined" not in one.one("main").text
        assert "NaN" not in one.one("main").text
    one.go("#/latents", "latents")
    one.count("1 of 1")
    one.go("#/latent/0", "latent/0")
    one.one("#next").click()
    one.at("latent/0")


@pytest.mark.parametrize("page", ["latents", "hierarchy", "map"])
def test_a_search_without_a_hit(browser: Any, measured: Path, page: str) -> None:
    full = browser.on(measured)
    full.go(f"#/{page}?q=nosuch", page)
    full.count("0 ")
    assert "No latent fires on \u201cnosuch\u201d" in full.texts(".nothing")[0]
    full.one(".nothing button").click()
    full.wait(lambda _: full.texts(".nothing") == ["No saved window has \u201cnosuch\u201d."])
    assert full.driver.current_url.endswith(f"#/{page}?q=nosuch&in=contexts")
    full.one("#search").clear()
    full.one("#search").send_keys("word7")
    full.wait(lambda _: not full.all(".nothing"))
    assert not full.one("#count").text.startswith("0 ")


def test_what_was_found_comes_first_on_a_phone(browser: Any, measured: Path) -> None:
    full = browser.on(measured)
    full.resize(390, 800)
    for route, is_first in {"#/hierarchy?q=word7": True, "#/hierarchy": False}.items():
        full.go(route, "hierarchy")
        assert (full.one("#nest").location["y"] < full.one("#burst").location["y"]) == is_first


@pytest.mark.parametrize("width", [1280, 390])
def test_a_run_of_a_long_name(browser: Any, index: Path, tmp_path: Path, width: int) -> None:
    folder, name = tmp_path / "report", "r" * 240
    shutil.copytree(index.parent, folder)
    for path in (folder / "index.html", folder / "data" / "overview.js"):
        path.write_text(path.read_text().replace("&lt;b&gt;run", name).replace("<b>run", name))
    long = browser.on(folder / "index.html")
    long.resize(width, 800)
    for route, page in {"": "overview", "#/latents": "latents", "#/run": "run"}.items():
        long.go(route, page)
        assert long.fits(width)
    assert name in long.driver.title


@pytest.mark.parametrize("width", [1280, 390])
def test_texts_of_any_length_and_direction(browser: Any, measured: Path, words: list[str], width: int) -> None:
    full = browser.on(measured)
    full.resize(width, 800)
    assert len(max(words, key=len)) == 3000
    for page in ("latents?q=" + "x" * 200, "hierarchy", "map", "latent/3", "latents?q=%D7%A9%D7%9C%D7%95%D7%9D"):
        full.go(f"#/{page}", page.partition("?")[0])
        assert full.fits(width)
        assert full.all(".error") == []
    full.go("#/hierarchy", "hierarchy")
    cells = full.driver.execute_script("return [...document.querySelectorAll('td .words')].map((e) => e.clientWidth)")
    assert cells
    assert max(cells) < 500
