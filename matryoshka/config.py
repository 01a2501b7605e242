"""Settings: strict YAML and flags -> one frozen, validated model.

A configuration file has the sections `harvest`, `train` and `evaluate`; each stage reads its own, and only of a file
that is named. What is said on the command line wins over `--set section.key=value`, which wins over the file, which
wins over the defaults; with a setting go those that say the same in another way (`Config.REPLACES`).
Unknown keys are errors: a misspelt setting must never be a silently ignored one.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from matryoshka.errors import UserError
from matryoshka.locations import local_path

SECTIONS = ("harvest", "train", "evaluate", "layers")

_COUNT = re.compile(r"(\d+(?:\.\d+)?)([kKmMbBgG]?)")
_RANGE = re.compile(r"(\d+)(?:\s*-\s*(\d+))?")
_VALIDATOR = re.compile(r"[\[(]|^(int|float|str|bool|none|constrained-\w+)$")
"""In a place of an error: names of validators and types, no settings."""
_MULTIPLIER = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9}


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key that is given twice in one mapping, of which plain YAML would drop the first without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key} is given twice", node.start_mark)
        return super().construct_mapping(node, deep=deep)


NOTHING = ("off", "none", "no", "null")
"""What people write for a setting that is not used."""


class Config(BaseModel):
    """Base of every settings model: frozen, keyword-only, unknown keys refused.

    No number takes infinity, NaN or a boolean. YAML reads a bare `off` or `no` as false: where a setting has a word for
    "not used", or may be left out, that is what they mean.
    """

    REPLACES: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """Setting -> settings of a weaker source that it takes the place of, since both say the same or follow from it."""
    GONE: ClassVar[Mapping[str, str]] = {}
    """Setting of an earlier version -> what to do without it."""

    @classmethod
    def replaced(cls, weaker: Mapping[str, Any], stronger: Mapping[str, Any]) -> set[str]:
        """The settings of `weaker` that those of `stronger` take the place of, whether or not they are there."""
        del weaker
        return {name for key, value in stronger.items() if value is not None for name in cls.REPLACES.get(key, ())}

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _off_is_no_number(cls, value: object, info: ValidationInfo) -> object:
        if isinstance(value, list | tuple) and any(isinstance(item, bool) for item in value):
            raise ValueError("takes no list with a boolean in it (YAML reads on, off, yes and no as booleans)")
        if not isinstance(value, bool | str):
            return value  # also for speed: a set's records have a field for every file
        assert info.field_name is not None
        kinds, words = choices(cls.model_fields[info.field_name].annotation)
        if bool in kinds or Any in kinds:
            return value
        if value is False or (isinstance(value, str) and value.lower() in NOTHING):
            for word in ("off", "none"):
                if word in words:
                    return word
            if type(None) in kinds and (value is False or str not in kinds):
                return None
        if isinstance(value, bool):
            written = "on, yes or true" if value else "off, no or false"
            raise ValueError(f"takes no {written}")
        return value


def choices(annotation: Any) -> tuple[set[Any], list[Any]]:
    """The types that an annotation names, and the values of its literals; what lists and mappings hold is left out."""
    if get_origin(annotation) is Literal:
        return set(), list(get_args(annotation))
    if get_origin(annotation) is Annotated:
        return choices(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        parts = [choices(part) for part in get_args(annotation)]
        return set().union(*(kinds for kinds, _ in parts)), [word for _, words in parts for word in words]
    return {get_origin(annotation) or annotation}, []


ConfigT = TypeVar("ConfigT", bound=Config)


def parse_count(value: object) -> int:
    """Read a whole number that may carry a decimal suffix: 15000000, "15M", "200k", "1.5M", "1_000"."""
    if isinstance(value, bool):
        raise ValueError(f"expected a number such as 15M, got {value}")
    if isinstance(value, int):
        return value
    text = str(value).strip().replace("_", "").replace(",", "")
    match = _COUNT.fullmatch(text)
    if match is None:
        raise ValueError(f"expected a number such as 15M, 200k or 15000000, got {value!r}")
    # Not float: 1.001 * 1000 is 1000.9999999999999 there.
    number = Decimal(match[1]) * _MULTIPLIER[match[2].lower()]
    if number != int(number):
        raise ValueError(f"expected a whole number, got {value!r} = {number}")
    return int(number)


def parse_sizes(value: object) -> object:
    """Read a list of counts written with commas, as on the command line: "1152,2304,4608" -> (1152, 2304, 4608)."""
    if isinstance(value, str):
        return tuple(parse_count(part) for part in value.split(","))
    return value


LARGEST_COUNT = 10**13
"""Of tokens, rows, latents or steps: more than all text there is, and a tenth of what int64 sums hold at any width."""
LARGEST = 1e9
"""Of rates, weights and factors."""

Count = Annotated[int, BeforeValidator(parse_count), Field(ge=1, le=LARGEST_COUNT)]
"""A positive whole number; "15M" and "200k" are read too."""

CountOrZero = Annotated[int, BeforeValidator(parse_count), Field(ge=0, le=LARGEST_COUNT)]
"""The same, or 0."""

Sizes = Annotated[tuple[Count, ...], BeforeValidator(parse_sizes), Field(min_length=1)]
"""Several counts; "1152,2304" is read too."""

LARGEST_LAYER = 9_999

Layer = Annotated[int, Field(ge=0, le=LARGEST_LAYER)]
"""Number of a block, from 0."""


def parse_layers(value: object) -> tuple[int, ...]:
    """Read numbers of blocks and ranges of them, whose ends are both in: "8,12,17", "0-25", [3, "8-10"]."""
    parts = value if isinstance(value, list | tuple) else str(value).strip("[] ").split(",")
    layers: list[int] = []
    for part in parts:
        match = _RANGE.fullmatch(str(part).strip())
        if match is None or isinstance(part, bool):
            raise ValueError(
                f"expected numbers of blocks and ranges of them, such as 8,12,17 or 0-25, found {part!r}; the blocks "
                "of a model are counted from 0"
            )
        first, last = int(match[1]), int(match[2] or match[1])
        # Before the range is made: its length is what was typed.
        if not first <= last <= LARGEST_LAYER:
            raise ValueError(f"{part} is no range of blocks: it goes up, and to {LARGEST_LAYER} at most")
        layers += range(first, last + 1)
    return tuple(layers)


Layers = Annotated[tuple[Layer, ...], BeforeValidator(parse_layers), Field(min_length=1)]
"""Several blocks; "8,12,17" and "0-25" are read too."""

Seed = Annotated[int, Field(ge=0, lt=2**63)]
"""Of a random number generator."""

Positive = Annotated[float, Field(gt=0, le=LARGEST)]
"""A rate, weight or factor."""

PositiveOrZero = Annotated[float, Field(ge=0, le=LARGEST)]
"""The same, or 0, which turns it off."""

Share = Annotated[float, Field(gt=0, lt=1)]
"""A part of something that is neither nothing nor all."""


def read_yaml(path: Path) -> dict[str, Any]:
    """The sections of a configuration file, checked for their names only."""
    path = local_path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"the configuration file {path} cannot be read ({error.strerror}); check --config") from error
    except UnicodeDecodeError as error:
        raise UserError(f"the configuration file {path} is not UTF-8 text: {error}") from error
    try:
        content = yaml.load(text, _UniqueKeys)  # a SafeLoader
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path} should be a mapping with the sections {', '.join(SECTIONS)}")
    unknown = [str(key) for key in content if key not in SECTIONS]
    if unknown:
        raise UserError(f"{path} has the unknown section {', '.join(unknown)}; the sections are {', '.join(SECTIONS)}")
    for name, section in content.items():
        if section is not None and not isinstance(section, dict):
            raise UserError(f"{path}: the section {name} should be a mapping of settings, found {section!r}")
    return {name: section or {} for name, section in content.items()}


def parse_value(text: str, said: str) -> Any:
    """A value of the command line that is written as in YAML; `said` is where, for the UserError."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{said}: the value is not valid YAML") from error


def parse_overrides(overrides: Sequence[str], section: str) -> dict[str, Any]:
    """`--set section.key=value` items as a nested mapping for one section; values are read as YAML."""
    values: dict[str, Any] = {}
    for item in overrides:
        name, equals, text = item.partition("=")
        keys = name.strip().split(".")
        if not equals or len(keys) < 2 or not all(keys):
            raise UserError(f"--set {item!r} should look like section.key=value, for example {section}.seed=1")
        if keys[0] != section:
            raise UserError(f"--set {item!r}: this command reads the section {section!r}, not {keys[0]!r}")
        value = parse_value(text, f"--set {item!r}")
        place = values
        for key in keys[1:-1]:
            below = place.setdefault(key, {})
            if not isinstance(below, dict):
                raise UserError(
                    f"--set {item!r}: an earlier --set gives {key} the value {below!r}; keep one of the two"
                )
            place = below
        place[keys[-1]] = value
    return values


def load_config(
    model: type[ConfigT],
    section: str,
    *,
    file: Path | None = None,
    overrides: Sequence[str] = (),
    flags: Mapping[str, Any] | None = None,
) -> ConfigT:
    """Merge defaults <- file <- --set <- flags (those that are not None) into one validated, frozen model."""
    values: dict[str, Any] = dict(read_yaml(file).get(section, {})) if file is not None else {}
    values = overlaid(model, values, parse_overrides(overrides, section))
    said = {key: value for key, value in (flags or {}).items() if value is not None}
    # A flag gives a mapping whole; only settings that are models themselves are given part by part.
    values = {key: value for key, value in values.items() if key not in said or _is_part(model, key)}
    values = overlaid(model, values, said)
    try:
        return model.model_validate(values)
    except ValidationError as error:
        origin = f" ({file} and the command line)" if file is not None else ""
        raise UserError(f"bad {section} settings{origin}: {explain(error, model)}") from error


def _is_part(model: type[Config], key: str) -> bool:
    field = model.model_fields.get(key)
    return field is not None and isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)


def explain(error: ValidationError, model: type[BaseModel] | None = None) -> str:
    """A pydantic error as one line a person can act on."""
    messages: dict[str, list[str]] = {}
    for item in error.errors():
        message = item["msg"].removeprefix("Value error, ").replace("Input should", "should")
        if item["type"] == "extra_forbidden":
            message = unknown_key(_model_at(model, item["loc"][:-1]), str(item["loc"][-1]))
        messages.setdefault(_name_at(item["loc"]), []).append(message)
    parts = []
    for name, found in messages.items():
        # One for each way in which the setting can be given.
        message = ", or ".join(dict.fromkeys(found))
        parts.append(f"{name}: {message}" if name else message)
    return "; ".join(parts)


def unknown_key(model: type[BaseModel] | None, key: str) -> str:
    """What is wrong with `key` in settings that do not have it: it is gone, or never was."""
    gone = model.GONE.get(key) if model is not None and issubclass(model, Config) else None
    if gone is not None:
        return f"unknown key, this setting is gone: {gone}"
    if model is None:
        return "unknown key"
    near = difflib.get_close_matches(key, model.model_fields, 1)
    return f"unknown key{f', did you mean {near[0]}?' if near else ''}; known keys: {', '.join(model.model_fields)}"


def _name_at(path: Sequence[int | str]) -> str:
    """The setting at `path`, without what pydantic calls the ways in which it may be given."""
    return ".".join(str(part) for part in path if not (isinstance(part, str) and _VALIDATOR.search(part)))


def _model_at(model: type[BaseModel] | None, path: Sequence[int | str]) -> type[BaseModel] | None:
    """The settings model at `path` below `model`, where the annotation there says so plainly."""
    for name in path:
        field = None if model is None else model.model_fields.get(str(name))
        inner = None if field is None else field.annotation
        model = inner if isinstance(inner, type) and issubclass(inner, BaseModel) else None
    return model


def digest(content: object) -> str:
    """sha256 of the canonical JSON of `content`: the identity of settings."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def overlaid(model: type[Config], weaker: Mapping[str, Any], stronger: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a stronger source over those of a weaker one, without what the stronger take the place of."""
    gone = model.replaced(weaker, stronger)
    return _merged({key: value for key, value in weaker.items() if key not in gone}, stronger)


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in over.items():
        below = result.get(key)
        result[key] = _merged(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return result
