"""What an export is made of, and what every format's module has for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from matryoshka.interop.provenance import Provenance
from matryoshka.interop.samples import Samples
from matryoshka.shards import ShardSet
from matryoshka.transcoder import Transcoder, TranscoderConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportInputs:
    """Transcoders, and what some formats are made of besides the weights."""

    transcoders: Sequence[Transcoder]
    """One; for circuit-tracer one for each layer."""
    provenance: Provenance
    shards: ShardSet | None = None
    """For delphi: the set whose val rows go into the cache."""
    samples: Samples | None = None
    """For neuronpedia: the examples of each latent."""

    @property
    def transcoder(self) -> Transcoder:
        """The one, or the first."""
        return self.transcoders[0]


class Format(Protocol):
    """The functions that a format's module has. Each raises UserError for what the format cannot express."""

    def place(self, inputs: ExportInputs) -> str:
        """Where inside the exported folder the files belong; "." where the format leaves it open."""
        ...

    def write(self, inputs: ExportInputs, folder: Path) -> None:
        """Write the files into `folder`."""
        ...

    def dropped(self, config: TranscoderConfig) -> list[str]:
        """What somebody who opens the export with the format's own tool does not find in it, in words."""
        ...


def unread_prefixes(config: TranscoderConfig) -> list[str]:
    """`dropped` of a format that has a word for the nested prefixes, which only this project reads."""
    if len(config.group_sizes) == 1:
        return []
    return [f"the nested prefixes {_ends(config)}: kept as matryoshka_widths, which only this project reads"]


def lost_prefixes(config: TranscoderConfig) -> list[str]:
    """`dropped` of a format that has none."""
    if len(config.group_sizes) == 1:
        return []
    return [f"the nested prefixes {_ends(config)}; export one of them alone with --prefix"]


def _ends(config: TranscoderConfig) -> str:
    return ", ".join(map(str, config.prefix_ends))
