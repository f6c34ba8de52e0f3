"""The recipes of config_hub state the memory that the dry run computes, for models that are described right."""

import pytest
from recipe_memory import MODELS, RECIPES, outline, recipes, statement

PARAMETERS = {"llama-3.2-1b": 1_235_814_400, "qwen2.5-0.5b": 494_032_768, "smollm3-3b": 3_075_098_624}
"""Numbers that the Hub shows for these checkpoints."""
RECOMPUTED = ["llama-3.2-1b/lora", "qwen3-0.6b/qlora", "smollm2-135m/qlora", "phi-4-mini/lora", "gemma-3-1b/lora"]


@pytest.mark.parametrize("model", PARAMETERS)
def test_models_have_the_parameters_of_the_hub(model):
    assert sum(parameter.numel() for parameter in outline(model).outline().parameters()) == PARAMETERS[model]


@pytest.mark.parametrize("name", RECOMPUTED)
def test_recipe_states_its_memory(name):
    path = RECIPES / f"{name}.yaml"
    first_line, _, _ = path.read_text(encoding="utf-8").partition("\n")
    assert first_line.endswith(statement(path)), "scripts/recipe_memory.py --write states it anew"


def test_each_model_has_two_recipes():
    of_model = {path.parent.name: {p.stem for p in path.parent.iterdir()} for path in recipes()}
    assert of_model.keys() == MODELS.keys()
    assert all(kinds == {"lora", "qlora"} for kinds in of_model.values())


@pytest.mark.parametrize("path", recipes(), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_each_setting_has_its_reason(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    own = ("checkpoint_dir:", "data_dir:", "out_dir:", "quantize: bnb.nf4")
    assert all("#" in line or line in ("train:", "eval:") or line.startswith(own) for line in lines)
