"""Whether llama.cpp computes from a GGUF file what the training's receipt has."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from litlora.args.common import GGUF
from litlora.errors import LitLoraError
from litlora.export.engines.llama_cpp import LlamaCppEngine
from litlora.export.gguf.writer import FILE_TYPES
from litlora.export.ollama import MODELFILE, stops_of, template_hash
from litlora.export.receipt import TEMPLATE, Probe, Receipt, text_hash
from litlora.export.verdict import Verdict, compare
from litlora.models.gguf.reader import ADAPTER, KIND, read_gguf
from litlora.models.gguf.splittings import OTHER_SPLITTING
from litlora.models.weights import fingerprint

TOLERANCE = 1e-3
"""Of a log-probability in nats, between llama.cpp and litlora in float32."""
SHARES = {"f32": 0.0, "f16": 0.25, "bf16": 2.0, "q8_0": 5.0, "q4_0": 40.0}
"""How large the rounding of weights and activations is in a file, as a multiple of that of weights to bfloat16."""
COARSEST = 40.0  # for the types that litlora does not write
LEFT = {"f32": 0.0, "f16": 0.05, "bf16": 0.5}
"""What is left of it beside the rounding that litlora computes: an input between two steps goes to either."""
MOST_LEFT = 3.0
"""The same for 4 and 8 bits: such an input moves the others that follow, by up to 1.3 of it where it was measured."""
ENDS = 3  # tokens at which a generation ends that the metadata of a file can name: eos, eot and eom


@dataclass(frozen=True)
class GGUFFile:
    """The metadata of a file."""

    path: Path
    values: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> "GGUFFile":
        """Read a file's header, which is checked against the size of the file."""
        return cls(path, read_gguf(path).metadata)

    @property
    def is_adapter(self) -> bool:
        return self.values.get(KIND) == ADAPTER

    @property
    def outtype(self) -> str:
        """The type of most weights, as --outtype names it, or else llama.cpp's number for it."""
        number = self.values.get("general.file_type")
        return next((name for name, kind in FILE_TYPES.items() if kind == number), f"type {number}")

    def token(self, name: str) -> int | None:
        """Return the id of a special token, such as eos."""
        token = self.values.get(f"tokenizer.ggml.{name}_token_id")
        return token if isinstance(token, int) else None

    def text(self, token: int | None) -> str:
        """Return the text of a token."""
        tokens = self.values.get("tokenizer.ggml.tokens", [])
        return str(tokens[token]) if token is not None and 0 <= token < len(tokens) else ""


def verify_gguf(path: Path, base: Path | None = None) -> Verdict:
    """Compare what llama.cpp computes from a GGUF file with the receipt in its folder."""
    own = GGUFFile.read(_file_in(path))
    receipt = Receipt.read(own.path.parent)
    model = GGUFFile.read(_file_in(base)) if own.is_adapter and base is not None else own
    if model.is_adapter:
        raise LitLoraError(f"{model.path} is an adapter: name the GGUF file of its base with --base_dir")
    probes = [probe for probe in receipt.prompts if probe.text]
    texts = tuple(_without_bos(probe, model) for probe in probes)
    stops = tuple(receipt.stop_ids)
    engine = LlamaCppEngine(model.path, own.path if own.is_adapter else None, texts, stops=stops)
    modelfile = own.path.parent / MODELFILE
    rounding, faults = _rounding(receipt, own, model), _template_faults(receipt, model, modelfile)
    if own.is_adapter and GGUF in receipt.hashes and rounding != GGUF:
        faults.append(f"{model.path} is not the GGUF file over which it was trained")
    share = _share(model.outtype, rounding) + base_share(receipt)
    verdict = compare(receipt, engine, TOLERANCE, share, model.outtype, faults, rounding=rounding)
    missing = [model.text(token) for token in stops if token not in engine.ends]
    is_named = not own.is_adapter and len(stops) <= ENDS
    faults, notes = _stop_faults(missing, set() if is_named else stops_of(modelfile))
    found = [fault for probe, ids in zip(probes, engine.tokens, strict=True) if (fault := _token_fault(probe, ids))]
    if found and model.values.get(OTHER_SPLITTING):
        notes, found = [*notes, f"{found[0]}, as its export said: give it token ids"], []
    return replace(verdict, faults=[*verdict.faults, *faults, *found[:1]], notes=notes)


def _rounding(receipt: Receipt, own: GGUFFile, model: GGUFFile) -> str | None:
    """Return the rounding in a file, or a file with an adapter, if the receipt has the log-probabilities with it."""
    if own.is_adapter:
        return GGUF if receipt.hashes.get(GGUF) == fingerprint([model.path]) else None
    return model.outtype if all(model.outtype in probe.rounded for probe in receipt.prompts) else None


def _share(outtype: str, rounding: str | None) -> float:
    """Return how much is rounded beside what a receipt has, as a multiple of rounding weights to bfloat16."""
    return SHARES.get(outtype, COARSEST) if rounding is None else LEFT.get(outtype, MOST_LEFT)


def base_share(receipt: Receipt) -> float:
    """Return how far training rounded the weights of the base, which are exported as they are stored."""
    return 1.0 if receipt.dtype != receipt.stored_dtype else 0.0


def _file_in(path: Path) -> Path:
    """Return a GGUF file, or the one in a folder."""
    found = sorted(path.glob("*.gguf")) if path.is_dir() else [path]
    if len(found) != 1 or not found[0].is_file():
        raise LitLoraError(f"{path} is not a GGUF file, nor a folder with one: name the file itself")
    return found[0]


def _stop_faults(missing: Sequence[str], elsewhere: set[str]) -> tuple[list[str], list[str]]:
    """Return faults and notes about stop tokens at which llama.cpp does not end a generation.

    Those that only a Modelfile can name are none: the base's own file has others, or there are more than it can have.
    """
    faults = [f"generation does not stop at {text or 'a token'}" for text in missing if text not in elsewhere]
    notes = [f"llama.cpp stops at {text} only if told to, as {MODELFILE} does" for text in missing if text in elsewhere]
    return faults[:1], notes


def _template_faults(receipt: Receipt, model: GGUFFile, modelfile: Path) -> list[str]:
    template = text_hash(str(model.values.get("tokenizer.chat_template", "")))
    other = receipt.prompt_style == "chat" and template != receipt.hashes.get(TEMPLATE)
    faults = ["its chat template is not the one that was trained"] if other else []
    expected = receipt.hashes.get(MODELFILE)
    if expected and modelfile.is_file() and template_hash(modelfile.read_text(encoding="utf-8")) != expected:
        faults.append(f"the template in its {MODELFILE} is not the one that was trained")
    return faults


def _without_bos(probe: Probe, model: GGUFFile) -> str:
    """Return the text of a probe as programs give it to llama.cpp, which adds BOS where the file says so."""
    adds = model.values.get("tokenizer.ggml.add_bos_token", False)
    return probe.text.removeprefix(model.text(model.token("bos"))) if adds else probe.text


def _token_fault(probe: Probe, actual: list[int]) -> str | None:
    ids = probe.ids
    if actual[: len(ids)] == ids:
        return None
    if actual[1 : len(ids) + 1] == ids:
        return f"llama.cpp puts the token {actual[0]} before a prompt, which training did not"
    return "llama.cpp makes other tokens of a prompt"
