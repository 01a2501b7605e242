"""What a run used and saw, from the files in its folder: not what was asked for ("auto"), but what that came to."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matryoshka.held_out import HELD_OUT
from matryoshka.locations import portable_name
from matryoshka.progress import duration
from matryoshka.runs import RUN_FILE, TIMING_FILE

NOT_RECORDED = "not recorded"
"""Of a fact that older runs did not write down."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFacts:
    """None where the run does not say it."""

    device: str | None = None
    """Several, "cpu, then 2 x cuda:0", where the run continued elsewhere; so do precision and backend."""
    precision: str | None = None
    """Of the encoder product: fp32, bf16 or fp16."""
    backend: str | None = None
    """sparse or dense."""
    input: str | None = None
    """The convention of what the transcoder reads."""
    k_aux: int | None = None
    lr: float | None = None
    """At its peak."""
    tokens: int | None = None
    """Rows that the steps have seen; more than there are in several epochs."""
    seconds: float | None = None
    """That these steps took, by the clock; in a fleet with the other members in turn."""
    dataset: str | None = None
    documents: Mapping[str, int] | None = None
    """Split -> documents with tokens in it."""
    val_unit: str | None = None

    def lines(self) -> list[tuple[str, str]]:
        """(what, value) for people."""
        documents = None
        if self.documents is not None:
            documents = ", ".join(f"{split} {number:,}" for split, number in sorted(self.documents.items()))
        found = {
            "device": self.device,
            "precision of the encoder product": self.precision,
            "backend": self.backend,
            "input convention": self.input,
            "k_aux": None if self.k_aux is None else f"{self.k_aux:,}",
            "peak learning rate": None if self.lr is None else f"{self.lr:.3g}",
            "tokens seen": None if self.tokens is None else f"{self.tokens:,}",
            "wall time": None if self.seconds is None else duration(self.seconds),
            "dataset": self.dataset,
            "documents": documents,
            "held out": None if self.val_unit is None else HELD_OUT.get(self.val_unit),
        }
        return [(what, NOT_RECORDED if value is None else value) for what, value in found.items()]


def read_run_facts(run: Path, step: int | None) -> RunFacts:
    """The facts of the run directory `run` after `step` steps; nothing is known where there is no run.json."""
    record = _json(run / RUN_FILE)
    plan, data = _at(record, "identity", "plan"), _at(record, "data")
    sessions = record.get("sessions")
    sessions = [one for one in sessions if isinstance(one, dict)] if isinstance(sessions, list) else []
    documents, dataset, val_unit = data.get("documents"), data.get("dataset"), data.get("val_unit")
    if not isinstance(documents, dict) or not all(isinstance(number, int) for number in documents.values()):
        documents = None
    batch_tokens = _at(record, "config").get("batch_tokens")
    timing, number_of_tokens = json_lines(run / TIMING_FILE), None
    if isinstance(batch_tokens, int) and step is not None:
        number_of_tokens = step * batch_tokens
    return RunFacts(
        device=_in_turn([{**one, "device": _devices(one)} for one in sessions], "device"),
        precision=_in_turn(sessions, "precision"),
        backend=_in_turn(sessions, "backend"),
        input=plan["input"] if isinstance(plan.get("input"), str) else None,
        k_aux=plan["k_aux"] if isinstance(plan.get("k_aux"), int) else None,
        lr=plan["lr"] if isinstance(plan.get("lr"), int | float) else None,
        tokens=number_of_tokens,
        seconds=seconds_of([line for line in timing if step is None or line["step"] <= step], batch_tokens),
        dataset=portable_name(dataset) if isinstance(dataset, str) else None,
        documents=documents,
        val_unit=val_unit if isinstance(val_unit, str) else None,
    )


def seconds_of(lines: Sequence[Mapping[str, Any]], batch_tokens: Any) -> float | None:
    """Seconds that training took, from the rates of timing.jsonl; None where they say nothing."""
    if not isinstance(batch_tokens, int):
        return None
    seconds, before = 0.0, 0
    for line in lines:
        rate = line.get("tokens_per_second")
        if isinstance(rate, int | float) and rate > 0:
            seconds += (line["step"] - before) * batch_tokens / rate
        before = line["step"]
    return float(f"{seconds:.4g}") if seconds > 0 else None


def json_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl or timing.jsonl that are whole; none where there is no file."""
    if not path.is_file():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            # The last line of a run that was killed while it wrote.
            continue
    return [line for line in lines if isinstance(line, dict) and "step" in line]


def _devices(session: Mapping[str, Any]) -> Any:
    """With how many of them there were, where that was more than one."""
    device, n_ranks = session.get("device"), session.get("n_ranks")
    return f"{n_ranks} x {device}" if isinstance(device, str) and isinstance(n_ranks, int) and n_ranks > 1 else device


def _in_turn(sessions: Sequence[Mapping[str, Any]], name: str) -> str | None:
    """The values of one key over the sessions, each once."""
    found = dict.fromkeys(str(one[name]) for one in sessions if isinstance(one.get(name), str))
    return ", then ".join(found) or None


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _at(record: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    """The mapping under these keys, one in the other; empty where there is none."""
    found: Any = record
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    return found if isinstance(found, dict) else {}
