"""Data sets on the Hub: which files hold a split, and fetching them."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from huggingface_hub import constants
from huggingface_hub.errors import RevisionNotFoundError

from litlora.errors import LitLoraError
from litlora.hub.client import Repo, check_commit, refusing_malformed, reporting_errors, with_retries
from litlora.utils.console import log
from litlora.utils.resource_limits import limited_file_size

SPLITS = ("train", "test", "validation", "valid", "val", "dev", "eval")
METADATA = re.compile(r"(dataset_infos?|dataset_dict|state|package|config|croissant)\.json$", re.ASCII)
CONVERTED = "refs/convert/parquet"  # branch of the files that the Hub has converted
DEPTH = 3  # parts of the path of such a file
SHOWN = 5  # file names in an error message
LONGEST_NAME = 1_000
SPARE = 10_000_000  # bytes that huggingface_hub may write of its own


def fetch_dataset(
    repo_id: str, split: str, subset: str | None, suffixes: Sequence[str], token: str | None
) -> dict[str, Path]:
    """Fetch the files of a split into huggingface_hub's cache, unless they are there; return them by name."""
    repo = Repo(repo_id, "dataset", "main", token)
    with reporting_errors(repo, Path(constants.HF_HUB_CACHE), "HF_HOME"):
        listing = _request(repo)
        readable = [name for name in listing.sizes if name.lower().endswith(tuple(suffixes))]
        readable = [name for name in readable if not METADATA.search(name)]
        with refusing_malformed(repo):
            patterns = _patterns(listing.configs, split, subset, repo)
        chosen = _matching(readable, patterns) if patterns is not None else _by_name(readable, split, subset, suffixes)
        if not chosen:
            listing, chosen = _converted(repo, split, subset) or (listing, [])
        if not chosen:
            raise LitLoraError(_without_split(repo, split, subset, readable, list(listing.sizes)))
        log(f"reading {', '.join(chosen[:SHOWN])}{', ...' if len(chosen) > SHOWN else ''} of {repo}")
        return {name: _fetch(repo, name, listing) for name in chosen}


class Listing(NamedTuple):
    """What a data set's repository has at one commit."""

    commit: str
    configs: Any
    """What its card says of its files."""
    sizes: Mapping[str, int]
    """Its files, in bytes."""


def _request(repo: Repo) -> Listing:
    """Request the files of a data set; those with a name that a path cannot have are left alone."""
    with refusing_malformed(repo):
        timeout = constants.HF_HUB_ETAG_TIMEOUT
        info = with_retries(
            lambda: repo.api.dataset_info(repo.id, revision=repo.revision, files_metadata=True, timeout=timeout)
        )
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or () if _is_path(file.rfilename)}
        if not all(isinstance(size, int) and 0 <= size < 2**62 for size in sizes.values()):
            raise ValueError("the size of a file is a number")
        check_commit(info.sha)
        return Listing(str(info.sha), info.card_data and info.card_data.get("configs"), sizes)


def _is_path(name: str) -> bool:
    """Tell whether a name is that of a file below a folder, and nothing that acts elsewhere."""
    return name.isprintable() and len(name) < LONGEST_NAME and not {"", ".", ".."} & set(re.split(r"[/\\]", name))


def _fetch(repo: Repo, name: str, listing: Listing) -> Path:
    """Fetch a file, but no more of it than is listed."""
    with limited_file_size(listing.sizes[name] + SPARE):
        path = repo.api.hf_hub_download(repo.id, name, repo_type="dataset", revision=listing.commit)
    return Path(path)


def _converted(repo: Repo, split: str, subset: str | None) -> tuple[Listing, list[str]] | None:
    """Return the files of a split that the Hub has converted to Parquet, if it has.

    It converts data sets of any format, also those that only a program in their repository reads, into files such as
    SUBSET/train/0000.parquet. A split of which it converts only the first part has a name such as partial-train.
    """
    try:
        listing = _request(replace(repo, revision=CONVERTED))
    except RevisionNotFoundError:
        return None
    paths = [
        path for path in map(PurePosixPath, listing.sizes) if path.suffix == ".parquet" and len(path.parts) == DEPTH
    ]
    subset = subset or _only_subset(repo, [path.parts[0] for path in paths])
    whole, part = (
        [str(path) for path in paths if path.parts[:2] == (subset, name)] for name in (split, f"partial-{split}")
    )
    if whole or part:
        log(f"{repo}: reading the Hub's conversion to Parquet{'' if whole else ', which has only a part of the split'}")
    return listing, whole or part


def _only_subset(repo: Repo, subsets: Sequence[str]) -> str:
    """Return the subset that is meant if none is named."""
    names = list(dict.fromkeys(subsets))
    if len(names) > 1 and "default" not in names:
        raise LitLoraError(f"{repo} has several subsets: choose one with --subset, among {', '.join(names)}")
    return "default" if "default" in names else "".join(names)


def _without_split(repo: Repo, split: str, subset: str | None, readable: Sequence[str], names: Sequence[str]) -> str:
    what = f"no split {split}" + (f" of a subset {subset}" if subset else "")
    files = ", ".join((readable or names)[:SHOWN]) or "none"
    hint = "choose with --split and --subset, or download a file and give its path"
    return f"{repo} has {what} in a format that litlora reads (its files: {files}): {hint}"


def _patterns(configs: Any, split: str, subset: str | None, repo: Repo) -> list[str] | None:
    """Return the patterns of file names that the data set's card gives for a split; None if it has none."""
    named = {str(config.get("config_name")): config for config in configs or () if isinstance(config, dict)}
    with_files = {name: config for name, config in named.items() if config.get("data_files")}
    if not with_files:
        return None
    default = next((name for name, config in with_files.items() if config.get("default")), None)
    only = next(iter(with_files)) if len(with_files) == 1 else None
    name = subset or default or ("default" if "default" in with_files else only)
    if name not in with_files:
        fault = f"has no subset {subset}" if subset else "has several subsets"
        raise LitLoraError(f"{repo} {fault}: choose one with --subset, among {', '.join(with_files)}")
    return _patterns_of(with_files[name], split)


def _patterns_of(config: Mapping[str, Any], split: str) -> list[str]:
    """Return the patterns of a split; files without one are those of train."""
    folder = PurePosixPath(config.get("data_dir") or "")
    files = config["data_files"]
    entries = files if isinstance(files, list) else [files]
    paths: list[Any] = []
    for entry in entries:
        is_mapping = isinstance(entry, dict)
        if (entry.get("split") if is_mapping else "train") == split:
            path = entry.get("path") if is_mapping else entry
            paths += path if isinstance(path, list) else [path]
    return [str(folder / str(path)) for path in paths]


def _matching(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    return [name for name in names if any(fnmatch(name, pattern) for pattern in patterns)]


def _by_name(names: Sequence[str], split: str, subset: str | None, suffixes: Sequence[str]) -> list[str]:
    """Return the files whose path names the split; for train, else those whose path names no split."""
    of_subset = [name for name in names if subset is None or subset in PurePosixPath(name).parts[:-1]]
    chosen = [name for name in of_subset if _names(name, split)]
    if not chosen and split == "train":
        chosen = [name for name in of_subset if not any(_names(name, other) for other in SPLITS)]
    formats = [next(suffix for suffix in suffixes if name.lower().endswith(suffix)) for name in chosen]
    most = max(formats, key=formats.count, default="")  # not the same rows in two formats
    return [name for name, each in zip(chosen, formats, strict=True) if each == most]


def _names(path: str, split: str) -> bool:
    return re.search(rf"(?<![a-z0-9]){re.escape(split)}(?![a-z])", path.lower()) is not None
