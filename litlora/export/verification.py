"""Whether an adapter or a merged checkpoint is the network whose training left a receipt."""

from dataclasses import replace
from importlib import import_module
from pathlib import Path

import torch

from litlora.args.verify import EngineName
from litlora.data.prompts.styles import PromptStyle
from litlora.data.readers.parsers import RowError
from litlora.data.tokenizer import Tokenizer
from litlora.errors import LitLoraError
from litlora.export.receipt import (
    ADAPTER,
    RECEIPT,
    Probe,
    Receipt,
    dtype_name,
    file_hash,
    tokenized,
)
from litlora.export.scoring import Engine, LitLoraEngine
from litlora.export.verdict import Verdict, compare
from litlora.lora.adapter_folder import WEIGHTS, find_base, find_named_gguf, read_prompt_style
from litlora.lora.checkpoint import load_with_adapters, read_quantization
from litlora.lora.selection import Adapters, Weighted
from litlora.models.checkpoint import EMBEDDING, Checkpoint
from litlora.models.checkpoint_files import CheckpointFiles
from litlora.nn.backend import default_device
from litlora.nn.nf4 import Quantization

TOLERANCES = {"litlora": 1e-4, "peft": 1e-3}
"""Of a log-probability in nats, between two float32 computations with the same weights."""
SHARES = {"bfloat16": 1.0, "float16": 1 / 8}
"""How large a rounding of weights to a dtype is, as a multiple of that to bfloat16."""


def verify_copy(path: Path, base_dir: Path | None = None, engine: EngineName | None = None) -> Verdict:
    """Compare what an adapter, a merged checkpoint or a GGUF file computes with the receipt in its folder."""
    is_gguf = path.suffix == ".gguf" or (path.is_dir() and any(path.glob("*.gguf")))
    if is_gguf and engine in (None, "llama.cpp"):  # whose packages are an extra
        verdict: Verdict = import_module("litlora.export.gguf.verification").verify_gguf(path, base_dir)
        return verdict
    if is_gguf or engine == "llama.cpp":
        kind = "a GGUF file: leave --engine out" if is_gguf else "no GGUF file: write one with litlora export"
        raise LitLoraError(f"--engine {engine}: {path} is {kind}")
    return verify_folder(path, base_dir, engine or "litlora")


def verify_folder(folder: Path, base_dir: Path | None = None, engine: EngineName = "litlora") -> Verdict:
    """Compare what an adapter or a merged checkpoint computes with its receipt."""
    receipt = Receipt.read(folder)
    base_path, adapter = find_base(folder, base_dir)
    base = Checkpoint.open(CheckpointFiles.find(base_path, find_named_gguf(adapter) if adapter else None))
    base.config.check_ids("the receipt", max(id for probe in receipt.prompts for id in probe.ids))
    faults = text_faults(receipt, folder, base)
    scorer = _load(receipt, base, adapter, engine)
    share = rounding_share(receipt, merged=adapter is None)
    share += 1.0 if receipt.quantization and engine == "peft" else 0.0
    verdict = compare(receipt, scorer, TOLERANCES[engine], share, dtype_name(base.tensor(EMBEDDING)), faults)
    is_other = adapter is not None and file_hash(adapter / WEIGHTS) != receipt.hashes.get(ADAPTER)
    if verdict.faults and is_other:
        return replace(verdict, faults=[*verdict.faults, f"{RECEIPT} is of another adapter, or {WEIGHTS} has changed"])
    return verdict


def rounding_share(receipt: Receipt, *, merged: bool) -> float:
    """Return how far the weights of a copy are rounded otherwise than in training."""
    if not merged:
        return 0.0
    return max(SHARES.get(dtype, 0.0) for dtype in (receipt.dtype, receipt.stored_dtype))


def passes_receipt_on(adapters: Adapters, dequantized: bool) -> bool:
    """Tell whether a merge has the receipt of its adapter: it is alone, on the base of its training, and has one."""
    if len(adapters) != 1 or adapters[0].weight != 1 or not (adapters[0].folder / RECEIPT).is_file():
        return False
    return dequantized or read_quantization(adapters[0].folder) is None


def _load(receipt: Receipt, base: Checkpoint, adapter: Path | None, engine: EngineName) -> Engine:
    """Load the network as it was trained, or a merged one as it is stored."""
    trained = read_quantization(adapter) if adapter else None
    dtype = torch.bfloat16 if receipt.dtype == "bfloat16" else torch.float32
    quantization = Quantization(trained.name, dtype) if trained else None
    if adapter is None:
        dtype = base.tensor(EMBEDDING).dtype
    if engine == "peft":  # whose packages are an extra
        loaded: Engine = import_module("litlora.export.engines.peft").load(base.dir, adapter, dtype, quantization)
        return loaded
    if adapter is None:
        return LitLoraEngine(base.load(dtype, default_device()))
    return LitLoraEngine(load_with_adapters(base, [Weighted(adapter)], dtype, default_device(), quantization))


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
