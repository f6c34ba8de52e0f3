"""YAML files of settings: read with the line of every key, and refused where YAML would accept a slip silently."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from litlora.cli.settings import Given
from litlora.cli.suggestions import near_key
from litlora.errors import LitLoraError, UsageError
from litlora.utils.files import YAML_ERRORS, yaml_nodes

NULL = "tag:yaml.org,2002:null"
FLOAT = re.compile(r"[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$")  # YAML 1.1 reads 1e-3 as a text


class Loader(yaml.SafeLoader):
    """A safe loader that reads 1e-3 as a number."""


Loader.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789"))


def parse_value(text: str) -> Any:
    """Return what YAML reads in a value of the command line: 1e-3 is a number, False is no text."""
    try:
        return yaml.load(text, Loader)
    except YAML_ERRORS:
        return text


@dataclass(frozen=True)
class Schema:
    """The names that a YAML file may hold: those of settings, of sections with settings of their own, and of others."""

    settings: Iterable[str]
    sections: Sequence[str] = field(default_factory=list)
    foreign: Sequence[str] = ()
    """Keys of another tool's files, which are translated."""


def read_config(source: str, path: str, schema: Schema, section: str = "") -> dict[str, Given]:
    """Read a YAML file of all settings, or of those of one section."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise LitLoraError(f"{source} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise LitLoraError(f"{source} is not valid YAML: {error}") from error
    return read_text(source, text, schema, section)


def read_text(source: str, text: str, schema: Schema, section: str = "") -> dict[str, Given]:
    """Read YAML of all settings, or of those of one section."""
    try:
        loader = Loader(text)
        root = loader.get_single_node()
        _check_values(source, root)
        return dict(_Reader(source, loader, schema).read(root, f"{section}." if section else ""))
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        reason = ", ".join(filter(None, [error.context, error.problem]))
        raise LitLoraError(f"{source} line {line} is not valid YAML: {reason}") from error
    except YAML_ERRORS as error:
        raise LitLoraError(f"{source} is not valid YAML: {' '.join(str(error).split())}") from error


def _check_values(source: str, root: yaml.Node | None) -> None:
    """Refuse endless aliases and repeated keys before anything is built."""
    for node in yaml_nodes(source, root):
        if isinstance(node, yaml.MappingNode):
            _refuse_repeated_keys(source, [key for key, _ in node.value])


def _refuse_repeated_keys(source: str, keys: Sequence[yaml.Node]) -> None:
    names = set()
    for key in keys:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise LitLoraError(f"{source} line {line} has a key that is not a name")
        if key.value in names:
            raise LitLoraError(f"{source} line {line} gives {key.value} a second time: remove one of them")
        names.add(key.value)


@dataclass(frozen=True)
class _Reader:
    source: str
    loader: Loader
    schema: Schema

    def read(self, node: yaml.Node | None, prefix: str) -> Iterator[tuple[str, Given]]:
        """Yield the settings of a mapping, those of its sections by dotted names."""
        if node is None or node.tag == NULL:  # an empty file or section
            return
        if not isinstance(node, yaml.MappingNode):
            if prefix:
                raise UsageError(f"{self._at(node)}: {prefix[:-1]} must hold settings of its own")
            raise UsageError(f"{self.source} must hold settings, one a line, such as NAME: VALUE")
        self.loader.flatten_mapping(node)
        for key, value in node.value:
            name = prefix + key.value
            if name in self.schema.sections:
                yield from self.read(value, f"{name}.")
            elif name in self.schema.settings or name in self.schema.foreign:
                yield name, self._given(key, value)
            else:
                near = near_key(name, self.schema.settings)
                raise UsageError(f"{self._at(key)}: unrecognized {key.value}{near and f': {near}'}")

    def _given(self, key: yaml.Node, node: yaml.Node) -> Given:
        is_text = isinstance(node, yaml.ScalarNode) and node.tag != NULL
        value = node.value if is_text else self.loader.construct_object(node, deep=True)
        return Given(f"{self._at(key)}: {key.value}", value)

    def _at(self, node: yaml.Node) -> str:
        return f"{self.source} line {node.start_mark.line + 1}"
