"""Settings: counts, strict files, precedence."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar

import pytest
from pydantic import ValidationError

from matryoshka.config import Config, Count, Sizes, digest, load_config, parse_count, parse_sizes, read_yaml
from matryoshka.errors import UserError


class Inner(Config):
    depth: int = 1
    name: str = "inner"


class Settings(Config):
    seed: int = 0
    tokens: Count = 1000
    sizes: Sizes = (1, 2)
    model: str = "default"
    inner: Inner = Inner()


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("15000000", 15_000_000),
        ("15M", 15_000_000),
        ("15m", 15_000_000),
        ("200k", 200_000),
        ("200K", 200_000),
        ("1.5M", 1_500_000),
        ("0.25k", 250),
        ("2B", 2_000_000_000),
        ("2g", 2_000_000_000),
        ("1_000", 1000),
        ("15,000", 15_000),
        (" 7 ", 7),
        ("3.0", 3),
        (12, 12),
        (1500000.0, 1_500_000),
        ("0", 0),
    ],
)
def test_counts(text: object, number: int) -> None:
    assert parse_count(text) == number


def test_counts_with_decimals_are_exact() -> None:
    """1.001k is 1000.9999999999999 in floating point."""
    for thousandths in range(0, 20_000, 7):
        text = f"{thousandths // 1000}.{thousandths % 1000:03d}"
        assert parse_count(text + "k") == Fraction(text) * 1000
        assert parse_count(text + "M") == Fraction(text) * 10**6
    assert parse_count("12345678901234567891") == 12345678901234567891


@pytest.mark.parametrize(
    "text", ["abc", "", "M", "-5", "1e6", "15 M", "15MM", "1.5", "0.0001k", "nan", "1.2.3", True, None, [5], "0x10"]
)
def test_what_is_no_count(text: object) -> None:
    with pytest.raises(ValueError, match="expected a (whole )?number"):
        parse_count(text)


def test_sizes() -> None:
    assert parse_sizes("1152,2304,4608") == (1152, 2304, 4608)
    assert parse_sizes("1k, 2k") == (1000, 2000)
    assert Settings(sizes=[3, "4k"]).sizes == (3, 4000)  # type: ignore[list-item]
    with pytest.raises(ValidationError, match="expected a number"):
        Settings(sizes="1,,2")  # type: ignore[arg-type]


def test_frozen_and_keyword_only() -> None:
    settings = Settings()
    with pytest.raises(ValidationError, match="frozen"):
        settings.seed = 1  # type: ignore[misc]
    with pytest.raises(TypeError):
        Settings(3)  # type: ignore[misc]


def test_precedence(tmp_path: Path) -> None:
    file = write(tmp_path / "a.yaml", "train: {seed: 1, tokens: 2k, model: from-file, inner: {depth: 5, name: file}}")
    settings = load_config(
        Settings,
        "train",
        file=file,
        overrides=["train.tokens=3k", "train.model=from-set", "train.inner.depth=6"],
        flags={"model": "from-flag", "seed": None, "tokens": None},
    )
    # one setting from each: flag, --set, file, default
    assert (settings.model, settings.tokens, settings.seed, settings.sizes) == ("from-flag", 3000, 1, (1, 2))
    assert settings.inner == Inner(depth=6, name="file")
    assert load_config(Settings, "train") == Settings()
    # the last of two --set wins, and values are YAML
    twice = load_config(Settings, "train", overrides=["train.seed=1", "train.seed=2", "train.sizes=[5, 6]"])
    assert (twice.seed, twice.sizes) == (2, (5, 6))
    assert load_config(Settings, "train", overrides=["train.model=a=b"]).model == "a=b"


def test_sections_of_other_stages_are_left_alone(tmp_path: Path) -> None:
    file = write(tmp_path / "a.yaml", "harvest: {anything: 1}\ntrain:\nevaluate: {}\n")
    assert load_config(Settings, "train", file=file) == Settings()
    assert load_config(Settings, "train", file=write(tmp_path / "empty.yaml", "")) == Settings()


def refused(tmp_path: Path, text: str) -> str:
    file = write(tmp_path / "bad.yaml", text)
    with pytest.raises(UserError) as error:
        load_config(Settings, "train", file=file)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_unknown_keys_name_the_known_ones(tmp_path: Path) -> None:
    message = refused(tmp_path, "train: {sede: 1}")
    assert "sede: unknown key, did you mean seed?; known keys: seed, tokens, sizes, model, inner" in message
    assert "bad.yaml" in message
    assert "inner.dept: unknown key, did you mean depth?; known keys: depth, name" in refused(
        tmp_path, "train: {inner: {dept: 1}}"
    )
    with pytest.raises(UserError, match=r"sede: unknown key, did you mean seed\?; known keys: seed, tokens"):
        load_config(Settings, "train", overrides=["train.sede=1"])


def test_unknown_sections_name_the_known_ones(tmp_path: Path) -> None:
    message = refused(tmp_path, "training: {seed: 1}")
    assert "unknown section training; the sections are harvest, train, evaluate" in message


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("train: [1]", "should be a mapping of settings"),
        ("- train", "should be a mapping with the sections"),
        ("train: {", "not valid YAML"),
        ("train: {tokens: lots}", "tokens: expected a number such as 15M"),
        ("train: {tokens: 0}", "tokens: .*greater than or equal to 1"),
        ("train: {seed: x}\nharvest: 3", "should be a mapping of settings"),
        ("train: {seed: 1}\ntrain: {seed: 2}", "the key train is given twice"),
        ("train: {seed: 1, model: a, seed: 2}", "the key seed is given twice"),
        ("train: !!python/object/apply:os.getcwd []", "not valid YAML"),
        ("train: {1: 2}", "Keys should be strings"),
    ],
)
def test_bad_files(text: str, what: str, tmp_path: Path) -> None:
    message = refused(tmp_path, text)
    assert re.search(what, message), message


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read .*check --config"):
        read_yaml(tmp_path / "absent.yaml")
    with pytest.raises(UserError, match="cannot be read"):
        read_yaml(tmp_path)
    (tmp_path / "latin.yaml").write_bytes("train: {model: caf\xe9}".encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8"):
        read_yaml(tmp_path / "latin.yaml")


@pytest.mark.parametrize(
    ("items", "what"),
    [
        (["seed=1"], r"should look like section\.key=value"),
        (["train.seed"], r"should look like section\.key=value"),
        (["train.=1"], r"should look like section\.key=value"),
        (["harvest.seed=1"], "reads the section 'train', not 'harvest'"),
        (["train.seed={"], "not valid YAML"),
        (["train.inner=1", "train.inner.depth=2"], "an earlier --set gives inner the value 1"),
        (["train.seed="], "seed"),
    ],
)
def test_bad_overrides(items: list[str], what: str) -> None:
    with pytest.raises(UserError, match=what):
        load_config(Settings, "train", overrides=items)


class Alternatives(Config):
    """Two ways to say how long, and a number that follows from another one."""

    REPLACES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "steps": ("tokens",),
        "tokens": ("steps",),
        "sizes": ("total",),
    }

    steps: Count | None = None
    tokens: Count | None = None
    sizes: Sizes | None = None
    total: Count | None = None


def test_what_is_said_takes_the_place_of_what_says_the_same(tmp_path: Path) -> None:
    file = write(tmp_path / "a.yaml", "train: {tokens: 5M, sizes: [1, 2], total: 3}")

    def read(**flags: Any) -> dict[str, Any]:
        return load_config(Alternatives, "train", file=file, flags=flags).model_dump()

    assert read(steps="7") == {"steps": 7, "tokens": None, "sizes": (1, 2), "total": 3}
    assert read(sizes="4,5") == {"steps": None, "tokens": 5_000_000, "sizes": (4, 5), "total": None}
    assert read(sizes="4,5", total=9)["total"] == 9
    # --set stands between the file and the flags
    over = ["train.steps=2"]
    assert load_config(Alternatives, "train", file=file, overrides=over).tokens is None
    both = load_config(Alternatives, "train", file=file, overrides=over, flags={"tokens": 9})
    assert (both.steps, both.tokens) == (None, 9)
    # what nobody said replaces nothing
    assert read(steps=None)["tokens"] == 5_000_000


def test_a_file_is_read_only_when_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "pipeline.yaml", "train: {seed: 4}")
    assert load_config(Settings, "train").seed != 4
    assert load_config(Settings, "train", file=tmp_path / "pipeline.yaml").seed == 4


def test_digest_is_of_the_content() -> None:
    first: dict[str, Any] = {"a": 1, "b": [2, 3]}
    assert digest(first) == digest({"b": [2, 3], "a": 1})
    assert digest(first) != digest({"a": 1, "b": [3, 2]})
    assert len(digest(first)) == 64
