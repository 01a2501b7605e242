"""All runs of a fleet on one page: what is written, what is refused, and the page in a browser."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from evaluate.analyses.reconstruction.run import RunAnalysis
from evaluate.analysis import answer
from evaluate.config import EvaluateConfig
from evaluate.report.build import make_report
from evaluate.report.fleet import differing, is_fleet, make_fleet_report
from matryoshka import launch
from matryoshka.errors import UserError
from matryoshka.runs import publish_json
from matryoshka.shards import ShardSet

SETTINGS = {"a": {"k": 9, "lr": 1e-3}, "b<i>": {"k": 9, "lr": 2e-3}, "c": {"k": 12, "lr": 2e-3, "skip": True}}


@pytest.fixture
def config(val_set: ShardSet) -> EvaluateConfig:
    return EvaluateConfig(shards=val_set.path, device="cpu", bootstrap=10)


@pytest.fixture
def fleet(made: Any, tmp_path: Path) -> Path:
    """Three runs that differ in their settings; the third is of one group."""
    folder = tmp_path / "l1-fleet"
    for seed, (name, settings) in enumerate(SETTINGS.items()):
        sizes = {"group_sizes": (48,)} if name == "c" else {}
        run = made.run(folder / name, made.transcoder(seed=seed, **sizes), finished=name != "c")
        settings = {**settings, "batch_tokens": 100, "out": str(run), "device": "cpu"}
        publish_json(run / "run.json", {"format_version": 1, "config": settings})
        lines = [{"step": 10, "tokens_per_second": 500.0}, {"step": 30, "tokens_per_second": 250.0 * (seed + 1)}]
        (run / "timing.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 40, "tok')
    publish_json(folder / "fleet.json", {"format_version": 1, "members": list(SETTINGS)})
    return folder


def read(index: Path) -> dict[str, Any]:
    match = re.fullmatch(r'give\("fleet",(.*)\);\n', (index.parent / "data" / "fleet.js").read_text())
    assert match is not None
    return json.loads(match[1])


def test_the_data_is_that_of_the_members(fleet: Path, config: EvaluateConfig) -> None:
    assert is_fleet([fleet])
    assert not is_fleet([fleet / "a"])
    index = make_fleet_report([fleet], config).index
    assert index.parent.parent.parent == fleet / "eval"
    found = read(index)
    assert found["name"] == "l1-fleet"
    assert found["keys"] == ["k", "lr", "group_sizes", "skip"]
    assert [member["name"] for member in found["members"]] == list(SETTINGS)
    for member in found["members"]:
        (file,) = (fleet / member["name"]).glob("eval/*/report.json")
        report = json.loads(file.read_text())
        assert member["fvu"] == [prefix["fvu"] for prefix in report["threshold"]]
        assert member["l0"] == [prefix["l0"] for prefix in report["threshold"]]
        assert member["dead_share"] == report["total"]["dead_share"]
        assert member["pages"] is None
        assert "out" not in member["config"]
    # 10 steps of 100 rows at 500 a second, 20 at 250.
    assert [member["seconds"] for member in found["members"]] == pytest.approx([10.0, 6.0, 2 + 8 / 3], rel=1e-3)
    assert [member["finished"] for member in found["members"]] == [True, True, False]
    assert [len(member["fvu"]) for member in found["members"]] == [3, 3, 1]


def test_the_command(
    fleet: Path,
    val_set: ShardSet,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["report", str(fleet), "--shards", str(val_set.path), "--device", "cpu"]
    monkeypatch.chdir(fleet)
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setattr("sys.argv", ["evaluate", *words, "--set", "evaluate.bootstrap=0"])
    with pytest.raises(SystemExit) as ended:
        launch.evaluate()
    assert not ended.value.code
    (index,) = fleet.glob("eval/*/report/index.html")
    said = capsys.readouterr().err
    assert f"{index}: written; open {index.as_uri()}" in said
    # A fleet has no server; its members have pages.
    assert f"next: evaluate report {fleet / 'a'} --shards {val_set.path}" in said


def test_same_bytes_again_and_without_the_shard_set(fleet: Path, config: EvaluateConfig) -> None:
    index = make_fleet_report([fleet], config).index
    first = {path: path.read_bytes() for path in index.parent.rglob("*") if path.is_file()}
    again = make_fleet_report([fleet], EvaluateConfig(device="cpu")).index
    assert again == index
    with_wandb = EvaluateConfig(device="cpu", wandb="offline")
    assert "only the pages of single runs are logged" in make_fleet_report([fleet], with_wandb).notes[0]
    assert {path: path.read_bytes() for path in index.parent.rglob("*") if path.is_file()} == first


def test_runs_without_a_common_folder(fleet: Path, config: EvaluateConfig, tmp_path: Path) -> None:
    runs = [fleet / "a", fleet / "c"]
    with pytest.raises(UserError, match="several runs have no folder in common"):
        make_fleet_report(runs, config)
    index = make_fleet_report(runs, config.model_copy(update={"out": tmp_path / "both"})).index
    assert index == tmp_path / "both" / "report" / "index.html"
    assert [member["name"] for member in read(index)["members"]] == ["a", "c"]
    assert not (tmp_path / "both" / "report.json").exists()


def test_what_is_refused(fleet: Path, config: EvaluateConfig, made: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no shard set was named, and .* has no run.json that names one"):
        make_fleet_report([fleet], EvaluateConfig(device="cpu"))
    answer(RunAnalysis(), [fleet], config)
    other = made.shards(tmp_path / "l2", seed=5)
    shutil.rmtree(fleet / "b<i>" / "eval")
    answer(RunAnalysis(), [fleet / "b<i>"], config.model_copy(update={"shards": other.path}))
    with pytest.raises(UserError, match="on several shard sets"):
        make_fleet_report([fleet], EvaluateConfig(device="cpu"))
    shutil.rmtree(fleet / "b<i>" / "eval")
    answer(RunAnalysis(), [fleet], config)
    made.run(fleet / "a", made.transcoder(seed=77), steps=(500,))
    with pytest.raises(UserError, match="is not of the newest checkpoint"):
        make_fleet_report([fleet], EvaluateConfig(device="cpu"))


def test_settings_that_differ() -> None:
    assert differing([{"k": 1, "a": None}, {"k": 1, "b": 2, "a": None}]) == ["b"]
    assert differing([{"k": 1}]) == []


def test_the_page(browser: Any, fleet: Path, config: EvaluateConfig) -> None:
    from selenium.webdriver import ActionChains

    make_report(fleet / "a", config)
    page = browser.on(make_fleet_report([fleet], config).index)
    page.go("", "fleet")
    assert page.one("h1").text == "l1-fleet"
    found = {member["name"]: member for member in read(page.index)["members"]}
    assert len(page.all(".big canvas")) == 1
    # The line nearest to the pointer is named.
    plot = page.one(".big .u-over")
    first_point = (
        "const p = Charts.live[0].plot, b = p.over, i = p.data[1].findIndex((v) => v !== null && v !== undefined);"
        "const x = p.valToPos(p.data[0][i], 'x'), y = p.valToPos(p.data[1][i], 'y');"
        "return b.clientWidth > 200 && x === x && y === y ? [x - b.clientWidth / 2, y - b.clientHeight / 2] : null"
    )
    at = page.wait(lambda driver: driver.execute_script(first_point))
    ActionChains(page.driver).move_to_element_with_offset(plot, round(at[0]), round(at[1])).perform()
    page.wait(lambda _: page.one("#pointed").text.startswith("a: FVU"))
    assert page.texts("#dead .share") == [row[page.texts("#runs th").index("dead")] for row in by_name(page)]
    order = sorted(found, key=lambda name: found[name]["fvu"][-1])
    assert names(page) == order
    page.one('#runs [data-key="l0"]').click()
    assert page.driver.switch_to.active_element.get_attribute("data-key") == "l0"
    assert names(page) == sorted(found, key=lambda name: found[name]["l0"][-1])
    page.one('#runs [data-key="l0"]').click()
    assert names(page) == sorted(found, key=lambda name: -found[name]["l0"][-1])
    page.one('#filter-lr option[value="0.002"]').click()
    page.count("2 of 3 runs")
    assert set(names(page)) == {"b<i>", "c"}
    page.one('#filter-k option[value="12"]').click()
    page.count("1 of 3 runs")
    assert page.texts("#time .share") == ["4.67 s"]
    # For somebody else, who was sent the link; a link that somebody made up shows all.
    address = page.driver.current_url.partition("index.html")[2]
    assert address == "#/?sort=l0&order=down&config.k=12&config.lr=0.002"
    page.go("#/?sort=constructor&colour=toString&config.lr=7", "fleet")
    page.count("3 of 3 runs")
    page.go(address, "fleet")
    page.count("1 of 3 runs")
    page.one('#filter-skip option[value="-"]').click()
    page.count("0 of 3 runs")
    assert page.all("main i:not(.dot)") == []
    page.resize(390, 800)
    page.go("", "fleet")
    assert page.fits(390)
    page.one('#colour option[value="k"]').click()
    page.one("#runs a").click()
    page.at("overview")
    assert page.one("h1").text == "a"


def names(page: Any) -> list[str]:
    return [text.removesuffix(" (not finished)") for text in page.texts("#runs td:first-child")]


def by_name(page: Any) -> list[list[str]]:
    order = list(SETTINGS)
    return sorted(page.cells("#runs"), key=lambda row: order.index(row[0].removesuffix(" (not finished)")))
