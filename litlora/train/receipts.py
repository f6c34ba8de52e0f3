"""The receipt of a run: what its network answers to fixed prompts."""

import time

from torch.distributed.fsdp import FSDPModule

from litlora.args.common import GGUF
from litlora.data.tokenizer import Tokenizer
from litlora.evaluation.engine import Engine
from litlora.export.gguf.types import ROUNDED
from litlora.export.llama_cpp_rounding import AsTrained, Exported
from litlora.export.receipt import (
    RECEIPT,
    TEMPLATE,
    Receipt,
    choose,
    dtype_name,
    record,
    rounded,
    sensitivity,
    text_hash,
    versions,
)
from litlora.export.scoring import LitLoraEngine, Rounding
from litlora.models.checkpoint import EMBEDDING, HEAD, Checkpoint
from litlora.models.weights import fingerprint
from litlora.nn.quantization import quantization_of
from litlora.train.run_dir import RunFolder
from litlora.utils.console import log, warn


def find_receipt(folder: RunFolder, engine: Engine, checkpoint: Checkpoint, tokenizer: Tokenizer) -> Receipt | None:
    """Return the receipt of a trained network, or None on the ranks that write nothing and where there can be none."""
    if not folder.args.receipt or not engine.ranks.is_first:
        return None
    if isinstance(engine.gpt, FSDPModule):
        log(f"no {RECEIPT} is written: the base is sharded")
        return None
    start = time.perf_counter()
    try:
        receipt = _receipt(folder, engine, checkpoint, tokenizer)
    except (MemoryError, RuntimeError) as error:  # of which torch's OutOfMemoryError is one: no adapter is lost
        warn(f"no {RECEIPT} is written: {' '.join(str(error).split())}")
        return None
    log(f"computed {RECEIPT} in {time.perf_counter() - start:.1f} s")
    return receipt


def _receipt(folder: RunFolder, engine: Engine, checkpoint: Checkpoint, tokenizer: Tokenizer) -> Receipt | None:
    args, settings, gpt = folder.args, folder.prompt_style, engine.gpt
    style, quantization = tokenizer.prompt_style(settings), quantization_of(gpt)
    chosen = choose(args.data_dir / "val.jsonl", tokenizer, style, gpt.config.positions, mask_prompt=args.mask_prompt)
    if not chosen:
        log(f"no {RECEIPT} is written: no prompt of the validation split is short enough")
        return None
    scorer = LitLoraEngine(gpt)
    prompts = rounded(scorer, record(scorer, chosen), _roundings(checkpoint))
    return Receipt(
        prompts=prompts,
        prompt_style=settings.name,
        variables=settings.variables,
        date=settings.date,
        mask_prompt=args.mask_prompt,
        stop_ids=sorted(tokenizer.stop_ids_of(style)),
        dtype=dtype_name(gpt.model.embed_tokens.weight),
        stored_dtype=dtype_name(checkpoint.tensor(EMBEDDING)),
        quantization=quantization.name if quantization else None,
        sensitivity=sensitivity(scorer, prompts),
        hashes={
            **folder.identity.contents,
            "tokenizer": tokenizer.fingerprint,
            TEMPLATE: text_hash(tokenizer.chat_template or ""),
            **_file_hash(checkpoint),
        },
        versions=versions(),
    )


def _roundings(checkpoint: Checkpoint) -> dict[str, Rounding]:
    """Return what llama.cpp rounds in each file that `export` writes, and in the one of the training, if any."""
    exported: dict[str, Rounding] = {outtype: Exported(outtype) for outtype in ROUNDED}
    names = (checkpoint.hub_name(HEAD), checkpoint.hub_name(EMBEDDING))
    head = next(name for name in names if name in checkpoint.weights)
    kind = checkpoint.weights.stored_type(head)
    return exported if kind is None else exported | {GGUF: AsTrained(kind)}


def _file_hash(checkpoint: Checkpoint) -> dict[str, str]:
    """Return the hash of the GGUF file over which an adapter was trained."""
    return {GGUF: fingerprint(checkpoint.weights.files)} if checkpoint.weights.is_quantized else {}
