"""What `evaluate steer` prints."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from ...rows.token_text import visible
from .steer import Steered


def show_steered(steered: Steered) -> None:
    """Both continuations under each other."""
    console = Console()
    added = f"with {steered.scale:g} x {steered.max_act:.3g} of latent {steered.latent}"
    for title, text in (("as it is", steered.plain), (added, steered.steered)):
        console.print(Text(title, style="bold"))
        line = Text(visible(steered.prompt), style="dim")
        console.print(line.append(visible(text), style="not dim"), soft_wrap=True)
