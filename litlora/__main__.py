"""The entry point: parse, dispatch, and print an error as one line on stderr."""

import importlib
import os
import sys
from collections.abc import Sequence

from litlora import __version__
from litlora.args import FinetuneLoraArgs, GenerateArgs, MergeLoraArgs
from litlora.cli.parser import Call, parse
from litlora.distributed.launcher import (
    adopt_srun_variables,
    follow_launcher,
    is_launched,
    launch,
    let_threads_sleep,
    processes_to_launch,
    report_to_launcher,
)
from litlora.errors import EndedElsewhereError, LitLoraError, is_shortage
from litlora.utils.console import log, log_error, output


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    0: success, 1: a user's mistake or a failed run, 2: an unknown flag or key, others: a run that was told to stop.
    Arguments that a Python program gives are run in its process.
    """
    follow_launcher()
    code, sentence = attempt(arguments)
    if sentence is not None and not report_to_launcher(sentence, code):
        log_error(sentence)
    return code


def attempt(arguments: Sequence[str] | None) -> tuple[int, str | None]:
    """Run a command, and return its exit code and the error to print, if any."""
    try:
        return run(sys.argv[1:] if arguments is None else arguments, in_process=arguments is not None), None
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


def run(arguments: Sequence[str], *, in_process: bool = True) -> int:
    """Parse the arguments, call the command and return its exit code.

    The command's module is imported only then: neither --help nor the process that starts others needs torch.
    """
    call = parse(arguments)
    if isinstance(call, str):
        output(call)
        return 0
    if isinstance(call.args, FinetuneLoraArgs):
        adopt_srun_variables()
    if "torch" not in sys.modules and not is_launched():  # otherwise the command's own checks are as quick
        prepare_to_import(call)
    if isinstance(call.args, FinetuneLoraArgs):
        devices, nodes, dry_run = call.args.devices, call.args.num_nodes, call.args.dry_run
        if count := processes_to_launch(devices, nodes, dry_run=dry_run, in_process=in_process):
            same = ["-m", "litlora", *arguments] if in_process else sys.orig_argv[1:]
            return launch([sys.executable, *same], count)
    let_threads_sleep()
    command = getattr(importlib.import_module(f"litlora.commands.{call.command}"), call.command)
    command(call.args)
    if os.environ.get("RANK", "0") == "0":
        for line in importlib.import_module("litlora.commands.next_steps").next_steps(call.args):
            log(f"next: {line}")
    return 0


def prepare_to_import(call: Call) -> None:
    """Refuse what can be refused without torch, and report that it is being imported."""
    checks = importlib.import_module("litlora.commands.early_checks")
    checks.check_early(call.args)
    if isinstance(call.args, FinetuneLoraArgs | GenerateArgs | MergeLoraArgs):
        log(f"litlora {__version__}: {call.command}, loading torch ...")
    checks.check_rows(call.args)


if __name__ == "__main__":
    sys.exit(main())
