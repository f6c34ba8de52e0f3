"""What a command can refuse before torch is imported, which takes seconds. The command itself checks the rest."""

from dataclasses import replace

from litlora.args.common import CommandArgs
from litlora.args.data import PrepareArgs
from litlora.args.export import ExportArgs
from litlora.args.finetune import FinetuneLoraArgs
from litlora.args.inference import ChatArgs, EvaluateArgs, GenerateArgs, MergeLoraArgs
from litlora.args.sweep import SweepArgs
from litlora.commands.prompt import Prompt, PromptFile, find_for_chat
from litlora.data.dataset import choose_prompt_style, count_rows, read_example
from litlora.data.prepare import check_paths
from litlora.data.prompts.styles import StyleSettings
from litlora.data.token_cache import FOLDER
from litlora.data.tokenizer import check_prompt_style
from litlora.errors import LitLoraError
from litlora.evaluation.rows import Comparison
from litlora.evaluation.tasks import Benchmark
from litlora.export.server_limits import refuse_faults, server_limits
from litlora.lora.adapter_config import read_settings
from litlora.lora.adapter_folder import refuse_adapter
from litlora.lora.selection import Adapters, find_adapters, find_folders, find_gguf
from litlora.lora.targets import refuse_parted_head
from litlora.models.checkpoint_files import CheckpointFiles
from litlora.sweep.plan import Plan
from litlora.train.logger_names import check_loggers
from litlora.train.lora_flags import new_adapter
from litlora.train.optimizer_names import check_name
from litlora.train.resume import AUTO, Identity, starting_point
from litlora.train.settled import former_defaults, settle
from litlora.utils.files import check_absent, check_writable
from litlora.utils.manifest import find_truncation

QUICK = 20_000_000  # bytes of rows that are read in less than a second


def check_early(args: CommandArgs) -> tuple[object, ...]:
    """Refuse what the files named by the arguments show at a glance; return what was read, for the command."""
    match args:
        case FinetuneLoraArgs():
            return (check_training(args),)
        case GenerateArgs():
            return (Prompt.read(args) if args.prompts is None else PromptFile.read(args),)
        case ChatArgs():
            return (find_for_chat(args),)
        case EvaluateArgs() if args.tasks:
            return (Benchmark.read(args),)
        case EvaluateArgs():
            return (Comparison.read(args),)
        case MergeLoraArgs():
            return check_merge(args)
        case ExportArgs():
            return check_export(args)
        case SweepArgs():
            return (check_sweep(args),)
        case PrepareArgs():
            check_writable(args.destination_path, "--destination_path")
            check_paths(args)
    return ()


def check_merge(args: MergeLoraArgs) -> tuple[CheckpointFiles, Adapters]:
    """Refuse adapters or an output folder that do not do, and return base and adapters."""
    base_dir, adapters = find_adapters(args)
    check_absent(args.out_dir, "--out_dir")
    base = CheckpointFiles.find(base_dir, find_gguf(args, adapters))
    check_prompt_style(base.dir, StyleSettings("none"))
    return base, adapters


def check_export(args: ExportArgs) -> tuple[CheckpointFiles, Adapters]:
    """Refuse a checkpoint, adapters or an output folder that do not do, and return base and adapters."""
    base_dir, adapters = find_folders(args)
    if not args.check:
        check_absent(args.folder, "--out_dir")
    if args.check and not adapters:
        raise LitLoraError(f"--check needs an adapter, and {base_dir} is a checkpoint, which all servers load")
    if args.format == "gguf-lora" and not adapters:
        raise LitLoraError(f"--format gguf-lora needs an adapter, and {base_dir} is a checkpoint: use --format gguf")
    base = CheckpointFiles.find(base_dir, find_gguf(args, adapters))
    check_prompt_style(base.dir, StyleSettings("none"))
    return base, adapters


def check_sweep(args: SweepArgs) -> Plan:
    """Refuse a search space or files that do not do, and return the plan."""
    plan = Plan.read(args)
    check_writable(args.out_dir, "--out_dir")
    check_training(replace(plan.first, out_dir=args.out_dir / "trial", resume=False))
    return plan


def check_training(args: FinetuneLoraArgs) -> CheckpointFiles:
    """Refuse settings that do not fit the files that they name, and return the base."""
    check_writable(args.out_dir, "--out_dir")
    check_name(args.optimizer)
    check_loggers(args.logger_name)
    # The run itself reports which checkpoint it takes, and with "auto" whether it is finished.
    start = None if args.resume == AUTO else starting_point(args, lambda _: None, find_truncation)
    refuse_adapter(args.checkpoint_dir)
    base = CheckpointFiles.find(args.checkpoint_dir, args.gguf)
    template = check_prompt_style(base.dir, StyleSettings(args.prompt_style, args.prompt_style_variables or {}))
    args = settle(args, base.config.hidden_size, former_defaults(args), lambda _: None)  # the run itself reports it
    args.check_model(base.config.hidden_size, base.config.positions)
    lora = new_adapter(args, base.config) if args.init_adapter is None else read_settings(args.init_adapter)
    if args.strategy == "fsdp" and args.devices * args.num_nodes > 1:
        refuse_parted_head(lora, base.config)
    refuse_faults(args.deploy, server_limits(args, lora, base.hub_config, base.config))
    if start is not None:
        style, _ = choose_prompt_style(args.prompt_style, args.data_dir / "train.jsonl", template)
        Identity.of(replace(args, prompt_style=style), {}).check(start)
    _check_rows(args)
    return base


def _check_rows(args: FinetuneLoraArgs) -> None:
    """Refuse a bad row, unless the data set is large or has been read by an earlier run."""
    train, val = args.data_dir / "train.jsonl", args.data_dir / "val.jsonl"
    read_example(train, 0, "--data_dir")
    read_example(val, args.eval.evaluate_example, "--eval.evaluate_example")
    if not (args.data_dir / FOLDER).exists():
        for path in (train, val):
            if path.stat().st_size <= QUICK:
                count_rows(path)
