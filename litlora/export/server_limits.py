"""What servers cannot load of an adapter, or would compute otherwise: a table of rules, which imports no torch."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from litlora.args.common import GGUF, Server
from litlora.args.finetune import FinetuneLoraArgs
from litlora.errors import LitLoraError
from litlora.lora.adapter_config import ALL_LINEAR, INIT, of_base, settings_as_keys
from litlora.lora.adapter_folder import BASE, QUANTIZATION
from litlora.lora.config import LoRAConfig
from litlora.models.config import GPTConfig
from litlora.models.gguf.architectures import architecture_of_checkpoint
from litlora.models.layer_names import HEAD_LAYER
from litlora.utils.console import log

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The choices of vLLM's --max-lora-rank (MaxLoRARanks in vllm/config/lora.py)."""
VLLM_DEFAULT_RANK = 16
OLLAMA_MODELS = ("llama", "mistral", "gemma2")
"""The model types whose adapters Ollama converts and applies (ConvertAdapter in its convert/convert.go)."""
MERGE = "merge it with litlora merge_lora"
CONVERT = "convert it with litlora export --format gguf-lora, which folds the scale, or merge it"
Weight = Literal["fault", "note"]


@dataclass(frozen=True)
class Limit:
    """What a server cannot do with an adapter, or does only with a setting of its own."""

    target: Server
    what: str
    fix: str
    weight: Weight
    """A fault is an adapter that does not load, or answers otherwise; a note is what must be set or done."""

    def __str__(self) -> str:
        return f"{self.target} {self.what}: {self.fix}"


@dataclass(frozen=True)
class Facts:
    """What the rules ask of an adapter and its base."""

    adapter: Mapping[str, Any]
    """The content of adapter_config.json."""
    model: Mapping[str, Any]
    """The content of the base's config.json."""

    @property
    def rank(self) -> int:
        """The highest rank of a layer."""
        ranks = [self.adapter.get("r") or 1, *(self.adapter.get("rank_pattern") or {}).values()]
        return max(map(int, ranks))

    @property
    def alphas(self) -> list[float]:
        return [self.adapter.get("lora_alpha") or 0, *(self.adapter.get("alpha_pattern") or {}).values()]

    @property
    def is_tied(self) -> bool:
        text = self.model.get("text_config")
        configs = (self.model, text if isinstance(text, dict) else {})
        return any(config.get("tie_word_embeddings") is True for config in configs)

    @property
    def adapts_head(self) -> bool:
        """Whether the output head is among the adapted layers."""
        targets, excluded = (self._modules(key) for key in ("target_modules", "exclude_modules"))
        lora = LoRAConfig(1, 1.0, 0.0, targets, exclude_modules=excluded)
        return any(lora.adapted([name]) for name in (HEAD_LAYER, "embed_out"))  # embed_out is that of GPT-NeoX

    @property
    def quantization(self) -> Any:
        """How the base was quantized in training, or None."""
        return of_base(self.adapter, QUANTIZATION)

    @property
    def is_over_gguf(self) -> bool:
        return isinstance(self.quantization, dict) and self.quantization.get("quant_method") == GGUF

    def _modules(self, key: str) -> tuple[str, ...] | str:
        value = self.adapter.get(key) or ()
        if isinstance(value, str):
            return ALL_LINEAR if value.lower() == "all-linear" else value
        return tuple(map(str, value))

    def has(self, key: str) -> bool:
        """Tell whether a key of adapter_config.json is set."""
        return bool(self.adapter.get(key)) and self.adapter.get(key) != "none"


Test = Callable[[Facts], bool]


@dataclass(frozen=True)
class Rule:
    """A limit of some servers, and the adapters that it concerns."""

    targets: tuple[Server, ...]
    applies: Test
    what: str
    fix: str
    weight: Weight = "fault"


def _set(key: str) -> Test:
    return lambda facts: facts.has(key)


def _is_tied_head(facts: Facts) -> bool:
    return facts.adapts_head and facts.is_tied


GGML: tuple[Server, ...] = ("llama.cpp", "ollama")
RULES = (
    # PEFTHelper of vLLM refuses use_dora and modules_to_save (vllm/lora/peft_helper.py). llama.cpp's
    # convert_lora_to_gguf.py stops at a magnitude vector and at full tensors, and Ollama's converter knows neither.
    Rule(("vllm", *GGML), _set("use_dora"), "does not load DoRA adapters", f"{MERGE}, or train without DoRA"),
    Rule(
        ("vllm", *GGML),
        _set("modules_to_save"),
        "does not load fully trained layers (modules_to_save)",
        "merge the adapter in PEFT, or train without them",
    ),
    Rule(("vllm", *GGML), lambda facts: facts.has("bias"), "does not load trained biases", "merge the adapter in PEFT"),
    Rule(
        ("vllm",),
        lambda facts: facts.rank > VLLM_RANKS[-1],
        f"loads no rank above {VLLM_RANKS[-1]}",
        f"{MERGE}, or lower the rank",
    ),
    # PEFTHelper reads r and lora_alpha alone: other keys of adapter_config.json are dropped without a word.
    Rule(("vllm",), _set("rank_pattern"), "ignores rank_pattern", f"{MERGE}, or use one rank"),
    Rule(("vllm",), _set("alpha_pattern"), "ignores alpha_pattern", f"{MERGE}, or use one alpha"),
    Rule(
        ("vllm",), _is_tied_head, "has no adapter on a head that is tied to the embedding", f"{MERGE}, or leave it out"
    ),
    Rule(
        ("vllm",),
        lambda facts: facts.adapts_head and not facts.is_tied,
        "loads an adapter on the output head for some models only",
        "try it, or merge the adapter",
        "note",
    ),
    # convert_lora_to_gguf.py writes lora_alpha alone, and llama.cpp scales each layer by alpha / its own rank: a rank
    # pattern is right, rsLoRA and an alpha pattern are not. Ollama's does the same.
    Rule(GGML, _set("use_rslora"), "scales rsLoRA by alpha / rank in its own converter", CONVERT, "note"),
    Rule(GGML, _set("alpha_pattern"), "drops alpha_pattern in its own converter", MERGE),
    # For a tied head llama.cpp's converter raises an error; Ollama's knows the layers of the blocks alone.
    Rule(("llama.cpp",), _is_tied_head, "has no adapter on a tied output head", f"{MERGE}, which unties it"),
    Rule(
        ("ollama",), lambda facts: facts.adapts_head, "has no adapter on the output head", f"{MERGE}, or leave it out"
    ),
    Rule(
        ("ollama",),
        lambda facts: facts.model.get("model_type") not in OLLAMA_MODELS,
        f"applies adapters to {', '.join(OLLAMA_MODELS)} alone",
        "merge the adapter, and create a model of the merged one",
    ),
    Rule(
        ("ollama",),
        lambda facts: not all(float(alpha).is_integer() for alpha in facts.alphas),
        "reads lora_alpha as a whole number",
        "convert the adapter with litlora export --format gguf-lora, or merge it",
        "note",
    ),
    Rule(
        ("peft",),
        _is_tied_head,
        "changes the embedding too where it merges an adapter on a tied head",
        f"{MERGE}, which unties it",
        "note",
    ),
    # Fisher starts from the error of the 4-bit base, which other weights do not have.
    Rule(
        ("vllm", *GGML),
        lambda facts: of_base(facts.adapter, INIT) == "fisher",
        "adds the adapter to another base than the 4-bit one whose error it compensates (--lora_init fisher)",
        "merge it with litlora merge_lora --dequantized_base true",
    ),
    Rule(
        ("vllm", *GGML),
        lambda facts: facts.quantization is not None and not facts.is_over_gguf,
        "adds the adapter to a base that is not quantized as in training",
        "expect small differences, or merge it with litlora merge_lora --dequantized_base true",
        "note",
    ),
    # llama.cpp and Ollama add the adapter to the very file.
    Rule(
        ("vllm",),
        lambda facts: facts.is_over_gguf,
        "adds the adapter to a base that is not the GGUF file of the training",
        f"expect small differences, or {MERGE}",
        "note",
    ),
)


def limits_of(
    adapter_config: Mapping[str, Any], model_config: Mapping[str, Any], targets: Iterable[Server]
) -> list[Limit]:
    """Return what some servers cannot do with an adapter, given the contents of adapter_config.json and config.json."""
    facts, wanted = Facts(adapter_config, model_config), list(dict.fromkeys(targets))
    limits = [_rank_setting(facts)] if "vllm" in wanted else []
    rules = [(target, rule) for target in wanted for rule in RULES if target in rule.targets and rule.applies(facts)]
    return [Limit(target, rule.what, rule.fix, rule.weight) for target, rule in rules] + list(filter(None, limits))


def _rank_setting(facts: Facts) -> Limit | None:
    """Return the rank that vLLM must be started with, where its default is too low."""
    if not VLLM_DEFAULT_RANK < facts.rank <= VLLM_RANKS[-1]:
        return None
    need = next(rank for rank in VLLM_RANKS if rank >= facts.rank)
    return Limit(
        "vllm",
        f"loads ranks up to {VLLM_DEFAULT_RANK} by default, and this adapter has {facts.rank}",
        f"start it with --max-lora-rank {need}",
        "note",
    )


def limits_of_network(model_config: Mapping[str, Any], config: GPTConfig, targets: Iterable[Server]) -> Iterator[Limit]:
    """Yield the servers that have no implementation of the network that a config.json describes."""
    try:
        architecture_of_checkpoint(model_config, config)
    except LitLoraError as error:
        reason = str(error).rpartition(": ")[0]
        for target in [target for target in GGML if target in targets]:
            yield Limit(target, f"does not compute this network ({reason})", "serve it with vLLM", "fault")


def server_limits(
    args: FinetuneLoraArgs, lora: LoRAConfig, model_config: Mapping[str, Any], config: GPTConfig
) -> list[Limit]:
    """Return what the servers of --deploy cannot do with the adapter that a run will save."""
    how = {"quant_method": GGUF} if args.gguf else args.quantize
    quantized = {INIT: lora.init, QUANTIZATION: how} if how else None
    adapter = settings_as_keys(lora.saved) | {BASE: quantized}
    return [*limits_of(adapter, model_config, args.deploy), *limits_of_network(model_config, config, args.deploy)]


def refuse_faults(targets: Iterable[Server], limits: Iterable[Limit]) -> None:
    """Refuse an adapter that a server of --deploy does not load, or with which it answers otherwise."""
    if found := [str(limit) for limit in limits if limit.weight == "fault"]:
        hint = "or leave the server out of --deploy"
        raise LitLoraError(f"--deploy ({','.join(targets)}): {'; '.join(found)}; {hint}")


def log_notes(limits: Iterable[Limit]) -> None:
    """Print what must be set or done at the servers of --deploy."""
    for limit in limits:
        if limit.weight == "note":
            log(f"--deploy: {limit}")
