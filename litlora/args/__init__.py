"""The flags and YAML keys of every command: type, default, help (the attribute docstrings) and validation.

A module holds the commands of one kind, but for `common` and `values`, which these share. None imports torch. What a
flag does stands in the packages, not here.
"""

from litlora.args.common import CommandArgs
from litlora.args.data import CheckDataArgs, PrepareAlpacaArgs, PrepareJsonArgs, PrepareLimaArgs
from litlora.args.export import ExportArgs
from litlora.args.finetune import FinetuneLoraArgs
from litlora.args.hub import DownloadArgs, UploadArgs
from litlora.args.inference import ChatArgs, EvaluateArgs, GenerateArgs, MergeLoraArgs
from litlora.args.report import ReportArgs
from litlora.args.sweep import SweepArgs
from litlora.args.verify import VerifyArgs

COMMANDS: dict[str, type[CommandArgs]] = {
    "download": DownloadArgs,
    "prepare_alpaca": PrepareAlpacaArgs,
    "prepare_lima": PrepareLimaArgs,
    "prepare_json": PrepareJsonArgs,
    "check_data": CheckDataArgs,
    "finetune_lora": FinetuneLoraArgs,
    "generate": GenerateArgs,
    "chat": ChatArgs,
    "evaluate": EvaluateArgs,
    "report": ReportArgs,
    "merge_lora": MergeLoraArgs,
    "export": ExportArgs,
    "verify": VerifyArgs,
    "upload": UploadArgs,
    "sweep": SweepArgs,
}
