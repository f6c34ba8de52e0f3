"""A Modelfile's template gives what the checkpoint's chat template gives, turn by turn, as Ollama runs it."""

import json
import re
from pathlib import Path

import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

from litlora.data.prompts.styles import StyleSettings
from litlora.data.tokenizer import Tokenizer
from litlora.export.ollama import MODELFILE, modelfile, stops_of

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WITH_DEFAULT = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are kind.<|im_end|>\n' }}{% endif %}" + CHATML
)
LLAMA_3 = (
    "{% for m in messages %}{{ (bos_token if loop.first else '') + '<|start_header_id|>' + m['role'] + "
    "'<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + "
    "m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ m['content'] + eos_token }}"
    "{% else %}{{ raise_exception('no system') }}{% endif %}{% endfor %}"
)
FORMS = {
    "chatml": (CHATML, "<|im_end|>"),
    "chatml with a default": (WITH_DEFAULT, "<|im_end|>"),
    "llama 3": (LLAMA_3, "<|eot_id|>"),
    "gemma": (GEMMA, "<end_of_turn>"),
    "mistral": (MISTRAL, "</s>"),
}
QUESTIONS = ["Is water wet?", "Why {so}?", "And ice?"]
ANSWERS = ["Yes.", 'Because "so".']


@pytest.fixture
def make(tokenizer_files, tmp_path):
    """Return a function that writes a tokenizer with a chat template, and a BOS where the template writes one."""

    def write(template: str, end: str) -> Path:
        bpe = tokenizers.Tokenizer.from_file(str(tokenizer_files / "tokenizer.json"))
        bpe.add_special_tokens(sorted(set(re.findall(r"<\|?\w+\|?>", template)) | {end}))
        if "bos_token" in template:
            piece = tokenizers.processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 0)])
            bpe.post_processor = piece
        bpe.save(str(tmp_path / "tokenizer.json"))
        settings = {"bos_token": "<s>", "eos_token": end, "chat_template": template}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
        return tmp_path

    return write


def run_template(template: str, **values: str) -> str:
    """Run as much of Go's templates as a Modelfile uses: values, conditions on a value, and texts in quotes."""
    conditions = re.compile(r"\{\{ if \.(\w+) \}\}((?:(?!\{\{ (?:if|end)).)*)\{\{ end \}\}", re.DOTALL)
    while found := conditions.search(template):
        template = template[: found.start()] + (found[2] if values[found[1]] else "") + template[found.end() :]
    return re.sub(r"\{\{ (?:\.(\w+)|\"([^\"]*)\") \}\}", lambda m: values[m[1]] if m[1] else m[2], template)


def ollama(text: str, questions: list[str], answers: list[str], system: str) -> str:
    """Return the prompt that Ollama makes of a conversation: the template for each turn, the last up to its answer."""
    template = re.search(r'^TEMPLATE """(.*?)"""', text, re.DOTALL | re.MULTILINE)[1]
    default = re.search(r'^SYSTEM """(.*?)"""', text, re.DOTALL | re.MULTILINE)
    prompt, system = "", system or (default[1] if default else "")
    for question, answer in zip(questions, answers, strict=False):
        prompt += run_template(template, System=system, Prompt=question, Response=answer)
        system = ""
    last = template[: template.index("{{ .Response }}")]
    return prompt + run_template(last, System=system, Prompt=questions[-1], Response="")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("system", ["", "Be short."], ids=["alone", "system"])
def test_ollama_writes_what_transformers_writes(form, system, make):
    template, end = FORMS[form]
    folder = make(template, end)
    text = modelfile(Tokenizer(folder, {}), StyleSettings("chat"), "model.gguf", None)
    reference = PreTrainedTokenizerFast.from_pretrained(folder)
    bos = "<s>" if "bos_token" in template else ""  # which llama.cpp adds, as the tokenizer does
    for turns in (1, 2, 3):
        questions, answers = QUESTIONS[:turns], ANSWERS[: turns - 1]
        firsts = [system] if system else []
        joined = [f"{system}\n\n{questions[0]}", *questions[1:]] if system and "no system" in template else questions
        roles = [("user", question) for question in joined]
        for n, answer in enumerate(answers):
            roles.insert(2 * n + 1, ("assistant", answer))
        messages = [{"role": "system", "content": first} for first in firsts if joined is questions]
        messages += [{"role": role, "content": content} for role, content in roles]
        expected = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert bos + ollama(text, questions, answers, system) == expected
    (folder / MODELFILE).write_text(text, encoding="utf-8")
    assert end in stops_of(folder / MODELFILE)


def test_another_form_is_left_to_the_file(make, capsys):
    folder = make(CHATML.replace("'\n' + m['content']", "': ' + m['content']"), "<|im_end|>")
    text = modelfile(Tokenizer(folder, {}), StyleSettings("chat"), "model.gguf", None)
    assert "TEMPLATE" not in text
    assert "Ollama takes the chat template of the GGUF file" in capsys.readouterr().err


@pytest.mark.parametrize("style", ["alpaca", "none", 'Q{{"a"}}: {instruction}\nA: '])
def test_a_text_with_an_instruction_is_the_template(style, make):
    tokenizer = Tokenizer(make("", "</s>"), {})
    text = modelfile(tokenizer, StyleSettings(style), "model.gguf", None)
    expected = tokenizer.prompt_style(style).prompt("Why?", system="Be short.").text
    assert ollama(text, ["Why?"], [], "Be short.") == expected
    assert 'PARAMETER stop "</s>"' in text
