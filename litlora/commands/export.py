"""export: a checkpoint or an adapter in, a GGUF file and a Modelfile out."""

from pathlib import Path

from litlora.args.export import ExportArgs
from litlora.commands.early_checks import check_export
from litlora.data.tokenizer import Tokenizer
from litlora.errors import LitLoraError
from litlora.export.gguf.adapter import LowRank, write_adapter
from litlora.export.gguf.model import Model, write_model
from litlora.export.ollama import modelfile
from litlora.lora.adapter_folder import read_prompt_style
from litlora.lora.checkpoint import read_adapters
from litlora.lora.merge import read_merge, refuse_foreign_links
from litlora.lora.selection import Adapters, shared_prompt_style
from litlora.lora.variants import MAGNITUDE, A, B
from litlora.models.checkpoint import Checkpoint
from litlora.models.checkpoint_files import CheckpointFiles
from litlora.utils.console import log
from litlora.utils.files import atomic_directory

MODEL, ADAPTER, MODELFILE = "model.gguf", "adapter.gguf", "Modelfile"


def export(args: ExportArgs, files: CheckpointFiles | None = None, adapters: Adapters = ()) -> None:
    """Write a model or an adapter as a GGUF file, with a Modelfile; base and adapters if they have been read."""
    if files is None:
        files, adapters = check_export(args)
    base = Checkpoint.open(files)
    refuse_foreign_links(adapters, base)
    model = _model(base, args.checkpoint_dir or args.out_dir)
    with atomic_directory(args.out_dir) as folder:
        if args.format == "gguf-lora":
            write_adapter(folder / ADAPTER, model, _pairs(base, adapters), args.outtype or "f32")
        else:
            if adapters:
                model = _merged(model, base, adapters, dequantized=args.dequantized_base)
            write_model(folder / MODEL, model, args.outtype or "f16")
        style = shared_prompt_style(adapters) or read_prompt_style(base.dir)
        text = modelfile(model.tokenizer, style, MODEL, ADAPTER if args.format == "gguf-lora" else None)
        (folder / MODELFILE).write_text(text, encoding="utf-8")
    log(f"{ADAPTER if args.format == 'gguf-lora' else MODEL} and {MODELFILE} in {args.out_dir}")


def _model(base: Checkpoint, source: Path) -> Model:
    shapes = {name: tuple(tensor.shape) for name, tensor in base.outline().state_dict().items()}
    tokenizer = Tokenizer(base.dir, base.hub_config)
    return Model(source.resolve().name, base.hub_config, base.config, shapes, base.read, tokenizer)


def _merged(model: Model, base: Checkpoint, adapters: Adapters, *, dequantized: bool) -> Model:
    """Return the model of a base with adapters merged into each of its tensors when it is read."""
    merge = read_merge(adapters, base, dequantized=dequantized)
    return model.reading(lambda name: merge.in_float32(name, base), untied=merge.unties(base))


def _pairs(base: Checkpoint, adapters: Adapters) -> list[LowRank]:
    """Return the low-rank pairs of adapters by the model's names of their layers."""
    adapter = read_adapters(adapters, base, is_quantized=False)
    if MAGNITUDE in adapter.variant.names:
        raise LitLoraError("--format gguf-lora: llama.cpp has no DoRA; export the adapter merged with --format gguf")
    names = {base.config.hub_name(name): name for name in base.outline().state_dict()}
    own = ((layer, adapter.of(layer), settings.scaling) for layer, settings in adapter.layers.items())
    return [LowRank(names[f"{layer}.weight"].removesuffix(".weight"), t[A], t[B], scale) for layer, t, scale in own]
