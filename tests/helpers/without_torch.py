"""Runs command lines in a process in which torch cannot be imported; prints exit code and stderr of each as JSON."""

import contextlib
import importlib.abc
import importlib.machinery
import io
import json
import sys


class TorchImportedError(Exception):
    pass


class NoTorch(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds torch, but refuses to run it."""

    def find_spec(self, name, path=None, target=None):
        spec = importlib.machinery.PathFinder.find_spec(name, path) if name == "torch" else None
        if spec is not None:
            spec.loader = self
        return spec

    def exec_module(self, module):
        raise TorchImportedError


sys.meta_path.insert(0, NoTorch())

from litlora.__main__ import main  # noqa: E402


def run(arguments: list[str]) -> list[object]:
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        try:
            code = main(arguments)
        except TorchImportedError:
            code = "torch"
    return [code, stderr.getvalue()]


if __name__ == "__main__":
    print(json.dumps([run(arguments) for arguments in json.load(sys.stdin)]))
