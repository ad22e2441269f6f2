"""Admission: every upload is checked before it is added, so that nothing a node sends can harm the model.

Refused is whatever answers another exchange or recipe, and whatever the closed manifest does not allow: undeclared names,
other shapes or dtypes (so nan), sums longer than the users that were asked can make them. What is refused is counted by kind:

- exchange: the answer to another exchange: late, or played again; recipe: to another recipe
- version: another format number, of an older fedssl or a newer one
- names: sums that were not declared, or not all of them; form: another layout, type or shape, or no upload at all
- coordinates, norm: larger than the users asked of that node can make
- ledger: the node's ledger of what was spent is an older one than it had before (`ledger_heads`), by its own words or by what it sends
- failed: the node says that it failed; missing: not reached, or no answer before the deadline
- unasked: an answer that nobody waits for, such as a node's second one
"""

from __future__ import annotations

from collections.abc import Mapping

from fedssl.errors import UploadRefused
from fedssl.privacy.manifest import DeclaredSum, check_manifest
from fedssl.records import Address, Upload


def admit(upload: Upload, *, address: Address, recipe: str, declared: Mapping[str, DeclaredSum], most_users: int) -> None:
    """Pass an upload, or raise UploadRefused that says why, and of what kind.

    ``address`` and ``recipe`` (hash): those of the Download it should answer; ``most_users``: users asked of that node.
    """
    if upload.address != address:
        raise UploadRefused(f"the upload answers {upload.address}, wanted {address}; an answer to another exchange is never added", "exchange")
    if upload.recipe != recipe:
        raise UploadRefused(f"the upload followed recipe {upload.recipe[:12]}, wanted {recipe[:12]}; update the node", "recipe")
    check_manifest(upload.sums, declared, most_users=most_users)
