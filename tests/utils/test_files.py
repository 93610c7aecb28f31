"""Files that are complete or absent."""

import os

import pytest

from src.utils.errors import UserError
from src.utils.files import staged, write_atomically


def test_a_failed_write_leaves_the_old_file(tmp_path):
    target = tmp_path / "a.txt"
    write_atomically(target, lambda partial: partial.write_text("old"))

    def fail(partial):
        partial.write_text("half of the n")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="No space left on device"):
        write_atomically(target, fail)
    assert target.read_text() == "old" and [file.name for file in tmp_path.iterdir()] == ["a.txt"]


def test_staged_files_arrive_together_or_not_at_all(tmp_path):
    target = tmp_path / "new" / "a.mindir"

    def write(text):
        with staged(target) as partial:
            partial.write_text(text)
            partial.with_name("a.mindir.json").write_text(text)
            if text == "wrong":
                raise UserError(f"'{partial}' is wrong")

    write("old")
    with pytest.raises(UserError, match=f"'{target}' is wrong"):
        write("wrong")
    assert [file.read_text() for file in sorted(target.parent.iterdir())] == ["old", "old"]


@pytest.mark.parametrize("umask,mode", [(0o022, 0o644), (0o007, 0o660)])
def test_others_may_read_what_the_umask_lets_them_whatever_a_library_thinks(tmp_path, umask, mode):
    def write(partial):
        partial.write_text("weights")
        partial.chmod(0o400)

    before = os.umask(umask)
    try:
        write_atomically(tmp_path / "a.ckpt", write)
    finally:
        os.umask(before)
    assert (tmp_path / "a.ckpt").stat().st_mode & 0o777 == mode
