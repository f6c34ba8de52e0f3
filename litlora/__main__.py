"""The entry point: parse, dispatch, and print an error as one line on stderr."""

import errno
import importlib
import os
import sys
from collections.abc import Sequence

from litlora import __version__
from litlora.args.common import CommandArgs
from litlora.args.finetune import FinetuneLoraArgs
from litlora.cli.parser import Call, parse
from litlora.distributed.launcher import (
    adopt_srun_variables,
    find_rank_info,
    follow_launcher,
    is_launched,
    is_one_of_several,
    launch,
    let_threads_sleep,
    processes_to_launch,
    report_to_launcher,
)
from litlora.errors import EndedElsewhereError, LitLoraError, OutputClosedError, is_shortage
from litlora.utils.console import log, log_error, open_streams, output, quietly
from litlora.utils.files import require_working_directory

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ENOENT)
"""What an error says that names no file: ENOENT is of tempfile, where no folder takes a temporary file."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    0: success, 1: a user's mistake or a failed run, 2: an unknown flag or key, others: a run that was told to stop.
    Arguments that a Python program gives are run in its process.
    """
    if arguments is None:
        open_streams()
    follow_launcher()
    code, sentence = attempt(arguments)
    if sentence is not None and not report_to_launcher(sentence, code):
        log_error(sentence)
    return code


def attempt(arguments: Sequence[str] | None) -> tuple[int, str | None]:
    """Run a command, and return its exit code and the error to print, if any."""
    try:
        return run(sys.argv[1:] if arguments is None else arguments, in_process=arguments is not None), None
    except (EndedElsewhereError, OutputClosedError) as error:
        return error.exit_code, None
    except LitLoraError as error:
        return error.exit_code, str(error)
    except OSError as error:  # a name that no system call takes, a file that may not be read, a full disk
        if error.filename is None and error.errno not in DISK_ERRORS:
            raise
        return 1, f"{error.filename or 'a temporary file'} cannot be read or written: {error.strerror}"
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
    with quietly(getattr(call.args, "quiet", False)):
        return carry_out(call, arguments, in_process=in_process)


def carry_out(call: Call, arguments: Sequence[str], *, in_process: bool) -> int:
    """Call a command, in this process or in others, and return its exit code."""
    count = count_to_launch(call.args, in_process=in_process)
    already_read = start(call, count)
    if count:
        same = ["-m", "litlora", *arguments] if in_process else sys.orig_argv[1:]
        return launch([sys.executable, *same], count)
    let_threads_sleep()
    command = getattr(importlib.import_module(f"litlora.commands.{call.command}"), call.command)
    command(call.args, *already_read)
    if os.environ.get("RANK", "0") == "0":
        for line in importlib.import_module("litlora.commands.next_steps").next_steps(call.args):
            log(f"next: {line}")
    return 0


def count_to_launch(args: CommandArgs, *, in_process: bool) -> int:
    """Return how many processes are to be launched for a command; 0 to run it in this one."""
    if not isinstance(args, FinetuneLoraArgs):
        return 0
    adopt_srun_variables()
    find_rank_info(args.devices, args.num_nodes)  # only a check
    return processes_to_launch(args.devices, args.num_nodes, dry_run=args.dry_run, in_process=in_process)


def start(call: Call, count: int) -> tuple[object, ...]:
    """Print which command runs, and refuse what can be refused without torch; return what was read, for the command.

    Notes on a config file are printed as well.
    Where a single process is launched, that process checks, so that each file is read once. With torch in memory, the
    command's own checks are as quick.
    """
    has_torch = "torch" in sys.modules
    if not has_torch:
        require_working_directory()
    if not is_launched():
        for line in ([] if has_torch else [f"litlora {__version__}: {call.command}"]) + list(call.notes):
            log(line)
    if has_torch or count == 1 or is_one_of_several():
        return ()
    read: tuple[object, ...] = importlib.import_module("litlora.commands.early_checks").check_early(call.args)
    return read


if __name__ == "__main__":
    sys.exit(main())
