"""What a result depends on: settings, weights, versions, source code, machine (results.json, environment.json)."""

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from dynamic_llava.files import file_digest

PACKAGE = Path(__file__).resolve().parent


def fingerprint(settings: Mapping[str, Any], weights: Path) -> str:
    """Return a short digest of settings (JSON-able), a base checkpoint's tensors and JSON files, and library versions.

    FileNotFoundError when the folder holds no safetensors file.
    """
    files = sorted(weights.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{weights} holds no *.safetensors; give the folder of a checkpoint")
    digest = hashlib.sha256(json.dumps([settings, versions()], sort_keys=True, default=str).encode())
    for file in [*files, *sorted(weights.glob("*.json"))]:  # configuration, tokenizer and image settings
        digest.update(file_digest(file).encode())
    return digest.hexdigest()[:16]


def source_digest() -> str:
    """Return a short digest of the package's source; pictures apart, which change no number."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE)
        if name.parts[0] != "viz":
            digest.update(str(name).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def environment() -> dict[str, Any]:
    """Return commit, versions and machine of this process."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        **versions(),
        "python": platform.python_version(),
        "commit": _commit(),
        "source": source_digest(),
        "machine": platform.machine(),
        "cores": cores,
        "threads": torch.get_num_threads(),
    }


def versions(*packages: str) -> dict[str, str | None]:
    """Return the versions of torch, transformers and further packages; None for one that is not installed."""
    return {"torch": torch.__version__, **{name: _installed(name) for name in ("transformers", *packages)}}


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str:
    """Return the commit of the source tree, marked where files differ from it; "unknown" outside a checkout."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=PACKAGE, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    # Installed below a folder that is a checkout of something else, this file is not tracked there.
    if commit is None or git("ls-files", "--error-unmatch", __file__) is None:
        return "unknown"
    return f"{commit} with changes" if git("status", "--porcelain", "--", str(PACKAGE)) else commit
