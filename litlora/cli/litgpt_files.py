"""Config files of Lit-GPT: which command prepares the data that they name, and keys that have no counterpart here."""

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from litlora.cli.settings import Given, join
from litlora.errors import LitLoraError, UsageError

DATA = "data"
REASONS = {
    "access_token": "is given to litlora download, which fetches the checkpoint first",
    "log": "has no effect here: metrics go to metrics.csv",
    "train.max_tokens": "limits pre-training only: use max_steps or epochs",
    "train.tie_embeddings": "has no effect: the checkpoint's config.json decides",
}
"""Keys that a file may have as null, and the reason that is reported for any other value."""
KEYS = (DATA, *REASONS)
VALUES = {"eval.evaluate_example": {"first": "0"}}
"""Values of settings that have another name here."""
HINTS = {
    "eval.evaluate_example": {"random": "give a row of the validation split, such as 0"},
    "devices": {"auto": "give the number of devices, such as 1"},
}
"""Values of settings that have no counterpart, and what to do."""
TO_SETTINGS = ("mask_prompt", "prompt_style")
"""The init_args of a data module that are settings of finetune_lora."""
TO_FLAGS = {
    "json_path": "--source",
    "download_dir": "--destination_path",
    "val_split_fraction": "--val_split_fraction",
    "seed": "--seed",
    "include_multiturn_conversations": "--include_multiturn_conversations",
}
"""The init_args that are flags of a prepare command."""
WITHOUT_EFFECT = ("ignore_index", "num_workers")
GPT4 = "https://raw.githubusercontent.com/Instruction-Tuning-with-GPT-4/GPT-4-LLM/main/data/alpaca_gpt4_data.json"
MODULES: dict[str, tuple[str, dict[str, Any]]] = {
    "Alpaca": ("prepare_alpaca", {"--destination_path": "data/alpaca"}),
    "Alpaca2k": ("prepare_json", {"--source": "mhenrichsen/alpaca_2k_test", "--destination_path": "data/alpaca2k"}),
    "AlpacaGPT4": ("prepare_alpaca", {"--source": GPT4, "--destination_path": "data/alpacagpt4"}),
    "JSON": ("prepare_json", {"--destination_path": "data/json"}),
    "LIMA": ("prepare_lima", {"--destination_path": "data/lima"}),
}
"""Data modules of Lit-GPT by name: the command that prepares the same rows, and its flags."""
OTHER = ("prepare_json", {"--source": "FILE", "--destination_path": "data/mine"})


@dataclass(frozen=True)
class DataBlock:
    """The data block of a file."""

    source: str
    """File, line and key."""
    module: str
    init_args: Mapping[str, Any]

    @property
    def flags(self) -> dict[str, Any]:
        """The flags of the prepare command."""
        given = {flag: self.init_args.get(name) for name, flag in TO_FLAGS.items()}
        return MODULES.get(self.module, OTHER)[1] | {flag: value for flag, value in given.items() if value is not None}

    @property
    def command(self) -> str:
        """The command line that prepares the rows."""
        words = [word for flag, value in self.flags.items() for word in (flag, _text(value))]
        return shlex.join(["litlora", MODULES.get(self.module, OTHER)[0], *words])

    @property
    def folder(self) -> Path:
        """The folder that the command writes."""
        return Path(self.flags["--destination_path"])

    @property
    def left_out(self) -> str:
        """The report of the keys that have no effect here."""
        names = [name for name in WITHOUT_EFFECT if name in self.init_args]
        return f"; {join(names, 'and')} {'has' if len(names) == 1 else 'have'} no effect here" if names else ""

    def settings(self) -> Iterator[tuple[str, Given]]:
        """Yield the settings that the block gives."""
        for name in TO_SETTINGS:
            if self.init_args.get(name) is not None:
                yield name, Given(f"{self.source}.init_args.{name}", _text(self.init_args[name]))


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def translate(given: Mapping[str, Given], *, prepared: bool) -> tuple[dict[str, Given], list[str]]:
    """Return what is given as litlora's settings, and a note on what is replaced.

    `prepared` refuses a data block whose rows are not prepared yet, unless --data_dir replaces it.
    """
    own = {name: _translated(name, value) for name, value in given.items() if name not in KEYS}
    for name, reason in REASONS.items():
        if name in given and given[name].value is not None:
            raise UsageError(f"{given[name].source} {reason}")
    if DATA not in given or given[DATA].value is None:
        return own, []
    block = _read(given[DATA])
    data_dir = own.get("data_dir", Given(block.source, str(block.folder)))
    if prepared and "data_dir" not in own and not (block.folder / "train.jsonl").is_file():
        raise LitLoraError(f"{block.source} ({block.module}) needs its rows prepared first: {block.command}")
    origin = "instead of the rows of" if "data_dir" in own else "prepared by"
    note = f"{block.source} ({block.module}): rows are read from {data_dir.value}, {origin}: {block.command}"
    return dict(block.settings()) | own | {"data_dir": data_dir}, [note + block.left_out]


def _translated(name: str, given: Given) -> Given:
    """Return a value of a setting as it is called here."""
    if not isinstance(given.value, str):
        return given
    if hint := HINTS.get(name, {}).get(given.value):
        raise UsageError(f"{given.source} ({given.value}) is not supported: {hint}")
    return Given(given.source, VALUES.get(name, {}).get(given.value, given.value))


def _read(given: Given) -> DataBlock:
    value = given.value if isinstance(given.value, dict) else {"class_path": given.value}
    init_args = value.get("init_args") or {}
    if not isinstance(value.get("class_path"), str) or not isinstance(init_args, dict):
        raise UsageError(f"{given.source} must be a data module of Lit-GPT: class_path and init_args")
    if unknown := [name for name in init_args if name not in (*TO_SETTINGS, *TO_FLAGS, *WITHOUT_EFFECT)]:
        raise UsageError(f"{given.source}.init_args: unrecognized {join(unknown, 'and')}")
    return DataBlock(given.source, value["class_path"].rpartition(".")[2], init_args)
