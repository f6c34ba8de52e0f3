"""What a configuration says of a layer: equal to what PEFT's own functions say."""

import math

import pytest
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from litlora.errors import LitLoraError
from litlora.lora.config import LayerSettings, LoRAConfig

LAYERS = [
    *(
        f"model.layers.{block}.{layer}"
        for block in (0, 1, 2, 12)
        for layer in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.gate_up_proj")
    ),
    "gpt_neox.layers.1.attention.dense",
    "lm_head",
]


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ("q_proj", "lm_head")},
        {"target_modules": ("up_proj",)},
        {"target_modules": ("model.layers.1.self_attn.v_proj", "dense")},
        {"target_modules": r".*\.(0|12)\..*_proj"},
        {"target_modules": "q_proj"},
        {"target_modules": ("q_proj", "lm_head", "dense"), "layers_to_transform": (1, 12)},
        {"target_modules": ("q_proj", "dense"), "layers_to_transform": (1,), "layers_pattern": ("layers",)},
        {"target_modules": ("q_proj", "dense"), "layers_to_transform": (1,), "layers_pattern": ("h", "layers")},
        {"target_modules": ("q_proj",), "layers_to_transform": (1,), "layers_pattern": ("blocks",)},
        {"target_modules": ("q_proj", "v_proj"), "exclude_modules": ("model.layers.0.self_attn.q_proj", "lm_head")},
        {"target_modules": ("q_proj", "v_proj"), "exclude_modules": r".*\.1\.self_attn.*"},
    ],
    ids=str,
)
def test_adapted_layers_are_those_of_peft(options):
    as_peft = {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}
    theirs = LoraConfig(r=4, **as_peft)
    expected = [name for name in LAYERS if check_target_module_exists(theirs, name)]
    assert list(LoRAConfig(4, 8, 0.0, **options).adapted(LAYERS)) == expected


@pytest.mark.parametrize(
    "keys",
    [
        ["q_proj"], ["_proj"], ["self_attn.q_proj", "q_proj"], ["q_proj", r"layers\.1\..*"],
        [r"layers\.1\..*", "q_proj"], ["^model.layers.0.self_attn.q_proj"], ["^layers.*"],
        ["q_proj|up_proj"], [r"model.layers.\d.mlp.up_proj"],
    ],
    ids=str,
)  # fmt: skip
def test_ranks_and_alphas_by_pattern_are_those_of_peft(keys):
    pattern = {key: number for number, key in enumerate(keys, 9)}
    config = LoRAConfig(4, 8, 0.0, "", rank_pattern=pattern, alpha_pattern=pattern)
    by_rank = LoRAConfig(4, 8, 0.0, "", rank_pattern=pattern)
    for name in LAYERS:
        expected = pattern.get(get_pattern_key(pattern, name), 4)
        assert by_rank.rank(name) == expected
        assert config.scaling(name) == (1 if expected > 4 else 2)


def test_scaling_of_rslora_is_by_the_root_of_each_layers_own_rank():
    config = LoRAConfig(4, 8, 0.0, ("q_proj", "v_proj"), use_rslora=True, rank_pattern={"v_proj": 9})
    own = config.adapted(LAYERS[:2])
    assert list(own.values()) == [LayerSettings(4, 8 / math.sqrt(4)), LayerSettings(9, 8 / math.sqrt(9))]


def test_pattern_that_takes_years_is_refused_by_name(monkeypatch):
    monkeypatch.setattr("litlora.utils.resource_limits.MAX_SECONDS", 0.2)
    config = LoRAConfig(4, 8, 0.0, ("q_proj",), rank_pattern={"(.|.)*!": 2})
    with pytest.raises(LitLoraError, match=r"\(\.\|\.\)\*! .*more than 0\.2 seconds"):
        config.adapted(LAYERS)


def test_a_pattern_for_each_layer_of_a_large_model_is_quick():
    """EVA writes them. PEFT's expressions compiled again for each layer would take a minute."""
    names = [f"model.layers.{block}.{layer}" for block in range(80) for layer in "abcdefg"]
    pattern = {name: number for number, name in enumerate(names, 1)}
    config = LoRAConfig(4, 8, 0.0, tuple(names), rank_pattern=pattern)
    assert [settings.rank for settings in config.adapted(names).values()] == list(pattern.values())
