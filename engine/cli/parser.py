"""The parser of every verb: argparse, but strict about names, open about sources and brief in its help.

- A flag may be written with underscores, never abbreviated; for an unknown one the nearest is suggested.
- Flags that are not typed may come from the environment or a file, see ``engine.cli.environment``; which
  did is in ``given`` of the result, the names of all variables are in ``known_variables``.
- A mistake is one line on stderr and exit code 2.
- ``--help`` has a line for each flag, ``--help=all`` every word about it and the name of its variable.
"""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, NoReturn

from engine.cli.environment import (
    SECRET,
    Setting,
    Switch,
    flag_of,
    nearest,
    settings,
    typed_actions,
    variable_of,
    with_hyphens,
    with_words,
)
from engine.errors import ConfigError

FOREIGN_GROUP: Final = "flags of vLLM and SGLang"  # only in --help=all
_HELP_ALL: Final = "--help=all"
_WIDTH: Final = 110
_FLAG_WIDTH: Final = 33


@dataclass(frozen=True, slots=True)
class Given:
    """A flag whose value is not the default. source: "flag", its variable, or the file and its key."""

    flag: str
    value: str  # as it could be typed; of secrets only stars
    source: str

    def __str__(self) -> str:
        return f"{self.flag}{' ' if self.value else ''}{self.value} ({self.source})"


class Parser(argparse.ArgumentParser):
    """See the module. The result has ``given``, a tuple of Given."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs | {"allow_abbrev": False, "formatter_class": _Formatter})
        self._settings: list[Setting] = []

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]  # typeshed overloads it
        """As in argparse, but unknown flags end here, where the flags of this verb are known."""
        options = self._option_string_actions
        words = with_hyphens(sys.argv[1:] if args is None else list(args), options)
        if _HELP_ALL in words and (self._subparsers is None or words[0] == _HELP_ALL):
            sys.stdout.write(super().format_help())
            self.exit()
        try:  # but help is given whatever variables and files say
            asks_help = options.get("--help") in typed_actions(words, options)
            self._settings = [] if asks_help else settings(words, options)
        except ConfigError as error:
            self.error(str(error))
        parsed, unknown = super().parse_known_args(with_words(words, self._settings), namespace)
        for word in unknown:
            if word.startswith("-"):
                name = word.partition("=")[0]  # its value may be a key
                self.error(f"unknown flag {name}{self._nearest(name)}")
        variables = map(variable_of, self._actions)
        parsed.known_variables = {variable for variable in variables if variable is not None}
        parsed.given = (*getattr(parsed, "given", ()), *self._given(words, parsed))
        return parsed, unknown

    def error(self, message: str) -> NoReturn:
        """One line on stderr, which says so if the value was not typed; exit code 2."""
        for setting in self._settings:
            spellings = setting.action.option_strings
            said = (f"{flag}{end}" for flag in spellings for end in (" ", ":"))
            if message.startswith((f"argument {'/'.join(spellings)}:", *said)):
                message += f" (from {setting.source})"
        self.exit(2, f"{self.prog}: error: {message}\n")

    def format_help(self) -> str:
        """The short help."""
        if self._subparsers is not None:
            return super().format_help()
        names = [_metavar(action) for action in self._get_positional_actions()]
        lines = [f"usage: {' '.join([self.prog, *names, '[flags]'])}", ""]
        if self.description:
            lines += [*textwrap.wrap(self.description, _WIDTH), ""]
        for group in self._action_groups:
            shown = [
                action
                for action in group._group_actions
                if action.help != argparse.SUPPRESS and flag_of(action) != "--help"
            ]
            if shown and group.title != FOREIGN_GROUP:
                lines += [f"{group.title}:", *map(_short_line, shown)]
        lines += ["", f"{self.prog} {_HELP_ALL}: every flag in full, with its environment variable"]
        return "\n".join(lines) + "\n"

    def _given(self, words: Sequence[str], parsed: argparse.Namespace) -> list[Given]:
        sources = {setting.action: setting.source for setting in self._settings if setting.words}
        sources |= dict.fromkeys(typed_actions(words, self._option_string_actions), "flag")
        given = []
        for action in dict.fromkeys(self._option_string_actions.values()):
            flag, value = flag_of(action), getattr(parsed, action.dest, None)
            if action in sources and flag is not None and value != action.default:
                named = action.name_of(bool(value)) if isinstance(action, Switch) else flag
                given.append(Given(named, _spoken(flag, value), sources[action]))
        return given

    def _nearest(self, name: str) -> str:
        flag = name.replace("_", "-")
        known = [
            option
            for action in self._actions
            if action.help != argparse.SUPPRESS
            for option in action.option_strings
        ]
        close = nearest(flag, known)
        return f"; did you mean {close}?" if close else f"; see {self.prog} --help"


class _Formatter(argparse.HelpFormatter):
    """Of the long help: shows defaults where there is one to show, and variables."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=_FLAG_WIDTH, width=_WIDTH)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        variable = variable_of(action)
        return f"{action.help or ''}{_default(action)}{f' [{variable}]' if variable else ''}"


def _default(action: argparse.Action) -> str:
    """What to say about a flag's default, if it is worth saying."""
    if action.default in (None, argparse.SUPPRESS) or isinstance(action.default, bool) or action.nargs == 0:
        return ""
    return " (%(default)s)"


def _short_line(action: argparse.Action) -> str:
    """A flag or an argument in one line: its name and the beginning of its help."""
    flag = flag_of(action)
    name = f"{flag or ''} {_metavar(action)}".strip()
    about = re.split(r"; | \(", action.help or "")[0] + _default(action)
    what = about % {**vars(action), "prog": ""}
    what = textwrap.shorten(what, _WIDTH - _FLAG_WIDTH, placeholder=" ...")
    return f"  {name:<{_FLAG_WIDTH - 2}}{what}" if len(name) < _FLAG_WIDTH - 2 else f"  {name}  {what}"


def _metavar(action: argparse.Action) -> str:
    if action.nargs == 0:
        return ""
    if action.choices is not None and action.metavar is None:
        listed = f"{{{','.join(map(str, action.choices))}}}"
        return listed if len(listed) < 20 else action.dest.upper()
    name = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
    return f"[{name}]" if action.nargs == "?" else name


def _spoken(flag: str, value: object) -> str:
    if flag in SECRET:
        return "***"
    if value is None or isinstance(value, bool):
        return ""
    items = value if isinstance(value, list | tuple) else [value]
    return " ".join(" ".join(str(item).split()) for item in items)
