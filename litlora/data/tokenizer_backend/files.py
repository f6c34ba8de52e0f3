"""A checkpoint's tokenizer files: tokenizer.json or a sentencepiece model, and their settings."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from litlora.data.tokenizer_backend.limits import check_cost
from litlora.data.tokenizer_backend.sentencepiece_model import SPACE, SentencePieceModel
from litlora.errors import LitLoraError
from litlora.utils import resource_limits
from litlora.utils.console import without_panics
from litlora.utils.files import read_whole
from litlora.utils.resource_limits import within_cpu_time

Backend = tokenizers.Tokenizer | SentencePieceModel


def _read_text(path: Path) -> str:
    try:
        return TextIOWrapper(BytesIO(read_whole(path)), encoding="utf-8").read()
    except (OSError, UnicodeDecodeError) as error:
        raise LitLoraError(f"{path} cannot be read ({error}); download the checkpoint again") from error


@contextmanager
def reporting_failure(what: str) -> Iterator[None]:
    """Turn what tokenizers raises where its file asks for the impossible into a LitLoraError.

    That is a plain Exception, or a panic of Rust, which does not even derive from Exception.
    """
    try:
        with without_panics():
            yield
    except BaseException as error:
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        reason = str(error).partition("\n")[0]
        raise LitLoraError(f"{what} fails ({reason}): download the checkpoint again, or choose another") from error


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
        raise _malformed_template(checkpoint_dir) from error
    template = named.get("default") if isinstance(template, list) else template
    if not isinstance(template, str | None):
        raise _malformed_template(checkpoint_dir)
    return template


def _malformed_template(checkpoint_dir: Path) -> LitLoraError:
    fault = (
        f"chat_template in {checkpoint_dir / 'tokenizer_config.json'} must be a text or a list of names and templates"
    )
    return LitLoraError(f"{fault}; download the checkpoint again")


def token_text(token: Any) -> str | None:
    """Return the text of a special token, which files store as a string or with its properties."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def special_token_texts(settings: dict[str, Any]) -> list[str]:
    """Return the texts of the special tokens in the settings."""
    named = [value for key, value in settings.items() if key.endswith("_token")]
    others = settings.get("additional_special_tokens") or settings.get("extra_special_tokens") or []
    return [text for token in [*named, *others] if (text := token_text(token))]


def read_backend(checkpoint_dir: Path, settings: dict[str, Any]) -> Backend:
    """Build the tokenizer from tokenizer.json, or else from the sentencepiece model; may complete the settings."""
    if (checkpoint_dir / "tokenizer.json").is_file():
        return _read_tokenizer_json(checkpoint_dir / "tokenizer.json")
    if (checkpoint_dir / "tokenizer.model").is_file():
        return _read_sentencepiece(checkpoint_dir, settings)
    raise no_tokenizer(checkpoint_dir)


def no_tokenizer(checkpoint_dir: Path) -> LitLoraError:
    """Return the error of a checkpoint without a tokenizer."""
    hint = "fetch it with: litlora download --repo_id ORG/NAME --tokenizer_only true"
    return LitLoraError(f"no tokenizer in {checkpoint_dir} (expected tokenizer.json or tokenizer.model); {hint}")


def _read_tokenizer_json(path: Path) -> tokenizers.Tokenizer:
    """Read the file as it stands, whatever class the settings name: it is what the model was pre-trained with."""
    text = _read_text(path)
    _refuse_expensive(path, text)
    try:
        # Offsets without the spaces around a word would miss characters of a response
        backend = tokenizers.Tokenizer.from_str(re.sub(r'("trim_offsets"\s*:\s*)true', r"\1false", text))
    except Exception as error:  # tokenizers raises no subclass
        raise LitLoraError(f"{path} is not a valid tokenizer ({error}); download the checkpoint again") from error
    backend.no_truncation()
    backend.no_padding()
    return backend


def _refuse_expensive(path: Path, text: str) -> None:
    """Refuse a file that would hold the machine; what the library does not read is left to it."""
    try:
        file = json.loads(text)
    except (ValueError, RecursionError):
        return
    try:
        check_cost(file if isinstance(file, dict) else {})
    except (MemoryError, TimeoutError, ValueError) as error:
        raise LitLoraError(f"{path} asks for too much: {error}; choose another checkpoint") from error


def _read_sentencepiece(checkpoint_dir: Path, settings: dict[str, Any]) -> SentencePieceModel:
    """Read a sentencepiece model, whose bos, eos and prefix space the settings may change."""
    path = checkpoint_dir / "tokenizer.model"
    prefix, prefix_each = settings.get("add_prefix_space") is not False, bool(settings.get("legacy"))
    try:
        load = partial(SentencePieceModel, read_whole(path), prefix=prefix, prefix_each=prefix_each)
        model = within_cpu_time(load, resource_limits.MAX_SECONDS)
    except TimeoutError as error:
        raise LitLoraError(f"{path} asks for too much: {error}; choose another checkpoint") from error
    except (OSError, RuntimeError) as error:
        raise LitLoraError(f"{path} is not a sentencepiece model; download the checkpoint again") from error
    if not model.is_lossless():
        raise LitLoraError(
            f"{path} is an unsupported sentencepiece model (only models with byte pieces and without "
            "normalization are supported); save the tokenizer as tokenizer.json beside it"
        )
    for key, token in {"bos_token": model.bos_token, "eos_token": model.eos_token}.items():
        if token is not None:
            settings.setdefault(key, token)
    _add_declared_tokens(checkpoint_dir, model, settings)
    bos = token_text(settings.get("bos_token")) if settings.get("add_bos_token") else None
    eos = token_text(settings.get("eos_token")) if settings.get("add_eos_token") else None
    model.surround([bos] if bos else [], [eos] if eos else [])
    return model


def _add_declared_tokens(checkpoint_dir: Path, model: SentencePieceModel, settings: dict[str, Any]) -> None:
    """Add the tokens that the files beside a sentencepiece model declare, with the declared ids."""
    special = set(special_token_texts(settings))
    older = read_optional_json(checkpoint_dir / "added_tokens.json")
    declared = {i: {"content": text, "special": text in special} for text, i in older.items()}
    declared = settings.get("added_tokens_decoder") or declared
    for token_id, properties in sorted(declared.items(), key=lambda item: int(item[0])):
        model.add_tokens([AddedToken(**properties)])
        if model.token_to_id(properties["content"]) != int(token_id):
            raise LitLoraError(
                f"the tokenizer files in {checkpoint_dir} disagree: {properties['content']} cannot have id {token_id}; "
                "download the checkpoint again"
            )


def probe_decoder(checkpoint_dir: Path, backend: Backend) -> tuple[bool, bool]:
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
