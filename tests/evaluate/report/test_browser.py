"""The pages of a run in a real browser, from file://."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from evaluate.analyses.logits.logits import LogitTokens
from evaluate.report.data_file import write_data
from evaluate.report.logit_tokens import logit_table
from evaluate.report.relations import Relations

FIRST_PAGE_BYTES = 1_000_000


def test_the_first_page_shows_the_numbers_and_is_small(browser: Any, index: Path) -> None:
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


def test_sort_and_filter(browser: Any) -> None:
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


def test_a_latent_its_keys_and_its_link(browser: Any) -> None:
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


def test_a_dead_latent_and_one_that_is_not_there(browser: Any) -> None:
    browser.go("#/latent/9", "latent/9")
    assert "never fires" in browser.one("main").text
    assert browser.texts("#random-windows .window")
    browser.go("#/latent/48", "latent/48")
    assert "There is no latent 48" in browser.one("main").text
    browser.go("#/latent/%3Cimg%20src=x%20onerror=hacked=1%3E", "latent/%3Cimg%20src=x%20onerror=hacked=1%3E")
    assert browser.all("main img") == []


def test_text_of_contexts_is_shown_and_not_run(browser: Any, evil: list[str]) -> None:
    shown: set[str] = set()
    for latent in (0, 20, 40):
        browser.go(f"#/latent/{latent}", f"latent/{latent}")
        shown |= set(browser.texts(".token"))
        assert browser.all("main script, main img, main b b") == []
    assert set(evil[:4]) <= shown
    assert "\ufffd" not in evil[0]
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


def test_dark_mode(browser: Any) -> None:
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
def test_a_phone(browser: Any, route: str, page: str) -> None:
    browser.resize(390, 800)
    browser.go(route, page)
    assert browser.driver.execute_script("return document.documentElement.scrollWidth") <= 390
    assert browser.driver.execute_script("return innerWidth") == 390
    assert browser.one("nav").is_displayed()


def test_the_run_card(browser: Any) -> None:
    browser.go("#/run", "run")
    text = browser.one("main").text
    for part in ("group_sizes", "6, 11, 31", "sha256", "google/gemma-2-2b", "val"):
        assert part in text


def test_65536_latents(browser: Any, index: Path, tmp_path: Path) -> None:
    """Every page that holds something of all latents, from tables as wide as they come."""
    n, first = 65_536, 4096
    folder = tmp_path / "wide"
    shutil.copytree(index.parent, folder)
    generator = torch.Generator().manual_seed(0)
    density = torch.rand(n, generator=generator).tolist()
    columns = dict.fromkeys(("density", "max", "mean", "cosine"), density)
    write_data(folder / "data", "latents", {**columns, "words": [f"word{i % 9}" for i in range(n)]})
    edges = {"parent": [i % first for i in range(first, n)], "child": list(range(first, n))}
    shares = dict.fromkeys(("p_child_given_parent", "p_parent_given_child", "lift", "cosine"), [0.5] * (n - first))
    pq.write_table(pa.table({**edges, **shares}), tmp_path / "hierarchy.parquet")
    places = {"latent": list(range(n)), "cluster": [i % 7 for i in range(n)], "x": density, "y": density[::-1]}
    pq.write_table(pa.table(places), tmp_path / "clusters.parquet")
    tokens = {"latent": list(range(n)), "side": [1] * n, "rank": [0] * n, "token": [i % 5000 for i in range(n)]}
    pq.write_table(pa.table({**tokens, "effect": density}), tmp_path / "logits.parquet")
    relations = Relations(tmp_path, n)
    write_data(folder / "data", "hierarchy", relations.tree())
    write_data(folder / "data", "clusters", relations.map())
    write_data(folder / "data", "groups", {"groups": [], "pairs": []})
    write_data(
        folder / "data", "logits", logit_table(LogitTokens(tmp_path / "logits.parquet", n), lambda i: f"token{i}.")
    )
    overview = json.loads(read(index, "overview"))
    overview |= {"prefix_ends": [first, 16_384, n], "group_sizes": [first, 12_288, n - 16_384], "has_map": True}
    overview["missing"] = {}
    write_data(folder / "data", "overview", overview)
    own = browser.on(folder / "index.html")
    own.go("#/latents", "latents")
    own.count("65,536 of 65,536")
    order = sorted(range(n), key=lambda i: (-density[i], i))
    shown = own.latents()
    assert len(shown) < 100
    assert shown == order[: len(shown)]
    own.driver.execute_script("const v = document.getElementById('view'); v.scrollTop = v.scrollHeight")
    own.wait(lambda _: own.latents()[-1] == order[-1])
    assert len(own.latents()) < 100
    own.one('#group option[value="1"]').click()
    own.count("4,096 of 65,536")
    own.one("#token").send_keys("token77.")
    own.count("1 of 65,536")
    assert own.latents() == [77]
    own.go("#/hierarchy", "hierarchy")
    own.count("4,096 shown; 61,440 of 61,440 later latents have a parent")
    assert len(own.all("#nest > li")) < 100
    assert "15 inside" in own.all("#nest > li")[0].text
    own.go("#/map", "map")
    assert own.one("#count").text == "65,536 latents, 7 clusters"


def data(browser: Any, name: str) -> str:
    return (browser.index.parent / "data" / f"{name}.js").read_text()


def read(index: Path, name: str) -> str:
    match = re.fullmatch(r'give\("([^"]+)",(.*)\);\n', (index.parent / "data" / f"{name}.js").read_text())
    assert match is not None
    return match[2]
