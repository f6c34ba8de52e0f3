"""The receipt of a run: what its network answers to fixed prompts."""

import time

from torch.distributed.fsdp import FSDPModule

from litlora.data.tokenizer import Tokenizer
from litlora.evaluation.engine import Engine
from litlora.export.receipt import (
    RECEIPT,
    TEMPLATE,
    Receipt,
    choose,
    dtype_name,
    record,
    sensitivity,
    text_hash,
    versions,
)
from litlora.export.scoring import LitLoraEngine
from litlora.models.checkpoint import EMBEDDING, Checkpoint
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
    prompts = record(scorer, chosen)
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
        },
        versions=versions(),
    )
