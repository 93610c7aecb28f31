"""What the launcher shows of a process's output."""

import pytest

from src.distributed.launcher import hides_output


# What mpirun of Open MPI 5.0 was seen to do with each.
@pytest.mark.parametrize(
    "words,hides",
    [
        ("-n 2 --output-filename log python3 x.py", True),
        ("-n 2 --output-filename=log python3 x.py", True),
        ("-output-filename log python3 x.py", True),
        ("--output file=log python3 x.py", True),
        ("--output dir=log python3 x.py", True),
        ("--output file=log:nocopy python3 x.py", False),
        ("--output-filename log:nocopy python3 x.py", False),
        ("--output tag python3 x.py", False),
        ("-n 2 python3 x.py", False),
        ("-n 2 python3 x.py --output_path=log", False),
    ],
)
def test_flags_by_which_mpirun_writes_to_files_only(words, hides):
    assert hides_output(["prterun", *words.split()]) == hides
    assert hides_output(["/usr/bin/mpirun", *words.split()]) == hides
    assert not hides_output(["bash", *words.split()])


def test_no_launcher_hides_nothing():
    assert not hides_output([])
