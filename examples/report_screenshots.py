"""Pictures of the pages of `evaluate report`, for the README and to look at while changing them.

    python examples/report_screenshots.py data/demo/runs/l15-k32/eval/l15-*/report docs/images \\
        --root 163 --words paris --fleet data/demo/runs/l15-fleet/eval/l15-*/report

Those of the README are of `make demo`, with the map that it leaves out and a fleet of six short runs:

    evaluate hierarchy data/demo/runs/l15-k32 && evaluate report data/demo/runs/l15-k32
    train run --shards data/demo/l15 --group-sizes 288,576,1152 --steps 100 \\
        --set "train.grid={k: [16, 32, 64], lr: [1.0e-3, 3.0e-3]}"
    evaluate report data/demo/runs/l15-fleet

The hierarchy and the map need `evaluate hierarchy`, the tokens of a latent `evaluate logits`; a page without them says
so. Needs Debian's chromium and chromium-driver, and selenium (in the dev extra).
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

WIDE, PHONE = (1280, 900), (390, 844)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, help="the folder with index.html")
    parser.add_argument("out", type=Path)
    parser.add_argument("--latent", type=int, default=0, help="latent whose page is taken")
    parser.add_argument("--root", type=int, default=0, help="latent that the hierarchy is opened at")
    parser.add_argument("--words", help="words that are looked for in the list of latents")
    parser.add_argument("--fleet", type=Path, help="the report of a fleet, for its page")
    words = parser.parse_args()
    words.out.mkdir(parents=True, exist_ok=True)
    latent, hierarchy = f"latent/{words.latent}", f"hierarchy/{words.root}"
    listed = "latents" if words.words is None else f"latents?{urlencode({'q': words.words})}"
    pages = {"overview": "", "latents": listed, "latent": latent, "hierarchy": hierarchy, "map": "map", "run": "run"}
    driver = open_browser()
    try:
        address = (words.report / "index.html").resolve().as_uri()
        for name, route in pages.items():
            shoot(
                driver,
                f"{address}#/{route}",
                route.partition("?")[0] or name,
                WIDE,
                "light",
                words.out / f"report-{name}.png",
            )
        shoot(driver, f"{address}#/{latent}", latent, WIDE, "dark", words.out / "report-latent-dark.png")
        shoot(driver, f"{address}#/{latent}", latent, PHONE, "light", words.out / "report-latent-phone.png")
        shoot(driver, f"{address}#/{hierarchy}", hierarchy, WIDE, "dark", words.out / "report-hierarchy-dark.png")
        if words.fleet is not None:
            address = (words.fleet / "index.html").resolve().as_uri()
            shoot(driver, address, "fleet", WIDE, "light", words.out / "report-fleet.png")
    finally:
        driver.quit()


def open_browser() -> Any:
    """Debian's chromium without a window."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    browser, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    if browser is None or chromedriver is None:
        raise SystemExit("no browser: apt-get install -y --no-install-recommends chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(flag)
    return webdriver.Chrome(options=options, service=Service(chromedriver))


def shoot(driver: Any, address: str, ready: str, size: tuple[int, int], theme: str, path: Path) -> None:
    """One page at one size and theme, once it says that it is ready."""
    from selenium.webdriver.support.ui import WebDriverWait

    width, height = size
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    media = {"features": [{"name": "prefers-color-scheme", "value": theme}]}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    # From another page, so that the address is loaded even where only its fragment differs.
    driver.get("about:blank")
    driver.get(address)
    state = "return document.getElementById('main')?.dataset.ready"
    WebDriverWait(driver, 60).until(lambda opened: opened.execute_script(state) == ready)
    # Charts take the width of their boxes one frame later, contexts in the nest come when their chunk is read.
    time.sleep(0.8)
    driver.save_screenshot(str(path))
    print(path)


if __name__ == "__main__":
    main()
