"""Checkpoint folders: reading and validating config.json and safetensors weights."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from litlora.errors import LitLoraError
from litlora.hub.filenames import CONFIG, INDEX, PICKLES, WEIGHTS
from litlora.models.config import GPTConfig
from litlora.models.transformer import GPT
from litlora.nn.nf4 import NF4Linear, Quantization
from litlora.utils.files import read_json

SAMPLES, SAMPLE = 64, 1 << 16
DTYPES = ("F64", "F32", "F16", "BF16")
DERIVED = ".rotary_emb.inv_freq"  # old Llama checkpoints store it, but it follows from the config


def load_config(checkpoint_dir: Path) -> GPTConfig:
    """Read the shape of a checkpoint's model."""
    hub = read_hub_config(checkpoint_dir)
    try:
        return GPTConfig.from_hub(hub)
    except LitLoraError as error:
        raise LitLoraError(f"{checkpoint_dir}: {error}") from error


def read_hub_config(checkpoint_dir: Path) -> dict[str, Any]:
    """Read a checkpoint's config.json as it stands."""
    if not checkpoint_dir.is_dir():
        hint = "fetch one with: litlora download --repo_id ORG/NAME"
        raise LitLoraError(f"there is no checkpoint folder {checkpoint_dir}; {hint}")
    if not (checkpoint_dir / CONFIG).is_file():
        hint = "name the folder that has it beside the weights"
        raise LitLoraError(
            f"{checkpoint_dir} has no config.json, so it is not a checkpoint as the Hub serves them: {hint}"
        )
    return read_json(checkpoint_dir / CONFIG)


def check_checkpoint(checkpoint_dir: Path) -> GPT:
    """Refuse a checkpoint whose weights are not exactly those of its config; return its model without weights."""
    return _checked(checkpoint_dir)[0]


def _checked(checkpoint_dir: Path) -> tuple[GPT, "Weights"]:
    config = load_config(checkpoint_dir)
    weights = Weights(checkpoint_dir)
    weights.check_layers(config.num_hidden_layers)
    with torch.device("meta"):
        model = GPT(config)
    weights.check(model)
    return model, weights


def load_model(
    checkpoint_dir: Path, dtype: torch.dtype, device: torch.device, quantization: Quantization | None = None
) -> GPT:
    """Build the model of a checkpoint with its weights.

    The weights are memory-mapped and go to the device one tensor at a time, those of the blocks quantized if asked
    for; on a CPU in the checkpoint's own dtype the others are not copied at all. Raises LitLoraError unless names and
    shapes are exactly those of the config.
    """
    model, weights = read_parts(checkpoint_dir, dtype, device, quantization, lambda weight: weight)
    fill(model, weights)
    return model.to(device)


def read_parts(
    checkpoint_dir: Path,
    dtype: torch.dtype,
    device: torch.device,
    quantization: Quantization | None,
    part: Callable[[Tensor], Tensor],
) -> tuple[GPT, dict[str, Tensor]]:
    """Return the model of a checkpoint without its weights, and of each weight by its name the part that is wanted.

    What quantization keeps beside a weight's parameters is a few numbers, and there as a whole.
    """
    model, weights = _checked(checkpoint_dir)
    parts: dict[str, Tensor] = {}
    if quantization:
        for name in block_linears(model):
            layer = NF4Linear(weights.once(f"{name}.weight").to(device), quantization)
            parts |= {f"{name}.{key}": part(parameter.detach()) for key, parameter in layer.named_parameters()}
            parts |= {f"{name}.{key}": buffer for key, buffer in layer.named_buffers()}
            model.set_submodule(name, layer.to("meta"))
    own = model.state_dict()
    return model, parts | {name: part(weights[name]).to(device, dtype) for name in weights if name in own}


def fill(model: GPT, weights: Mapping[str, Tensor]) -> None:
    """Put weights into a model that has none, but maybe an adapter."""
    own = {name: tensor for name, tensor in model.state_dict().items() if not tensor.is_meta}
    tied = model.config.tie_word_embeddings
    head = {"lm_head.weight": weights["model.embed_tokens.weight"]} if tied else {}
    model.load_state_dict(own | dict(weights) | head, assign=True)
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight


def block_linears(model: GPT) -> list[str]:
    """Return the names of the linear layers of the blocks: all but the output head."""
    modules = model.model.layers.named_modules(prefix="model.layers")
    return [name for name, module in modules if isinstance(module, nn.Linear)]


class Weights(Mapping[str, Tensor]):
    """The tensors of a checkpoint by name, memory-mapped from one or several safetensors files."""

    def __init__(self, checkpoint_dir: Path) -> None:
        self.checkpoint_dir = checkpoint_dir
        self.files = weight_files(checkpoint_dir)
        self._where: dict[str, Any] = {}
        self._paths: dict[str, Path] = {}
        for path in self.files:
            handle = open_safetensors(path)
            for name in handle.keys():  # noqa: SIM118 - a safetensors handle is not a mapping
                if name in self._where:
                    raise LitLoraError(f"{checkpoint_dir} holds the tensor {name} twice; download it again")
                if not name.endswith(DERIVED):
                    self._where[name], self._paths[name] = handle, path

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._where[name].get_tensor(name)
        return tensor

    def once(self, name: str) -> Tensor:
        """Return a tensor by a map of its own, so that what was read of the file leaves memory with it."""
        tensor: Tensor = open_safetensors(self._paths[name]).get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def check_layers(self, layers: int) -> None:
        """Refuse a config of more layers than there are tensors, before a model of them is built."""
        if layers > len(self):
            self._refuse(f'config.json has "num_hidden_layers": {layers}, but the weights are {len(self)} tensors')

    def check(self, model: GPT) -> None:
        """Refuse weights whose names or shapes are not exactly the model's, or that are no floating-point numbers."""
        expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
        self._check_names(set(expected), optional=tied)
        for name, handle in self._where.items():
            stored = handle.get_slice(name)
            if tuple(stored.get_shape()) != expected[name]:
                self._refuse(
                    f"{name} has the shape {tuple(stored.get_shape())}, but config.json means {expected[name]}"
                )
            if stored.get_dtype() not in DTYPES:
                fault = f"{name} is stored as {stored.get_dtype()}, but only {', '.join(DTYPES)} are supported"
                raise LitLoraError(f"{self.checkpoint_dir}: {fault}; use a checkpoint that is not quantized")
        if tied & set(self) and not torch.equal(self["lm_head.weight"], self["model.embed_tokens.weight"]):
            self._refuse(
                'config.json has "tie_word_embeddings": true, but lm_head.weight is not model.embed_tokens.weight'
            )

    def _check_names(self, expected: set[str], optional: set[str]) -> None:
        missing = sorted(expected - optional - set(self))
        surplus = sorted(set(self) - expected)
        if missing:
            self._refuse(f"the weights lack {first_three(missing)}")
        if surplus:
            self._refuse(f"the weights have {first_three(surplus)}, of which config.json says nothing")

    def _refuse(self, fault: str) -> NoReturn:
        hint = "take config.json and weights of one and the same model"
        raise LitLoraError(f"{self.checkpoint_dir}: {fault}; {hint}")


def first_three(names: Sequence[str]) -> str:
    """Name the first three, and say how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def weight_files(checkpoint_dir: Path) -> list[Path]:
    """Return the safetensors files of a checkpoint, as its index names them where it has one."""
    if (checkpoint_dir / WEIGHTS).is_file():
        return [checkpoint_dir / WEIGHTS]
    if not (checkpoint_dir / INDEX).is_file():
        pickled = any(path.suffix in PICKLES for path in checkpoint_dir.iterdir())
        reason = "pickled ones are never read, since a pickle can run code" if pickled else f"expected {WEIGHTS}"
        hint = "fetch a repository that has them with: litlora download --repo_id ORG/NAME"
        raise LitLoraError(f"{checkpoint_dir} has no safetensors weights ({reason}); {hint}")
    weight_map = read_json(checkpoint_dir / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise LitLoraError(f"{checkpoint_dir / INDEX} has no weight_map that names its files")
    names = sorted({str(name) for name in weight_map.values()})
    there = {path.name for path in checkpoint_dir.glob("*.safetensors")}
    if missing := [name for name in names if name not in there]:
        fault = f"names {first_three(missing)}, which {checkpoint_dir} does not hold"
        raise LitLoraError(f"{checkpoint_dir / INDEX} {fault}; download it again")
    return [checkpoint_dir / name for name in names]


def open_safetensors(path: Path) -> Any:
    """Open a safetensors file as a memory map."""
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise LitLoraError(f"{path} is cut or not a safetensors file; replace it with a whole copy") from error
    except OSError as error:
        raise LitLoraError(f"cannot read {path}: {error}") from error


def fingerprint(checkpoint_dir: Path) -> str:
    """Tell this checkpoint's weights from others' of the same shape, at the price of a few megabytes read.

    A SHA-256 over the names, shapes and places of all tensors, and over samples of the data of every file.
    """
    digest = hashlib.sha256()
    for path in weight_files(checkpoint_dir):
        size = path.stat().st_size
        with path.open("rb") as file:
            for start in range(0, size, max(SAMPLE, size // SAMPLES)):
                file.seek(start)
                digest.update(file.read(SAMPLE))
    return digest.hexdigest()
