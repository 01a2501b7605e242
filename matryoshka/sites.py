"""Sites of a transformer block: their names, their hook points, and the forms in which one may be read.

A site names one tensor of a block, in order: `resid_pre` (what enters the block), `attn_out` (what attention adds),
`resid_mid` = resid_pre + attn_out, `mlp_out` (what the MLP adds), `resid_post` = resid_mid + mlp_out. The two `_out`
sites are what is ADDED to the residual stream: after the post-norm in models that have one (Gemma-2).
"""

from __future__ import annotations

from dataclasses import dataclass

from matryoshka.errors import UserError

SITES: tuple[str, ...] = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")

# What the sublayer that follows a residual site really reads: the residual after the norm, with its gain.
_SUBLAYER_INPUT = {"resid_mid": "mlp_in", "resid_pre": "attn_in"}


def hook_point(site: str, layer: int) -> str:
    """The TransformerLens name of a site, such as `blocks.17.hook_resid_mid`.

    Raises:
        UserError: unknown site or negative layer. Whether the layer exists is for the model to say.
    """
    if site not in SITES:
        raise UserError(f'There is no site "{site}". The sites of a block are {", ".join(SITES)}.')
    if layer < 0:
        raise UserError(f"Layer {layer} is negative. Layers are counted from 0 at the embedding.")
    return f"blocks.{layer}.hook_{site}"


@dataclass(frozen=True)
class Site:
    """One tensor of one block: `Site("resid_mid", 17)`."""

    name: str
    layer: int

    def __post_init__(self) -> None:
        hook_point(self.name, self.layer)

    @property
    def hook_point(self) -> str:
        return hook_point(self.name, self.layer)

    @classmethod
    def parse(cls, text: str) -> Site:
        """Read "8:resid_mid". Raises UserError on any other form."""
        layer, colon, name = text.partition(":")
        if not colon or not layer.strip().isdecimal():
            raise UserError(f'"{text}" is not a site. Write the layer, a colon and the site, as in "8:resid_mid".')
        return cls(name.strip(), int(layer))

    def __str__(self) -> str:
        return f"{self.layer}:{self.name}"


@dataclass(frozen=True)
class HookPair:
    """What a transcoder reads (`source`) and what it predicts (`target`); the two may be of different layers."""

    source: Site
    target: Site

    @property
    def deepest_layer(self) -> int:
        """The last block that a forward pass has to run."""
        return max(self.source.layer, self.target.layer)

    @classmethod
    def at_layer(cls, layer: int) -> HookPair:
        """The usual pair: resid_mid -> mlp_out of one layer."""
        return cls(Site("resid_mid", layer), Site("mlp_out", layer))


def _input_conventions() -> dict[str, tuple[str, ...]]:
    return {site: (site, "normalized", _SUBLAYER_INPUT[site]) if site in _SUBLAYER_INPUT else (site,) for site in SITES}


INPUT_CONVENTIONS: dict[str, tuple[str, ...]] = _input_conventions()
"""Source site -> the forms in which a transcoder may read it: raw (the site's own name), `normalized` (n), and what
the sublayer really reads (u): `mlp_in` for resid_mid, `attn_in` for resid_pre."""


def input_conventions(source_site: str) -> tuple[str, ...]:
    """The input conventions that a source site allows, raw first. Raises UserError for an unknown site."""
    if source_site not in INPUT_CONVENTIONS:
        raise UserError(f'There is no site "{source_site}". The sites of a block are {", ".join(SITES)}.')
    return INPUT_CONVENTIONS[source_site]
