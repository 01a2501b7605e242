"""index.html and the assets beside it: the same for every run, but for the title and the scripts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

INDEX_FILE = "index.html"
ASSETS_FOLDER = "assets"


@dataclass(frozen=True, slots=True)
class PageSet:
    """Which pages there are."""

    scripts: tuple[str, ...]
    """Names of assets, in the order in which they are run."""
    links: tuple[tuple[str, str, str], ...]
    """(page, its route, its name in the navigation)."""


_RUN_LINKS = (
    ("overview", "#/", "Overview"),
    ("latents", "#/latents", "Latents"),
    ("hierarchy", "#/hierarchy", "Hierarchy"),
    ("map", "#/map", "Map"),
    ("run", "#/run", "Run card"),
)
_LATENT_SCRIPTS = (
    *("search", "notes", "latents", "windows", "copy", "change", "latent", "relations"),
    *("nest", "sunburst", "hierarchy", "map"),
)
RUN_PAGES = PageSet(
    scripts=("uplot", "page", "charts", "overview", "measured", *_LATENT_SCRIPTS, "main"),
    links=_RUN_LINKS,
)
LIVE_PAGES = PageSet(
    scripts=(*RUN_PAGES.scripts[:-1], "live", "main"),
    links=(*_RUN_LINKS[:-1], ("try", "#/try", "Try a text"), _RUN_LINKS[-1]),
)
"""The pages of a run as `evaluate serve` shows them."""
FLEET_PAGES = PageSet(
    scripts=("uplot", "page", "charts", "fleet", "main"),
    links=(("fleet", "#/", "Fleet"),),
)


def index_html(title: str, pages: PageSet, *, live: bool = False) -> str:
    """The one page. From the disk it may load scripts and styles beside it and nothing else; `live`, ask its server."""
    from jinja2 import Environment

    source = resources.files(__package__ or "").joinpath("page.html.jinja").read_text(encoding="utf-8")
    template = Environment(autoescape=True).from_string(source)
    scripts = [f"{ASSETS_FOLDER}/{name}.js" for name in pages.scripts]
    return template.render(title=title, scripts=scripts, links=pages.links, live=live) + "\n"


def asset_files() -> dict[str, bytes]:
    """File name -> content of every file in assets/."""
    folder = resources.files(__package__ or "").joinpath(ASSETS_FOLDER)
    return {item.name: item.read_bytes() for item in sorted(folder.iterdir(), key=lambda item: item.name)}


def write_pages(folder: Path, title: str, pages: PageSet, extra: Sequence[str] = ()) -> None:
    """index.html, and the assets that it names (with their licences, and `extra`)."""
    (folder / ASSETS_FOLDER).mkdir()
    wanted = {f"{name}.js" for name in pages.scripts} | {"style.css", "uplot.css", "uplot.LICENSE", *extra}
    for name, content in asset_files().items():
        if name in wanted:
            (folder / ASSETS_FOLDER / name).write_bytes(content)
    (folder / INDEX_FILE).write_text(index_html(title, pages), encoding="utf-8")
