"""The samples pass against per-latent loops that anyone can check, and the files it leaves."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch

from evaluate.analyses.samples import sampling as sampling_module
from evaluate.analyses.samples.files import METADATA_FILE, SamplesMetadata, Window, read_histograms, read_windows
from evaluate.analyses.samples.samples import SamplesAnalysis, find_samples
from evaluate.analysis import Answer, answer
from evaluate.config import EvaluateConfig
from evaluate.rows import context_blocks as blocks_module
from evaluate.rows.windows import WindowShape
from matryoshka.errors import UserError
from matryoshka.norms import apply_convention
from matryoshka.shards import ShardSet
from matryoshka.transcoder import Transcoder

BEFORE, AFTER = 3, 2


def config(shards: ShardSet, **samples: Any) -> EvaluateConfig:
    settings = {"top": 4, "per_decile": 1, "random": 2, "before": BEFORE, "after": AFTER, **samples}
    return EvaluateConfig.model_validate({"shards": shards.path, "device": "cpu", "samples": settings})


def make_samples(run: Path, config: EvaluateConfig) -> Answer[SamplesMetadata]:
    (found,) = answer(SamplesAnalysis(), [run], config)
    return found


class Twin:
    """Everything by loops: dense activations of every context, windows by walking, choices by sorting lists."""

    def __init__(self, shards: ShardSet, transcoder: Transcoder) -> None:
        self.tokens: list[list[int]] = []
        self.docs: list[list[int]] = []
        self.acts: list[torch.Tensor] = []
        for shard in range(shards.val.n_shards):
            source = shards.val.activations("source", shard)
            for c, (tokens, docs) in enumerate(
                zip(shards.val.tokens(shard).tolist(), shards.val.doc_ids(shard).tolist(), strict=True)
            ):
                x = apply_convention(source[:, c], transcoder.config.input, source_site="resid_mid", norm=shards.norm)
                acts = transcoder.encode(x)
                special = torch.tensor([token in shards.manifest.special_ids for token in tokens])
                self.tokens.append(tokens)
                self.docs.append(docs)
                self.acts.append(torch.where(special[:, None], 0.0, acts))

    def window(self, context: int, position: int) -> range:
        first = last = position
        while first > max(0, position - BEFORE) and self.docs[context][first - 1] == self.docs[context][position]:
            first -= 1
        end = min(len(self.tokens[context]) - 1, position + AFTER)
        while last < end and self.docs[context][last + 1] == self.docs[context][position]:
            last += 1
        return range(first, last + 1)

    def text(self, context: int, position: int) -> tuple[Any, ...]:
        window = self.window(context, position)
        return (window.start - position, *(self.tokens[context][p] for p in window))

    def top(self, latent: int, n: int) -> list[tuple[int, int]]:
        peaks = []
        for context, acts in enumerate(self.acts):
            column = acts[:, latent]
            if float(column.max()) > 0:
                peaks.append((float(column.max()), context, int(column.argmax())))
        chosen: list[tuple[int, int]] = []
        seen = set()
        for _, context, position in sorted(peaks, key=lambda peak: (-peak[0], peak[1])):
            if self.text(context, position) not in seen:
                seen.add(self.text(context, position))
                chosen.append((context, position))
        return chosen[:n]

    def rows(self, latent: int) -> list[tuple[int, int, float]]:
        return [
            (context, position, float(acts[position, latent]))
            for context, acts in enumerate(self.acts)
            for position in range(len(acts))
            if acts[position, latent] > 0
        ]


def check_window(window: Window, twin: Twin) -> None:
    """Tokens, document and exact activations of one window."""
    places = twin.window(window.context, window.position)
    assert window.tokens == [twin.tokens[window.context][p] for p in places]
    assert window.peak == window.position - places.start
    assert window.doc_id == twin.docs[window.context][window.position]
    acts = twin.acts[window.context][places.start : places.stop, window.latent]
    assert window.acts == pytest.approx(acts.tolist(), rel=1e-5, abs=1e-7)
    assert [act > 0 for act in window.acts] == (acts > 0).tolist()


@pytest.fixture(params=[7, 16, 1_000])
def block_rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Contexts of 8: one at a time, two at a time, and each shard whole."""
    monkeypatch.setattr(blocks_module, "BLOCK_ROWS", request.param)
    monkeypatch.setattr(sampling_module, "TILE_BYTES", 16 * request.param)
    return request.param


@pytest.mark.usefixtures("block_rows")
def test_windows_against_loops_over_latents(val_set: ShardSet, made: Any, tmp_path: Path) -> None:
    transcoder = made.transcoder(input="normalized")
    transcoder.threshold[9] = 1e9
    sampled = make_samples(made.run(tmp_path / "run", transcoder), config(val_set))
    twin = Twin(val_set, transcoder)
    histograms = read_histograms(sampled.path.parent)
    n_deciles = n_random = 0
    for latent in range(48):
        windows = read_windows(sampled.path.parent, latent)
        for window in windows:
            check_window(window, twin)
        rows = twin.rows(latent)
        top = [window for window in windows if window.kind == "top"]
        assert [(window.context, window.position) for window in top] == twin.top(latent, 4)
        assert [window.rank for window in top] == list(range(1, len(top) + 1))
        deciles = [window for window in windows if window.kind == "decile"]
        n_deciles += len(deciles)
        ranked = {(c, p): i for i, (c, p, _) in enumerate(sorted(rows, key=lambda row: row[2]))}
        texts = [twin.text(window.context, window.position) for window in [*top, *deciles]]
        assert len(set(texts)) == len(texts)
        for window in deciles:
            # Of at most 20 sampled rows; with no more than that in all, the tenths are those of all rows.
            if len(rows) <= 20:
                assert window.decile == ranked[window.context, window.position] * 10 // len(rows) + 1
            assert window.act == pytest.approx(window.acts[window.peak])
        n_random += (found := sum(window.kind == "random" for window in windows))
        silent = [window for window in windows if window.kind == "random"]
        assert all(act == 0 for window in silent for act in window.acts)
        assert len({window.context for window in silent}) == found <= 2
        assert histograms[latent].n_rows == len(rows) == sum(histograms[latent].counts)
        counts = [0] * 64
        for _, _, value in rows:
            counts[int(value / histograms[latent].width)] += 1
        assert histograms[latent].counts == counts
        assert not rows or max(i for i, count in enumerate(counts) if count) >= 32
    assert [window.kind for window in read_windows(sampled.path.parent, 9)] == ["random", "random"]
    assert n_deciles > 100
    assert n_random > 60


def test_the_result_does_not_depend_on_the_blocks(
    val_set: ShardSet, made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for rows in (8, 24, 10_000):
        monkeypatch.setattr(blocks_module, "BLOCK_ROWS", rows)
        run = made.run(tmp_path / str(rows) / "run", made.transcoder())
        folder = make_samples(run, config(val_set)).path.parent
        windows = [window for latent in range(48) for window in read_windows(folder, latent)]
        found.append([(w.latent, w.kind, w.decile, w.rank, w.context, w.position) for w in windows])
    assert found[0] == found[1] == found[2]


def test_same_bytes_and_then_nothing_to_do(val_set: ShardSet, made: Any, tmp_path: Path) -> None:
    run = made.run(tmp_path / "run", made.transcoder())
    first = make_samples(run, config(val_set))
    digests = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in first.path.parent.iterdir()}
    assert not make_samples(run, config(val_set)).is_new
    (first.path.parent / METADATA_FILE).unlink()
    assert make_samples(run, config(val_set)).is_new
    assert digests == {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in first.path.parent.iterdir()}
    other = make_samples(run, config(val_set, top=3))
    assert other.replaced == ("settings.top: 4 -> 3",)
    assert find_samples(run) == other.path.parent


def test_equal_windows_are_shown_once(made: Any, tmp_path: Path) -> None:
    """Every context says the same in the same place: each text once, of the largest activation."""
    shards = made.shards(tmp_path / "set")
    transcoder = made.transcoder()
    tokens = shards.val.tokens
    same = [torch.full_like(tokens(shard), 7) for shard in range(3)]
    documents = [torch.zeros_like(part) for part in same]
    shards.val.tokens = lambda shard: same[shard]  # type: ignore[method-assign]
    shards.val.doc_ids = lambda shard: documents[shard]  # type: ignore[method-assign]
    choice = sampling_module.Choice(4, 20, WindowShape(BEFORE, AFTER), 0)
    sampling = sampling_module.Sampling(transcoder, shards, shards.val, choice)
    for block in blocks_module.context_blocks(shards, shards.val, choice.shape):
        sampling.add(block)
    # All windows inside a context of one repeated token are equal; those at the edges are shorter: 3 before, 2 after.
    for kept in (sampling.top, sampling.sample):
        assert int((kept.score >= 0).sum(1).max()) <= 1 + BEFORE + AFTER
    x = torch.cat([shards.val.activations("source", shard).transpose(0, 1).flatten(0, 1) for shard in range(3)])
    assert torch.allclose(sampling.top.value[:, 0], transcoder.encode(x.float()).amax(0), rtol=1e-5)


def test_few_tokens_are_whole_contexts(val_set: ShardSet, made: Any, tmp_path: Path) -> None:
    settings = config(val_set).model_copy(update={"tokens": 20})
    sampled = make_samples(made.run(tmp_path / "run", made.transcoder()), settings)
    # 6 rows in the first context (two specials), 7 in each other: the third one reaches 20.
    assert sampled.result.n_rows == 20
    contexts = {w.context for latent in range(48) for w in read_windows(sampled.path.parent, latent)}
    assert contexts == {0, 1, 2}


def test_train_rows_only_when_asked_for(val_set: ShardSet, made: Any, tmp_path: Path) -> None:
    sampled = make_samples(made.run(tmp_path / "run", made.transcoder()), config(val_set, split="train"))
    rows = sum(int(val_set.train.keep(shard).sum()) for shard in range(2))
    assert (sampled.result.split, sampled.result.n_rows) == ("train", rows)


def test_no_samples_and_stale_samples_are_said(val_set: ShardSet, made: Any, tmp_path: Path) -> None:
    run = made.run(tmp_path / "run", made.transcoder())
    with pytest.raises(UserError, match="no samples yet"):
        find_samples(run)
    make_samples(run, config(val_set))
    assert find_samples(run, "data/l1").name == "samples"
    with pytest.raises(UserError, match="no samples yet"):
        find_samples(run, "data/l2")
    made.run(run, made.transcoder(seed=5), steps=(500,))
    with pytest.raises(UserError, match="step 400, and the newest checkpoint"):
        find_samples(run)


def test_a_prefix_has_samples_of_its_own(val_set: ShardSet, made: Any, tmp_path: Path) -> None:
    run = made.run(tmp_path / "run", made.transcoder())
    whole = make_samples(run, config(val_set))
    prefix = make_samples(run, config(val_set).model_copy(update={"prefix": 2}))
    assert prefix.path.parent == whole.path.parent.parent / "prefix-2" / "samples"
    assert len(read_histograms(prefix.path.parent)) == 17
    assert [read_windows(prefix.path.parent, latent) for latent in range(17)] == [
        read_windows(whole.path.parent, latent) for latent in range(17)
    ]
    assert find_samples(run) == whole.path.parent
