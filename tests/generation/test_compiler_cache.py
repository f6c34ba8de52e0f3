from pathlib import Path

import pytest
import torch

from litlora.generation.compiler_cache import is_intact, remove_truncated_libraries
from litlora.utils.locks import holding

LIBRARY = Path(torch.__file__).with_name("lib") / "libshm.so"


@pytest.mark.skipif(not LIBRARY.exists(), reason="torch's libraries are not ELF files here")
def test_truncated_libraries_are_told_from_intact_ones(tmp_path):
    library, contents = tmp_path / "library.so", LIBRARY.read_bytes()
    for length in (0, 4, 63, 64, len(contents) // 2, len(contents) - 1):
        library.write_bytes(contents[:length])
        assert not is_intact(library)
    library.write_bytes(contents)
    assert is_intact(library)
    library.write_bytes(bytes(len(contents)))  # space that the linker took and has not written yet
    assert not is_intact(library)
    library.write_bytes(b"\xcf\xfa\xed\xfe" + contents[4:])  # as macOS has them
    assert is_intact(library)


def test_library_that_is_being_compiled_is_left_alone(tmp_path):
    library = tmp_path / "ab" / "cab.main.so"
    library.parent.mkdir()
    library.touch()
    with holding(tmp_path / "locks" / "cab.lock"):
        remove_truncated_libraries(tmp_path)
        assert library.exists()
    remove_truncated_libraries(tmp_path)
    assert not library.exists()
