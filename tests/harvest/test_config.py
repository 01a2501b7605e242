"""Settings of a harvest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from harvest.config import HarvestConfig
from matryoshka.config import load_config
from matryoshka.errors import UserError


def load(**flags: Any) -> HarvestConfig:
    return load_config(HarvestConfig, "harvest", flags=flags)


def test_defaults_are_the_real_recipe() -> None:
    config = load(layer=17)
    assert (config.model, config.tokens, config.ctx_len, config.codec) == (
        "google/gemma-2-2b",
        15_000_000,
        1024,
        "compact",
    )
    assert config.folder() == Path("data/l17")
    pair = config.pair()
    assert (pair.source.hook_point, pair.target.hook_point) == ("blocks.17.hook_resid_mid", "blocks.17.hook_mlp_out")
    assert load(layer=17, out=Path("elsewhere")).folder() == Path("elsewhere")


def test_content_is_what_decides_the_result() -> None:
    base = load(layer=3)
    for same in ({"out": Path("x")}, {"batch_size": 3}, {"device": "cpu"}):
        assert load(layer=3, **same).content() == base.content()
    for other in (
        {"tokens": "1M"},
        {"seed": 1},
        {"codec": "raw"},
        {"model": "gpt2"},
        {"dtype": "fp32"},
        {"ctx_len": 8},
    ):
        assert load(layer=3, **other).content() != base.content()


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        ({}, r"no layer is given: say layer \(17\), layers \(8,12,17\), or the layers in source and target"),
        ({"layer": -1}, "layer: .*greater than or equal to 0"),
        ({"layer": 1, "tokens": "abc"}, "tokens: expected a number such as 15M, 200k or 15000000, got 'abc'"),
        ({"layer": 1, "tokens": "100"}, "tokens = 100 is less than two contexts of ctx_len = 1024"),
        ({"layer": 1, "ctx_len": "1"}, "ctx_len: .*greater than or equal to 2"),
        ({"layer": 1, "source": "mlp_middle"}, "There is no site .mlp_middle.*resid_mid"),
        ({"layer": 1, "codec": "zip"}, "codec: .*'compact', 'raw' or 'int8'"),
        ({"layer": 1, "val_fraction": 0}, "val_fraction: .*greater than 0"),
        ({"layer": 1, "val_fraction": 1}, "val_fraction: .*less than 1"),
        ({"layer": 1, "seed": 2**64}, "seed: .*less than"),
        ({"layer": 1, "seed": -1}, "seed: .*greater than or equal to 0"),
        ({"layer": 1, "dtype": "fp8"}, "dtype: "),
        ({"layer": 1, "batch_size": "0"}, "batch_size"),
    ],
)
def test_bad_settings(flags: dict[str, Any], what: str) -> None:
    with pytest.raises(UserError, match=f"^bad harvest settings: {what}"):
        load(**flags)
