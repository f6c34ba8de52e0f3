"""Adapter folders in PEFT's format: writing, reading, and matching an adapter with its base."""

import json
import re
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from litlora.args.common import GGUFPath
from litlora.args.inference import InferenceArgs
from litlora.data.prompts.styles import StyleSettings
from litlora.errors import LitLoraError
from litlora.hub.origin import origin
from litlora.lora.adapter import Adapter, weighted_sum
from litlora.lora.adapter_config import INIT, of_base, read_settings, settings_as_keys
from litlora.lora.adapter_folder import BASE, CONFIG, GGUF_PATH, LOCAL_PATH, QUANTIZATION, WEIGHTS, write_prompt_style
from litlora.lora.config import LoRAConfig
from litlora.lora.layer import add_layers, add_lora, freeze_adapter, linear_layers, lora_layers, saved_tensors
from litlora.lora.pissa import subtract_starts
from litlora.lora.selection import Weighted
from litlora.lora.targets import excluded_modules
from litlora.lora.variants import ROWS, variant_of
from litlora.models.checkpoint import EMBEDDING, HEAD, Checkpoint
from litlora.models.checkpoint_files import first_three
from litlora.models.config import GPTConfig
from litlora.models.layer_names import HEAD_LAYER
from litlora.models.transformer import GPT
from litlora.models.weights import DTYPES, open_safetensors
from litlora.nn.quantization import GGUF, Quantization, quantization_of
from litlora.utils.files import read_json

PREFIX = "base_model.model."
COPY = ".base_layer.weight"  # PEFT stores the frozen head beside its adapter
FINGERPRINT, TENSORS = "base_sha256", "base_tensors"  # keys of the metadata


def write_adapter(
    directory: Path,
    model: GPT,
    lora: LoRAConfig,
    base_dir: Path,
    base_sha256: str,
    prompt_style: StyleSettings | str,
    base_tensors: str | None = None,
    gguf: Path | None = None,
) -> None:
    """Write an adapter into an existing folder, in PEFT's format, with the prompt style that it was trained on.

    `base_sha256` is the fingerprint of the base, and `base_tensors` are the digests of its tensors, which may be in a
    GGUF file.
    """
    quantization, source = quantization_of(model), origin(base_dir)
    init = {INIT: lora.init} if lora.requires_quantized_base or lora.changes_base else {}
    quantized = {QUANTIZATION: quantization.hub, **init} if quantization else {}
    downloaded = {LOCAL_PATH: str(base_dir.resolve())} if source else {}
    config = {
        BASE: {**quantized, **({GGUF_PATH: str(gguf.absolute())} if gguf else {}), **downloaded} or None,
        "base_model_name_or_path": source.repo_id if source else str(base_dir.resolve()),
        "inference_mode": True,
        "revision": source.revision if source else None,
        **settings_as_keys(lora.saved),
    }
    (directory / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    tensors = {PREFIX + name: tensor.cpu().contiguous() for name, tensor in saved_tensors(model).items()}
    digests = {TENSORS: base_tensors} if base_tensors is not None else {}
    content = save(tensors, metadata={"format": "pt", FINGERPRINT: base_sha256, **digests})
    (directory / WEIGHTS).write_bytes(_in_order(content))
    write_prompt_style(directory, StyleSettings.of(prompt_style))


def _in_order(content: bytes) -> bytes:
    """Sort the keys of a safetensors header, whose order is left to chance: equal adapters are equal files."""
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8:start]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[start:]


def read_lora_config(adapter_dir: Path) -> LoRAConfig:
    """Read the shape and reach of an adapter; LitLoraError names a key that is not implemented, or an absurd rank."""
    lora = read_settings(adapter_dir)
    _check_ranks(adapter_dir / CONFIG, {"r": lora.r, **lora.rank_pattern})
    return lora


def _check_ranks(path: Path, ranks: Mapping[str, int]) -> None:
    """Refuse a rank that no matrix of the adapter has, before layers of it take memory."""
    handle = open_safetensors(path.with_name(WEIGHTS))
    shapes = [handle.get_slice(name).get_shape() for name in handle.keys() if not name.endswith(COPY)]  # noqa: SIM118
    longest = max((max(shape) for shape in shapes if shape and 0 not in shape), default=0)
    for key, rank in ranks.items():
        if rank > longest:
            raise LitLoraError(f'{path} has "{key}": {rank}, but no matrix in {WEIGHTS} has that many rows or columns')


def read_quantization(adapter_dir: Path) -> Quantization | None:
    """Return how the base was quantized when the adapter was trained, or None where it was not, or is not said."""
    hub = of_base(read_json(adapter_dir / CONFIG), QUANTIZATION)
    if hub is None:
        return None
    try:
        return Quantization.from_hub(hub)
    except LitLoraError as error:
        raise LitLoraError(f"{adapter_dir} was trained on {error}") from error


def load_with_adapters(
    base: Checkpoint,
    adapters: Sequence[Weighted],
    dtype: torch.dtype,
    device: torch.device,
    quantization: Quantization | None = None,
) -> GPT:
    """Load the model of a base for inference, with the weighted sum of adapters if there are any."""
    if quantization is None:
        refuse_compensation(adapters, "pass --quantize bnb.nf4, or leave the flag out")
    # Before the base is loaded, so that a misfit is found first.
    adapter = read_adapters(adapters, base, is_quantized=quantization is not None) if adapters else None
    model = base.load(dtype, device, quantization)
    if adapter is not None and adapter.has_starts and quantization is not None:
        add_as_trained(model, adapters[0].folder, base)
    elif adapter is not None:
        adapter.add_to(model)
    return model


def add_as_trained(model: GPT, adapter_dir: Path, base: Checkpoint) -> None:
    """Add an adapter, for inference, to a base from which its start is taken again before it is quantized."""
    add_lora(model, read_lora_config(adapter_dir))
    load_matrices(model, adapter_dir, base)
    freeze_adapter(model)


def refuse_compensation(adapters: Sequence[Weighted], hint: str) -> None:
    """Refuse adapters that were initialized to compensate for a quantization error, which this base does not have."""
    for adapter in adapters:
        if read_lora_config(adapter.folder).requires_quantized_base:
            fault = f"{adapter.folder} compensates for the 4-bit quantization of its base (--lora_init fisher)"
            raise LitLoraError(f"{fault}: {hint}")


def read_adapters(adapters: Sequence[Weighted], base: Checkpoint, is_quantized: bool) -> Adapter:
    """Read adapters, which must fit the base, as their weighted sum; `is_quantized` is what it is added to."""
    if len(adapters) == 1 and adapters[0].weight == 1:
        return read_adapter(adapters[0].folder, base)
    for adapter in adapters:
        lora = read_lora_config(adapter.folder)
        if lora.use_dora:
            fault = f"{adapter.folder} is a DoRA adapter, which has no weight and no sum with others"
            raise LitLoraError(f"{fault}: leave it out, or merge it alone")
        if lora.changes_base and is_quantized:
            fault = f"{adapter.folder} was trained on a base that was quantized without its start (--lora_init pissa)"
            raise LitLoraError(f"{fault}: leave it out, or add the sum to the base that is not quantized")
    return weighted_sum([(read_adapter(adapter.folder, base), adapter.weight) for adapter in adapters])


def read_adapter(adapter_dir: Path, base: Checkpoint) -> Adapter:
    """Read an adapter, which must fit the base: nothing is allocated but the tensors that it has."""
    lora, outline = read_lora_config(adapter_dir), base.outline()
    layers = lora.saved.adapted(linear_layers(outline))
    with torch.device("meta"):
        add_layers(outline, layers, variant_of(lora))
    return Adapter(layers, variant_of(lora), read_matrices(outline, adapter_dir, base), lora.changes_base)


def shared_quantization(adapters: Sequence[Weighted], hint: str | None) -> Quantization | None:
    """Return how the base was quantized when adapters were trained.

    Where that differs, it is an error with this hint, or None where another setting decides.
    """
    trained = {read_quantization(adapter.folder): adapter.folder for adapter in adapters}
    if len(trained) > 1 and hint is not None:
        one, other, *_ = trained.values()
        raise LitLoraError(f"{one} and {other} were trained on bases of different quantization: {hint}")
    return next(iter(trained)) if len(trained) == 1 else None


def requested_storage(args: InferenceArgs, adapters: Sequence[Weighted]) -> tuple[torch.dtype, Quantization | None]:
    """Return dtype and quantization of a base for inference: as requested, else as its adapters were trained."""
    return storage(args, shared_quantization(adapters, None if args.quantize else "choose one with --quantize"))


def storage(args: InferenceArgs, trained: Quantization | None) -> tuple[torch.dtype, Quantization | None]:
    """Return dtype and quantization of the base: as requested, else as the adapter was trained."""
    dtype = trained.dtype if trained else torch.bfloat16
    if args.precision:
        dtype = torch.bfloat16 if args.precision == "bf16-true" else torch.float32
    name = GGUF if isinstance(args.quantize, GGUFPath) else args.quantize or (trained.name if trained else "none")
    return dtype, None if name == "none" else Quantization(name, dtype)


def load_matrices(model: GPT, adapter_dir: Path, base: Checkpoint) -> None:
    """Fill the matrices of a model with LoRA from an adapter's, and take their start out of its weights if need be."""
    matrices, name_of = read_matrices(model, adapter_dir, base), model.config.hub_name
    for name, layer in lora_layers(model).items():
        layer.load_tensors({key: matrices[f"{name_of(name)}.{key}"] for key in layer.adapter_parameters()})
    subtract_starts(lora_layers(model), base)


def read_matrices(model: GPT, adapter_dir: Path, base: Checkpoint) -> dict[str, Tensor]:
    """Read the matrices of an adapter, which must be exactly those of the model with LoRA, in name and shape."""
    handle = open_safetensors(adapter_dir / WEIGHTS)
    metadata = handle.metadata() or {}
    trained_on = metadata.get(FINGERPRINT)
    if trained_on is not None and (differing := base.difference(trained_on, metadata.get(TENSORS))):
        hint = "name the one that it was trained on"
        other = f"a base other than {base.dir} ({differing})"
        raise LitLoraError(f"the adapter in {adapter_dir} was trained on {other}; {hint}")
    expected = {name: tuple(parameter.shape) for name, parameter in saved_tensors(model).items()}
    stored = {_layer_key(name): handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
    if fault := _misfit(stored, expected, base):
        raise LitLoraError(f"the adapter {adapter_dir} does not fit the base {base.dir}: {fault}")
    return {name: handle.get_tensor(PREFIX + name) for name in expected}


def _layer_key(name: str) -> str:
    """Return a key of an adapter's file without PEFT's prefix; PEFT would pass over one that lacks it."""
    return name.removeprefix(PREFIX) if name.startswith(PREFIX) else f"{name} (without {PREFIX})"


def _misfit(stored: Mapping[str, Any], expected: Mapping[str, tuple[int, ...]], base: Checkpoint) -> str | None:
    """Return the first fault of safetensors slices by name, or None if they are those that are expected."""
    copies = {name for name in stored if name.endswith(COPY)}
    own = stored.keys() - copies
    if own != expected.keys() or not own:
        return _different_names(own, expected.keys(), base.config)
    for name, shape in expected.items():
        if tuple(stored[name].get_shape()) != shape:
            return f"{name} is {tuple(stored[name].get_shape())}, not {shape}"
        if (dtype := stored[name].get_dtype()) not in DTYPES:
            return f"{name} is stored as {dtype}, not as one of {', '.join(DTYPES)}"
    others = (name for name in copies if not _is_head_of(base, name, stored[name]))
    return next((f"its {name} differs from the base's" for name in others), None)


def _different_names(own: Set[str], expected: Set[str], config: GPTConfig) -> str:
    """Say which tensors an adapter has beyond those that its settings give it on the base, or lacks."""
    excluded = excluded_modules(config)
    surplus, missing = sorted(own - expected), sorted(expected - own)
    if left_out := [name for name in surplus if isinstance(excluded, str) and re.fullmatch(excluded, name)]:
        hint = f"train it with exclude_modules={excluded!r}"
        return f"it adapts {first_three(left_out)}, which litlora leaves out with the rest of vision: {hint}"
    if surplus:
        return f"the adapter has {first_three(surplus)}, which its settings do not give it on this base"
    return f"the adapter lacks {first_three(missing)}" if missing else "it adapts no layer of it"


def _is_head_of(base: Checkpoint, name: str, copy: Any) -> bool:
    """Tell whether a safetensors slice is the base's output head, up to rounding to 16 bits."""
    if name != base.config.hub_name(HEAD_LAYER) + COPY or copy.get_dtype() not in DTYPES:
        return False
    weight = base.weights.get(base.hub_name(HEAD))
    own = base.tensor(EMBEDDING) if weight is None else weight  # which is tied
    if tuple(copy.get_shape()) != tuple(own.shape):
        return False
    rows = (slice(start, start + ROWS) for start in range(0, len(own), ROWS))
    return all(torch.allclose(copy[some].float(), own[some].float(), rtol=2**-7, atol=1e-6) for some in rows)
