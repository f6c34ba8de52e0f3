"""A checkpoint's tokenizer files: tokenizer.json or a sentencepiece model, and their settings."""

import json
import re
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from litlora.errors import LitLoraError

SPACE = "▁"  # sentencepiece's character for a space


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LitLoraError(f"{path} cannot be read ({error}); download the checkpoint again") from error


def read_optional_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; an empty one if there is no such file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise LitLoraError(f"{path} is not valid JSON ({error}); download the checkpoint again") from error
    if not isinstance(content, dict):
        raise LitLoraError(f"{path} is not a JSON object; download the checkpoint again")
    return content


def read_settings(checkpoint_dir: Path) -> dict[str, Any]:
    """Read tokenizer_config.json, completed by the older special_tokens_map.json."""
    older = read_optional_json(checkpoint_dir / "special_tokens_map.json")
    settings = read_optional_json(checkpoint_dir / "tokenizer_config.json")
    return older | {key: value for key, value in settings.items() if value is not None}


def read_chat_template(checkpoint_dir: Path, settings: dict[str, Any]) -> str | None:
    """Return the chat template: chat_template.jinja, or the one named default in the settings."""
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


def token_text(token: Any) -> str | None:
    """Return the text of a special token, which files store as a string or with its properties."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def special_token_texts(settings: dict[str, Any]) -> list[str]:
    """Return the texts of the special tokens in the settings."""
    named = [value for key, value in settings.items() if key.endswith("_token")]
    others = settings.get("additional_special_tokens") or settings.get("extra_special_tokens") or []
    return [text for token in [*named, *others] if (text := token_text(token))]


def read_backend(checkpoint_dir: Path, settings: dict[str, Any], config: dict[str, Any]) -> tokenizers.Tokenizer:
    """Build the tokenizer from tokenizer.json, or else from the sentencepiece model; may complete the settings."""
    if (checkpoint_dir / "tokenizer.json").is_file():
        return _read_tokenizer_json(checkpoint_dir, settings, config)
    if (checkpoint_dir / "tokenizer.model").is_file():
        return _read_sentencepiece(checkpoint_dir, settings)
    raise no_tokenizer(checkpoint_dir)


def no_tokenizer(checkpoint_dir: Path) -> LitLoraError:
    """Return the error of a checkpoint without a tokenizer."""
    hint = "fetch it with: litlora download --repo_id ORG/NAME --tokenizer_only true"
    return LitLoraError(f"no tokenizer in {checkpoint_dir} (expected tokenizer.json or tokenizer.model); {hint}")


def _read_tokenizer_json(
    checkpoint_dir: Path, settings: dict[str, Any], config: dict[str, Any]
) -> tokenizers.Tokenizer:
    path = checkpoint_dir / "tokenizer.json"
    text = _read_text(path)
    try:
        # Offsets without the spaces around a word would miss characters of a response
        backend = tokenizers.Tokenizer.from_str(re.sub(r'("trim_offsets"\s*:\s*)true', r"\1false", text))
    except Exception as error:  # tokenizers raises no subclass
        raise LitLoraError(f"{path} is not a valid tokenizer ({error}); download the checkpoint again") from error
    backend.no_truncation()
    backend.no_padding()
    if config.get("model_type") != "mistral":  # whose file transformers reads unchanged
        _follow_class(backend, settings, is_byte_level='"ByteLevel"' in text)
    return backend


def _follow_class(backend: tokenizers.Tokenizer, settings: dict[str, Any], is_byte_level: bool) -> None:
    """Rebuild normalizer, pre-tokenizer and decoder, for the classes for which transformers ignores the file's."""
    name = str(settings.get("tokenizer_class")).removesuffix("Fast")
    if name == "LlamaTokenizer" and not is_byte_level:
        _use_llama_steps(backend, settings)
    if name == "GPT2Tokenizer":
        add_prefix_space = bool(settings.get("add_prefix_space"))
        backend.normalizer = None
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
        backend.decoder = decoders.ByteLevel()


def _use_llama_steps(backend: tokenizers.Tokenizer, settings: dict[str, Any]) -> None:
    """Write spaces as sentencepiece does, with a prefix space before the text (legacy: before each segment)."""
    has_prefix = settings.get("add_prefix_space", True)
    scheme = ("always" if settings.get("legacy") else "first") if has_prefix else "never"
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme=scheme, split=False)
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if has_prefix else steps)


def _read_sentencepiece(checkpoint_dir: Path, settings: dict[str, Any]) -> tokenizers.Tokenizer:
    """Read a sentencepiece model as transformers does: its pieces as BPE, its control pieces as special tokens."""
    path = checkpoint_dir / "tokenizer.model"
    try:
        model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise LitLoraError(f"{path} is not a sentencepiece model; download the checkpoint again") from error
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
    """Return the pairs of pieces that merge into a piece, in the order of the merged pieces' ids."""
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
    """Return the pieces that are never split: control pieces, and user-defined ones, which no merge produces."""
    merged = set(map("".join, merges))
    symbols = []
    for piece, token_id in vocabulary.items():
        is_special = model.is_control(token_id) or model.is_unknown(token_id)
        if is_special or (len(piece) > 1 and piece not in merged and not model.is_byte(token_id)):
            symbols.append(AddedToken(piece, special=is_special, normalized=False))
    return symbols


def _check_same_pieces(path: Path, backend: tokenizers.Tokenizer, model: sentencepiece.SentencePieceProcessor) -> None:
    """Refuse a model that is not BPE, normalizes the text or lacks byte pieces: its ids would be wrong."""
    probe = "\nOnce upon a time,\n\tein Fluß; 東京 ﬁ 🦙 and 12.5 %"
    ours, theirs = backend.encode(probe).ids, model.encode(probe)
    length = min(len(ours), len(theirs))  # either may begin with a prefix space
    if ours[-length:] != theirs[-length:]:
        raise LitLoraError(
            f"{path} is an unsupported sentencepiece model (only BPE with byte pieces and without "
            "normalization is supported); save the tokenizer as tokenizer.json beside it"
        )


def _add_declared_tokens(checkpoint_dir: Path, backend: tokenizers.Tokenizer, settings: dict[str, Any]) -> None:
    """Add the tokens that the files beside a sentencepiece model declare, with the declared ids."""
    special = set(special_token_texts(settings))
    older = read_optional_json(checkpoint_dir / "added_tokens.json")
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
    """Add BOS before and EOS after every text if the settings say so."""
    bos = token_text(settings.get("bos_token")) if settings.get("add_bos_token") else None
    eos = token_text(settings.get("eos_token")) if settings.get("add_eos_token") else None
    single = [*filter(None, [bos]), "$A", *filter(None, [eos])]
    special_tokens = [(text, backend.token_to_id(text)) for text in (bos, eos) if text]
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=special_tokens)


def probe_decoder(checkpoint_dir: Path, backend: tokenizers.Tokenizer) -> tuple[bool, bool]:
    """Return whether tokens are byte-level and not sentencepiece-like, and whether decoding drops a prefix space."""
    decode = backend.decoder.decode if backend.decoder else "".join
    if decode(["Ġx"]) == " x":
        return True, False
    if decode(["x", "<0x41>", SPACE]) == "xA ":
        return False, decode([f"{SPACE}x"]) == "x"
    raise LitLoraError(
        f"the tokenizer in {checkpoint_dir} has an unsupported decoder "
        "(only byte-level and sentencepiece-like ones are supported)"
    )
