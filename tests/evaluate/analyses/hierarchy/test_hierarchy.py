"""Co-firing, parent/child edges and what groups add, against loops over rows and pairs and a case made by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from evaluate.analyses.hierarchy.cofiring import cofiring
from evaluate.analyses.hierarchy.directions import mean_abs_cosines
from evaluate.analyses.hierarchy.hierarchy import HierarchyAnalysis
from evaluate.analyses.hierarchy.result import CLUSTERS_FILE, COFIRING_FILE, EDGES_FILE, Hierarchy
from evaluate.analysis import Answer, answer
from evaluate.config import EvaluateConfig, HierarchyConfig
from evaluate.measures import pair_sums
from evaluate.measures.pair_sums import PairBlock
from matryoshka.errors import UserError
from matryoshka.norms import apply_convention
from matryoshka.shards import ShardSet


def make_hierarchy(run: Path, config: EvaluateConfig) -> Answer[Hierarchy]:
    (found,) = answer(HierarchyAnalysis(), [run], config)
    return found


def settings(shards: ShardSet, hierarchy: dict[str, Any] | None = None, **changes: Any) -> EvaluateConfig:
    content = HierarchyConfig.model_validate({"clusters": False, "min_rows": 2, **(hierarchy or {})})
    return EvaluateConfig(shards=shards.path, device="cpu", **{"batch_rows": 17, "hierarchy": content, **changes})


def rows_of(folder: Path, name: str) -> list[dict[str, Any]]:
    return pq.read_table(folder / name).to_pylist()


@pytest.fixture(params=[(1 << 29, 1 << 22), (8 * 48 * 5, 7)], ids=["one block", "blocks of 5 latents"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair_sums, "BLOCK_BYTES", request.param[0])
    monkeypatch.setattr(pair_sums, "PAIRS_AT_ONCE", request.param[1])


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("tokens", [None, 40])
def test_tables_against_loops_over_pairs(val_set: ShardSet, made: Any, tmp_path: Path, tokens: int | None) -> None:
    transcoder = made.transcoder(input="normalized")
    transcoder.threshold[7] = 1e9
    config = settings(val_set, {"parents": 3, "partners": 4, "min_lift": 1.02}, tokens=tokens)
    done = make_hierarchy(made.run(tmp_path / "run", transcoder), config)
    folder, found = done.path.parent, done.result
    x = apply_convention(
        made.kept_rows(val_set, tokens)["source"], "normalized", source_site="resid_mid", norm=made.norm()
    )
    fires = (transcoder.encode(x) > 0).numpy()
    n_rows, group = len(fires), np.repeat([1, 2, 3], made.group_sizes)
    assert found.n_rows == n_rows
    edges, partners = rows_of(folder, EDGES_FILE), rows_of(folder, COFIRING_FILE)
    n_edges = 0
    for child in range(48):
        one = fires[:, child]
        parents, others = [], []
        for other in range(48):
            two = fires[:, other]
            both = int((one & two).sum())
            if both < 2 or other == child:
                continue
            lift = both * n_rows / (one.sum() * two.sum())
            if group[other] < group[child] and lift > 1.02:
                parents.append((-both, -lift, other))
            if 0 < one.sum() < n_rows and 0 < two.sum() < n_rows:
                others.append((-float(np.corrcoef(one, two)[0, 1]), other, both))
        got = [edge for edge in edges if edge["child"] == child]
        n_edges += len(got)
        assert [edge["parent"] for edge in got] == [parent for _, _, parent in sorted(parents)[:3]]
        for edge in got:
            two = fires[:, edge["parent"]]
            assert edge["n_both"] == (one & two).sum()
            assert edge["p_child_given_parent"] == pytest.approx(one[two].mean())
            assert edge["p_parent_given_child"] == pytest.approx(two[one].mean())
            assert edge["lift"] == pytest.approx(one[two].mean() / one.mean())
            assert (edge["parent_group"], edge["child_group"]) == (group[edge["parent"]], group[child])
            rows = transcoder.W_dec[[edge["parent"], child]]
            assert edge["cosine"] == pytest.approx(float(torch.cosine_similarity(rows[0], rows[1], dim=0)), abs=1e-6)
        listed = [partner for partner in partners if partner["latent"] == child]
        assert [partner["rank"] for partner in listed] == list(range(1, len(listed) + 1))
        twin = sorted(others)[:4]
        assert [partner["phi"] for partner in listed] == pytest.approx([-value for value, _, _ in twin])
        for partner in listed:
            two = fires[:, partner["other"]]
            assert partner["phi"] == pytest.approx(np.corrcoef(one, two)[0, 1])
            assert partner["jaccard"] == pytest.approx((one & two).sum() / (one | two).sum())
            assert partner["n_both"] == (one & two).sum()
    assert len(edges) == n_edges == found.n_edges > 30
    assert 7 not in {edge["child"] for edge in edges} | {partner["latent"] for partner in partners}
    check_pairs(found.pairs, fires, group, min_lift=1.02)


def check_pairs(pairs: Any, fires: np.ndarray, group: np.ndarray, min_lift: float) -> None:
    """The summary of each two groups, from all pairs, whether they are in the table or not."""
    alive = fires.any(0)
    assert [(p.parent_group, p.child_group) for p in pairs] == [(1, 1), (1, 2), (2, 2), (1, 3), (2, 3), (3, 3)]
    for pair in pairs:
        children = [c for c in range(48) if group[c] == pair.child_group and alive[c]]
        assert pair.n_children == len(children)
        if pair.parent_group == pair.child_group:
            assert pair.mean_best_parent is None
            continue
        best = []
        for child in children:
            shares = [0.0]
            for parent in np.flatnonzero(group == pair.parent_group):
                both = (fires[:, child] & fires[:, parent]).sum()
                expected = fires[:, child].sum() * fires[:, parent].sum() / len(fires)
                if both >= 2 and both / expected > min_lift:
                    shares.append(both / fires[:, child].sum())
            best.append(max(shares))
        assert pair.n_with_parent == sum(share > 0 for share in best)
        assert pair.mean_best_parent == pytest.approx(np.mean(best))
        assert pair.share_implied == pytest.approx(np.mean([share >= 0.5 for share in best]))


def test_counts_by_hand() -> None:
    """Latents 0 | 1 2, eight rows: 0 fires on rows 0-3, 1 on rows 0-1, 2 on rows 3-6."""
    fires = torch.tensor([[1, 1, 1, 1, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1, 1, 0]]).T
    counts, both = fires.sum(0), fires.T @ fires
    config = HierarchyConfig(min_rows=1)
    found = cofiring([PairBlock(0, both)], counts, 8, (1, 2), config)
    # P(0 | 1) = 1, lift 2. P(0 | 2) = 1/4 and lift 1/2: no edge.
    assert (found.edges.parent.tolist(), found.edges.child.tolist(), found.edges.n_both.tolist()) == ([0], [1], [2])
    assert found.best.tolist() == [[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]
    # phi_01 = (8 * 2 - 4 * 2) / sqrt(4 * 4 * 2 * 6); phi_02 = (8 * 1 - 16) / 16
    phi = 8 / math.sqrt(16 * 12)
    assert found.partners.latent.tolist() == [0, 0, 1, 2]
    assert found.partners.other.tolist() == [1, 2, 0, 0]
    assert found.partners.phi.tolist() == pytest.approx([phi, -0.5, phi, -0.5])
    none = cofiring([PairBlock(0, both)], counts, 8, (1, 2), config.model_copy(update={"min_rows": 3}))
    assert (len(none.edges.parent), len(none.partners.latent)) == (0, 0)


def test_of_equal_parents_the_rarer_comes_first() -> None:
    """Latent 3 fires where 0, 1 and 2 do; 1 fires nowhere else."""
    fires = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0]]).T
    found = cofiring([PairBlock(0, fires.T @ fires)], fires.sum(0), 6, (3, 1), HierarchyConfig(min_rows=1, parents=2))
    assert found.edges.parent.tolist() == [1, 2]


def test_what_groups_add_against_a_dense_twin(val_set: ShardSet, made: Any, tmp_path: Path) -> None:
    transcoder = made.transcoder(skip=True)
    config = settings(val_set, {"top_tokens": 3, "min_rows": 4})
    found = make_hierarchy(made.run(tmp_path / "run", transcoder), config).result
    rows = made.kept_rows(val_set)
    x, y = rows["source"].float(), rows["target"].double().numpy()
    acts = transcoder.encode(x)
    nested = [transcoder.b_dec + x @ transcoder.W_skip, *transcoder.nested(acts, x=x)]
    sq_err = np.stack([((y - y_hat.double().numpy()) ** 2).sum(1) for y_hat in nested])
    total = ((y - y.mean(0)) ** 2).sum()
    assert found.fvu_without_latents == pytest.approx(sq_err[0].sum() / total, rel=1e-5)
    tokens, start = rows["token"].numpy(), 0
    for place, (group, size) in enumerate(zip(found.groups, made.group_sizes, strict=True)):
        own, start = (acts[:, start : start + size] > 0).numpy(), start + size
        gain = sq_err[place] - sq_err[place + 1]
        assert (group.group, group.n_latents, group.prefix_end) == (place + 1, size, start)
        assert group.share_of_variance == pytest.approx(gain.sum() / total, rel=1e-4)
        assert group.fvu_after == pytest.approx(sq_err[place + 1].sum() / total, rel=1e-5)
        assert group.share_of_rows == pytest.approx(own.any(1).mean())
        assert group.l0 == pytest.approx(own.sum(1).mean())
        assert sum(stratum.n_rows for stratum in group.by_token_frequency) == len(y)
        assert sum(stratum.share_of_gain or 0 for stratum in group.by_token_frequency) == pytest.approx(1)
        often = [token for token in np.unique(tokens) if (tokens == token).sum() >= 4]
        by_total = sorted(often, key=lambda token: -gain[tokens == token].sum())[:3]
        by_row = sorted(often, key=lambda token: -gain[tokens == token].mean())[:3]
        assert [found.token for found in group.top_tokens] == by_total
        assert [found.token for found in group.top_tokens_per_row] == by_row
        for found_token in group.top_tokens_per_row:
            here = tokens == found_token.token
            assert found_token.n_rows == here.sum()
            assert found_token.share_of_gain == pytest.approx(gain[here].sum() / gain.sum(), rel=1e-4)
            assert found_token.gain_per_row == pytest.approx(gain[here].mean() / (total / len(y)), rel=1e-4)


def test_mean_cosines_of_groups_by_hand() -> None:
    w_dec = torch.tensor([[1.0, 0.0], [0.0, 3.0], [-1.0, 1.0], [9.0, 9.0]])
    alive = torch.tensor([True, True, True, False])
    found = mean_abs_cosines(w_dec, (2, 2), alive)
    half = 0.5**0.5
    assert found[0].tolist() == pytest.approx([0.0, half], abs=1e-6)
    assert float(found[1, 0]) == pytest.approx(half)
    assert math.isnan(float(found[1, 1]))  # a single latent is left there


def test_same_bytes_then_nothing_to_do_then_replaced(val_set: ShardSet, made: Any, tmp_path: Path) -> None:
    run = made.run(tmp_path / "run", made.transcoder())
    first = make_hierarchy(run, settings(val_set))
    contents = {path.name: path.read_bytes() for path in first.path.parent.iterdir()}
    assert set(contents) == {"hierarchy.json", EDGES_FILE, COFIRING_FILE}
    again = make_hierarchy(run, settings(val_set))
    assert (again.is_new, again.result) == (False, first.result)
    (first.path.parent / COFIRING_FILE).unlink()
    assert make_hierarchy(run, settings(val_set)).is_new
    assert contents == {path.name: path.read_bytes() for path in first.path.parent.iterdir()}
    other = make_hierarchy(run, settings(val_set, {"parents": 1}))
    assert other.replaced == ("settings.parents: 5 -> 1",)
    assert json.loads(first.path.read_text())["format_version"] == 1
    assert str(tmp_path).encode() not in contents["hierarchy.json"]


def test_a_prefix_and_train_rows_lie_apart(val_set: ShardSet, made: Any, tmp_path: Path) -> None:
    transcoder = made.transcoder()
    run = made.run(tmp_path / "run", transcoder)
    whole = make_hierarchy(run, settings(val_set))
    prefix = make_hierarchy(run, settings(val_set, prefix=2))
    assert prefix.path.parent == whole.path.parent / "prefix-2"
    assert prefix.result.groups == whole.result.groups[:2]
    assert prefix.result.pairs == whole.result.pairs[:3]
    train = make_hierarchy(run, settings(val_set, split="train"))
    assert train.path.parent == whole.path.parent / "train"
    assert train.result.shard_set.split == "train"
    assert train.result.n_rows == sum(int(val_set.train.keep(shard).sum()) for shard in range(2))
    with pytest.raises(UserError, match="has 3 nested groups"):
        make_hierarchy(run, settings(val_set, prefix=4))


def test_clusters_of_planted_directions(val_set: ShardSet, made: Any, tmp_path: Path) -> None:
    """No cluster mixes three bundles of directions that are far apart; and the same bytes twice."""
    transcoder = made.transcoder(group_sizes=(12, 48))
    generator = torch.Generator().manual_seed(3)
    bundle = torch.arange(60) % 3
    directions = torch.eye(made.d_out)[bundle] + 0.05 * torch.randn(60, made.d_out, generator=generator)
    transcoder.W_dec.copy_(torch.nn.functional.normalize(directions, dim=1))
    transcoder.threshold[5] = 1e9
    run = made.run(tmp_path / "run", transcoder)
    config = settings(val_set, {"clusters": True, "neighbours": 8, "min_cluster_size": 8})
    n_threads = torch.get_num_threads()
    done = make_hierarchy(run, config)
    # numba would leave torch with another number, and later passes with other last bits.
    assert torch.get_num_threads() == n_threads
    table = pq.read_table(done.path.parent / CLUSTERS_FILE).to_pydict()
    alive = [latent for latent in range(60) if latent != 5]
    assert table["latent"] == alive
    kinds: dict[int, set[int]] = {}
    for latent, cluster in zip(alive, table["cluster"], strict=True):
        kinds.setdefault(cluster, set()).add(int(bundle[latent]))
    unclustered = kinds.pop(-1, set())
    assert unclustered <= {0, 1, 2}
    assert {len(kind) for kind in kinds.values()} == {1}
    assert set.union(*kinds.values()) == {0, 1, 2}
    # In the plane too, the nearest other point is of the same bundle.
    place = torch.tensor([table["x"], table["y"]]).T
    nearest = (torch.cdist(place, place) + torch.eye(59) * 1e9).argmin(1)
    assert torch.equal(bundle[alive], bundle[alive][nearest])
    assert done.result.clusters is not None
    assert (done.result.clusters.n_clusters, done.result.clusters.n_directions) == (len(kinds), 59)
    content = (done.path.parent / CLUSTERS_FILE).read_bytes()
    done.path.unlink()
    assert make_hierarchy(run, config).path.with_name(CLUSTERS_FILE).read_bytes() == content


def test_missing_libraries_are_said_before_the_pass(
    val_set: ShardSet, made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "evaluate.analyses.hierarchy.clusters.find_spec", lambda name: None if name == "umap" else object()
    )
    run = made.run(tmp_path / "run", made.transcoder())
    with pytest.raises(
        UserError, match=r"needs umap-learn, which is not installed; run `pip install -e .*\[structure\]"
    ):
        make_hierarchy(run, settings(val_set, {"clusters": True}))
    assert not (run / "eval").exists()
    assert make_hierarchy(run, settings(val_set)).result.clusters is None
