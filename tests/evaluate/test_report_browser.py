"""The pages in a real browser, from file://: Debian's chromium, driven by selenium.

Without a browser these tests fail, so that they cannot vanish unseen; MATRYOSHKA_NO_BROWSER=1 skips them on purpose.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from evaluate.config import EvaluateConfig
from evaluate.report.build import make_report
from evaluate.report.data_file import write_data

pytestmark = pytest.mark.skipif(
    os.environ.get("MATRYOSHKA_NO_BROWSER") == "1", reason="MATRYOSHKA_NO_BROWSER=1 asks for no browser"
)

EVIL = ["<script>window.hacked=1</script>", "<img src=x onerror=window.hacked=1>", '"><b>', "</script>", "\u2028'`${1}"]
FIRST_PAGE_BYTES = 1_000_000


def save_tokenizer(folder: Path) -> Path:
    """Forty tokens, some of which would like to be HTML."""
    from tokenizers import Tokenizer, models

    words = [*(f" word{i}" for i in range(3, 38)), *EVIL]
    folder.mkdir()
    vocabulary = {word: i for i, word in enumerate(words)}
    Tokenizer(models.WordLevel(vocabulary, unk_token=" word3")).save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="session")
def index(made: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of 48 latents (latent 9 dead), with its tokens out of `save_tokenizer`."""
    folder = tmp_path_factory.mktemp("pages")
    shards = made.shards(folder / "l1", val_contexts=(20, 20), ctx_len=24)
    transcoder = made.transcoder()
    transcoder.threshold[9] = 1e9
    run = made.run(folder / "<b>run", transcoder)
    steps = [{"step": s, "dead_share": 0.1 / s, **{f"fvu/prefix_{e}": 1 / s for e in (6, 17, 48)}} for s in (1, 2, 3)]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, steps)) + '\n{"step": 4, "dea')
    config = EvaluateConfig(shards=shards.path, device="cpu", bootstrap=10)
    pages = make_report(run, config, tokenizer=str(save_tokenizer(folder / "tokenizer")))
    assert pages.notes == ()
    return pages.index


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    chromedriver = shutil.which("chromedriver")
    if browser is None or chromedriver is None:
        pytest.fail("no browser: apt-get install -y --no-install-recommends chromium chromium-driver fonts-dejavu-core")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,900"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    opened = webdriver.Chrome(options=options, service=Service(chromedriver))
    yield opened
    opened.quit()


class Browser:
    """What a person does."""

    def __init__(self, driver: Any, index: Path) -> None:
        self.driver, self.index = driver, index

    def wait(self, ready: Any) -> Any:
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.driver, 60).until(ready)

    def go(self, route: str = "", page: str = "overview") -> None:
        self.driver.get("about:blank")
        self.driver.get(self.index.as_uri() + route)
        self.at(page)

    def at(self, page: str) -> None:
        self.wait(lambda driver: driver.execute_script("return document.getElementById('main')?.dataset.ready") == page)

    def all(self, css: str) -> list[Any]:
        return self.driver.find_elements("css selector", css)

    def one(self, css: str) -> Any:
        (found,) = self.all(css)
        return found

    def texts(self, css: str) -> list[str]:
        return self.driver.execute_script(
            "return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)", css
        )

    def latents(self) -> list[int]:
        return [int(text) for text in self.texts(".row span:first-child")]

    def count(self, start: str) -> None:
        self.wait(lambda _: self.one("#count").text.startswith(start))

    def resize(self, width: int, height: int) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


@pytest.fixture
def browser(driver: Any, index: Path) -> Iterator[Browser]:
    driver.get_log("browser")
    opened = Browser(driver, index)
    opened.resize(1280, 900)
    yield opened
    assert driver.get_log("browser") == []
    assert driver.execute_script("return window.hacked") is None


def test_the_first_page_shows_the_numbers_and_is_small(browser: Browser, index: Path) -> None:
    browser.go()
    report = json.loads((index.parent.parent / "report.json").read_text())
    rows = browser.texts("#prefixes tbody tr")
    assert len(rows) == 3
    for row, prefix in zip(rows, report["threshold"], strict=True):
        assert f"{prefix['fvu']:.4f}" in row
    assert len(browser.all(".chart canvas")) == 4
    assert browser.driver.title == "<b>run"
    loaded = browser.driver.execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    files = {
        Path(url.removeprefix("file://").replace("%3C", "<").replace("%3E", ">")) for url in loaded if "file:" in url
    }
    files |= {index, *index.parent.glob("assets/*"), index.parent / "data" / "overview.js"}
    assert all(file.is_relative_to(index.parent) for file in files)
    assert sum(file.stat().st_size for file in files) < FIRST_PAGE_BYTES


def test_sort_and_filter(browser: Browser) -> None:
    browser.go("#/latents", "latents")
    assert browser.one("#count").text == "47 of 48"
    table = json.loads(re.fullmatch(r'give\("latents",(.*)\);\n', data(browser, "latents"))[1])  # type: ignore[index]
    alive = [i for i in range(48) if table["density"][i] > 0]
    falling = sorted(alive, key=lambda i: (-table["density"][i], i))
    shown = browser.latents()
    assert shown == falling[: len(shown)]
    browser.one('[data-key="max"]').click()
    shown = browser.latents()
    assert shown == sorted(alive, key=lambda i: (-table["max"][i], i))[: len(shown)]
    browser.one('[data-key="max"]').click()
    assert browser.latents()[0] == min(alive, key=lambda i: table["max"][i])
    assert browser.one('[data-key="max"]').get_attribute("aria-sort") == "ascending"
    browser.one('#group option[value="2"]').click()
    browser.count("10 of 48")
    assert set(browser.latents()) == set(range(6, 17)) - {9}
    browser.one("#dead").click()
    browser.count("11 of 48")
    browser.one('#group option[value="0"]').click()
    middle = sorted(table["density"][i] for i in alive)[20] * 100
    browser.one("#low").send_keys(f"{middle:.3f}")
    wanted = sum(table["density"][i] * 100 >= float(f"{middle:.3f}") for i in range(48))
    browser.count(f"{wanted} of 48")
    browser.go("#/latents", "latents")
    strongest = sorted(table["max"][i] for i in alive)
    browser.one("#weak").send_keys(str(strongest[10]))
    browser.one("#strong").send_keys(str(strongest[29]))
    browser.count("20 of 48")


def test_search_in_the_contexts(browser: Browser) -> None:
    browser.go("#/latents", "latents")
    texts = json.loads(re.fullmatch(r'give\("text-0",(.*)\);\n', data(browser, "text-0"))[1])  # type: ignore[index]
    query = next(found for found in re.findall(r"word\d+ word\d+", texts[20]) if sum(found in t for t in texts) < 15)
    wanted = {i for i, text in enumerate(texts) if query in text}
    assert 20 in wanted
    browser.one("#search").send_keys(query.upper())
    browser.count(f"{len(wanted)} of 48")
    assert set(browser.latents()) == wanted
    browser.one("#search").clear()
    browser.one("#search").send_keys("no such words")
    browser.count("0 of 48")


def test_a_latent_its_keys_and_its_link(browser: Browser) -> None:
    from selenium.webdriver import ActionChains, Keys

    browser.go("#/latents", "latents")
    first, second = browser.latents()[:2]
    browser.all(".row")[0].click()
    browser.at(f"latent/{first}")
    assert browser.one("h1").text == f"Latent {first}"
    ActionChains(browser.driver).send_keys(Keys.ARROW_RIGHT).perform()
    browser.at(f"latent/{second}")
    ActionChains(browser.driver).send_keys(Keys.ARROW_LEFT).perform()
    browser.at(f"latent/{first}")
    browser.go("#/latent/30", "latent/30")
    values = [float(text) for text in browser.texts("#top-windows .label b")]
    assert values == sorted(values, reverse=True)
    assert len(values) == 20
    assert browser.texts("#decile-windows .window")
    text = browser.all("#top-windows .text")[0]
    hidden = len([span for span in text.find_elements("css selector", ".far") if not span.is_displayed()])
    text.click()
    assert hidden > 0
    assert all(span.is_displayed() for span in text.find_elements("css selector", ".far"))
    peak = browser.all("#top-windows .peak")[0]
    ActionChains(browser.driver).move_to_element(peak).perform()
    shown = browser.wait(lambda _: browser.one("#tip").text)
    assert float(shown.split()[0]) == pytest.approx(values[0], abs=5e-4)
    other = browser.all(".near a")[0].get_attribute("href").rpartition("/")[2]
    browser.all(".near a")[0].click()
    browser.at(f"latent/{other}")


def test_a_dead_latent_and_one_that_is_not_there(browser: Browser) -> None:
    browser.go("#/latent/9", "latent/9")
    assert "never fires" in browser.one("main").text
    assert browser.texts("#random-windows .window")
    browser.go("#/latent/48", "latent/48")
    assert "There is no latent 48" in browser.one("main").text
    browser.go("#/latent/%3Cimg%20src=x%20onerror=hacked=1%3E", "latent/%3Cimg%20src=x%20onerror=hacked=1%3E")
    assert browser.all("main img") == []


def test_text_of_contexts_is_shown_and_not_run(browser: Browser) -> None:
    shown: set[str] = set()
    for latent in (0, 20, 40):
        browser.go(f"#/latent/{latent}", f"latent/{latent}")
        shown |= set(browser.texts(".token"))
        assert browser.all("main script, main img, main b b") == []
    assert set(EVIL[:4]) <= shown
    assert "\ufffd" not in EVIL[0]
    browser.go("#/latents", "latents")
    assert any("<" in words for words in browser.texts(".row .words"))
    assert browser.all(".words *") == []
    policy = browser.one("meta[http-equiv]").get_attribute("content")
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    # The policy itself, should a page ever build HTML by mistake. The refusal is logged, which is what is looked for.
    browser.driver.execute_script(
        "const d = document.createElement('div'); d.innerHTML = '<img src=\"data:,\" onerror=\"window.hacked=1\">';"
        "document.body.append(d); const s = document.createElement('script'); s.textContent = 'window.hacked=1';"
        "document.body.append(s);"
    )
    refusals = browser.wait(lambda driver: driver.get_log("browser"))
    assert all("Content Security Policy" in entry["message"] for entry in refusals)


def test_dark_mode(browser: Browser) -> None:
    browser.go()

    def ground() -> str:
        return browser.driver.execute_script("return getComputedStyle(document.body).backgroundColor")

    light = ground()
    button = browser.one("#theme")
    while "dark" not in button.text:
        button.click()
        browser.at("overview")
    dark = ground()
    assert sum(map(int, re.findall(r"\d+", dark)[:3])) < 120 < sum(map(int, re.findall(r"\d+", light)[:3]))
    browser.go("#/latents", "latents")
    assert ground() == dark
    button = browser.one("#theme")
    button.click()
    assert "auto" in button.text


@pytest.mark.parametrize(
    ("route", "page"), [("", "overview"), ("#/latents", "latents"), ("#/latent/3", "latent/3"), ("#/run", "run")]
)
def test_a_phone(browser: Browser, route: str, page: str) -> None:
    browser.resize(390, 800)
    browser.go(route, page)
    assert browser.driver.execute_script("return document.documentElement.scrollWidth") <= 390
    assert browser.driver.execute_script("return innerWidth") == 390
    assert browser.one("nav").is_displayed()


def test_the_run_card(browser: Browser) -> None:
    browser.go("#/run", "run")
    text = browser.one("main").text
    for part in ("group_sizes", "6, 11, 31", "sha256", "google/gemma-2-2b", "val"):
        assert part in text


def test_65536_latents_are_a_few_rows(browser: Browser, index: Path, tmp_path: Path) -> None:
    folder = tmp_path / "wide"
    shutil.copytree(index.parent, folder)
    n = 65_536
    density = torch.rand(n, generator=torch.Generator().manual_seed(0)).tolist()
    write_data(
        folder / "data", "latents", {**dict.fromkeys(("density", "max", "mean", "cosine"), density), "words": ["x"] * n}
    )
    overview = (folder / "data" / "overview.js").read_text()
    wide = overview.replace('"prefix_ends":[6,17,48]', f'"prefix_ends":[6,17,{n}]')
    assert wide != overview
    (folder / "data" / "overview.js").write_text(wide)
    own = Browser(browser.driver, folder / "index.html")
    own.go("#/latents", "latents")
    own.count("65,536 of 65,536")
    order = sorted(range(n), key=lambda i: (-density[i], i))
    shown = own.latents()
    assert len(shown) < 100
    assert shown == order[: len(shown)]
    own.driver.execute_script("const v = document.getElementById('view'); v.scrollTop = v.scrollHeight")
    own.wait(lambda _: own.latents()[-1] == order[-1])
    assert len(own.latents()) < 100


def data(browser: Browser, name: str) -> str:
    return (browser.index.parent / "data" / f"{name}.js").read_text()
