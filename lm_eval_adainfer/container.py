"""One safe file format for what this project writes: safetensors arrays plus a JSON header.

Loading it never executes code, whatever the file's extension is. Stoppers and traces are both kept so.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from lm_eval_adainfer.errors import AdaInferError

_KEY = "adainfer"
_MAX_HEADER = 16 * 2**20


def write(path: str | Path, what: str, version: int, meta: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Write beside the target, then rename: a partly written file never replaces a good one.

    Args:
        path: The file.
        what: ``"stopper"`` or ``"trace"``.
        version: The format's version.
        meta: JSON-serialisable.
        arrays: Name to array.

    Raises:
        AdaInferError: Where the folder can't be written to.
    """
    path = Path(path)
    header = json.dumps({"what": what, "version": version, "meta": meta}, sort_keys=True)
    contiguous = {name: np.ascontiguousarray(a) for name, a in arrays.items()}
    data = save(contiguous, metadata={_KEY: header})
    write_atomically(path, data)


def write_atomically(path: Path, data: bytes, argument: str = "output") -> None:
    """Replace ``path`` (which ``argument`` named) by ``data`` in one step."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = file.name
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)
        raise AdaInferError(f"{argument}: {path} can't be written: {error.strerror or error}") from None
    except BaseException:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)
        raise


def read(
    path: str | Path, what: str, version: int | Sequence[int], argument: str
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The JSON meta and the arrays of a file that :func:`write` made.

    Args:
        path: The file.
        what: What it must hold (``"stopper"`` or ``"trace"``).
        version: The version that is read, or all that are.
        argument: The user's argument, for messages.

    Raises:
        AdaInferError: Where the file is missing, truncated, a pickle or anything else.
    """
    shown, path = str(path), Path(path)
    versions = [version] if isinstance(version, int) else list(version)
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "does not exist"
        raise AdaInferError(f"{argument}: {shown} {found}; give a {what} file")
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise AdaInferError(f"{argument}: {path} can't be read: {error.strerror}") from None
    if not start:
        raise AdaInferError(f"{argument}: {path} is empty; give a {what} file that adainfer wrote")
    if looks_like_pickle(start):
        refused = f"{argument}: {path} is a pickle, which could run code when loaded, so it is not opened"
        if what != "stopper":
            raise AdaInferError(f"{refused}; make a {what} with adainfer")
        raise AdaInferError(
            f"{refused}; make a stopper "
            "from a fitted SVC in Python with lm_eval_adainfer.strategies.svm.SVMStopper.from_sklearn(svc, "
            'features=("gap", "top_prob")) and lm_eval_adainfer.strategies.files.save(stopper, "svm.pkl")'
        )
    if len(start) < 9 or start[8:9] != b"{" or int.from_bytes(start[:8], "little") > _MAX_HEADER:
        raise AdaInferError(f"{argument}: {path} is no {what} file; give one that adainfer wrote")
    try:
        with safe_open(path, framework="np") as file:
            header = json.loads((file.metadata() or {}).get(_KEY, "null"))
            if not isinstance(header, dict) or not isinstance(header.get("meta"), dict):
                raise AdaInferError(
                    f"{argument}: {path} is a safetensors file, but no {what}; give one that adainfer wrote"
                )
            if header.get("what") != what:
                raise AdaInferError(f"{argument}: {path} holds a {header.get('what')}, not a {what}")
            if header.get("version") not in versions:
                raise AdaInferError(
                    f"{argument}: {path} has the format version {header.get('version')}, but this release reads "
                    f"version {' or '.join(map(str, versions))}; make it again"
                )
            return header["meta"], {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except AdaInferError:
        raise
    except Exception as error:  # a damaged or hostile file may fail anywhere in the reader
        detail = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise AdaInferError(f"{argument}: {path} is damaged or truncated ({detail}); make it again") from None


def looks_like_pickle(start: bytes) -> bool:
    """Whether a file's first bytes are those of a pickle (any protocol), a joblib or a torch archive of pickles."""
    if start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05") and start[8:9] != b"{":
        return True
    compressed = (b"\x78\x01", b"\x78\x5e", b"\x78\x9c", b"\x78\xda", b"\x1f\x8b", b"BZ", b"\xfd7", b"\x5d\x00")
    if start[:4] == b"PK\x03\x04" or (start[:2] in compressed and start[8:9] != b"{"):
        return True
    # protocols 0 and 1 are text: they open with a mark, a global, a list, dict or constant opcode
    return start[:1] in (b"(", b"c", b"]", b"}", b")", b"I", b"S", b"V", b"F", b"N") and start[8:9] != b"{"
