"""Imports point downwards: a package imports packages of the lines below its own, never one beside or above it."""

import ast
from pathlib import Path

import litlora

PACKAGE = Path(litlora.__file__).parent
# The root modules count as packages of one module. A sweep reads the command line of each trial with cli.
ORDER = """
    __main__
    commands
    sweep
    cli train
    evaluation export report
    distributed generation
    lora
    data models
    hub
    nn
    cpu utils args
    errors torch_private
"""
LEVELS = {name: -level for level, line in enumerate(ORDER.strip().splitlines()) for name in line.split()}
TREES = {path.relative_to(PACKAGE): ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")}


def imports(tree: ast.AST) -> set[str]:
    """Return the modules that a tree imports, by their full names."""
    froms = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert not any(node.level for node in froms), "relative imports hide where they go"
    packages = {f"{node.module}.{alias.name}" if node.module == "litlora" else str(node.module)
                for node in froms for alias in node.names}  # fmt: skip
    return packages | {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}


def test_imports_point_downwards():
    for path, tree in TREES.items():
        own = path.parts[0].removesuffix(".py")
        allowed = {name for name, level in LEVELS.items() if level < LEVELS.get(own, 1)} | {own, "__version__"}
        upward = {name for name in imports(tree) if name.startswith("litlora.") and name.split(".")[1] not in allowed}
        assert not upward, f"{path} imports {upward}"


def test_modules_of_a_package_have_no_cycles():
    graph = {
        f"litlora.{path.with_suffix('').as_posix().replace('/', '.')}": imports(tree) for path, tree in TREES.items()
    }
    while leaves := {module for module, targets in graph.items() if not targets & graph.keys()}:
        graph = {module: targets for module, targets in graph.items() if module not in leaves}
    assert not graph, f"these modules import each other: {sorted(graph)}"


def test_every_package_says_what_belongs_in_it():
    for path, tree in TREES.items():
        assert ast.get_docstring(tree), f"{path} has no docstring"


def test_the_package_needs_neither_scripts_nor_tests():
    assert not {name.split(".")[0] for tree in TREES.values() for name in imports(tree)} & {"scripts", "tests"}


def test_late_imports_have_a_reason():
    """Everything is imported at the top, except for extras, and torch's compiler and sharding, which take a second."""
    late = {(str(path), function.name, name) for path, tree in TREES.items() for function in ast.walk(tree)
            if isinstance(function, ast.FunctionDef) for name in imports(function)}  # fmt: skip
    assert late == {("data/readers/parsers.py", "_parquet_rows", "pyarrow"),
                    ("torch_private.py", "inductor_cache", "torch._inductor.runtime.cache_dir_utils"),
                    ("lora/pissa.py", "copy_whole", "torch.distributed.tensor"),
                    ("commands/chat.py", "chat", "prompt_toolkit"),
                    ("models/checkpoint.py", "open_weights", "litlora.models.gguf"),
                    ("models/gguf/rebuilt/folder.py", "_checked_config", "litlora.models.gguf"),
                        ("models/gguf/rebuilt/sentencepiece_model.py", "_serialized",
                         "sentencepiece.sentencepiece_model_pb2"),
                    ("evaluation/metrics.py", "rouge", "rouge_score.rouge_scorer"),
                    ("evaluation/tasks.py", "find_tasks", "lm_eval.tasks"),
                    ("commands/evaluate.py", "evaluate_tasks", "litlora.evaluation.lm_eval_model"),
                    ("commands/sweep.py", "train_and_compare", "litlora.sweep")}  # fmt: skip


def test_only_the_backend_knows_the_device():
    """Outside nn/, cpu/ and the launcher nothing imports cpu/ or tells devices apart."""
    allowed = {path for path in TREES if path.parts[0] in ("nn", "cpu") or path == Path("distributed/launcher.py")}
    for path in TREES.keys() - allowed:
        source = (PACKAGE / path).read_text(encoding="utf-8")
        assert not [name for name in imports(TREES[path]) if name.startswith("litlora.cpu")], path
        assert ".is_cuda" not in source, path
        assert "device.type" not in source, path
