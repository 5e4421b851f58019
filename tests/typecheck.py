"""mypy over the packages, under the name that they are imported by: `python tests/typecheck.py`; further arguments are
mypy's. Its settings are in pyproject.toml.

`latent_grpo` finds its packages beside itself, at the root of a checkout, by code that mypy does not run. So
`build/types` gets the layout that a wheel has, as links.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LINKED = ("common", "reward", "rollout_workers", "learner", "deploy", "latent_grpo/__init__.py", "latent_grpo/py.typed")


def main() -> int:
    package = ROOT / "build" / "types" / "latent_grpo"
    package.mkdir(parents=True, exist_ok=True)
    for name in LINKED:
        link = package / Path(name).name
        if not link.is_symlink():
            link.symlink_to(ROOT / name)
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), *sys.argv[1:]]
    result = subprocess.run(command, cwd=package.parent, capture_output=True, text=True, check=False)
    for line in result.stdout.splitlines():
        print(line.removeprefix("latent_grpo/"))  # the path in the checkout
    print(result.stderr, end="", file=sys.stderr)
    return result.returncode


if __name__ == "__main__":
    sys.exit(main())
