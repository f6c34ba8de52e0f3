"""The command table; a user's mistake becomes one line on stderr and exit 1."""

import importlib
import re
import sys
from collections.abc import Collection, Sequence
from dataclasses import fields, is_dataclass
from types import NoneType
from typing import Any, NoReturn, get_args

from jsonargparse import ArgumentParser, Namespace, set_parsing_settings
from jsonargparse.typing import SecretStr

from litlora import __version__, args
from litlora.cli import in_order
from litlora.cpu.allocator import restart_without_crumbs
from litlora.distributed.launcher import heed_srun, must_start, start
from litlora.errors import EndedElsewhereError, LitLoraError, is_shortage

COMMANDS: dict[str, type] = {
    "download": args.DownloadArgs,
    "prepare_alpaca": args.PrepareAlpacaArgs,
    "prepare_lima": args.PrepareLimaArgs,
    "prepare_json": args.PrepareJsonArgs,
    "finetune_lora": args.FinetuneLoraArgs,
    "generate": args.GenerateArgs,
    "merge_lora": args.MergeLoraArgs,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0 done, 1 a user's mistake, others of a run that was told to stop.

    The parser itself exits with 2.
    """
    if arguments is None and "finetune_lora" in sys.argv:
        restart_without_crumbs()
    code, sentence = attempt(sys.argv[1:] if arguments is None else arguments)
    if sentence is not None:
        say(sentence)
    return code


def attempt(arguments: Sequence[str]) -> tuple[int, str | None]:
    """Run a command, and return its exit code and the sentence that is to be said, if any."""
    try:
        return run(arguments), None
    except EndedElsewhereError as error:
        return error.exit_code, None
    except LitLoraError as error:
        return error.exit_code, str(error)
    except OSError as error:  # a name that no system call takes, a file that may not be read
        if error.filename is None:
            raise
        return 1, f"{error.filename} cannot be read or written: {error.strerror}"
    except (MemoryError, RuntimeError) as error:
        if not is_shortage(error):
            raise
        hint = "free some, or take a smaller checkpoint"
        return 1, f"there is too little memory for what this command has to hold: {hint}"
    except KeyboardInterrupt:
        return 130, "stopped"


def say(sentence: str) -> None:
    """Say what is wrong, in one line whatever the names that a file brought into it hold."""
    printable = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in sentence)
    sys.stderr.write(f"litlora: {printable}\n")


def run(arguments: Sequence[str]) -> int:
    """Parse the arguments, call the command and return its exit code.

    Its module is imported only now: neither --help nor the process that starts others need wait for torch.
    """
    parser = build_parser(COMMANDS.keys() & set(arguments))
    parsed = parser.parse_args(in_order(arguments))
    name = parsed.command
    refuse_what_slips_through(parser, COMMANDS[name], parsed[name])
    settings = parser.instantiate(parsed)[name].as_dict()
    settings.pop("config")
    options = COMMANDS[name](**settings)
    if isinstance(options, args.FinetuneLoraArgs):
        heed_srun()
        if must_start(options.devices, options.num_nodes, options.dry_run):
            entry = importlib.import_module("litlora.__main__").attempt  # as another process finds it
            return start(entry, arguments, options.devices)
    command = getattr(importlib.import_module(f"litlora.commands.{name}"), name)
    command(options)
    return 0


def refuse_what_slips_through(parser: ArgumentParser, kind: Any, settings: Namespace, prefix: str = "--") -> None:
    """Refuse what the parser takes from a file: null for any setting, any value for a group of them or for a secret."""
    for field in fields(kind):
        flag, value = prefix + field.name, settings[field.name]
        if is_dataclass(field.type):
            if not isinstance(value, Namespace):
                parser.error(f"{flag} holds settings of its own and cannot be {value}")
            refuse_what_slips_through(parser, field.type, value, f"{flag}.")
        elif value is None and NoneType not in get_args(field.type):
            parser.error(f"{flag} cannot be null")
        elif isinstance(value, SecretStr) and not isinstance(value.get_secret_value(), str):
            parser.error(f"{flag} must be a text")


class Parser(ArgumentParser):
    """A parser that says a mistake in one line, where jsonargparse writes a page of all flags first."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Say what is wrong with the command line or its YAML file, and exit with 2."""
        wrong_type = re.fullmatch(r'Parser key "(.+?)":.*(?:Got|Given) value: (.*)', message, re.DOTALL)
        if wrong_type:
            message = "--{} cannot be {}".format(*wrong_type.groups())
        message = re.sub(rf"\b({'|'.join(COMMANDS)})\.", "--", " ".join(message.split()))
        message = re.sub("hf_[A-Za-z0-9]{10,}", "hf_...", message)  # a token after a misspelt flag
        command = getattr(ex, "subcommand_parser", self).prog.replace(" [options]", "")
        say(f"{message}; see {command} --help")
        sys.exit(2)


def build_parser(commands: Collection[str] = COMMANDS.keys()) -> ArgumentParser:
    """Build the parser from the dataclasses of the commands' arguments, which take a while: only of these commands."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = Parser(
        prog="litlora",
        allow_abbrev=False,
        version=__version__,
        description="Fine-tune language models with LoRA, from and to the Hub's formats.",
    )
    subcommands = parser.add_subcommands(dest="command", required=True)
    for name, kind in COMMANDS.items():
        summary = (kind.__doc__ or "").strip()
        command = Parser(description=summary)
        if name in commands:
            command.add_argument("--config", action="config", help="YAML file of these settings; a flag beats the file")
            command.add_class_arguments(kind, as_group=False)
        subcommands.add_subcommand(name, command, help=summary)
    return parser


if __name__ == "__main__":
    sys.exit(main())
