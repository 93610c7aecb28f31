"""Files that are complete or absent."""

import pytest

from src.utils.errors import UserError
from src.utils.files import write_whole


def test_a_failed_write_leaves_the_old_file(tmp_path):
    target = tmp_path / "a.txt"
    write_whole(target, lambda partial: partial.write_text("old"))

    def fail(partial):
        partial.write_text("half of the n")
        raise OSError(28, "No space left on device")
    with pytest.raises(UserError, match="No space left on device"):
        write_whole(target, fail)
    assert target.read_text() == "old" and [file.name for file in tmp_path.iterdir()] == ["a.txt"]
