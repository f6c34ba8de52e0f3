"""What settings stand for once the checkpoint is known.

Nothing here imports torch: settings are compared with those of a run before it is in memory.
"""

from collections.abc import Callable
from dataclasses import replace

from litlora.args.finetune import FinetuneLoraArgs
from litlora.train.optimizer_names import class_path_of
from litlora.utils.console import log

Report = Callable[[str], None]


def automatic_rate(hidden_size: int) -> float:
    """Return the peak rate that Tinker's rule for LoRA on Llama gives: the wider the model, the lower."""
    return float(f"{5e-5 * 10 * (2000 / hidden_size) ** 0.781:.3g}")  # as many digits as a user would write


def with_rate(args: FinetuneLoraArgs, hidden_size: int, report: Report = log) -> FinetuneLoraArgs:
    """Replace a learning rate of auto by its number, which is what the run records and a resumed run compares."""
    if args.train.learning_rate != "auto":
        return args
    rate, name = automatic_rate(hidden_size), class_path_of(args.optimizer).rpartition(".")[2]
    note = "" if "Adam" in name else f", and the rule is for Adam: {name} may want another"
    report(f"--train.learning_rate auto is {rate:g}: the checkpoint's hidden_size is {hidden_size}{note}")
    return replace(args, train=replace(args.train, learning_rate=rate))
