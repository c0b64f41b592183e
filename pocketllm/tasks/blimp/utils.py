"""Data of the BLiMP tasks: one ``<paradigm>.jsonl`` each, from a folder the user names."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

FIELDS = ("sentence_good", "sentence_bad")


def load(paradigm: str, blimp_folder: str | None = None, **_: Any) -> dict[str, Any]:
    """One paradigm's pairs as lm-eval wants them: split name -> data set.

    Args:
        paradigm: name of the file without ``.jsonl``.
        blimp_folder: folder of the files (``--metadata '{"blimp_folder": "..."}'`` on lm-eval's
            command line); without it the environment variable POCKETLLM_BLIMP_DIR names it.

    Raises:
        FileNotFoundError: no folder named, or no such file in it.
        ValueError: a line without a good and a bad sentence.
    """
    from datasets import Dataset

    folder = blimp_folder or os.environ.get("POCKETLLM_BLIMP_DIR")
    if not folder:
        raise FileNotFoundError(
            "BLiMP: name the folder of its *.jsonl files in the environment variable"
            " POCKETLLM_BLIMP_DIR"
        )
    path = Path(folder) / f"{paradigm}.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"BLiMP: no file {path}")
    pairs = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            record = json.loads(line)
            pairs.append({field: str(record[field]) for field in FIELDS})
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"BLiMP: {path} line {number}: want an object with {' and '.join(FIELDS)}"
            ) from error
    return {"train": Dataset.from_list(pairs)}
