"""Every setting has bounds: what no setting can mean is refused in one sentence, whichever setting it is."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from evaluate.config import EvaluateConfig
from harvest.config import HarvestConfig
from matryoshka.config import Config, load_config
from matryoshka.errors import UserError
from matryoshka.locations import expand, local_path, location
from matryoshka.shards import ShardSet, plan_splits
from matryoshka.transcoder import Transcoder
from train.config import TrainConfig

NEEDED: dict[type[Config], dict[str, Any]] = {HarvestConfig: {"layer": 3}, TrainConfig: {}, EvaluateConfig: {}}


def fields(model: type[BaseModel], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """(path, annotation as text) of every setting."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from fields(field.annotation, (*path, name))
        else:
            yield (*path, name), str(field.annotation)


NUMBERS = [
    (model, path, "tuple" in annotation)
    for model in NEEDED
    for path, annotation in fields(model)
    if ("int" in annotation or "float" in annotation) and "dict" not in annotation
]


def settle(model: type[Config], path: tuple[str, ...], value: object) -> Config:
    """The settings with one of them set as in a file."""
    values: dict[str, Any] = dict(NEEDED[model])
    below = values
    for name in path[:-1]:
        below = below.setdefault(name, {})
    below[path[-1]] = value
    if path == ("layers",):
        del values["layer"]
    return load_config(model, "x", flags=values)


def _name(value: object) -> str:
    return ".".join(value) if isinstance(value, tuple) else ""


def test_there_are_numbers_to_check() -> None:
    assert len(NUMBERS) > 70


@pytest.mark.parametrize(
    ("model", "path", "several"), NUMBERS, ids=lambda v: ".".join(v) if isinstance(v, tuple) else ""
)
def test_what_no_number_can_be(model: type[Config], path: tuple[str, ...], several: bool) -> None:
    for value in (math.inf, -math.inf, math.nan, 10**30, -1, "inf", True, "many"):
        with pytest.raises(UserError) as error:
            settle(model, path, [value] if several else value)
        message = str(error.value)
        assert path[-1] in message
        assert "\n" not in message
        for word in ("function-", "0x", "constrained", "literal[", "validator"):
            assert word not in message, message


@pytest.mark.parametrize(
    ("model", "path", "several"), NUMBERS, ids=lambda v: ".".join(v) if isinstance(v, tuple) else ""
)
def test_off_is_never_a_number(model: type[Config], path: tuple[str, ...], several: bool) -> None:
    """YAML reads off and no as false. It means nothing of it, where that can be said, and is refused elsewhere."""
    del several
    if path in (("layer",), ("layers",)):
        return  # one of them has to be said
    for value in (False, "off", "none", "no"):
        content: Any = _content_or_refusal(model, path, value)
        for name in path if isinstance(content, dict) else ():
            content = content[name]
        assert content is None or content in ("off", "none") or path[-1] in content


def _content_or_refusal(model: type[Config], path: tuple[str, ...], value: object) -> dict[str, Any] | str:
    try:
        return settle(model, path, value).model_dump()
    except UserError as error:
        return str(error)


def test_words_for_nothing() -> None:
    assert HarvestConfig.model_validate({"layer": 1, "bos": False}).bos == "none"
    assert TrainConfig.model_validate({"wandb": False, "condition": False}).condition == "none"
    assert TrainConfig.model_validate({"max_norm": "none"}).max_norm is None
    with pytest.raises(UserError, match="k: takes no off"):
        load_config(TrainConfig, "train", flags={"k": False})


def test_a_count_beyond_all_text_is_refused_at_once() -> None:
    with pytest.raises(UserError, match="tokens: should be less than or equal to 10000000000000"):
        load_config(HarvestConfig, "harvest", flags={"layer": 3, "tokens": "99999999999999999999999"})
    # the largest that settings take is refused before its shards are planned one by one
    with pytest.raises(UserError, match=r"more than 1,000,000 shards .* TB a side"):
        plan_splits(10**13 // 1024, 0.05, 1024, 2304)


def test_several_ways_to_give_a_setting_are_one_sentence() -> None:
    with pytest.raises(UserError) as error:
        load_config(HarvestConfig, "harvest", flags={"layer": 3, "batch_size": "0"})
    assert str(error.value) == (
        "bad harvest settings: batch_size: should be greater than or equal to 1, or should be 'auto'"
    )


def test_the_home_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    home = str(tmp_path)
    assert expand("~/lab/l1") == f"{home}/lab/l1"
    assert expand("data/~x") == "data/~x"
    assert location("~/l1") == Path(home) / "l1"
    harvest = HarvestConfig.model_validate({"layer": 1, "out": "~/l1", "model": "~/m", "dataset": "~/t.txt"})
    assert (str(harvest.folder()), harvest.model, harvest.dataset) == (f"{home}/l1", f"{home}/m", f"{home}/t.txt")
    train = TrainConfig.model_validate({"shards": "~/l1", "out": "~/r"})
    assert (train.shards, train.out) == (Path(home) / "l1", Path(home) / "r")
    evaluate = EvaluateConfig.model_validate({"shards": "~/l1", "out": "~/e", "lm": {"model": "~/m"}})
    assert (str(evaluate.shards), str(evaluate.out), evaluate.lm.model) == (f"{home}/l1", f"{home}/e", f"{home}/m")
    for open_it in (ShardSet.open, Transcoder.load, Transcoder.from_pretrained):
        with pytest.raises(UserError) as error:
            open_it("~/nothing")
        assert f"{home}/nothing" in str(error.value)
    assert not list(Path.cwd().glob("~*"))


@pytest.mark.parametrize("text", ["$HOME/l1", "${HOME}/l1", "data/$USER"])
def test_variables_are_refused(text: str) -> None:
    for read in (expand, local_path, location):
        with pytest.raises(UserError, match="which is not expanded here"):
            read(text)
    with pytest.raises(UserError, match="out: .* which is not expanded here"):
        load_config(HarvestConfig, "harvest", flags={"layer": 1, "out": text})
    assert not os.path.exists("$HOME")
