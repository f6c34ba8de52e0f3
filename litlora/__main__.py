"""The command table; a user's mistake becomes one line on stderr and exit 1."""

import importlib
import sys
from collections.abc import Sequence

from jsonargparse import ArgumentParser, set_parsing_settings

from litlora import __version__, args
from litlora.errors import LitLoraError
from litlora.flags import in_order

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
    """Run a command and return its exit code: 0 done, 1 a user's mistake; the parser itself exits with 2."""
    try:
        run(sys.argv[1:] if arguments is None else arguments)
    except LitLoraError as error:
        sys.stderr.write(f"litlora: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("litlora: stopped\n")
        return 130
    return 0


def run(arguments: Sequence[str]) -> None:
    """Parse the arguments and call the command, whose module is imported only now: --help need not wait for torch."""
    parser = build_parser()
    parsed = parser.parse_args(in_order(arguments))
    name = parsed.command
    settings = parser.instantiate(parsed)[name].as_dict()
    settings.pop("config")
    command = getattr(importlib.import_module(f"litlora.commands.{name}"), name)
    command(COMMANDS[name](**settings))


def build_parser() -> ArgumentParser:
    """Build the parser of all commands from the dataclasses of their arguments."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog="litlora",
        version=__version__,
        description="Fine-tune language models with LoRA, from and to the Hub's formats.",
    )
    subcommands = parser.add_subcommands(dest="command", required=True)
    for name, kind in COMMANDS.items():
        summary = (kind.__doc__ or "").strip()
        command = ArgumentParser(description=summary)
        command.add_argument("--config", action="config", help="YAML file of these settings; a flag beats the file")
        command.add_class_arguments(kind, as_group=False)
        subcommands.add_subcommand(name, command, help=summary)
    return parser


if __name__ == "__main__":
    sys.exit(main())
