"""A GPU kept busy: kernel launches and synchronisations of training steps, counted on the meta device."""

from contextlib import nullcontext

import pytest
import torch
from helpers.launches import META, Launches
from lightning_fabric import Fabric
from lightning_fabric.accelerators import CPUAccelerator
from lightning_fabric.strategies import SingleDeviceStrategy

from litlora.args.finetune import EvalArgs, FinetuneLoraArgs, TrainArgs
from litlora.data.batching import Samples
from litlora.data.dataset import read_examples
from litlora.data.encoding import encode
from litlora.data.prompts.styles import StyleSettings
from litlora.data.tokenizer import Tokenizer
from litlora.distributed.process_group import Ranks
from litlora.evaluation.engine import Engine
from litlora.evaluation.validation import ValLoss
from litlora.lora import low_rank
from litlora.lora.config import LoRAConfig
from litlora.lora.layer import add_lora, lora_layers
from litlora.models.checkpoint import block_linears
from litlora.models.config import GPTConfig
from litlora.models.transformer import GPT
from litlora.nn import attention, cuda_backend, transfer
from litlora.nn.backend import CUDA
from litlora.nn.nf4 import NF4Linear, Quantization
from litlora.train.loggers import Loggers
from litlora.train.loop import Run, fit
from litlora.train.optimizers import adapter_groups, build_optimizer
from litlora.train.resume import Identity
from litlora.train.run_dir import ReadOnlyRunFolder
from litlora.train.train_state import Progress
from litlora.utils.signals import StopRequest

KERNELS_OF_A_BLOCK = 204
"""Forward, backward and the sums of the gradients: a change that needs fewer lowers it."""
SIZES = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 16}
LORA = LoRAConfig(4, 8, 0.0, ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"))


class MetaAccelerator(CPUAccelerator):
    """The meta device, which needs no setup."""

    def setup_device(self, device: torch.device) -> None:
        assert device == META


def llama(layers: int, quantization: Quantization | None) -> GPT:
    config = {"model_type": "llama", "rms_norm_eps": 1e-5, "num_key_value_heads": 2, "num_hidden_layers": layers}
    with META:
        gpt = GPT(GPTConfig.from_hub(config | SIZES)).to(torch.bfloat16)
        for name in block_linears(gpt) if quantization else ():
            parent, _, child = name.rpartition(".")
            setattr(gpt.get_submodule(parent), child, NF4Linear(gpt.get_submodule(name).weight, quantization))
    add_lora(gpt, LORA)
    return gpt


@pytest.fixture(scope="module")
def samples(tiny, data_dir) -> Samples:
    tokenizer = Tokenizer(tiny)
    examples, style = read_examples(data_dir / "train.jsonl"), tokenizer.prompt_style("alpaca")
    return Samples(encode(examples, tokenizer, style, mask_prompt=True), max_seq_length=512)


@pytest.fixture
def train(tiny, data_dir, samples, tmp_path, monkeypatch):
    """Return a function that trains on the meta device as on a GPU with FlashAttention, and counts the launches."""
    monkeypatch.setattr(cuda_backend, "_has_flash_attention", lambda *_: True)
    monkeypatch.setattr(low_rank, "without_autocast", lambda _: nullcontext())  # which the meta device does not have

    def run(layers: int, micro_batch_size: int, quantization: Quantization | None = None) -> Launches:
        sizes = {"global_batch_size": 8, "micro_batch_size": micro_batch_size, "micro_batch_tokens": None}
        settings = TrainArgs(**sizes, max_steps=1, learning_rate=1e-3)
        gpt = llama(layers, quantization)
        fabric = Fabric(strategy=SingleDeviceStrategy(META, MetaAccelerator()), devices=1)
        adam = {"class_path": "AdamW", "init_args": {"foreach": True}}  # as it is on a GPU, if not fused
        _, optimizer = fabric.setup(gpt, build_optimizer(adam, adapter_groups(lora_layers(gpt).values(), 1), 1e-3))
        engine = Engine(gpt, fabric, "bf16-true", CUDA.worker_pool(1), Ranks(0, 1, META))
        args = FinetuneLoraArgs(checkpoint_dir=tiny, data_dir=data_dir, out_dir=tmp_path / "run", train=settings)
        folder = ReadOnlyRunFolder(args, LORA, (), Identity({}, {}), StyleSettings("alpaca"))
        never = EvalArgs(initial_validation=False, final_validation=False)
        loss, others = lambda step: ValLoss(1.0), (folder, None, Loggers(), StopRequest(None))
        with Launches() as launches:
            fit(Run(engine, optimizer, samples, settings, never, 1, loss, *others), Progress())
        return launches

    return run


@pytest.mark.parametrize("quantization", [None, Quantization("bnb.nf4", torch.bfloat16)], ids=["dense", "nf4"])
def test_host_waits_for_the_logged_loss_and_norm_alone(quantization, train):
    assert train(2, 4, quantization).waits == {"_local_scalar_dense": 2}


def test_copies_of_a_micro_batch_do_not_wait(train, monkeypatch):
    """Tokens, labels and their positions, the sequences' bounds and rotated positions: each from pinned memory."""
    sent, made, tensor = [], [], torch.tensor

    def recorded_copy(tensors, device):
        sent.extend(tensors)
        return transfer.copy_ahead(tensors, device)

    def recorded_tensor(*args, **settings):  # its copy to a device waits, and the dispatcher does not see it
        made.append(settings.get("device"))
        return tensor(*args, **settings)

    attention._bounds.cache_clear()
    monkeypatch.setattr(torch, "tensor", recorded_tensor)
    for module in (cuda_backend, attention):
        monkeypatch.setattr(module, "copy_ahead", recorded_copy)
    launches = train(2, 4)
    assert len(sent) == 5 * 2
    assert launches.copies.total() - len(sent) <= 1  # the model's frequencies, once
    assert made
    assert META not in made


def test_kernels_of_a_micro_batch(train):
    """Those of a block are counted, its seven adapters included, and no further sequence of a micro-batch adds any."""
    one, two, four = (train(2, size).kernels.total() for size in (8, 4, 2))
    assert four - two == 2 * (two - one)
    with_another_block = [train(3, size).kernels.total() for size in (8, 4)]
    of_a_block = with_another_block[1] - with_another_block[0] - (two - one)
    assert of_a_block <= KERNELS_OF_A_BLOCK
