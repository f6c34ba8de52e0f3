"""Optimizers: the learning rates of LoRA+ are those of PEFT."""

from copy import deepcopy

import pytest
import torch
from helpers.reference import with_peft
from peft.optimizers import create_loraplus_optimizer

from litlora.args.finetune import TrainArgs
from litlora.errors import LitLoraError
from litlora.lora.checkpoint import write_adapter
from litlora.lora.config import LoRAConfig
from litlora.lora.layer import add_lora, lora_layers, lora_parameters
from litlora.models.checkpoint import Checkpoint
from litlora.nn import backend
from litlora.train.optimizers import adapter_groups, build_optimizer, check_optimizer, set_learning_rate
from litlora.train.schedule import learning_rate

CPU = torch.device("cpu")
TRAIN = TrainArgs(learning_rate=1e-2, lr_warmup_steps=2)
STEPS = 5


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_lora_plus_steps_equal_those_of_peft(kind, use_dora, tiny, tmp_path):
    checkpoint, config = Checkpoint.open(tiny), LoRAConfig(4, 8, 0.0, ("q_proj", "down_proj"), use_dora=use_dora)
    model = checkpoint.load(torch.float32, CPU)
    add_lora(model, config)
    write_adapter(tmp_path, model, config, tiny, checkpoint.fingerprint(), "alpaca")
    theirs = with_peft(tiny, tmp_path, trainable=True)
    reference = create_loraplus_optimizer(theirs, kind, lr=1.0, loraplus_lr_ratio=16.0, loraplus_weight_decay=0.01)
    # PEFT's users schedule by a factor of each group's own rate
    schedule = torch.optim.lr_scheduler.LambdaLR(reference, lambda done: learning_rate(done + 1, STEPS, TRAIN))
    options = {"class_path": f"torch.optim.{kind.__name__}", "init_args": {"weight_decay": 0.01}}
    optimizer = build_optimizer(options, adapter_groups(lora_layers(model).values(), 16.0), 1e-2)
    named = {name.replace("lora_magnitude_vector", "lora_magnitude_vector.weight"): p
             for name, p in lora_parameters(model).items()}  # fmt: skip
    pairs = [(named[name.removeprefix("base_model.model.").replace(".default", "")], p)
             for name, p in theirs.named_parameters() if p.requires_grad]  # fmt: skip
    assert len(pairs) == len(named)
    for step in range(1, STEPS + 1):
        for ours, parameter in pairs:
            ours.grad = torch.randn_like(ours)
            parameter.grad = ours.grad.clone()
        set_learning_rate(optimizer, learning_rate(step, STEPS, TRAIN))
        optimizer.step()
        reference.step()
        schedule.step()
    for ours, parameter in pairs:
        torch.testing.assert_close(ours, parameter, atol=1e-6, rtol=1e-6)


def test_without_ratio_parameters_are_one_group_in_the_order_of_the_layers(tiny):
    model = Checkpoint.open(tiny).load(torch.float32, CPU)
    add_lora(model, LoRAConfig(4, 8, 0.0, ("q_proj",)))
    grouped = adapter_groups(lora_layers(model).values(), 1.0)
    assert all(ours is theirs for ours, theirs in zip(grouped, lora_parameters(model).values(), strict=True))


@pytest.mark.parametrize("ratio", [1.0, 16.0])
def test_optimizer_that_refuses_matrices_of_an_adapter_is_refused_before_the_run(ratio):
    with pytest.raises(LitLoraError, match="--optimizer SparseAdam cannot take a step"):
        check_optimizer("torch.optim.SparseAdam", 1e-3, CPU, ratio)
    check_optimizer("AdamW8bit", 1e-3, CPU, ratio)


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD"])
def test_fused_steps_equal_those_of_many_kernels_and_resume(name, monkeypatch):
    """A CPU has the fused kernels as well, though litlora leaves them to a GPU."""
    parameters = [[torch.nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4)) for _ in range(2)] for _ in range(3)]
    plain = build_optimizer(name, parameters[0], 1e-2)
    monkeypatch.setattr(type(backend.CPU), "fuses_optimizers", lambda *_: True)
    fused, resumed = (build_optimizer(name, some, 1e-2) for some in parameters[1:])
    assert (plain.defaults["fused"], fused.defaults["fused"]) == (None, True)
    for _ in range(STEPS):
        resumed.load_state_dict(deepcopy(fused.state_dict()))
        for first, *others in zip(*parameters, strict=True):
            first.grad = torch.randn_like(first)
            for other in others:
                other.grad = first.grad.clone()
        for optimizer in (plain, fused, resumed):
            optimizer.step()
    for ours, theirs, again in zip(*parameters, strict=True):
        torch.testing.assert_close(theirs, ours, atol=1e-6, rtol=1e-6)
        assert torch.equal(theirs, again)


@pytest.mark.parametrize("chosen", [{"foreach": True}, {"fused": False}])
def test_chosen_kernels_stay(chosen, monkeypatch):
    monkeypatch.setattr(type(backend.CPU), "fuses_optimizers", lambda *_: True)
    optimizer = build_optimizer({"class_path": "AdamW", "init_args": chosen}, [torch.nn.Parameter(torch.ones(2))], 1e-2)
    assert chosen.items() <= optimizer.defaults.items()
    assert not optimizer.defaults["fused"]
