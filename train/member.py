"""One run of a fleet while it is trained: its state, its place in the stream, its metrics and its checkpoints."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from matryoshka.checkpoints import list_checkpoints, newest_checkpoint
from matryoshka.ranks import Rank
from matryoshka.transcoder import Transcoder, TranscoderConfig

from .batches.conditioning import Conditioning
from .batches.device_batch import Rows
from .batches.set_aside import SetAside
from .calibrate import calibrate_threshold
from .checkpoint import prune_checkpoints, save_checkpoint, saved_state
from .distributed.latent_slice import LatentSlice, is_by_latent
from .distributed.latents_over_ranks import LatentsOverRanks
from .distributed.rows_over_ranks import RowsOverRanks
from .fleet import MemberConfig
from .measurements import measurements
from .memory import release_memory
from .plan import Plan
from .prefixes import sampled_sizes
from .record import publish_diverged, publish_session
from .saving import BackgroundWriter
from .sinks import JsonlSink, MetricSink, WandbSink
from .step.initial import initial_state
from .step.step import NonFiniteLoss, StepReport, StepSettings, StepState, TrainStep

Outcome = Literal["training", "finished", "diverged", "stopped"]
FirstRows = Callable[[int, int], tuple[Tensor, Tensor]]
"""(seed, n) -> up to n random train rows, source and target."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedRun:
    """A run as it is known before its first step."""

    settings: MemberConfig
    plan: Plan
    record: Mapping[str, Any]
    """Content of run.json."""

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.settings.name

    @property
    def folder(self) -> Path:
        """The run directory."""
        return self.settings.folder


class DataWait:
    """Seconds that the fleet has waited for its data; each member takes differences of it."""

    def __init__(self) -> None:
        self.seconds = 0.0


class Member:
    """An unfinished run. It goes on from its last checkpoint, or starts from `first_rows`."""

    def __init__(
        self,
        planned: PlannedRun,
        aside: SetAside,
        conditioning: Conditioning,
        device: torch.device,
        writer: BackgroundWriter,
        first_rows: FirstRows,
        *,
        group: str | None,
        team: Rank | None = None,
    ) -> None:
        """`aside` has the shard set, and the rows of it that no step sees, for the threshold.

        `group` is the name under which W&B shows the runs of a fleet together.

        `team`: this rank of several that share every batch, or every dictionary. The first writes what they learn.
        """
        self.planned = planned
        self.outcome: Outcome = "training"
        self._config = planned.settings.config
        self._plan = planned.plan
        self._aside = aside
        self._conditioning = conditioning
        self._writer = writer
        self._team = team
        last = newest_checkpoint(planned.folder)
        by_latents = team is not None and self._config.parallel == "features"
        self._held = LatentSlice(team, planned.plan.d_sae) if team is not None and by_latents else None
        """The latents of this rank, when it does not hold all."""
        state = self._fresh(first_rows) if last is None else _restored(saved_state(last.folder, self._held))
        self._writes = team is None or team.index == 0
        together = (
            None if team is None else (LatentsOverRanks if by_latents else RowsOverRanks)(team, planned.plan.d_sae)
        )
        self._take_step = TrainStep(self._step_settings(), state, device, together)
        self.first = self.done = int(state.step)
        self._saved = self.first
        self._schedule = self._plan.schedule(self._config)
        self._k_schedule = self._plan.k_schedule(self._config)
        self._jsonl = JsonlSink(planned.folder, self.first) if self._writes else None
        self._sinks: list[MetricSink] = [] if self._jsonl is None else [self._jsonl]
        if self._config.wandb != "off" and self._writes:
            self._sinks.append(self._wandb(group))
        self._logged_step, self._logged_at, self._waited = self.first, time.perf_counter(), 0.0

    def publish_session(self) -> None:
        """Write down what the steps to come are computed with: not "auto", but what that comes to here."""
        if not self._writes:
            return
        self._aim()  # the backend depends on k
        step, config = self._take_step, self._config
        n_ranks = 1 if self._team is None else self._team.world
        rows = config.batch_tokens // (n_ranks if config.parallel == "data" else 1)
        used = {
            "device": _named(step.device),
            "precision": step.precision,
            "backend": step.backend_for(rows),
            "n_ranks": n_ranks,
        }
        publish_session(self.planned.folder, self.first, used)

    def take(self, rows: Rows, waiting: DataWait) -> StepReport | None:
        """Train on the batch of the step `done`; a loss that is not finite ends the run as diverged."""
        config, done = self._config, self.done + 1
        self._aim()
        log = done % config.log_every == 0 or done == self._plan.n_steps
        x, y = rows.x(self._conditioning), rows.y(self._conditioning)
        try:
            report = self._take_step(x, y, lr=self._schedule.at(self.done), log=log)
        except NonFiniteLoss as error:
            self._diverge(error)
            return None
        self.done = done
        if report is not None:
            self._log(report, waiting)
        if done == self._plan.n_steps:
            self._finish()
        elif done % self._plan.checkpoint_every == 0:
            self.save()
        return report

    def _aim(self) -> None:
        """Set what changes from step to step: k and the prefixes in the loss."""
        config, settings = self._config, self._take_step.settings
        k, sizes = self._k_schedule.at(self.done), None
        if config.sampled_prefixes is not None:
            sizes = sampled_sizes(self._plan.d_sae, config.sampled_prefixes, seed=config.seed, step=self.done)
        if (k, sizes) != (settings.k, settings.sampled_sizes):
            self._take_step.settings = replace(settings, k=k, sampled_sizes=sizes)

    def save(self) -> None:
        """Write a checkpoint of this moment in the background, unless there is one.

        A batch that was skipped on the device ends the run as diverged instead: this moment is not that of step `done`.
        """
        if self._saved == self.done:
            return
        try:
            self._take_step.check()
        except NonFiniteLoss as error:
            self._diverge(error)
        else:
            self._save(None)

    def stop(self) -> None:
        """Leave off here, with a checkpoint."""
        self.save()
        if self.outcome == "training":
            self.outcome = "stopped"

    def close(self) -> None:
        """Close the sinks; nothing may be written in the background any more."""
        finished = None
        if self.outcome == "finished" and self._writes:
            whole = [
                checkpoint.folder for checkpoint in list_checkpoints(self.planned.folder) if checkpoint.is_finished
            ]
            finished = whole[-1] if whole else None
        for sink in self._sinks:
            sink.close(finished)

    def _log(self, report: StepReport, waiting: DataWait) -> None:
        now = time.perf_counter()
        seconds = now - self._logged_at
        timing = {
            "tokens_per_second": (self.done - self._logged_step) * self._config.batch_tokens / seconds,
            "data_wait": (waiting.seconds - self._waited) / seconds,
        }
        for sink in self._sinks:
            sink.log(self.done, measurements(report, self._plan.group_sizes), timing)
        self._logged_step, self._logged_at, self._waited = self.done, now, waiting.seconds

    def _finish(self) -> None:
        self.outcome = "finished"
        if not self._writes and self._held is None:
            return
        threshold = calibrate_threshold(
            self._take_step.state,
            self._conditioning,
            self._aside,
            k=self._config.k,
            team=None if self._held is None else self._held.rank,
        )
        self._save(threshold)

    def _diverge(self, error: NonFiniteLoss) -> None:
        self.outcome = "diverged"
        if not self._writes:
            return
        self._writer.wait()
        last = newest_checkpoint(self.planned.folder)
        publish_diverged(
            self.planned.folder,
            step=error.step + 1,
            loss=error.loss,
            checkpoint=None if last is None else last.folder,
        )

    def _save(self, calibrated: float | None) -> None:
        """Snapshot the state and hand it to the writer; `calibrated` is the threshold of a finished run."""
        jsonl, step, finished = self._jsonl, self.done, calibrated is not None
        self._saved = step
        if jsonl is None and self._held is None:
            return
        self._writer.wait()
        state = self._take_step.state
        tensors = {name: self._copy(name, tensor) for name, tensor in state.tensors().items()}
        if jsonl is None:
            return
        weights = {name: tensors[name] for name in state.weights()}
        threshold = tensors["threshold"] if calibrated is None else torch.tensor(calibrated)
        folder, config = self.planned.folder, self._config

        def write() -> None:
            jsonl.sync()
            transcoder = self._transcoder()
            transcoder.set_weights(self._conditioning.fold(weights, threshold))
            save_checkpoint(folder, step, tensors, transcoder, finished=finished)
            prune_checkpoints(folder, config.keep_checkpoints, config.keep_every)
            release_memory()

        self._writer.submit(write)

    def _copy(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor of the state as it is now, in the memory of the CPU, with the latents of all ranks."""
        if self._held is None or not is_by_latent(name):
            return tensor.detach().to("cpu", copy=True)
        whole = self._held.whole(tensor.cpu())
        return whole if self._writes else torch.empty(0)

    def _fresh(self, first_rows: FirstRows) -> StepState:
        config, plan = self._config, self._plan
        source, target = first_rows(config.seed, plan.d_sae)
        return initial_state(
            d_sae=plan.d_sae,
            source=source,
            target=target,
            conditioning=self._conditioning,
            init=config.init,
            skip=config.skip,
            generator=torch.Generator().manual_seed(config.seed),
            latents=None if self._held is None else self._held.latents,
        )

    def _step_settings(self) -> StepSettings:
        config, plan = self._config, self._plan
        return StepSettings(
            group_sizes=plan.group_sizes,
            k=config.k,
            group_weights=config.group_weights,
            auxk_coef=config.auxk_coef,
            k_aux=plan.k_aux,
            dead_after_tokens=plan.dead_after_tokens,
            target_variance=self._conditioning.target_variance,
            clip_norm=config.clip_norm,
            threshold_decay=config.threshold_decay,
            precision=config.precision,
            backend=config.backend,
        )

    def _transcoder(self) -> Transcoder:
        shards = self._aside.shards
        manifest = shards.manifest
        return Transcoder(
            TranscoderConfig(
                d_in=shards.d_in,
                d_out=shards.d_out,
                group_sizes=self._plan.group_sizes,
                k=self._config.k,
                skip=self._config.skip,
                input=self._plan.input,
                source_site=manifest.source.site,
                source_hook=manifest.source.hook_point,
                target_hook=manifest.target.hook_point,
                model=str(manifest.model.get("model", "")),
                model_revision=manifest.model.get("revision"),
                model_digest=manifest.model.get("weights_digest"),
            )
        )

    def _wandb(self, group: str | None) -> WandbSink:
        return WandbSink(
            self.planned.folder,
            mode=self._config.wandb,
            project=self._config.wandb_project,
            group=group,
            config=self.planned.record["config"],
        )


def _named(device: torch.device) -> str:
    """cpu, or cuda:0 (NVIDIA H100 80GB HBM3)."""
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def _restored(tensors: Mapping[str, Tensor]) -> StepState:
    state = StepState.create(
        W_enc=tensors["W_enc"],
        b_enc=tensors["b_enc"],
        W_dec=tensors["W_dec"],
        b_dec=tensors["b_dec"],
        W_skip=tensors.get("W_skip"),
    )
    state.load_tensors(tensors)
    return state
