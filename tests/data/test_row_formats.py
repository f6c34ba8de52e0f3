import json
from itertools import product

import pytest

from litlora.data.dataset import read_examples
from litlora.data.examples import Example, Message, ToolCall, Turn
from litlora.data.readers.fields import from_python
from litlora.data.readers.parsers import RowError
from litlora.data.readers.row_formats import ANY, with_columns
from litlora.errors import LitLoraError

ROW = '{"instruction": "Say hi.", "input": "", "output": "Hi."}'


@pytest.fixture
def read(tmp_path):
    def read(*rows):
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), "utf-8")
        return read_examples(path)

    return read


@pytest.fixture
def refusal(read, tmp_path):
    def refusal(*rows):
        with pytest.raises(LitLoraError) as refused:
            read(*rows)
        return str(refused.value).removeprefix(f"{tmp_path}/")

    return refusal


def said_in_parts(*parts, role="assistant"):
    return {"messages": [{"role": "user", "content": "a"}, {"role": role, "content": list(parts)}]}


def conversation(*said, system=()):
    roles = ["system"] * len(system) + ["user", "assistant"] * len(said)
    return {"messages": [{"role": r, "content": c} for r, c in zip(roles, (*system, *said), strict=False)]}


def weighted(**keys):
    return {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", **keys}]}


HISTORY = '"history" must be a list of lists, each of a question and its answer'
TOOL = 'a tool must be an object such as {"type": "function", "function": {"name": "..."}}'
IMAGE = "message 2: content part 1 has the type 'image_url', but only text can be read"
SURROGATE = (
    "holds what JSON in UTF-8 cannot ('utf-8' codec can't encode character '\\ud800' in position {}: "
    "surrogates not allowed)"
)
NUMPY = "[{'role': 'user', 'content': 'a'}\n {'role': 'assistant', 'content': 'b'}]"
AS_NUMPY = "as numpy writes it: save the rows as JSON Lines or Parquet"
PREFERENCE = '"chosen" and "rejected" are a preference, and only one answer can be learned: --columns '
ARGUMENTS = "message 2: the arguments of a tool call are a list, not an object"


@pytest.mark.parametrize(
    ("row", "example"),
    [
        ({"instruction": "a", "input": "b", "output": "c"}, Example.of(Turn("a", "c", "b"))),
        ({"instruction": "a", "output": "c"}, Example.of(Turn("a", "c"))),
        ({"instruction": "a", "input": None, "output": ""}, Example.of(Turn("a", ""))),
        ({"prompt": "a", "completion": "c", "id": 7}, Example.of(Turn("a", "c"))),
        (conversation("a", "b"), Example.of(Turn("a", "b"))),
        (conversation("a", "b", "c", "d", system=["s"]), Example.of(Turn("a", "b"), Turn("c", "d"), system="s")),
        (conversation("a", "b", "c"), Example.of(Turn("a", "b"))),
    ],
)
def test_rows_of_all_formats_are_parsed(read, row, example):
    assert read(row) == [example]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ("Say hi.", "this is not valid JSON (Expecting value at column 1)"),
        (["Say hi.", "Hi."], "this is a list, not an object"),
        ({"instruction": "a"}, 'there is no "output"'),
        ({"output": "a"}, 'there is no "instruction"'),
        ({"prompt": ["a", "b"], "completion": ["c", "d"]}, '"prompt" is a list, not a string'),
        ({"prompt": "a", "completion": ["c", "d"]}, '"completion" is a list, not a string'),
        ({"completion": "a"}, 'there is no "prompt"'),
        ({"instruction": "a", "output": 4}, '"output" is a number, not a string'),
        ({"instruction": "a", "output": None}, '"output" is null, not a string'),
        ({"instruction": True, "output": "a"}, '"instruction" is a boolean, not a string'),
        ({"instruction": "a", "input": ["b"], "output": "c"}, '"input" is a list, not a string'),
        ({"q": "a", "a": "b"}, "the keys ['q', 'a'] match no row format, and no --columns assigns them"),
        (
            {"Text": "a", "TEXT": "b"},
            "the keys ['Text', 'TEXT'] match no row format, and no --columns assigns them",
        ),
        ('{"instruction": "x", "output": "c", "instruction": "a"}', 'the key "instruction" is given twice'),
        (
            '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "content": "c"}]}',
            'the key "content" is given twice',
        ),
        ({"text": ""}, '"text" is empty'),
        ({"text": 4}, '"text" is a number, not a string'),
        ({"instruction": "a", "output": "b", "history": ["c"]}, HISTORY),
        ({"instruction": "a", "output": "b", "history": [["c", "d", "e"]]}, HISTORY),
        ({"instruction": "a", "output": "b", "history": [["c", None]]}, '"history" is null, not a string'),
        (conversation("a", "b") | {"tools": ["look"]}, TOOL),
        (conversation("a", "b") | {"tools": "look"}, '"tools" is a string, not a list'),
        (conversation("a", [{"type": "image_url", "image_url": "c"}]), IMAGE),
        (said_in_parts({"type": "redacted_thinking"}), IMAGE.replace("image_url", "redacted_thinking")),
        (
            said_in_parts({"type": "tool_use", "name": "look"}, role="user"),
            "message 2: content part 1 has the type 'tool_use', which no user message can have",
        ),
        (
            said_in_parts({"type": "thinking", "thinking": "b"}, role="user"),
            "message 2: content part 1 has the type 'thinking', which no user message can have",
        ),
        (
            said_in_parts({"type": "tool_result", "content": "b"}),
            "message 2: content part 1 has the type 'tool_result', which no assistant message can have",
        ),
        (said_in_parts({"type": "tool_use", "input": {}}), 'message 2: there is no "name"'),
        (
            weighted(content=[{"type": "thinking", "thinking": "c"}], reasoning="d"),
            "message 2: there is a reasoning beside the content, and another one among its parts",
        ),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c"},
            f"{PREFERENCE}instruction=prompt,output=chosen takes the chosen ones",
        ),
        ({"chosen": [{}], "rejected": [{}]}, f"{PREFERENCE}messages=chosen takes the chosen ones"),
        ({"messages": NUMPY}, f'"messages" is a text that is not valid JSON but {AS_NUMPY}'),
        ({"messages": f"array({NUMPY}, dtype=object)"}, f'"messages" is a text that is not valid JSON but {AS_NUMPY}'),
        ({"prompt": NUMPY, "completion": "b"}, f'"prompt" is a list of messages {AS_NUMPY}'),
        ({"messages": '[{"role": "user", "role": "x"}]'}, 'the key "role" is given twice'),
        (conversation("a", "b") | {"tools": ['{"name": "x", "name": "y"}']}, 'the key "name" is given twice'),
        (
            weighted(tool_calls=[{"name": "a", "arguments": '{"b": 1, "b": 2}'}]),
            'message 2: the key "b" is given twice',
        ),
        (weighted(weight=0.5), 'message 2: "weight" is 0.5, but it must be 1 (supervised) or 0 (context)'),
        (weighted(train="no"), "message 2: \"train\" is 'no', but it must be 1 (supervised) or 0 (context)"),
        (weighted(tool_calls=[{"function": {}}]), 'message 2: there is no "name"'),
        (weighted(tool_calls=[3]), "message 2: this is a number, not an object"),
        (weighted(tool_calls=[{"function": {"name": "a", "arguments": [1]}}]), ARGUMENTS),
        ({"conversations": [{"from": "gpt"}]}, 'message 1: there is no "content"'),
        (conversation("a", "b") | {"tools": [{"name": "\ud800"}]}, f'"tools" {SURROGATE.format(10)}'),
        (
            weighted(tool_calls=[{"name": "a", "arguments": {"\ud800": 1}}]),
            f'message 2: "arguments" {SURROGATE.format(2)}',
        ),
        ({"conversations": [{"from": "function_call", "value": "look"}]}, "message 1: this is a string, not an object"),
        ({"messages": "a"}, '"messages" is a string, not a list'),
        ({"messages": []}, "the conversation has no response"),
        ({"messages": ["a"]}, "the conversation has no response"),
        ({"messages": ["a", 1]}, "message 1: this is a string, not an object"),
        ({"messages": [{"role": "user", "content": None}]}, 'message 1: "content" is null, not a string'),
        ({"messages": [{"role": "user"}]}, 'message 1: there is no "content"'),
        (conversation("a"), "the conversation has no response"),
        (conversation(system=["a"]), "the conversation has no response"),
        (conversation("a", None), 'message 2: "content" is null, not a string'),
        (
            {"messages": [{"role": "narrator", "content": "a"}]},
            "message 1: the role 'narrator' is not system, user, assistant or tool",
        ),
        (
            '{"instruction": "a", "output": "b\\ud83d"}',
            '"output" holds \\ud83d, an unpaired surrogate, which UTF-8 cannot encode',
        ),
    ],
)
def test_invalid_row_is_named_by_file_and_line(refusal, row, problem):
    assert refusal(ROW, row) == f"rows.jsonl line 2: {problem}; a row must look like {ANY.shape}"


def test_first_invalid_row_is_named_and_others_counted(refusal):
    assert refusal("1", ROW, "nonsense", {"messages": []}).startswith(
        "rows.jsonl line 1: this is a number, not an object (invalid rows after it: 2); a row must look like {"
    )


def test_file_without_rows_is_refused(refusal):
    assert refusal("", "  ").startswith("rows.jsonl holds no rows; a row must look like {")


USER, ASKED = {"role": "user", "content": "a"}, Message("user", "a")
PARTS = [{"type": "text", "text": "b"}, {"type": "text", "text": "c"}]
SCHEMA = {"name": "look", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
TOOLS = ({"type": "function", "function": SCHEMA},)
CALL = ToolCall("look", {"city": "Oslo"}, "call_1")


def answered(**keys):
    return {"messages": [USER, {"role": "assistant", **keys}]}


def parsed(row):
    """Parse a row, and check that what train.jsonl holds of it is the same example, with nothing left out."""
    parsed = ANY.parse(row)
    again = ANY.parse(json.loads(json.dumps(parsed.example.to_json())))
    assert again == (parsed.example, False, ())
    assert again.example.is_chat == parsed.example.is_chat
    return parsed


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"content": PARTS}, Message("assistant", "bc")),
        ({"content": ["b", "c"]}, Message("assistant", "bc")),
        ({"content": [{"type": "output_text", "text": "b"}, "c"]}, Message("assistant", "bc")),
        ({"content": "b", "name": "Ann"}, Message("assistant", "b", name="Ann")),
        ({"content": "b", "reasoning_content": "c"}, Message("assistant", "b", reasoning="c")),
        ({"content": "b", "thinking": "c"}, Message("assistant", "b", reasoning="c")),
        ({"content": "b", "reasoning": "c"}, Message("assistant", "b", reasoning="c")),
        ({"content": "b", "reasoning_content": "", "thinking": "c"}, Message("assistant", "b", reasoning="c")),
        ({"content": None, "reasoning_content": "c"}, Message("assistant", reasoning="c")),
        ({"content": "<think>\nc\n</think>\n\nb"}, Message("assistant", "b", reasoning="c")),
        ({"content": "<think>c</think>b"}, Message("assistant", "b", reasoning="c")),
        ({"content": "<think>\n\n</think>\n\nb"}, Message("assistant", "<think>\n\n</think>\n\nb")),
        ({"content": "Write <think>c</think>"}, Message("assistant", "Write <think>c</think>")),
        ({"content": "<think>c"}, Message("assistant", "<think>c")),
        ({"content": [{"type": "thinking", "thinking": "c"}, PARTS[0]]}, Message("assistant", "b", reasoning="c")),
        ({"content": [{"type": "thinking", "thinking": PARTS}]}, Message("assistant", reasoning="bc")),
        ({"content": "b", "weight": 0}, Message("assistant", "b", weight=0)),
        ({"content": "b", "train": False}, Message("assistant", "b", weight=0)),
        ({"content": "b", "weight": 1, "train": True}, Message("assistant", "b")),
        ({"content": "b", "weight": None}, Message("assistant", "b")),
    ],
)
def test_keys_of_a_message_are_used(keys, message):
    assert parsed(answered(**keys)) == (Example((ASKED, message)), False, ())


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        ({"id": "call_1", "type": "function", "function": {"name": "look", "arguments": {"city": "Oslo"}}}, CALL),
        ({"id": "call_1", "function": {"name": "look", "arguments": '{"city": "Oslo"}'}}, CALL),
        ({"name": "look", "arguments": '{"city": "Oslo"}'}, ToolCall("look", {"city": "Oslo"})),
        ({"function": {"name": "look", "arguments": "print(1)"}}, ToolCall("look", "print(1)")),
        ({"function": {"name": "look"}}, ToolCall("look", {})),
    ],
)
@pytest.mark.parametrize("tools", [[SCHEMA], list(TOOLS), json.dumps(TOOLS), [json.dumps(SCHEMA)]])
def test_tool_calls_and_tools_are_used(call, expected, tools):
    row = answered(content="b", tool_calls=[call])
    row["messages"].append({"role": "tool", "content": "4", "tool_call_id": "call_1"})
    row["messages"].append({"role": "assistant", "content": "c"})
    called = Message("assistant", "b", tool_calls=(expected,))
    result = Message("tool", "4", tool_call_id="call_1"), Message("assistant", "c")
    assert parsed(row | {"tools": tools}) == (Example((ASKED, called, *result), TOOLS), False, ())
    row["messages"][1]["content"] = None
    assert parsed(row).example.messages[1] == Message("assistant", tool_calls=(expected,))


USE = {"type": "tool_use", "id": "call_1", "name": "look", "input": {"city": "Oslo"}}
RESULT = {"type": "tool_result", "tool_use_id": "call_1", "content": PARTS}


def test_parts_of_anthropic_are_read():
    row = {
        "system": PARTS,
        "tools": [{"name": "look", "input_schema": SCHEMA["parameters"]}],
        "messages": [
            USER,
            {"role": "assistant", "content": [{"type": "thinking", "thinking": "c"}, PARTS[0], USE]},
            {"role": "user", "content": [RESULT, {"type": "tool_result", "tool_use_id": "call_2"}, PARTS[1]]},
            {"role": "assistant", "content": "d"},
        ],
    }
    results = Message("tool", "bc", tool_call_id="call_1"), Message("tool", tool_call_id="call_2")
    called = Message("assistant", "b", reasoning="c", tool_calls=(CALL,))
    messages = (Message("system", "bc"), ASKED, called, *results, Message("user", "c"), Message("assistant", "d"))
    assert parsed(row) == (Example(messages, TOOLS), False, ())
    row["messages"][2]["content"] = [RESULT | {"is_error": True}]
    found = ANY.parse(row)
    assert found.example.messages[3:] == (results[0], Message("assistant", "d"))
    assert found.left_out == ("messages[].content[].is_error",)


@pytest.mark.parametrize(
    "write", [json.dumps, repr, lambda value: repr(tuple(value)).replace("(", "[").replace(")", "]")]
)
@pytest.mark.parametrize("keys", ["messages", "prompt completion"])
def test_lists_in_cells_are_read_as_json_and_as_python_writes_them(write, keys):
    said = [
        {"role": "user", "content": "it's a \n"},
        {"role": "assistant", "content": 'b "c" é', "train": True, "name": None},
    ]
    pair = dict(zip(keys.split(), (said[:1], said[1:]), strict=False)) if " " in keys else {keys: said}
    cells = {key: write(value) for key, value in pair.items()}
    expected = Example.of(Turn("it's a \n", 'b "c" é'))
    assert parsed(cells) == (expected, False, ())
    assert parsed(cells | {"history": write([["c", "d"]])}).left_out == ("history",) if keys == "messages" else True
    assert parsed(cells).example.is_chat


def test_an_answer_that_is_json_stays_a_text():
    answer = json.dumps([USER])
    assert parsed({"prompt": "Write a chat.", "completion": answer}).example == Example.of(
        Turn("Write a chat.", answer)
    )


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, "-" * 100_000 + "1", "[" + "1+" * 100_000 + "1]", "[b'a']", "[{1}]", "[" + "1," * 200_000 + "]"],
)
def test_what_only_looks_like_python_is_refused(text, refusal):
    assert '"messages" is a text that is not valid JSON (' in refusal({"messages": f"[{text}"})
    assert from_python(text) is None


ANSWER = {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    ("chosen", "prompt", "columns"),
    [
        ("b", "a", {"instruction": "prompt", "output": "chosen"}),
        ([ANSWER], [USER], {"instruction": "prompt", "output": "chosen"}),
        ([USER, ANSWER], "a", {"messages": "chosen"}),
        ([USER, ANSWER], None, {"messages": "chosen"}),
    ],
)
def test_chosen_answers_are_taken_as_a_refusal_says(refusal, chosen, prompt, columns):
    row = {"chosen": chosen, "rejected": chosen} | ({} if prompt is None else {"prompt": prompt})
    flag = ",".join(f"{key}={column}" for key, column in columns.items())
    assert f"--columns {flag} takes the chosen ones" in refusal(row)
    found = with_columns(columns).parse(row)
    assert found.example == Example.of(Turn("a", "b"))
    assert set(found.left_out) == row.keys() - set(columns.values())


SHAREGPT = [
    {"from": "system", "value": "s"}, {"from": "human", "value": "a"},
    {"from": "function_call", "value": json.dumps({"name": "look", "arguments": {"city": "Oslo"}})},
    {"from": "observation", "value": "4"}, {"from": "gpt", "value": "b", "weight": 0},
]  # fmt: skip


@pytest.mark.parametrize("key", ["conversations", "messages"])
def test_sharegpt_roles_are_read(key):
    messages = (
        Message("system", "s"), ASKED, Message("assistant", tool_calls=(ToolCall("look", {"city": "Oslo"}),)),
        Message("tool", "4"), Message("assistant", "b", weight=0),
    )  # fmt: skip
    assert parsed({key: SHAREGPT, "tools": json.dumps([SCHEMA])}) == (Example(messages, TOOLS), False, ())
    expected = Example((Message("system", "t"), *messages[1:]))
    assert parsed({key: SHAREGPT[1:], "system": "t"}).example == expected


def test_texts_of_messages_are_read():
    row = {"conversations": [{"role": "prompter", "text": "a"}, {"role": "AI", "text": "b"}]}
    assert parsed(row) == (Example.of(Turn("a", "b")), False, ())


@pytest.mark.parametrize("roles", [*product("sua", "sua"), "uuusa", "ssu", "au", "uta", "asus"], ids="".join)
def test_roles_may_come_in_any_order(roles):
    names = {"s": "developer", "u": "user", "a": "assistant", "t": "tool"}
    messages = [{"role": names[role], "content": f"{number}"} for number, role in enumerate([*roles, "a"])]
    expected = [message | {"role": message["role"].replace("developer", "system")} for message in messages]
    assert parsed({"messages": messages}).example == Example(tuple(Message(**message) for message in expected))


def test_empty_system_messages_are_no_messages():
    for content in ({"content": None}, {"content": ""}, {}):
        row = answered(content="b")
        row["messages"].insert(0, {"role": "system", **content})
        assert parsed(row) == (Example.of(Turn("a", "b")), False, ())


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("instruction", "output"), ("prompt", "completion"), ("instruction", "response"), ("prompt", "response"),
        ("question", "answer"), ("query", "response"), ("problem", "solution"), ("input", "output"),
        ("prompt", "answer"), ("question", "solution"), ("user", "assistant"), ("input", "target"),
    ],
)  # fmt: skip
def test_common_pairs_are_read(question, answer):
    assert parsed({question: "a", answer: "b"}) == (Example.of(Turn("a", "b")), False, ())
    row = {question: "a", answer: "b", "system": "s", "history": [["c", "d"]], "thinking": "e"}
    assert parsed({question: "a", answer: "b", "reasoning": "e"}).example.messages[-1].reasoning == "e"
    expected = Example.of(Turn("c", "d"), Turn("a", "<think>e</think>b"), system="s")
    assert expected.messages[-1] == Message("assistant", "b", reasoning="e")
    assert parsed(row) == (expected, False, ())
    if question not in ("input", "inputs"):
        assert parsed({question: "a", answer: "b", "context": "c"}) == (Example.of(Turn("a", "b", "c")), False, ())
        expected = Example.of(Turn("c", "d"), Turn("a", "<think>e</think>b", "i"), system="s")
        assert parsed(row | {"input": "i"}) == (expected, False, ())


@pytest.mark.parametrize(
    ("row", "example"),
    [
        ({"Question": "a", "Answer": "b"}, Example.of(Turn("a", "b"))),
        ({"INSTRUCTION": "a", "Input": "c", "Output": "b"}, Example.of(Turn("a", "b", "c"))),
        ({"Text": "a"}, Example(text="a")),
    ],
)
def test_keys_in_capitals_are_read(row, example):
    assert parsed(row) == (example, False, ())
    assert ANY.parse(row | {"Id": 7}).left_out == ("id",)


def test_message_lists_under_prompt_and_completion_are_read():
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    row = {"prompt": [*said, {"role": "user", "content": "c"}], "completion": [{"role": "assistant", "content": "d"}]}
    context = (Message("user", "a"), Message("assistant", "b", weight=0), Message("user", "c"))
    assert parsed(row) == (Example((*context, Message("assistant", "d"))), False, ())


@pytest.mark.parametrize(
    ("row", "is_chat"),
    [
        (conversation("a", "b"), True),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, True),
        ({"prompt": [USER], "completion": [{"role": "assistant", "content": "b"}]}, True),
        ({"prompt": "a", "completion": "b"}, False),
        ({"instruction": "a", "output": "b", "system": "s", "history": [["c", "d"]]}, False),
    ],
)
def test_conversations_stay_conversations_when_written(row, is_chat):
    written = parsed(row).example.to_json()
    assert ("messages" in written, "instruction" in written) == (is_chat, not is_chat)


def test_plain_text_is_an_example():
    assert parsed({"text": "Once.\n"}) == (Example(text="Once.\n"), False, ())


@pytest.mark.parametrize(
    ("row", "left_out"),
    [
        ({"instruction": "a", "output": "b", "id": 7, "label": None, "tags": []}, ("id",)),
        ({"prompt": "a", "completion": "b", "response": "c", "text": "d"}, ("response", "text")),
        (conversation("a", "b") | {"source": "x", "chosen": True}, ("source", "chosen")),
        (weighted(logprobs=[1], refusal=None), ("messages[].logprobs",)),
        (weighted(tool_calls=[{"index": 3, "function": {"name": "a", "strict": True}}]),
         ("messages[].tool_calls[].index", "messages[].tool_calls[].function.strict")),
        (conversation("a", [PARTS[0] | {"cache_control": 1}]), ("messages[].content[].cache_control",)),
        ({"conversations": [{"from": "human", "value": "a", "weight": 1}, {"from": "gpt", "value": "b"}]},
         ("conversations[].weight",)),
        ({"text": "a", "meta": {"url": "b"}}, ("meta",)),
    ],
)  # fmt: skip
def test_unknown_keys_are_named(row, left_out):
    assert ANY.parse(row).left_out == left_out


@pytest.mark.parametrize(
    ("columns", "row", "example", "left_out"),
    [
        ({"instruction": "Frage", "output": "Antwort"}, {"Frage": "a", "Antwort": "b"}, Example.of(Turn("a", "b")), ()),
        ({"instruction": "q", "output": "a", "input": "c", "system": "s"}, {"q": "a", "a": "b", "c": "c", "s": "s"},
         Example.of(Turn("a", "b", "c"), system="s"), ()),
        ({"instruction": "b", "output": "instruction"}, {"instruction": "c", "b": "a"}, Example.of(Turn("a", "c")), ()),
        ({"instruction": "q", "output": "output"}, {"q": "a", "output": "b", "instruction": "c", "prompt": "d"},
         Example.of(Turn("a", "b")), ("prompt", "instruction")),
        ({"text": "content"}, {"content": "a", "text": "b"}, Example(text="a"), ("text",)),
        ({"instruction": "a", "output": "b"}, {"a": "a", "b": "b", "text": "c"}, Example.of(Turn("a", "b")), ("text",)),
        ({"input": "c"}, {"prompt": "a", "completion": "b", "c": "c"}, Example.of(Turn("a", "b", "c")), ()),
        ({"messages": "chat"}, {"chat": conversation("a", "b")["messages"]}, Example.of(Turn("a", "b")), ()),
    ],
)  # fmt: skip
def test_columns_of_other_names_are_read(columns, row, example, left_out):
    assert with_columns(columns).parse(row) == (example, False, left_out)


def test_unknown_columns_are_refused():
    with pytest.raises(RowError, match=r'^there is no "Antwort"$'):
        with_columns({"instruction": "Frage", "output": "Antwort"}).parse({"Frage": "a", "output": "b"})
    with pytest.raises(LitLoraError) as refused:
        with_columns({"answer": "b"})
    assert str(refused.value) == (
        "--columns answer=... is none of instruction, input, output, system, history, "
        "reasoning_content, tools, text, messages"
    )


def test_questions_with_message_lists_take_their_input():
    row = {"prompt": "a", "input": "b", "completion": [{"role": "assistant", "content": "c"}]}
    assert parsed(row) == (Example.of(Turn("a\n\nb", "c")), False, ())
