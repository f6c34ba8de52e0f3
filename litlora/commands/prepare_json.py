"""Prepare a .json, .jsonl or .csv file for fine-tuning."""

from litlora.args import PrepareJsonArgs
from litlora.data.examples import ANY
from litlora.data.prepare import fetch, prepare


def prepare_json(args: PrepareJsonArgs) -> None:
    """Turn a file of any known row format into a prepared data set."""
    prepare(args, fetch(args.source), ANY)
