"""The folder beside the output where finished parts of a compression wait for ``--resume``.

Every part is written beside and renamed, so a part that exists is whole. The folder belongs to one
job: the same source, settings and version of the package; anything else is refused.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from .errors import PocketError
from .tensorfile import LazyTensor, TensorSource


class Workspace:
    """Parts of one unfinished compression, by name."""

    def __init__(self, out: Path, job: dict[str, Any], *, resume: bool) -> None:
        """Open ``<out>.partial`` for a job.

        Args:
            out: the folder the compression will make.
            job: what identifies the job, plain JSON values.
            resume: continue a job found there; without it, finding one is an error.

        Raises:
            PocketError: an unfinished job is there and ``resume`` is False, or it is another job,
                or another process works on it, or the folder cannot be written.
        """
        self.folder = self.folder_of(out)
        self._resume_finds_job(job, resume)
        self._lock = self._locked()

    def __enter__(self) -> Workspace:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._lock)

    @staticmethod
    def folder_of(out: Path) -> Path:
        """Where the parts of ``out`` wait."""
        return out.with_name(out.name + ".partial")

    def _locked(self) -> int:
        """A lock that ends with the process, so that two of them never work on one job."""
        with writing(self.folder):
            descriptor = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            raise PocketError(
                f"{self.folder}: another process is working on it: wait for it or stop it"
            ) from error
        return descriptor

    def _resume_finds_job(self, job: dict[str, Any], resume: bool) -> None:
        marker = self.folder / "job.json"
        if marker.is_file():
            if not resume:
                raise PocketError(
                    f"{self.folder}: holds an unfinished compression: "
                    "add --resume to continue it, or delete the folder"
                )
            found = json.loads(marker.read_text(encoding="utf-8"))
            if found != job:
                differing = sorted(k for k in {*found, *job} if found.get(k) != job.get(k))
                raise PocketError(
                    f"{self.folder}: was begun with another {differing[0]}: "
                    "repeat that command to resume it, or delete the folder"
                )
            return
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._replace(marker, json.dumps(job, indent=1, sort_keys=True).encode())

    def load(self, name: str) -> dict[str, np.ndarray] | None:
        """The arrays of a finished part, or None."""
        path = self._path(name)
        return load_file(path) if path.is_file() else None

    def part(self, name: str) -> dict[str, TensorSource] | None:
        """The tensors of a finished part, each read when it is asked for; or None."""
        path = self._path(name)
        if not path.is_file():
            return None
        with safe_open(path, framework="numpy") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            return {
                key: LazyTensor(
                    view.get_dtype(), tuple(view.get_shape()), functools.partial(_read, path, key)
                )
                for key, view in slices.items()
            }

    def store(self, name: str, arrays: dict[str, np.ndarray]) -> None:
        """Keep a part. Raises PocketError when it cannot be written."""
        path = self._path(name)
        beside = path.with_suffix(".writing")
        with writing(path):
            save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, beside)
            os.replace(beside, path)

    def remove(self) -> None:
        """Delete the folder: the job is done."""
        shutil.rmtree(self.folder)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    @staticmethod
    def _replace(path: Path, content: bytes) -> None:
        beside = path.with_suffix(".writing")
        beside.write_bytes(content)
        os.replace(beside, path)


def _read(path: Path, key: str) -> np.ndarray:
    with safe_open(path, framework="numpy") as file:
        return file.get_tensor(key)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what goes wrong while writing into one sentence."""
    try:
        yield
    except OSError as error:
        raise PocketError(
            f"{path}: cannot be written ({error.strerror or error}): "
            "free space or choose another place"
        ) from error
    except Exception as error:  # safetensors raises its own class around the same causes
        if type(error).__name__ == "SafetensorError":
            raise PocketError(
                f"{path}: cannot be written ({error}): free space or choose another place"
            ) from error
        raise


def fingerprint(folder: Path) -> str:
    """A digest of the source's weight files: names, sizes and contents."""
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), folder / "config.json"]):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        with path.open("rb") as handle:
            while block := handle.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()
