"""What the other commands measured, on the pages: tokens, parents and children, the nest, the map, the scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from evaluate.report.window_search import WindowIndex


@pytest.fixture
def full(browser: Any, measured: Path) -> Any:
    """The browser on the report of a run of which everything was measured."""
    return browser.on(measured)


@pytest.fixture(scope="module")
def edges(measured: Path) -> list[dict[str, Any]]:
    return pq.read_table(measured.parent.parent / "hierarchy.parquet").to_pylist()


def test_a_latent_says_what_is_missing(browser: Any) -> None:
    browser.go("#/latent/20", "latent/20")
    for part in ("logits", "hierarchy", "ablations"):
        (note,) = browser.texts(f'.missing[data-part="{part}"]')
        assert "not measured yet" in note
        assert "evaluate " in note
    browser.go()
    assert browser.texts("h2")[-1] == "Not here yet"
    assert len(browser.all(".missing code")) == 6
    for page in ("hierarchy", "map"):
        browser.go(f"#/{page}", page)
        assert "evaluate hierarchy RUN" in browser.one(".missing").text


def test_the_tokens_of_a_latent(full: Any, words: list[str]) -> None:
    full.go("#/latent/33", "latent/33")
    for side, wanted in (("raised", (33, 36, 39)), ("lowered", (34, 37, 0))):
        shown = full.texts(f"#{side} .share")
        assert [text.replace("\ufffd", "\u2028") for text in shown] == [words[token] for token in wanted]
    assert full.all("aside script, aside img, aside b") == []
    # In logits, at the median scale of the final norm, beside the direction's own effect.
    assert full.texts("#raised .heads span") == ["token", "logit", "direction"]
    numbers = [
        [float(text) for text in full.texts(f"#{side} li:not(.heads) :nth-child({i})")]
        for side in ("raised", "lowered")
        for i in (2, 3)
    ]
    assert numbers[1::2] == [[2.5, 1.5, 0.5], [-2.5, -1.5, -0.5]]
    assert numbers[::2] == [pytest.approx([0.025 * x for x in own], rel=0.05) for own in numbers[1::2]]
    (note,) = full.texts("#logits .note")
    for part in (
        "per unit of activation, before the model\u2019s soft cap at 30",
        "0.0250, the median scale",
        "4,099 held-out rows",
    ):
        assert part in note
    full.go("#/latent/20", "latent/20")
    facts = (
        dict(full.cells("#ablation .facts"))
        if not full.all("#ablation .facts th")
        else dict(zip(full.texts("#ablation .facts th"), full.texts("#ablation .facts td"), strict=True))
    )
    assert facts["KL here"] == "0.01235"
    assert facts["positions"] == "7"
    assert full.texts("#ablation .tokens .share") == [words[36]]
    assert full.all("#ablation img, #ablation script") == []


def test_from_a_parent_to_its_child_and_back(full: Any, edges: list[dict[str, Any]]) -> None:
    parent = max({edge["parent"] for edge in edges}, key=lambda p: sum(edge["parent"] == p for edge in edges))
    own = sorted((e for e in edges if e["parent"] == parent), key=lambda e: (-e["p_child_given_parent"], e["child"]))
    full.go(f"#/latent/{parent}", f"latent/{parent}")
    for more in full.all("#children .more"):
        more.click()
    assert [int(text) for text in full.texts("#children li a")] == [edge["child"] for edge in own]
    assert full.texts("#children summary") == [f"Children ({len(own)})"]
    shares = [float(text.rstrip("%")) for text in full.texts("#children li .share")]
    assert shares == pytest.approx([100 * edge["p_parent_given_child"] for edge in own], abs=0.51)
    child = own[0]["child"]
    full.all("#children li a")[0].click()
    full.at(f"latent/{child}")
    parents = sorted((e for e in edges if e["child"] == child), key=lambda e: -e["p_parent_given_child"])
    assert {int(text) for text in full.texts("#parents li a")} == {edge["parent"] for edge in parents}
    next(link for link in full.all("#parents li a") if link.text == str(parent)).click()
    full.at(f"latent/{parent}")
    partners = pq.read_table(full.index.parents[1] / "cofiring.parquet").to_pylist()
    wanted = [row["other"] for row in sorted(partners, key=lambda row: row["rank"]) if row["latent"] == parent]
    assert [int(text) for text in full.texts("#partners li a")] == wanted
    full.one("#in-nest").click()
    full.at(f"hierarchy/{parent}")


def nest_of(edges: list[dict[str, Any]], least: float) -> dict[int, int]:
    """Child -> parent: of those that hold enough of it the one of the latest group, then the one that holds most."""
    best: dict[int, tuple[int, float, int]] = {}
    for edge in edges:
        if round(1000 * edge["p_parent_given_child"]) >= 1000 * least:
            key = (edge["parent_group"], round(1000 * edge["p_parent_given_child"]), -edge["parent"])
            best[edge["child"]] = max(best.get(edge["child"], key), key)
    return {child: -key[2] for child, key in best.items()}


def test_the_nest(full: Any, edges: list[dict[str, Any]], words: list[str]) -> None:
    nest = nest_of(edges, 0.25)
    below: dict[int, set[int]] = {i: set() for i in range(48)}
    for child in nest:
        up = child
        while up in nest:
            up = nest[up]
            below[up].add(child)
    full.go("#/hierarchy", "hierarchy")
    full.one('#least option[value="250"]').click()
    full.count(f"6 shown; {len(nest)} of 42 later latents have a parent")
    roots = sorted(range(6), key=lambda i: (-len(below[i]), i))
    assert [int(text) for text in full.texts("#nest > li > .nest-line a")] == roots
    root = roots[0]
    item = f'#nest > li[data-latent="{root}"]'
    assert f"{len(below[root])} inside" in full.one(f"{item} > .nest-line").text
    full.one(f"{item} > .nest-line .fold").click()
    own = {child for child, parent in nest.items() if parent == root}
    full.wait(lambda _: len(full.all(f"{item} > .nest-body > .nest > li")) == min(len(own), 30))
    assert set(map(int, full.texts(f"{item} > .nest-body > .nest > li > .nest-line a"))) <= own
    full.wait(lambda _: full.all(f"{item} .nest-contexts .peak"))
    # The arcs of the sunburst are the same latents, and lead further in.
    arcs = {int(arc.get_attribute("data-latent")) for arc in full.all("#burst .arc:not(.core)")}
    assert arcs <= below[root]
    assert len(arcs) > 1
    inner = next(iter(arcs))
    full.driver.execute_script(
        "document.querySelector(arguments[0]).dispatchEvent(new MouseEvent('click'))", f'.arc[data-latent="{inner}"]'
    )
    full.wait(lambda driver: driver.current_url.endswith(f"#/hierarchy/{inner}?least=250"))
    assert full.texts("#burst .way a")[-1] == str(inner)
    assert full.texts("#burst .core-label")[0] == str(inner)
    full.one("#search").send_keys("17")
    full.wait(lambda _: full.texts("#nest > li > .nest-line a") == ["17"])
    full.one("#search").clear()
    full.one("#search").send_keys("word17")
    wanted = WindowIndex.read(full.index.parents[1] / "samples", words.__getitem__).find("word17")
    full.count(f"{len(wanted.latents)} shown")
    assert [int(text) for text in full.texts("#nest > li > .nest-line a")] == wanted.latents[:40]
    # The address says all of it; another order is the same latents.
    full.one('#order option[value="number"]').click()
    address = full.driver.current_url.partition("index.html")[2]
    full.go(address, address.removeprefix("#/").partition("?")[0])
    full.count(f"{len(wanted.latents)} shown")
    assert full.one("#least").get_attribute("value") == "250"
    assert [int(text) for text in full.texts("#nest > li > .nest-line a")] == sorted(wanted.latents)[:40]
    record = json.loads((full.index.parents[1] / "hierarchy.json").read_text())
    assert [row[3] for row in full.cells("#gains")] == [f"{group['fvu_after']:.4f}" for group in record["groups"]]
    assert len(full.cells("#pairs")) == 3


def test_an_address_in_the_nest_opens_its_root(full: Any, edges: list[dict[str, Any]]) -> None:
    nest = nest_of(edges, 0.5)
    child = max(nest)
    root = child
    while root in nest:
        root = nest[root]
    full.go(f"#/hierarchy/{child}", f"hierarchy/{child}")
    assert full.texts("#burst .core-label")[0] == str(child)
    assert full.all("#nest > li")[0].get_attribute("data-latent") == str(root)
    full.wait(lambda _: full.all(f'#nest > li[data-latent="{root}"] .nest-contexts .window'))


def test_the_map(full: Any, words: list[str]) -> None:
    from selenium.webdriver import ActionChains

    full.go("#/map", "map")
    assert full.one("#count").text == "47 latents, 3 clusters"
    assert len(full.all("#map-card li")) == 3
    # Latent 24 was laid in the middle.
    canvas = full.one("#map")
    ActionChains(full.driver).move_to_element(canvas).perform()
    assert full.wait(lambda _: full.one("#tip").text).startswith("24, group 3")
    ActionChains(full.driver).click().perform()
    full.wait(lambda _: full.all("#map-card .peak"))
    assert full.texts("#map-card h3")[0].startswith("in no cluster")
    (link,) = full.all("#map-card .members a")
    link.click()
    full.at("latent/24")
    full.go("#/map", "map")
    full.one("#search").send_keys("24")
    full.count("1 of 47")
    assert full.texts("#map-card .members a") == ["24"]
    full.one("#search").clear()
    full.one("#search").send_keys("word24")
    wanted = WindowIndex.read(full.index.parents[1] / "samples", words.__getitem__).find("word24").latents
    full.count(f"{len(wanted)} of 47")
    assert [int(text) for text in full.texts("#map-card .members a")] == wanted[:25]
    full.all(".controls label input")[0].click()
    full.go(full.driver.current_url.partition("index.html")[2], "map")
    full.count(f"{len(wanted)} of 47")
    assert [box.is_selected() for box in full.all(".controls label input")] == [False, True, True]
    painted = full.driver.execute_script(
        "const c = document.getElementById('map');"
        "return c.getContext('2d').getImageData(0, 0, c.width, c.height).data.some((v) => v > 0)"
    )
    assert painted


def test_the_browser_filters_by_logit_token(full: Any) -> None:
    full.go("#/latents", "latents")
    full.count("47 of 48")
    full.one("#token").send_keys("word25")
    # word25 is token 22: raised by the latents 22, 19 and 16, at any rank.
    full.count("3 of 48")
    assert set(full.latents()) == {16, 19, 22}
    full.one('#side option[value="lowered"]').click()
    full.wait(lambda _: set(full.latents()) == {15, 18, 21})
    full.one('#group option[value="2"]').click()
    full.count("1 of 48")
    full.go("#/latents", "latents")
    full.one("#token").send_keys("<script")
    full.count("3 of 48")


def test_the_scores_on_the_first_page(full: Any) -> None:
    full.go()
    assert [row[4] for row in full.cells("#faithfulness")] == ["50.0%", "62.5%", "75.0%"]
    assert full.cells("#absorption")[2][2] == "12.5% (10.0% \u2013 15.0%)"
    assert full.cells(".probing") == [
        ["first 6", "71.0%", "90.0%"],
        ["first 17", "71.0%", "90.0%"],
        ["first 48", "71.0%", "90.0%"],
        ["the input\u2019s own dimensions", "60.0%", "-"],
    ]
    for summary in full.all("details summary"):
        summary.click()
    text = full.one("main").text
    for part in ("<b>apple", "<i>class", "<no> tags"):
        assert part in text
    assert full.all("main td b, main td i") == []
    assert full.texts(".missing") == [
        "Other transcoders on the same rows are not measured yet. evaluate compare RUN OTHER --out RUN/eval/SET"
    ]


@pytest.mark.parametrize("page", ["", "latent/20", "hierarchy", "map", "latents"])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_phone(full: Any, page: str, theme: str) -> None:
    full.resize(390, 800)
    media = {"features": [{"name": "prefers-color-scheme", "value": theme}]}
    full.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    full.go(f"#/{page}", page or "overview")
    assert full.fits(390)
    ground = full.driver.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert ground == {"light": "rgb(255, 255, 255)", "dark": "rgb(16, 20, 25)"}[theme]
    full.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
