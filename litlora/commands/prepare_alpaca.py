"""Prepare the cleaned Alpaca archive for fine-tuning."""

from litlora.args import PrepareAlpacaArgs
from litlora.data.examples import ALPACA
from litlora.data.prepare import fetch, prepare


def prepare_alpaca(args: PrepareAlpacaArgs) -> None:
    """Turn a file with Alpaca's keys into a prepared data set."""
    prepare(args, fetch(args.source), ALPACA)
