import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.families import FAMILIES, Family
from helpers.reference import hugging_face
from safetensors.torch import load_file, save_file
from torch import Tensor

from litlora.__main__ import main
from litlora.errors import LitLoraError
from litlora.models import weights as weights_module
from litlora.models.checkpoint import Checkpoint
from litlora.models.checkpoint_files import weight_files
from litlora.models.transformer import GPT
from litlora.models.weights import Weights, fingerprint

TIED = next(family for family in FAMILIES if family.keys.get("tie_word_embeddings"))


@pytest.fixture(scope="module")
def sharded(make_checkpoint) -> Path:
    return make_checkpoint(FAMILIES[0], max_shard_size="20KB")


@pytest.fixture
def copy(tiny, tmp_path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


@pytest.fixture
def tied(checkpoints, tmp_path) -> Path:
    return Path(shutil.copytree(checkpoints(TIED.name), tmp_path / "tied"))


def load(folder: Path, dtype: torch.dtype = torch.float32) -> GPT:
    return Checkpoint.open(folder).load(dtype, torch.device("cpu"))


def change(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def assert_same_weights(ours: GPT, theirs: torch.nn.Module) -> None:
    expected = theirs.state_dict()
    actual = ours.state_dict()
    assert actual.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(actual[name], weight), name
        assert actual[name].dtype is weight.dtype


def test_weights_equal_transformers(checkpoint):
    assert_same_weights(load(checkpoint), hugging_face(checkpoint))


def test_sharded_weights_equal_those_of_one_file(sharded, tiny):
    assert len(weight_files(sharded)) > 3
    assert_same_weights(load(sharded), load(tiny))


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_have_the_requested_dtype(make_checkpoint, stored):
    folder = make_checkpoint(FAMILIES[0], dtype=stored)
    for dtype in (torch.float32, torch.bfloat16):
        assert_same_weights(load(folder, dtype), hugging_face(folder, dtype))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's list of memory maps")
def test_uncast_weights_stay_memory_mapped(checkpoint, sharded):
    for folder in (checkpoint, sharded):
        model = load(folder)
        maps = memory_maps(weight_files(folder))
        for name, weight in model.state_dict().items():
            assert any(start <= weight.data_ptr() < end for start, end in maps), name


def memory_maps(files: list[Path]) -> list[tuple[int, int]]:
    """Return where in this process's memory the files are mapped."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    names = {str(path.resolve()) for path in files}
    ranges = [line[0].split("-") for line in lines if line[-1] in names]
    return [(int(start, 16), int(end, 16)) for start, end in ranges]


def test_outline_has_no_weights(checkpoint):
    model = Checkpoint.open(checkpoint).outline()
    assert all(weight.is_meta for weight in model.state_dict().values())


def test_tied_head_is_the_embedding(checkpoints, tied):
    embedding = Weights(tied)["model.embed_tokens.weight"]
    for stored in (False, True):
        if stored:
            change(tied, lambda tensors: tensors.update({"lm_head.weight": embedding.clone()}))
        assert ("lm_head.weight" in Weights(tied)) is stored
        model = load(tied)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert_same_weights(model, hugging_face(checkpoints(TIED.name)))


def test_tied_head_that_differs_is_refused(tied):
    head = Weights(tied)["model.embed_tokens.weight"].clone()
    head[299, 31] += 1
    change(tied, lambda tensors: tensors.update({"lm_head.weight": head}))
    with pytest.raises(LitLoraError) as refused:
        load(tied)
    assert str(refused.value) == (
        f'{tied}: config.json has "tie_word_embeddings": true, but lm_head.weight differs from '
        "model.embed_tokens.weight; use config.json and weights of the same model"
    )


@pytest.mark.parametrize("layer", ["self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"])
def test_bias_that_the_model_does_not_have_is_refused(copy, layer):
    name = f"model.layers.1.{layer}.bias"
    change(copy, lambda tensors: tensors.update({name: torch.ones(32)}))
    with pytest.raises(LitLoraError) as refused:
        load(copy)
    expected = f"the weights have {name}, which the model of config.json does not have"
    assert str(refused.value) == f"{copy}: {expected}; use config.json and weights of the same model"


def test_bias_that_the_model_has_must_be_stored(checkpoints, tmp_path):
    folder = Path(shutil.copytree(checkpoints("llama-biases"), tmp_path / "biases"))
    change(folder, lambda tensors: tensors.pop("model.layers.1.self_attn.q_proj.bias"))
    with pytest.raises(LitLoraError, match=r"the weights lack model\.layers\.1\.self_attn\.q_proj\.bias;"):
        load(folder)


def test_untied_head_must_be_stored(copy):
    change(copy, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(LitLoraError, match=r"the weights lack lm_head\.weight;"):
        load(copy)


def test_stored_rotary_frequencies_are_ignored(copy, tiny):
    frequencies = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.zeros(4) for i in range(2)}
    change(copy, lambda tensors: tensors.update(frequencies))
    assert_same_weights(load(copy), load(tiny))


def test_tensor_in_two_files_is_refused(sharded, tmp_path):
    folder = Path(shutil.copytree(sharded, tmp_path / "folder"))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    name, shard = next(iter(index["weight_map"].items()))
    other = next(file for file in index["weight_map"].values() if file != shard)
    save_file(load_file(folder / other) | {name: load_file(folder / shard)[name]}, folder / other)
    with pytest.raises(LitLoraError) as refused:
        load(folder)
    assert str(refused.value) == f"{folder} holds the tensor {name} twice; download it again"


@pytest.mark.parametrize("family", [FAMILIES[0], FAMILIES[1]], ids=["one file", "many files"])
def test_fingerprint_depends_on_every_byte_of_the_tensors(family: Family, make_checkpoint, tmp_path):
    folder = make_checkpoint(family, max_shard_size="20KB" if family is FAMILIES[1] else "5GB")
    fingerprints = {Checkpoint.open(folder).fingerprint()}
    positions = [(path, at) for path in weight_files(folder) for at in content_of(path)[::4999]]
    assert len(positions) > 20
    for path, at in positions:
        intact = path.read_bytes()
        path.write_bytes(intact[:at] + bytes([intact[at] ^ 1]) + intact[at + 1 :])
        fingerprints.add(Checkpoint.open(folder).fingerprint())
        path.write_bytes(intact)
    assert len(fingerprints) == len(positions) + 1


def content_of(path: Path) -> range:
    """Return the positions of the bytes behind the header of a safetensors file."""
    content = path.read_bytes()
    return range(8 + int.from_bytes(content[:8], "little"), len(content))


def test_fingerprint_of_many_tensors_reads_a_part_of_each(monkeypatch, tiny):
    """Of a large model, each tensor counts with its beginning and three more pieces."""
    monkeypatch.setattr(weights_module, "WHOLE", 0)
    monkeypatch.setattr(weights_module, "PIECE", 16)
    read = []
    monkeypatch.setattr(weights_module.os, "pread", lambda *a: read.append(a[1]) or bytes(a[1]))
    digests = weights_module.tensor_digests(Weights(tiny).stored)
    assert len(digests) == len(Weights(tiny))
    assert 4 * len(digests) <= len(read) <= 5 * len(digests)
    assert sum(read) <= 5 * 16 * len(digests)


def reshard(folder: Path, name_order: int, shards: int, metadata: dict[str, str]) -> None:
    """Write the weights of a checkpoint anew: in another order, in as many files, with other metadata."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)[::name_order]
    (folder / "model.safetensors").unlink()
    files = {f"model-{n + 1:05d}-of-{shards:05d}.safetensors": names[n::shards] for n in range(shards)}
    for file, part in files.items():
        save_file({name: tensors[name] for name in part}, folder / file, metadata=metadata)
    weight_map = {name: file for file, part in files.items() for name in part}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


@pytest.mark.parametrize("shards", [1, 2, 7])
@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"format": "pt", "made_by": "another program"}])
def test_fingerprint_is_that_of_the_tensors_however_they_are_stored(copy, tiny, shards, metadata):
    reshard(copy, -1, shards, metadata)
    one, other = Checkpoint.open(copy), Checkpoint.open(tiny)
    assert (one.fingerprint(), one.tensor_digests) == (other.fingerprint(), other.tensor_digests)


def test_fingerprint_ignores_a_copy_of_the_tied_head_and_unused_tensors(tied):
    before = Checkpoint.open(tied).fingerprint()
    change(tied, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    change(tied, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}))
    assert Checkpoint.open(tied).fingerprint() == before


def test_tensors_that_differ_are_named(copy, tiny):
    was = Checkpoint.open(tiny)
    recorded = was.fingerprint(), was.tensor_digests
    assert Checkpoint.open(copy).difference(*recorded) is None
    change(copy, lambda tensors: tensors["model.norm.weight"].add_(1))
    assert Checkpoint.open(copy).difference(*recorded) == "model.norm.weight differs"
    change(copy, lambda tensors: [tensor.add_(1) for tensor in tensors.values()])
    names = "lm_head.weight, model.embed_tokens.weight, model.layers.0.input_layernorm.weight"
    assert Checkpoint.open(copy).difference(*recorded) == f"{names} and {len(Weights(tiny)) - 3} more differ"
    assert Checkpoint.open(copy).difference(recorded[0], "") == "it has other tensors"


def test_fingerprint_of_files_as_earlier_versions_recorded_it_is_recognized(copy, tiny):
    recorded = fingerprint(weight_files(tiny))
    assert Checkpoint.open(copy).difference(recorded, None) is None
    change(copy, lambda tensors: tensors["model.norm.weight"].add_(1))
    assert Checkpoint.open(copy).difference(recorded, None) == "its tensors differ"


def test_fingerprint_of_a_copy_is_the_same(checkpoint, tmp_path):
    copied = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    assert Checkpoint.open(copied).fingerprint() == Checkpoint.open(checkpoint).fingerprint()


@pytest.fixture
def opened(monkeypatch) -> Counter[Path]:
    """Count how often each safetensors header is parsed, and how often any other file is opened."""
    opened: Counter[Path] = Counter()
    open_path, open_header = Path.open, weights_module.safe_open

    def count_header(path: Path, **options):
        opened[path] += 1
        return open_header(path, **options)

    def count_file(path: Path, *arguments, **options):
        opened[path] += path.suffix != ".safetensors"  # whose content is hashed as well
        return open_path(path, *arguments, **options)

    monkeypatch.setattr(weights_module, "safe_open", count_header)
    monkeypatch.setattr(Path, "open", count_file)
    return opened


@pytest.fixture(scope="module")
def run(sharded, data_dir, tmp_path_factory) -> list[str]:
    """Train for a step on a base of several files, and return the command."""
    out_dir = tmp_path_factory.mktemp("run") / "run"
    folders = ["--checkpoint_dir", sharded, "--data_dir", data_dir, "--out_dir", out_dir]
    limits = ["--train.global_batch_size", 5, "--train.save_interval", 1, "--train.max_steps", 1]
    command = ["finetune_lora", *map(str, [*folders, *limits, "--eval.max_new_tokens", 4])]
    assert main(command) == 0
    return command


@pytest.mark.parametrize("command", ["generate", "merge_lora", "resume", "finetune_lora", "fisher"])
def test_command_reads_config_and_headers_once(command, run, sharded, tmp_path, opened):
    out_dir = Path(run[6])
    fisher = ["--quantize", "bnb.nf4", "--lora_init", "fisher"]
    commands = {
        "generate": ["generate", "--checkpoint_dir", out_dir / "final", "--prompt", "x", "--max_new_tokens", 2],
        "merge_lora": ["merge_lora", "--checkpoint_dir", out_dir / "final", "--out_dir", tmp_path / "merged"],
        "resume": [*run, "--resume", "true", "--train.max_steps", 2],
        "finetune_lora": [*run, "--out_dir", tmp_path / "run"],
        "fisher": [*run, "--out_dir", tmp_path / "run", *fisher],
    }
    if command == "resume":
        shutil.rmtree(out_dir / "final")  # as if the run had been killed before its end
    assert main([*map(str, commands[command])]) == 0
    expected = dict.fromkeys([*weight_files(sharded), sharded / "config.json"], 1)
    assert {path: opened[path] for path in expected} == expected


def test_shards_may_be_symlinks(sharded, tiny, tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots/main"
    shutil.copytree(sharded, blobs)
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(path)
    assert_same_weights(load(snapshot), load(tiny))


def header_of(folder: Path) -> tuple[dict[str, dict[str, list[int]]], bytes]:
    content = (folder / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:start]), content[start:]


@pytest.mark.parametrize(
    "corrupt",
    [
        lambda tensors: tensors["model.norm.weight"].update(data_offsets=[0, 2**62]),
        lambda tensors: tensors["model.norm.weight"].update(data_offsets=[-8, 120]),
        lambda tensors: tensors["model.norm.weight"].update(shape=[2**32, 2**32]),
        lambda tensors: tensors["model.norm.weight"].update(shape=[31]),
        lambda tensors: tensors["model.norm.weight"].update(dtype="F64"),
        lambda tensors: tensors["model.norm.weight"].update(tensors["lm_head.weight"]),
        lambda tensors: tensors["model.norm.weight"].update(
            data_offsets=tensors["model.layers.0.input_layernorm.weight"]["data_offsets"]
        ),
        lambda tensors: tensors.pop("model.norm.weight"),
    ],
    ids=["beyond the end", "before the start", "overflow", "shape", "dtype", "same offsets", "overlap", "hole"],
)
def test_header_with_wrong_sizes_is_refused(copy, corrupt):
    tensors, data = header_of(copy)
    corrupt(tensors)
    header = json.dumps(tensors).encode()
    (copy / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
    with pytest.raises(LitLoraError, match="is truncated or not a safetensors file"):
        load(copy)


@pytest.mark.parametrize("length", [0, 2**31, 2**63, 2**64 - 1])
def test_header_with_wrong_length_is_refused(copy, length):
    path = copy / "model.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
    with pytest.raises(LitLoraError, match="is truncated or not a safetensors file"):
        load(copy)
