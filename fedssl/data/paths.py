"""Where a data file is found: as it is named, else in the folder that the environment variable FEDSSL_DATA names."""

from __future__ import annotations

import os
from pathlib import Path

from fedssl.errors import DataError


def find_path(name: str | Path) -> Path:
    """The file or folder called ``name``: as given, else, for a relative name, inside $FEDSSL_DATA.

    Raises DataError where it is in neither place, saying which were looked in.
    """
    if str(name) in ("", "."):
        raise DataError("[data] path is empty or '.'; name a file of histories, or a folder that `fedssl data convert` made")
    path = Path(name).expanduser()
    folder = os.environ.get("FEDSSL_DATA", "")
    try:
        if path.exists():
            return path
        if folder and not path.is_absolute() and (Path(folder) / path).exists():
            return Path(folder) / path
    except (OSError, ValueError) as error:  # a name too long, or with a NUL in it
        raise DataError(f"{str(name)!r}: not a name of a file ({error})") from None
    if path.is_absolute():
        raise DataError(f"{path}: no such file or folder; check its spelling")
    looked = f"nor in {folder} (FEDSSL_DATA)" if folder else "and FEDSSL_DATA, which could name a folder of data, is not set"
    raise DataError(f"{path}: no such file or folder in {Path.cwd()}, {looked}; check its spelling")
