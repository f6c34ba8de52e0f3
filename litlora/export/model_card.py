"""The model card of an adapter: README.md with the front matter that the Hub and PEFT read."""

from collections.abc import Mapping

import yaml

from litlora.hub.origin import Origin

FIGURES = {
    "adapter": "adapter",
    "val_loss": "validation loss",
    "val_perplexity": "validation perplexity",
    "train_loss": "training loss of the last epoch",
    "steps": "steps",
    "supervised_tokens": "supervised tokens",
    "trainable_parameters": "trainable parameters",
}
"""Figures of report.json that the card shows, by what it calls them."""


def model_card(base: str, source: Origin | None, figures: Mapping[str, object]) -> str:
    """Return the card of an adapter on the base of this name; only one from the Hub is named in the front matter."""
    front: dict[str, object] = {"base_model": source.repo_id} if source else {}
    tags = [f"base_model:adapter:{source.repo_id}"] if source else []
    front |= {"library_name": "peft", "pipeline_tag": "text-generation"}
    front["tags"] = [*tags, "lora", "litlora", "transformers"]
    if source and source.license:
        front["license"] = source.license
    rows = "".join(f"| {title} | {_text(figures[name])} |\n" for name, title in FIGURES.items() if name in figures)
    return f"""---
{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---

# LoRA adapter for {source.repo_id if source else base}

Trained with litlora. Losses are means over the supervised tokens, in nats.

| | |
| --- | --: |
{rows}
```python
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("PATH_OF_THIS_FOLDER")
```
"""


COPIES = {
    "merged": (
        "Model fine-tuned from",
        "transformers",
        'model = AutoModelForCausalLM.from_pretrained("PATH_OF_THIS_FOLDER")',
    ),
    "gguf": ("GGUF file of a model fine-tuned from", "gguf", "ollama create NAME && ollama run NAME"),
    "gguf-lora": ("LoRA adapter as a GGUF file for", "gguf", "llama-cli -m BASE.gguf --lora adapter.gguf"),
}
"""For each kind of copy the title of its card, the library that loads it, and how."""


def copy_card(kind: str, base: str | None, license: str | None = None) -> str:
    """Return the card of a copy of a trained network, whose base is named if it is a repository of the Hub."""
    title, library, usage = COPIES[kind]
    front: dict[str, object] = {"base_model": base} if base else {}
    front |= {"library_name": library, "pipeline_tag": "text-generation", "tags": ["lora", "litlora"]}
    if license:
        front["license"] = license
    return f"""---
{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---

# {title} {base or "a local checkpoint"}

Trained with litlora.

```
{usage}
```
"""


def _text(value: object) -> str:
    if value is None:
        return "not measured"
    if isinstance(value, float):
        return f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) else str(value).replace("|", "\\|")
