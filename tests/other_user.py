"""Another user of this machine, who runs Flower's commands: with a copy of Python where ours lies behind a folder that only we may enter."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import fedssl_client
import fedssl_server
from fedssl_simulations.federation import OtherUser

import fedssl

UID = 65534
COMMANDS = ("flower-supernode", "flower-superexec", "flwr-clientapp")


class NoOtherUser(Exception):
    """Nothing can be run as another user here, and why."""


def other_user(place: Path) -> OtherUser:
    """Another user, with a Python in ``place``, a folder that everybody may enter. Raises NoOtherUser."""
    if os.geteuid() != 0:
        raise NoOtherUser("only root can start processes as another user")
    if shutil.which("setpriv") is None:
        raise NoOtherUser("no setpriv (util-linux) here")
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    programs, library = place / "bin", place / "lib"
    programs.mkdir(parents=True)
    unneeded = shutil.ignore_patterns("site-packages", "test", "__pycache__", "idlelib", "ensurepip", "config-*")
    shutil.copytree(sysconfig.get_path("stdlib"), library / version, ignore=unneeded)
    shutil.copy(Path(sys.executable).resolve(), programs / version)
    for shared in Path(sysconfig.get_config_var("LIBDIR")).glob(f"lib{version}*.so*"):
        shutil.copy(shared, library)
    for name in COMMANDS:
        words = (Path(sysconfig.get_path("scripts")) / name).read_text().split("\n", 1)[1]
        (programs / name).write_text(f"#!{programs / version}\n{words}")
        (programs / name).chmod(0o755)
    roots = [Path(package.__file__).parents[1] for package in (fedssl, fedssl_client, fedssl_server) if package.__file__]
    paths = [str(path) for path in dict.fromkeys((*roots, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")))]
    user = OtherUser(UID, programs, {"PYTHONHOME": str(place), "PYTHONPATH": os.pathsep.join(paths), "LD_LIBRARY_PATH": str(library)})
    done = subprocess.run([*user.before(place), str(programs / version), "-c", "import flwr.clientapp, fedssl_client.app"], capture_output=True, check=False)
    if done.returncode:
        raise NoOtherUser(f"another user cannot run this Python: {done.stderr.decode(errors='replace')[-300:]}")
    return user
