"""Reports which build of torch is installed, how large it is, and how to install the other one."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path


def describe_torch() -> str:
    """Returns one paragraph for people, from package metadata; torch is not imported."""
    files = importlib.metadata.files("torch") or []
    version_file = Path(str(importlib.metadata.distribution("torch").locate_file("torch/version.py")))
    version = version_file.read_text(encoding="utf-8").partition("__version__ = ")[2].split("\n")[0].strip("'\" ")
    size = sum(f.size or 0 for f in files)
    nvidia = [d for d in importlib.metadata.distributions() if (d.name or "").lower().startswith("nvidia-")]
    size += sum(f.size or 0 for d in nvidia for f in d.files or [])
    kind = "CUDA" if nvidia or "+cu" in version else "CPU"
    other = "CUDA" if kind == "CPU" else "CPU"
    return (
        f"torch {version}: {kind} build, {size / 1e9:.1f} GB with its GPU libraries. For a {other} build, point pip at "
        f"the package index that PyTorch's installation page names for it (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL or "
        f"pip.conf), then `make clean install`."
    )


if __name__ == "__main__":
    print(describe_torch())
