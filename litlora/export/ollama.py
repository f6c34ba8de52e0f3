"""The Modelfile by which Ollama runs a GGUF file: the template that was trained, and where an answer ends."""

import re
from dataclasses import dataclass
from pathlib import Path

from litlora.data.examples import Message, Role
from litlora.data.prompts.chat_style import ChatStyle
from litlora.data.prompts.chat_template import ChatTemplateError
from litlora.data.prompts.styles import PromptStyle, StyleSettings, TemplateStyle
from litlora.data.tokenizer import Tokenizer
from litlora.export.receipt import text_hash
from litlora.utils.console import log

MODELFILE = "Modelfile"
SYSTEM, QUESTION, ANSWER, NEXT = "SYSTEM-PROBE", "QUESTION-PROBE", "ANSWER-PROBE", "NEXT-PROBE"
Turns = list[tuple[Role, str]]


@dataclass(frozen=True)
class Form:
    """A well-known form of chat templates: how it writes a message of each role."""

    system: str
    """Empty where a system message stands before the first question, as part of it."""
    user: str
    opening: str
    """What opens an answer."""
    ending: str
    """What ends one that another message follows."""

    def text(self, turns: Turns) -> str:
        """Return the text of messages, with the opening of an answer."""
        parts = {"system": self.system, "user": self.user, "assistant": f"{self.opening}%s{self.ending}"}
        return "".join(parts[role] % content for role, content in turns) + self.opening

    @property
    def template(self) -> str:
        """The same as a template of Ollama, which repeats it for each turn."""
        system, prompt = "{{ .System }}", "{{ .Prompt }}"
        if self.system:
            before = f"{{{{ if .System }}}}{self.system % system}{{{{ end }}}}"
        else:
            before, prompt = "", f"{{{{ if .System }}}}{system}\n\n{{{{ end }}}}{prompt}"
        return f"{before}{self.user % prompt}{self.opening}{{{{ .Response }}}}{self.ending}"


FORMS = (
    Form(  # ChatML
        "<|im_start|>system\n%s<|im_end|>\n",
        "<|im_start|>user\n%s<|im_end|>\n",
        "<|im_start|>assistant\n",
        "<|im_end|>\n",
    ),
    Form(  # Llama 3
        "<|start_header_id|>system<|end_header_id|>\n\n%s<|eot_id|>",
        "<|start_header_id|>user<|end_header_id|>\n\n%s<|eot_id|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|>",
    ),
    # Mistral, of several versions
    Form("", "[INST] %s[/INST]", "", "</s>"),
    Form("", "[INST] %s [/INST]", "", "</s>"),
    Form("", "[INST]%s[/INST]", "", "</s>"),
    Form("", "<start_of_turn>user\n%s<end_of_turn>\n", "<start_of_turn>model\n", "<end_of_turn>\n"),  # Gemma
)


def modelfile(tokenizer: Tokenizer, settings: StyleSettings | None, model: str, adapter: str | None) -> str:
    """Return the Modelfile of a model, or of an adapter on it, that was trained on a prompt style."""
    style = tokenizer.prompt_style(settings or StyleSettings("none"))
    lines = [f"FROM ./{model}"]
    if adapter:
        lines = ["# The GGUF file of the base that the adapter was trained on:", *lines, f"ADAPTER ./{adapter}"]
    if settings is not None:
        lines += _template_lines(style, tokenizer)
    stops = sorted(filter(None, map(tokenizer.backend.id_to_token, tokenizer.stop_ids_of(style))))
    return "\n".join([*lines, *(f'PARAMETER stop "{_escaped(stop)}"' for stop in stops)]) + "\n"


def template_hash(text: str) -> str:
    """Return the SHA-256 of the template in the text of a Modelfile."""
    found = re.search(r'^TEMPLATE """(.*?)"""$', text, re.MULTILINE | re.DOTALL)
    return text_hash(found[1] if found else "")


def stops_of(path: Path) -> set[str]:
    """Return the texts at which a Modelfile ends an answer, none if there is no such file."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    found = re.findall(r'^PARAMETER stop "(.*)"$', text, re.MULTILINE)
    return {re.sub(r"\\(.)", r"\1", stop) for stop in found}


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')


def _template_lines(style: PromptStyle, tokenizer: Tokenizer) -> list[str]:
    """Return the template and the default system message, or nothing where only the file's own template will do."""
    template, system = None, ""
    if isinstance(style, TemplateStyle):
        template = of_template_style(style)
    elif isinstance(style, ChatStyle) and (found := of_chat_style(style, tokenizer)):
        template, system = found
    if template is None or '"""' in template + system:
        log("Modelfile: no TEMPLATE for this prompt style: Ollama takes the chat template of the GGUF file")
        return []
    return [f'TEMPLATE """{template}"""', *([f'SYSTEM """{system}"""'] if system else [])]


def of_template_style(style: TemplateStyle) -> str:
    """Return the template of Ollama for a text with {instruction}."""
    question = "{{ if .System }}{{ .System }}\n\n{{ end }}{{ .Prompt }}"
    values = {"instruction": question, "input": ""}
    literal = style.template.replace("{{", '{{ "{{" }}')
    return re.sub(r"\{(instruction|input)\}", lambda match: values[match[1]], literal) + (
        "{{ .Response }}" + style.end_token
    )


def of_chat_style(style: ChatStyle, tokenizer: Tokenizer) -> tuple[str, str] | None:
    """Return template and default system message of a chat template of a well-known form; None for another form."""
    start = tokenizer.bos_token if tokenizer.adds_bos_to(style) else ""  # which Ollama adds, as the tokenizer does
    for form in FORMS:
        if (system := _default_system(style, form, start or "")) is not None:
            return form.template, system
    return None


def _default_system(style: ChatStyle, form: Form, start: str) -> str | None:
    """Return the system message that a template writes unasked ("" for none), or None where it is of another form."""
    question = re.escape(form.text([("user", QUESTION)]))
    unasked = re.escape(form.system).replace("%s", "(.*)") if form.system else "()"
    found = re.fullmatch(f"{re.escape(start)}(?:{unasked})?{question}", _text(style, [("user", QUESTION)]), re.DOTALL)
    if found is None:
        return None
    default: Turns = [("system", found[1])] if found[1] else []
    asked: Turns = [("system", SYSTEM), ("user", QUESTION)]
    joined: Turns = [("user", f"{SYSTEM}\n\n{QUESTION}")]
    several: Turns = [("user", QUESTION), ("assistant", ANSWER), ("user", NEXT)]
    expected = {
        _text(style, asked): form.text(asked if form.system else joined),
        _text(style, several): form.text([*default, *several]),
    }
    return found[1] or "" if all(text == start + its for text, its in expected.items()) else None


def _text(style: ChatStyle, turns: Turns) -> str:
    """Return what the template makes of messages, up to the next answer."""
    messages = [Message(role, content) for role, content in turns]
    try:
        return style.conversation(messages).text
    except ChatTemplateError:
        return ""
