"""What `evaluate` measures: rows as texts and tokens of the models that are compared. Read without torch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Self

import numpy as np

from litlora.args.inference import EvaluateArgs
from litlora.data.dataset import choose_prompt_style, read_located_examples
from litlora.data.encoding import RenderedRow, encode_rows
from litlora.data.examples import Example, Message
from litlora.data.prompts.rendered import Rendered
from litlora.data.prompts.styles import AUTO, PromptStyle, StyleSettings
from litlora.data.tokenizer import Tokenizer
from litlora.data.tokens import Tokens
from litlora.errors import LitLoraError
from litlora.evaluation.metrics import require_rouge
from litlora.lora.adapter_folder import is_adapter
from litlora.lora.selection import Adapters, find_files, style_settings
from litlora.models.checkpoint_files import CheckpointFiles
from litlora.utils.files import check_writable


@dataclass(frozen=True)
class Row:
    """A row of data, and where it stands."""

    location: str
    example: Example

    @property
    def answer(self) -> str:
        """The expected answer: the last response."""
        return self.example.messages[-1].text if self.example.messages else ""

    @property
    def question(self) -> str:
        """What is asked before the last response."""
        turn = self.example.turns[-1]
        return " ".join(filter(None, (turn.instruction, turn.input)))

    def answered(self, text: str) -> "Row":
        """Return the row with another last response."""
        messages = (*self.example.messages[:-1], Message("assistant", text))
        return replace(self, example=replace(self.example, messages=messages))


@dataclass(frozen=True)
class Subject:
    """A model that is evaluated, as far as it is read without torch, and the prompts that it expects."""

    args: EvaluateArgs
    base: CheckpointFiles
    adapters: Adapters
    tokenizer: Tokenizer
    settings: StyleSettings

    @classmethod
    def find(cls, args: EvaluateArgs, rows: Path | None, untrained: StyleSettings | None = None) -> Self:
        """Find a model; without a prompt style of its own, it has `untrained`, or that of a training on these rows."""
        base, adapters = find_files(args)
        tokenizer = Tokenizer(base.dir, base.hub_config)
        if untrained is None:
            assert rows is not None
            untrained = StyleSettings(choose_prompt_style(AUTO, rows, tokenizer.chat_template)[0])
        return cls(args, base, adapters, tokenizer, style_settings(args, base.dir, adapters, untrained))

    @property
    def limit(self) -> int:
        """The number of tokens to which rows are cut."""
        return self.args.max_seq_length or self.base.config.positions

    @cached_property
    def style(self) -> PromptStyle:
        """The prompt style."""
        return self.tokenizer.prompt_style(self.settings)


@dataclass(frozen=True)
class Task:
    """The rows as tokens of one model, as far as the metrics need them."""

    subject: Subject
    text: Tokens | None
    """All tokens of each row, for the loss."""
    prompts: list[list[int]]
    """The prompt of each row's last response, for completions."""
    choices: list[Tokens]
    """The rows with each choice as the last response, alone supervised."""

    @classmethod
    def encode(cls, subject: Subject, rows: Sequence[Row]) -> Self:
        """Tokenize rows for a model; LitLoraError names a row that does not fit it."""
        args, positions = subject.args, subject.base.config.positions
        rendered = [_render(subject.style, row) for row in rows]
        text = _encode_text(subject, rendered) if "loss" in args.metrics else None
        generates = bool({"exact_match", "rouge"} & set(args.metrics))
        prompts = _encode_prompts(subject, [each[-1].last_prompt for each in rendered]) if generates else []
        choices = [_encode(subject, [_last(_render(subject.style, r.answered(c))) for r in rows]) for c in args.choices]
        _check_lengths(
            rows,
            [[len(ids) + 1 for ids in prompts], *((np.diff(each.offsets) - 1).tolist() for each in choices)],
            positions,
        )
        for tokens in filter(None, (text, *choices)):
            subject.base.config.check_ids("the data", tokens.max_id())
        return cls(subject, text, prompts, choices)


@dataclass(frozen=True)
class Comparison:
    """The rows, and the models that are measured on them: one, or a second as its baseline."""

    rows: list[Row]
    task: Task
    baseline: Task | None

    @classmethod
    def read(cls, args: EvaluateArgs) -> Self:
        """Read rows and models, or refuse what does not fit; no weights are read."""
        if "rouge" in args.metrics:
            require_rouge()
        if args.out_file is not None:
            check_writable(args.out_file.parent, "--out_file")
        path = find_rows(args)
        rows = [Row(location, example) for location, example in read_located_examples(path)]
        if set(args.metrics) != {"loss"}:
            _check_answers(rows, args)
        subject = Subject.find(args, path)
        baseline = None if args.baseline is None else find_baseline(subject, args.baseline, path)
        task = Task.encode(subject, rows)
        other = None if baseline is None else Task.encode(baseline, rows)
        if other is not None:
            _require_same_tokens(task, other, rows)
        return cls(rows, task, other)


def find_rows(args: EvaluateArgs) -> Path:
    """Return the file of rows that the arguments name."""
    assert args.data_dir is not None  # or the arguments would have been refused
    if not args.data_dir.is_file():
        return args.data_dir / f"{args.split}.jsonl"
    if args.data_dir.suffix != ".jsonl":
        command = f"litlora prepare_json --source {args.data_dir} --destination_path FOLDER"
        raise LitLoraError(
            f"--data_dir ({args.data_dir}) must be a folder or a .jsonl file; prepare one with: {command}"
        )
    return args.data_dir


def find_baseline(subject: Subject, folder: Path, rows: Path) -> Subject:
    """Find the model of --baseline, which has the prompts of the other one if it has none of its own."""
    base_dir = subject.args.base_dir if is_adapter(folder) else None
    args = replace(subject.args, checkpoint_dir=folder, base_dir=base_dir, adapters=(), adapter_weights=())
    return Subject.find(args, rows, subject.settings)


def _require_same_tokens(task: Task, baseline: Task, rows: Sequence[Row]) -> None:
    """Refuse a baseline that has other tokens in a row: their losses cannot be compared. Other tokens do not matter."""
    own, other = (_tokens_by_row(each, len(rows)) for each in (task, baseline))
    differing = [row for row, *tokens in zip(rows, own, other, strict=True) if tokens[0] != tokens[1]]
    if differing:
        fault = (
            f"--baseline ({baseline.subject.args.checkpoint_dir}) has other tokens in {len(differing):,} of the rows"
        )
        hint = "compare it by exact_match, rouge or accuracy, without loss"
        raise LitLoraError(f"{fault}, the first at {differing[0].location}, so that losses differ in meaning: {hint}")


def _tokens_by_row(task: Task, rows: int) -> list[list[bytes]]:
    """Return the tokens and labels of each row's sequences, as far as the loss reads them."""
    found: list[list[bytes]] = [[] for _ in range(rows)]
    if task.text is not None:
        ids, offsets = task.text.ids, task.text.offsets
        for line, start, end in zip(task.text.about["line"], offsets, offsets[1:], strict=False):
            found[line - 1].append(ids[start : min(end, start + task.subject.limit + 1)].tobytes())
    return found


def _check_answers(rows: Sequence[Row], args: EvaluateArgs) -> None:
    """Refuse a row without an answer, or with one that is not among the choices."""
    choices = {choice.strip() for choice in args.choices}
    for row in rows:
        if not (row.example.messages and row.example.messages[-1].is_supervised and row.answer.strip()):
            hint = "leave it out, or measure --metrics loss alone"
            raise LitLoraError(f"{row.location}: it does not end with a response to compare with: {hint}")
        if choices and row.answer.strip() not in choices:
            fault = f"its answer {row.answer.strip()[:60]!r} is not among --choices ({','.join(args.choices)})"
            raise LitLoraError(f"{row.location}: {fault}: add it, or leave the row out")


def _render(style: PromptStyle, row: Row) -> list[Rendered]:
    try:
        return style.render(row.example)
    except LitLoraError as error:
        raise LitLoraError(f"{row.location}: {error}") from error


def _last(sequences: Sequence[Rendered]) -> list[Rendered]:
    """Return the sequence of the last response, in which nothing else is supervised."""
    return [replace(sequences[-1], supervised=sequences[-1].supervised[-1:])]


def _encode(subject: Subject, rendered: Sequence[Sequence[Rendered]]) -> Tokens:
    """Tokenize the sequences of rows, whose lines in the result count the rows from 1."""
    sequences = [RenderedRow(each, line) for line, row in enumerate(rendered, start=1) for each in row]
    return encode_rows(sequences, subject.tokenizer, subject.style, mask_prompt=True)


def _encode_text(subject: Subject, rendered: Sequence[Sequence[Rendered]]) -> Tokens:
    """Tokenize rows for the loss; LitLoraError if the cut to --max_seq_length leaves none with a response."""
    tokens = _encode(subject, rendered)
    if not (tokens.first_labels < np.minimum(np.diff(tokens.offsets) - 1, subject.limit)).any():
        raise LitLoraError(f"no row has a response within --max_seq_length ({subject.limit}): raise it")
    return tokens


def _encode_prompts(subject: Subject, prompts: Sequence[Rendered]) -> list[list[int]]:
    encodings = subject.tokenizer.encode_rendered(prompts, subject.style.add_special_tokens)
    return [ids.tolist() for ids in encodings.by_text(encodings.ids)]


def _check_lengths(rows: Sequence[Row], lengths: Sequence[Sequence[int]], positions: int) -> None:
    """Refuse a row that leaves no position for its answer."""
    for kind in lengths:
        for row, length in zip(rows, kind, strict=False):
            if length > positions:
                fault = f"its prompt and answer need {length} positions, and the checkpoint has {positions}"
                raise LitLoraError(f"{row.location}: {fault}: shorten it, or leave it out")
