"""Models by their name on the Hugging Face hub, found in its cache on this machine or downloaded.

Called by model_folder.py for what is no model folder itself. The cache is read without any library:
models--org--name/refs/REVISION holds the name of a folder in models--org--name/snapshots. Downloads
go through huggingface_hub (extra "hf") into the same cache, and bring no file that can run code.
Source: https://huggingface.co/docs/huggingface_hub/guides/manage-cache
"""

from __future__ import annotations

import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tidaldecode.checkpoint.weight_files import has_weights
from tidaldecode.errors import ConfigError, show

_logger = logging.getLogger("tidaldecode")

DEFAULT_REVISION = "main"
_NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,95}"
_HUB_ID = re.compile(rf"({_NAME})/({_NAME})")
_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*")
_COMMIT = re.compile(r"[0-9A-Za-z]{1,64}")
_CACHE_FOLDER = re.compile(rf"models--({_NAME}?)--({_NAME})")

# Files of a model: settings, weights, tokenizer. No pickles, no Python.
_PATTERNS = (
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer*.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
    "additional_chat_templates/*.jinja",
    "tidal_plan.json",
)
# What a failed download means to a user, by the library's class of error or one of its bases.
_ADVICE = {
    "GatedRepoError": "its authors ask for consent: accept the terms on its page, then log in "
    "(hf auth login, or HF_TOKEN)",
    "RepositoryNotFoundError": "is the name right? a private model needs a login (hf auth login, "
    "or HF_TOKEN)",
    "RevisionNotFoundError": "the model has no such revision",
    "OfflineModeIsEnabled": "HF_HUB_OFFLINE is set",
    "LocalEntryNotFoundError": "there is no connection to the hub, or HF_HUB_OFFLINE is set",
    "ConnectionError": "there is no connection to the hub",
    "ConnectError": "there is no connection to the hub",
}


@dataclass(frozen=True)
class HubId:
    """A model on the hub."""

    repo: str  # "org/name"
    revision: str = DEFAULT_REVISION  # a branch, a tag or a commit

    def __str__(self) -> str:
        return self.repo if self.revision == DEFAULT_REVISION else f"{self.repo}@{self.revision}"


def split_revision(name: str) -> tuple[str, str | None]:
    """ "org/name@revision" as its two parts; None where no revision is named.

    Raises: ConfigError for a revision that cannot be one.
    """
    base, mark, revision = name.rpartition("@")
    if not mark:
        return name, None
    if not _REVISION.fullmatch(revision) or ".." in revision:
        raise ConfigError(
            f"revision: got {show(revision)}, expected the name of a branch, a tag or a commit"
        )
    return base, revision


def parse_hub_id(base: str, revision: str | None) -> HubId | None:
    """The hub id of a name; None for what cannot be one, a path."""
    if not _HUB_ID.fullmatch(base) or "--" in base or ".." in base:
        return None
    return HubId(base, revision or DEFAULT_REVISION)


def hub_cache_dir() -> Path:
    """Where the hub's library keeps models, by its own rules."""
    cache = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    if not cache:
        home = os.environ.get("HF_HOME")
        if not home:
            home = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
        cache = os.path.join(home, "hub")
    return Path(os.path.expanduser(os.path.expandvars(cache)))


def is_cache_folder(path: Path) -> bool:
    """Whether this is a models--org--name folder of a hub cache, not a model folder itself."""
    return os.path.isdir(path / "snapshots") and not os.path.lexists(path / "config.json")


def snapshot_in(path: Path, revision: str | None) -> Path:
    """The model folder in a models--org--name folder; without a revision main, or the only one.

    Raises: ConfigError if there is none, naming those that are there.
    """
    found = _find_snapshot(path, revision or DEFAULT_REVISION)
    if found is not None:
        return found
    try:
        commits = sorted(os.listdir(path / "snapshots"))
    except OSError as cause:
        raise ConfigError(f"{path}: cannot be listed: {cause.strerror}") from cause
    if revision is None and len(commits) == 1:
        return path / "snapshots" / commits[0]
    there = ", ".join(show(commit) for commit in commits[:5]) or "none"
    raise ConfigError(
        f"{path}: has no revision {show(revision or DEFAULT_REVISION)}; snapshots there: {there}"
    )


def find_model(model: HubId, needs_weights: bool) -> Path:
    """The folder of a model of the hub: from the cache if it is whole there, else downloaded.

    Args:
        model: what to find.
        needs_weights: else config.json is enough.

    Raises: ConfigError saying why there is none and what to do.
    """
    cache = hub_cache_dir()
    found = _find_snapshot(cache / f"models--{model.repo.replace('/', '--')}", model.revision)
    if found is not None and os.path.exists(found / "config.json"):
        if not needs_weights or has_weights(found):
            return found
    return _download(model, cache, "not" if found is None else "only in part")


def model_name(path: Path) -> str:
    """What a model folder is called: in a hub cache by its hub id, else by its own name."""
    match = _CACHE_FOLDER.fullmatch(path.parent.parent.name)
    if path.parent.name != "snapshots" or match is None:
        return path.name
    return "/".join(part for part in match.groups() if part)


def _find_snapshot(folder: Path, revision: str) -> Path | None:
    try:
        with open(folder / "refs" / revision, "rb") as file:
            commit = file.read(100).decode("ascii", "replace").strip()
    except (OSError, ValueError):
        commit = revision
    snapshot = folder / "snapshots" / commit
    return snapshot if _COMMIT.fullmatch(commit) and os.path.isdir(snapshot) else None


def _download(model: HubId, cache: Path, how_far: str) -> Path:
    there = f"{model}: no such folder, and {how_far} in the Hugging Face cache {cache}"
    option = "" if model.revision == DEFAULT_REVISION else f" --revision {model.revision}"
    by_hand = f"hf download {model.repo}{option} --local-dir {model.repo.split('/')[1]}"
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ConfigError(
            f"{there}; to download it: pip install 'tidaldecode[hf]', or {by_hand}"
        ) from None
    # The library shows its own progress.
    _logger.info("%s: %s in the Hugging Face cache; downloading to %s", model, how_far, cache)
    try:
        return Path(
            snapshot_download(
                model.repo,
                revision=model.revision,
                cache_dir=cache,
                allow_patterns=[*_PATTERNS],
            )
        )
    except Exception as cause:  # of a library that has many kinds
        raise ConfigError(
            f"{there}; the download failed: {_explain(cause)}; where there is a connection: "
            f"{by_hand}"
        ) from cause


def _explain(cause: Exception) -> str:
    """Why a download failed, from the error and what led to it."""
    error: Any = cause
    while error is not None:
        for kind in type(error).__mro__:
            if kind.__name__ in _ADVICE:
                return _ADVICE[kind.__name__]
        error = error.__cause__ or error.__context__
    reason = getattr(cause, "strerror", None) or " ".join(str(cause).split())
    return show(reason or type(cause).__name__, 200)
