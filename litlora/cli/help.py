"""The help of each command, rendered from its dataclass: attribute docstrings, types and defaults."""

import ast
import inspect
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass
from fnmatch import fnmatch
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args, get_origin

from litlora.args import COMMANDS
from litlora.args.common import GGUFPath, SecretStr
from litlora.cli.settings import Setting, sections_of, settings_of

METAVARS = {
    bool: "true|false", int: "N", float: "X", Path: "PATH", str: "TEXT", SecretStr: "TOKEN", GGUFPath: "FILE.gguf",
    dict: "{NAME: N}",
}  # fmt: skip
POSITIONALS = {"checkpoint_dir": "CHECKPOINT", "repo_id": "ORG/NAME", "runs": "RUN [RUN ...]"}
"""The settings that need no flag, and what their values are called."""
GENERAL = (
    ("--config FILE", "YAML file of these settings; a flag overrides it. May be given several times."),
    ("--print_config", "Print all settings as a YAML file, and exit."),
    ("-h, --help", "Print this help, and exit."),
)
COLUMN = 36  # where the explanations start
WIDEST = 110


def overview() -> str:
    """Return the help of litlora itself."""
    commands = [(name, summary(kind)) for name, kind in COMMANDS.items()]
    general = [("-h, --help", "Print this help, and exit."), ("--version", "Print the version, and exit.")]
    return "\n".join([
        "usage: litlora COMMAND [options]", "",
        "Fine-tune language models with LoRA, from Hub checkpoints to PEFT adapters.", "",
        *_table("commands", commands), *_table("options", general),
        *_examples([line for kind in COMMANDS.values() for line in kind.examples[:1]]),
        "", "litlora COMMAND --help explains a command and its flags.",
    ])  # fmt: skip


def command_help(command: str) -> str:
    """Return the help of one command."""
    kind = COMMANDS[command]
    flag, metavar = positional_of(command) or ("", "")
    usage = f"usage: litlora {command} [options] {metavar}".rstrip()
    docs, groups = explanations(kind), _groups(kind, flag)
    lines = [usage, "", summary(kind), ""]
    if metavar:
        name = flag.removeprefix("--")
        value = metavar_of(settings_of(kind)[name]) if is_list(command, name) else metavar
        lines += _table("argument", [(metavar, f"{docs[name]} (or {flag} {value})")])
    for title, settings in groups.items():
        lines += _table(title, [_row(setting, docs[setting.name]) for setting in settings])
    return "\n".join([*lines, *_table("general", GENERAL), *_examples(kind.examples)])


def positional_of(command: str) -> tuple[str, str] | None:
    """Return the flag that a word without one stands for, and what that word is called."""
    settings = settings_of(COMMANDS[command])
    return next(((f"--{name}", metavar) for name, metavar in POSITIONALS.items() if name in settings), None)


def is_list(command: str, name: str) -> bool:
    """Tell whether a setting takes several values, and where it needs no flag, several words."""
    return settings_of(COMMANDS[command])[name].item is not None


def summary(kind: type) -> str:
    """Return what a command does, in one sentence."""
    return (kind.__doc__ or "").strip()


def explanations(kind: Any, prefix: str = "") -> dict[str, str]:
    """Return the attribute docstrings of a command's dataclass, by the dotted names of the settings."""
    own = {prefix + name: text for base in reversed(kind.__mro__) for name, text in _attributes(base).items()}
    for name in sections_of(kind):
        own |= explanations(kind.__dataclass_fields__[name].type, f"{prefix}{name}.")
    return own


def _attributes(kind: type) -> dict[str, str]:
    return _docstrings(kind.__module__).get(kind.__name__, {}) if is_dataclass(kind) else {}


@cache
def _docstrings(module: str) -> dict[str, dict[str, str]]:
    """Return the strings that follow the attributes of each class of a module."""
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    return {node.name: dict(_pairs(node.body)) for node in tree.body if isinstance(node, ast.ClassDef)}


def _pairs(body: Sequence[ast.stmt]) -> Iterator[tuple[str, str]]:
    for statement, follower in pairwise(body):
        match statement, follower:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                yield name, " ".join(text.split())


def _groups(kind: Any, positional: str) -> dict[str, list[Setting]]:
    """Sort the settings into the groups that a command's dataclass names by patterns, the rest into the last."""
    groups: dict[str, list[Setting]] = {title: [] for title in (*kind.groups, "options")}
    for name, setting in settings_of(kind).items():
        if f"--{name}" != positional:
            titles = (title for title, patterns in kind.groups.items() if any(fnmatch(name, p) for p in patterns))
            groups[next(titles, "options")].append(setting)
    return {title: settings for title, settings in groups.items() if settings}


def _row(setting: Setting, explanation: str) -> tuple[str, str]:
    """Return a flag with the form of its value, and its explanation with the default."""
    notes = "" if setting.default in (None, ()) else f" (default: {_shown(setting.default)})"
    return f"--{setting.name} {metavar_of(setting)}", explanation + (" (required)" if setting.is_required else notes)


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def metavar_of(setting: Setting) -> str:
    """Return the form of a setting's value as a person writes it."""
    words = setting.choices
    kinds = [get_origin(kind) or kind for kind in setting.types]
    others = [METAVARS[kind] for kind in kinds if kind in METAVARS]
    if setting.item:
        words = [*get_args(setting.item)]
        return f"{{{'|'.join(words)}}},..." if words else f"{METAVARS[setting.item]},..."
    if setting.name == "optimizer":
        return "NAME"
    if others:
        return "|".join([*others[:1], *words, *others[1:]])
    return "{" + ",".join(words) + "}"


def _table(title: str, rows: Sequence[tuple[str, str]]) -> list[str]:
    width = min(shutil.get_terminal_size().columns, WIDEST)
    lines = [f"{title}:"]
    for name, text in rows:
        wrapped = textwrap.wrap(text, max(width - COLUMN, 30), break_on_hyphens=False)
        first = f"  {name:<{COLUMN - 3}} " if len(name) <= COLUMN - 3 else f"  {name}\n{' ' * COLUMN}"
        lines.append(first + f"\n{' ' * COLUMN}".join(wrapped))
    return [*lines, ""]


def _examples(commands: Sequence[str]) -> list[str]:
    return ["examples:", *(f"  {command}" for command in commands)]
