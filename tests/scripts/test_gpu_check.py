"""The check of a GPU, on a CPU and a tiny shape, with its commands in this process; and its arithmetic."""

import io
import json
import runpy
import sys
from contextlib import redirect_stdout

import pytest
from gpu_checks import running
from gpu_checks.__main__ import main
from gpu_checks.cases import TINY_SHAPE, Case, config_of
from gpu_checks.running import CaseError, Result
from gpu_checks.table import operations, render

from litlora import __main__ as litlora


def run_here(command, work, log):
    """Run a command of Python in this process."""
    module, *flags = command[2:]
    with redirect_stdout(io.StringIO()) as out, pytest.MonkeyPatch.context() as patch:
        if module == "litlora":
            with (work.data.parent / log).open("w") as errors:
                patch.setattr(sys, "stderr", errors)
                code = litlora.main(flags)
            if code:
                raise CaseError((work.data.parent / log).read_text().splitlines()[-1])
        else:
            patch.setattr(sys, "argv", [module, *flags])
            runpy.run_module(module, run_name="__main__")
    return out.getvalue()


def test_every_case_runs_on_a_tiny_shape(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(running, "run", run_here)
    assert main(["--device", "cpu", "--tiny", "--out", str(tmp_path / "check.md")]) == 0
    cases = json.loads((tmp_path / "check.json").read_text())["cases"]
    assert cases.pop("tests")["note"] == "not run: they need a GPU"
    assert len(cases) == 6
    for name, result in cases.items():
        assert result["tokens_per_second"], (name, result)
        assert result["measured_gb"], name
    ours, theirs = (cases[f"train tiny, bfloat16, {program}"] for program in ("litlora", "PEFT"))
    assert ours["supervised"] == pytest.approx(theirs["supervised"], rel=0.05)  # of the same rows, in another order
    assert ours["predicted_gb"] > 0
    assert (tmp_path / "check.md").read_text() == capsys.readouterr().out


def test_case_that_fails_leaves_its_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(running, "run", lambda *_: (_ for _ in ()).throw(CaseError("a | b")))
    assert main(["--device", "cpu", "--tiny", "--out", str(tmp_path / "check.md")]) == 0
    assert all(
        result["note"] in ("a / b", "not run: they need a GPU") or result["note"].startswith("a / b")
        for result in json.loads((tmp_path / "check.json").read_text())["cases"].values()
    )


def test_share_of_peak_by_hand():
    config = config_of(TINY_SHAPE)
    block = 64 * 64 * 2 + 2 * 64 * 32 + 3 * 64 * 96
    expected = 4 * (2 * block + 0.25 * config.vocab_size * 64)
    assert operations(TINY_SHAPE, 0.25) == expected
    result = Result(tokens_per_second=1e6, supervised=0.25)
    text = render("NVIDIA H200", {Case("train", TINY_SHAPE): result})
    assert f"| {expected * 1e6 / 989e12:.1%} |" in text
