"""A model from Python, and conversations whose history stays in the cache."""

import json
import shutil
from pathlib import Path

import pytest

import litlora
from litlora.generation.llm import LLM

CHATML = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
COUNTED = "{{ messages | length }} messages\n" + CHATML
GREEDY = {"temperature": 0, "max_new_tokens": 8}


@pytest.fixture(scope="module")
def chat_base(tiny, tmp_path_factory) -> Path:
    folder = Path(shutil.copytree(tiny, tmp_path_factory.mktemp("chat") / "base"))
    (folder / "chat_template.jinja").write_text(CHATML, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def llm(chat_base) -> LLM:
    return litlora.LLM.load(chat_base, precision="32-true")


def test_generate_takes_one_prompt_or_several(llm):
    prompts = ["Say hello to", "Add the numbers.", "Close"]
    several = llm.generate(prompts, **GREEDY, batch_size=2)
    assert several == [llm.generate(prompt, **GREEDY) for prompt in prompts]
    assert "".join(llm.stream(prompts[0], **GREEDY)) == several[0]


def test_seed_determines_samples_of_several_prompts(llm):
    first, again, other = (llm.generate(["Say"] * 3, max_new_tokens=8, temperature=1.5, seed=s) for s in (1, 1, 2))
    assert first == again != other
    assert len(set(first)) == 3


def test_adapter_brings_its_prompt_style(adapter, tiny):
    llm = LLM.load(str(adapter), base_dir=str(tiny), precision="32-true")
    prompt = llm.files.style().prompt("Close the door.").text
    plain = LLM.load(tiny, adapters=[str(adapter)], prompt_style="none", precision="32-true")
    assert llm.generate("Close the door.", **GREEDY) == plain.generate(prompt, **GREEDY)
    assert llm.chat([{"role": "user", "content": "Close the door."}], **GREEDY) == plain.generate(prompt, **GREEDY)


def test_conversation_answers_as_chat_does_and_computes_its_history_once(llm):
    computed = []
    conversation = llm.conversation("Be brief.", **GREEDY)
    messages = [{"role": "system", "content": "Be brief."}]
    handle = llm.gpt.model.embed_tokens.register_forward_pre_hook(lambda _, inputs: computed.append(len(inputs[0])))
    for question in ("Say hello in three ways.", "Add the numbers.", "Close the door."):
        messages.append({"role": "user", "content": question})
        answer = "".join(conversation.say(question))
        computed_here, *_ = computed
        assert answer == llm.chat(messages, **GREEDY)
        ids = llm.files.encode(conversation.style, [conversation.rendered(conversation.messages[:-1])])[0]
        assert computed_here == len(ids) if len(messages) == 2 else computed_here < 0.7 * len(ids)
        messages.append({"role": "assistant", "content": answer})
        computed.clear()
    handle.remove()
    assert [message.to_chat() for message in conversation.all_messages] == messages


def test_history_that_a_template_writes_otherwise_is_computed_again(chat_base, tmp_path):
    folder = Path(shutil.copytree(chat_base, tmp_path / "base"))
    (folder / "chat_template.jinja").write_text(COUNTED, encoding="utf-8")
    llm = LLM.load(folder, precision="32-true")
    conversation = llm.conversation(**GREEDY)
    messages = []
    for question in ("Say hello", "Close the door."):
        messages.append({"role": "user", "content": question})
        answer = "".join(conversation.say(question))
        assert answer == llm.chat(messages, **GREEDY)
        messages.append({"role": "assistant", "content": answer})


def test_system_message_and_reset_change_the_next_answer(llm):
    conversation = llm.conversation(**GREEDY)
    first = "".join(conversation.say("Say hello"))
    conversation.reset()
    conversation.system = "Be brief."
    other = "".join(conversation.say("Say hello"))
    assert other == llm.chat(
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say hello"}], **GREEDY
    )
    conversation.reset()
    conversation.system = ""
    assert "".join(conversation.say("Say hello")) == first


def test_interrupted_answer_is_part_of_the_conversation(llm):
    conversation = llm.conversation(**GREEDY)
    answer = conversation.say("Say hello")
    said = next(answer)
    answer.close()
    assert conversation.messages[-1].text == said
    following = "".join(conversation.say("Close the door."))
    messages = [("user", "Say hello"), ("assistant", said), ("user", "Close the door.")]
    assert following == llm.chat([{"role": role, "content": text} for role, text in messages], **GREEDY)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda llm: llm.generate("x", temperature=-1), r"--temperature \(-1\) must be 0 or more"),
        (lambda llm: llm.generate(["x", "y " * 300]), "the prompt's 600 tokens and --max_new_tokens"),
        (lambda llm: llm.chat([]), "messages: "),
        (lambda llm: llm.chat([{"role": "nobody", "content": "x"}]), "messages: message 1: the role 'nobody' is not"),
        (lambda llm: list(llm.conversation().say("y " * 300)), "fill the checkpoint's 256 positions: start a new one"),
        (lambda llm: LLM.load("nowhere"), "there is no checkpoint folder nowhere"),
        (lambda llm: LLM.load(llm.files.base.dir, prompt_style="nonsense"), "must be auto, alpaca, none, chat"),
    ],
)
def test_mistakes_are_errors_of_one_sentence(llm, call, sentence):
    with pytest.raises(litlora.LitLoraError, match=sentence):
        call(llm)


def test_chat_needs_a_template_or_a_style_of_an_adapter(tiny):
    llm = LLM.load(tiny)
    with pytest.raises(litlora.LitLoraError, match="--prompt_style chat needs a checkpoint with a chat template"):
        llm.chat([{"role": "user", "content": "x"}])


def test_answer_with_a_changed_length_regime(checkpoints, tmp_path):
    """Where a conversation grows into other rotary frequencies, its history is computed again."""
    folder = Path(shutil.copytree(checkpoints("llama"), tmp_path / "base"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    scaling = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    changed = config | {"max_position_embeddings": 40, "rope_parameters": scaling}
    (folder / "config.json").write_text(json.dumps(changed), encoding="utf-8")
    llm = LLM.load(folder, precision="32-true", prompt_style="none")
    conversation, messages = llm.conversation(**GREEDY), []
    for question in ("Say hello in three ways to all", "Which is heavier, a feather or a stone?"):
        messages.append({"role": "user", "content": question})
        answer = "".join(conversation.say(question))
        assert answer == llm.chat(messages, **GREEDY)
        messages.append({"role": "assistant", "content": answer})
    lengths = [len(llm.files.encode(conversation.style, [conversation.rendered(conversation.messages[:n])])[0])
               for n in (1, 3)]  # fmt: skip
    assert lengths[0] < 40 < lengths[1]
