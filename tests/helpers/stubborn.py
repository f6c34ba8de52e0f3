"""Work that a limited process does for its tests: some of it in C code that hears no alarm."""

import ctypes
import os
from typing import Any

from litlora.utils.limited_process import serve
from litlora.utils.resource_limits import MAX_MEMORY


def answer(request: dict[str, Any]) -> object:
    match request["do"]:
        case "echo":
            return request
        case "burn":  # one call of C code
            return sum(range(10**12))
        case "allocate":
            return len(bytes(2 * MAX_MEMORY))
        case "sort":
            return len(sorted(["a" * 10**7 + "b", "a" * 10**7 + "c"] * 10**5))
        case "crash":
            return ctypes.string_at(0)
        case "process":
            return os.getpid()
    return None


if __name__ == "__main__":
    serve(answer)
