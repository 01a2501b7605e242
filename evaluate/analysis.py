"""The frame of every analysis of a run: what is asked, whether it is answered already, and how an answer is published.

An analysis says what it is called, what its result looks like, which settings decide it, and how it is made and shown.
All else is the same for each of them and is done here: runs and fleets are found, a shard set is opened and checked
against the weights, an answer that is there is only read, a pass that was killed goes on, and a result appears whole or
not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, TypeVar

import torch

from matryoshka.checkpoints import Checkpoint, expand_fleets, find_checkpoint
from matryoshka.devices import resolve_device
from matryoshka.errors import UserError
from matryoshka.runs import changed_fields
from matryoshka.shards import ShardSet
from matryoshka.tables import ResultTable
from matryoshka.transcoder import Transcoder

from .config import EvaluateConfig
from .result import Result, ShardSetFacts, TranscoderFacts, identity_of, result_folder
from .resume import ResumablePass, resumable_pass
from .subject.compatible import check_compatible
from .subject.shard_set import open_shards


class Progress(Protocol):
    """What an evaluation tells of itself while it works."""

    def started(self, name: str, n_rows: int) -> None:
        """A pass over `n_rows` rows begins."""
        ...

    def advanced(self, n_rows: int) -> None:
        """`n_rows` more are measured."""
        ...

    def noted(self, text: str) -> None:
        """Something to know, such as which shard set was taken."""
        ...


class Silent:
    """Progress that shows nothing."""

    def started(self, name: str, n_rows: int) -> None:
        """Say nothing."""

    def advanced(self, n_rows: int) -> None:
        """Say nothing."""

    def noted(self, text: str) -> None:
        """Say nothing."""


@dataclass(frozen=True, slots=True)
class Job:
    """What an analysis is given: all of it opened and checked."""

    checkpoint: Checkpoint
    transcoder: Transcoder
    """On the CPU; the first `config.prefix` groups alone where that is set."""
    shards: ShardSet
    config: EvaluateConfig
    facts: Mapping[str, Any]
    """The fields of `Result`: what the result is of."""
    saved: ResumablePass
    """Where a pass saves its sums; tables are written to its folder."""
    progress: Progress

    @property
    def name(self) -> str:
        """Of the run, for the progress."""
        return self.checkpoint.name

    def transcoder_on_device(self) -> Transcoder:
        """The transcoder where `config.device` says."""
        return self.transcoder.to(resolve_device(self.config.device))


ResultT = TypeVar("ResultT", bound=Result)


@dataclass(frozen=True, slots=True)
class Answer(Generic[ResultT]):
    """A published result and how it came about."""

    checkpoint: Checkpoint
    path: Path
    """Its JSON file."""
    result: ResultT
    is_new: bool
    """False when it was there already."""
    replaced: tuple[str, ...] = ()
    """How an older one in the same place differed."""
    n_resumed: int = 0
    """Rows (or parts) that an earlier command, which was stopped, had done already."""


class Analysis(Generic[ResultT]):
    """One thing to measure of a run. Its arguments are what is asked beyond the settings."""

    name: str
    """Its command, the section of its settings, and its key on the pages."""
    result: type[ResultT]
    shared: tuple[str, ...] = ()
    """Settings outside of its section that decide the result."""
    apart: tuple[Literal["split", "prefix"], ...] = ("split", "prefix")
    """Those of these two that it heeds; what is not as by default then has a folder of its own."""
    unit: str = "rows"
    """What `Answer.n_resumed` counts."""

    @property
    def file(self) -> str:
        """Name of the JSON file."""
        return self.result.FILE

    def parts(self) -> Sequence[Analysis[ResultT]]:
        """What is published in files of their own."""
        return (self,)

    def split(self, config: EvaluateConfig) -> Literal["val", "train"]:
        """The split whose rows are measured."""
        return config.split

    def settings(self, shards: ShardSet, config: EvaluateConfig) -> dict[str, Any]:
        """All that decides the result, as JSON: its own section, the shared settings it names, and `asked`."""
        section = getattr(config, self.name).model_dump(mode="json")
        return section | config.model_dump(mode="json", include=set(self.shared)) | self.asked(shards, config)

    def asked(self, shards: ShardSet, config: EvaluateConfig) -> dict[str, Any]:  # noqa: ARG002
        """What decides the result and is no setting, or not as it was set."""
        return {}

    def check(self, transcoder: Transcoder, shards: ShardSet, config: EvaluateConfig) -> None:
        """Raise UserError for what can be checked before anything is measured."""

    def make(self, job: Job) -> ResultT:
        """Measure."""
        raise NotImplementedError

    def tables(self, results: Sequence[ResultT]) -> list[ResultTable]:
        """What is printed of the results of one command."""
        raise NotImplementedError

    def notes(self, result: ResultT) -> list[str]:  # noqa: ARG002
        """Notes to print after the table of a result."""
        return []


def answer(
    analysis: Analysis[ResultT], runs: Sequence[Path], config: EvaluateConfig, progress: Progress | None = None
) -> list[Answer[ResultT]]:
    """The results of `runs` and of the members of fleets among them, each on `config.shards` or the set it was trained
    on, in their order.

    A result that is there already is only read; a pass that was stopped continues from its last saved state. Raises
    UserError for invalid input, before the first pass where it can be checked.
    """
    progress = progress or Silent()
    if not runs:
        raise UserError("no run was named; give one or more, for example data/runs/l17-k96")
    default = EvaluateConfig()
    config = config.model_copy(
        update={name: getattr(default, name) for name in ("split", "prefix") if name not in analysis.apart}
    )
    checkpoints = [find_checkpoint(run) for run in expand_fleets(list(runs))]
    sets = _shard_sets(checkpoints, config, progress.noted)
    folders = result_folders(checkpoints, sets, config)
    return [
        one
        for checkpoint, shards, folder in zip(checkpoints, sets, folders, strict=True)
        for one in _answers(analysis, checkpoint, shards, folder, config, progress)
    ]


def load_transcoder(checkpoint: Checkpoint, shards: ShardSet, config: EvaluateConfig) -> Transcoder:
    """The weights, cut to `config.prefix` groups. Raises UserError when they do not belong to the shard set."""
    transcoder = Transcoder.load(checkpoint.folder)
    check_compatible(transcoder, shards, checkpoint.name)
    return transcoder if config.prefix is None else transcoder.prefix(config.prefix)


def result_folders(checkpoints: Sequence[Checkpoint], sets: Sequence[ShardSet], config: EvaluateConfig) -> list[Path]:
    """Where the results of each run go: `config.out` (with several runs a folder of each in it), else a folder of the
    run. Raises UserError when two of them would share one."""
    if config.out is not None and len(checkpoints) > 1:
        folders = [config.out / checkpoint.name for checkpoint in checkpoints]
    else:
        folders = [result_folder(one, shards, config) for one, shards in zip(checkpoints, sets, strict=True)]
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError(
            "two of the runs have the same name, so that their results would overwrite each other in "
            f"{config.out or 'one folder'}; name each run once, and evaluate runs of equal names one at a time"
        )
    return folders


def _shard_sets(
    checkpoints: Sequence[Checkpoint], config: EvaluateConfig, note: Callable[[str], None]
) -> list[ShardSet]:
    if config.shards is not None:
        return [ShardSet.open(config.shards)] * len(checkpoints)
    # Opened once: runs of one set share what is prepared of it.
    opened: dict[str, ShardSet] = {}
    found = [open_shards(checkpoint, None, note) for checkpoint in checkpoints]
    return [opened.setdefault(shards.digest, shards) for shards in found]


def _answers(
    analysis: Analysis[ResultT],
    checkpoint: Checkpoint,
    shards: ShardSet,
    folder: Path,
    config: EvaluateConfig,
    progress: Progress,
) -> list[Answer[ResultT]]:
    transcoder = load_transcoder(checkpoint, shards, config)
    analysis.check(transcoder, shards, config)
    answers: list[Answer[ResultT]] = []
    for part in analysis.parts():
        facts = {
            "transcoder": TranscoderFacts.of(checkpoint, transcoder),
            "shard_set": ShardSetFacts.of(shards, part.split(config)),
            "settings": part.settings(shards, config),
        }
        path, existing = folder / part.file, part.result.read(folder, part.file)
        identity = identity_of(**facts)
        changes = () if existing is None else tuple(changed_fields(existing.identity(), identity))
        if existing is not None and not changes:
            answers.append(Answer(checkpoint, path, existing, is_new=False))
            continue
        if existing is not None and config.out is not None:
            _refuse_other_run(existing, checkpoint, path)
        with resumable_pass(path, identity, config.save_minutes) as saved:
            try:
                result = part.make(Job(checkpoint, transcoder, shards, config, facts, saved, progress))
            except torch.OutOfMemoryError as error:
                reason = str(error).partition("\n")[0]
                raise UserError(
                    f"the memory of the device is not enough for `evaluate {analysis.name}` of {checkpoint.name} "
                    f"({reason}). With --device cpu the same command continues after what was saved"
                ) from error
            result.publish(path, saved.folder)
        answers.append(Answer(checkpoint, path, result, is_new=True, replaced=changes, n_resumed=saved.n_resumed))
    return answers


def _refuse_other_run(existing: Result, checkpoint: Checkpoint, path: Path) -> None:
    """The folder of a run moves on with it; one that was named must not pass from run to run."""
    if existing.transcoder.run != checkpoint.name:
        raise UserError(
            f"{path} is of the run {existing.transcoder.run}, and {checkpoint.name} would overwrite it; choose another "
            "folder with --out (or --set evaluate.out=DIR)"
        )
