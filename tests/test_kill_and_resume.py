"""`ttsr-fast upscale` killed and interrupted; a short `tests/campaigns/kill_and_resume.py`."""

import re
import signal

from tests.campaigns.kill_and_resume import Folder, campaign
from ttsr_fast.images import read_image


def test_killed_runs_have_the_same_results():
    happened = campaign(kills=2, seed=2, count=6)
    assert (happened["kills"], happened["rounds"] > 0) == (2, True)


def test_ctrl_c_is_one_line_and_leaves_whole_files(tmp_path):
    folder = Folder(tmp_path, count=12, seed=1)
    process = folder.start("out")
    while not list(tmp_path.glob("out/*_x4.png")):
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=60)
    done = len(printed.splitlines())
    assert process.returncode == 130
    message = (
        r"error: interrupted after (\d+) of 12 images; the same command with --resume goes on\n"
    )
    found = re.fullmatch(message, errors)
    assert found is not None
    assert int(found[1]) in (done - 1, done)  # the signal may come between line and count
    assert done < 12
    for path in tmp_path.glob("out/*_x4.png"):
        assert read_image(path).size == (72, 88)
    assert list(tmp_path.glob("out/*.part")) == []
