"""From the --lora_* flags to the configuration of a new adapter; flags that choose no layer of the model are refused.

Nothing here imports torch: these flags are refused before.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

from litlora.args.finetune import FinetuneLoraArgs
from litlora.args.values import as_blocks
from litlora.errors import LitLoraError
from litlora.lora.config import LoRAConfig, first_match
from litlora.lora.targets import excluded_modules, switch_targets
from litlora.models.config import GPTConfig
from litlora.models.layer_names import HEAD_LAYER, linear_layer_names

ALL_LINEAR = ["all-linear"]
"""PEFT's word for all linear layers but the head."""


def new_adapter(args: FinetuneLoraArgs, base: GPTConfig) -> LoRAConfig:
    """Return the configuration of a new adapter on the model of this configuration."""
    layers = linear_layer_names(base)
    config = LoRAConfig(
        args.lora_r,
        args.lora_alpha,
        args.lora_dropout,
        target_modules=_targets(args, base, layers),
        use_rslora=args.lora_use_rslora,
        use_dora=args.lora_use_dora,
        init=args.lora_init,
        rank_pattern=args.lora_rank_pattern or {},
        alpha_pattern=args.lora_alpha_pattern or {},
        layers_to_transform=None if args.lora_layers is None else tuple(as_blocks(args.lora_layers)),
        exclude_modules=excluded_modules(base),
    )
    _refuse_unmatched(config, layers)
    return config


def described(args: FinetuneLoraArgs, lora: LoRAConfig) -> str:
    """Return in a few words what a run trains: `DoRA of rank 8 and alpha 16 on q_proj, v_proj, LoRA+ (ratio 16)`."""
    targets = lora.target_modules if isinstance(lora.target_modules, str) else ", ".join(lora.target_modules)
    kind = "DoRA" if lora.use_dora else "LoRA"
    features = {
        "rsLoRA": lora.use_rslora,
        f"LoRA+ (ratio {args.lora_plus_ratio:g})": args.lora_plus_ratio != 1,
        f"continued from {args.init_adapter}": args.init_adapter is not None,
        f"{lora.init} initialization": lora.init != LoRAConfig.init and args.init_adapter is None,
        f"ranks {_pairs(lora.rank_pattern)}": bool(lora.rank_pattern),
        f"alphas {_pairs(lora.alpha_pattern)}": bool(lora.alpha_pattern),
        f"blocks {', '.join(map(str, lora.layers_to_transform or ()))} only": lora.layers_to_transform is not None,
    }
    used = "".join(f", {feature}" for feature, is_used in features.items() if is_used)
    return f"{kind} of rank {lora.r} and alpha {lora.lora_alpha:g} on {targets}{used}"


def _pairs(pattern: Mapping[str, float]) -> str:
    return ", ".join(f"{number:g} for {key}" for key, number in pattern.items())


def _targets(args: FinetuneLoraArgs, config: GPTConfig, layers: Iterable[str]) -> tuple[str, ...] | str:
    """Return what the adapter targets: the layers of --lora_targets, or else those of the switches."""
    if args.lora_targets == ALL_LINEAR:
        return tuple(dict.fromkeys(_last_part(name) for name in layers if name != config.hub_name(HEAD_LAYER)))
    if args.lora_targets is not None:
        return args.lora_targets if isinstance(args.lora_targets, str) else tuple(args.lora_targets)
    return switch_targets(args.lora_switches, config)


def _refuse_unmatched(config: LoRAConfig, layers: Collection[str]) -> None:
    """Refuse a target, a block or a pattern that would have no effect."""
    _refuse_unmatched_blocks(config, layers)
    _refuse_unmatched_targets(config, layers)
    adapted = config.adapted(layers)
    for flag, pattern in (("rank", config.rank_pattern), ("alpha", config.alpha_pattern)):
        used = {first_match(pattern, name) for name in adapted}
        if unused := [key for key in pattern if key not in used]:
            hint = f"adapted are {_shown(adapted)}, and the first pattern that matches counts"
            raise LitLoraError(f"--lora_{flag}_pattern: {unused[0]} applies to no adapted layer: {hint}")


def _refuse_unmatched_blocks(config: LoRAConfig, layers: Iterable[str]) -> None:
    blocks = {config.block_of(name) for name in layers} - {None}
    if missing := sorted({*(config.layers_to_transform or ())} - blocks):
        raise LitLoraError(f"--lora_layers: there is no block {missing[0]}, only the blocks 0-{len(blocks) - 1}")


def _refuse_unmatched_targets(config: LoRAConfig, layers: Collection[str]) -> None:
    targets = config.target_modules
    if isinstance(targets, str) and not config.adapted(layers):
        hint = "it must match whole names, such as model.layers.0.self_attn.q_proj"
        raise LitLoraError(f"--lora_targets: the expression {targets} matches no linear layer: {hint}")
    for target in () if isinstance(targets, str) else targets:
        if not replace(config, target_modules=(target,)).adapted(layers):
            raise LitLoraError(f"--lora_targets: {target} names no linear layer; there are {_shown(layers)}")


def _shown(names: Iterable[str]) -> str:
    """Return the different last parts of layer names."""
    return ", ".join(dict.fromkeys(map(_last_part, names)))


def _last_part(name: str) -> str:
    return name.rpartition(".")[2]
