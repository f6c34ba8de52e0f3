"""From sources to a prepared data set: the steps that the prepare commands share."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np

from litlora.args.data import PrepareArgs
from litlora.data.checks.rows import RowFindings
from litlora.data.dataset import Invalid, check_destination, require_rows, split, write_dataset
from litlora.data.duplicates import Fingerprints, Rows, keep_groups_together, repeated, without_repeats
from litlora.data.readers.parsers import RowError, parse_rows
from litlora.data.readers.row_formats import RowFormat
from litlora.data.readers.row_store import RowStore, Selection
from litlora.data.readers.sources import Source, local_path, mix, open_source, split_weight
from litlora.data.row_sources import about_sources
from litlora.errors import LitLoraError
from litlora.utils.console import log

NO_ROWS: Rows = np.zeros(0, np.int64)


def check_paths(args: PrepareArgs) -> None:
    """Refuse a destination with the sources, or with files of another origin, which would be overwritten."""
    sources = [split_weight(source)[0] for source in args.sources]
    paths = [local_path(source) for source in (*sources, *args.val_sources)]
    check_destination(args.destination_path, [path for path in paths if path is not None])


def prepare(args: PrepareArgs, row_format: RowFormat) -> None:
    """Read and check every row of the sources, split them, and only then write them."""
    check_paths(args)
    with ExitStack() as fetched, RowStore(args.destination_path) as rows:
        sources = [open_source(source, args, fetched) for source in args.sources]
        val_sources = [open_source(source, args, fetched, "--val_source") for source in args.val_sources]
        reader = SourceReader(rows, row_format)
        spans = [reader.read(source) for source in sources]
        val = np.concatenate([NO_ROWS, *(reader.read(source) for source in val_sources)])
        rows.complete()
        for finding in reader.findings:
            log(finding.sentence)
        if args.deduplicate:
            spans, val = _deduplicate(spans, val, reader.fingerprints)
        train = np.concatenate([NO_ROWS, *_mixture(sources, spans, args.seed)])
        if not val_sources:
            train, val = _split(train, args, reader.fingerprints)
        _report_leaks(train, val, reader.fingerprints)
        about_val = about_sources([reader.source_of(index) for index in val], Selection(rows, val))
        origin = _origin(args, sources, val_sources) | about_val
        _write(args, Selection(rows, train), Selection(rows, val), origin)


@dataclass
class SourceReader:
    """Reads sources into a store, and gathers what the checks look at."""

    rows: RowStore
    format: RowFormat
    findings: RowFindings = field(default_factory=RowFindings)
    fingerprints: Fingerprints = field(default_factory=Fingerprints)
    _starts: list[int] = field(default_factory=list)
    _names: list[str] = field(default_factory=list)

    def read(self, source: Source) -> Rows:
        """Store the rows of a source; LitLoraError if any is invalid. Return their indices."""
        start, invalid = len(self.rows), Invalid()
        self._starts.append(start)
        self._names.append(source.name)
        for file in source.files:
            for location, row in parse_rows(file):
                try:
                    parsed = self.format.parse(row)
                except RowError as error:
                    invalid.add(location, error)
                    continue
                self.rows.append(parsed.example)
                self.fingerprints.append(parsed.example)
                self.findings.add(location, parsed)
        name = source.files[0].name if len(source.files) == 1 else source.name
        require_rows(name, len(self.rows) - start, invalid, self.format)
        return np.arange(start, len(self.rows))

    def source_of(self, index: int) -> str:
        """Return the name of the source of a row."""
        return self._names[bisect_right(self._starts, index) - 1]


def _deduplicate(spans: Sequence[Rows], val: Rows, prints: Fingerprints) -> tuple[list[Rows], Rows]:
    """Leave out exact duplicates, and training rows that are near duplicates of one's own validation rows."""
    own = np.concatenate(spans)
    val_kept = without_repeats(val, prints.exact)
    kept = without_repeats(own, prints.exact)
    kept = kept[~repeated(kept, prints.near, among=val_kept)]
    if removed := len(own) + len(val) - len(kept) - len(val_kept):
        log(f"{removed:,} rows are left out, since they repeat another")
    return [span[np.isin(span, kept)] for span in spans], val_kept


def _split(rows: Rows, args: PrepareArgs, prints: Fingerprints) -> tuple[Rows, Rows]:
    train, val = (rows[positions] for positions in split(len(rows), args.val_split_fraction, args.seed))
    if not args.deduplicate:
        return train, val
    train, val = keep_groups_together(train, val, prints.near)
    if not len(val):
        raise LitLoraError("--deduplicate leaves no row for validation: the rows differ in case and punctuation only")
    return train, val


def _report_leaks(train: Rows, val: Rows, prints: Fingerprints) -> None:
    """Report validation rows that are training rows as well."""
    exact, near = (repeated(val, hashes, among=train) for hashes in (prints.exact, prints.near))
    if count := int(near.sum()):
        similar = count - int(exact.sum())
        first = f"the first in line {near.argmax() + 1} of val.jsonl"
        others = f" ({similar:,} of them up to case and punctuation)" if similar else ""
        leaks = f"{count:,} of {len(val):,} validation rows are training rows as well{others}, {first}"
        log(f"{leaks}: the validation loss will be too good; --deduplicate true separates them")


def _mixture(sources: Sequence[Source], spans: Sequence[Rows], seed: int) -> Iterator[Rows]:
    """Yield the rows of each source, or its share of a mixture by their weights."""
    chosen = mix([len(span) for span in spans], [source.weight for source in sources], seed)
    for source, span, positions in zip(sources, spans, chosen, strict=True):
        if source.weight is not None:
            log(f"{len(positions):,} of {len(span):,} rows of {source.name}, by its weight of {source.weight:g}")
        yield span[positions]


def _origin(args: PrepareArgs, sources: Sequence[Source], val_sources: Sequence[Source]) -> dict[str, object]:
    """Return what dataset.json states of the sources and of the split."""
    facts = [_facts(source) for source in sources]
    origin = facts[0] if len(facts) == 1 else {"sources": facts}
    if val_sources:
        return origin | {"val_sources": [_facts(source) for source in val_sources], "seed": args.seed}
    return origin | {"val_split_fraction": args.val_split_fraction, "seed": args.seed}


def _facts(source: Source) -> dict[str, object]:
    facts: dict[str, object] = {"source": source.name, "sha256": source.sha256()}
    return facts if source.weight is None else facts | {"weight": source.weight}


def _write(args: PrepareArgs, train: Selection, val: Selection, origin: dict[str, object]) -> None:
    write_dataset(args.destination_path, train, val, origin)
    log(f"{len(train):,} training and {len(val):,} validation examples in {args.destination_path}")
