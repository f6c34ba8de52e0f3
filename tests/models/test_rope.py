"""Rotary embeddings of every type against transformers."""

import json

import pytest
import torch
from helpers.families import Family
from helpers.reference import hugging_face
from transformers import AutoConfig, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from litlora.data.batching import Sample, pack, share_prefixes
from litlora.generation.sampler import Sampler
from litlora.generation.session import generate
from litlora.models.checkpoint import Checkpoint
from litlora.models.config import GPTConfig
from litlora.models.rope_config import QueryScaling, RopeConfig
from litlora.models.rope_scaling import RopeTables, frequencies

CPU = torch.device("cpu")
POSITIONS = 32
HUB = {
    "model_type": "llama", "vocab_size": 300, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": POSITIONS,
}  # fmt: skip
SHORT, LONG = [1.0, 1.1, 1.3, 1.5, 1.5, 2.0, 2.0, 3.0], [1.0, 1.5, 2.0, 4.0, 5.0, 8.0, 9.0, 10.0]
FACTORS = {"short_factor": SHORT, "long_factor": LONG}
ROPES = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 2.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 24},
    "yarn factors": {"factor": 4.0, "attention_factor": 0.7, "beta_fast": 8, "beta_slow": 2.0},
    "yarn mscale": {"factor": 40.0, "mscale": 0.707, "mscale_all_dim": 1.0, "truncate": False},
    "yarn no factor": {"factor": 1.0, "mscale": 1.0},
    "longrope": {**FACTORS, "original_max_position_embeddings": 16},
    "longrope factor": {**FACTORS, "factor": 3.0, "original_max_position_embeddings": 16},
    "longrope attention": {**FACTORS, "attention_factor": 1.2, "original_max_position_embeddings": 16},
}


def rope_of(name: str, key: str = "rope_scaling") -> dict[str, object]:
    rope = {"rope_type" if key == "rope_parameters" else "type": name.split()[0], **ROPES[name]}
    return {"rope_theta": 5000.0, key: rope} if key == "rope_scaling" else {key: {"rope_theta": 5000.0, **rope}}


@pytest.mark.parametrize("length", [None, 9, POSITIONS, 41])
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("name", ROPES)
def test_frequencies_equal_transformers(name, key, length):
    hub = HUB | rope_of(name, key)
    rope = GPTConfig.from_hub(hub).ropes[0]
    config = AutoConfig.for_model(**json.loads(json.dumps(hub)))
    if name == "default":
        expected, factor = 5000.0 ** -(torch.arange(0, 16, 2) / 16), 1.0
    else:
        seq_len = None if length is None else torch.tensor(length)
        expected, factor = ROPE_INIT_FUNCTIONS[name.split()[0]](config, CPU, seq_len)
    torch.testing.assert_close(frequencies(rope, rope.regime(length or 1), CPU), expected, atol=0, rtol=3e-7)
    assert rope.attention_factor == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize("name", ROPES)
def test_published_spelling_equals_that_of_transformers_5(name):
    assert GPTConfig.from_hub(HUB | rope_of(name)) == GPTConfig.from_hub(HUB | rope_of(name, "rope_parameters"))


@pytest.mark.parametrize("older", ["su", "yarn"])
def test_longrope_of_phi3_has_older_names(older):
    hub = HUB | {"model_type": "phi3", "original_max_position_embeddings": 16}
    named, expected = (
        GPTConfig.from_hub(hub | {"rope_scaling": {"type": name, **FACTORS}}) for name in (older, "longrope")
    )
    assert named == expected
    assert named.ropes[0].scaling.original_max_position_embeddings == 16


@pytest.mark.parametrize(("name", "depends"), [(name, name[:4] in ("dyna", "long")) for name in ROPES])
def test_regime_tells_lengths_apart(name, depends):
    config = GPTConfig.from_hub(HUB | rope_of(name))
    assert (config.rope_regimes(10) == config.rope_regimes(50)) is not depends


def test_query_scale_is_that_of_llama_4():
    rope = RopeConfig(1e4, 8, query_scaling=QueryScaling(0.1, 4))
    scale = RopeTables([(0, 3), (2, 7)], [0, 0], torch.float32, CPU)[rope].query_scale
    positions = torch.tensor([0, 1, 2, *range(2, 9)])
    torch.testing.assert_close(scale.flatten(), 1 + 0.1 * torch.log(1 + torch.floor(positions / 4)))


EXTENDED = {"default": 32, "linear": 128, "dynamic": 64, "llama3": 32, "yarn": 96, "yarn factors": 128, "longrope": 32}


@pytest.mark.parametrize(("name", "positions"), EXTENDED.items())
def test_positions_are_those_that_the_scaling_extends(name, positions):
    assert GPTConfig.from_hub(HUB | rope_of(name)).positions == positions


@pytest.fixture(scope="module", params=[name for name in ROPES if " " not in name])
def scaled(request, make_checkpoint):
    """Return a checkpoint of each rope type, and its number of key-value heads beside."""
    extended = request.param in ("linear", "dynamic", "yarn")
    sizes = {"hidden_size": 64, "num_key_value_heads": 2, "max_position_embeddings": POSITIONS if extended else 64}
    return make_checkpoint(Family(request.param, LlamaConfig, sizes | rope_of(request.param, "rope_parameters")))


def random_tokens(length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(300, (length,), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_each_packed_sequence_is_rotated_by_its_own_length(scaled):
    """transformers would rotate short sequences by the frequencies of the longest in the batch."""
    model, lengths = Checkpoint.open(scaled).load(torch.float32, CPU), [7, 41, 16, 17, 50]
    sequences = [random_tokens(length) for length in lengths]
    ours = model.lm_head(model(torch.cat(sequences), lengths)).split(lengths)
    for tokens, logits in zip(sequences, ours, strict=True):
        expected = hugging_face(scaled)(tokens[None]).logits[0]
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=2e-6)


def test_greedy_tokens_beyond_the_original_length_equal_transformers(scaled):
    """transformers has no cache here: it would keep keys of other frequencies in it."""
    model, prompt = Checkpoint.open(scaled).load(torch.float32, CPU), random_tokens(9)
    ours = list(generate(model, prompt.tolist(), Sampler(), max_new_tokens=36, stop_ids=[]))
    settings = {"max_new_tokens": 36, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0, "use_cache": False}
    theirs = hugging_face(scaled).generate(prompt[None], attention_mask=torch.ones(1, 9), **settings)
    assert ours == theirs[0, 9:].tolist()


@torch.no_grad()
def test_shared_prefixes_leave_logits_unchanged(scaled):
    model, prefix = Checkpoint.open(scaled).load(torch.float32, CPU), random_tokens(12)
    tokens = [torch.cat((prefix, random_tokens(more, seed))) for seed, more in enumerate((2, 40, 3, 30))]
    micro = share_prefixes(
        pack([Sample(t, t.where(torch.arange(len(t)) > 10, -100)) for t in tokens]), model.config.rope_regimes
    )
    assert any(micro.shared)
    ours = model.lm_head(model(micro.tokens, micro.lengths, shared=micro.shared)).split(micro.lengths)
    whole = {tuple(t.tolist()): model.lm_head(model(t, [len(t)])) for t in tokens}
    for rest, logits in zip(micro.tokens.split(micro.lengths), ours, strict=True):
        expected = next(values for t, values in whole.items() if t[-len(rest) :] == tuple(rest.tolist()))
        torch.testing.assert_close(logits, expected[-len(rest) :], atol=1e-5, rtol=2e-6)
