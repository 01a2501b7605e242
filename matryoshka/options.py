"""Options of the commands, made from the settings: a setting is worded once, where it is declared, and is a flag.

The help of an option is the docstring of its field, the default is the field's, and what is typed goes to the settings
model as text, which reads counts, lists and paths in one way wherever they come from. Free of torch, as the settings
are: `--help` answers in under a second.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from matryoshka.config import NOTHING, Config, choices, load_config, parse_value
from matryoshka.locations import local_path

MORE, SWITCHES = "More settings", "More settings, on or off"
"""Panels of the help for what few people change. Switches have one of their own: their two names take two columns."""

ConfigT = TypeVar("ConfigT", bound=Config)


@dataclass(frozen=True, slots=True)
class Given(Generic[ConfigT]):
    """What a command was started with."""

    settings: ConfigT
    file: Path | None
    """The settings file that was named."""
    flags: Mapping[str, Any]
    """The settings that were flags, as typed."""
    overrides: Sequence[str]
    """What came with --set."""

    def words(self) -> list[str]:
        """The options as a person would type them."""
        words = [] if self.file is None else ["--config", str(self.file)]
        for name, value in self.flags.items():
            option = flag_name(name)
            if isinstance(value, bool):
                words.append(f"--{option}" if value else f"--no-{option}")
            else:
                words += [f"--{option}", str(value)]
        return [*words, *(word for setting in self.overrides for word in ("--set", setting))]


def with_paths(command: Callable[..., None]) -> Callable[..., None]:
    """Read what a command is given: in a path `~` is the home folder, and a variable is refused.

    A parameter that is a Path is read so; one that is text names in its annotation what reads it, as in
    `Annotated[str, typer.Option(...), expand]`.
    """
    readers = {
        parameter.name: _reader(parameter)
        for parameter in inspect.signature(command, eval_str=True).parameters.values()
    }

    @functools.wraps(command)
    def call(**values: Any) -> None:
        command(**{name: _read(readers[name], value) for name, value in values.items()})

    return call


def with_settings(
    model: type[ConfigT],
    section: str,
    *,
    usual: Sequence[str],
    parts: Sequence[str] = (),
    shared: Sequence[str] | None = None,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command, whose first parameter is `given: Given[model]`, a flag for every setting.

    Args:
        section: of the settings file.
        usual: settings that the help shows first, in this order; the others follow in a panel of their own.
        parts: settings that are models themselves, whose fields are flags of this command; they win over a setting of
            the same name outside. Those of other parts are for other commands.
        shared: settings outside of the parts that this command reads; all by default.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        _, *own = inspect.signature(command, eval_str=True).parameters.values()
        fields = _fields(model, parts)
        assert set(usual) <= fields.keys(), usual
        names = [name for name in (*usual, *fields) if name in fields]
        taken = {parameter.name for parameter in own}
        names = [
            name
            for name in dict.fromkeys(names)
            if name not in taken and (fields[name][0] is not None or shared is None or name in shared)
        ]
        options = [_option(name, fields[name][1], more=name not in usual) for name in names]
        file = typer.Option(
            "--config", help=f"YAML file with the section {section}. (none: only the defaults)", metavar="PATH"
        )
        several = typer.Option("--set", help=f"{section}.key=value, any setting; repeatable.", metavar="KEY=VALUE")
        n_usual = sum(name in usual for name in names)
        parameters = [
            *own,
            *options[:n_usual],
            _parameter("config", Annotated[Path | None, file]),
            _parameter("set_", Annotated[list[str] | None, several]),
            *options[n_usual:],
        ]
        readers = {parameter.name: _reader(parameter) for parameter in own}

        @functools.wraps(command)
        def call(**values: Any) -> None:
            path, overrides = _read(local_path, values.pop("config")), values.pop("set_") or []
            flags = {name: value for name in names if (value := values.pop(name)) is not None}
            settings = load_config(model, section, file=path, overrides=overrides, flags=_nested(fields, flags))
            own_values = {name: _read(readers[name], value) for name, value in values.items()}
            command(Given(settings, path, flags, overrides), **own_values)

        # What typer looks at, in place of what `wraps` has copied.
        call.__signature__ = inspect.Signature(  # pyright: ignore[reportAttributeAccessIssue] -- of a function
            [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
        )
        call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return call

    return decorate


def flag(model: type[Config], name: str) -> Any:
    """The option of one setting, for a command that reads no others: `Annotated[str | None, flag(...)]`."""
    return get_args(_option(name, model.model_fields[name], more=False).annotation)[1]


def flag_name(setting: str) -> str:
    """val_fraction -> val-fraction."""
    return setting.replace("_", "-")


def help_of(field: FieldInfo) -> str:
    """The docstring of a setting in one line, and its default where there is one."""
    text = " ".join((field.description or "").split())
    shown = _shown(field.default)
    return text if shown is None else f"{text} ({shown})"


def _fields(model: type[Config], parts: Sequence[str]) -> dict[str, tuple[str | None, FieldInfo]]:
    """Setting -> the part it is in, and its field."""
    fields: dict[str, tuple[str | None, FieldInfo]] = {}
    for part in parts:
        inner = model.model_fields[part].annotation
        assert isinstance(inner, type)
        assert issubclass(inner, Config)
        fields |= {name: (part, field) for name, field in inner.model_fields.items() if name not in fields}
    outside = {name: field for name, field in model.model_fields.items() if not isinstance(field.default, Config)}
    return fields | {name: (None, field) for name, field in outside.items() if name not in fields}


def _nested(fields: Mapping[str, tuple[str | None, FieldInfo]], flags: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that flags say, as a settings file would hold them."""
    values: dict[str, Any] = {}
    for name, text in flags.items():
        part, field = fields[name]
        (values if part is None else values.setdefault(part, {}))[name] = _value(name, field, text)
    return values


def _value(name: str, field: FieldInfo, text: Any) -> Any:
    """What the settings model is given for a flag. Lists are written with commas, or as in YAML."""
    if not isinstance(text, str) or text.lower() in NOTHING or not choices(field.annotation)[0] & {tuple, dict}:
        return text
    if not text.lstrip().startswith(("[", "{")):
        return [part.strip() for part in text.split(",")]
    return parse_value(text, f"--{flag_name(name)} {text!r}")


def _option(name: str, field: FieldInfo, *, more: bool) -> inspect.Parameter:
    names, is_switch = f"--{flag_name(name)}", bool in choices(field.annotation)[0]
    if is_switch:
        names += f"/--no-{flag_name(name)}"
    # Rich takes square brackets for markup.
    text = help_of(field).replace("[", "\\[")
    panel = None if not more else SWITCHES if is_switch else MORE
    metavar = None if is_switch else _metavar(field.annotation)
    option = typer.Option(names, help=text, metavar=metavar, rich_help_panel=panel)
    return _parameter(name, Annotated[bool | None if is_switch else str | None, option])


def _reader(parameter: inspect.Parameter) -> Callable[[str], Any] | None:
    """What reads the value of a command's own parameter."""
    if get_origin(parameter.annotation) is not Annotated:
        return None
    kind, *notes = get_args(parameter.annotation)
    kinds = choices(kind)[0] | {inner for part in (kind, *get_args(kind)) for inner in get_args(part)}
    return local_path if Path in kinds else next((note for note in notes if inspect.isfunction(note)), None)


def _read(reader: Callable[[str], Any] | None, value: Any) -> Any:
    """A value, or each of several, read; what was not given stays so."""
    if reader is None or value is None:
        return value
    return [reader(item) for item in value] if isinstance(value, list) else reader(value)


def _parameter(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _metavar(annotation: Any) -> str:
    kinds, words = choices(annotation)
    if Path in kinds:
        return "PATH"
    if dict in kinds or dict in {get_origin(item) for part in get_args(annotation) for item in get_args(part)}:
        return "YAML"
    letters = ((tuple, "A,B,..."), (int, "N"), (float, "X"), (str, "TEXT"))
    return "|".join([*map(str, words), *[letter for kind, letter in letters if kind in kinds][:1]])


def _shown(default: Any) -> str | None:
    """A default as it could be typed; None where the docstring says what happens without."""
    if default is None:
        return None
    if isinstance(default, bool):
        return "on" if default else "off"
    if isinstance(default, tuple):
        return ", ".join(map(str, default))
    if isinstance(default, int) and default >= 1_000_000 and default % 1_000_000 == 0:
        return f"{default // 1_000_000}M"
    return str(default)
