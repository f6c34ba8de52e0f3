"""The entry point: parse, dispatch, and print an error as one line on stderr."""

import importlib
import sys
from collections.abc import Sequence

from litlora.args import FinetuneLoraArgs
from litlora.cli.parser import parse
from litlora.cpu.allocator import restart_without_crumbs
from litlora.distributed.launcher import heed_srun, must_start, start
from litlora.errors import EndedElsewhereError, LitLoraError, is_shortage
from litlora.utils.console import log_error, output


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    0: success, 1: a user's mistake or a failed run, 2: an unknown flag or key, others: a run that was told to stop.
    """
    if arguments is None and "finetune_lora" in sys.argv:
        restart_without_crumbs()
    code, sentence = attempt(sys.argv[1:] if arguments is None else arguments)
    if sentence is not None:
        log_error(sentence)
    return code


def attempt(arguments: Sequence[str]) -> tuple[int, str | None]:
    """Run a command, and return its exit code and the error that is to be printed, if any."""
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
        return 1, "out of memory: free some, or choose a smaller checkpoint"
    except KeyboardInterrupt:
        return 130, "stopped"


def run(arguments: Sequence[str]) -> int:
    """Parse the arguments, call the command and return its exit code.

    The command's module is imported only then: neither --help nor the process that starts others needs torch.
    """
    call = parse(arguments)
    if isinstance(call, str):
        output(call)
        return 0
    if isinstance(call.args, FinetuneLoraArgs):
        heed_srun()
        if must_start(call.args.devices, call.args.num_nodes, call.args.dry_run):
            entry = importlib.import_module("litlora.__main__").attempt  # as another process finds it
            return start(entry, arguments, call.args.devices)
    command = getattr(importlib.import_module(f"litlora.commands.{call.command}"), call.command)
    command(call.args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
