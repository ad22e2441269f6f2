"""A device's folder: what lies where in it, and how one is made. All of it is its owner's alone (0700)."""

from __future__ import annotations

import hashlib
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from fedssl.disk import whole_file, write_whole, writing
from fedssl.errors import ConfigError
from fedssl.privacy.uploads import Device, open_device
from fedssl_client.history import HistoryStore
from fedssl_client.policy import FILE, Policy

HISTORY, MODEL, TOKEN = "history.sqlite", "model", "token"
FIRST_POLICY = """\
# What this person allows. The agent reads it anew before every training. All settings: docs/device.md
user = {user}                # the number under which the server knows this device

[consent]
train = false           # true: take part in training; nothing leaves before
evaluate = false        # true: in a run without a privacy plan also say how well its model ranks the newest event

[allow]
servers = []            # names, as in the SuperNode's --node-config 'server="NAME"'
most_epsilon = 8.0      # over all runs; inf allows runs without a privacy plan

[retention]
most_events = 10000
most_days = 0           # 0: events are not deleted for their age

[gates]
charging = true
unmetered = true
rounds_a_day = 24
"""


def app_socket(folder: Path) -> Path:
    """Where the app on the device reaches the agent."""
    return folder / "app" / "agent.sock"


def training_socket(folder: Path, policy: Policy) -> Path:
    """Where the ClientApp reaches it: elsewhere, where another user may be let in."""
    return Path(policy.agent.training_socket) if policy.agent.training_socket else folder / "training" / "train.sock"


def heads_folder(folder: Path, run: str) -> Path:
    """Where a device keeps its head of a run: a run's name is anything."""
    return folder / "heads" / hashlib.sha256(run.encode()).hexdigest()[:16]


@contextmanager
def opened_ledger(folder: Path, history: HistoryStore) -> Iterator[Device]:
    """Key and ledger of a device, closed when the block ends. Raises DataError where it is missing, was changed, or put back to an older one."""
    device = open_device(folder)
    with closing(device.ledger):
        anchor = history.anchor()
        if anchor is not None:
            device.ledger.check_holds(*anchor)
        yield device


def make_device_folder(folder: Path, *, user: int) -> None:
    """A new folder with a policy that allows nothing yet, and a token. Raises ConfigError where there is a policy already."""
    if (folder / FILE).exists():
        raise ConfigError(f"{folder / FILE} is there already; it is the person's, edit it")
    with writing(folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.chmod(folder, 0o700)
        # Who finds half a folder here finds no policy in it, and nothing is allowed.
        with whole_file(folder / TOKEN) as beside:
            os.close(os.open(beside, os.O_CREAT | os.O_WRONLY, 0o600))
            beside.write_text(secrets.token_urlsafe(32))
    write_whole(folder / FILE, FIRST_POLICY.format(user=user))


def check_private(folder: Path) -> None:
    """Raises ConfigError where others than its owner may enter a device's folder."""
    mode = stat.S_IMODE(folder.stat().st_mode) if folder.is_dir() else None
    if mode is None:
        raise ConfigError(f"{folder}: no such folder; make one with `fedssl device init {folder}`")
    if mode & 0o077:
        raise ConfigError(f"{folder}: mode {mode:04o} lets others in; nobody but its owner may: chmod 0700 {folder}")


def read_token(folder: Path) -> str:
    """What a local TCP client shows. Raises ConfigError where there is none."""
    try:
        token = (folder / TOKEN).read_text().strip()
    except OSError as error:
        raise ConfigError(f"{folder / TOKEN}: cannot be read ({error.strerror}); write a long random text there, or set [agent] port = 0") from None
    if len(token) < 32:
        raise ConfigError(f"{folder / TOKEN}: {len(token)} characters; write a long random text of 32 or more there, or set [agent] port = 0")
    return token
