"""What is known about a transcoder beyond its own files: the shard set it was trained on, and the run."""

from __future__ import annotations

from dataclasses import dataclass

from matryoshka.run_facts import RunFacts


@dataclass(frozen=True, kw_only=True, slots=True)
class Provenance:
    """Facts that some formats and the model card ask for; None where nobody knows."""

    run: str | None = None
    """Name of the run's folder."""
    step: int | None = None
    """Optimizer steps behind the weights."""
    dataset: str | None = None
    """Name of the text that was harvested."""
    ctx_len: int | None = None
    """Tokens in a context."""
    has_bos: bool | None = None
    """Whether a context starts with BOS."""
    used: RunFacts = RunFacts()
    """What the training used and saw."""
    n_layers: int | None = None
    """Blocks of the language model."""
    norm_kind: str | None = None
    """"rms" or "layer": the norm behind the source site."""
