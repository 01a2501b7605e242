"""Disk and time of a harvest, before it starts."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from harvest.estimate import Estimate, counted, estimate, gigabytes
from matryoshka.errors import UserError
from matryoshka.shards import Manifest, SiteFacts, plan_splits


def make_manifest(codec: str, width: int = 2304) -> Manifest:
    site = {"layer": 17, "width": width}
    return Manifest(
        model={},
        dataset={},
        source=SiteFacts(site="resid_mid", hook_point="blocks.17.hook_resid_mid", **site),
        target=SiteFacts(site="mlp_out", hook_point="blocks.17.hook_mlp_out", **site),
        ctx_len=1024,
        bos_id=2,
        special_ids=(0, 1, 2),
        norm=None,
        codec=codec,
        splits=plan_splits(14_649, 0.05, 1024, width),
        settings={},
        versions={},
    )


@pytest.mark.parametrize(("codec", "size"), [("raw", 138e9), ("compact", 97e9)])
def test_the_real_recipe_needs_what_design_md_says(codec: str, size: float, tmp_path: Path) -> None:
    found = estimate(make_manifest(codec), 15_000_000, tmp_path / "not" / "there" / "yet", 5000.0)
    assert found.n_bytes == pytest.approx(size, rel=0.01)
    assert found.seconds == 3000
    assert found.free_bytes == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.1)
    assert not (tmp_path / "not").exists()


def test_a_disk_is_full_before_its_last_byte() -> None:
    def check(free: int) -> None:
        Estimate(n_tokens=1, n_bytes=10**9, free_bytes=free, seconds=None).check(Path("data/l17"))

    check(10**9 + 70 * 2**20)
    for free in (10**9, 10**8):
        with pytest.raises(UserError, match=r"disk of data/l17 has .* free, but this harvest needs about 1\.0 GB"):
            check(free)


def test_a_disk_that_is_too_small_is_answered_with_what_helps(tmp_path: Path) -> None:
    def answer(codec: str) -> str:
        found = replace(estimate(make_manifest(codec), 15_000_000, tmp_path, None), free_bytes=int(65e9))
        with pytest.raises(UserError) as refused:
            found.check(Path("data/l17"))
        return str(refused.value)

    compact = answer("compact")
    assert "--codec compact" not in compact  # it is what was used
    assert "What helps: --codec int8 needs about 70.0 GB; fewer --tokens (10M more fit); or --out" in compact
    assert "--codec compact needs about 96.9 GB; --codec int8 needs about 70.0 GB; fewer" in answer("raw")
    assert "--codec" not in answer("int8")


def test_a_set_that_has_shards_keeps_its_codec() -> None:
    begun = Estimate(n_tokens=100, n_bytes=10**9, free_bytes=5 * 10**8, seconds=None)
    with pytest.raises(UserError, match=r"What helps: fewer --tokens \(43 more fit\); or --out"):
        begun.check("data/l17")


def test_tokens_for_people() -> None:
    assert [counted(n) for n in (6_599_999, 15_000_000, 870_500, 999, 2_310_000_000)] == [
        "6.5M",
        "15M",
        "870.5k",
        "999",
        "2.3B",
    ]


def test_sizes_for_people() -> None:
    assert [gigabytes(size) for size in (97.06e9, 1e9, 412.4e6, 0)] == ["97.1 GB", "1.0 GB", "412 MB", "0 MB"]
