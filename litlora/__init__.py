"""litlora: fine-tune language models with LoRA, from Hub checkpoints to PEFT adapters."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from litlora.args.finetune import EvalArgs as EvalArgs
    from litlora.args.finetune import FinetuneLoraArgs as FinetuneLoraArgs
    from litlora.args.finetune import TrainArgs as TrainArgs
    from litlora.errors import LitLoraError as LitLoraError
    from litlora.generation.llm import LLM as LLM
    from litlora.train.report import Report as Report
    from litlora.train.setup import finetune as finetune

__version__ = "0.1.0"
_EXPORTS = {
    "EvalArgs": "litlora.args.finetune",
    "FinetuneLoraArgs": "litlora.args.finetune",
    "LLM": "litlora.generation.llm",
    "LitLoraError": "litlora.errors",
    "Report": "litlora.train.report",
    "TrainArgs": "litlora.args.finetune",
    "finetune": "litlora.train.setup",
}
"""Names by the module that is imported when they are first used: `import litlora` does not import torch."""


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'litlora' has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)
