"""Ids and text are those of the checkpoint's own file, and every token knows its characters.

The file is read by `tokenizers` or by sentencepiece itself.
"""

import json
import pickle
import random
import re
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from litlora.data.tokenizer import BYTE_OF_CHARACTER, Tokenizer
from litlora.errors import LitLoraError

TEXTS = [
    "",
    " ",
    "   ",
    "Hello, world!",
    " one space before",
    "   three before, two after  ",
    "\n\nnew lines\r\n and\n\n\n",
    "\ttabs\t\tand  spaces\t",
    "in 2024, 12345 + 6\n\n7  8",
    "def f(x):\n    return x\n",
    "🦙🚀👩‍👩‍👧 café",
    "日本語 текст עברית عربى ελληνικά हिन्दी",
    "e\u0301 ﬁ Ａ \u00a0x\u3000y \u200b\x00",
    "▁x a▁b <0x41> Ġ",
    "<s>a</s> b</s>c </s>  d <unk>e<pad>",
    "[INST] hi [/INST] yo[REFERENCE_DOC_1] </s>",
    "<|begin_of_text|><|start|>user\nhi<|end|>\n<|eot|> x<|end_of_text|>",
    "it's we'll DON'T",
]
# Where the ways to merge the same piece compete
RUNS_OF_SPACES = [f"a{' ' * count}b{' ' * (count // 3)}\n{' ' * count}" for count in range(2, 40)]
BYTE_LEVEL = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
LLAMA = {
    "tokenizer_class": "LlamaTokenizer",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "add_bos_token": True,
    "add_eos_token": False,
    "legacy": False,
}


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def byte_level_backend() -> Backend:
    """Train a byte-level BPE with Llama 3's way to split text and to add bos."""
    backend = Backend(models.BPE(ignore_merges=True))
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    split = Regex(words + r"|\s*[\r\n]+|\s+(?!\S)|\s+")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(split, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot|>", "<|start|>", "<|end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([*TEXTS, "hello world  \n\n" * 9, "   return " * 9], trainer)
    add_bos = processors.TemplateProcessing(single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)])
    backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), add_bos])
    return backend


def byte_level_folder(folder: Path, **settings: Any) -> Path:
    byte_level_backend().save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", BYTE_LEVEL | settings)
    write_json(folder / "config.json", {"model_type": "llama", "bos_token_id": 0, "eos_token_id": 1})
    return folder


def sentencepiece_folder(folder: Path, version: str = "v1", **settings: Any) -> Path:
    data = resources.files("mistral_common") / "data"
    model = next(file for file in data.iterdir() if file.name.endswith(f".model.{version}"))
    (folder / "tokenizer.model").write_bytes(model.read_bytes())
    write_json(folder / "tokenizer_config.json", LLAMA | settings)
    write_json(folder / "config.json", {"model_type": "llama", "bos_token_id": 1, "eos_token_id": 2})
    return folder


def edit_json(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text(encoding="utf-8")) | changes
    write_json(path, {key: value for key, value in content.items() if value is not None})


def check_equals_file(folder: Path) -> None:
    """Check a tokenizer.json: nothing in the settings beside it may change an id."""
    ours, theirs = Tokenizer(folder), Backend.from_file(str(folder / "tokenizer.json"))
    for text in TEXTS:
        encoding = theirs.encode(text)
        assert ours.encode(text).ids == encoding.ids, text
        without = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, add_special_tokens=False).ids == without
        assert ours.decode(encoding.ids) == theirs.decode(encoding.ids)
    assert ours.vocab_size == theirs.get_vocab_size()


def check_equals_sentencepiece(folder: Path, *, prefix: bool = True, legacy: bool = False) -> None:
    """Check a tokenizer.model: sentencepiece segments what lies between control pieces."""
    ours = Tokenizer(folder)
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    newline = model.piece_to_id("<0x0A>")
    control = [model.id_to_piece(i) for i in range(len(model)) if model.is_control(i) or model.is_unknown(i)]
    for text in [*TEXTS, *RUNS_OF_SPACES]:
        expected = []
        for number, part in enumerate(re.split(f"({'|'.join(map(re.escape, control))})", text)):
            if number % 2:
                expected.append(model.piece_to_id(part))
            elif prefix and (not expected or legacy):
                expected += model.encode(part)
            elif part:  # a byte piece merges with nothing, so that no prefix is written behind it
                ids = model.encode(f"\n{part}")
                expected += ids[ids.index(newline) + 1 :]
        assert ours.encode(text, add_special_tokens=False).ids == expected, text
        if not set(control) & set(map(model.id_to_piece, expected)):
            decoded = model.decode(expected) if prefix else model.decode([newline, *expected])[1:]
            assert ours.decode(expected) == decoded, text


def check_spans_cover(tokenizer: Tokenizer, text: str) -> None:
    ids, spans = tokenizer.encode(text)
    assert len(ids) == len(spans)
    position = 0
    for start, end in spans:
        assert start <= position <= max(position, end)
        position = max(position, end)
    assert position == len(text)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(byte_level_folder(tmp_path_factory.mktemp("byte_level")))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(sentencepiece_folder(tmp_path_factory.mktemp("llama")))


@pytest.fixture(params=["byte_level", "llama"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize(
    "name", ["PreTrainedTokenizerFast", "LlamaTokenizer", "LlamaTokenizerFast", "GPT2Tokenizer", None]
)
def test_byte_level_ids_and_text_equal_the_file(tmp_path, name):
    """A class that transformers 5 rebuilds with another pre-tokenizer changes nothing here."""
    check_equals_file(byte_level_folder(tmp_path, tokenizer_class=name, unk_token="<|end_of_text|>"))


@pytest.mark.parametrize("flags", [{"add_bos_token": False}, {"add_bos_token": True, "add_eos_token": True}])
def test_tokenizer_json_decides_on_bos_and_eos(tmp_path, flags):
    folder = byte_level_folder(tmp_path, tokenizer_class="PreTrainedTokenizerFast", **flags)
    check_equals_file(folder)
    assert Tokenizer(folder).encode("hi").ids[0] == 0
    edit_json(folder / "tokenizer.json", post_processor=None)
    check_equals_file(folder)
    assert Tokenizer(folder).encode("hi").ids[0] != 0


@pytest.mark.parametrize(("version", "legacy"), [("v1", False), ("v1", True), ("v2", True), ("v3", False)])
def test_sentencepiece_segments_a_model_itself(tmp_path, version, legacy):
    check_equals_sentencepiece(sentencepiece_folder(tmp_path, version, legacy=legacy), legacy=legacy)


def test_settings_may_drop_the_prefix_space(tmp_path):
    check_equals_sentencepiece(sentencepiece_folder(tmp_path, add_prefix_space=False), prefix=False)


@pytest.mark.parametrize(
    ("settings", "ids"),
    [
        ({}, [1, 12014]),
        ({"add_bos_token": False, "add_eos_token": True}, [12014, 2]),
        ({"add_bos_token": None}, [12014]),
        ({"bos_token": {"__type": "AddedToken", "content": "<unk>", "normalized": False}}, [0, 12014]),
    ],
)
def test_settings_decide_on_bos_and_eos_of_a_sentencepiece_model(tmp_path, settings, ids):
    assert Tokenizer(sentencepiece_folder(tmp_path, **settings)).encode("hi").ids == ids


def test_declared_tokens_are_added_to_a_sentencepiece_model(tmp_path):
    declared = {
        "32000": {"content": "<|start|>", "special": True, "rstrip": True},
        "32001": {"content": "<|end|>", "normalized": False},
        "32002": {"content": "zq", "single_word": True},
    }
    tokenizer = Tokenizer(sentencepiece_folder(tmp_path, added_tokens_decoder=declared))
    word = tokenizer.encode("\nhi", add_special_tokens=False).ids[2:]
    ids, spans = tokenizer.encode("<|start|> \nhi<|end|>hi", add_special_tokens=False)
    assert ids == [32000, *word, 32001, *word]
    assert spans[0] == (0, 11) and spans[1][0] == 11
    assert tokenizer.decode(ids) == "hi<|end|>hi"
    assert tokenizer.encode("azqb zq").ids.count(32002) == 1
    assert tokenizer.vocab_size == 32003


def test_older_files_beside_sentencepiece_are_read(tmp_path):
    folder = sentencepiece_folder(tmp_path, pad_token="<pad>")
    write_json(folder / "added_tokens.json", {"<|start|>": 32001, "<pad>": 32000})
    tokenizer = Tokenizer(folder)
    assert tokenizer.encode("<pad><|start|>", add_special_tokens=False).ids == [32000, 32001]
    assert tokenizer.decode([32000, 32001]) == "<|start|>"


@pytest.mark.parametrize("name", ["LlamaTokenizerFast", "PreTrainedTokenizerFast"])
def test_sentencepiece_like_tokenizer_json_equals_the_file(tmp_path, name):
    backend = Backend(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    backend.train_from_iterator(TEXTS, trainer)
    backend.save(str(tmp_path / "tokenizer.json"))
    write_json(tmp_path / "tokenizer_config.json", LLAMA | {"tokenizer_class": name})
    check_equals_file(tmp_path)


def test_tokenizer_goes_to_another_process(tokenizer):
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert [copy.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]
    assert copy.fingerprint == tokenizer.fingerprint


def test_truncation_and_padding_settings_are_ignored(tmp_path):
    folder = byte_level_folder(tmp_path)
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(3)
    backend.enable_padding(length=9)
    backend.save(str(folder / "tokenizer.json"))
    lengths = Tokenizer(folder).encode_batch(["", "a longer text"]).lengths
    assert lengths[0] == 1 and lengths[1] > 3


def test_special_token_of_the_settings_is_recognised(tmp_path):
    folder = byte_level_folder(tmp_path, eos_token="hello", pad_token="<|not in the vocabulary|>")
    tokenizer = Tokenizer(folder)
    assert tokenizer.eos_id in tokenizer.encode("xhellox").ids
    assert tokenizer.decode(tokenizer.encode("xhellox").ids) == "xx"
    assert max(tokenizer.encode("<|not in the vocabulary|>").ids) < tokenizer.vocab_size


def test_spans_cover_the_whole_text(tokenizer):
    characters = [
        "a",
        "hello",
        " ",
        "  ",
        "\n",
        "\t",
        "🦙",
        "é",
        "e\u0301",
        "本",
        "</s>",
        "<|end|>",
        "1",
        ".",
        "▁",
        "\x00",
    ]
    chance = random.Random(0)
    texts = ["".join(chance.choices(characters, k=12)) for _ in range(200)]
    for text in [*TEXTS, *texts]:
        check_spans_cover(tokenizer, text)


def test_tokens_of_one_character_share_its_span(tokenizer):
    ids, spans = tokenizer.encode("a🐙🐙")
    assert len(ids) > 4
    assert set(spans[2:]) == {(1, 2), (2, 3)}


def test_spaces_belong_to_their_token(byte_level):
    ids, spans = byte_level.encode(" hello   \n\n x", add_special_tokens=False)
    for token_id, (start, end) in zip(ids, spans, strict=True):
        assert byte_level.decode([token_id]) == " hello   \n\n x"[start:end]


def test_bos_and_eos_have_empty_spans(tmp_path):
    tokenizer = Tokenizer(sentencepiece_folder(tmp_path, add_eos_token=True))
    ids, spans = tokenizer.encode("<s>hi")
    assert (ids[:2], ids[-1]) == ([1, 1], 2)
    assert (spans[:2], spans[-1]) == ([(0, 0), (0, 3)], (5, 5))
    assert tokenizer.encode("").spans == [(0, 0), (0, 0)]


def test_batch_equals_single_texts(tokenizer):
    encodings, batch = [tokenizer.encode(text) for text in TEXTS], tokenizer.encode_batch(TEXTS)
    assert batch.lengths.tolist() == [len(encoding.ids) for encoding in encodings]
    assert batch.ids.tolist() == [token_id for encoding in encodings for token_id in encoding.ids]
    assert list(map(tuple, batch.spans.tolist())) == [span for encoding in encodings for span in encoding.spans]


def test_unpaired_surrogate_is_refused(tokenizer):
    with pytest.raises(LitLoraError, match="an unpaired surrogate"):
        tokenizer.encode("a\ud83e")


def test_stream_yields_complete_characters(tokenizer):
    ids = tokenizer.encode("Hi 🐙🚀 é\n  日本\n", add_special_tokens=False).ids
    whole = tokenizer.decode(ids)
    cuts = [cut for cut in range(len(ids)) if whole.startswith(tokenizer.decode(ids[:cut]))]
    assert 8 < len(cuts) < len(ids)
    for cut in cuts:
        pieces = list(tokenizer.stream(ids[:cut], ids[cut:]))
        assert tokenizer.decode(ids[:cut]) + "".join(pieces) == whole
        assert not {"", "\ufffd"} & {*pieces, *"".join(pieces)}


def test_stream_yields_characters_once_complete(tokenizer):
    ids = tokenizer.encode("ab🐙cd", add_special_tokens=False).ids
    taken: list[int] = []
    pieces = [(piece, len(taken)) for piece in tokenizer.stream((), (taken.append(i) or i for i in ids))]
    assert "".join(piece for piece, _ in pieces) == "ab🐙cd"
    assert pieces[0][1] == 1
    assert [length for _, length in pieces] == sorted({length for _, length in pieces})


def test_completion_keeps_its_first_space(llama):
    space_and_word = llama.encode("word", add_special_tokens=False).ids
    prompt = llama.encode("[INST] hi [/INST]").ids
    assert "".join(llama.stream(prompt, space_and_word)) == " word"
    assert "".join(llama.stream([llama.bos_id], space_and_word)) == "word"
    assert llama.decode([llama.bos_id, *space_and_word]) == "word"


def test_invalid_utf8_is_replaced(tokenizer):
    *half, last = tokenizer.encode("a🐙", add_special_tokens=False).ids
    word = tokenizer.encode("x</s>", add_special_tokens=False).ids
    assert tokenizer.decode([*half, *word[:1], *half, last]).replace(" ", "") == "a\ufffdxa🐙"
    assert "".join(tokenizer.stream((), half)) == "a\ufffd"


def test_special_and_unknown_ids_have_no_text(tokenizer):
    ids = tokenizer.encode("hi", add_special_tokens=False).ids
    assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id, tokenizer.vocab_size + 7]) == "hi"


def test_plain_byte_level_token_is_its_text(tmp_path):
    folder = byte_level_folder(tmp_path)
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    content["model"]["vocab"]["東 京"] = 777
    write_json(folder / "tokenizer.json", content)
    assert Tokenizer(folder).decode([777]) == "東 京"


def test_byte_level_alphabet_equals_the_library():
    assert set(BYTE_OF_CHARACTER) == set(pre_tokenizers.ByteLevel.alphabet())
    text = "".join(map(chr, range(0x800)))
    [(shown, _)] = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    assert bytes(BYTE_OF_CHARACTER[character] for character in shown) == text.encode()


def test_stop_ids_are_all_that_the_checkpoint_names(tmp_path):
    folder = byte_level_folder(tmp_path)
    edit_json(folder / "config.json", eos_token_id=3)
    write_json(folder / "generation_config.json", {"eos_token_id": [1, 2]})
    tokenizer = Tokenizer(folder)
    assert (tokenizer.eos_token, tokenizer.eos_id) == ("<|end_of_text|>", 1)
    assert tokenizer.stop_ids == {1, 2, 3}


@pytest.mark.parametrize(
    ("special_tokens_map", "eos_token_id", "eos_token"),
    [({"eos_token": {"content": "<|end|>"}}, 1, "<|end|>"), ({}, 2, "<|eot|>"), ({}, [3, 1], "<|start|>")],
)
def test_eos_from_older_files_and_the_config(tmp_path, special_tokens_map, eos_token_id, eos_token):
    folder = byte_level_folder(tmp_path, eos_token=None)
    write_json(folder / "special_tokens_map.json", special_tokens_map)
    edit_json(folder / "config.json", eos_token_id=eos_token_id)
    assert Tokenizer(folder).eos_token == eos_token


def test_sentencepiece_model_has_bos_and_eos(tmp_path):
    folder = sentencepiece_folder(tmp_path)
    (folder / "tokenizer_config.json").unlink()
    tokenizer = Tokenizer(folder)
    assert (tokenizer.bos_token, tokenizer.bos_id, tokenizer.eos_token, tokenizer.eos_id) == ("<s>", 1, "</s>", 2)


@pytest.mark.parametrize(
    ("setting", "template"),
    [
        (None, None),
        ("{{ 1 }}", "{{ 1 }}"),
        ([{"name": "rag", "template": "{{ 2 }}"}, {"name": "default", "template": "{{ 1 }}"}], "{{ 1 }}"),
        ([{"name": "rag", "template": "{{ 2 }}"}], None),
    ],
)
def test_chat_template_from_settings_or_file(tmp_path, setting, template):
    folder = byte_level_folder(tmp_path, chat_template=setting)
    assert Tokenizer(folder).chat_template == template
    (folder / "chat_template.jinja").write_text("{{ 'é' }}\n", encoding="utf-8")
    assert Tokenizer(folder).chat_template == "{{ 'é' }}\n"


def test_files_lists_the_tokenizer_files(tmp_path):
    folder = byte_level_folder(tmp_path)
    assert Tokenizer(folder).files == (folder / "tokenizer.json", folder / "tokenizer_config.json")


def test_missing_tokenizer_names_the_download_command(tmp_path):
    with pytest.raises(LitLoraError) as error:
        Tokenizer(tmp_path)
    assert str(error.value) == (
        f"no tokenizer in {tmp_path} (expected tokenizer.json or tokenizer.model); "
        "fetch it with: litlora download --repo_id ORG/NAME --tokenizer_only true"
    )


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        ("tokenizer.json", b'{"model": 1}', "tokenizer.json is not a valid tokenizer"),
        ("tokenizer.json", b"\xff\xfe", "tokenizer.json cannot be read"),
        ("tokenizer_config.json", b"{", "tokenizer_config.json is not valid JSON"),
        ("tokenizer_config.json", b"[]", "tokenizer_config.json is not a JSON object"),
        ("tokenizer_config.json", b'{"chat_template": [{}]}', "must be a text or a list of names and templates"),
        ("tokenizer_config.json", b'{"eos_token": "<|none|>"}', "has no end-of-text token"),
        ("generation_config.json", b"{", "generation_config.json is not valid JSON"),
        ("chat_template.jinja", b"\xff", "chat_template.jinja cannot be read"),
    ],
)
def test_corrupt_file_is_named(tmp_path, file, content, sentence):
    folder = byte_level_folder(tmp_path)
    write_json(folder / "config.json", {})
    (folder / file).write_bytes(content)
    with pytest.raises(LitLoraError, match=sentence) as error:
        Tokenizer(folder)
    assert str(folder) in str(error.value)


def test_unsupported_decoder_is_refused(tmp_path):
    folder = byte_level_folder(tmp_path)
    for decoder in ({"type": "WordPiece", "prefix": "##", "cleanup": True}, None):
        edit_json(folder / "tokenizer.json", decoder=decoder)
        with pytest.raises(LitLoraError, match="only byte-level and sentencepiece-like ones are supported"):
            Tokenizer(folder)


def test_truncated_sentencepiece_model_is_refused(tmp_path):
    folder = sentencepiece_folder(tmp_path)
    path = folder / "tokenizer.model"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(LitLoraError, match="is not a sentencepiece model"):
        Tokenizer(folder)


@pytest.mark.parametrize("kind", [{"model_type": "unigram", "byte_fallback": True}, {"model_type": "bpe"}])
def test_unsupported_sentencepiece_model_is_refused(tmp_path, kind):
    prefix = str(tmp_path / "tokenizer")
    sentences = ["once upon a time", "the time upon the mountain", "and percent of it", "12.5 and 12.5"] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_prefix=prefix,
        vocab_size=300,
        hard_vocab_limit=False,
        minloglevel=2,
        **kind,
    )
    with pytest.raises(LitLoraError, match="only models with byte pieces and without normalization are supported"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize(
    "settings",
    [{"bos_token": "<bos>"}, {"added_tokens_decoder": {"x": {}}}, {"added_tokens_decoder": {"32000": "<x>"}}],
)
def test_inconsistent_sentencepiece_settings_are_refused(tmp_path, settings):
    with pytest.raises(LitLoraError, match=r"^the tokenizer files in \S* are inconsistent"):
        Tokenizer(sentencepiece_folder(tmp_path, **settings))


def test_impossible_added_token_ids_are_refused(tmp_path):
    folder = sentencepiece_folder(tmp_path, added_tokens_decoder={"32005": {"content": "<|start|>"}})
    with pytest.raises(LitLoraError, match=r"disagree: <\|start\|> cannot have id 32005"):
        Tokenizer(folder)
