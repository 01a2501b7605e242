"""The pages in a real browser: Debian's chromium, driven by selenium.

Without a browser these tests fail, so that they cannot vanish unseen; MATRYOSHKA_NO_BROWSER=1 skips them on purpose.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from warm_processes import WarmPython

from evaluate.analyses.hierarchy.hierarchy import HierarchyAnalysis
from evaluate.analyses.match.match import Best
from evaluate.analyses.match.result import Matching, write_matching
from evaluate.analysis import answer
from evaluate.config import EvaluateConfig, HierarchyConfig
from evaluate.report.build import make_report
from evaluate.report.http_pages import PageServer
from evaluate.report.serve import serve_report
from evaluate.subject.subjects import Subject
from matryoshka.runs import publish_json
from matryoshka.transcoder import Transcoder

EVIL = ["<script>window.hacked=1</script>", "<img src=x onerror=window.hacked=1>", '"><b>', "</script>", "\u2028'`${1}"]

# What a search has to be careful with; none of these is a word of the other tests.
HARD = [" Dog", "dog", "__proto__", "  ", "e\u0301", "\u0130", "\U0001f600", " \u05e9\u05dc\u05d5\u05dd", "x" * 3000]
WORDS = [*(f" word{i}" for i in range(3, 28)), *HARD, " word37", *EVIL]


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def save_tokenizer(folder: Path) -> Path:
    """Forty tokens, some of which would like to be HTML."""
    from tokenizers import Tokenizer, models

    folder.mkdir()
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    Tokenizer(models.WordLevel(vocabulary, unk_token=" word3")).save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="session")
def evil() -> list[str]:
    """Tokens of the pages' texts that would like to be HTML."""
    return EVIL


@pytest.fixture(scope="session")
def words() -> list[str]:
    """Text of each token."""
    return WORDS


@pytest.fixture(scope="session")
def index(made: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of 48 latents (latent 9 dead), with its tokens out of `save_tokenizer`; nothing else was measured."""
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


@pytest.fixture(scope="session")
def measured(index: Path, made: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run after every command that measures something of it."""
    place = tmp_path_factory.mktemp("measured")
    run = place / index.parents[3].name
    shutil.copytree(index.parents[3], run)
    shards, tokenizer = index.parents[4] / "l1", index.parents[4] / "tokenizer"
    hierarchy = HierarchyConfig(clusters=False, min_rows=2)
    config = EvaluateConfig(shards=shards, device="cpu", bootstrap=10, hierarchy=hierarchy)
    folder = answer(HierarchyAnalysis(), [run], config)[0].path.parent
    _measure(folder, json.loads((folder / "report.json").read_text()), made)
    _match(run, folder)
    note = {"star": True, "text": f"mine: {EVIL[0]}{EVIL[1]}\nand more", "changes": 3}
    publish_json(run / "notes.json", {"format_version": 1, "latents": {"20": note, "7": {**note, "text": ""}}})
    pages = make_report(run, config, tokenizer=str(tokenizer))
    assert pages.notes == ()
    return pages.index


def _measure(folder: Path, report: dict[str, Any], made: Any) -> None:
    """What the other commands write, in their formats, with numbers that a test can look for."""
    facts = {"format_version": 1, "transcoder": report["transcoder"], "shard_set": report["shard_set"], "settings": {}}
    record = json.loads((folder / "hierarchy.json").read_text())
    summary = {"n_clusters": 3, "n_directions": 47, "share_clustered": 0.9, "share_mixed": 1.0}
    publish_json(folder / "hierarchy.json", {**record, "clusters": summary})
    alive = [i for i in range(48) if i != 9]
    clusters = {
        "latent": alive,
        "cluster": [i % 4 - 1 for i in alive],
        "x": [float(i % 7) for i in alive],
        "y": [float(i // 7) for i in alive],
    }
    _table(folder / "clusters.parquet", clusters, {"latent": "int32", "cluster": "int32", "x": "float", "y": "float"})
    rows = [
        (i, side, rank, (i + 3 * rank + (side < 0)) % 40) for i in range(48) for side in (1, -1) for rank in range(3)
    ]
    latent, side, rank, token = (list(column) for column in zip(*rows, strict=True))
    logits = {"latent": latent, "side": side, "rank": rank, "token": token}
    logits["effect"] = [s * (2.5 - r) for s, r in zip(side, rank, strict=True)]
    kinds = {"latent": "int32", "side": "int8", "rank": "int16", "token": "int32", "effect": "float"}
    _table(folder / "logits.parquet", logits, kinds)
    results = made.results(facts)
    scaled = {"scale": 0.025, "scale_rows": 4099, "soft_cap": 30.0}
    results["logits"] = results["logits"].model_copy(update=scaled)
    for name in ("logits", "faithfulness"):
        publish_json(folder / results[name].FILE, results[name].model_dump(mode="json"))
    (folder / "ablations").mkdir()
    publish_json(folder / "ablations" / "20.json", results["ablate"].model_dump(mode="json"))
    absorber = {"latent": 40, "n_rows": 3, "words": ["<b>apple"]}
    letter = {"letter": "a", "n_true_positives": 30, "main_latents": [4], "k_sparse_f1": [0.9]}
    letters = [{**letter, "absorption_fraction": 0.125, "full_absorption": 0.1, "missed": 0.2, "absorbers": [absorber]}]
    score = {"n_letters": 1, "letters_without_latent": [], "absorption_fraction": 0.125, "missed": 0.2, "main_f1": 0.7}
    intervals = {"absorption_fraction_interval": [0.1, 0.15], "full_absorption": 0.1, "full_absorption_interval": None}
    absorption = [
        {**score, **intervals, "missed_interval": None, "n_main_latents": 1.0, "prefix_end": end, "letters": letters}
        for end in (6, 17, 48)
    ]
    counts = {"tokenizer": "t", "n_train_rows": 9, "n_test_rows": 9, "probes": []}
    publish_json(folder / "absorption.json", {**facts, **counts, "prefixes": absorption})
    one = {"label": "<i>class", "latents": [20], "accuracy": 0.75, "precision": 0.7, "recall": 0.7, "f1": 0.7}
    scores = [{"k": k, "accuracy": 0.7 + k / 100, "f1": 0.7, "classes": [one]} for k in (1, 20)]
    probed = {
        "name": "first_letter",
        "unit": "token",
        "classes": [{"label": "<i>class", "n_train": 9, "n_test": 9}],
        "left_out": [],
        "majority_accuracy": 0.5,
        "source": {"k": None, "accuracy": 0.95, "f1": 0.9},
        "source_top_k": [{"k": 1, "accuracy": 0.6, "f1": 0.6}],
        "prefixes": [{"prefix_end": end, "scores": scores} for end in (6, 17, 48)],
    }
    publish_json(
        folder / "probing.json", {**facts, "tokenizer": "t", "sets": [probed], "skipped": {"tags": "<no> tags"}}
    )


def _match(run: Path, folder: Path) -> None:
    """Two results of `evaluate match`: one of these weights, whose other side is named like HTML, and one of others."""
    (step,) = run.glob("checkpoints/step-000400")
    group = {"n_latents": 48, "n_alive": 47, "mean_max_cosine": 0.5, "share_close_cosine": 0.5, "share_mutual": None}
    group |= {"mean_max_correlation": 0.5, "share_close_correlation": 0.5}
    side = {"layer_hook": "blocks.1.hook_resid_mid", "input": "resid_mid", "prefix_ends": [48], "groups": [group]}
    own = {**side, "total": group, "name": "run", "weights_sha256": Subject("", Transcoder.load(step)).digest()}
    other = {**side, "total": group, "name": EVIL[1], "weights_sha256": "0" * 64, "layer_hook": "blocks.4.<b>hook"}
    record = {"shard_sets": ["l1", "l1"], "shard_set_digests": ["a", "a"], "split": "val", "tokens": None}
    record |= {"n_rows": 873, "close": 0.7}
    for name, sides in (("match-a", [other, own]), ("match-b", [other, other])):
        (folder / name).mkdir()
        latents = torch.arange(48)
        none = torch.where(latents == 9, torch.nan, (latents / 50).double())
        like = Best(none, torch.where(latents == 9, -1, 47 - latents))
        near = Best(none / 2, torch.where(latents == 9, -1, latents))
        write_matching(folder / name, Matching.model_validate({**record, "sides": sides}), (near, near), (like, like))


def _table(path: Path, columns: dict[str, list[Any]], kinds: dict[str, str]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([(name, pa.type_for_alias(kind)) for name, kind in kinds.items()])
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns, schema=schema), buffer)
    path.write_bytes(buffer.getvalue())


@pytest.fixture(scope="session")
def driver() -> Iterator[Any]:
    if os.environ.get("MATRYOSHKA_NO_BROWSER") == "1":
        pytest.skip("MATRYOSHKA_NO_BROWSER=1 asks for no browser")
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

    def __init__(self, driver: Any, address: Path | str) -> None:
        self.driver, self.address = driver, address

    @property
    def index(self) -> Path:
        assert isinstance(self.address, Path)
        return self.address

    def on(self, address: Path | str) -> Browser:
        """The same browser on another report."""
        return Browser(self.driver, address)

    def wait(self, ready: Callable[[Any], Any]) -> Any:
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.driver, 60).until(ready)

    def go(self, route: str = "", page: str = "overview") -> None:
        self.driver.get("about:blank")
        self.driver.get((self.address if isinstance(self.address, str) else self.address.as_uri()) + route)
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

    def cells(self, table: str) -> list[list[str]]:
        """The text of a table's body, row by row."""
        return self.driver.execute_script(
            "const rows = [...document.querySelectorAll(arguments[0] + ' tbody tr')];"
            "return rows.map((row) => [...row.cells].map((cell) => cell.textContent))",
            table,
        )

    def latents(self) -> list[int]:
        return [int(text) for text in self.texts(".row span:first-child")]

    def count(self, start: str) -> None:
        self.wait(lambda _: self.one("#count").text.startswith(start))

    def resize(self, width: int, height: int) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def fits(self, width: int) -> bool:
        """Whether nothing sticks out at the side of a screen of this width."""
        return self.driver.execute_script("return document.documentElement.scrollWidth") <= width


@pytest.fixture
def browser(driver: Any, index: Path) -> Iterator[Browser]:
    """On the plain report; afterwards no page may have logged an error or run a token."""
    driver.get_log("browser")
    opened = Browser(driver, index)
    opened.resize(1280, 900)
    yield opened
    assert driver.get_log("browser") == []
    assert driver.execute_script("return window.hacked") is None


@pytest.fixture(scope="module")
def harvested(
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
def server(harvested: Path) -> Iterator[PageServer]:
    served = serve_report(harvested / "l1-k9", EvaluateConfig(device="cpu"))
    thread = threading.Thread(target=served.server.serve_forever, daemon=True)
    thread.start()
    yield served.server
    served.server.shutdown()
    served.server.server_close()
    thread.join(10)


@pytest.fixture
def live(browser: Any, server: PageServer) -> Any:
    """The browser on the served pages."""
    return browser.on(f"http://127.0.0.1:{server.port}/")
