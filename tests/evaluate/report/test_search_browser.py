"""The search of the pages in a browser: it finds what the server finds, and the address says what was looked for."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from evaluate.report.data_file import write_data
from evaluate.report.search_files import write_search
from evaluate.report.window_search import CONTEXTS, FIRES, WindowIndex
from evaluate.rows.token_text import visible

HARD = [
    "dog",
    "DOG ",
    "\u00a0dog word5\ufeff",
    "__proto__",
    "constructor",
    "\u2423",
    "\u00e9",
    "e\u0301",
    "\u0130",
    "i\u0307",
    "\U0001f600",
    "\U0001f600 ",
    "\u05e9\u05dc\u05d5\u05dd",
    "x" * 200,
    "<script>window.hacked=1</script>",
    "\ufffd'`${1}",
    "word3 word3",
    "word",
    "d1",
    "dog word",
    "g\U0001f600",
    "",
    "\u2003",
    "no such words",
]


@pytest.fixture(scope="module")
def windows(index: Path, words: list[str]) -> WindowIndex:
    """What the server would search in."""
    return WindowIndex.read(index.parents[1] / "samples", lambda token: visible(words[token]))


def ask(browser: Any, query: str, where: str) -> dict[str, Any]:
    """The pages' own answer."""
    return browser.driver.execute_async_script(
        "const [query, where, done] = arguments; search(query, where, Report.data.get('overview').search).then(done);",
        query,
        where,
    )


def test_the_pages_find_what_the_server_finds(
    browser: Any, index: Path, windows: WindowIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the files of a wide transcoder, of which a search for firing reads those of its words alone."""
    monkeypatch.setattr("evaluate.report.search_files.ENTRIES_PER_FILE", 100)
    monkeypatch.setattr("evaluate.report.search_files.TEXT_FILE_SIZE", 3000)
    folder = tmp_path / "report"
    shutil.copytree(index.parent, folder)
    facts = write_search(folder / "data", windows)
    assert facts["n_fires_files"] > 5
    assert facts["n_text_files"] > 2
    write_data(folder / "data", "overview", {**overview(index), "search": facts})
    browser = browser.on(folder / "index.html")
    browser.go("#/latents", "latents")
    ask(browser, "dog", FIRES)
    loaded = browser.driver.execute_script(
        "return [...Report.data.keys()].filter((name) => /^(fires|text)/.test(name))"
    )
    assert len(loaded) == 1
    found = set()
    for query in [*HARD, *(f"word{i}" for i in range(3, 28, 4))]:
        for where in (FIRES, CONTEXTS):
            wanted = windows.find(query, where)
            assert ask(browser, query, where) == {"latents": wanted.latents, "shares": wanted.shares}, (query, where)
            found |= {(query, where)} if wanted.latents else set()
    assert len(found) > 35


def test_firing_comes_first_by_its_share(browser: Any, windows: WindowIndex) -> None:
    browser.go("#/latents", "latents")
    assert not browser.one("#search-note").is_displayed()
    wanted = windows.find("word7")
    browser.one("#search").send_keys(" WORD7")
    browser.count(f"{len(wanted.latents)} of 48")
    shown = browser.latents()
    assert shown == wanted.latents[: len(shown)]
    shares = [float(text.rstrip("%")) for text in browser.texts(".row .col-share")]
    assert wanted.shares is not None
    assert shares == pytest.approx([share / 100 for share in wanted.shares[: len(shown)]], rel=6e-3)
    assert "saved windows" in browser.one("#search-note").text
    browser.one('[data-key="share"]').click()
    browser.wait(lambda _: browser.latents()[0] == wanted.latents[-1])
    browser.one('#where option[value="contexts"]').click()
    anywhere = windows.find("word7", CONTEXTS).latents
    browser.count(f"{len(anywhere)} of 48")
    assert not browser.one('[data-key="share"]').is_displayed()
    assert len(anywhere) > len(wanted.latents) > 0


def test_a_latent_by_its_number_comes_first(browser: Any) -> None:
    browser.go("#/latents?q=17", "latents")
    browser.count("1 of 48")
    assert browser.latents() == [17]
    assert browser.one(".row .col-share").text == "its number"
    browser.go("#/latents?q=48", "latents")
    browser.count("0 of 48")


def test_nothing_found_and_the_way_on(browser: Any, windows: WindowIndex) -> None:
    query = "word5 word"
    assert not windows.find(query.replace(" word", "x")).latents
    browser.go("#/latents?q=ord5%20wor", "latents")
    browser.count("0 of 48")
    assert "No latent fires on \u201cord5 wor\u201d" in browser.one(".nothing").text
    browser.one(".nothing button").click()
    browser.count(f"{len(windows.find('ord5 wor', CONTEXTS).latents)} of 48")
    assert browser.latents()
    browser.go("#/latents?low=99", "latents")
    browser.count("0 of 48")
    browser.one(".nothing button").click()
    browser.count("47 of 48")


def test_the_address_says_what_is_shown(browser: Any) -> None:
    browser.go("#/latents", "latents")
    browser.one("#search").send_keys("word5 dog")
    browser.one('#group option[value="3"]').click()
    browser.one("#dead").click()
    browser.one("#weak").send_keys("0.1")
    browser.one('[data-key="max"]').click()
    browser.one('[data-key="max"]').click()
    browser.wait(lambda driver: "weak=0.1" in driver.current_url and "order=up" in driver.current_url)
    browser.wait(lambda _: "of" in browser.one("#count").text)
    address, shown = browser.driver.current_url.partition("index.html")[2], browser.latents()
    assert address == "#/latents?q=word5+dog&group=3&weak=0.1&dead=1&sort=max&order=up"
    assert len(shown) > 3
    browser.all(".row")[2].click()
    browser.at(f"latent/{shown[2]}")
    browser.driver.back()
    browser.at("latents")
    assert (browser.latents(), browser.driver.current_url.partition("index.html")[2]) == (shown, address)
    browser.all(".row")[1].click()
    browser.at(f"latent/{shown[1]}")
    next(link for link in browser.all("main .bar a") if link.text == "all latents").click()
    browser.at("latents")
    assert browser.latents() == shown
    # For somebody else, who was sent the link.
    browser.go(address, "latents")
    assert browser.latents() == shown
    assert browser.one("#search").get_attribute("value") == "word5 dog"
    assert browser.one("#dead").is_selected()
    assert browser.one('[data-key="max"]').get_attribute("aria-sort") == "ascending"
    # What is usual is not shown.
    browser.go("#/latents?group=0&side=raised&in=fires", "latents")
    assert browser.driver.current_url.endswith("#/latents")
    browser.count("47 of 48")


@pytest.mark.parametrize(
    "query",
    [
        "group=77&sort=constructor&order=zzz&low=abc&high=&in=__proto__&side=x&dead=",
        "sort=words&q=%&%=%E0%A4&&=",
        "q=%3Cimg%20src=x%20onerror=window.hacked=1%3E",
        f"q={'w' * 5000}",
        "q=a?b#c/d",
    ],
)
def test_an_address_that_somebody_made_up(browser: Any, query: str) -> None:
    browser.go(f"#/latents?{query}", "latents")
    browser.wait(lambda _: " of 48" in browser.one("#count").text)
    assert browser.all(".error, main img") == []


def overview(index: Path) -> dict[str, Any]:
    text = (index.parent / "data" / "overview.js").read_text()
    match = re.fullmatch(r'give\("overview",(.*)\);\n', text)
    assert match is not None
    return json.loads(match[1])
