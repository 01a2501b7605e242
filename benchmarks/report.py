"""How fast the pages of a wide transcoder are: a report of 65,536 latents, opened in headless Chromium from the disk.

    python -m benchmarks.report --latents 65536 --out /tmp/wide

The report is made by the code of `evaluate report` from a random transcoder of small width on random rows, with
parents, places on the map and tokens for every latent. Prints the size of each data file and, for each page, the time
until it says it is ready, of a sort, a filter and a search, and the frames per second while the list is scrolled.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from evaluate.analyses import load_analysis
from evaluate.analyses.reconstruction.run import RunAnalysis
from evaluate.analysis import answer
from evaluate.config import EvaluateConfig
from evaluate.report.build import make_report
from matryoshka.runs import publish_json
from matryoshka.shards import Manifest, ShardSet, ShardSetWriter, SiteFacts, SplitPlan
from matryoshka.transcoder import Transcoder, TranscoderConfig

N_FRAMES = 120
N_TOKENS = 50_000
D_IN, D_OUT, CTX_LEN, N_CONTEXTS = 12, 10, 64, 24
SETTINGS = {
    "bootstrap": 0,
    "curve_tokens": 0,
    "samples": {"top": 4, "per_decile": 1, "random": 1, "before": 12, "after": 7},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latents", type=int, default=65_536)
    parser.add_argument("--out", type=Path, required=True, help="a new folder; it is filled and left")
    words = parser.parse_args()
    if words.out.exists():
        sys.exit(f"{words.out} is there already; name a new folder")
    torch.set_num_threads(1)
    started = time.perf_counter()
    index = wide_report(words.out, words.latents)
    print(f"made in {time.perf_counter() - started:.0f} s")
    sizes(index.parent)
    measure(index)


def wide_report(out: Path, n_latents: int) -> Path:
    """Shard set, run, evaluation and every optional table below `out`; returns the index of the pages."""
    generator = torch.Generator().manual_seed(0)
    shards = random_shards(out / "l1", generator)
    run = random_run(out / "wide", n_latents, generator)
    config = EvaluateConfig.model_validate({"shards": shards.path, "device": "cpu", **SETTINGS})
    (evaluation,) = answer(RunAnalysis(), [run], config)
    facts = {"transcoder": evaluation.result.transcoder, "shard_set": evaluation.result.shard_set, "settings": {}}
    random_tables(evaluation.path.parent, facts, n_latents)
    return make_report(run, config, tokenizer=str(random_words(out / "tokenizer"))).index


def random_words(folder: Path) -> Path:
    """A tokenizer of N_TOKENS words of a few letters."""
    from tokenizers import Tokenizer, models

    folder.mkdir()
    letters = np.random.default_rng(1).integers(ord("a"), ord("z") + 1, (N_TOKENS, 5)).tolist()
    words = {f" {bytes(row).decode()}{number % 10}": number for number, row in enumerate(letters)}
    words |= {f" word{number}": number for number in set(range(N_TOKENS)) - set(words.values())}
    Tokenizer(models.WordLevel(words, unk_token=next(iter(words)))).save(str(folder / "tokenizer.json"))
    return folder


def random_shards(path: Path, generator: torch.Generator) -> ShardSet:
    """Contexts of random tokens and activations."""
    plan = SplitPlan(contexts=N_CONTEXTS, chunk_positions=CTX_LEN, shard_contexts=(N_CONTEXTS,))
    sides = {"resid_mid": D_IN, "mlp_out": D_OUT}
    source, target = (SiteFacts(site=s, layer=1, hook_point=f"blocks.1.hook_{s}", width=d) for s, d in sides.items())
    manifest = Manifest(
        model={"model": "random", "revision": None},
        dataset={"name": "random"},
        source=source,
        target=target,
        ctx_len=CTX_LEN,
        bos_id=2,
        special_ids=(2,),
        norm=None,
        codec="raw",
        splits={"train": plan, "val": plan},
        settings={},
        versions={},
    )
    writer = ShardSetWriter.open(path, manifest, None)
    for split in ("train", "val"):
        tokens = torch.randint(3, N_TOKENS, (N_CONTEXTS, CTX_LEN), generator=generator, dtype=torch.int32)
        tokens[:, 0] = 2
        rows = [torch.randn(CTX_LEN, N_CONTEXTS, d, generator=generator).bfloat16() for d in (D_IN, D_OUT)]
        writer.write_shard(split, 0, tokens, torch.zeros_like(tokens), *rows)
    writer.finish()
    return ShardSet.open(path)


def random_run(path: Path, n_latents: int, generator: torch.Generator) -> Path:
    """A transcoder in four groups, each twice as wide as the one before, in a folder as `train run` leaves it."""
    sizes = [n_latents // 16, n_latents // 8, n_latents // 4]
    transcoder = Transcoder(
        TranscoderConfig(
            d_in=D_IN,
            d_out=D_OUT,
            group_sizes=(*sizes, n_latents - sum(sizes)),
            k=64,
            source_hook="blocks.1.hook_resid_mid",
            target_hook="blocks.1.hook_mlp_out",
            model="random",
        )
    )
    transcoder.set_weights(
        {
            "W_enc": torch.randn(D_IN, n_latents, generator=generator) / D_IN**0.5,
            "b_enc": torch.zeros(n_latents),
            "W_dec": torch.nn.functional.normalize(torch.randn(n_latents, D_OUT, generator=generator), dim=1),
            "b_dec": torch.zeros(D_OUT),
            "threshold": torch.full((n_latents,), 2.4),
        }
    )
    folder = path / "checkpoints" / "step-000001"
    transcoder.save(folder)
    publish_json(folder / "state.json", {"format_version": 1, "step": 1, "finished": True})
    publish_json(path / "run.json", {"format_version": 1})
    return path


def random_tables(folder: Path, facts: dict[str, Any], n_latents: int) -> None:
    """Five parents, a place and twenty tokens for each latent, in the files of the commands that measure them."""
    rng = np.random.default_rng(0)
    first = n_latents // 16
    child = np.repeat(np.arange(first, n_latents, dtype=np.int32), 5)
    edges = {
        # Of earlier groups: all of the first one.
        "parent": rng.integers(0, first, len(child)).astype(np.int32),
        "child": child,
        "p_child_given_parent": rng.random(len(child)) ** 4,
        "p_parent_given_child": rng.random(len(child)),
        "lift": 1 + 9 * rng.random(len(child)),
        "cosine": rng.random(len(child)).astype(np.float32),
    }
    latents = np.arange(n_latents, dtype=np.int32)
    places = {"latent": latents, "cluster": (latents % 500).astype(np.int32)}
    places |= {axis: rng.normal(size=n_latents).astype(np.float32) for axis in ("x", "y")}
    partners = {"latent": np.repeat(latents, 5), "other": rng.integers(0, n_latents, 5 * n_latents).astype(np.int32)}
    partners |= {"rank": np.tile(np.arange(5, dtype=np.int16), n_latents), "n_both": np.full(5 * n_latents, 9)}
    partners |= {"jaccard": rng.random(5 * n_latents), "phi": rng.random(5 * n_latents)}
    tokens = {
        "latent": np.repeat(latents, 20),
        "side": np.tile(np.repeat(np.array([1, -1], np.int8), 10), n_latents),
        "rank": np.tile(np.arange(10, dtype=np.int16), 2 * n_latents),
        "token": rng.integers(0, N_TOKENS, 20 * n_latents).astype(np.int32),
        "effect": rng.random(20 * n_latents).astype(np.float32),
    }
    for name, columns in {"hierarchy": edges, "clusters": places, "cofiring": partners, "logits": tokens}.items():
        pq.write_table(pa.table(columns), folder / f"{name}.parquet")
    clusters = {"n_clusters": 500, "n_directions": n_latents, "share_clustered": 1.0, "share_mixed": None}
    none = {"n_rows": 1, "fvu_without_latents": None, "groups": (), "pairs": (), "n_edges": len(child)}
    for name, record in {
        "hierarchy": {**none, "clusters": clusters},
        "logits": {"norm": "rms", "n_tokens": N_TOKENS},
    }.items():
        result = load_analysis(name).result.model_validate({**facts, **record})
        publish_json(folder / result.FILE, result.model_dump(mode="json"))


def sizes(folder: Path) -> None:
    """What the browser reads."""
    first = [folder / "index.html", *folder.glob("assets/*"), folder / "data" / "overview.js"]
    print(f"first page {sum(file.stat().st_size for file in first) / 1e6:.2f} MB")
    for name in ("latents", "hierarchy", "clusters", "logits"):
        print(f"{name}.js {(folder / 'data' / f'{name}.js').stat().st_size / 1e6:.1f} MB")
    for name in ("fires", "text"):
        parts = [file.stat().st_size for file in (folder / "data").glob(f"{name}-*.js")]
        print(f"{name}-N.js {sum(parts) / 1e6:.1f} MB, the largest of {len(parts)} {max(parts) / 1e6:.2f} MB")
    print(f"all of it {sum(file.stat().st_size for file in folder.rglob('*') if file.is_file()) / 1e6:.0f} MB")


def measure(index: Path) -> None:
    """Times in a fresh page each, in milliseconds since the navigation began."""
    driver = open_browser()
    try:
        for name, route in {
            "overview": "",
            "browser": "#/latents",
            "fires on": "#/latents?q=word1",
            "contexts": "#/latents?q=word1&in=contexts",
            "latent": "#/latent/17",
            "hierarchy": "#/hierarchy",
            "map": "#/map",
        }.items():
            print(f"{name:<10} ready after {ready(driver, index, route):7.0f} ms")
        ready(driver, index, "#/latents")
        act = "document.querySelector('[data-key=max]').click()"
        print(f"sort       {during(driver, act):7.0f} ms")
        act = "const g = document.getElementById('group'); g.value = '2'; g.dispatchEvent(new Event('change'))"
        print(f"filter     {during(driver, act):7.0f} ms")
        driver.execute_script(
            "const g = document.getElementById('group'); g.value = '0'; g.dispatchEvent(new Event('change'))"
        )
        print(f"scrolling  {frames(driver):7.0f} frames a second, slowest {slowest(driver):.0f} ms")
    finally:
        driver.quit()


def ready(driver: Any, index: Path, route: str) -> float:
    """Open a page; milliseconds until it is ready and has been painted."""
    driver.get("about:blank")
    driver.get(index.resolve().as_uri() + route)
    return driver.execute_async_script(
        """const done = arguments[0], main = document.getElementById('main'), end = () => done(performance.now());
        const look = () => main.dataset.ready ? requestAnimationFrame(end) : setTimeout(look, 2);
        look();"""
    )


def during(driver: Any, act: str) -> float:
    """Milliseconds from an action to the frame that shows it."""
    return driver.execute_async_script(
        f"const done = arguments[0], start = performance.now(); {act};"
        "requestAnimationFrame(() => requestAnimationFrame(() => done(performance.now() - start)))"
    )


def frames(driver: Any) -> float:
    """Frames a second while the list is scrolled by a screen each frame."""
    times = driver.execute_async_script(
        """const done = arguments[1], n = arguments[0], view = document.getElementById('view'), times = [];
        const step = (now) => { times.push(now); view.scrollTop += view.clientHeight;
          if (times.length > n) { window.frameTimes = times; done(times); } else requestAnimationFrame(step); };
        requestAnimationFrame(step);""",
        N_FRAMES,
    )
    return 1000 * N_FRAMES / (times[-1] - times[0])


def slowest(driver: Any) -> float:
    """The longest of those frames, in milliseconds."""
    times = driver.execute_script("return window.frameTimes")
    return max(late - early for early, late in zip(times, times[1:], strict=False))


def open_browser() -> Any:
    """Debian's chromium without a window."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    browser, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    if browser is None or chromedriver is None:
        sys.exit("no browser: apt-get install -y --no-install-recommends chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,900"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=Service(chromedriver))
    driver.set_script_timeout(120)
    return driver


if __name__ == "__main__":
    main()
