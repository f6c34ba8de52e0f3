from typing import get_args

import torch

from litlora.args.finetune import Start
from litlora.lora.init import INITIALIZERS, Calibration
from litlora.lora.layer import LoRALinear


def test_every_choice_of_lora_init_has_a_function():
    assert set(get_args(Start)) == set(INITIALIZERS)


def test_zero_runs_no_example_and_changes_nothing():
    def unused(*_: object) -> None:
        raise AssertionError("zero needs neither gradients nor other ranks")

    layer = LoRALinear(torch.nn.Linear(8, 6), rank=2, scaling=1.0, dropout=0.0)
    before = {name: p.clone() for name, p in layer.adapter_parameters().items()}
    INITIALIZERS["zero"]({"layer": layer}, Calibration({}, unused, unused))
    assert all(torch.equal(p, before[name]) for name, p in layer.adapter_parameters().items())
    assert not layer.lora_B.weight.any()
