"""Settings of a harvest."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from matryoshka.config import Config, Count, Layer, Layers, Seed, Share
from matryoshka.errors import UserError
from matryoshka.held_out import FIRST_VAL_UNIT, ValUnit
from matryoshka.locations import Location, Name, inside, location
from matryoshka.sites import HookPair, Site

_OPERATIONAL = frozenset({"out", "batch_size", "device", "skip_bad_lines"})
_SIDES = ("source", "target")
_CHOICE = frozenset({"layer", "layers", *_SIDES})
_LATER = frozenset({"bos", "pack", "max_doc_tokens", "dedup"})
"""Settings that sets of the first version do not know; left out of the record while they are at their default."""


def _listed(value: object) -> object:
    """Read what the command line writes with commas: "8:resid_mid,9:resid_mid" -> two."""
    return tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else value


Sites = Annotated[tuple[str, ...], BeforeValidator(_listed), Field(min_length=1)]
"""Names of sites, each with its layer (8:resid_mid) or without; "8:resid_mid,9:resid_mid" is read too."""


class HarvestConfig(Config):
    """What to read, with which model, and what to keep of it."""

    REPLACES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "layer": ("layers",),
        "layers": ("layer",),
        "model": ("revision",),
        "dataset": ("dataset_config", "dataset_split", "dataset_revision", "text_column"),
    }
    GONE: ClassVar[Mapping[str, str]] = {
        "source_site": "a site is said by source alone, as in source: resid_pre",
        "target_site": "a site is said by target alone, as in target: attn_out",
    }

    model: Name = "google/gemma-2-2b"
    """Language model: a Hugging Face hub name or a local folder in the Hugging Face layout."""
    revision: str | None = None
    """Branch, tag or commit of the model on the hub; the commit it resolves to is recorded."""
    dataset: Name = "monology/pile-uncopyrighted"
    """Text: a Hugging Face dataset name, or a local .txt, .jsonl or .parquet file, a folder of them, or a glob."""
    dataset_config: str | None = None
    """Configuration of a hub dataset, such as sample-10BT."""
    dataset_split: str = "train"
    """Split of a hub dataset."""
    dataset_revision: str | None = None
    """Branch, tag or commit of a hub dataset; pin it to be able to repeat a harvest."""
    text_column: str = "text"
    """Column (jsonl, parquet, hub) that holds the text; meta.text is the column text inside meta."""
    layer: Layer | None = None
    """Block of the language model, counted from 0."""
    layers: Layers | None = None
    """Several blocks at once, in place of layer, such as 8,12,17 or 0-25: one forward pass, one set for each."""
    source: Sites = ("resid_mid",)
    """Site that the transcoder will read; of another layer than layer as 8:resid_mid. Several, each with its layer,
    with commas."""
    target: Sites = ("mlp_out",)
    """Site that the transcoder will predict, as source; of several, one for each source."""
    tokens: Count = 15_000_000
    """Tokens to run through the model, train and val together; 15M is read too."""
    ctx_len: Annotated[Count, Field(ge=2, le=2**20)] = 1024
    """Tokens in one model input, the BOS token included."""
    val_fraction: Share = 0.05
    """Share of the text held out for evaluation, by a hash of each document."""
    val_unit: ValUnit = "document"
    """What is held out: whole documents, or, for a text of a few long ones, blocks of 16 contexts of any document. Then
    val has text of documents that train has too, and whatever is measured on it says so."""
    bos: Literal["auto", "none"] | Annotated[int, Field(ge=0, lt=2**31)] = "auto"
    """First token of every context: auto is the tokenizer's own if it has one; none; or a token id."""
    pack: bool = True
    """Lay documents end to end. Without, each context is of one document, padded with a special token."""
    max_doc_tokens: Count | None = None
    """Tokens of a document beyond these are left out."""
    dedup: bool = False
    """Leave out documents whose text has come before; takes about 60 bytes of memory a document."""
    skip_bad_lines: bool = False
    """Leave out lines of jsonl that are broken; they are counted, and the manifest says how many of which file."""
    batch_size: Annotated[Count, Field(le=2**20)] | Literal["auto"] = 8
    """Contexts in one forward pass; does not change the result beyond rounding. auto tries what is fastest."""
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Weights and arithmetic of the model; auto is bf16 where the device has it."""
    codec: Literal["compact", "raw", "int8"] = "compact"
    """compact: lossless, about 0.70 of raw bfloat16. raw: fastest to read. int8: about half, loses about 1%."""
    seed: Seed = 0
    """Seed of the train/val split."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 or mps."""
    out: Location | None = None
    """Folder or URL (s3://bucket/l17) of the shard set; data/l<layer> by default. Of several sets: their parent, or a
    form with {layer}."""

    @model_validator(mode="after")
    def _check(self) -> HarvestConfig:
        try:
            names = [member.folder() for member in self.members()]
        except UserError as error:
            raise ValueError(str(error)) from error
        if len(set(names)) < len(names):
            raise ValueError(f"two sets would be in one folder ({', '.join(map(str, names))}); name each pair once")
        if self.tokens < 2 * self.ctx_len:
            raise ValueError(
                f"tokens = {self.tokens} is less than two contexts of ctx_len = {self.ctx_len}; a set needs at least "
                "one for train and one for val"
            )
        return self

    @classmethod
    def replaced(cls, weaker: Mapping[str, Any], stronger: Mapping[str, Any]) -> set[str]:
        """As `Config.replaced`; a layer takes the place of one that a site carries, and the other way round."""
        gone = super().replaced(weaker, stronger)
        if stronger.get("layer") is not None or stronger.get("layers") is not None:
            gone |= {side for side in _SIDES if _carries(weaker.get(side)) and stronger.get(side) is None}
        sides = [stronger.get(side) if stronger.get(side) is not None else weaker.get(side) for side in _SIDES]
        if all(map(_carries, sides)) and any(_carries(stronger.get(side)) for side in _SIDES):
            gone |= {"layer", "layers"}
        return gone

    def pairs(self) -> tuple[HookPair, ...]:
        """The source and target sites of each set that is asked for, in the order in which they were named."""
        if self.layer is not None and self.layers is not None:
            raise UserError("layer and layers are both given; say one of them")
        layers = self.layers if self.layers is not None else () if self.layer is None else (self.layer,)
        carried = [":" in site for site in (*self.source, *self.target)]
        if all(carried) and layers:
            raise UserError(
                f"source {','.join(self.source)} and target {','.join(self.target)} say their layers, and layer "
                f"{','.join(map(str, layers))} is given too; leave out one of the two"
            )
        if not all(carried) and not layers:
            raise UserError(
                "no layer is given: say layer (17), layers (8,12,17), or the layers in source and target (8:resid_mid)"
            )
        if len(self.source) != len(self.target):
            raise UserError(
                f"there are {len(self.source)} sources and {len(self.target)} targets; each pair needs both"
            )
        if layers and len(self.source) > 1:
            raise UserError("several sources and targets each say their layers, as 8:resid_mid,9:resid_mid")
        pairs = tuple(zip(self.source, self.target, strict=True))
        if not layers:
            return tuple(HookPair(Site.parse(source), Site.parse(target)) for source, target in pairs)
        return tuple(
            HookPair(_site(source, layer), _site(target, layer)) for layer in layers for source, target in pairs
        )

    def members(self) -> tuple[HarvestConfig, ...]:
        """The settings of each set as if it were harvested alone."""
        pairs = self.pairs()
        if len(pairs) == 1 and self._names_are_plain() and self.layer is not None:
            return (self,)
        found = []
        for pair in pairs:
            source, target = pair.source, pair.target
            here: dict[str, Any] = {"out": self._place(pair, alone=len(pairs) == 1), "layers": None}
            if source.layer == target.layer:
                here |= {"layer": source.layer, "source": (source.name,), "target": (target.name,)}
            else:
                here |= {"layer": None, "source": (str(source),), "target": (str(target),)}
            # Without validation, which would ask for the members again.
            found.append(self.model_copy(update=here))
        return tuple(found)

    def pair(self) -> HookPair:
        """The pair of the only set. Use it on one of the members."""
        (pair,) = self.pairs()
        return pair

    def folder(self) -> Path | str:
        """Where the only set is: a folder or a URL. Use it on one of the members."""
        pair = self.pair()
        if self.out is None:
            return Path("data") / set_name(pair, plain=self.layer is not None)
        return location(str(self.out).replace("{layer}", str(pair.source.layer)))

    def content(self) -> dict[str, Any]:
        """The settings that decide what one member's set holds; the others only how fast and where."""
        content = self.model_dump(mode="json", exclude=set(_OPERATIONAL | _CHOICE))
        if self.val_unit == FIRST_VAL_UNIT:
            del content["val_unit"]
        for name in _LATER:
            if content[name] == type(self).model_fields[name].default:
                del content[name]
        # As sets have always said it.
        source, target = self.pair().source, self.pair().target
        if source.layer != target.layer:
            return content | {"source": str(source), "target": str(target)}
        return content | {"layer": source.layer, "source_site": source.name, "target_site": target.name}

    def _names_are_plain(self) -> bool:
        return not any(":" in site for site in (*self.source, *self.target))

    def _place(self, pair: HookPair, *, alone: bool) -> Path | str:
        name = set_name(pair, plain=self._names_are_plain())
        if self.out is None:
            return Path("data") / name
        if alone or "{layer}" in str(self.out):
            return location(str(self.out).replace("{layer}", str(pair.source.layer)))
        return inside(self.out, name)


def recorded_settings(content: Mapping[str, Any]) -> dict[str, Any]:
    """What `content` gave, as the settings of today."""
    renamed = {"source_site": "source", "target_site": "target"}
    return {renamed.get(name, name): value for name, value in content.items()}


def _carries(sites: object) -> bool:
    """Whether a value of source or target says layers."""
    return ":" in str(sites)


def _site(text: str, layer: int) -> Site:
    """A site that may say its layer, in this one where it does not."""
    return Site.parse(text) if ":" in text else Site(text, layer)


def set_name(pair: HookPair, *, plain: bool) -> str:
    """Folder name of a pair: l17 for the usual sites, or for any when `plain`; else l8-resid_pre-attn_out and such."""
    source, target = pair.source, pair.target
    if plain or pair == HookPair.at_layer(source.layer):
        return f"l{source.layer}"
    other = f"l{target.layer}-" if target.layer != source.layer else ""
    return f"l{source.layer}-{source.name}-{other}{target.name}"
