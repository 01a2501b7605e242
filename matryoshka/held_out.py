"""The unit of the train/val split: what is held out whole."""

from __future__ import annotations

from typing import Literal

ValUnit = Literal["document", "block"]
"""Whole documents, or blocks of contexts, of documents that train has parts of too."""

FIRST_VAL_UNIT: ValUnit = "block"
"""Of sets whose settings name none: those made before there was a choice."""

HELD_OUT = {
    "document": "whole documents, which train never saw",
    "block": "blocks of documents; train has other parts of the same documents",
}
"""The same in words."""
