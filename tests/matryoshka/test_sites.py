"""Names of sites."""

from __future__ import annotations

import dataclasses

import pytest

from matryoshka.errors import UserError
from matryoshka.sites import INPUT_CONVENTIONS, SITES, HookPair, Site, hook_point
from matryoshka.sites import input_conventions as conventions_of


def test_hook_point_is_the_transformer_lens_name():
    assert hook_point("resid_mid", 17) == "blocks.17.hook_resid_mid"
    assert [hook_point(s, 0) for s in SITES] == [f"blocks.0.hook_{s}" for s in SITES]


def test_unknown_site_is_answered_with_the_known_ones():
    with pytest.raises(UserError, match="resid_pre, attn_out, resid_mid, mlp_out, resid_post"):
        hook_point("resid_middle", 3)
    with pytest.raises(UserError, match="negative"):
        hook_point("resid_mid", -1)
    with pytest.raises(UserError, match="resid_middle"):
        Site("resid_middle", 3)


def test_site_parses_what_it_prints():
    site = Site.parse("8:resid_mid")
    assert (site.name, site.layer, site.hook_point) == ("resid_mid", 8, "blocks.8.hook_resid_mid")
    assert Site.parse(str(site)) == site


@pytest.mark.parametrize("text", ["resid_mid", "resid_mid:8", ":resid_mid", "-1:resid_mid", "8", "8:", "8:nope", ""])
def test_malformed_sites_are_refused(text):
    with pytest.raises(UserError):
        Site.parse(text)


def test_hook_pair_at_a_layer_and_across_layers():
    pair = HookPair.at_layer(17)
    assert (pair.source, pair.target, pair.deepest_layer) == (Site("resid_mid", 17), Site("mlp_out", 17), 17)
    assert HookPair(Site("resid_mid", 3), Site("resid_post", 9)).deepest_layer == 9
    assert HookPair(Site("resid_mid", 9), Site("resid_post", 3)).deepest_layer == 9
    with pytest.raises(dataclasses.FrozenInstanceError):
        pair.source = Site("attn_out", 1)  # pyright: ignore


def test_conventions_of_each_site():
    assert conventions_of("resid_mid") == ("resid_mid", "normalized", "mlp_in")
    assert conventions_of("resid_pre") == ("resid_pre", "normalized", "attn_in")
    assert conventions_of("mlp_out") == ("mlp_out",)
    assert set(INPUT_CONVENTIONS) == set(SITES)
    with pytest.raises(UserError, match="resid_mid"):
        conventions_of("mlp_in")
