"""Results that outlive a session: one JSON object a line, with the commit, a hash of the settings, and seconds."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "results"


def settings_hash(settings: Any) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:12]


def append(name: str, row: dict[str, Any]) -> dict[str, Any]:
    """Add a row to results/NAME.jsonl, stamped."""
    FOLDER.mkdir(exist_ok=True)
    stamped = {"commit": commit(), "time": time.strftime("%Y-%m-%d %H:%M"), "cpu": cpu(), **row}
    with (FOLDER / f"{name}.jsonl").open("a") as file:
        file.write(json.dumps(stamped) + "\n")
    return stamped


def rows(name: str) -> list[dict[str, Any]]:
    path = FOLDER / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def newest(name: str, /, **match: Any) -> dict[str, Any] | None:
    """The last row whose fields equal ``match``."""
    found = [row for row in rows(name) if all(row.get(key) == value for key, value in match.items())]
    return found[-1] if found else None


def commit() -> str:
    """The commit at hand, with a + where files differ from it, results aside."""
    try:
        head = subprocess.run(["git", "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True, check=True, cwd=FOLDER.parent).stdout.strip()
        changed = ["git", "status", "--porcelain", "-uno", "--", ":/", f":(exclude){FOLDER}"]
        dirty = subprocess.run(changed, capture_output=True, text=True, check=True, cwd=FOLDER.parent).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+" if dirty else "")


def cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
