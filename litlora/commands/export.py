"""export: a checkpoint or an adapter in, a GGUF file and a Modelfile out."""

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import get_args

import torch

from litlora.args.common import Server
from litlora.args.export import ExportArgs
from litlora.commands.early_checks import check_export
from litlora.data.prompts.styles import StyleSettings
from litlora.data.tokenizer import Tokenizer
from litlora.errors import LitLoraError
from litlora.export.gguf.adapter import LowRank, write_adapter
from litlora.export.gguf.model import Model, write_model
from litlora.export.gguf.verification import verify_gguf
from litlora.export.model_card import copy_card
from litlora.export.ollama import MODELFILE, modelfile, template_hash
from litlora.export.receipt import RECEIPT, Receipt
from litlora.export.server_limits import limits_of, limits_of_network, refuse_faults
from litlora.export.verdict import log_verdict
from litlora.export.verification import passes_receipt_on
from litlora.hub.origin import origin
from litlora.lora.adapter_folder import CONFIG, read_prompt_style
from litlora.lora.checkpoint import read_adapters
from litlora.lora.merge import Merge, read_merge, refuse_foreign_links
from litlora.lora.selection import Adapters, shared_prompt_style
from litlora.lora.variants import MAGNITUDE, A, B
from litlora.models.checkpoint import Checkpoint
from litlora.models.checkpoint_files import CheckpointFiles
from litlora.utils.console import log, output
from litlora.utils.files import atomic_directory, read_json

MODEL, ADAPTER = "model.gguf", "adapter.gguf"
ROUNDED = {"f16": torch.float16, "bf16": torch.bfloat16}


def export(args: ExportArgs, files: CheckpointFiles | None = None, adapters: Adapters = ()) -> None:
    """Write a model or an adapter as a GGUF file, with a Modelfile; base and adapters if they have been read."""
    if files is None:
        files, adapters = check_export(args)
    if args.check:
        check(args, files, adapters)
        return
    base, is_alone = Checkpoint.open(files), args.format == "gguf-lora"
    refuse_foreign_links(adapters, base)
    style = shared_prompt_style(adapters) or read_prompt_style(base.dir)
    model = _model(base, args.checkpoint_dir or args.folder, style)
    outtype = args.outtype or ("f32" if is_alone else "f16")
    merge = None if is_alone or not adapters else read_merge(adapters, base, dequantized=args.dequantized_base)
    receipt = _receipt(base, adapters, dequantized=args.dequantized_base)
    with atomic_directory(args.folder) as folder:
        if is_alone:
            write_adapter(folder / ADAPTER, model, _pairs(base, adapters), outtype)
        else:
            write_model(folder / MODEL, _merged(model, base, merge, outtype), outtype)
        text = modelfile(model.tokenizer, style, MODEL, ADAPTER if is_alone else None)
        (folder / MODELFILE).write_text(text, encoding="utf-8")
        source = origin(base.dir)
        card = copy_card(args.format, source and source.repo_id, source and source.license)
        (folder / "README.md").write_text(card, encoding="utf-8")
        if receipt is not None:
            replace(receipt, hashes={**receipt.hashes, MODELFILE: template_hash(text)}).write(folder)
    log(f"{ADAPTER if is_alone else MODEL} and {MODELFILE} in {args.folder}")
    if merge is not None and outtype in ROUNDED:
        log(str(merge.changes))
    if receipt is not None and args.verify:
        over = base.weights.files[0] if base.weights.is_quantized else None
        _verify(args.folder, over, is_alone=is_alone)


def check(args: ExportArgs, files: CheckpointFiles, adapters: Adapters) -> None:
    """Print what servers cannot do with adapters; LitLoraError for a fault of a server that was named."""
    configs = [read_json(adapter.folder / CONFIG) for adapter in adapters]
    targets = args.deploy or get_args(Server)
    limits = [limit for config in configs for limit in limits_of(config, files.hub_config, targets)]
    limits += limits_of_network(files.hub_config, files.config, targets)
    output("\n".join(f"{limit.weight}: {limit}" for limit in limits) or f"{', '.join(targets)}: no limits")
    refuse_faults(args.deploy, [limit for limit in limits if limit.target in args.deploy])


def _model(base: Checkpoint, source: Path, settings: StyleSettings | None) -> Model:
    shapes = {name: tuple(tensor.shape) for name, tensor in base.outline().state_dict().items()}
    tokenizer = Tokenizer(base.dir, base.hub_config)
    style = tokenizer.prompt_style(settings or StyleSettings("none"))
    return Model(source.resolve().name, base.hub_config, base.config, shapes, base.read, tokenizer, style)


def _merged(model: Model, base: Checkpoint, merge: Merge | None, outtype: str) -> Model:
    """Return the model of a base with adapters, if any, merged into each of its tensors when it is read."""
    if merge is None:
        return model
    counting = replace(merge, stored=ROUNDED.get(outtype))
    return model.reading(lambda name: counting.in_float32(name, base), untied=merge.unties(base))


def _pairs(base: Checkpoint, adapters: Adapters) -> list[LowRank]:
    """Return the low-rank pairs of adapters by the model's names of their layers."""
    adapter = read_adapters(adapters, base, is_quantized=False)
    if MAGNITUDE in adapter.variant.names:
        raise LitLoraError("--format gguf-lora: llama.cpp has no DoRA; export the adapter merged with --format gguf")
    names = {base.config.hub_name(name): name for name in base.outline().state_dict()}
    own = ((layer, adapter.of(layer), settings.scaling) for layer, settings in adapter.layers.items())
    return [LowRank(names[f"{layer}.weight"].removesuffix(".weight"), t[A], t[B], scale) for layer, t, scale in own]


def _receipt(base: Checkpoint, adapters: Adapters, *, dequantized: bool) -> Receipt | None:
    """Return the receipt of what is exported, if there is one: that of an adapter, or of a merged checkpoint."""
    if adapters:
        as_trained = dequantized or base.weights.is_quantized  # a GGUF file is the base of the training as it is
        return Receipt.read(adapters[0].folder) if passes_receipt_on(adapters, as_trained) else None
    return Receipt.read(base.dir) if (base.dir / RECEIPT).is_file() else None


def _verify(out_dir: Path, over: Path | None, *, is_alone: bool) -> None:
    """Verify what was written, an adapter alone with the GGUF file over which it was trained, if there is one."""
    if is_alone and over is None:
        log(f"verify it with the GGUF file of its base: litlora verify {out_dir} --base_dir BASE.gguf")
    elif find_spec("xllamacpp") is None:
        log("it is not verified without llama.cpp: pip install 'litlora[llama-cpp]'")
    else:
        log_verdict(verify_gguf(out_dir, over if is_alone else None), out_dir)
