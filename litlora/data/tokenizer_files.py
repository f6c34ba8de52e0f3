"""Reading a checkpoint's tokenizer files: tokenizer.json or a sentencepiece model, and their settings."""

import json
import re
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from litlora.errors import LitLoraError

SPACE = "▁"  # what sentencepiece writes for a space


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LitLoraError(f"{path} cannot be read ({error}); download the checkpoint again") from error


def _read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object, empty where there is no such file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise LitLoraError(f"{path} is no JSON ({error}); download the checkpoint again") from error
    if not isinstance(content, dict):
        raise LitLoraError(f"{path} is no JSON object; download the checkpoint again")
    return content


def _read_settings(checkpoint_dir: Path) -> dict[str, Any]:
    """Read tokenizer_config.json, completed by the older special_tokens_map.json."""
    older = _read_json(checkpoint_dir / "special_tokens_map.json")
    settings = _read_json(checkpoint_dir / "tokenizer_config.json")
    return older | {key: value for key, value in settings.items() if value is not None}


def _chat_template(checkpoint_dir: Path, settings: dict[str, Any]) -> str | None:
    """Find the checkpoint's chat template: a file of its own, or the one named default in its settings."""
    path = checkpoint_dir / "chat_template.jinja"
    if path.is_file():
        return _read_text(path)
    template = settings.get("chat_template")
    try:
        named = {entry["name"]: entry["template"] for entry in template} if isinstance(template, list) else {}
    except (KeyError, TypeError) as error:
        raise LitLoraError(
            f"chat_template in {checkpoint_dir / 'tokenizer_config.json'} must be a text or a list of names and "
            "templates; download the checkpoint again"
        ) from error
    return named.get("default") if isinstance(template, list) else template


def _text_of(token: Any) -> str | None:
    """Return the text of a special token, which files hold bare or with its properties."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _special_texts(settings: dict[str, Any]) -> list[str]:
    """List the special tokens that the settings name."""
    named = [value for key, value in settings.items() if key.endswith("_token")]
    others = settings.get("additional_special_tokens") or settings.get("extra_special_tokens") or []
    return [text for token in [*named, *others] if (text := _text_of(token))]


def _read_backend(checkpoint_dir: Path, settings: dict[str, Any], config: dict[str, Any]) -> tokenizers.Tokenizer:
    if (checkpoint_dir / "tokenizer.json").is_file():
        return _read_tokenizer_json(checkpoint_dir, settings, config)
    if (checkpoint_dir / "tokenizer.model").is_file():
        return _read_sentencepiece(checkpoint_dir, settings)
    raise LitLoraError(
        f"no tokenizer in {checkpoint_dir} (expected tokenizer.json or tokenizer.model); "
        "fetch it with: litlora download --repo_id ORG/NAME --tokenizer_only true"
    )


def _read_tokenizer_json(
    checkpoint_dir: Path, settings: dict[str, Any], config: dict[str, Any]
) -> tokenizers.Tokenizer:
    path = checkpoint_dir / "tokenizer.json"
    text = _read_text(path)
    try:
        # Offsets that leave out the spaces around a word would leave out characters of a response
        backend = tokenizers.Tokenizer.from_str(re.sub(r'("trim_offsets"\s*:\s*)true', r"\1false", text))
    except Exception as error:  # tokenizers raises nothing narrower
        raise LitLoraError(f"{path} holds no tokenizer ({error}); download the checkpoint again") from error
    backend.no_truncation()
    backend.no_padding()
    if config.get("model_type") != "mistral":  # transformers reads the file of a Mistral as it stands
        _follow_class(backend, settings, is_byte_level='"ByteLevel"' in text)
    return backend


def _follow_class(backend: tokenizers.Tokenizer, settings: dict[str, Any], is_byte_level: bool) -> None:
    """Rebuild the steps around the vocabulary as transformers does for the classes that ignore the file's own."""
    name = str(settings.get("tokenizer_class")).removesuffix("Fast")
    if name == "LlamaTokenizer" and not is_byte_level:
        _use_llama_steps(backend, settings)
    if name == "GPT2Tokenizer":
        add_prefix_space = bool(settings.get("add_prefix_space"))
        backend.normalizer = None
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
        backend.decoder = decoders.ByteLevel()


def _use_llama_steps(backend: tokenizers.Tokenizer, settings: dict[str, Any]) -> None:
    """Write spaces as sentencepiece does, one more in front of the text (legacy: of each stretch of it)."""
    has_prefix = settings.get("add_prefix_space", True)
    scheme = ("always" if settings.get("legacy") else "first") if has_prefix else "never"
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme=scheme, split=False)
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if has_prefix else steps)


def _read_sentencepiece(checkpoint_dir: Path, settings: dict[str, Any]) -> tokenizers.Tokenizer:
    """Read a sentencepiece model as transformers does: its pieces as a BPE, its control pieces as special."""
    path = checkpoint_dir / "tokenizer.model"
    try:
        model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise LitLoraError(f"{path} is no sentencepiece model; download the checkpoint again") from error
    for key, token_id in {"bos_token": model.bos_id(), "eos_token": model.eos_id()}.items():
        if token_id >= 0:
            settings.setdefault(key, model.id_to_piece(token_id))
    vocabulary = {model.id_to_piece(token_id): token_id for token_id in range(len(model))}
    merges = _merges(vocabulary)
    bpe = models.BPE(vocab=vocabulary, merges=merges, fuse_unk=True, byte_fallback=True)
    backend = tokenizers.Tokenizer(bpe)
    _use_llama_steps(backend, settings)
    _check_same_pieces(path, backend, model)
    backend.add_tokens(_symbols(model, vocabulary, merges))
    _add_declared_tokens(checkpoint_dir, backend, settings)
    _add_bos_and_eos(backend, settings)
    return backend


def _merges(vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """List the pairs of pieces that make a piece, in the order of the pieces they make."""
    splits = [
        (piece[:at], piece[at:])
        for piece in vocabulary
        for at in range(1, len(piece))
        if piece[:at] in vocabulary and piece[at:] in vocabulary
    ]
    return sorted(splits, key=lambda pair: (vocabulary["".join(pair)], len(pair[0])))


def _symbols(
    model: sentencepiece.SentencePieceProcessor, vocabulary: dict[str, int], merges: list[tuple[str, str]]
) -> list[AddedToken]:
    """List the pieces that stand whole in a text: control pieces, and a user's own, which no merge makes."""
    made = set(map("".join, merges))
    symbols = []
    for piece, token_id in vocabulary.items():
        is_special = model.is_control(token_id) or model.is_unknown(token_id)
        if is_special or (len(piece) > 1 and piece not in made and not model.is_byte(token_id)):
            symbols.append(AddedToken(piece, special=is_special, normalized=False))
    return symbols


def _check_same_pieces(path: Path, backend: tokenizers.Tokenizer, model: sentencepiece.SentencePieceProcessor) -> None:
    """Refuse a model that is no BPE, changes the text or lacks byte pieces: its ids would come out wrong."""
    probe = "\nOnce upon a time,\n\tein Fluß; 東京 ﬁ 🦙 and 12.5 %"
    ours, theirs = backend.encode(probe).ids, model.encode(probe)
    length = min(len(ours), len(theirs))  # either may begin with a space of its own
    if ours[-length:] != theirs[-length:]:
        raise LitLoraError(
            f"{path} is a sentencepiece model of a kind that is not supported (only BPE with byte pieces and without "
            "normalization is); save the tokenizer as tokenizer.json beside it"
        )


def _add_declared_tokens(checkpoint_dir: Path, backend: tokenizers.Tokenizer, settings: dict[str, Any]) -> None:
    """Add the tokens that the files beside a sentencepiece model declare, under the ids they declare."""
    special = set(_special_texts(settings))
    older = _read_json(checkpoint_dir / "added_tokens.json")
    declared = {i: {"content": text, "special": text in special} for text, i in older.items()}
    declared = settings.get("added_tokens_decoder") or declared
    for token_id, properties in sorted(declared.items(), key=lambda item: int(item[0])):
        backend.add_tokens([AddedToken(**properties)])
        if backend.token_to_id(properties["content"]) != int(token_id):
            raise LitLoraError(
                f"the tokenizer files in {checkpoint_dir} disagree: {properties['content']} cannot have id {token_id}; "
                "download the checkpoint again"
            )


def _add_bos_and_eos(backend: tokenizers.Tokenizer, settings: dict[str, Any]) -> None:
    """Put bos before and eos after every text where the settings ask for it."""
    bos = _text_of(settings.get("bos_token")) if settings.get("add_bos_token") else None
    eos = _text_of(settings.get("eos_token")) if settings.get("add_eos_token") else None
    single = [*filter(None, [bos]), "$A", *filter(None, [eos])]
    special_tokens = [(text, backend.token_to_id(text)) for text in (bos, eos) if text]
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=special_tokens)


def _probe_decoder(checkpoint_dir: Path, backend: tokenizers.Tokenizer) -> tuple[bool, bool]:
    """Find out whether tokens are byte-level or sentencepiece-like, and whether a first space is dropped."""
    decode = backend.decoder.decode if backend.decoder else "".join
    if decode(["Ġx"]) == " x":
        return True, False
    if decode(["x", "<0x41>", SPACE]) == "xA ":
        return False, decode([f"{SPACE}x"]) == "x"
    raise LitLoraError(
        f"the tokenizer in {checkpoint_dir} writes text in a way that is not supported "
        "(only byte-level and sentencepiece-like tokens are)"
    )
