"""Examples become the text that templates and checkpoints promise, with exactly the responses supervised."""

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from litlora.data.examples import Example, Turn
from litlora.data.prompts.rendered import Rendered
from litlora.data.prompts.styles import PromptStyle, StyleSettings, StyleTokens, build_prompt_style
from litlora.data.tokenizer_backend.special_tokens import SpecialTokens
from litlora.errors import LitLoraError
from litlora.utils import resource_limits

EOS = "</s>"
ADD = Turn("Add them.", "3", input="1 and 2")
CONVERSATION = Example.of(ADD, Turn("And once more?", " Still 3. "), Turn("🦙?", "Yes: 🦙."), system="Be brief.")
TEMPLATES = ["alpaca", "none", "Q: {instruction}\nA:", "Q: {instruction} ({input})\nA:"]

CHATML = """\
{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""

LLAMA_2 = """\
{% if messages[0]['role'] == 'system' %}
    {% set opening = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}
    {% set turns = messages[1:] %}
{% else %}
    {% set opening = '' %}
    {% set turns = messages %}
{% endif %}
{% for message in turns %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('roles must alternate') }}
    {% endif %}
    {% if message['role'] == 'user' %}
        {{- bos_token + '[INST] ' + (opening if loop.first else '') + message['content'].strip() + ' [/INST]' -}}
    {% else %}
        {{- ' ' + message['content'].strip() + ' ' + eos_token -}}
    {% endif %}
{% endfor %}"""

LLAMA_3 = """\
{{- bos_token }}
{%- set today = strftime_now("%Y") if strftime_now is defined else "2024" %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nYear: " + today + "\\n" + ({"é": tools} | tojson) }}
{%- if messages[0]["role"] == "system" %}
    {{- messages[0]["content"] | trim }}
    {%- set messages = messages[1:] %}
{%- endif %}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if message.role not in ["user", "assistant"] %}{% continue %}{% endif %}
    {{- "<|start_header_id|>" + message["role"] + "<|end_header_id|>\\n\\n" }}
    {%- if message.role == "assistant" %}
        {%- generation %}{{- message["content"] | trim + "<|eot_id|>" }}{% endgeneration %}
    {%- else %}
        {{- message["content"] | trim + "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|start_header_id|>assistant<|end_header_id|>\\n\\n" }}
{%- endif %}"""

CHATS = {
    "smollm2": (CHATML, "<|im_start|>", "<|im_end|>", "<|im_end|>"),
    "llama-2": (LLAMA_2, "<s>", EOS, EOS),
    "llama-3": (LLAMA_3, "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"),
}


def style(
    name: str, chat_template: str | None = None, bos_token: str | None = "<s>", eos_token: str = EOS
) -> PromptStyle:
    special = SpecialTokens(filter(None, [bos_token, eos_token]))
    tokens = StyleTokens(eos_token, {"bos_token": bos_token}, special, frozenset({eos_token}), chat_template)
    return build_prompt_style(StyleSettings(name), tokens)


def rendered(style: PromptStyle, example: Example) -> Rendered:
    """Return the only sequence of an example."""
    (sequence,) = style.render(example)
    return sequence


def responses(style: PromptStyle, example: Example) -> list[str]:
    return [each.text[start:end] for each in style.render(example) for start, end in each.supervised]


def apply_chat_template(name: str, messages: list[dict[str, str]], add_generation_prompt: bool = False) -> str:
    template, bos_token, eos_token, _ = CHATS[name]
    backend = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos_token, eos_token=eos_token)
    return tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=add_generation_prompt
    )


def messages_of(example: Example) -> list[dict[str, str]]:
    messages = [{"role": "system", "content": example.system}] if example.system else []
    for turn in example.turns:
        question = turn.instruction + ("\n\n" + turn.input if turn.input else "")
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": turn.output}]
    return messages


def test_alpaca_is_the_template_of_stanford():
    assert style("alpaca").prompt("Add them.", "1 and 2").text == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd them.\n\n### Input:\n1 and 2\n\n### Response:\n"
    )
    assert style("alpaca").prompt("Say hi.").text == (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSay hi.\n\n### Response:\n"
    )


def test_none_is_the_instruction():
    assert style("none").prompt(" 2 + 2 =").text == " 2 + 2 ="
    assert style("none").prompt("Add them.", "1 and 2").text == "Add them.\n\n1 and 2"


def test_custom_template():
    assert style("Q: {instruction} ({input})\nA:").prompt("Add", "1, 2").text == "Q: Add (1, 2)\nA:"
    assert style("Q: {instruction} ({input})\nA:").prompt("Add").text == "Q: Add ()\nA:"


def test_input_without_placeholder_follows_the_instruction():
    assert style("Q: {instruction}\nA:").prompt("Add", "1, 2").text == "Q: Add\n\n1, 2\nA:"


def test_placeholders_in_values_stay_unchanged():
    filled = style("{instruction}|{input}").prompt("{input} {instruction} \\1 {0}", "{instruction}").text
    assert filled == "{input} {instruction} \\1 {0}|{instruction}"


def test_other_braces_stay_unchanged():
    assert style('{"q": "{instruction}", {0} {instruction.__class__} }').prompt("hi").text == (
        '{"q": "hi", {0} {instruction.__class__} }'
    )


def test_system_prompt_precedes_the_first_instruction():
    text = style("Q: {instruction}\nA:").render(CONVERSATION)[0].text
    assert text.startswith("Q: Be brief.\n\nAdd them.\n\n1 and 2\nA:3</s>Q: And once more?\nA:")
    assert text.count("Be brief.") == 1


@pytest.mark.parametrize("name", TEMPLATES)
def test_template_supervises_responses_and_their_eos(name):
    assert responses(style(name), CONVERSATION) == ["3</s>", " Still 3. </s>", "Yes: 🦙.</s>"]


@pytest.mark.parametrize("name", [*TEMPLATES, *CHATS])
def test_generation_prompt_is_a_prefix_of_the_training_text(name):
    template, bos_token, eos_token, _ = CHATS.get(name, (None, None, EOS, EOS))
    chosen = style("chat" if template else name, template, bos_token, eos_token)
    for example in (CONVERSATION, Example.of(ADD), Example.of(Turn("Say nothing.", ""))):
        first = example.turns[0]
        prompt = chosen.prompt(first.instruction, first.input, example.system).text
        sequence = chosen.render(example)[0]
        assert sequence.text.startswith(prompt)
        assert sequence.prompt == prompt


def test_style_names_and_special_tokens():
    for name in ("alpaca", "none", "Q: {instruction}"):
        assert (style(name).name, style(name).add_special_tokens) == (name, True)
    chat = style("chat", CHATML)
    assert (chat.name, chat.add_special_tokens) == ("chat", False)


@pytest.mark.parametrize("name", ["Alpaca", "", "{input}", "chatml"])
def test_unknown_style_is_refused_with_the_choices(name):
    with pytest.raises(LitLoraError) as error:
        style(name)
    assert str(error.value) == (
        f"--prompt_style ({name}) must be auto, alpaca, none, chat, "
        "or a text with {instruction} and, if wanted, {input}"
    )


@pytest.mark.parametrize("name", CHATS)
@pytest.mark.parametrize("example", [CONVERSATION, Example.of(ADD), Example.of(Turn("<&'\"> é", "\n x"))])
def test_chat_text_equals_transformers(name, example):
    template, bos_token, eos_token, _ = CHATS[name]
    chat = style("chat", template, bos_token, eos_token)
    messages = messages_of(example)
    assert rendered(chat, example).text == apply_chat_template(name, messages)
    first = example.turns[0]
    opening = messages[: 2 if example.system else 1]
    assert chat.prompt(first.instruction, first.input, example.system).text == apply_chat_template(
        name, opening, add_generation_prompt=True
    )


def test_chat_supervises_responses_with_their_end_token():
    supervised = {name: responses(style("chat", *chat[:3]), CONVERSATION) for name, chat in CHATS.items()}
    assert supervised == {
        "smollm2": ["3<|im_end|>", " Still 3. <|im_end|>", "Yes: 🦙.<|im_end|>"],
        "llama-2": [" 3 </s>", " Still 3. </s>", " Yes: 🦙. </s>"],
        "llama-3": ["3<|eot_id|>", "Still 3.<|eot_id|>", "Yes: 🦙.<|eot_id|>"],
    }


def test_end_marker_other_than_eos_excludes_the_newline():
    assert responses(style("chat", CHATML, eos_token="<|endoftext|>"), Example.of(ADD)) == ["3<|im_end|>"]


def test_response_containing_eos_is_supervised_completely():
    assert responses(style("chat", LLAMA_2), Example.of(Turn("hi", "a</s>b"))) == [" a</s>b </s>"]


def test_empty_response_is_its_end_token():
    assert responses(style("chat", CHATML, eos_token="<|im_end|>"), Example.of(Turn("Hush.", ""))) == ["<|im_end|>"]


def test_default_system_prompt_belongs_to_the_prompt():
    assert "named SmolLM" in style("chat", CHATML).prompt("hi").text
    assert "named SmolLM" not in style("chat", CHATML).prompt("hi", system="Be brief.").text


def test_template_without_bos():
    assert style("chat", "{{ bos_token }}|{{ messages[0].content }}", bos_token=None).prompt("hi").text == "|hi"


def test_chat_without_a_template_is_refused():
    with pytest.raises(
        LitLoraError, match=r"^--prompt_style chat needs a checkpoint with a chat template .* use alpaca"
    ):
        style("chat")


ANSWER_LOST = "{% for m in messages %}{{ m.content.split('|')[-1] }}</s>{% endfor %}"
ENDLESS = "{% for n in range(99999) %}{{ 'x' * 9999 }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (ANSWER_LOST, "drops a part of the response"),
        ("{{ raise_exception('no\n system') }}", "fails on a conversation: no system; use"),
        ("{{ nothing.there }}", "fails on a conversation: 'nothing' is undefined"),
        ("{{ 1 / 0 }}", "fails on a conversation: division by zero"),
        ("{{ messages[0]['content'] + 1 }}", "fails on a conversation: can only concatenate"),
        ("{{ messages.append(1) }}", "fails on a conversation: access to attribute 'append'"),
        ("{{ ''.__class__.__mro__ }}", "fails on a conversation: access to attribute '__class__'"),
        (ENDLESS, "fails on a conversation: its text exceeds 10,000,000 characters"),
    ],
)
def test_unusable_template_is_refused(template, reason):
    with pytest.raises(LitLoraError, match=f"^--prompt_style chat: the checkpoint's chat template {reason}") as error:
        style("chat", template).render(Example.of(Turn("a question", "an|answer"), Turn("b?", "b|c")))
    assert str(error.value).endswith("; use alpaca, none, or a text with {instruction}")
    assert "\n" not in str(error.value)


def test_template_syntax_error_is_refused():
    with pytest.raises(
        LitLoraError, match=r"^--prompt_style chat: the checkpoint's chat template has an error: "
    ) as error:
        style("chat", "{% if messages %}")
    assert "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of an alarm that a callback took
@pytest.mark.parametrize(
    "template",
    [
        "{{ 'a' * 10**11 }}",
        "{{ 'a'.center(10**11) }}",
        "{{ '%99999999999d' % 1 }}",
        "{{ 10 ** (10 ** 9) }}",
        "{% set ns = namespace(x='a') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
        "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{{ 'a' * 9999 }}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ messages.__class__.__mro__ }}",
        "{{ messages.append(messages) }}",
        "{% include '/etc/passwd' %}",
        "{{ 5|round(-1000000000) }}",  # these are one call of C code each, which hears no alarm
        "{% set a = 'a' * 9999999 %}{{ ([a + 'x', a + 'y'] * 5000) | sort(case_sensitive=true) | length }}",
    ],
)
def test_chat_template_is_sandboxed_and_limited(template, monkeypatch):
    monkeypatch.setattr(resource_limits, "MAX_SECONDS", 0.3)
    with pytest.raises(LitLoraError, match="--prompt_style chat: the checkpoint's chat template ") as refused:
        style("chat", template).prompt("Hello")
    assert len(str(refused.value)) < 400


def test_backslash_n_is_a_line_break():
    assert style(r"Q: {instruction}\nA:").prompt("Hi").text == "Q: Hi\nA:"


def test_unknown_placeholder_is_refused():
    with pytest.raises(
        LitLoraError, match=r"^--prompt_style: \{output\} has no meaning: there are \{instruction\} and"
    ):
        style("{instruction} {output}")


def test_variables_without_a_chat_template_are_refused():
    with pytest.raises(LitLoraError, match=r"^--prompt_style_variables are for --prompt_style chat, not for alpaca"):
        build_prompt_style(
            StyleSettings("alpaca", {"a": 1}), StyleTokens(EOS, {}, SpecialTokens(()), frozenset(), None)
        )
