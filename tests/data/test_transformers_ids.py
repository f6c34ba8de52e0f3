"""The installed transformers' tokenizer is the same whether or not this process has loaded transformers."""

import sys

from litlora.data import transformers_ids


def test_tokenizer_comes_from_a_process_without_torch(tiny, monkeypatch):
    here = transformers_ids._backend(tiny)
    monkeypatch.delitem(sys.modules, "transformers")
    there = transformers_ids._installed_backend(tiny)
    assert here is not None and there is not None
    assert there.to_str() == here.to_str()


def test_unreadable_tokenizer_is_reported_and_not_compared(tmp_path, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "transformers", raising=False)
    assert transformers_ids._installed_backend(tmp_path) is None
    assert capsys.readouterr().err.startswith("the installed transformers cannot read this tokenizer, and its ids are ")
