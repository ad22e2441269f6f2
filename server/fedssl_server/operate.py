"""What an operator's commands do: keep a SuperLink up, and bring a run to its end, over crashes."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fedssl.catalogue import read_catalogue
from fedssl.checkpoints import list_checkpoints
from fedssl.disk import write_whole, writing
from fedssl.errors import FedSSLError, RunFolderError
from fedssl.run_lock import held
from fedssl_server.at_work import forget_the_dead, has_died
from fedssl_server.link import Link
from fedssl_server.processes import Processes
from fedssl_server.run_settings import HALT, read_settings
from fedssl_server.server_folder import CURRENT

LONGEST_PAUSE_SECONDS, STEADY_SECONDS, KEYS_SECONDS, STOP_SECONDS, DEAD_SECONDS = 30.0, 60.0, 5.0, 20.0, 0.5
"""Between two starts of a process at most; after so long it is no start that failed; between two looks for new keys; for processes to end; a ServerApp without
its lock is dead."""


def keep_up(link: Link, say: Callable[[str], None]) -> None:
    """Run the SuperLink until SIGTERM or Ctrl-C, start it again when it ends, and let nodes join and leave as their keys come and go.

    Raises RunFolderError where it runs already; FedSSLError where it does not come up at first.
    """
    processes = link.processes()
    with held(link.folder, "start.lock"), _stopped_by_signals():
        (link.folder / "start.pid").write_text(str(os.getpid()))
        try:
            link.start(processes)
            say(f"listening on {link.address}")
            pause, began, keys = 1.0, time.monotonic(), 0.0
            heard: set[str] = set()
            while True:
                if processes.running["superlink"].poll() is not None:
                    say(f"the SuperLink ended with {processes.running['superlink'].returncode}; its log: {processes.logs / 'superlink.log'}")
                    pause = 1.0 if time.monotonic() - began > STEADY_SECONDS else min(2 * pause, LONGEST_PAUSE_SECONDS)
                    time.sleep(pause)
                    began = time.monotonic()
                    try:
                        link.start(processes)
                    except FedSSLError as error:
                        say(f"error: {error}")
                        continue
                    say("the SuperLink is up again")
                if time.monotonic() - keys > KEYS_SECONDS:
                    told, heard = heard, set()
                    try:
                        for line in link.let_join():
                            heard.add(line)
                            if line not in told or not line.startswith("error:"):  # What is wrong with a key is wrong at every look.
                                say(line)
                    except FedSSLError as error:  # Such as a SuperLink that has just ended.
                        say(f"error: {error}")
                    keys = time.monotonic()
                time.sleep(0.5)
        finally:
            processes.end(STOP_SECONDS)
            (link.folder / "start.pid").unlink(missing_ok=True)


def is_up(link: Link) -> bool:
    """Whether `keep_up` runs on this server's folder."""
    try:
        with held(link.folder, "start.lock"):
            return False
    except RunFolderError:
        return True


def begin_run(settings: Path, catalogue: Path, folder: Path) -> None:
    """A new run folder with these settings and this catalogue. Raises RunFolderError where there is a run already; ConfigError, DataError for what is wrong."""
    if (folder / "run.toml").exists():
        raise RunFolderError(f"{folder}: there is a run already; go on with --resume {folder}, or choose another folder")
    read_settings(settings)
    read_catalogue(catalogue)
    with writing(folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_whole(folder / "catalogue.jsonl", catalogue.read_text(encoding="utf-8"))
    # Who finds half a folder here finds no run in it.
    write_whole(folder / "run.toml", settings.read_text(encoding="utf-8"))


def run_to_end(link: Link, folder: Path, say: Callable[[str], None]) -> str:
    """Bring the run in ``folder`` to its end: 'done', 'halted' after a round, or 'stopped' at once. Who asked it to halt is not answered with a new start.

    After a crash of ServerApp, SuperExec or SuperLink what is left of it is submitted as a new Flower run, which goes on
    from the newest checkpoint; what a lost round was charged stays charged.

    Raises FedSSLError with the ServerApp's own words where it gave up, and after ``[rounds] tries`` crashes in a row without a new checkpoint.
    """
    if not (folder / "run.toml").exists():
        raise RunFolderError(f"{folder}: no run.toml; a run begins with `fedssl server run DIR RUN.toml --out {folder}`")
    (folder / HALT).unlink(missing_ok=True)
    failures = 0
    with held(link.folder, "run.lock"), _stopped_by_signals():
        # Of a `run` that was killed here before: its nodes would go on with questions that nobody waits for.
        _give_up(link)
        while True:
            before = _newest(folder)
            processes = link.processes()
            try:
                outcome, status = _once(link, folder, processes, say)
            finally:
                processes.end(STOP_SECONDS)
                _give_up(link)
            if status == "finished:completed":
                return "halted" if (folder / HALT).exists() else "done"
            if status == "finished:stopped" or (status == "lost" and (folder / HALT).exists()):
                return "stopped"
            gave_up = [line for line in outcome.splitlines() if line.startswith("error: ")]
            if gave_up:
                raise FedSSLError(f"{gave_up[-1].removeprefix('error: ')} (go on with --resume {folder})")
            failures = 1 if _newest(folder) != before else failures + 1
            if failures >= link.settings.rounds.tries:
                raise FedSSLError(f"{failures} crashes in a row without a new checkpoint ({status}), logs: {processes.logs}. Go on with --resume {folder}")
            say(f"the run ended as {status}; going on from {_newest(folder) or 'its beginning'} as a new Flower run")
            time.sleep(1.0)


def _once(link: Link, folder: Path, processes: Processes, say: Callable[[str], None]) -> tuple[str, str]:
    """One Flower run: the ServerApp's log and the status, 'lost' where the SuperLink or a process was."""
    log = ""
    try:
        if not is_up(link):
            listen = link.settings.listen
            say(f"no SuperLink runs on {link.folder} yet; waiting for {listen.name}:{listen.port} (`fedssl server start` makes one)")
        processes.wait_for_port(link.settings.listen.port, link.settings.rounds.nodes_seconds, host=link.settings.listen.name)
        forget_the_dead(folder)
        link.start_superexec(processes, folder)
        number = link.submit()
        write_whole(link.folder / CURRENT, json.dumps({"folder": str(folder.resolve()), "flower_run": number}))
        say(f"Flower run {number}")
        outcome = link.follow(number, processes, is_lost=_watch(folder))
        log = outcome.log
        (link.folder / CURRENT).unlink(missing_ok=True)
        return log, outcome.status
    except FedSSLError as error:
        say(f"lost: {str(error).splitlines()[0]}")
        return log, "lost"


def _watch(folder: Path) -> Callable[[], bool]:
    """Whether the ServerApp of this folder has died, as two looks say that are a moment apart."""
    seen: list[float] = []

    def is_lost() -> bool:
        if not has_died(folder):
            seen.clear()
            return False
        seen.append(time.monotonic())
        return seen[-1] - seen[0] > DEAD_SECONDS

    return is_lost


def _give_up(link: Link) -> None:
    """End the Flower run that is followed no longer, if there is one, where the SuperLink can be asked: after its restart that run is over by itself."""
    found = current_run(link)
    if found is not None:
        with suppress(FedSSLError):
            link.stop(str(found["flower_run"]))
        (link.folder / CURRENT).unlink(missing_ok=True)


def current_run(link: Link) -> dict[str, Any] | None:
    """Folder and Flower's number of the run that `run_to_end` follows now; None where it follows none."""
    try:
        found: dict[str, Any] = json.loads((link.folder / CURRENT).read_text())
    except (OSError, ValueError):
        return None
    return found


def halt_run(link: Link, *, now: bool) -> Path | None:
    """Ask the run that is followed to stop after the round at hand, or end it at once; its folder. None where there is none.

    Under a plan a round that is ended at once stays charged, and is charged again when the run goes on.
    """
    found = current_run(link)
    if found is None:
        return None
    folder = Path(found["folder"])
    # Before the run is ended: who follows it must not take its end for a crash.
    write_whole(folder / HALT, "")
    if now:
        link.stop(str(found["flower_run"]))
    return folder


def halt_link(link: Link) -> bool:
    """End what keeps the SuperLink up; False where nothing does."""
    if not is_up(link):
        return False
    os.kill(int((link.folder / "start.pid").read_text()), signal.SIGTERM)
    return True


def status_of(link: Link) -> dict[str, Any]:
    """Whether the SuperLink is up, its nodes, and where the run that is followed stands."""
    found: dict[str, Any] = {"superlink": "up" if is_up(link) else "down"}
    if found["superlink"] == "up":
        found["nodes"] = link.nodes()
    current = current_run(link)
    return found | (state_of(Path(current["folder"])) if current else {"run": "none"})


def state_of(folder: Path) -> dict[str, Any]:
    """Where a run stands: its newest checkpoint, epsilon under a plan, and how many answers were refused, by kind. Nothing of any upload's content."""
    lines = []
    path = folder / "metrics.jsonl"
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:
                continue  # Half a line: it is being written.
    refused: dict[str, int] = {}
    for line in lines:
        # Under a plan who answered is the researcher's alone, so it is not said.
        for kind, number in line.get("refused_for", {}).items():
            refused[kind] = refused.get(kind, 0) + number
    last = lines[-1] if lines else {}
    found = {"run": str(folder), "checkpoint": _newest(folder), "phase": last.get("phase"), "round": last.get("round"), "refused": refused}
    return found | ({"epsilon": last["epsilon"]} if "epsilon" in last else {})


def _newest(folder: Path) -> str | None:
    found = list_checkpoints(folder / "checkpoints")
    return found[-1].name if found else None


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """SIGTERM ends the block as a Ctrl-C does."""

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def say_with_time(text: str) -> None:
    """A line on standard error, with the time."""
    print(f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {text}", file=sys.stderr, flush=True)
