"""report: the output folders of runs in, an HTML page out."""

from pathlib import Path

from litlora.args.report import ReportArgs
from litlora.report.comparison import comparison
from litlora.report.files import FINAL, RunFiles, reporting_faults
from litlora.report.output import PAGE
from litlora.report.page import page
from litlora.utils.console import output
from litlora.utils.files import check_replaceable, write_atomically


def report(args: ReportArgs) -> None:
    """Write the page of one run, or that which compares several."""
    if args.out_file is not None:
        check_replaceable(args.out_file, "--out_file", b"<!DOCTYPE html>")
    folders = [folder.parent if folder.name == FINAL else folder for folder in args.runs]
    runs = [RunFiles.read(folder) for folder in folders]
    with reporting_faults(folders):
        html = page(runs[0]) if len(runs) == 1 else comparison(runs)
    path = args.out_file or default_path(folders)
    write_atomically({path: html.encode(errors="backslashreplace")})
    output(str(path))


def default_path(folders: list[Path]) -> Path:
    """Return where the page goes: to the final adapter of a single run that has finished, else into this folder."""
    final = folders[0] / FINAL
    return final / PAGE if len(folders) == 1 and final.is_dir() else Path(PAGE)
