"""Prepare a file of your own for fine-tuning."""

from litlora.args.data import PrepareJsonArgs
from litlora.data.prepare import prepare
from litlora.data.readers.row_formats import ANY, with_columns


def prepare_json(args: PrepareJsonArgs) -> None:
    """Turn a file of any known row format into a prepared data set."""
    columns = args.column_names()
    prepare(args, with_columns(columns) if columns else ANY)
