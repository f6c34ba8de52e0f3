"""A prompt style travels: from a run to its adapter, to generate and to the merged folder, with the end token."""

import json
import shutil
from pathlib import Path

import pytest
from helpers.copies import edit_json
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer

from litlora.args.finetune import FinetuneLoraArgs
from litlora.args.inference import GenerateArgs
from litlora.commands.prompt import Prompt
from litlora.data.dataset import choose_prompt_style
from litlora.data.prompts.styles import StyleSettings
from litlora.data.split_encoder import SplitEncoder
from litlora.data.tokenizer import Tokenizer
from litlora.errors import LitLoraError
from litlora.lora.adapter_folder import read_prompt_style, write_prompt_style
from litlora.lora.prompt_files import write_prompt_files
from litlora.train.inputs import recorded_date

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% if m.role == 'assistant' %}<end>{% endif %}"
TEMPLATE += "{{ '\\n' }}{% endfor %}"
TEMPLATE += "{{ 'think: ' if enable_thinking }}{% if add_generation_prompt %}assistant: {% endif %}"


@pytest.fixture
def base(tiny, tmp_path) -> Path:
    """Return a checkpoint whose template ends answers with another token than EOS."""
    folder = Path(shutil.copytree(tiny, tmp_path / "base"))
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.add_special_tokens(["<end>"])
    backend.save(str(folder / "tokenizer.json"))
    edit_json(folder / "config.json", vocab_size=310)
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    "settings", [StyleSettings("chat", {"enable_thinking": True}, "2026-01-31"), StyleSettings("none")]
)
def test_prompt_style_comes_back(tmp_path, settings):
    write_prompt_style(tmp_path, settings)
    assert read_prompt_style(tmp_path) == settings


def test_merged_folder_keeps_its_style_and_stops_at_the_end_token(base):
    tokenizer = Tokenizer(base)
    end = tokenizer.encode("<end>").ids[-1]
    assert end not in tokenizer.stop_ids
    write_prompt_files(base, tokenizer, StyleSettings("chat", {"enable_thinking": True}, "2026-01-31"))
    assert read_prompt_style(base) == StyleSettings("chat", {"enable_thinking": True})
    stops = json.loads((base / "generation_config.json").read_text(encoding="utf-8"))["eos_token_id"]
    assert stops == [tokenizer.eos_id, end]
    prompt = Prompt.read(GenerateArgs(base, prompt="Hi", max_new_tokens=1))
    assert end in tokenizer.stop_ids_of(prompt.style)
    assert tokenizer.decode(prompt.ids) == "user: Hi\nthink: assistant: "


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"system": "Be brief."}, "system: Be brief.\nuser: Hi\nassistant: "),
        ({"input": "you"}, "user: Hi\n\nyou\nassistant: "),
        ({"prompt_style_variables": {"enable_thinking": True}}, "user: Hi\nthink: assistant: "),
    ],
)
def test_system_input_and_variables_reach_the_prompt(base, flags, expected):
    prompt = Prompt.read(GenerateArgs(base, prompt="Hi", prompt_style="chat", max_new_tokens=1, **flags))
    assert prompt.files.tokenizer.decode(prompt.ids) == expected


CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}


@pytest.mark.parametrize(
    ("row", "template", "style"),
    [
        (CHAT, "x", "chat"),
        (CHAT, None, "alpaca"),
        ({"instruction": "Hi", "output": "Ho"}, "x", "alpaca"),
        ({"prompt": CHAT["messages"][:1], "completion": CHAT["messages"][1:]}, "x", "chat"),
    ],
)
def test_auto_is_chat_for_conversations_and_a_template(tmp_path, row, template, style):
    (tmp_path / "train.jsonl").write_text(json.dumps(row), encoding="utf-8")
    assert choose_prompt_style("auto", tmp_path / "train.jsonl", template)[0] == style
    assert choose_prompt_style("none", tmp_path / "train.jsonl", template)[0] == "none"


def test_named_special_tokens_reach_the_template_as_in_transformers(base):
    named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<end>", "unk_token": "<unk>"}
    edit_json(base / "tokenizer_config.json", **named)
    template = "".join(f"{{{{ {name} }}}}" for name in named) + "{{ messages[0].content }}"
    (base / "chat_template.jinja").write_text(template, encoding="utf-8")
    messages = [{"role": "user", "content": "Hi"}]
    expected = AutoTokenizer.from_pretrained(base).apply_chat_template(messages, tokenize=False)
    assert Tokenizer(base).prompt_style("chat").prompt("Hi").text == expected == "".join(named.values()) + "Hi"


def test_date_of_a_template_is_part_of_the_tokens_and_comes_from_the_resumed_run(base, tmp_path):
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    (data / "train.jsonl").write_text(json.dumps(CHAT), encoding="utf-8")

    def keys() -> list[str]:
        days = (StyleSettings("chat", {}, f"2026-01-{day}") for day in (30, 31))
        return [SplitEncoder(Tokenizer(base), day, True).key("a split's hash") for day in days]

    assert len(set(keys())) == 1
    (base / "chat_template.jinja").write_text("{{ strftime_now('%d') }}" + TEMPLATE, encoding="utf-8")
    assert len(set(keys())) == 2
    for step, day in ((1, "2026-01-30"), (2, "2026-01-31")):
        (out / f"step-00000{step}").mkdir(parents=True)
        write_prompt_style(out / f"step-00000{step}", StyleSettings("chat", {}, day))
    assert recorded_date(FinetuneLoraArgs(base, data, out, resume=True)) == "2026-01-31"
    assert recorded_date(FinetuneLoraArgs(base, data, out, resume=out / "step-000001")) == "2026-01-30"
    assert recorded_date(FinetuneLoraArgs(base, data, out)) not in ("2026-01-30", "2026-01-31")


def test_template_that_fails_on_a_row_names_file_line_and_its_own_words(base, tmp_path):
    fails = "{% if 'b' in messages[0].content %}{{ raise_exception('no b here') }}{% endif %}"
    (base / "chat_template.jinja").write_text(fails + TEMPLATE, encoding="utf-8")
    rows = [CHAT, {"messages": [{"role": "user", "content": "b"}, CHAT["messages"][1]]}]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    encoder = SplitEncoder(Tokenizer(base), StyleSettings("chat"), True)
    with pytest.raises(LitLoraError, match=r"train\.jsonl line 2: .* chat template fails on a conversation: no b here"):
        list(encoder.encode_file(tmp_path / "train.jsonl"))
