"""litlora's command line; each file that it or a process of its own opens is a line of the file that OPENED names."""

import os
import sys

RECORD = os.open(os.environ["OPENED"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)


def record(event: str, arguments: tuple[object, ...]) -> None:
    if event == "open" and isinstance(arguments[0], str):
        os.write(RECORD, f"{arguments[0]}\n".encode())


if __name__ == "__main__":
    sys.addaudithook(record)
    from litlora.__main__ import main

    sys.exit(main())
