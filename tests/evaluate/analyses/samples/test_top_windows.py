"""Keeping the best windows of each latent, against sorted lists."""

from __future__ import annotations

import torch

from evaluate.analyses.samples.histogram import N_BINS, ActivationHistogram
from evaluate.analyses.samples.selection import deciles_of
from evaluate.analyses.samples.top_windows import EMPTY, TopWindows
from evaluate.rows.windows import WindowShape, mixed, windows_of

CPU = torch.device("cpu")


def test_best_distinct_of_each_latent_over_many_pushes() -> None:
    generator = torch.Generator().manual_seed(0)
    windows = TopWindows(7, 3, 2, CPU)
    everything: list[tuple[int, int, int, int]] = []
    for part in range(12):
        n = int(torch.randint(0, 40, (1,), generator=generator))
        latent = torch.randint(0, 6, (n,), generator=generator).sort().values
        score, key = (torch.randint(0, high, (n,), generator=generator) for high in (15, 8))
        place = torch.arange(n) + 1000 * part
        everything += list(zip(latent.tolist(), score.tolist(), key.tolist(), place.tolist(), strict=True))
        windows.push(
            latent,
            score,
            key,
            place,
            place.float(),
            lambda which, place=place: torch.stack([place[which]] * 2, 1).float(),
        )
    for latent in range(7):
        wanted: list[tuple[int, int, int]] = []
        own = sorted(((s, k, p) for owner, s, k, p in everything if owner == latent), key=lambda e: (-e[0], e[2]))
        for score, key, place in own:
            if key not in {seen for _, seen, _ in wanted}:
                wanted.append((score, key, place))
        n = min(3, len(wanted))
        assert windows.score[latent].tolist() == [s for s, _, _ in wanted[:3]] + [EMPTY] * (3 - n)
        assert windows.place[latent, :n].tolist() == [p for _, _, p in wanted[:3]]
        assert windows.value[latent, :n].tolist() == [p for _, _, p in wanted[:3]]
        acts = windows.acts(torch.full((n,), latent), torch.arange(n))
        assert acts.tolist() == [[p, p] for _, _, p in wanted[:3]]


def test_windows_end_at_documents_and_contexts() -> None:
    tokens = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])
    docs = torch.tensor([[1, 1, 1, 2, 2, 1, 1]])
    windows = windows_of(tokens, docs, WindowShape(2, 1))
    assert windows.first.tolist() == [[0, 0, 0, 3, 3, 5, 5]]
    assert windows.last.tolist() == [[1, 2, 2, 4, 4, 6, 6]]
    found = windows.tokens_around(torch.tensor([0, 0, 0]), torch.tensor([2, 3, 6]))
    assert found.tolist() == [[5, 6, 7, -1], [-1, -1, 8, 9], [-1, 10, 11, -1]]


def test_keys_are_equal_where_windows_are() -> None:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 2, (9, 12), generator=generator)
    docs = torch.randint(0, 2, (9, 12), generator=generator).cumsum(1)
    windows = windows_of(tokens, docs, WindowShape(2, 1))
    keys, texts = windows.keys(), {}
    for context in range(9):
        for position in range(12):
            text = tuple(windows.tokens_around(torch.tensor([context]), torch.tensor([position]))[0].tolist())
            texts.setdefault(text, set()).add(int(keys[context, position]))
    assert all(len(found) == 1 for found in texts.values())
    assert len(set().union(*texts.values())) == len(texts) > 10


def test_mixing_is_splitmix64() -> None:
    """First outputs of SplitMix64 from seed 0, from the published code: the state is advanced by the golden gamma."""
    gamma, mask = 0x9E3779B97F4A7C15, (1 << 64) - 1
    states = [(gamma * i) & mask for i in (1, 2, 3)]
    signed = torch.tensor([s - (1 << 64) if s >> 63 else s for s in states])
    assert [x & mask for x in mixed(signed).tolist()] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_histogram_bins_are_exact_whatever_the_order() -> None:
    generator = torch.Generator().manual_seed(2)
    value = torch.exp(torch.randn(3000, generator=generator) * 4)
    latent = torch.randint(0, 5, (3000,), generator=generator)
    order = torch.randperm(3000, generator=generator)
    together, apart = ActivationHistogram(6, CPU), ActivationHistogram(6, CPU)
    together.add(latent, value)
    for part in order.split(37):
        apart.add(latent[part], value[part])
    assert torch.equal(together.counts, apart.counts)
    assert torch.equal(together.widths(), apart.widths())
    for owner in range(5):
        own, width = value[latent == owner].double(), float(together.widths()[owner])
        assert torch.equal((own / width).long().bincount(minlength=N_BINS).int(), together.counts[owner])
        assert float(own.max()) / width >= N_BINS / 2
    assert int(together.counts[5].sum()) == 0


def test_widths_are_powers_of_two_exactly() -> None:
    histogram = ActivationHistogram(60, CPU)
    histogram.add(torch.arange(60), torch.tensor([2.0 ** (i - 20) for i in range(60)]))
    assert histogram.widths().tolist() == [2.0 ** (i - 20 - 5) for i in range(60)]
    assert (histogram.counts.nonzero()[:, 1] == 32).all()


def test_deciles_by_rank() -> None:
    value = torch.tensor([[5.0, 1.0, 4.0, 2.0, 9.0], [1.0, 2.0, 3.0, 4.0, 5.0]])
    there = torch.tensor([[True, True, True, True, False], [True] * 5])
    found = deciles_of(value, there)
    assert found[0, :4].tolist() == [8, 1, 6, 3]
    assert found[1].tolist() == [1, 3, 5, 7, 9]
