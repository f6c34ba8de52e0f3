"""Validation and sample completions need a model and data: neither optimizer nor output folder."""

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers.reference import hugging_face
from lightning_fabric import Fabric

from litlora.data.batching import Batching, Samples
from litlora.data.examples import Example, Turn
from litlora.data.prompts.styles import StyleSettings
from litlora.data.row_sources import RowSources
from litlora.data.token_cache import SplitEncoder, find_split, open_splits
from litlora.data.tokenizer import Tokenizer
from litlora.distributed.process_group import Ranks
from litlora.evaluation.engine import Engine
from litlora.evaluation.samples import Completer
from litlora.evaluation.validation import validate
from litlora.models.checkpoint import Checkpoint
from litlora.nn.backend_interface import WorkerThreads

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> Tokenizer:
    checkpoint = Checkpoint.open(tiny)
    return Tokenizer(checkpoint.dir, checkpoint.hub_config)


@pytest.fixture(scope="module")
def engine(tiny: Path) -> Engine:
    """Return a model in training mode."""
    gpt = Checkpoint.open(tiny).load(torch.float32, CPU)
    return Engine(gpt.train(), Fabric(devices=1, accelerator="cpu"), "32-true", WorkerThreads(1), Ranks(0, 1, CPU))


@pytest.fixture(scope="module")
def samples(tokenizer: Tokenizer, data_dir: Path) -> Samples:
    encoder = SplitEncoder(tokenizer, StyleSettings("alpaca"), True)
    (tokens,) = open_splits([find_split(data_dir / "val.jsonl", encoder)], encoder)
    return Samples(tokens, 500)


def loss_by_transformers(checkpoint: Path, samples: Samples, indices: Iterable[int]) -> float:
    """Return the mean loss over the supervised tokens of samples."""
    model, losses = hugging_face(checkpoint), []
    for sample in (samples[index] for index in indices):
        with torch.no_grad():
            logits = model(sample.tokens[None]).logits[0]
        supervised = sample.labels >= 0
        losses.append(F.cross_entropy(logits[supervised], sample.labels[supervised], reduction="none"))
    return float(torch.cat(losses).mean())


@pytest.mark.parametrize("batching", [Batching(16, 1), Batching(2, 2), Batching(16, 4, micro_batch_tokens=500)])
def test_validation_loss_equals_that_of_transformers(engine, samples, tiny, batching):
    expected = loss_by_transformers(tiny, samples, range(len(samples)))
    loss = validate(engine, samples, batching)
    assert loss.mean == pytest.approx(expected, abs=1e-5)
    assert loss.by_source == {}
    assert str(loss) == f"{loss.mean:.4f}"
    assert engine.gpt.training


@pytest.mark.parametrize("batching", [Batching(16, 1), Batching(2, 2), Batching(16, 4, micro_batch_tokens=500)])
def test_each_source_has_the_loss_of_its_rows(engine, samples, tiny, batching):
    """The first and the last of the three rows are of one source, the row between them of another."""
    loss = validate(engine, samples, batching, sources=RowSources(("a", "b", "none"), (0, 1, 0)))
    expected = {"a": loss_by_transformers(tiny, samples, [0, 2]), "b": loss_by_transformers(tiny, samples, [1])}
    assert loss.by_source == pytest.approx(expected, abs=1e-5)
    assert loss.mean == pytest.approx(loss_by_transformers(tiny, samples, range(3)), abs=1e-5)
    assert str(loss) == f"{loss.mean:.4f} (a {loss.by_source['a']:.4f}, b {loss.by_source['b']:.4f})"


def test_validation_may_be_limited_to_the_first_rows(engine, samples, tiny):
    expected = loss_by_transformers(tiny, samples, range(2))
    assert validate(engine, samples, Batching(16, 1), most=2).mean == pytest.approx(expected, abs=1e-5)


def test_sample_completion_has_the_prompt_and_new_text(engine, tokenizer):
    example = Example.of(Turn("Name a fruit.", "A pear."))
    made = Completer(engine, tokenizer, tokenizer.prompt_style("none"), 8).complete(3, example)
    assert (made.row, made.question, made.expected) == (3, "Name a fruit.", "A pear.")
    question, expected, completion = str(made).split("\n", 2)
    assert (question, expected) == ("  question: Name a fruit.", "  expected: A pear.")
    assert completion.startswith("  -> ")
    assert engine.gpt.training
