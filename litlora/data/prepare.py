"""From sources to a prepared data set: the steps that the prepare commands share."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from litlora.args import PrepareArgs
from litlora.data.checks import LocatedRow, run_checks
from litlora.data.dataset import check_destination, require_rows, split, write_dataset
from litlora.data.readers import RowError, parse_rows
from litlora.data.row_formats import RowFormat
from litlora.data.row_store import RowStore, Selection
from litlora.data.sources import Source, local_path, mix, open_source, split_weight
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
        spans = [reader.read(source) for source in sources]
        val = [index for source in val_sources for index in reader.read(source)]
        for finding in run_checks(reader.flagged):
            log(str(finding))
        train = list(_mixture(sources, spans, args.seed))
        if not val_sources:
            train, val = split(train, args.val_split_fraction, args.seed)
        _write(args, Selection(rows, train), Selection(rows, val), _origin(args, sources, val_sources))


@dataclass
class SourceReader:
    """Reads sources into a store, and gathers what the checks look at."""

    rows: RowStore
    format: RowFormat
    flagged: list[LocatedRow] = field(default_factory=list)

    def read(self, source: Source) -> range:
        """Store the rows of a source; LitLoraError if any is invalid. Return their indices."""
        start, invalid = len(self.rows), []
        for file in source.files:
            for location, row in parse_rows(file):
                try:
                    parsed = self.format.parse(row)
                except RowError as error:
                    invalid.append(f"{location}: {error}")
                    continue
                self.rows.append(parsed.example)
                if run_checks([(location, parsed)]):
                    self.flagged.append((location, parsed))
        name = source.files[0].name if len(source.files) == 1 else source.name
        require_rows(name, len(self.rows) - start, invalid, self.format)
        return range(start, len(self.rows))


def _mixture(sources: Sequence[Source], spans: Sequence[range], seed: int) -> Iterator[int]:
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
