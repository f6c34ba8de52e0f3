"""The page of a run opens without network, has the figures of its files, and no text of a run becomes markup."""

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from helpers.runs import finetune, metrics, report

from litlora.__main__ import main
from litlora.report.chart import MOST_POINTS, Curve, line_chart, round_axis, smoothed, thinned, ticks
from litlora.report.files import RunFiles, changed, read_samples
from litlora.report.page import page

VOID = {"meta"}


class Reader(HTMLParser):
    """Collects the elements with their attributes, and the text; every element must be closed in its turn."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements, self.text, self.open = [], "", []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.open += [] if tag in VOID else [tag]

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data if not self.open or self.open[-1] != "style" else ""

    @property
    def curves(self) -> list[int]:
        """The numbers of points of all curves."""
        return [len(attributes["points"].split()) for tag, attributes in self.elements if tag == "polyline"]


def read(path: Path) -> Reader:
    return Reader(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def runs(tiny, data_dir, tmp_path_factory) -> list[Path]:
    """Return a run that gets worse, with samples, and one of another rank."""
    folder = tmp_path_factory.mktemp("runs")
    worse = ["--train.learning_rate", 10, "--train.lr_warmup_steps", 0, "--eval.max_new_tokens", 4]
    flags = {"<script>run": worse, "other": ["--lora_r", 4]}
    return [
        finetune(tiny, data_dir, folder / name, "--train.global_batch_size", 5, *some).parent
        for name, some in flags.items()
    ]


def test_page_has_the_figures_of_the_run(runs):
    figures, rows, html = report(runs[0] / "final"), metrics(runs[0]), read(runs[0] / "final" / "report.html")
    assert figures["start_val_loss"] == float(rows[0]["val_loss"])
    assert figures["val_loss"] > figures["start_val_loss"]
    assert "lower --train.learning_rate (10)" in figures["warning"]
    shown = [f"{figures['start_val_loss']:.4f} → {figures['val_loss']:.4f}", f"{figures['trainable_parameters']:,}"]
    shown += [figures["warning"], figures["adapter"], f"{figures['peak_memory_gb']:.2f} GB", "train.learning_rate"]
    for text in shown:
        assert text in html.text
    assert "train.epochs" not in html.text
    assert html.curves == [3, 3, 2, 3]  # loss, smoothed, validation, learning rate


def test_page_needs_no_network_and_no_script(runs):
    html = read(runs[0] / "final" / "report.html")
    assert not {"src", "href"} & {name for _, attributes in html.elements for name in attributes}
    assert "script" not in [tag for tag, _ in html.elements]
    assert "<script>run" in html.text
    assert "http" not in html.text + " ".join(str(each) for each in html.elements)


def test_samples_stand_before_and_after_side_by_side(runs):
    samples = read_samples(runs[0])
    assert [(sample["step"], sample["row"]) for sample in samples] == [(0, 0), (0, 1), (0, 2), (3, 0), (3, 1), (3, 2)]
    html = read(runs[0] / "final" / "report.html")
    assert html.text.count("before training (step 0)") == html.text.count("after training (step 3)") == 3
    for sample in samples:
        assert sample["expected"] in html.text
        assert sample["completion"].strip() in html.text
    assert not (runs[1] / "samples.jsonl").exists()  # with --eval.max_new_tokens 0


def test_highest_losses_name_rows_while_they_are_the_same(runs, tmp_path):
    found = report(runs[0] / "final")["highest_losses"]
    assert found["rows"] == 15
    assert found["scored"] == len(found["highest"]) == 1  # a tenth of the trained tokens
    settings = yaml.safe_load((runs[0] / "hyperparameters.yaml").read_text())
    lines = (Path(settings["data_dir"]) / "train.jsonl").read_bytes().splitlines()
    row = json.loads(lines[found["highest"][0]["line"] - 1])
    html = read(runs[0] / "final" / "report.html").text
    assert "Measured on 1 of 15 rows, chosen at random" in html
    assert row["instruction"] in html
    (tmp_path / "train.jsonl").write_bytes(b"{}\n" * 15)
    changed_data = RunFiles("run", settings | {"data_dir": str(tmp_path)}, [], [], report(runs[0] / "final"))
    assert "no longer in the data" in Reader(page(changed_data)).text


def test_counts_of_the_data_are_those_of_its_rows(runs):
    data = report(runs[0] / "final")["data"]
    assert [data[name][key] for name in ("train", "val") for key in ("rows", "sequences")] == [15, 15, 3, 3]
    for counts in data.values():
        assert sum(counts["lengths"]["counts"]) == counts["sequences"]
        assert counts["truncated"] == counts["cut_before_response"] == counts["unsupervised"] == 0


def test_report_command_rebuilds_a_page(runs, capsys):
    path = runs[0] / "final" / "report.html"
    before = path.read_bytes()
    path.unlink()
    assert main(["report", str(runs[0])]) == 0
    assert capsys.readouterr().out == f"{path}\n"
    assert path.read_bytes() == before


def test_report_command_writes_over_pages_only(runs, tmp_path, capsys):
    out = tmp_path / "page.html"
    for content, code in ((b"step,loss\n", 1), (b"<!DOCTYPE html>\nold", 0), (b"", 0)):
        out.write_bytes(content)
        assert main(["report", str(runs[0]), "--out_file", str(out)]) == code
        assert (out.read_bytes() == content) == bool(code)
    assert f"--out_file ({out}) was not written by this command" in capsys.readouterr().err


def test_report_command_compares_runs(runs, tmp_path):
    out = tmp_path / "comparison.html"
    assert main(["report", *map(str, runs), str(runs[1] / "final"), "--out_file", str(out)]) == 0
    html = read(out)
    assert html.curves == [2, 2, 2, 3, 3, 3]  # validation and training loss of each
    for text in (
        "<script>run",
        "other (1)",
        "other (2)",
        "lora_r",
        "train.learning_rate",
        report(runs[0] / "final")["warning"],
    ):
        assert text in html.text
    assert "lora_alpha" not in html.text
    assert f"{report(runs[1] / 'final')['val_loss']:.4f}" in html.text


def test_unfinished_run_is_shown_as_far_as_it_is(runs, tmp_path):
    for name in ("metrics.csv", "hyperparameters.yaml"):
        (tmp_path / name).write_bytes((runs[0] / name).read_bytes())
    assert "This run has not finished." in Reader(page(RunFiles.read(tmp_path))).text


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere"], "no run in nowhere (expected metrics.csv): name the --out_dir of a run"),
        ([], "missing --runs; see litlora report --help"),
        (
            ["a", "--runs", "b"],
            "RUN [RUN ...] (a) and --runs are the same setting: give one of them; see litlora report --help",
        ),
    ],
)
def test_wrong_runs_are_one_sentence(arguments, sentence, capsys):
    assert main(["report", *arguments]) in (1, 2)
    assert capsys.readouterr().err.splitlines()[-1] == f"litlora: {sentence}"


def test_foreign_report_is_one_sentence(runs, tmp_path, capsys):
    (tmp_path / "final").mkdir()
    for name in ("metrics.csv", "hyperparameters.yaml"):
        (tmp_path / name).write_bytes((runs[0] / name).read_bytes())
    (tmp_path / "final" / "report.json").write_text('{"data": {"train": 1}}')
    assert main(["report", str(tmp_path)]) == 1
    assert "is not as litlora writes it" in capsys.readouterr().err


def test_a_run_that_gets_better_has_no_warning(adapter):
    assert report(adapter)["warning"] is None


def test_smoothing_leaves_a_straight_line_where_it_is():
    line = [(float(x), 5 - 0.01 * x) for x in range(500)]
    assert all(abs(y - z) < 1e-9 for (_, y), (_, z) in zip(line, smoothed(line), strict=True))
    noisy = [(x, y + (0.5 if x % 2 else -0.5)) for x, y in line]
    assert all(abs(y - z) < 0.05 for (_, y), (_, z) in zip(line[20:-20], smoothed(noisy)[20:-20], strict=True))


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.61, 7.7, [0, 2, 4, 6, 8]),
        (0, 0.002, [0, 0.0005, 0.001, 0.0015, 0.002]),
        (1.49, 1.53, [1.49, 1.5, 1.51, 1.52, 1.53]),
        (3, 3, [1, 2, 3, 4, 5]),
    ],
)
def test_ticks_are_round_and_enclose_the_values(low, high, expected):
    axis = round_axis(low, high)
    assert list(axis.ticks) == expected
    assert axis.low <= low <= high <= axis.high
    assert ticks(0, 10) == [0, 2, 4, 6, 8, 10]


def test_a_long_curve_is_thinned_and_keeps_its_peak():
    points = [(x, 100.0 if x == 5001 else x % 7) for x in range(10000)]
    assert len(thinned(points)) <= MOST_POINTS + 2
    assert (5001, 100.0) in thinned(points)


def test_constant_curve_and_a_single_step_are_drawn():
    assert "polyline" in line_chart([Curve("loss", "raw", [(3, 0.0)])])


def test_page_without_metrics_still_opens():
    assert "svg" not in [tag for tag, _ in Reader(page(RunFiles("run", {}, [], [], {}))).elements]


def test_changed_settings_have_dotted_names():
    assert changed({"a": 1, "t": {"b": 2, "c": 3}}, {"a": 1, "t": {"b": 2, "c": 4}}) == {"t.c": 3}
