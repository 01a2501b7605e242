"""Pictures of the pages of `evaluate report`, for the README and to look at while changing them.

    python examples/report_screenshots.py data/demo/runs/l15-k32/eval/l15-379517cd/report docs/images --latent 17

Needs Debian's chromium and chromium-driver, and selenium (in the dev extra).
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path
from typing import Any

WIDE, PHONE = (1280, 900), (390, 844)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, help="the folder with index.html")
    parser.add_argument("out", type=Path)
    parser.add_argument("--latent", type=int, default=0)
    words = parser.parse_args()
    words.out.mkdir(parents=True, exist_ok=True)
    latent = f"latent/{words.latent}"
    pages = [("overview", "", "overview"), ("latents", "#/latents", "latents"), ("latent", f"#/{latent}", latent)]
    pages.append(("run", "#/run", "run"))
    driver = open_browser()
    try:
        address = (words.report / "index.html").resolve().as_uri()
        for name, route, ready in pages:
            shoot(driver, address + route, ready, WIDE, "light", words.out / f"report-{name}.png")
        shoot(driver, address + pages[2][1], latent, WIDE, "dark", words.out / "report-latent-dark.png")
        shoot(driver, address + pages[2][1], latent, PHONE, "light", words.out / "report-latent-phone.png")
    finally:
        driver.quit()


def open_browser() -> Any:
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
    # Charts take the width of their boxes one frame later.
    time.sleep(0.3)
    driver.save_screenshot(str(path))
    print(path)


if __name__ == "__main__":
    main()
