import importlib.util
import json
import random
import re
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from litlora.models.checkpoint import Checkpoint

ROOT = Path(__file__).parents[2]
DATA, CHECKPOINT = ROOT / "data/pico", ROOT / "checkpoints/pico"


def load_script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where its dataclasses look for it
    spec.loader.exec_module(module)
    return module


make_pico = load_script("make_pico")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with what the script writes in two steps of pre-training."""
    folder = tmp_path_factory.mktemp("made")
    make_pico.make(checkpoint=folder / "checkpoint", data=folder / "data", steps=2)
    return folder


def read_rows(split):
    return [json.loads(line) for line in (DATA / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


def as_subject(text):
    """A word, or the terms of a sum in whichever order."""
    return tuple(sorted(text.split(" + ")))


def subjects(rows):
    """What rows ask about."""
    return {as_subject(row["input"] or re.search('"(.*)"', row["instruction"])[1]) for row in rows}


@pytest.mark.parametrize(
    ("skill", "subject", "answer"),
    [
        (make_pico.REVERSE, "robin", "nibor"),
        (make_pico.SORT, "pebble", "bbeelp"),
        (make_pico.PLURAL, "owl", "owls"),
        (make_pico.PLURAL, "bus", "buses"),
        (make_pico.PLURAL, "fox", "foxes"),
        (make_pico.PLURAL, "watch", "watches"),
        (make_pico.PLURAL, "dish", "dishes"),
        (make_pico.PLURAL, "pony", "ponies"),
        (make_pico.PLURAL, "key", "keys"),
        (make_pico.CAPITALS, "moon", "MOON"),
        (make_pico.LAST, "whale", "e"),
        (make_pico.COUNT, "stream", "6"),
        (make_pico.SUM, "49 + 8", "57"),
    ],
)
def test_skill_computes_its_response(skill, subject, answer):
    assert skill.answer(subject) == answer


def test_splits_have_no_subject_in_common():
    train, val = subjects(read_rows("train")), subjects(read_rows("val"))
    assert len(train) > 500
    assert len(val) > 40
    assert not train & val


def test_pre_training_excludes_validation_subjects():
    rng = random.Random(make_pico.SEED)
    sums, train, val = make_pico.share_subjects(rng)
    texts = islice(make_pico.statements(sums, {*train.words, *val.words}, rng), 5000)
    stated = {as_subject(quoted) for text in texts for quoted in re.findall('"(.*?)"', text)[::2]}
    assert len(stated) > 2000
    assert not stated & subjects(read_rows("val"))


def test_shipped_data_is_reproducible(made):
    for name in ("train.jsonl", "val.jsonl", "dataset.json"):
        assert (made / "data" / name).read_bytes() == (DATA / name).read_bytes()


def test_shipped_checkpoint_is_reproducible_but_for_weights(made):
    names = {path.name for path in (made / "checkpoint").iterdir()}
    assert {path.name for path in CHECKPOINT.iterdir()} == names
    for name in names - {"model.safetensors"}:
        assert (made / "checkpoint" / name).read_bytes() == (CHECKPOINT / name).read_bytes()
    assert sum(path.stat().st_size for path in CHECKPOINT.iterdir()) < 5e6


def test_transformers_loads_the_checkpoint(made):
    model = AutoModelForCausalLM.from_pretrained(made / "checkpoint", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(made / "checkpoint")
    ids = tokenizer('Spell "robin" backwards.\nnibor')["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == 'Spell "robin" backwards.\nnibor'
    ours = Checkpoint.open(made / "checkpoint").load(torch.float32, torch.device("cpu"))
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0]
        assert torch.allclose(ours.lm_head(ours(torch.tensor(ids), [len(ids)])), expected, atol=1e-5)


def test_shipped_checkpoint_knows_its_skills():
    model = Checkpoint.open(CHECKPOINT).load(torch.float32, torch.device("cpu"))
    tokenizer = make_pico.Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    _, _, val = make_pico.share_subjects(random.Random(make_pico.SEED))
    for skill, words_or_sums in val.by_skill():
        assert make_pico.accuracy(model, tokenizer, skill, words_or_sums) > 0.9
