"""Imports only go down: a module imports modules of the lines above its own, never one beside it."""

import ast
from pathlib import Path

import litlora

PACKAGE = Path(litlora.__file__).parent
LAYERS = """
    errors
    args config dropout files heap lanes layout limits linear rows stopping
    kernels launching pages quantize
    attention examples hub locking loss lora manifest optimizers state watching
    model preparing prompts ranks
    checkpoint footprint sampling tokenizer
    adapter resuming sharding
    records tokenized
    batches
    training
    fisher memory
    commands
    flags
    __main__
"""
RANKS = {name: rank for rank, line in enumerate(LAYERS.strip().splitlines()) for name in line.split()}
TREES = {path.relative_to(PACKAGE): ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")}


def imports(tree: ast.AST) -> set[str]:
    """Return the modules that a tree imports, by their full names."""
    froms = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert not any(node.level for node in froms), "relative imports hide where they go"
    packages = {f"{node.module}.{alias.name}" if node.module == "litlora" else str(node.module)
                for node in froms for alias in node.names}  # fmt: skip
    return packages | {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}


def test_imports_only_go_down():
    for path, tree in TREES.items():
        own = path.parts[0].removesuffix(".py")
        below = {name for name, rank in RANKS.items() if rank < RANKS.get(own, 0)} | {"__version__"}
        upward = {name.split(".")[1] for name in imports(tree) if name.startswith("litlora.")} - below
        assert not upward, f"{path} imports {upward}"


def test_every_module_has_its_layer():
    assert {path.parts[0].removesuffix(".py") for path in TREES} - {"__init__"} == set(RANKS)


def test_the_package_needs_neither_scripts_nor_tests():
    assert not {name.split(".")[0] for tree in TREES.values() for name in imports(tree)} & {"scripts", "tests"}


def test_nothing_is_imported_late_but_torch_where_a_row_is_to_be_named_before_it_is_there():
    late = {(str(path), function.name, name) for path, tree in TREES.items() for function in ast.walk(tree)
            if isinstance(function, ast.FunctionDef) for name in imports(function)}  # fmt: skip
    assert late == {("examples.py", "split", "torch"), ("examples.py", "split", "torch.utils.data")}
