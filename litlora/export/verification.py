"""Whether an adapter or a merged checkpoint is the network whose training left a receipt."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from litlora.data.prompt_styles import PromptStyle
from litlora.data.readers import RowError
from litlora.data.tokenizer import Tokenizer
from litlora.errors import LitLoraError
from litlora.export.receipt import (
    ADAPTER,
    RECEIPT,
    Probe,
    Receipt,
    dtype_name,
    file_hash,
    largest_difference,
    score,
    tokenized,
)
from litlora.export.scoring import LitLoraEngine
from litlora.lora.adapter_folder import WEIGHTS, find_base, read_prompt_style
from litlora.lora.checkpoint import load_with_adapters, read_quantization
from litlora.lora.selection import Adapters, Weighted
from litlora.models.checkpoint import EMBEDDING, Checkpoint
from litlora.models.transformer import GPT
from litlora.nn.backend import default_device
from litlora.nn.nf4 import Quantization
from litlora.utils.console import log

TOLERANCE = 1e-4
"""Of a log-probability in nats, between two float32 computations with the same weights."""
MARGIN = 3.0  # on the largest change that random roundings make
SHARES = {"bfloat16": 1.0, "float16": 1 / 8}
"""How large a rounding to a dtype is, as a multiple of that to bfloat16."""


@dataclass(frozen=True)
class Verdict:
    """The largest difference in log-probability of each prompt, and what is wrong."""

    differences: list[float]
    tolerance: float
    faults: list[str]

    def refuse_faults(self, folder: Path) -> None:
        """Raise a LitLoraError if anything is wrong."""
        if self.faults:
            hint = "export it again from the adapter"
            raise LitLoraError(f"{folder} is not the network that was trained: {'; '.join(self.faults)}; {hint}")

    def __str__(self) -> str:
        rows = [f"prompt {n}: largest difference {value:.2e}" for n, value in enumerate(self.differences, start=1)]
        return "\n".join([*rows, f"tolerance {self.tolerance:.2e}: {'different' if self.faults else 'the same'}"])


def verify_folder(folder: Path, base_dir: Path | None = None) -> Verdict:
    """Compare what an adapter or a merged checkpoint computes with its receipt."""
    receipt = Receipt.read(folder)
    base_path, adapter = find_base(folder, base_dir)
    base = Checkpoint.open(base_path)
    faults = text_faults(receipt, folder, base)
    base.config.check_ids("the receipt", max(id for probe in receipt.prompts for id in probe.ids))
    model = _load(receipt, base, adapter)
    scored = score(LitLoraEngine(model), receipt.prompts)
    differences = [
        largest_difference(own, probe.expected()) for own, probe in zip(scored, receipt.prompts, strict=True)
    ]
    tolerance = TOLERANCE if adapter is not None else _tolerance(receipt)
    # Not "above": a comparison with NaN is false.
    if not all(difference <= tolerance for difference in differences):
        what = f"log-probabilities differ by {max(differences):.2e}, above the tolerance of {tolerance:.2e}"
        faults.append(what + _other_adapter(receipt, adapter))
    return Verdict(differences, tolerance, faults)


def _other_adapter(receipt: Receipt, adapter: Path | None) -> str:
    """Tell whether an adapter is another file than the one that a receipt was written for."""
    is_other = adapter is not None and file_hash(adapter / WEIGHTS) != receipt.hashes.get(ADAPTER)
    return f" ({RECEIPT} is that of another adapter, or {WEIGHTS} has changed since)" if is_other else ""


def passes_receipt_on(adapters: Adapters, dequantized: bool) -> bool:
    """Tell whether a merge has the receipt of its adapter: it is alone, on the base of its training, and has one."""
    if len(adapters) != 1 or adapters[0].weight != 1 or not (adapters[0].folder / RECEIPT).is_file():
        return False
    return dequantized or read_quantization(adapters[0].folder) is None


def log_verdict(folder: Path) -> None:
    """Print whether what was written computes what its receipt has; LitLoraError where it does not."""
    verdict = verify_folder(folder)
    log(str(verdict))
    verdict.refuse_faults(folder)


def _load(receipt: Receipt, base: Checkpoint, adapter: Path | None) -> GPT:
    """Load the network as it was trained, or a merged one as it is stored."""
    device = default_device()
    if adapter is None:
        return base.load(base.tensor(EMBEDDING).dtype, device)
    dtype = torch.bfloat16 if receipt.dtype == "bfloat16" else torch.float32
    trained = read_quantization(adapter)
    quantization = Quantization(trained.name, dtype) if trained else None
    return load_with_adapters(base, [Weighted(adapter)], dtype, device, quantization)


def _tolerance(receipt: Receipt) -> float:
    """Return what rounding the merged weights to their dtype can change."""
    dtypes = {receipt.dtype, receipt.stored_dtype}
    share = next((share for dtype, share in SHARES.items() if dtype in dtypes), 0.0)
    return TOLERANCE + MARGIN * share * receipt.sensitivity


def text_faults(receipt: Receipt, folder: Path, base: Checkpoint) -> list[str]:
    """Return what of tokenizer, prompt style, stop tokens and dtype differs from the receipt."""
    is_merged = base.dir == folder
    faults: list[str] = []
    dtype = dtype_name(base.tensor(EMBEDDING))
    if dtype != receipt.stored_dtype:
        faults.append(f"the weights are stored as {dtype}, not as {receipt.stored_dtype}")
    tokenizer = Tokenizer(folder, base.hub_config)
    try:
        settings = read_prompt_style(folder) or receipt.style
        style = tokenizer.prompt_style(replace(settings, date=receipt.date))
        same = all(_is_tokenized_alike(probe, receipt, tokenizer, style) for probe in receipt.prompts)
        faults += [] if same else ["its tokenizer or prompt style gives the prompts other tokens"]
    except (LitLoraError, RowError, IndexError) as error:
        faults.append(f"its tokenizer or prompt style does not take the prompts ({error})")
    if is_merged and (missing := set(receipt.stop_ids) - tokenizer.stop_ids):
        faults.append(f"generation does not stop at the token {min(missing)}")
    return faults


def _is_tokenized_alike(probe: Probe, receipt: Receipt, tokenizer: Tokenizer, style: PromptStyle) -> bool:
    rows = tokenized(probe.row, tokenizer, style, len(probe.ids), mask_prompt=receipt.mask_prompt)
    return rows[probe.sequence].ids == probe.ids and rows[probe.sequence].labels == probe.labels
