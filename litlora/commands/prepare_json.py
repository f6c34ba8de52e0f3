"""Prepare a .json, .jsonl or .csv file for fine-tuning."""

from litlora.args import PrepareJsonArgs
from litlora.data.prepare import fetch, prepare
from litlora.data.row_formats import ANY


def prepare_json(args: PrepareJsonArgs) -> None:
    """Turn a file of any known row format into a prepared data set."""
    prepare(args, fetch(args.source), ANY)
