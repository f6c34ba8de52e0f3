import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.reference import with_peft
from huggingface_hub import ModelCard

from litlora.__main__ import main
from litlora.errors import LitLoraError
from litlora.export.model_card import model_card
from litlora.hub.origin import Origin, write_origin
from litlora.lora.adapter_folder import find_base


def finetune(base: Path, data_dir: Path, out_dir: Path) -> Path:
    folders = ["--checkpoint_dir", base, "--data_dir", data_dir, "--out_dir", out_dir]
    flags = ["--precision", "32-true", "--train.max_steps", 1, "--eval.max_new_tokens", 0]
    assert main(["finetune_lora", *map(str, [*folders, *flags])]) == 0
    return out_dir / "final"


@pytest.fixture
def downloaded(tiny, data_dir, tmp_path) -> tuple[Path, Path]:
    """Return a base that came from the Hub, and an adapter that was trained on it."""
    base = Path(shutil.copytree(tiny, tmp_path / "base"))
    write_origin(base, Origin("org/name", "0123abc", "apache-2.0"))
    return base, finetune(base, data_dir, tmp_path / "out")


def test_adapter_names_the_repository_of_its_base(downloaded, tmp_path, monkeypatch):
    base, adapter = downloaded
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/name", "0123abc")
    assert find_base(adapter, None) == (base, adapter)
    with torch.no_grad():
        assert with_peft(base, adapter)(torch.arange(5)[None]).logits.isfinite().all()
    elsewhere = Path("checkpoints/org/name")
    monkeypatch.chdir(tmp_path)
    elsewhere.parent.mkdir(parents=True)
    base.rename(elsewhere)
    assert find_base(adapter, None) == (elsewhere, adapter)
    elsewhere.rename("gone")
    with pytest.raises(LitLoraError, match=r"is not there \(org/name\)"):
        find_base(adapter, None)


def test_model_card_front_matter(downloaded):
    card = ModelCard.load(downloaded[1] / "README.md")
    assert card.data.base_model == "org/name"
    assert card.data.library_name == "peft"
    assert card.data.license == "apache-2.0"
    assert "lora" in card.data.tags
    report = json.loads((downloaded[1] / "report.json").read_text())
    assert f"| validation loss | {report['val_loss']:.4f} |" in card.text


def test_model_card_of_a_local_base_names_no_repository():
    """The Hub refuses a card whose base_model is a path."""
    card = ModelCard(model_card("b: c", None, {"val_loss": None}))
    assert card.data.base_model is None
    assert card.data.license is None
    assert card.data.tags == ["lora", "litlora", "transformers"]
    assert "# LoRA adapter for b: c" in card.text
