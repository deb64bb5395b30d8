"""Files written whole, safe names, and checked output folders."""

import json
import os
import re
import tempfile
import unicodedata
import uuid
from pathlib import Path
from typing import Any

from nearid_personalize.errors import InputError

_DEVICES = {"CON", "PRN", "AUX", "NUL", *(f"{port}{n}" for port in ("COM", "LPT") for n in range(1, 10))}  # of Windows


# --- names of strangers' files ---------------------------------------------------------------------------------------
def safe_name(name: str, default: str = "file") -> str:
    """A file name for this machine's disk out of one that a stranger gave: no folder, no hidden file, at most 100 long.

    Letters and digits of any script, "-", "_" and single dots stay; the suffix is kept when it is cut.
    """
    last = unicodedata.normalize("NFKC", name).replace("\\", "/").rstrip("/").rsplit("/", 1)[-1]
    plain = re.sub(r"[^\w.\-]+", "_", last)
    plain = re.sub(r"\.{2,}", ".", plain).strip("._")
    stem, dot, suffix = plain.rpartition(".")
    kept = f"{stem[: 99 - len(suffix)]}.{suffix}" if dot and len(suffix) < 20 else plain[:100]
    return f"_{kept}" if kept.split(".")[0].upper() in _DEVICES else kept or default


# --- reading ---------------------------------------------------------------------------------------------------------
def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text; ValueError where it is none, or nested too deep to be read."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deep") from None


# --- writing ---------------------------------------------------------------------------------------------------------
def check_writable(folder: Path, flag: str = "--out") -> None:
    """Create an output folder and try a file in it, so that no long work ends at a closed door.

    Raises:
        InputError: it cannot be created or written to; the message names the flag that it came from.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"{flag} {folder}: cannot be written ({reason}); give a folder that can") from None


def write_atomically(path: str | Path, content: bytes | str) -> None:
    """Write a whole file or nothing: into a temporary file of the same folder, then renamed over `path`.

    Text is written as UTF-8. Raises OSError as `open` does, also when the disk is full; `path` then is as it was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        # Writing to an open file does not say which one it was.
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)
