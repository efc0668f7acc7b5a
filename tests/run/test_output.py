"""A reader that leaves, as `| head -1`, or a closed terminal, ends nothing."""

import os
import subprocess
import sys

SCRIPT = """
import sys
from pathlib import Path
from understudy.run.output import lasting_output
with lasting_output():
    for line in range(20000):
        print("line", line)
    print("error", file=sys.stderr)
Path(sys.argv[1]).write_text("reached the end")
"""


def test_a_program_whose_reader_leaves_goes_on_to_its_end(tmp_path):
    done = tmp_path / "done"
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(done)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout.readline() == b"line 0\n"
    process.stdout.close()
    process.stderr.close()
    assert process.wait(timeout=60) == 0
    assert done.read_text() == "reached the end"


def test_a_terminal_that_is_closed_ends_nothing(tmp_path):
    done = tmp_path / "done"
    master, slave = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(done)], stdout=slave, stderr=slave, start_new_session=True
    )
    os.close(slave)
    os.read(master, 10)
    os.close(master)
    assert process.wait(timeout=60) == 0
    assert done.read_text() == "reached the end"
