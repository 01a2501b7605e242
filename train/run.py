"""One training run: shuffled rows of a shard set -> nested steps -> checkpoints -> a calibrated transcoder.

The run directory holds run.json (settings, shard-set identity, provenance), metrics.jsonl and checkpoints/. Killed at
any moment and started again with the same settings, it goes on from the last checkpoint.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from matryoshka.devices import resolve_device
from matryoshka.errors import UserError
from matryoshka.runs import (
    FORMAT_VERSION,
    RUN_FILE,
    changed_fields,
    default_run_path,
    exclusive,
    make_directory,
    provenance,
    publish_json,
    read_json,
    refuse_changes,
)
from matryoshka.shards import ShardSet
from matryoshka.transcoder import Transcoder, TranscoderConfig

from .calibrate import calibrate_threshold
from .checkpoint import Checkpoint, list_checkpoints, prune_checkpoints, save_checkpoint
from .conditioning import Conditioning
from .config import TrainConfig
from .initial import initial_state
from .plan import Plan, make_plan
from .sinks import JsonlSink, MetricSink, WandbSink
from .step import NonFiniteLoss, StepReport, StepSettings, StepState, TrainStep
from .stream import Stream

_INIT_SEED = 0x1A17
"""Mixed into the seed of the rows that latents start from, so that they are not the rows of the first batches."""


class Progress(Protocol):
    """What a run tells of itself while it works."""

    def started(self, plan: Plan, first_step: int) -> None:
        """The first step is about to be taken."""
        ...

    def advanced(self, step: int, report: StepReport | None) -> None:
        """`step` steps are finished; a report comes with every logged one."""
        ...


class Silent:
    """Progress for nobody."""

    def started(self, plan: Plan, first_step: int) -> None:
        """Say nothing."""

    def advanced(self, step: int, report: StepReport | None) -> None:
        """Say nothing."""


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What a run leaves behind."""

    path: Path
    checkpoint: Path
    n_steps: int
    n_steps_taken: int
    """0 when an earlier command had finished the run."""


def train(config: TrainConfig, progress: Progress | None = None) -> TrainResult:
    """Train what `config` describes, or the rest of it.

    Raises UserError for anything that the user can mend, a loss that is not finite among it.
    """
    progress = progress or Silent()
    if config.shards is None:
        raise UserError("no shard set: pass --shards with the folder that harvest wrote, such as data/l17")
    shards = ShardSet.open(config.shards)
    device = resolve_device(config.device)
    stream = Stream(
        shards,
        batch_rows=config.batch_tokens,
        buffer_rows=config.buffer_tokens,
        seed=config.seed,
        max_norm=config.max_norm,
        pin_memory=device.type == "cuda",
    )
    plan = make_plan(config, shards, stream.n_rows)
    conditioning = Conditioning.from_shards(shards, plan.input, config.condition, device)
    folder = config.out if config.out is not None else default_run_path(config.shards, config.k)
    record = _run_record(config, plan, shards)
    _refuse_other_run(folder, record)
    make_directory(folder)
    with exclusive(folder):
        if not (folder / RUN_FILE).exists():
            publish_json(folder / RUN_FILE, record)
        return _Run(config, plan, shards, stream, conditioning, folder, device).go(progress, record)


class _Run:
    """The parts of one run, put together."""

    def __init__(
        self,
        config: TrainConfig,
        plan: Plan,
        shards: ShardSet,
        stream: Stream,
        conditioning: Conditioning,
        folder: Path,
        device: torch.device,
    ) -> None:
        self.config = config
        self.plan = plan
        self.shards = shards
        self.stream = stream
        self.conditioning = conditioning
        self.folder = folder
        self.device = device

    def go(self, progress: Progress, record: Mapping[str, Any]) -> TrainResult:
        """Take the steps that are left, calibrate, and save."""
        last = max(list_checkpoints(self.folder), key=lambda checkpoint: checkpoint.step, default=None)
        if last is not None and last.finished:
            return TrainResult(self.folder, last.folder, self.plan.n_steps, 0)
        state = self._state(last)
        step = TrainStep(self._step_settings(), state, self.device)
        first = int(state.step)
        jsonl = JsonlSink(self.folder, first)
        sinks: list[MetricSink] = [jsonl]
        try:
            if self.config.wandb != "off":
                sinks.append(
                    WandbSink(
                        self.folder, mode=self.config.wandb, project=self.config.wandb_project, config=record["config"]
                    )
                )
            progress.started(self.plan, first)
            self._steps(step, first, jsonl, sinks, progress)
        except NonFiniteLoss as error:
            raise UserError(
                f"training stopped before step {error.step + 1}: the loss is {error.loss}. The checkpoints in "
                f"{self.folder} are from before it. Try a smaller --lr or a longer train.warmup_steps, in a new --out"
            ) from error
        finally:
            for sink in sinks:
                sink.close()
        threshold = calibrate_threshold(
            state, self.conditioning, self.shards, k=self.config.k, max_rows=self.config.calibration_tokens
        )
        self._save(state, self.plan.n_steps, torch.tensor(threshold), finished=True)
        return TrainResult(
            self.folder, list_checkpoints(self.folder)[-1].folder, self.plan.n_steps, self.plan.n_steps - first
        )

    def _steps(
        self, take_step: TrainStep, first: int, jsonl: JsonlSink, sinks: list[MetricSink], progress: Progress
    ) -> None:
        schedule = self.plan.schedule(self.config)
        n_steps = self.plan.n_steps
        batches = self.stream.batches(first, n_steps)
        waited, logged_at, logged_step = 0.0, time.perf_counter(), first
        try:
            for done in range(first + 1, n_steps + 1):
                asked = time.perf_counter()
                batch = next(batches)
                waited += time.perf_counter() - asked
                x = self.conditioning.input(batch.source.to(self.device, non_blocking=True))
                y = self.conditioning.target(batch.target.to(self.device, non_blocking=True))
                log = done % self.config.log_every == 0 or done == n_steps
                report = take_step(x, y, lr=schedule.at(done - 1), log=log)
                if report is not None:
                    now = time.perf_counter()
                    seconds = now - logged_at
                    timing = {
                        "tokens_per_second": (done - logged_step) * self.config.batch_tokens / seconds,
                        "data_wait": waited / seconds,
                    }
                    for sink in sinks:
                        sink.log(done, self._metrics(report), timing)
                    waited, logged_at, logged_step = 0.0, now, done
                progress.advanced(done, report)
                if done % self.plan.checkpoint_every == 0 and done != n_steps:
                    jsonl.sync()
                    self._save(take_step.state, done, take_step.state.threshold, finished=False)
        finally:
            batches.close()  # pyright: ignore[reportAttributeAccessIssue] -- a generator
        jsonl.sync()

    def _metrics(self, report: StepReport) -> dict[str, float]:
        ends = accumulate(self.plan.group_sizes)
        return {
            "loss": report.loss,
            "aux_loss": report.aux_loss,
            "l2_loss": report.l2_loss,
            "fvu": report.fvu[-1],
            **{f"fvu/prefix_{end}": fvu for end, fvu in zip(ends, report.fvu, strict=True)},
            "l0": report.l0,
            "dead_share": report.dead_share,
            "threshold": report.threshold,
            "grad_norm": report.grad_norm,
            "lr": report.lr,
        }

    def _state(self, last: Checkpoint | None) -> StepState:
        """The state to go on from: the last checkpoint's, or a fresh one."""
        config, plan = self.config, self.plan
        rows = self._first_rows(plan.d_sae)
        state = initial_state(
            d_sae=plan.d_sae,
            source=rows[0],
            target=rows[1],
            conditioning=self.conditioning,
            init=config.init,
            init_scale=config.init_scale,
            skip=config.skip,
            generator=torch.Generator().manual_seed(config.seed),
        )
        if last is not None:
            state.load_tensors(last.tensors())
        return state

    def _first_rows(self, n_rows: int) -> tuple[Tensor, Tensor]:
        """Up to `n_rows` random train rows, on the device."""
        stream = Stream(
            self.shards,
            batch_rows=min(self.config.batch_tokens, self.stream.n_rows),
            buffer_rows=self.config.buffer_tokens,
            seed=self.config.seed ^ _INIT_SEED,
            max_norm=self.config.max_norm,
        )
        n_batches = max(1, min(-(-n_rows // stream.batch_rows), stream.n_rows // stream.batch_rows))
        batches = list(stream.batches(0, n_batches))
        source = torch.cat([batch.source for batch in batches])[:n_rows]
        target = torch.cat([batch.target for batch in batches])[:n_rows]
        return source.to(self.device), target.to(self.device)

    def _step_settings(self) -> StepSettings:
        config, plan = self.config, self.plan
        return StepSettings(
            group_sizes=plan.group_sizes,
            k=config.k,
            group_weights=config.group_weights,
            auxk_coef=config.auxk_coef,
            k_aux=plan.k_aux,
            dead_after_tokens=plan.dead_after_tokens,
            target_variance=self.conditioning.target_variance,
            clip_norm=config.clip_norm,
            threshold_decay=config.threshold_decay,
            precision=config.precision,
            backend=config.backend,
        )

    def _save(self, state: StepState, step: int, threshold: Tensor, *, finished: bool) -> None:
        manifest = self.shards.manifest
        transcoder = Transcoder(
            TranscoderConfig(
                d_in=self.shards.d_in,
                d_out=self.shards.d_out,
                group_sizes=self.plan.group_sizes,
                k=self.config.k,
                skip=self.config.skip,
                input=self.plan.input,
                source_site=manifest.source.site,
                source_hook=manifest.source.hook_point,
                target_hook=manifest.target.hook_point,
                model=str(manifest.model.get("model", "")),
                model_revision=manifest.model.get("revision"),
            )
        )
        transcoder.set_weights(self.conditioning.fold(state.weights(), threshold))
        save_checkpoint(self.folder, step, state.tensors(), transcoder, finished=finished)
        prune_checkpoints(self.folder, self.config.keep_checkpoints)


def _run_record(config: TrainConfig, plan: Plan, shards: ShardSet) -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION,
        "config": config.model_dump(mode="json"),
        "identity": {
            "config": config.content(),
            "plan": plan.content(),
            "shard_set": {"name": shards.name, "digest": shards.digest},
        },
        "provenance": provenance(),
    }


def _refuse_other_run(folder: Path, record: Mapping[str, Any]) -> None:
    """Raise UserError when `folder` holds another run, or something that is not a run."""
    if (folder / RUN_FILE).exists():
        saved = read_json(folder / RUN_FILE, what="run")
        refuse_changes(folder, "trained", changed_fields(saved.get("identity", {}), record["identity"]))
    elif folder.is_dir() and any(entry.name not in (".lock", RUN_FILE + ".partial") for entry in folder.iterdir()):
        raise UserError(f"{folder} is not empty and not a run; choose another --out")
