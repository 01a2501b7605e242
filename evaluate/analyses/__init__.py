"""The analyses of a run: the one table that the commands, the pages, the documents and the tests are made from.

Each is in a file of its own and imports no other one. Nothing here is imported before it is used, so that `--help`
answers at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True, slots=True)
class Entry:
    """One analysis."""

    name: str
    """Its command, and the section of its settings."""
    module: str
    class_name: str

    def load(self) -> Any:
        """Its subclass of `analysis.Analysis`, whose arguments are what is asked beyond the settings."""
        return getattr(import_module(self.module, __package__), self.class_name)


ANALYSES = (
    Entry("run", ".reconstruction.run", "RunAnalysis"),
    Entry("samples", ".samples.samples", "SamplesAnalysis"),
    Entry("hierarchy", ".hierarchy.hierarchy", "HierarchyAnalysis"),
    Entry("logits", ".logits.logits", "LogitsAnalysis"),
    Entry("faithfulness", ".faithfulness.faithfulness", "FaithfulnessAnalysis"),
    Entry("absorption", ".absorption.absorption", "AbsorptionAnalysis"),
    Entry("probing", ".probing.probing", "ProbingAnalysis"),
    Entry("ablate", ".ablate.ablate", "AblateAnalysis"),
)
"""In the order in which the pages name them."""


def load_analysis(name: str) -> Any:
    """The class of the analysis called `name`."""
    (entry,) = (entry for entry in ANALYSES if entry.name == name)
    return entry.load()
