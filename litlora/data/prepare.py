"""From sources to a prepared data set: the steps that the prepare commands share."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from litlora.args.data import PrepareArgs
from litlora.data.checks import RowFindings
from litlora.data.dataset import check_destination, require_rows, split, write_dataset
from litlora.data.duplicates import Fingerprints, keep_groups_together, repeated, without_repeats
from litlora.data.readers import RowError, parse_rows
from litlora.data.row_formats import RowFormat
from litlora.data.row_sources import about_sources
from litlora.data.row_store import RowStore, Selection
from litlora.data.sources import Source, local_path, mix, open_source, split_weight
from litlora.errors import LitLoraError
from litlora.utils.console import log


def check_paths(args: PrepareArgs) -> None:
    """Refuse a destination with the sources, or with files of another origin, which would be overwritten."""
    sources = [split_weight(source)[0] for source in args.sources]
    paths = [local_path(source) for source in (*sources, *args.val_sources)]
    check_destination(args.destination_path, [path for path in paths if path is not None])


def prepare(args: PrepareArgs, row_format: RowFormat) -> None:
    """Read and check every row of the sources, split them, and only then write them."""
    check_paths(args)
    sources = [open_source(source, args) for source in args.sources]
    val_sources = [open_source(source, args, "--val_source") for source in args.val_sources]
    with RowStore() as rows:
        reader = SourceReader(rows, row_format)
        spans: list[Sequence[int]] = [reader.read(source) for source in sources]
        val = [index for source in val_sources for index in reader.read(source)]
        for finding in reader.findings:
            log(finding.sentence)
        if args.deduplicate:
            spans, val = _deduplicate(spans, val, reader.fingerprints)
        train = list(_mixture(sources, spans, args.seed))
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

    def read(self, source: Source) -> range:
        """Store the rows of a source; LitLoraError if any is invalid. Return their indices."""
        start, invalid = len(self.rows), []
        self._starts.append(start)
        self._names.append(source.name)
        for file in source.files:
            for location, row in parse_rows(file):
                try:
                    parsed = self.format.parse(row)
                except RowError as error:
                    invalid.append(f"{location}: {error}")
                    continue
                self.rows.append(parsed.example)
                self.fingerprints.append(parsed.example)
                self.findings.add(location, parsed)
        name = source.files[0].name if len(source.files) == 1 else source.name
        require_rows(name, len(self.rows) - start, invalid, self.format)
        return range(start, len(self.rows))

    def source_of(self, index: int) -> str:
        """Return the name of the source of a row."""
        return self._names[bisect_right(self._starts, index) - 1]


def _deduplicate(
    spans: Sequence[Sequence[int]], val: Sequence[int], prints: Fingerprints
) -> tuple[list[Sequence[int]], list[int]]:
    """Leave out exact duplicates, and training rows that are near duplicates of one's own validation rows."""
    val_kept = without_repeats(val, prints.exact)
    own = [index for span in spans for index in span]
    leaked = {own[position] for position in repeated(own, prints.near, among=val_kept)}
    kept = {index for index in without_repeats(own, prints.exact) if index not in leaked}
    if removed := len(own) + len(val) - len(kept) - len(val_kept):
        log(f"{removed:,} rows are left out, since they repeat another")
    return [[index for index in span if index in kept] for span in spans], val_kept


def _split(indices: list[int], args: PrepareArgs, prints: Fingerprints) -> tuple[list[int], list[int]]:
    train, val = split(indices, args.val_split_fraction, args.seed)
    if not args.deduplicate:
        return train, val
    train, val = keep_groups_together(train, val, prints.near)
    if not val:
        raise LitLoraError("--deduplicate leaves no row for validation: the rows differ in case and punctuation only")
    return train, val


def _report_leaks(train: Sequence[int], val: Sequence[int], prints: Fingerprints) -> None:
    """Report validation rows that are training rows as well."""
    exact, near = (repeated(val, hashes, among=train) for hashes in (prints.exact, prints.near))
    if near:
        first = f"the first in line {near[0] + 1} of val.jsonl"
        others = f" ({len(near) - len(exact):,} of them up to case and punctuation)" if len(near) > len(exact) else ""
        leaks = f"{len(near):,} of {len(val):,} validation rows are training rows as well{others}, {first}"
        log(f"{leaks}: the validation loss will be too good; --deduplicate true separates them")


def _mixture(sources: Sequence[Source], spans: Sequence[Sequence[int]], seed: int) -> Iterator[int]:
    """Yield the rows of all sources, or of a mixture by their weights."""
    chosen = mix([len(span) for span in spans], [source.weight for source in sources], seed)
    for source, span, indices in zip(sources, spans, chosen, strict=True):
        if source.weight is not None:
            log(f"{len(indices):,} of {len(span):,} rows of {source.name}, by its weight of {source.weight:g}")
        yield from (span[index] for index in indices)


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
