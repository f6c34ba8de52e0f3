"""Each answer trains on what a server sends and on what the template writes for it, whatever the template's habits."""

import json
import re
import shutil
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models
from transformers import PreTrainedTokenizerFast

from litlora.data.encoding import RenderedRow, encode, encode_rows
from litlora.data.examples import Example, Message, ToolCall, Turn
from litlora.data.prompts.chat_style import ChatStyle
from litlora.data.prompts.chat_template import ChatTemplate, ChatTemplateError
from litlora.data.prompts.rendered import REASONING_LOST, SYSTEM_MOVED, TOOLS_LOST
from litlora.data.prompts.styles import StyleSettings
from litlora.data.prompts.template_process import IsolatedTemplate
from litlora.data.tokenizer import Tokenizer
from litlora.data.tokenizer_backend.special_tokens import SpecialTokens

SPECIAL = ["<bos>", "<eos>", "<|user|>", "<|bot|>", "<|end|>", "<|tool|>", "<|system|>"]
TURNS = (Turn("2+2?", "It is 4."), Turn("And 3+3?", "It is 6."), Turn("Thanks", "Bye"))
EACH = "{{ bos_token }}{% for m in messages %}{{ '<|' + {'user': 'user', 'assistant': 'bot', 'tool': 'tool', 'system': "
EACH += "'system'}[m.role] + '|>' }}"
PLAIN = EACH + "{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|bot|>{% endif %}"
# (a) history is written otherwise than the last answer
STRIPS = EACH + (
    "{% if m.role == 'assistant' and loop.last %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    "<|end|>{% endfor %}{% if add_generation_prompt %}<|bot|>{% endif %}"
)
EOS_AT_THE_END = PLAIN.replace("{% if add", "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}{% if add")
# (b) the generation prompt opens a block
OPENS = PLAIN.replace("%}<|bot|>{%", "%}<|bot|><think>\n{%")
CLOSES = OPENS.replace("{{ m.content }}", "{% if m.role == 'assistant' %}</think>{% endif %}{{ m.content }}")
OPENS_AND_CLOSES = PLAIN.replace("%}<|bot|>{%", "%}<|bot|><think></think>{%")
# (c) nothing follows the last answer
NO_END = EACH + "{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|bot|>{% endif %}"
# (d) no tools and None are different
NEEDS_TOOLS = "{% for tool in tools %}{{ tool | tojson }}{% endfor %}" + PLAIN
# (e) no system role, or one that moves
REFUSES_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + PLAIN
DROPS_SYSTEM = PLAIN.replace("in messages %}", "in messages if m.role != 'system' %}")
IN_LAST_QUESTION = (
    "{% set rest = messages[1:] if messages[0].role == 'system' else messages %}{% for m in rest %}"
    "{% if m.role == 'user' %}<|user|>{% if loop.last and rest is ne(messages) %}{{ messages[0].content }} {% endif %}"
    "{{ m.content }}<|bot|>{% else %}{{ m.content }}<|end|>{% endif %}{% endfor %}"
)
CONTENT, CONTENT_OF_PARTS = "{{ m.content }}", "{% for part in m.content %}{{ part['text'] }}{% endfor %}"
PARTS = PLAIN.replace(CONTENT, CONTENT_OF_PARTS)
# A template, the number of sequences of three turns, and what is supervised of the first
TEMPLATES = {
    "plain": (PLAIN, 1, "It is 4.<|end|>"),
    "strips": (STRIPS, 3, "<think></think>It is 4.<|end|>"),
    "eos at the end": (EOS_AT_THE_END, 1, "It is 4.<|end|>"),
    "opens": (OPENS, 3, "\n</think>\n\nIt is 4.<|end|>"),
    "closes": (CLOSES, 3, "</think>It is 4.<|end|>"),
    "opens and closes": (OPENS_AND_CLOSES, 3, "It is 4.<|end|>"),
    "no end": (NO_END, 1, "It is 4.<|user|>"),
    "needs tools": (NEEDS_TOOLS, 1, "It is 4.<|end|>"),
    "refuses system": (REFUSES_SYSTEM, 1, "It is 4.<|end|>"),
    "drops system": (DROPS_SYSTEM, 1, "It is 4.<|end|>"),
    "in last question": (IN_LAST_QUESTION, 1, "It is 4.<|end|>"),
    "parts": (PARTS, 1, "It is 4.<|end|>"),
}


def style(template: str, stops: tuple[str, ...] = ("<|end|>",), **variables: Any) -> ChatStyle:
    names = {"bos_token": "<bos>", "eos_token": "<eos>"}
    return ChatStyle(ChatTemplate(template, names, variables), SpecialTokens(SPECIAL), "<eos>", frozenset(stops))


def transformers_text(template: str, messages: list[dict[str, Any]], prompt: bool, **values: Any) -> str:
    backend = Backend(models.WordLevel({"?": 0}, unk_token="?"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>")
    return tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=prompt, **values
    )


def supervised(chat: ChatStyle, example: Example) -> list[str]:
    return [each.text[start:end] for each in chat.render(example) for start, end in each.supervised]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("system", ["", "Be brief."])
@pytest.mark.parametrize("turns", [1, 3])
def test_prompt_is_what_a_server_sends_and_each_answer_is_learned(name, system, turns):
    template, sequences, first = TEMPLATES[name]
    example = Example.of(*TURNS[:turns], system=system)
    chat = style(template)
    rendered = chat.render(example)
    if not (system and name == "in last question"):
        assert len(rendered) == (sequences if turns > 1 else 1)
    learned = supervised(chat, example)
    assert learned[0] == first
    assert len(learned) == turns
    for text, turn in zip(learned, TURNS, strict=False):
        assert text.partition(turn.output)[2] == first.partition("4.")[2]
    if system:
        assert all("Be brief." in each.text for each in rendered)


@pytest.mark.parametrize("name", ["plain", "strips", "eos at the end", "opens", "closes", "opens and closes", "no end"])
def test_prompts_equal_those_of_transformers(name):
    template = TEMPLATES[name][0]
    messages: list[dict[str, Any]] = []
    expected = []
    for turn in TURNS:
        messages.append({"role": "user", "content": turn.instruction})
        expected.append(transformers_text(template, messages, prompt=True))
        messages.append({"role": "assistant", "content": turn.output})
    rendered = style(template).render(Example.of(*TURNS))
    prompts = [each.text[:start] for each in rendered for start, _ in each.supervised]
    assert prompts == expected
    first = style(template).prompt("2+2?").text
    assert first == expected[0]


def test_end_token_is_the_one_that_is_learned():
    ends = {name: style(template).end_token for name, (template, _, _) in TEMPLATES.items()}
    assert ends == {name: "<|user|>" if name == "no end" else "<|end|>" for name in TEMPLATES}


def test_eos_ends_an_answer_where_a_template_writes_nothing():
    assert supervised(style("{% for m in messages %}{{ m.content }}{% endfor %}"), Example.of(TURNS[0])) == [
        "It is 4.<eos>"
    ]


REASONED = Example((Message("user", "2+2?"), Message("assistant", "4", reasoning="Two and two.")))


@pytest.mark.parametrize(
    ("template", "learned"),
    [
        (STRIPS, "<think>Two and two.</think>4<|end|>"),
        (STRIPS.replace("reasoning_content", "thinking"), "<think>Two and two.</think>4<|end|>"),
        (PLAIN, "<think>\nTwo and two.\n</think>\n\n4<|end|>"),
        (OPENS.replace("m.content", "m.content.split('</think>')[-1]"), "Two and two.\n</think>\n\n4<|end|>"),
    ],
)
def test_reasoning_reaches_the_template(template, learned):
    (text,) = supervised(style(template), REASONED)
    assert text.replace("\n\n\n", "\n\n") == learned
    assert not style(template).render(REASONED)[0].notes


def test_lost_reasoning_and_tools_and_moved_system_are_noted():
    strips = PLAIN.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")
    assert style(strips).render(REASONED)[0].notes == {REASONING_LOST}
    tools = ({"type": "function", "function": {"name": "weather"}},)
    asked = Example.of(TURNS[0], system="Be brief.")
    assert style(PLAIN).render(Example(asked.messages, tools))[0].notes == {TOOLS_LOST}
    assert style(REFUSES_SYSTEM).render(asked)[0].notes == {SYSTEM_MOVED}
    assert "<|user|>Be brief.\n\n2+2?<|end|>" in style(REFUSES_SYSTEM).render(asked)[0].text


CALL = ToolCall("weather", {"city": "Oslo"})
CALLING = Example(
    (Message("user", "Rain?"), Message("assistant", tool_calls=(CALL,)), Message("tool", "dry", name="weather"),
     Message("assistant", "No.")),
    ({"type": "function", "function": {"name": "weather", "parameters": {}}},),
)  # fmt: skip
WITH_CALLS = "{{ tools | tojson if tools else '' }}" + PLAIN.replace(
    "{{ m.content }}",
    "{{ m.content }}{% for c in m.tool_calls or [] %}<call>{{ c.function.arguments.city ~ c.function.name }}"
    "{% endfor %}",
)


def test_tools_and_calls_reach_the_template():
    (rendered,) = style(WITH_CALLS).render(CALLING)
    assert [rendered.text[start:end] for start, end in rendered.supervised] == [
        "<call>Osloweather<|end|>",
        "No.<|end|>",
    ]
    messages = [dict(message.to_chat()) for message in CALLING.messages]
    tools = [dict(tool) for tool in CALLING.tools]
    assert rendered.text == transformers_text(WITH_CALLS, messages, prompt=False, tools=tools)


CALLS = "{% for c in m.tool_calls or [] %}<call>{{ c.function.name ~ c.function.arguments.city }}{% endfor %}"
SHAPES = {
    "one turn": Example.of(TURNS[0]),
    "turns": Example.of(*TURNS),
    "system": Example.of(*TURNS, system="Be brief."),
    "reasoning": REASONED,
    "reasoned turns": Example((*REASONED.messages, *Example.of(TURNS[1]).messages, *REASONED.messages)),
    "calls": CALLING,
    "calls with system": Example((Message("system", "Be brief."), *CALLING.messages), CALLING.tools),
}


@pytest.fixture(scope="module")
def spoken(tiny, tmp_path_factory) -> tuple[Tokenizer, Backend]:
    """Return a tokenizer that has the special tokens of the templates, and the library's own."""
    folder = Path(shutil.copytree(tiny, tmp_path_factory.mktemp("spoken") / "base"))
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.add_special_tokens(SPECIAL)
    backend.save(str(folder / "tokenizer.json"))
    return Tokenizer(folder), backend


def as_sent(chat: ChatStyle, messages: list[Message], parts: bool) -> list[dict[str, Any]]:
    """Return messages as somebody sends them to a server with this template."""
    sent = []
    for message in messages:
        fields = dict(message.to_chat())
        if reasoning := fields.pop("reasoning_content", ""):
            in_content = chat._writes_reasoning == "content"
            fields |= {"content": message.text} if in_content else {"reasoning_content": reasoning}
        sent.append(fields | ({"content": [{"type": "text", "text": fields["content"]}]} if parts else {}))
    return sent


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", TEMPLATES)
def test_text_is_that_of_transformers_and_labels_are_the_answers(name, shape, spoken):
    """The prompts, answers and ids of each shape, for each habit of a template."""
    example, template, (tokenizer, backend) = SHAPES[shape], TEMPLATES[name][0], spoken
    for content in (CONTENT, CONTENT_OF_PARTS) if example.tools else ():
        template = template.replace(content, content + CALLS)
    chat = style(template)
    messages = chat._placed(example.messages)
    sent = as_sent(chat, messages, parts=name == "parts")
    tools = [dict(tool) for tool in example.tools] or ([] if name == "needs tools" else None)
    spans = [(each, *span) for each in chat.render(example) for span in each.supervised]
    answers = [n for n, message in enumerate(messages) if message.role == "assistant"]
    for n, (rendered, start, end) in zip(answers, spans, strict=True):
        assert rendered.text[:start] == transformers_text(template, sent[:n], prompt=True, tools=tools)
        answer = rendered.text[start:end]
        if name in ("opens", "closes"):
            answer = answer.rpartition("</think>")[2].lstrip()  # the end of the block that the prompt opens
        if name == "no end":
            answer = re.sub(r"<\|\w+\|>$", "", answer)  # what opens the next message
        full = transformers_text(template, sent[: n + 1], prompt=False, tools=tools)
        assert full.removesuffix("<eos>").endswith(answer)
    for rendered in chat.render(example):
        rows = encode_rows([RenderedRow(rendered, 1)], tokenizer, chat, mask_prompt=True)
        ids = [i if i >= 0 else ~i for i in rows.ids.tolist()]
        assert ids == backend.encode(rendered.text, add_special_tokens=False).ids
        learned = "".join(rendered.text[start:end] for start, end in rendered.supervised)
        assert backend.decode([i for i in rows.ids.tolist() if i >= 0], skip_special_tokens=False) == learned


def test_arguments_are_a_text_where_the_template_reads_them_so():
    template = WITH_CALLS.replace(
        "c.function.arguments.city ~ c.function.name", "c.function.name + c.function.arguments"
    )
    (rendered,) = style(template).render(CALLING)
    messages = [dict(message.to_chat()) for message in CALLING.messages]
    messages[1]["tool_calls"] = [{"function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}]
    assert rendered.text == transformers_text(template, messages, prompt=False, tools=[dict(t) for t in CALLING.tools])


def test_answers_that_repeat_the_question_begin_where_the_template_writes_them():
    """The system text leaves the last question once it is answered, so that no prompt begins what is learned."""
    template = IN_LAST_QUESTION.replace("%}{{ m.content }}<|end|>", "%}{{ m.content }}{% for c in m.tool_calls or [] %}"
                                        "{{ c.function.name }}{% endfor %}<|end|>")  # fmt: skip
    system, asked = Message("system", "Be brief."), Message("user", "Say weather, weather.")
    for answer in (Message("assistant", "weather"), Message("assistant", tool_calls=(CALL,))):
        (rendered,) = style(template).render(Example((system, asked, answer)))
        assert rendered.prompt == "<|user|>Be brief. Say weather, weather.<|bot|>"
        assert rendered.text == f"{rendered.prompt}weather<|end|>"


def test_a_template_without_calls_is_refused():
    with pytest.raises(ChatTemplateError, match="drops the tool calls of a message"):
        style(PLAIN).render(CALLING)


def test_unsupervised_answers_are_context():
    messages = list(Example.of(*TURNS).messages)
    messages[1] = Message("assistant", "It is 4.", weight=0)
    (rendered,) = style(PLAIN).render(Example(tuple(messages)))
    assert [rendered.text[start:end] for start, end in rendered.supervised] == ["It is 6.<|end|>", "Bye<|end|>"]
    assert "It is 4.<|end|>" in rendered.text


def test_variables_reach_prompt_and_answer():
    template = "{{ 'no ' if not enable_thinking else '' }}thoughts" + PLAIN
    assert style(template, enable_thinking=False).prompt("Hi").text.startswith("no thoughts")
    assert style(template, enable_thinking=True).render(Example.of(TURNS[0]))[0].text.startswith("thoughts")


def test_date_of_the_template_is_fixed():
    template = IsolatedTemplate("{{ strftime_now('%d %b %Y') }}", {}, {}, datetime(2026, 1, 31))
    assert template.reads_date
    assert template.render([], add_generation_prompt=True) == "31 Jan 2026"


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory) -> Path:
    """Return a checkpoint whose template ends answers with a special token that is not EOS."""
    folder = Path(shutil.copytree(tiny, tmp_path_factory.mktemp("chat") / "base"))
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.add_special_tokens(["<|user|>", "<|bot|>", "<|end|>"])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(PLAIN, encoding="utf-8")
    return folder


@pytest.mark.parametrize("name", ["chat", "alpaca", "none", "<|user|>{instruction}<|bot|>"])
def test_special_tokens_in_text_are_plain_text(folder, name):
    """The special tokens of a row are those of the same row without any in its text, and its text is unchanged."""
    tokenizer = Tokenizer(folder)
    chosen = tokenizer.prompt_style(name)
    row = Example.of(Turn("What is <|end|></s>?", "It is <|end|>, </s> or <s>."))
    special = {i: token.content for i, token in tokenizer._added.items()}
    tokens = encode([row], tokenizer, chosen, mask_prompt=True)
    ids = [i if i >= 0 else ~i for i in tokens.ids.tolist()]
    (rendered,) = chosen.render(row)
    clean = Example.of(Turn("What is @@?", "It is @, @ or @."))
    same = encode([clean], tokenizer, chosen, mask_prompt=True)
    actual, expected = ([i for i in each.ids.tolist() if (i if i >= 0 else ~i) in special] for each in (tokens, same))
    assert actual == expected
    text = "".join(special.get(i, "") or tokenizer.decode([i]) for i in ids)
    assert text.removeprefix("<s>").removeprefix("<bos>") == rendered.text.removeprefix("<s>")
    prompt = tokenizer.encode_prompt(chosen, chosen.prompt("What is <|end|></s>?"))
    assert ids[: len(prompt)] == prompt


@pytest.mark.parametrize("before", [[], ["<s>"]])
@pytest.mark.parametrize("after", [[], ["</s>"]])
@pytest.mark.parametrize("name", ["alpaca", "<s>{instruction}\n"])
def test_bos_is_written_once_and_eos_only_after_a_response(tiny, tmp_path, before, after, name):
    folder = Path(shutil.copytree(tiny, tmp_path / "base"))
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    ids = {"<s>": 0, "</s>": 1}
    single = [{"SpecialToken": {"id": token, "type_id": 0}} for token in before]
    single += [{"Sequence": {"id": "A", "type_id": 0}}]
    single += [{"SpecialToken": {"id": token, "type_id": 0}} for token in after]
    used = {token: {"id": token, "ids": [ids[token]], "tokens": [token]} for token in (*before, *after)}
    content["post_processor"] = {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": used}
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    tokenizer = Tokenizer(folder)
    chosen = tokenizer.prompt_style(name)
    prompt = tokenizer.encode_prompt(chosen, chosen.prompt("Say 1."))
    stored = encode([Example.of(Turn("Say 1.", "1"))], tokenizer, chosen, mask_prompt=True).ids
    trained = [i if i >= 0 else ~i for i in stored.tolist()]
    assert trained[: len(prompt)] == prompt
    assert (prompt.count(0), prompt.count(1)) == (bool(before) or name != "alpaca", 0)
    assert (trained.count(1), trained[-1]) == (1, 1)


def test_style_settings_of_a_name():
    assert StyleSettings.of("chat") == StyleSettings("chat", {}, None)
