"""Which nodes a run takes: what each says of its users, held against what a node may say.

A node's sums may be as long as those of the users asked of it, so what it says of them is part of admission.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from fedssl.errors import WireError

MOST_USERS = 2**24
"""Where the settings name no number of users: one node that says a higher number would make every array of users that long."""


def take_nodes(
    users_of_node: Mapping[int, NDArray[np.int64]], *, num_users: int = 0, most_users: int = 0
) -> tuple[dict[int, NDArray[np.int64]], dict[int, str]]:
    """The nodes that may take part, and why each other one is left out. 0: no bound of the settings.

    Guarantees for those that may:
      - a node hosts one to ``most_users`` users, sorted, each once, with numbers from 0 to ``num_users`` - 1;
      - a user lives on one node. Where two say so of one user, none can be told to be right, and both are left out.

    Raises WireError where none is left.
    """
    taken, left_out = {}, {}
    for node, users in users_of_node.items():
        why = _wrong(users, num_users or MOST_USERS, most_users)
        if why:
            left_out[node] = why
        else:
            taken[node] = users
    hosts = Counter(user for users in taken.values() for user in users.tolist())
    for node, users in list(taken.items()):
        twice = [user for user in users.tolist() if hosts[user] > 1]
        if twice:
            left_out[node] = f"user {twice[0]} lives on another node too, by what both say; give each device its own number"
            del taken[node]
    if not taken:
        why = "; ".join(f"node {node}: {words}" for node, words in list(left_out.items())[:3]) or "none is there"
        raise WireError(f"no node may take part: {why}")
    return taken, left_out


def _wrong(users: NDArray[np.int64], num_users: int, most_users: int) -> str:
    """What is wrong with the users that a node says it hosts; empty where nothing is."""
    if not len(users) or (np.diff(users) <= 0).any() or users[0] < 0:
        return "its users are none, or not numbers from 0, sorted, each once"
    if users[-1] >= num_users:
        return f"it hosts user {users[-1]}, and the run's users have the numbers 0 to {num_users - 1} ([nodes] users)"
    if most_users and len(users) > most_users:
        return f"it hosts {len(users)} users, and a node may host {most_users} ([nodes] most_users)"
    return ""
