"""Several sets from one pass: each equals, file by file, the one that is harvested alone."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from harvest.config import HarvestConfig, recorded_settings
from matryoshka.config import load_config
from matryoshka.errors import UserError
from matryoshka.lm import LanguageModel
from matryoshka.shards import ShardSet

Cli = Callable[..., tuple[int, str, str]]


def files(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def without(arguments: list[str], *options: str) -> list[str]:
    """The arguments without these options and their values."""
    found = list(arguments)
    for option in options:
        place = found.index(option)
        del found[place : place + 2]
    return found


@pytest.fixture
def batches(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The hook points of each forward pass."""
    seen: list[list[str]] = []
    real = lm.capture

    def capture(tokens: Any, hook_points: Any) -> Any:
        seen.append(list(hook_points))
        return real(tokens, hook_points)

    monkeypatch.setattr(lm, "capture", capture)
    return seen


def test_layers_from_one_pass_equal_each_alone(
    cli: Cli, arguments: list[str], tmp_path: Path, batches: list[list[str]]
) -> None:
    for layer in (2, 0, 1):
        alone = cli(*without(arguments, "--layer"), "--layer", str(layer), "--out", str(tmp_path / f"alone{layer}"))
        assert alone[0] == 0, alone
    n_alone = len(batches) // 3
    batches.clear()
    code, table, said = cli(*without(arguments, "--layer"), "--layers", "2,0,1", "--out", str(tmp_path / "together"))
    assert code == 0, said
    assert len(batches) == n_alone  # one pass, not three
    assert {len(names) for names in batches} == {6}
    for layer in (0, 1, 2):
        assert files(tmp_path / "together" / f"l{layer}") == files(tmp_path / f"alone{layer}")
        # one table: each set has a line of its own, and its numbers under it or beside it
        assert re.search(rf"l{layer}\s+10\s+4,000\s", table)
    assert "shards written" not in said
    assert said.count("tokens to harvest") == 1


def test_pairs_of_sites_and_across_layers(cli: Cli, arguments: list[str], tmp_path: Path, lm: LanguageModel) -> None:
    base = without(arguments, "--layer")
    pairs = {
        "l0-resid_pre-attn_out": ("0:resid_pre", "0:attn_out"),
        "l1-resid_pre-resid_post": ("1:resid_pre", "1:resid_post"),
        "l0-resid_mid-l2-mlp_out": ("0:resid_mid", "2:mlp_out"),
        "l2": ("2:resid_mid", "2:mlp_out"),
    }
    sources, targets = (",".join(pair[side] for pair in pairs.values()) for side in (0, 1))
    code, _, said = cli(*base, "--source", sources, "--target", targets, "--out", str(tmp_path / "sets"))
    assert code == 0, said
    for name, (source, target) in pairs.items():
        shards = ShardSet.open(tmp_path / "sets" / name, verify=True)
        manifest = shards.manifest
        assert f"{manifest.source.layer}:{manifest.source.site}" == source
        assert f"{manifest.target.layer}:{manifest.target.site}" == target
        assert cli(*base, "--source", source, "--target", target, "--out", str(tmp_path / "alone" / name))[0] == 0
        assert files(tmp_path / "alone" / name) == files(tmp_path / "sets" / name)
        wanted = lm.capture(shards.val.tokens(0)[:3].long(), [manifest.source.hook_point, manifest.target.hook_point])
        for side, facts in (("source", manifest.source), ("target", manifest.target)):
            values = wanted[facts.hook_point].transpose(0, 1).bfloat16()
            assert torch.equal(shards.val.activations(side, 0)[:, :3], values)
    # the norm that follows the source, also before attention; none for a source that no norm reads
    for name in pairs:
        norm = ShardSet.open(tmp_path / "sets" / name).norm
        assert norm is not None
    # the same pair by its other name
    code, _, said = cli(
        *base, "--layer", "0", "--source", "resid_pre", "--target", "attn_out",
        "--out", str(tmp_path / "sets" / "l0-resid_pre-attn_out"),
    )  # fmt: skip
    assert "nothing left to do" in said


def test_one_of_several_is_repaired_alone(
    cli: Cli, arguments: list[str], tmp_path: Path, batches: list[list[str]]
) -> None:
    command = [*without(arguments, "--layer"), "--layers", "0,2", "--out", str(tmp_path / "x{layer}")]
    assert cli(*command)[0] == 0
    before = {layer: files(tmp_path / f"x{layer}") for layer in (0, 2)}
    (tmp_path / "x2" / "manifest" / "train-00004.json").unlink()
    batches.clear()
    code, table, _ = cli(*command)
    assert code == 0
    assert re.search(r"x0\s+0\s", table)
    assert re.search(r"x2\s+1\s", table)
    assert {name for names in batches for name in names} == {"blocks.2.hook_resid_mid", "blocks.2.hook_mlp_out"}
    assert {layer: files(tmp_path / f"x{layer}") for layer in (0, 2)} == before


def test_sets_of_different_progress_are_finished_together(cli: Cli, arguments: list[str], tmp_path: Path) -> None:
    """A set that exists with fewer tokens has shards of another size: it gets a pass of its own."""
    base = without(arguments, "--layer", "--tokens")
    assert cli(*base, "--layer", "0", "--tokens", "2k", "--out", str(tmp_path / "l0"))[0] == 0
    command = [*base, "--layers", "0,1", "--tokens", "4k", "--out", str(tmp_path)]
    code, _, said = cli(*command)
    assert code == 0, said
    assert cli(*base, "--layer", "1", "--tokens", "4k", "--out", str(tmp_path / "alone"))[0] == 0
    assert files(tmp_path / "l1") == files(tmp_path / "alone")
    first, second = (ShardSet.open(tmp_path / name, verify=True) for name in ("l0", "l1"))
    assert first.train.n_contexts == second.train.n_contexts
    assert first.train.n_shards > second.train.n_shards
    assert cli(*command)[2].count("nothing left to do") == 1


# The settings


def config(**flags: Any) -> HarvestConfig:
    return load_config(HarvestConfig, "harvest", flags=flags)


def test_members_are_what_one_would_ask_for_alone() -> None:
    together = config(layers="8,12")
    assert [member.folder() for member in together.members()] == [Path("data/l8"), Path("data/l12")]
    for member, layer in zip(together.members(), (8, 12), strict=True):
        assert member.content() == config(layer=layer).content()
    (cross,) = config(source="8:resid_mid", target="9:mlp_out").members()
    assert cross.folder() == Path("data/l8-resid_mid-l9-mlp_out")
    content = cross.content()
    assert (content["source"], content["target"]) == ("8:resid_mid", "9:mlp_out")
    # what the manifest records is enough to ask for the same again
    for member in (*together.members(), cross):
        recorded = json.loads(json.dumps(member.content()))
        again = HarvestConfig.model_validate({**recorded_settings(recorded), "out": "x"})
        assert again.members()[0].content() == member.content()
        assert again.members()[0].folder() == Path("x")


def test_settings_that_sets_of_the_first_version_do_not_know_are_left_out_at_their_default() -> None:
    assert not {"bos", "pack", "dedup", "max_doc_tokens", "layers", "source"} & set(config(layer=1).content())
    changed = config(layer=1, bos="none", pack=False, dedup=True, max_doc_tokens="2k").content()
    assert changed == config(layer=1).content() | {
        "bos": "none",
        "pack": False,
        "dedup": True,
        "max_doc_tokens": 2000,
    }


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        ({"layer": 1, "layers": "1,2"}, "layer and layers are both given"),
        ({"layer": 1, "source": "1:resid_mid", "target": "1:mlp_out"}, "say their layers, and layer 1 is given too"),
        ({"source": "1:resid_mid"}, "no layer is given"),
        ({"layer": 1, "source": "1:resid_mid,resid_pre", "target": "mlp_out,mlp_out"}, "each say their layers"),
        ({"source": "1:resid_mid,2:resid_mid", "target": "1:mlp_out"}, "there are 2 sources and 1 targets"),
        ({"source": "x:resid_mid", "target": "1:mlp_out"}, "is not a site. Write the layer"),
        ({"source": "1:nowhere", "target": "1:mlp_out"}, "no site .nowhere"),
        ({"layers": "3,4,3"}, "two sets would be in one folder .*name each pair once"),
        ({"layers": "3,-4"}, "layers: expected numbers of blocks .* found '-4'"),
        ({"layers": "3;4"}, "layers: expected numbers of blocks .* found '3;4'"),
        ({"layers": "all"}, "expected numbers of blocks and ranges of them, such as 8,12,17 or 0-25, found 'all'"),
        ({"layers": [3, True]}, "layers: takes no list with a boolean"),
        ({"layers": "9-7"}, "9-7 is no range of blocks"),
        ({"layers": "0-99999999999999999"}, "to 9999 at most"),
        ({"layers": "0-3,2"}, "two sets would be in one folder"),
    ],
)
def test_bad_choices_of_sites(flags: dict[str, Any], what: str) -> None:
    with pytest.raises(UserError, match=what):
        config(**flags)


def test_ranges_of_layers() -> None:
    assert config(layers="0-3").layers == (0, 1, 2, 3)
    assert config(layers="[8, 12, 17]").layers == (8, 12, 17)  # as YAML has it between quotes
    assert config(layers="8, 10-12,5").layers == (8, 10, 11, 12, 5)
    assert config(layers=[2, "4-5"]).layers == (2, 4, 5)
    assert config(layers=7).layers == config(layers="7-7").layers == (7,)


def test_a_flag_takes_along_what_belongs_to_what_it_replaces(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(
        "harvest: {model: a, revision: main, dataset: b, dataset_config: c, dataset_revision: d, text_column: e, "
        "source: [8:resid_mid], target: [9:mlp_out]}\n"
    )

    def read(**flags: Any) -> HarvestConfig:
        return load_config(HarvestConfig, "harvest", file=file, flags=flags)

    other = read(model="x", dataset="y")
    assert (other.model, other.revision) == ("x", None)
    assert (other.dataset, other.dataset_config, other.dataset_revision, other.text_column) == ("y", None, None, "text")
    assert (read(layer=3).source, read(layer=3).target) == (("resid_mid",), ("mlp_out",))
    one = read(source="resid_pre", layer=4)
    assert (one.source, one.target, one.layer) == (("resid_pre",), ("mlp_out",), 4)
    assert read(source="8:resid_pre").target == ("9:mlp_out",)
    file.write_text("harvest: {layer: 4, source: resid_pre}\n")
    assert (read(layer=5).source, read(layers="5,6").source) == (("resid_pre",), ("resid_pre",))
    assert [str(site) for pair in [read(target="6:mlp_out").pair()] for site in (pair.source, pair.target)] == [
        "4:resid_pre",
        "6:mlp_out",
    ]
    assert read(source="1:resid_mid", target="2:mlp_out").layer is None


def test_a_pair_of_sites_is_recorded_as_it_always_was() -> None:
    """So that sets of every version go on, and their repair asks for the same pair."""
    for settings, said in (
        ({"layer": 3}, {"layer": 3, "source_site": "resid_mid", "target_site": "mlp_out"}),
        ({"layer": 3, "source": "resid_pre"}, {"layer": 3, "source_site": "resid_pre", "target_site": "mlp_out"}),
        ({"source": "3:resid_mid", "target": "3:mlp_out"}, {"layer": 3, "source_site": "resid_mid"}),
        ({"source": "3:resid_mid", "target": "5:mlp_out"}, {"source": "3:resid_mid", "target": "5:mlp_out"}),
        ({"layer": 3, "target": "5:mlp_out"}, {"source": "3:resid_mid", "target": "5:mlp_out"}),
    ):
        (member,) = config(**settings).members()
        content = member.content()
        assert said.items() <= content.items()
        assert {"layer", "source", "target", "source_site", "target_site"} & content.keys() >= said.keys()
        assert HarvestConfig.model_validate(recorded_settings(content)).pair() == member.pair()


@pytest.mark.parametrize("name", ["source_site", "target_site"])
def test_the_names_of_before_are_answered_with_the_new_one(name: str) -> None:
    with pytest.raises(UserError, match=f"{name}: unknown key, this setting is gone: .* {name.partition('_')[0]} "):
        config(layer=1, **{name: "resid_pre"})


def test_a_flag_replaces_what_the_file_says_in_another_way(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "pipeline.yaml").write_text("harvest: {layer: 17, tokens: 100}\n")
    for flags in (("--layers", "1,2"), ("--source", "1:resid_mid", "--target", "2:mlp_out"), ("--layer", "3")):
        code, _, said = cli("run", *flags, "--config", "pipeline.yaml")
        assert code == 2
        assert "tokens = 100 is less than two contexts" in said
