"""Training: one stream of shuffled rows -> every unfinished run in turn -> checkpoints -> calibrated transcoders.

A plain run is a fleet of one. A run directory holds run.json (settings, shard-set identity, provenance), metrics.jsonl
and checkpoints/. Killed at any moment and started again with the same settings, every run goes on from its last
checkpoint; what a member learns does not depend on the other members.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress

import torch
from torch import Tensor

from matryoshka.checkpoints import list_checkpoints, newest_checkpoint
from matryoshka.devices import resolve_device
from matryoshka.errors import UserError
from matryoshka.ranks import Rank
from matryoshka.runs import RUN_FILE, exclusive, make_directory
from matryoshka.shards import ShardSet
from matryoshka.wandb_runs import check_login

from .batches.conditioning import Conditioning
from .batches.device_batch import Rows
from .batches.set_aside import SetAside
from .batches.stream import Stream
from .config import TrainConfig
from .fleet import MemberConfig, fleet_folder, is_fleet, members
from .interrupt import SharedStopRequest
from .member import DataWait, Member, PlannedRun
from .memory import check_memory, member_estimate, memory_of, release_memory
from .plan import make_plan
from .progress import NoProgress, Progress, usual_progress
from .record import (
    diverged_reason,
    publish_fleet,
    publish_run,
    refuse_other_fleet,
    refuse_other_run,
    run_record,
    stream_record,
)
from .result import FleetResult, TrainResult
from .saving import BackgroundWriter

_INIT_SEED = 0x1A17
"""Mixed into the seed of the rows that latents start from, so that they are not the rows of the first batches."""


def train(config: TrainConfig, progress: Progress | None = None) -> TrainResult:
    """Train the one run that `config` describes, or the rest of it.

    Raises UserError for invalid input, a loss that is not finite among it.
    """
    if is_fleet(config):
        raise UserError("these settings describe a fleet; use train_fleet, or leave out train.fleet and train.grid")
    (result,) = train_fleet(config, progress, Rank()).runs
    if result.outcome == "diverged":
        raise UserError(result.reason)
    return result


def train_fleet(config: TrainConfig, progress: Progress | None = None, rank: Rank | None = None) -> FleetResult:
    """Train every run that `config` describes from one stream, or what is left of them; of a rank, its share.

    A run whose loss is not finite ends as diverged and the others go on. Without `progress` bars are shown in a
    notebook, and nothing elsewhere. Raises UserError, before anything is written, for settings that cannot work or
    that differ from those of the runs that are there.
    """
    rank = rank if rank is not None else Rank()
    if config.shards is None:
        raise UserError("no shard set: pass --shards with the folder that harvest wrote, such as data/l17")
    shards = ShardSet.open(config.shards)
    device = resolve_device(rank.device(config.device))
    team = rank if config.parallel != "configs" and rank.world > 1 else None
    if team is not None and device.type not in ("cpu", "cuda"):
        raise UserError(
            f"--parallel {config.parallel} joins processes on CPUs or CUDA GPUs, and the device is {device}; use "
            "--device cpu, or --parallel configs"
        )
    # With the latents spread over ranks every rank sees every row.
    part = (0, 1) if team is None or config.parallel == "features" else (team.index, team.world)
    aside = SetAside.draw(shards, config.calibration_tokens, config.order_seed)
    stream = _stream(config, aside, config.order_seed, part=part, pin_memory=device.type == "cuda")
    every = [_planned(member, shards, stream.n_rows) for member in members(config)]
    group: str | None = None
    if is_fleet(config):
        folder, facts = fleet_folder(config), stream_record(config, shards)
        refuse_other_fleet(folder, facts, shards.path)
        group = folder.name
    planned_runs = rank.share(every) if team is None else every
    for planned in planned_runs:
        refuse_other_run(planned.folder, planned.record)
    left = [planned for planned in planned_runs if not _is_over(planned)]
    n_parts = rank.world if config.parallel == "features" else 1
    widths = {"d_in": shards.d_in, "d_out": shards.d_out}
    needs = {
        planned.name: member_estimate(planned.settings.config, planned.plan, **widths, device=device, n_parts=n_parts)
        for planned in left
    }
    check_memory(needs, stream.n_bytes, device)
    conditionings = _conditionings(left, shards, device)
    if any(planned.settings.config.wandb == "online" for planned in left) and (team is None or team.index == 0):
        check_login("--wandb offline")
    if group is not None and rank.index == 0:
        make_directory(fleet_folder(config))
        publish_fleet(fleet_folder(config), stream_record(config, shards), [planned.name for planned in every])
    with ExitStack() as held:
        if team is not None:
            held.enter_context(team.together(device.type))
        for planned in left if team is None or team.index == 0 else ():
            make_directory(planned.folder)
            held.enter_context(exclusive(planned.folder))
            if not (planned.folder / RUN_FILE).exists():
                publish_run(planned.folder, planned.record, shards)
        fleet = _Fleet(config, aside, stream, conditionings, device, team)
        if progress is None:
            progress = held.enter_context(usual_progress() if rank.index == 0 else NoProgress())
        taken = fleet.go(left, progress, group)
    return FleetResult(
        tuple(_result(planned, taken.get(planned.name, 0)) for planned in planned_runs), fleet.stopped_by
    )


class _Fleet:
    """The runs that are left, and what they share."""

    def __init__(
        self,
        config: TrainConfig,
        aside: SetAside,
        stream: Stream,
        conditionings: Mapping[tuple[str, str], Conditioning],
        device: torch.device,
        team: Rank | None,
    ) -> None:
        self._config = config
        self._conditionings = conditionings
        self._aside = aside
        self._stream = stream
        self._device = device
        self._team = team
        self.stopped_by: signal.Signals | None = None

    def go(self, planned_runs: Sequence[PlannedRun], progress: Progress, group: str | None) -> dict[str, int]:
        """Take the steps that are left. Returns how many each run took."""
        if not planned_runs:
            return {}
        runs: list[Member] = []
        with SharedStopRequest() as stop, ExitStack() as open_runs:
            # Left in the reverse order: the writer ends before the sinks close.
            closing = open_runs.enter_context(ExitStack())
            writer = open_runs.enter_context(BackgroundWriter())
            first_rows = _FirstRows(self._config, self._aside)
            for planned in planned_runs:
                conditioning = self._conditionings[planned.plan.input, planned.settings.config.condition]
                with self._memory_of(planned):
                    run = Member(
                        planned,
                        self._aside,
                        conditioning,
                        self._device,
                        writer,
                        first_rows,
                        group=group,
                        team=self._team,
                    )
                runs.append(run)
                closing.callback(run.close)
            first_rows.clear()
            release_memory()
            for run in runs:
                run.publish_session()
            progress.started(planned_runs, [run.first for run in runs])
            self._steps(runs, stop, progress)
            if stop.signal is not None:
                self.stopped_by = stop.signal
                for run in runs:
                    if run.outcome == "training":
                        run.stop()
                        progress.ended(run.planned.name, run.outcome)
        return {run.planned.name: run.done - run.first for run in runs}

    def _memory_of(self, planned: PlannedRun) -> AbstractContextManager[None]:
        shards = self._aside.shards
        widths = {"d_in": shards.d_in, "d_out": shards.d_out}
        return memory_of(planned.name, planned.settings.config, planned.plan, **widths, device=self._device)

    def _steps(self, runs: Sequence[Member], stop: SharedStopRequest, progress: Progress) -> None:
        """One pass over the stream: each batch goes through every run whose step it is."""
        waiting = DataWait()
        active = list(runs)
        while active and not self._is_stopped(stop):
            # Runs that were at different steps are trained up in one pass; a pass ends early only when nobody needs
            # its next batch.
            first, last = min(run.done for run in active), max(run.planned.plan.n_steps for run in active)
            batches = self._stream.batches(first, last)
            try:
                for step in range(first, last):
                    taking = [run for run in active if run.done == step]
                    if not taking or self._is_stopped(stop):
                        break
                    asked = time.perf_counter()
                    rows = Rows(next(batches), self._device)
                    waiting.seconds += time.perf_counter() - asked
                    for run in taking:
                        with self._memory_of(run.planned):
                            report = run.take(rows, waiting)
                        progress.advanced(run.planned.name, run.done, report)
                        if run.outcome != "training":
                            active.remove(run)
                            progress.ended(run.planned.name, run.outcome)
            finally:
                with suppress(AttributeError):
                    batches.close()  # pyright: ignore[reportAttributeAccessIssue] -- a generator

    def _is_stopped(self, stop: SharedStopRequest) -> bool:
        """Whether a signal has come, to any of the ranks that share the batches."""
        return stop.signal is not None if self._team is None else stop.agree()


def _conditionings(
    planned_runs: Sequence[PlannedRun], shards: ShardSet, device: torch.device
) -> dict[tuple[str, str], Conditioning]:
    """Input convention and conditioning -> the map of the runs that have them. Raises UserError for what cannot be."""
    wanted = {(planned.plan.input, planned.settings.config.condition) for planned in planned_runs}
    return {pair: Conditioning.from_shards(shards, *pair, device) for pair in sorted(wanted)}


class _FirstRows:
    """Random train rows for latents to start from: read once for each seed, however many runs start from them."""

    def __init__(self, config: TrainConfig, aside: SetAside) -> None:
        self._config = config
        self._aside = aside
        self._read: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, seed: int, n_rows: int) -> tuple[Tensor, Tensor]:
        """Up to `n_rows` rows; those of a smaller `n_rows` are the first of a larger one."""
        stream = _stream(self._config, self._aside, seed ^ _INIT_SEED)
        n_batches = max(1, min(-(-n_rows // stream.batch_rows), stream.n_rows // stream.batch_rows))
        held = self._read.get(seed)
        if held is None or len(held[0]) < n_batches * stream.batch_rows:
            batches = list(stream.batches(0, n_batches))
            held = torch.cat([batch.source for batch in batches]), torch.cat([batch.target for batch in batches])
            self._read[seed] = held
        n_rows = min(n_rows, n_batches * stream.batch_rows)
        return held[0][:n_rows], held[1][:n_rows]

    def clear(self) -> None:
        """Free what was read."""
        self._read.clear()


def _stream(
    config: TrainConfig, aside: SetAside, seed: int, *, part: tuple[int, int] = (0, 1), pin_memory: bool = False
) -> Stream:
    return Stream(
        aside.shards,
        batch_rows=config.batch_tokens,
        buffer_rows=config.buffer_tokens,
        seed=seed,
        max_norm=config.max_norm,
        n_readers=config.readers,
        part=part,
        pin_memory=pin_memory,
        aside=aside,
    )


def _planned(member: MemberConfig, shards: ShardSet, n_rows: int) -> PlannedRun:
    plan = make_plan(member.config, shards, n_rows)
    return PlannedRun(settings=member, plan=plan, record=run_record(member.config, plan, shards))


def _is_over(planned: PlannedRun) -> bool:
    """Whether there is nothing left to do: all steps taken, or the run diverged."""
    if (planned.folder / "checkpoints").is_dir() and any(last.is_finished for last in list_checkpoints(planned.folder)):
        return True
    return diverged_reason(planned.folder) is not None


def _result(planned: PlannedRun, n_taken: int) -> TrainResult:
    last = newest_checkpoint(planned.folder)
    checkpoint = None if last is None else last.folder
    n_steps = planned.plan.n_steps
    if last is not None and last.is_finished:
        return TrainResult(planned.folder, checkpoint, n_steps, n_taken)
    reason = diverged_reason(planned.folder)
    if reason is not None:
        return TrainResult(planned.folder, checkpoint, n_steps, n_taken, "diverged", f"{planned.folder}: {reason}")
    done = 0 if last is None else last.step
    return TrainResult(
        planned.folder, checkpoint, n_steps, n_taken, "stopped", f"stopped after step {done} of {n_steps}"
    )
