"""Names of optimizers, checked without importing torch."""

import ast
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from litlora.errors import LitLoraError

# Those of bitsandbytes that go by their name alone, and whether their state moves to main memory when a GPU is full.
PAGED = {"AdamW8bit": False, "PagedAdamW": True, "PagedAdamW8bit": True}
TORCH = ("", "torch.optim")  # modules of torch's optimizers, the first for a name alone

# Of torch's optimizers, those that cannot train an adapter, and why, as one step of them would say.
UNSUITABLE = {
    "LBFGS": "evaluates the loss several times a step, which is not supported",
    "SparseAdam": "cannot take a step: SparseAdam does not support dense gradients, please consider Adam instead",
}


def class_path_of(optimizer: str | dict[str, Any]) -> str:
    """Return the name or class path that --optimizer has."""
    given: dict[str, Any] = {"class_path": optimizer} if isinstance(optimizer, str) else optimizer
    if given.keys() == {"init_args"}:
        raise LitLoraError("--optimizer has init_args only: give its class_path as well, such as torch.optim.AdamW")
    class_path = given.get("class_path")
    if not isinstance(class_path, str) or given.keys() - {"class_path", "init_args"}:
        raise LitLoraError(f"--optimizer ({optimizer}) must be a name, or class_path and init_args")
    return class_path


def check_name(optimizer: str | dict[str, Any]) -> None:
    """Refuse a name that torch.optim does not have or that cannot train, or a package that is not installed."""
    class_path = class_path_of(optimizer)
    module, _, name = class_path.rpartition(".")
    package = module.partition(".")[0]
    if class_path not in PAGED and module in TORCH and name not in (names := torch_names()) and names:
        raise no_optimizer(class_path)
    if module in TORCH and name in UNSUITABLE:
        raise LitLoraError(f"--optimizer {class_path} {UNSUITABLE[name]}")
    if package and find_spec(package) is None:
        raise LitLoraError(f"--optimizer {class_path} cannot be imported: No module named {package!r}")


def torch_names() -> set[str]:
    """Return the names that torch.optim imports, read from its source; none where that is not there."""
    torch = find_spec("torch")
    path = Path(torch.origin or "").with_name("optim") / "__init__.py" if torch else Path()
    if not path.is_file():
        return set()
    froms = [node for node in ast.parse(path.read_bytes()).body if isinstance(node, ast.ImportFrom)]
    return {alias.asname or alias.name for node in froms for alias in node.names}


def no_optimizer(class_path: str) -> LitLoraError:
    """Return the error of a name that is no optimizer, with the one that was probably meant."""
    by_lower = {name.lower(): name for name in [*torch_names(), *PAGED]}
    near = get_close_matches(class_path.rpartition(".")[2].lower().replace("_", ""), sorted(by_lower), n=1)
    hint = f": did you mean {by_lower[near[0]]}?" if near else ": name one, such as AdamW or torch.optim.SGD"
    return LitLoraError(f"--optimizer {class_path} is not a torch optimizer{hint}")
