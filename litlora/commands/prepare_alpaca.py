"""Prepare the cleaned Alpaca archive for fine-tuning."""

from litlora.args.data import PrepareAlpacaArgs
from litlora.data.prepare import prepare
from litlora.data.readers.row_formats import ALPACA


def prepare_alpaca(args: PrepareAlpacaArgs) -> None:
    """Turn a file with Alpaca's keys into a prepared data set."""
    prepare(args, ALPACA)
