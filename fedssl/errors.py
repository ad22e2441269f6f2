"""The errors a person can cause or must act on, one family: where, what came, what was wanted, what to do.

Caught once, at the door (the CLI and the two Flower apps). A bug stays an ``AssertionError``.
"""

from __future__ import annotations


class FedSSLError(Exception):
    """A person caused this or must act on it. Caught at the doors, nowhere else."""


class ConfigError(FedSSLError):
    """A setting is unknown, of the wrong type, or in conflict with another."""


class DataError(FedSSLError):
    """A file of histories is missing, empty, malformed, or not of the format it was said to be."""


class LedgerBehind(DataError):
    """A device's ledger of uploads was put back to an older one, so what was spent since is unknown. The name itself may leave the device."""


class CatalogueMismatch(FedSSLError):
    """Weights, counts or histories speak of another catalogue than the one at hand."""


class CheckpointError(FedSSLError):
    """A checkpoint is missing, incomplete, or of a format this version does not read."""


class WireError(FedSSLError):
    """A record that came over the wire cannot be read: another format number, missing parts, wrong shapes. ``kind``: as of UploadRefused."""

    def __init__(self, message: str, kind: str = "form") -> None:
        super().__init__(message)
        self.kind = kind


class UploadRefused(FedSSLError):
    """Admission refused one upload; the round goes on without it. ``kind``: why, in a word that counts are kept by."""

    def __init__(self, message: str, kind: str = "form") -> None:
        super().__init__(message)
        self.kind = kind


class AllUploadsRefused(FedSSLError):
    """Nothing that a non-empty cohort sent could be used."""


class TooFewUploads(FedSSLError):
    """Fewer of the nodes that were asked than a round needs sent what could be used; it was not applied."""


class RunFolderError(FedSSLError):
    """The run folder is missing, taken, or does not belong to this run."""


class DiskError(FedSSLError):
    """Something that must be kept cannot be written: no room, no right, a read-only or a broken disk."""


class BudgetSpent(FedSSLError):
    """The next round would break the promised epsilon."""

    def __init__(self, *, spent: float, promised: float, round_number: int):
        super().__init__(
            f"round {round_number} would spend epsilon {spent:.3f} of a promised {promised:.3f}; "
            "stop here, or start a run with more noise, fewer rounds or a larger promise"
        )
        self.spent, self.promised, self.round_number = spent, promised, round_number
