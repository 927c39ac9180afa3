"""Settings from a run's config.yaml, each one checked against the option of its name."""

import typing
from pathlib import Path
from typing import Any

import yaml

from support.config import Config
from support.errors import UserError, check_choice


def read_config_file(path: Path) -> dict[str, Any]:
    """The settings in a YAML file, name to value.

    Raises:
        UserError: there is no such file, it is no list of settings, or one of them is no option.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(
            f"There is no config {path}; give --config the config.yaml of a run."
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"Cannot read the config {path}: {error}; it must be a text file in UTF-8."
        ) from error
    # ValueError: a number of 5000 digits. RecursionError: brackets too deep.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is not valid YAML ({describe(error)}); write `name: value` lines."
        ) from error
    if not isinstance(values, dict):
        raise UserError(f"{path} is not a config: it must be a list of `name: value` lines.")
    types = typing.get_type_hints(Config)
    for name in map(str, values):
        try:
            check_choice(name, types, "option", listed="docs/options.md")
        except UserError as error:
            raise UserError(
                f"{path}: {error} Mend the line, or remove it if another version wrote it."
            ) from error
    return {str(k): coerce(v, types[str(k)], f"{k} in {path}") for k, v in values.items()}


def describe(error: Exception) -> str:
    """What a YAML parser says, in a few words."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        return f"line {error.problem_mark.line + 1}: {error.problem}"
    return " ".join(str(error).split()).split(";")[0]


def coerce(value: Any, kind: Any, where: str) -> Any:
    """`value` as the type of its option.

    YAML reads 1e-5 as a string, and that is the one case that is converted.
    """
    kinds = typing.get_args(kind) or (kind,)
    if typing.get_origin(kind) is list:
        if not isinstance(value, list):
            raise UserError(f"{where} is {value!r}; it must be a list.")
        return [coerce(item, kinds[0], where) for item in value]
    if value == "auto" and type(None) in kinds and str not in kinds:
        return None
    if (value is None and type(None) in kinds) or type(value) in kinds:
        return value
    if float in kinds and isinstance(value, int | str) and not isinstance(value, bool):
        try:
            return float(value)
        except (ValueError, OverflowError):
            pass
    raise UserError(f"{where} is {value!r}; it must be of type {kinds[0].__name__}.")
