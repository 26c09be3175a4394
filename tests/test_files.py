"""Locks on folders: one holder at a time, and nothing left behind."""

import os
import threading

import pytest

from gemma_jax.errors import UserError
from gemma_jax.files import locked


def test_a_held_folder_is_refused_with_the_number_of_its_holder(tmp_path):
    with (
        locked(tmp_path / "a"),
        pytest.raises(UserError, match=f"held by {os.getpid()}"),
        locked(tmp_path / "a", lambda process: UserError(f"held by {process}")),
    ):
        pass
    assert not (tmp_path / "a").exists()


def test_a_lock_leaves_what_others_made(tmp_path):
    with locked(tmp_path / "a" / "b"):
        (tmp_path / "a" / "kept").touch()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["kept"]


def test_waiting_processes_hold_it_one_at_a_time(tmp_path):
    held, most = [], []

    def work():
        for _ in range(20):
            with locked(tmp_path / "a"):
                held.append(None)
                most.append(len(held))
                held.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert most == [1] * 80
    assert not (tmp_path / "a" / ".lock").exists()
