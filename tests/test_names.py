"""Names: what ships, what is one's own, and what nobody knows."""

from __future__ import annotations

import re

import pytest

from fedssl.config import TaskConfig
from fedssl.errors import ConfigError
from fedssl.names import find
from fedssl.parts import TASKS, make_task
from fedssl.tasks.next_item import next_item


def test_a_part_of_ones_own_is_found_by_package_and_name():
    assert find(TASKS, "fedssl.tasks.next_item:next_item", what="task") is next_item
    assert find(TASKS, "next-item", what="task") is next_item
    task = make_task(TaskConfig(name="fedssl.tasks.next_item:next_item", negatives=3), num_items=9)
    assert callable(task.draw) and callable(task.loss)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("next", "there is no task 'next'; there is contrastive, masked-item, next-item, previous-item, or package.module:name of your own"),
        ("no_such_module:task", "task 'no_such_module:task' cannot be loaded (No module named 'no_such_module'); write package.module:name"),
        ("fedssl.tasks:absent", "cannot be loaded (module 'fedssl.tasks' has no attribute 'absent')"),
        ("fedssl.heads.store:HEADS_FORMAT", "is not a function"),
    ],
)
def test_a_name_that_leads_nowhere_says_where_it_came_from_and_what_there_is(name: str, says: str):
    with pytest.raises(ConfigError, match=re.escape(says)):
        find(TASKS, name, what="task")
