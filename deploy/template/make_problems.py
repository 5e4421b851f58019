"""Makes the data of this project, problems.jsonl and held_out.jsonl: `python make_problems.py`.

A row has three columns: `problem` is what the model reads, `cot` a chain of thought written out, which Latent-SFT
compresses into latent steps, and `answer` what the verifier compares with. Put your own rows in their place; where no
chains exist, set `warm_start: null` in train.yaml and begin with a model that can think already.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

NAMES = ("Mia", "Tom", "Ann", "Ben")
THINGS = ("pens", "eggs", "cups", "keys")


def problem(draw: random.Random) -> dict[str, str]:
    """One row, two operations whose results stay from 0 to 9."""
    start = have = draw.randint(1, 9)
    chain, story = [], []
    for _ in range(2):
        gets = have == 0 or (have < 9 and draw.random() < 0.5)
        change = draw.randint(1, 9 - have) if gets else draw.randint(1, have)
        result = have + change if gets else have - change
        chain.append(f"{have}{'+' if gets else '-'}{change}={result};")
        story.append(f"{'gets' if gets else 'gives'} {change}")
        have = result
    text = f"{draw.choice(NAMES)} has {start} {draw.choice(THINGS)}, {', '.join(story)}?"
    return {"problem": text, "cot": "".join(chain), "answer": str(have)}


def write(folder: Path, training: int = 2000, held_out: int = 200, seed: int = 0) -> None:
    """Writes both files; no problem is in both."""
    draw = random.Random(seed)
    rows: dict[str, str] = {}
    while len(rows) < training + held_out:
        row = problem(draw)
        rows[row["problem"]] = json.dumps(row)
    lines = list(rows.values())
    for name, part in (("problems.jsonl", lines[:training]), ("held_out.jsonl", lines[training:])):
        (folder / name).write_text("\n".join(part) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write(Path(__file__).resolve().parent)
