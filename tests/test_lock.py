"""Lock of a folder: its holder, and its release."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.trainings import ROOT, configuration, photographs, program, run_training
from ttsr_fast.cli.commands import app
from ttsr_fast.training.lock import LOCK, claimed
from ttsr_fast.training.trainer import train

HELD = r"^another training is running in {} \(process \d+ on .+\): wait for its end, or choose "
# Claims a folder, forks a process as a loader does, and prints its number.
HOLDER = """
import os, sys, time
from pathlib import Path
from ttsr_fast.training.lock import claimed
with claimed(Path(sys.argv[1])):
    child = os.fork()
    if child:
        print(child, flush=True)
    time.sleep(60)
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return photographs(tmp_path_factory.mktemp("data") / "photographs")


def claim(folder):
    with claimed(folder):
        pass


def test_the_second_is_refused_until_the_first_has_ended(tmp_path):
    with claimed(tmp_path):
        for _ in range(2):
            with pytest.raises(RuntimeError, match=HELD.format(tmp_path)):
                claim(tmp_path)
        assert (tmp_path / LOCK).read_text().startswith(f"process {os.getpid()} on ")
    assert list(tmp_path.iterdir()) == []
    claim(tmp_path)


def test_folders_are_made_and_removed_if_they_stay_empty(tmp_path):
    claim(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []
    with claimed(tmp_path / "a" / "b"):
        (tmp_path / "a" / "result").touch()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["result"]


def test_a_killed_training_holds_nothing(tmp_path):
    """Neither its file nor its forked process holds the lock."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    child = int(holder.stdout.readline())
    holder.stdout.close()
    try:
        with pytest.raises(RuntimeError, match=rf"\(process {holder.pid} on "):
            claim(tmp_path)
        holder.kill()
        holder.wait(timeout=60)
        assert (tmp_path / LOCK).exists()
        os.kill(child, 0)  # it is alive
        claim(tmp_path)
    finally:
        os.kill(child, signal.SIGKILL)


def test_an_impossible_lock_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=rf"^cannot make the folder {tmp_path / 'file'}: "):
        claim(tmp_path / "file")
    (tmp_path / LOCK).symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match=rf"^cannot write {tmp_path / LOCK}: "):
        claim(tmp_path)
    assert not (tmp_path / "victim").exists()


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch, caplog):
    def refuse(descriptor, operation):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("ttsr_fast.training.lock.fcntl.flock", refuse)
    claim(tmp_path)
    (message,) = caplog.messages
    assert message.startswith(f"{tmp_path / LOCK} cannot be locked (Operation not supported): ")


def test_a_second_training_is_refused_and_writes_nothing(data, tmp_path):
    with claimed(tmp_path):
        result = CliRunner().invoke(app, program(data, tmp_path)[3:])
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr.startswith(f"error: another training is running in {tmp_path} (")
        assert [path.name for path in tmp_path.iterdir()] == [LOCK]
    train(configuration(data, tmp_path, "crops_per_photo=1"))


def test_all_processes_of_the_second_training_end(two, data, tmp_path):
    config = configuration(data, tmp_path)
    with claimed(tmp_path):
        answers = two.run(run_training, config)
    assert [type(answer) for answer in answers] == [RuntimeError, RuntimeError]
    assert all(str(x).startswith("another training is running in ") for x in answers)
    assert list(Path(tmp_path).iterdir()) == []
