"""A command line: which arguments are Hydra's own options, which are overrides, and how to quote a value."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException, OverrideParseException

from sim.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Arguments:
    """The arguments of a command.

    options: Hydra's own, as typed. overrides: all others. help, multirun: whether these are among the options.
    shows: an option prints something, such as the configuration, instead of running the command.
    config_dir: a folder with more options of groups. config_name: a primary configuration other than the command's.
    quiet: ``--quiet``, which Hydra does not have, was among them: show no progress.
    """

    options: tuple[str, ...]
    overrides: tuple[str, ...]
    help: bool = False
    multirun: bool = False
    shows: bool = False
    config_dir: Path | None = None
    config_name: str | None = None
    quiet: bool = False


QUIET = "--quiet"


def read_arguments(typed: Sequence[str], *, positional: str | None = None) -> Arguments:
    """Return the arguments of a command, which may come in any order.

    Args:
        positional: the key, a list, that takes arguments without ``=``, and those that are files or folders; None
            allows none.
    Raises:
        ConfigError: for an option that Hydra does not have, or a value that it refuses.
    """
    quiet, typed = QUIET in typed, [text for text in typed if text != QUIET]
    parser = get_args_parser()
    parser.error = _refuse  # type: ignore[method-assign]
    for text in typed:  # the parser takes -policy as -p olicy
        if re.match(r"-[a-z]{2}", text, re.IGNORECASE) and text.partition("=")[0] not in parser._option_string_actions:
            _no_option(text, typed)
    known, unknown = parser.parse_known_intermixed_args(list(typed))
    if unknown:
        _no_option(unknown[0], typed)
    if known.run:  # Hydra would take it as a flag of its own and do nothing
        raise ConfigError("--run is not an option; set measure=true where a command has that key (see --help)")
    shown = (known.cfg, known.info, known.shell_completion, known.multirun)
    if sum(bool(one) for one in shown) > 1:
        raise ConfigError("--multirun, --cfg, --info and --shell-completion exclude each other; use one of them")
    if known.resolve and not known.cfg:
        raise ConfigError("--resolve belongs to --cfg; write --cfg job --resolve")
    if known.package is not None and not known.cfg:
        raise ConfigError("--package belongs to --cfg; write --cfg job --package NAME")
    folder = None
    if known.config_dir is not None and not (folder := Path(known.config_dir).absolute()).is_dir():
        raise ConfigError(f"--config-dir {known.config_dir}: no such folder; name one that holds GROUP/NAME.yaml")
    options = list(typed)
    for override in known.overrides:
        options.remove(override)
    overrides = known.overrides if positional is None else _name_positional(known.overrides, positional)
    return Arguments(
        options=tuple(options),
        overrides=tuple(overrides),
        help=known.help,
        multirun=known.multirun,
        shows=bool(known.hydra_help or known.cfg or known.info or known.shell_completion or known.experimental_rerun),
        config_dir=folder,
        config_name=known.config_name,
        quiet=quiet,
    )


def _no_option(text: str, typed: Sequence[str]) -> NoReturn:
    key, _, value = text.lstrip("-").replace("-", "_").partition("=")
    after = [one for one in typed[list(typed).index(text) + 1 :][:1] if not one.startswith("-") and "=" not in one]
    value = value or "".join(after) or "VALUE"
    raise ConfigError(
        f"there is no option {text}; a key of the configuration is written {key or 'KEY'}={value}: --help lists the "
        "keys, --hydra-help the options"
    )


def _refuse(message: str) -> NoReturn:
    raise ConfigError(f"{message}; --help shows how to call this command, --hydra-help lists the options")


def _name_positional(overrides: Sequence[str], key: str) -> list[str]:
    """Return the overrides with those that have no ``=``, or are a file or folder, collected into ``key=[...]``."""
    # os.path, because a Path raises for a text that is too long for a name.
    plain = [text for text in overrides if "=" not in text or os.path.exists(text)]  # noqa: PTH110
    others = [text for text in overrides if text not in plain]
    return [*others, f"{key}=[{','.join(map(_quoted, plain))}]"] if plain else others


def _quoted(value: str) -> str:
    """Return a value in quotes, for Hydra."""
    quote = Quote.double if '"' not in value else Quote.single
    return QuotedString(text=value, quote=quote).with_quotes()


def parse_overrides(overrides: Sequence[str], *, multirun: bool = True) -> list[Override]:
    """Return the overrides, parsed.

    Args:
        multirun: whether one key may have several values.
    Raises:
        ConfigError: for one that Hydra cannot read, with the way to quote it.
    """
    parser, found = OverridesParser.create(), []
    for text in overrides:
        try:
            override = parser.parse_override(text)
        except (OverrideParseException, HydraException) as error:
            raise ConfigError(_advice(text)) from error
        if override.is_sweep_override() and not multirun:
            key, _, value = text.partition("=")
            several = list(override.sweep_string_iterator()) if override.is_discrete_sweep() else []
            listed = shlex.quote(f"{key}=[{','.join(several)}]")
            as_list = f"write a list: {listed}, " if 0 < len(several) < 20 else ""
            raise ConfigError(
                f"{key} has several values, {value}; add --multirun to run each of them, {as_list}or quote them as one "
                f"value: {shlex.quote(f'{key}={_quoted(value)}')}"
            )
        found.append(override)
    return found


def _advice(text: str) -> str:
    """Return what to type instead of an argument that Hydra cannot read."""
    key, equals, value = text.partition("=")
    if not equals:
        return f"{text!r} is not an argument of this command; arguments are KEY=VALUE or GROUP=OPTION (see --help)"
    if not re.fullmatch(r"[+~]{0,2}[\w./@:$-]+", key):
        return f"{text!r} has no key before the '='; arguments are KEY=VALUE or GROUP=OPTION (see --help)"
    if value.startswith(("[", "{")):
        example = shlex.quote(f'{key}=[a,"b (c)"]')
        return (
            f"{key}: {value!r} is not a complete list or mapping; close its brackets, quote text with special "
            f"characters, and quote all of it for the shell, e.g. {example}"
        )
    quoted = shlex.quote(f"{key}={_quoted(value)}")
    return f"{key}: {value!r} has characters that need quotes, once for Hydra and once for the shell: {quoted}"
