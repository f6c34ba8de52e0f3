"""Which layers of a model the --lora_* switches adapt."""

from collections.abc import Collection, Iterable

from litlora.errors import LitLoraError
from litlora.lora.config import TARGET_MODULES, LoRAConfig
from litlora.models.config import GPTConfig
from litlora.models.layer_names import HEAD_LAYER

QKV, GATE_UP = "qkv_proj", "gate_up_proj"
FUSED_QKV = {"q_proj": QKV, "k_proj": QKV, "v_proj": QKV}
FUSED_GATE_UP = {"gate_proj": GATE_UP, "up_proj": GATE_UP}


def switch_targets(switches: Iterable[str], config: GPTConfig) -> tuple[str, ...]:
    """Return the last parts of the names of the layers that some --lora_* switches adapt, as PEFT has them.

    A switch for a part of a fused layer adapts the whole of it.
    """
    fused = (FUSED_QKV if config.fused_qkv else {}) | (FUSED_GATE_UP if config.fused_gate_up else {})
    names = [fused.get(name, name) for switch in switches for name in TARGET_MODULES[switch]]
    own = dict.fromkeys(name for name in names if config.gated_mlp or name != "gate_proj")
    return tuple(config.hub_name(name).rpartition(".")[2] for name in own)


def fused_note(switches: Collection[str], config: GPTConfig) -> str | None:
    """Return a sentence on switches that adapt more than they name, since one layer computes more; None without any."""
    on = [switch for switch in ("query", "key", "value") if switch in switches]
    if not config.fused_qkv or len(on) in (0, 3):
        return None
    flags, layer = " and ".join(f"--lora_{switch}" for switch in on), switch_targets(on, config)[0]
    verb = "adapts" if len(on) == 1 else "adapt"
    return f"{flags} {verb} the whole of {layer}, which computes queries, keys and values"


def excluded_modules(config: GPTConfig) -> tuple[str, ...] | str:
    """Return an expression for the layers of PEFT's model that litlora does not load, or an empty tuple."""
    return rf"(.*\.)?({'|'.join(config.left_out)})\..*" if config.left_out else ()


def refuse_parted_head(lora: LoRAConfig, config: GPTConfig) -> None:
    """Refuse, for a sharded base, a tied head that needs a weight of its own, which lacks the adapter's start."""
    if lora.changes_base and config.tie_word_embeddings and lora.adapted([config.hub_name(HEAD_LAYER)]):
        fault = f"--lora_init {lora.init} cannot part a head from its embedding under --strategy fsdp"
        raise LitLoraError(f"{fault}: pass ddp, leave --lora_head out, or choose another --lora_init")
