"""What other commands measured, on its way to the pages: tables against loops, and files that are not taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from evaluate.analyses.compare.compare import compare
from evaluate.analyses.logits.logits import LogitTokens
from evaluate.config import EvaluateConfig
from evaluate.report.ablation import ablation_facts
from evaluate.report.build import make_report
from evaluate.report.group_gains import group_gains
from evaluate.report.logit_tokens import logit_table
from evaluate.report.parts import COMMANDS, find_parts
from evaluate.report.relations import N_CHILDREN, Relations
from evaluate.report.scores import absorption_facts, probing_facts
from evaluate.result import Result
from matryoshka.errors import UserError
from matryoshka.runs import publish_json
from matryoshka.shards import ShardSet


def edge_rows(n: int = 60) -> list[dict[str, Any]]:
    """60 children of latent 0, and a few of latent 1, in no order."""
    rows = [{"parent": 0, "child": 2 + (7 * i) % n, "share": (7 * i % n) / 100, "inside": 0.5} for i in range(n)]
    rows += [{"parent": 1, "child": child, "share": 0.25, "inside": child / 100} for child in (50, 20, 40)]
    return rows


def save_edges(folder: Path, rows: list[dict[str, Any]]) -> None:
    columns = {
        "parent": pa.array([row["parent"] for row in rows], pa.int32()),
        "child": pa.array([row["child"] for row in rows], pa.int32()),
        "p_child_given_parent": [row["share"] for row in rows],
        "p_parent_given_child": [row["inside"] for row in rows],
        "lift": [2.0] * len(rows),
        "cosine": pa.array([0.123456] * len(rows), pa.float32()),
    }
    pq.write_table(pa.table(columns), folder / "hierarchy.parquet")


def test_parents_and_children_against_loops(tmp_path: Path) -> None:
    rows = edge_rows()
    save_edges(tmp_path, rows)
    relations = Relations(tmp_path, 62)
    for latent in range(62):
        found = relations.of(latent)
        children = sorted((r for r in rows if r["parent"] == latent), key=lambda r: (-r["share"], r["child"]))
        parents = sorted((r for r in rows if r["child"] == latent), key=lambda r: (-r["inside"], r["parent"]))
        assert found["n_children"] == len(children)
        wanted = [[r["child"], r["inside"], pytest.approx(r["share"], rel=1e-3), 2.0, 0.1235] for r in children]
        assert found["children"] == wanted[:N_CHILDREN]
        assert [row[0] for row in found["parents"]] == [r["parent"] for r in parents]
        assert "partners" not in found
    tree = relations.tree()
    assert tree is not None
    edges = list(zip(tree["parent"], tree["child"], tree["inside"], tree["share"], strict=True))
    assert sorted(edges) == sorted(
        (r["parent"], r["child"], round(r["inside"] * 1000), round(r["share"] * 1000)) for r in rows
    )
    assert [edge[0] for edge in edges] == sorted(edge[0] for edge in edges)
    assert relations.map() is None


def test_the_map_keeps_its_shape(tmp_path: Path) -> None:
    columns = {"latent": [3, 1, 2], "cluster": [0, -1, 0], "x": [-1.0, 3.0, 1.0], "y": [0.5, 0.5, 2.5]}
    pq.write_table(pa.table(columns), tmp_path / "clusters.parquet")
    assert Relations(tmp_path, 4).map() == {
        "latent": [3, 1, 2],
        "cluster": [0, -1, 0],
        "x": [0, 10_000, 5_000],
        "y": [5_000, 5_000, 0],
    }
    assert Relations(tmp_path, 4, with_clusters=False).map() is None
    pq.write_table(pa.table({**columns, "x": [0.0, float("nan"), 1.0]}), tmp_path / "clusters.parquet")
    with pytest.raises(UserError, match="coordinates that are not numbers"):
        Relations(tmp_path, 4).map()


def test_tables_that_are_broken_or_of_another_width(tmp_path: Path) -> None:
    save_edges(tmp_path, edge_rows())
    with pytest.raises(UserError, match="is not of 61 latents"):
        Relations(tmp_path, 61)
    (tmp_path / "hierarchy.parquet").write_bytes(b"PAR1 torn")
    with pytest.raises(UserError, match="cannot be read"):
        Relations(tmp_path, 62)
    (tmp_path / "logits.parquet").write_bytes(b"PAR1 torn")
    with pytest.raises(UserError, match="cannot be read"):
        LogitTokens(tmp_path / "logits.parquet", 62)


def test_logit_tokens_in_any_order_of_rows(tmp_path: Path) -> None:
    rows = [(1, -1, 1, 8, -1.0), (1, 1, 0, 5, 3.0), (0, 1, 0, 7, 2.0), (1, -1, 0, 9, -2.0), (1, 1, 1, 7, 1.0)]
    names = ("latent", "side", "rank", "token", "effect")
    pq.write_table(pa.table(dict(zip(names, zip(*rows, strict=True), strict=True))), tmp_path / "logits.parquet")
    tokens = LogitTokens(tmp_path / "logits.parquet", 3)
    assert tokens.of(0) == ([(7, 2.0)], [])
    assert tokens.of(1) == ([(5, 3.0), (7, 1.0)], [(9, -2.0), (8, -1.0)])
    assert tokens.of(2) == ([], [])
    assert logit_table(tokens, str) == {
        "texts": ["7", "5", "9", "8"],
        "raised": [[0], [1, 0], []],
        "lowered": [[], [2, 3], []],
    }
    with pytest.raises(UserError, match="is not of 1 latents"):
        LogitTokens(tmp_path / "logits.parquet", 1)


def test_results_of_other_weights_are_left_out(made: Any, tmp_path: Path) -> None:
    transcoder = {"run": "r", "step": 1, "config": {}}
    names = ("name", "digest", "model", "source_hook", "target_hook")
    shards = {**dict.fromkeys(names, "s"), "model_revision": None}
    mine, other = (
        made.results({"transcoder": {**transcoder, "sha256": sha}, "shard_set": shards, "settings": {}})
        for sha in ("aa", "bb")
    )

    def publish(result: Result, file: str | None = None, **changes: Any) -> None:
        publish_json(tmp_path / (file or result.FILE), {**result.model_dump(mode="json"), **changes})

    assert find_parts(tmp_path, "aa").missing() == COMMANDS
    publish(mine["logits"])
    # A metadata without its table is no result.
    assert find_parts(tmp_path, "aa").records == {}
    for table in ("logits", "hierarchy", "cofiring"):
        (tmp_path / f"{table}.parquet").touch()
    publish(other["hierarchy"])
    publish(mine["faithfulness"], format_version=2)
    (tmp_path / "absorption.json").write_text('{"format_version": 1, "trans')
    (tmp_path / "ablations").mkdir()
    # Of 5 a part was made twice as strong: the pages show what is set to 0.
    publish(mine["ablate"], "ablations/3.json", latent=3)
    publish(other["ablate"], "ablations/4.json", latent=4)
    publish(mine["ablate"], "ablations/5.json", latent=5, scale=2.0)
    parts = find_parts(tmp_path, "aa")
    assert parts.records == {"logits": mine["logits"].model_dump(mode="json")}
    assert set(parts.ablations) == {3}
    assert parts.stale == ("hierarchy",)
    assert not parts.has_map()
    (tmp_path / "clusters.parquet").touch()
    assert not find_parts(tmp_path, "bb").has_map()
    clusters = {"n_clusters": 2, "n_directions": 9, "share_clustered": 0.5, "share_mixed": None}
    publish(other["hierarchy"], clusters=clusters)
    assert find_parts(tmp_path, "bb").has_map()
    assert set(parts.missing()) == {"hierarchy", "faithfulness", "absorption", "probing", "comparison"}


def test_a_comparison_is_taken_when_it_is_of_these_weights(
    val_set: ShardSet, made: Any, tmp_path: Path, browser: Any
) -> None:
    run, other = made.run(tmp_path / "run", made.transcoder()), made.run(tmp_path / "other", made.transcoder(seed=3))
    config = EvaluateConfig(shards=val_set.path, device="cpu", bootstrap=5)
    folder = make_report(run, config).index.parent
    into = config.model_copy(update={"out": folder.parent})
    compared = compare([f"{run}@2", str(other)], into)
    pages = make_report(run, config)
    assert pages.notes[1:] == ()
    assert '"comparison":{"entries":' in (folder / "data" / "overview.js").read_text()
    page = browser.on(pages.index)
    page.go()
    rows = page.cells("#comparison")
    assert [row[0] for row in rows] == ["run@2", "other"]
    assert [row[3] for row in rows] == [f"{entry.fvu:.4f}" for entry in compared.entries]
    compare([f"{other}@2", str(other)], into)
    pages = make_report(run, config)
    assert "comparison is of other weights and was left out" in pages.notes[1]
    assert '"comparison":null' in (folder / "data" / "overview.js").read_text()


def test_texts_take_the_place_of_token_ids() -> None:
    record = {
        "groups": [{"group": 1, "l0": 2.5, "top_tokens": [{"token": 4}], "top_tokens_per_row": [{"token": 5}]}],
        "pairs": [{"parent_group": 1}],
    }
    found = group_gains(record, lambda token: f"<{token}>")
    assert found["pairs"] == record["pairs"]
    assert (found["groups"][0]["tokens"], found["groups"][0]["tokens_per_row"]) == (["<4>"], ["<5>"])
    assert found["groups"][0]["l0"] == 2.5
    ablation = {"format_version": 1, "latent": 3, "kl": 0.123456, "n": 7, "raised": [{"token": 4, "effect": 1.23456}]}
    assert ablation_facts({**ablation, "interval": [1, 2], "lowered": None}, str) == {
        "numbers": {"kl": 0.1235, "n": 7},
        "raised": [["4", 1.235]],
        "lowered": [],
    }


def test_only_what_the_first_page_shows_of_the_scores() -> None:
    assert absorption_facts(None) is None
    assert probing_facts(None) is None
    record = {"format_version": 1, "settings": {"a": 1}, "tokenizer": "t"}
    letters = [{"letter": "a"}]
    prefixes = [{"prefix_end": 6, "letters": letters}, {"prefix_end": 17, "letters": letters}]
    found = absorption_facts({**record, "prefixes": prefixes})
    assert found == {"tokenizer": "t", "prefixes": [{"prefix_end": 6, "letters": []}, prefixes[1]]}
    scores = [{"k": k, "accuracy": 0.5, "classes": [{"label": "x"}]} for k in (1, 20, None)]
    sets = [{"name": "s", "prefixes": [{"prefix_end": 6, "scores": scores}, {"prefix_end": 17, "scores": scores}]}]
    found = probing_facts({**record, "sets": sets})
    assert found is not None
    kept = [[len(score["classes"]) for score in prefix["scores"]] for prefix in found["sets"][0]["prefixes"]]
    assert kept == [[0, 0, 0], [1, 0, 0]]
