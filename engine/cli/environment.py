"""Values of flags from elsewhere: environment variables, and the file that ``--config`` names.

Every flag has a variable, ``--max-model-len`` has HAAST_MAX_MODEL_LEN; an empty one counts as not set. A
config file is YAML whose keys are flags without their dashes:

    model: mistralai/Mistral-Small-4-119B-2603
    max-model-len: 65536                # or max_model_len
    api-key: [one, two]                 # a flag that may be repeated, or takes several values
    enforce-eager: true                 # a flag without a value
    speculative-config: {num_speculative_tokens: 3, method: eagle}

A flag of the command line wins over its variable, the variable over the file, the file over the default.
What is found becomes words behind those of the command line, so values are read and refused as if typed.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from engine.errors import ConfigError

PREFIX: Final = "HAAST_"
CONFIG_FLAG: Final = "--config"
SECRET: Final = ("--api-key", "--header")  # flags whose values are never shown
_NO_FLAGS: Final = ("HAAST_CPU_KERNELS",)  # of ours, but of no verb
_TAKES_JSON: Final = ("JSON", "VALUE")  # metavars of flags whose value may be an object; VALUE is foreign
_FALSE: Final = ("0", "false", "no", "off")
_TRUE: Final = ("1", "true", "yes", "on")


@dataclass(frozen=True, slots=True)
class Setting:
    """A flag's value that was not typed. source: the variable, or the file and its key."""

    action: argparse.Action
    words: tuple[str, ...]
    source: str


class Switch(argparse.Action):
    """A flag with two positions: its own names turn it on, those of ``off`` turn it off."""

    def __init__(self, option_strings: Sequence[str], dest: str, off: Sequence[str], **kwargs: Any) -> None:
        super().__init__([*option_strings, *off], dest, nargs=0, **kwargs)
        self._off = tuple(off)

    def name_of(self, value: bool) -> str:
        """The flag that stands for a value."""
        return self.option_strings[0] if value else self._off[0]

    def opposite(self, flag: str) -> str:
        """The flag that says the contrary of one."""
        return self.name_of(flag in self._off)

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, option_string not in self._off)


def flag_of(action: argparse.Action) -> str | None:
    """A flag's first long name, by which it is called in messages, variables and files."""
    return next((option for option in action.option_strings if option.startswith("--")), None)


def variable_of(action: argparse.Action) -> str | None:
    """The environment variable of a flag; None for ``--help`` and what is no flag."""
    flag = flag_of(action)
    if flag is None or flag == "--help":
        return None
    return PREFIX + flag.removeprefix("--").replace("-", "_").upper()


def unknown_variables(known: Iterable[str]) -> list[str]:
    """A warning for each HAAST_ variable that is set and belongs to none of the known names, with the nearest
    of them: it was meant for something."""
    names = sorted(known)
    warnings = []
    for name in sorted(os.environ):
        if name.startswith(PREFIX) and name not in (*names, *_NO_FLAGS):
            close = nearest(name.removeprefix(PREFIX), [one.removeprefix(PREFIX) for one in names])
            hint = f"; did you mean {PREFIX}{close}?" if close else ""
            warnings.append(f"the environment variable {name} is no flag's here{hint}")
    return warnings


def typed_actions(words: Sequence[str], options: Mapping[str, argparse.Action]) -> set[argparse.Action]:
    """The flags that a command line names. options: by every spelling."""
    found = set()
    for word in _before_dashes(words):
        name = word.partition("=")[0]
        action = options.get(name) or (None if word.startswith("--") else options.get(word[:2]))
        if action is not None:
            found.add(action)
    return found


def settings(words: Sequence[str], options: Mapping[str, argparse.Action]) -> list[Setting]:
    """What variables and the config file say about the flags that a command line does not name.

    options: all flags by every spelling. Raises ConfigError.
    """
    typed = typed_actions(words, options)
    named: dict[argparse.Action, Setting] = {}
    if CONFIG_FLAG in options:
        value = _last_value(words, CONFIG_FLAG)
        path = os.environ.get(PREFIX + "CONFIG") if value is None else value
        if path:
            named = {setting.action: setting for setting in _from_file(Path(path), options)}
    for action in dict.fromkeys(options.values()):
        variable = variable_of(action)
        text = None if variable is None else os.environ.get(variable)
        if variable is not None and text:
            flag = flag_of(action)
            assert flag is not None
            named[action] = Setting(action, _words(action, flag, text, variable), variable)
    return [setting for action, setting in named.items() if action not in typed]


def with_words(words: Sequence[str], more: Sequence[Setting]) -> list[str]:
    """A command line with settings behind its flags, but before a ``--``."""
    before = _before_dashes(words)
    return [*before, *(word for setting in more for word in setting.words), *words[len(before) :]]


def with_hyphens(words: Sequence[str], options: Mapping[str, argparse.Action]) -> list[str]:
    """A command line with flags spelled as we do: ``--max_model_len=8`` becomes ``--max-model-len=8``.

    Only known flags are touched, so a value keeps its underscores even if it begins with dashes.
    """
    before = _before_dashes(words)
    spelled = []
    for word in before:
        name, equals, value = word.partition("=")
        flag = name.replace("_", "-")
        spelled.append(flag + equals + value if name.startswith("--") and flag in options else word)
    return [*spelled, *words[len(before) :]]


def nearest(word: str, known: Sequence[str]) -> str | None:
    """The known name that is most like a word, if one is like it."""
    return next(iter(difflib.get_close_matches(word, known, n=1, cutoff=0.5)), None)


def _before_dashes(words: Sequence[str]) -> list[str]:
    """Words up to a ``--``, behind which nothing is a flag."""
    return list(words[: words.index("--")] if "--" in words else words)


def _last_value(words: Sequence[str], flag: str) -> str | None:
    found = None
    typed = _before_dashes(words)
    for index, word in enumerate(typed):
        name, equals, value = word.partition("=")
        if name == flag:
            found = value if equals else next(iter(typed[index + 1 : index + 2]), None)
    return found


def _from_file(path: Path, options: Mapping[str, argparse.Action]) -> Iterator[Setting]:
    keys: dict[argparse.Action, object] = {}
    for key, value in _read(path).items():
        source = f"{path}: {key}"
        flag = f"--{key}".replace("_", "-")
        action = options.get(flag)
        if action is None or flag in (CONFIG_FLAG, "--help"):
            known = [option.removeprefix("--") for option in options if option.startswith("--")]
            close = nearest(str(key).replace("_", "-"), known)
            raise ConfigError(
                f"{source} is not a flag that a file may set" + (f"; did you mean {close}?" if close else "")
            )
        if action in keys:
            raise ConfigError(
                f"--config {path}: found {keys[action]} and {key}, expected one of them: both set "
                f"{flag_of(action)}"
            )
        keys[action] = key
        yield Setting(action, _words(action, flag, value, source), source)


def _read(path: Path) -> dict[Any, Any]:
    import yaml  # here, because most command lines name no file

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"--config {path}: cannot be read as YAML: {_reason(error)}") from None
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise ConfigError(f"--config {path}: found a {type(found).__name__}, expected flags and their values")
    return found


def _reason(error: Exception) -> str:
    """Why a file cannot be read. Not a word of the file is in it, for the file may hold keys."""
    import yaml

    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start} is not UTF-8"
    if not isinstance(error, yaml.MarkedYAMLError):
        return "a character, number or date that is none, or lists too deep"
    said = "an alias, tag, key or second document that is not understood"  # whose own words quote the file
    if isinstance(error, yaml.parser.ParserError):
        said = error.context or "no end of the value before"
    elif isinstance(error, yaml.scanner.ScannerError):
        said = " ".join(filter(None, (error.context, error.problem)))
    mark = error.problem_mark
    return said if mark is None else f"{said}, line {mark.line + 1}, column {mark.column + 1}"


def _words(action: argparse.Action, flag: str, value: object, source: str) -> tuple[str, ...]:
    """A value as words of a command line. Raises ConfigError naming the source."""
    if action.nargs == 0:
        text = str(value).strip().lower()
        if text not in (*_TRUE, *_FALSE):
            raise ConfigError(f"{source} is {value!r:.80}, expected true or false")
        if text in _TRUE:
            return (flag,)
        return (action.opposite(flag),) if isinstance(action, Switch) else ()
    items = value if isinstance(value, list) else [value]
    if not items:
        raise ConfigError(f"{source} is an empty list, expected a value")
    if len(items) != 1 and not (action.nargs in ("+", "*") or isinstance(action, argparse._AppendAction)):
        raise ConfigError(f"{source} is {value!r:.80}, expected one value")
    texts = [_text(action, item, source) for item in items]
    if action.nargs in ("+", "*"):
        return (flag, *(texts if isinstance(value, list) else texts[0].split()))
    return tuple(f"{flag}={text}" for text in texts)


def _text(action: argparse.Action, value: object, source: str) -> str:
    if isinstance(value, str):
        return value
    if flag_of(action) in SECRET:  # a number would not be what is written: 0123 is read as 83
        raise ConfigError(f"{source}: found a {type(value).__name__}, expected a text in quotes")
    if isinstance(value, dict) and action.metavar in _TAKES_JSON:
        try:
            return json.dumps(value)
        except (TypeError, ValueError, RecursionError) as error:
            raise ConfigError(f"{source}: cannot be written as JSON: {error}") from error
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{source} is {value!r:.80}, expected a number or a text; texts may need quotes")
    return str(value)
