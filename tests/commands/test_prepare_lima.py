import json

import pytest
from helpers.hub_server import reachable_hub

from litlora.args.common import SecretStr
from litlora.args.data import PrepareLimaArgs
from litlora.commands.prepare_lima import prepare_lima
from litlora.data.dataset import read_examples
from litlora.data.examples import Example, Turn
from litlora.errors import LitLoraError

SINGLE = ["Name a prime.", "Seven."]
SEVERAL = ["Is 91 prime?", "No, 7 x 13.", "And 97?", "Yes."]
ODD = ["How far?", "Ten miles.", "How long?"]


def lima(*conversations):
    return "\n".join(json.dumps({"conversations": turns, "source": "test"}) for turns in conversations).encode()


@pytest.fixture
def prepared(tmp_path):
    def prepared(*conversations, multiturn=False):
        source, out = tmp_path / "lima.jsonl", tmp_path / "out"
        source.write_bytes(lima(*conversations))
        prepare_lima(
            PrepareLimaArgs(
                destination_path=out,
                source=str(source),
                val_split_fraction=0.5,
                include_multiturn_conversations=multiturn,
            )
        )
        return set(read_examples(out / "train.jsonl") + read_examples(out / "val.jsonl"))

    return prepared


def test_lima_uses_the_first_turn_by_default(prepared, capsys):
    assert prepared(SINGLE, SEVERAL, ODD) == {
        Example.of(Turn("Name a prime.", "Seven.")),
        Example.of(Turn("Is 91 prime?", "No, 7 x 13.")),
        Example.of(Turn("How far?", "Ten miles.")),
    }
    left_out, counts = capsys.readouterr().err.splitlines()
    assert left_out.startswith('3 rows with keys that are not used ("source" 3), the first at ')
    assert counts.startswith("2 training and 1 validation examples in ")


def test_lima_multiturn_conversation_is_one_example(prepared):
    assert prepared(SINGLE, SEVERAL, multiturn=True) == {
        Example.of(Turn("Name a prime.", "Seven.")),
        Example.of(Turn("Is 91 prime?", "No, 7 x 13."), Turn("And 97?", "Yes.")),
    }


def test_lima_unanswered_message_is_reported(prepared, capsys, tmp_path):
    assert Example.of(Turn("How far?", "Ten miles.")) in prepared(SINGLE, ODD, multiturn=True)
    assert capsys.readouterr().err.startswith(
        f"1 row ending in a user message without a response, the first at {tmp_path}/lima.jsonl line 2: "
    )


@pytest.mark.parametrize("multiturn", [False, True])
@pytest.mark.parametrize(
    ("turns", "problem"),
    [
        (["A prompt of the test split"], "the conversation has no response"),
        ([], "the conversation has no response"),
        (["a", "b", 3], 'there is no list of strings under "conversations"'),
        ("a", 'there is no list of strings under "conversations"'),
    ],
)
def test_lima_row_without_a_turn_is_refused(prepared, tmp_path, turns, problem, multiturn):
    with pytest.raises(LitLoraError) as refused:
        prepared(SINGLE, turns, multiturn=multiturn)
    assert str(refused.value) == (
        f"{tmp_path}/lima.jsonl line 2: {problem}; "
        'a row must look like {"conversations": ["question", "answer", ...]}'
    )
    assert not (tmp_path / "out").exists()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with reachable_hub(monkeypatch, tmp_path) as server:
        yield server


@pytest.fixture
def gated(hub):
    hub.add("datasets/GAIR/lima", {"train.jsonl": lima(*[SINGLE] * 10)}, gated=True)
    hub.grant("hf_welcome", "datasets/GAIR/lima")


def test_lima_is_fetched_from_the_hub_with_a_token(gated, tmp_path):
    out = tmp_path / "out"
    prepare_lima(PrepareLimaArgs(destination_path=out, access_token=SecretStr("hf_welcome")))
    assert len(read_examples(out / "train.jsonl")) == 9
    facts = (out / "dataset.json").read_text()
    assert '"source": "GAIR/lima"' in facts
    assert "hf_welcome" not in facts


def test_lima_is_refused_without_a_token(gated, tmp_path):
    with pytest.raises(LitLoraError, match=r"^dataset GAIR/lima is gated: .* pass --access_token or set HF_TOKEN"):
        prepare_lima(PrepareLimaArgs(destination_path=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_invalid_row_of_the_hub_is_named(hub, tmp_path):
    hub.add("datasets/my/lima", {"train.jsonl": lima(SINGLE, ["unanswered"])})
    with pytest.raises(LitLoraError, match=r"^my/lima/train\.jsonl line 2: the conversation has no response"):
        prepare_lima(PrepareLimaArgs(destination_path=tmp_path / "out", source="my/lima"))


def test_missing_file_is_not_taken_for_a_hub_dataset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LitLoraError) as refused:
        prepare_lima(PrepareLimaArgs(source="data/lima.jsonl"))
    assert str(refused.value).startswith("there is no file data/lima.jsonl; give --source a file, ")


def test_existing_file_is_not_taken_for_a_hub_dataset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my").mkdir()
    (tmp_path / "my/lima").write_text("")
    with pytest.raises(LitLoraError, match="my/lima cannot be read: its name must end in"):
        prepare_lima(PrepareLimaArgs(source="my/lima"))
