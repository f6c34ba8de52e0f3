"""The page of a run opens without network, and no text of a run becomes markup."""

from html.parser import HTMLParser

from helpers.runs import finetune, metrics, report

from litlora.report.chart import smoothed
from litlora.report.page import changed, page, read_metrics


class Reader(HTMLParser):
    """Collects the elements with their attributes, and the text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements, self.text = [], ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def test_a_run_that_gets_worse_warns_and_draws_its_page(tiny, data_dir, tmp_path, capsys):
    flags = ["--train.learning_rate", 10, "--train.global_batch_size", 5, "--train.lr_warmup_steps", 0]
    final = finetune(tiny, data_dir, tmp_path / "<script>run", *flags)
    figures, rows = report(final), metrics(final.parent)
    assert figures["start_val_loss"] == float(rows[0]["val_loss"])
    assert figures["val_loss"] > figures["start_val_loss"]
    assert "lower --train.learning_rate (10)" in figures["warning"]
    assert f"warning: {figures['warning']}" in capsys.readouterr().err
    html = (final / "report.html").read_text(encoding="utf-8")
    read = Reader(html)
    assert "http" not in html.replace(str(tmp_path), "")
    assert not {"src", "href"} & {name for _, attributes in read.elements for name in attributes}
    assert "script" not in [tag for tag, _ in read.elements]
    assert "<script>run" in read.text
    assert figures["warning"] in read.text
    assert "train.learning_rate" in read.text
    assert "train.epochs" not in read.text
    curves = [attributes["points"].split() for tag, attributes in read.elements if tag == "polyline"]
    assert [len(points) for points in curves] == [3, 3, 2, 3]


def test_a_run_that_gets_better_has_no_warning(adapter):
    assert report(adapter)["warning"] is None


def test_smoothing_keeps_a_constant():
    assert all(abs(y - 3) < 1e-9 for _, y in smoothed([(x, 3.0) for x in range(50)]))


def test_page_without_metrics_still_opens():
    figures = {"adapter": "LoRA", "warning": None, "findings": [], "versions": {}}
    assert "svg" not in [tag for tag, _ in Reader(page("run", {}, read_metrics(""), figures)).elements]


def test_changed_settings_have_dotted_names():
    assert changed({"a": 1, "t": {"b": 2, "c": 3}}, {"a": 1, "t": {"b": 2, "c": 4}}) == {"t.c": 3}
