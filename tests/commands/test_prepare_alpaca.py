import json

import pytest

from litlora.args.data import PrepareAlpacaArgs
from litlora.commands.prepare_alpaca import prepare_alpaca
from litlora.data.dataset import read_examples
from litlora.data.examples import Example, Turn
from litlora.errors import LitLoraError


@pytest.fixture
def prepared(tmp_path):
    def prepared(rows):
        source = tmp_path / "alpaca.json"
        source.write_text(json.dumps(rows))
        prepare_alpaca(PrepareAlpacaArgs(destination_path=tmp_path / "out", source=str(source)))
        return tmp_path / "out"

    return prepared


def test_default_fraction_gives_2000_validation_rows(prepared, capsys):
    rows = [{"instruction": str(number), "input": "", "output": "x"} for number in range(51_759)]
    out = prepared(rows)
    assert capsys.readouterr().err == f"49,759 training and 2,000 validation examples in {out}\n"
    assert json.loads((out / "dataset.json").read_bytes())["seed"] == 42


def test_inputs_are_preserved(prepared):
    out = prepared([{"instruction": "Add.", "input": "1, 2", "output": "3"}] * 26)
    assert set(read_examples(out / "val.jsonl")) == {Example.of(Turn("Add.", "3", "1, 2"))}


def test_other_keys_are_refused(prepared, tmp_path):
    with pytest.raises(LitLoraError) as refused:
        prepared([{"prompt": "a", "completion": "b"}])
    assert str(refused.value) == (
        f'{tmp_path}/alpaca.json row 1: there is no "instruction"; '
        'a row must look like {"instruction": "...", "input": "...", "output": "..."}'
    )
    assert not (tmp_path / "out").exists()
