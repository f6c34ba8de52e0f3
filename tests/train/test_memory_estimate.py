"""Estimated memory against the bytes of real networks, optimizers and graphs."""

import json
import re
from dataclasses import replace
from weakref import WeakSet

import memory_table
import pytest
import torch
from helpers.runs import QUERY_VALUE

from litlora.__main__ import main
from litlora.cpu import onednn
from litlora.lora.config import TARGET_MODULES, LoRAConfig
from litlora.lora.layer import add_lora, lora_parameters
from litlora.models.checkpoint import block_linears
from litlora.models.config import GPTConfig
from litlora.models.rope_config import QueryScaling, RopeConfig
from litlora.models.transformer import GPT
from litlora.nn.loss import supervised_loss
from litlora.nn.nf4 import NF4Linear, Quantization
from litlora.train.activation_memory import activation_bytes
from litlora.train.memory_check import has_room
from litlora.train.memory_estimate import breakdown, nf4_bytes, optimizer_bytes, weight_bytes
from litlora.train.network_shape import Load, Network
from litlora.train.optimizers import build_optimizer

SHAPE = {"vocab_size": 199, "hidden_size": 48, "intermediate_size": 112, "num_hidden_layers": 3, "head_dim": 8}
HEADS = {"num_attention_heads": 6, "num_key_value_heads": 2}
HUB = {"model_type": "llama", **SHAPE, **HEADS, "max_position_embeddings": 512}
CONFIG = GPTConfig.from_hub(HUB)
LENGTHS = (130, 70, 1)
SUPERVISED = 151
GPU = torch.device("cuda")
ALL = tuple(name for names in TARGET_MODULES.values() for name in names)


BIASES = {"qkv_bias": True, "o_bias": True, "mlp_bias": True}


def network(precision="32-true", targets=("q_proj", "v_proj"), tied=False, use_dora=False, **flags) -> Network:
    config, lora = (
        replace(CONFIG, tie_word_embeddings=tied, **flags),
        LoRAConfig(4, 16, 0.1, targets, use_dora=use_dora),
    )
    return Network(config, lora, precision, None, torch.device("cpu"))


def real(network: Network) -> GPT:
    """Build the model that a network describes."""
    gpt = GPT(network.config)
    gpt.to(torch.bfloat16 if network.precision == "bf16-true" else torch.float32)
    add_lora(gpt, network.lora)
    return gpt


@pytest.mark.parametrize("flags", [{}, BIASES], ids=["no bias", "biases"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
def test_weights_and_adapter_equal_the_real_ones(precision, tied, flags):
    described = network(precision, ALL[:-1] if tied else ALL, tied, **flags)
    gpt = real(described)
    parts = breakdown(described, Load(LENGTHS, SUPERVISED), "AdamW")
    frozen, matrices = ([p for p in gpt.parameters() if p.requires_grad is kind] for kind in (False, True))
    assert sum(weight_bytes(gpt, None).values()) == sum(weight.nbytes for weight in frozen)
    assert weight_bytes(gpt, None).items() <= parts.items()
    assert parts["adapter, float32"] == sum(matrix.nbytes for matrix in matrices)


@pytest.mark.parametrize(("length", "beyond"), [(1000, False), (1, True)])
def test_gradients_reuse_the_memory_of_activations(length, beyond):
    parts = breakdown(network(), Load((length,), length, concurrent=2), "SGD")
    adapter, gradients, activations = (parts[n] for n in ("adapter, float32", "its gradients", "activations"))
    assert (2 * adapter > activations) is beyond
    assert gradients + activations == adapter + max(2 * adapter, activations)


def test_nf4_bytes():
    assert nf4_bytes(2**20, double=False) == 2**19 + 4 * 2**14
    assert nf4_bytes(2**20, double=True) == 2**19 + 2**14 + 4 * 2**6
    plain, nf4, double = (weight_bytes(network().outline(), name) for name in (None, "bnb.nf4", "bnb.nf4-dq"))
    assert plain["embedding, float32"] == nf4["embedding, float32"] == double["embedding, float32"]
    assert double["linear layers, NF4-DQ"] < nf4["linear layers, NF4"] < plain["linear layers, float32"] / 7


OPTIMIZERS = [
    "AdamW",
    "SGD",
    {"class_path": "torch.optim.SGD", "init_args": {"momentum": 0.9}},
    "Adafactor",
    {"class_path": "AdamW", "init_args": {"amsgrad": True}},
]


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=str)
def test_optimizer_bytes_equal_its_state_after_a_step(optimizer):
    matrices = list(lora_parameters(real(network(targets=ALL))).values())
    built = build_optimizer(optimizer, matrices, lr=1e-3)
    for matrix in matrices:
        matrix.grad = torch.ones_like(matrix)
    built.step()
    saved = sum(t.nbytes for state in built.state.values() for t in state.values() if isinstance(t, torch.Tensor))
    assert optimizer_bytes(optimizer, matrices) == saved


class Saved:
    """A tensor that a graph saves for backward, alive as long as the graph holds it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def batch(described: Network, load: Load) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens, and the labels of some of them."""
    tokens = torch.randint(described.config.vocab_size, (load.tokens,), device=described.device)
    return tokens, tokens.where(torch.arange(load.tokens, device=described.device) < load.supervised, -100)


def saved_bytes(described: Network, load: Load) -> int:
    """Return the bytes that a real forward pass saves, without the weights."""
    gpt, saved = real(described).to(described.device), WeakSet()
    gpt.model.activation_checkpointing = load.activation_checkpointing
    tokens, labels = batch(described, load)

    def pack(tensor: torch.Tensor) -> Saved:
        saved.add(wrapper := Saved(tensor))
        return wrapper

    mixed = torch.autocast(described.device.type, torch.bfloat16, enabled=described.precision == "bf16-mixed")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved_tensor: saved_tensor.tensor), mixed:
        loss = supervised_loss(gpt(tokens, load.lengths), gpt.lm_head, labels, gpt.config.logit_softcap)
    weights = {p.untyped_storage().data_ptr() for p in gpt.parameters()}
    storages = {item.tensor.untyped_storage().data_ptr(): item.tensor.untyped_storage().nbytes() for item in saved}
    loss.backward()
    return sum(size for address, size in storages.items() if address not in weights)


@pytest.mark.parametrize("has_products", [False, True], ids=["slow", "native"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["saved", "checkpointed"])
@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ALL, *TARGET_MODULES.values()], ids="-".join)
@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
def test_activation_bytes_equal_those_a_graph_saves(precision, targets, checkpointing, has_products, monkeypatch):
    monkeypatch.setattr(onednn, "HAS_BFLOAT16_PRODUCTS", has_products)
    described, load = network(precision, targets), Load(LENGTHS, SUPERVISED, checkpointing)
    assert activation_bytes(described, load) == saved_bytes(described, load)


NORMED = {"norm": "layer_norm", "norm_bias": True}
FAMILIES = {
    "phi": {**BIASES, **NORMED, "gated_mlp": False, "activation": "gelu", "shared_pre_norm": True, "head_bias": True},
    "phi3": {"fused_qkv": "rows", "fused_gate_up": True},
    "neox": {"num_key_value_heads": 6, "fused_qkv": "heads", **NORMED, "gated_mlp": False, "parallel_residual": True},
    "qwen3": {"qk_norm": "head"},
    "gemma2": {"norm": "rms_plus_one", "post_norms": True, "logit_softcap": 30.0, "embedding_scale": 7.0},
    "olmo": {"norm": "layer_norm", "norm_weight": False, "clip_qkv": 1.0},
    "olmo2": {"qk_norm": "full", "pre_norms": False, "post_norms": True},
    "granite": {"residual_scale": 0.5, "logit_scale": 0.5},
}
"""Flags of families whose blocks save different tensors."""


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("flags", FAMILIES.values(), ids=FAMILIES)
def test_activation_bytes_of_families_are_about_those_a_graph_saves(flags, precision):
    """Not exactly: a CPU has statistics of LayerNorm in bfloat16."""
    targets = (*ALL, "qkv_proj", "gate_up_proj")
    described, load = network(precision, targets, **flags), Load(LENGTHS, SUPERVISED)
    assert activation_bytes(described, load) == pytest.approx(saved_bytes(described, load), rel=0.01)
    assert sum(weight_bytes(described.outline(), None).values()) == sum(
        p.nbytes for p in real(described).parameters() if not p.requires_grad
    )


WINDOWS = {"sliding_window": 20, "full_attention_layers": (0, 2)}
ROPES = {"ropes": (RopeConfig(1e4, 4, interleaved=True), None, RopeConfig(1e3, 8, query_scaling=QueryScaling(0.1, 9)))}
SOFTCAP = {"attention_softcap": 2.0, **WINDOWS}


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("flags", [BIASES, WINDOWS, ROPES, SOFTCAP], ids=["biases", "windows", "ropes", "softcap"])
def test_activation_bytes_are_exact_with_the_flags_of_a_family(flags, precision):
    described, load = network(precision, ALL, **flags), Load(LENGTHS, SUPERVISED)
    assert activation_bytes(described, load) == saved_bytes(described, load)


@pytest.mark.parametrize("flags", [{}, BIASES], ids=["plain", "biases"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["saved", "checkpointed"])
@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ALL, ("lm_head",)], ids="-".join)
@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
def test_dora_activations_take_the_bytes_that_its_graph_saves(precision, targets, checkpointing, flags):
    described, load = network(precision, targets, use_dora=True, **flags), Load(LENGTHS, SUPERVISED, checkpointing)
    assert activation_bytes(described, load) == saved_bytes(described, load)


@pytest.mark.parametrize("quantize", [None, "bnb.nf4"])
def test_ranks_by_pattern_and_chosen_blocks_take_their_own_bytes(quantize):
    chosen = {"rank_pattern": {"v_proj": 9, r"layers\.1\..*": 2}, "layers_to_transform": (1, 2)}
    lora, load = LoRAConfig(4, 16, 0.1, ("q_proj", "v_proj"), **chosen), Load(LENGTHS, SUPERVISED)
    described = replace(network(), lora=lora)
    assert activation_bytes(described, load) == saved_bytes(described, load)
    matrices = [p for p in real(described).parameters() if p.requires_grad]
    parts = breakdown(replace(described, quantize=quantize), load, "SGD")
    assert parts["adapter, float32"] == sum(matrix.nbytes for matrix in matrices)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4"])
def test_start_that_is_taken_out_of_the_base_takes_memory_of_its_own(init):
    plain = network(targets=ALL, tied=True)
    described = replace(plain, lora=replace(plain.lora, init=init))
    load = Load(LENGTHS, SUPERVISED)
    before, parts = (breakdown(shape, load, "AdamW") for shape in (plain, described))
    assert parts["its start"] == parts["adapter, float32"] == before["adapter, float32"]
    assert parts["output head, float32"] == CONFIG.vocab_size * CONFIG.hidden_size * 4  # no longer the embedding
    assert before["output head, float32"] == 0
    assert parts["singular vectors, beyond a step"] == 0
    few = breakdown(described, Load((1,), 1), "SGD")["singular vectors, beyond a step"]
    assert (few > 0) is (init == "pissa")


@pytest.mark.gpu
@pytest.mark.parametrize("checkpointing", [False, True], ids=["saved", "checkpointed"])
@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ALL], ids="-".join)
@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
def test_activation_bytes_on_gpu(precision, targets, checkpointing):
    lengths = (128, 64, 32)  # none of which FlashAttention pads
    described, load = replace(network(precision, targets), device=GPU), Load(lengths, SUPERVISED, checkpointing)
    beside = saved_bytes(described, load) - activation_bytes(described, load)
    assert 0 <= beside < 1000  # of attention: where sequences begin, and a random state


@pytest.mark.gpu
@pytest.mark.parametrize("checkpointing", [False, True], ids=["saved", "checkpointed"])
@pytest.mark.parametrize(
    ("precision", "quantize"),
    [("32-true", None), ("bf16-true", None), ("bf16-mixed", None), ("32-true", "bnb.nf4"), ("bf16-true", "bnb.nf4")],
)
def test_step_on_gpu_takes_about_the_estimate(precision, quantize, checkpointing):
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12, "head_dim": 64}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 16}
    shape = GPTConfig.from_hub(HUB | sizes | heads | {"vocab_size": 32000, "max_position_embeddings": 1024})
    described = replace(network(precision), config=shape, quantize=quantize, device=GPU)
    load = Load((512, 300, 200), 700, checkpointing)
    gpt = quantized(described)
    gpt.model.activation_checkpointing = checkpointing
    tokens, labels = batch(described, load)
    optimizer = build_optimizer("AdamW", lora_parameters(gpt).values(), lr=1e-3)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16-mixed"):
            loss = supervised_loss(gpt(tokens, load.lengths), gpt.lm_head, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    printed = sum(breakdown(described, load, "AdamW").values())
    assert printed == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.15)


def quantized(described: Network) -> GPT:
    """Return a model on its device, whose blocks are in 4 bits where they are to be."""
    gpt = GPT(described.config).to(GPU, torch.bfloat16 if described.stream == 2 else torch.float32)
    if described.quantize:
        quantization = Quantization(described.quantize, gpt.lm_head.weight.dtype)
        for name in block_linears(gpt):
            parent, _, child = name.rpartition(".")
            linear = NF4Linear(gpt.get_submodule(name).weight.detach(), quantization)
            setattr(gpt.get_submodule(parent), child, linear)
    add_lora(gpt, described.lora)
    return gpt


def test_dry_run_prints_what_the_run_does_and_leaves_nothing(tiny, data_dir, tmp_path, capsys):
    folders = ["--checkpoint_dir", tiny, "--data_dir", data_dir, "--out_dir", tmp_path / "out"]
    flags = ["--train.epochs", 2, "--train.global_batch_size", 4, "--train.max_steps", 5]
    flags += [*QUERY_VALUE, "--lora_mlp", "true"]
    command = ["finetune_lora", *map(str, folders + flags)]
    assert main([*command, "--dry_run", "true"]) == 0
    captured = capsys.readouterr()
    printed = dict(re.findall(r"^ *(.+?)  +([\d.,]+)$", captured.out, re.MULTILINE))
    assert not list(tmp_path.iterdir())
    assert main(command) == 0
    adapted = "LoRA of rank 8 and alpha 16 on q_proj, v_proj, gate_proj, up_proj, down_proj"
    assert all(adapted in err.splitlines() for err in (captured.err, capsys.readouterr().err))
    report = json.loads((tmp_path / "out/final/report.json").read_text(encoding="utf-8"))
    for name in ("trainable parameters", "frozen parameters", "steps", "tokens"):
        assert printed[name] == f"{report[name.replace(' ', '_')]:,}"
    parts = list(printed)[list(printed).index("embedding, bfloat16") :]
    assert parts[-1] == "peak memory, GB"
    assert sum(float(printed[part]) for part in parts[:-1]) == pytest.approx(float(printed[parts[-1]]), abs=0.01)
    estimated = report["estimated_memory_gb"]
    assert list(estimated) == parts[:-1]
    of_network = parts[:-2]  # without Python and torch, which have grown here
    assert [f"{estimated[part]:.3f}" for part in of_network] == [printed[part] for part in of_network]


def test_longest_micro_batch_is_that_of_all_steps(tiny, data_dir, tmp_path, capsys):
    folders = ["--checkpoint_dir", tiny, "--data_dir", data_dir, "--out_dir", tmp_path / "out"]
    flags = ["--train.micro_batch_size", 1, "--train.max_seq_length", 200, "--dry_run", "true"]
    flags += ["--train.micro_batch_tokens", "null"]
    assert main(["finetune_lora", *map(str, folders + flags)]) == 0
    assert re.search(r"^tokens in the longest micro-batch +200$", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize(
    ("flags", "concurrent"),
    [
        ([], 2),
        (["--devices", 4], 1),
        (["--train.global_batch_size", 2], 1),
        (["--strategy", "fsdp"], 2),
        (["--strategy", "fsdp", "--devices", 2], 1),
    ],
)
def test_concurrent_micro_batches_multiply_activations(
    pico, data_dir, tmp_path, capsys, four_threads, flags, concurrent
):
    folders = ["--checkpoint_dir", pico, "--data_dir", data_dir, "--out_dir", tmp_path / "out"]
    command = ["finetune_lora", *map(str, folders), "--dry_run", "true", "--train.micro_batch_size", "2"]
    command += ["--train.micro_batch_tokens", "null", *map(str, flags), "--precision", "32-true"]
    printed = []
    for count in ("1", "2"):
        assert main([*command, "--train.parallel_micro_batches", count]) == 0
        printed.append(dict(re.findall(r"^ *(.+?)  +([\d.,]+)$", capsys.readouterr().out, re.MULTILINE)))
    for part in ("activations", "temporaries", "fragmentation"):
        single, several = (float(parts[part]) for parts in printed)
        assert several == pytest.approx(concurrent * single, abs=0.0015)


def llama(name: str, shards: int = 1) -> Network:
    device = torch.device("cuda")
    return replace(network("bf16-true"), config=memory_table.config(name), device=device, shards=shards)


def test_sharded_base_counts_shards_and_gathered_weights():
    load = Load((512,), 512)
    full, sharded = (breakdown(llama("70B (Llama 2)", shards), load, "AdamW") for shards in (1, 8))
    *outside, blocks = (name for name in full if name.endswith("bfloat16"))
    assert all(8 * sharded[name] == full[name] for name in (*outside, blocks))
    assert sharded["gathered weights"] == sum(full[name] for name in outside) + full[blocks] // 40
    assert {name: sharded[name] for name in full if "bfloat16" not in name}.items() <= full.items()


@pytest.mark.parametrize(("name", "room"), [("7B (Llama 2)", True), ("13B (Llama 2)", False)])
def test_base_fits_a_gpu_or_not(name, room):
    assert has_room(24 * 10**9, llama(name), Load((512,), 512), "AdamW") is room


@pytest.mark.parametrize("strategy", ["auto", "ddp", "fsdp"])
def test_forecast_for_several_devices_is_per_device(tiny, data_dir, tmp_path, capsys, strategy):
    folders = ["--checkpoint_dir", tiny, "--data_dir", data_dir, "--out_dir", tmp_path / "out"]
    flags = ["--dry_run", "true", "--devices", "2", "--strategy", strategy]
    assert main(["finetune_lora", *map(str, folders), *flags]) == 0
    assert ("gathered weights" in capsys.readouterr().out) == (strategy == "fsdp")


PARAMETERS = [134_515_008, 1_235_814_400, 6_738_415_616, 8_030_261_248, 13_015_864_320, 68_976_648_192]


@pytest.mark.parametrize(("name", "parameters"), list(zip(memory_table.SHAPES, PARAMETERS, strict=True)))
def test_table_shapes_have_the_published_parameter_counts(name, parameters):
    described = replace(network("bf16-true"), config=memory_table.config(name))
    weights = sum(weight_bytes(described.outline(), None).values())
    assert weights == 2 * parameters


def test_table_has_a_row_for_every_model_and_base(capsys, monkeypatch):
    monkeypatch.setattr(memory_table, "TABLE", ("7B (Llama 2)",))
    memory_table.main()
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[:2] for row in rows] == [["7B (Llama 2)", base] for base in memory_table.BASES]
    weights, trained, saved, peak, recomputed, least = (
        tuple(float(row[column]) for row in rows) for column in range(2, 8)
    )
    assert weights[0] > 3 * weights[1] > 3 * weights[2]
    for index, total in enumerate(peak):
        assert total == pytest.approx(weights[index] + trained[index] + saved[index], abs=0.02)
        assert least[index] == pytest.approx(total - saved[index] + recomputed[index], abs=0.02)
