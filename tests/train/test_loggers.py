"""Runs log to TensorBoard, W&B and MLflow at once, without secrets; a logger that is missing or fails costs no run."""

from importlib.util import find_spec
from pathlib import Path

import pytest
from helpers.runs import finetune, metrics
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from litlora.__main__ import main
from litlora.train.loggers import OPENERS, Loggers, Place, loggable

TOKEN = "hf_sEcReTsEcReTsEcReT"


@pytest.fixture(scope="module")
def run(tiny, data_dir, tmp_path_factory) -> Path:
    """Return a run that logs to TensorBoard, and that was resumed after its second step."""
    out = tmp_path_factory.mktemp("logged") / "run"
    flags = ["--train.global_batch_size", 5, "--train.save_interval", 2, "--logger_name", "csv,tensorboard"]
    finetune(tiny, data_dir, out, *flags)
    finetune(tiny, data_dir, out, *flags, "--resume", out / "step-000002", "--overwrite", "true")
    return out


def test_tensorboard_has_each_step_of_metrics_once(run):
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    expected = {int(row["step"]): float(row["loss"]) for row in metrics(run) if row["loss"]}
    assert {event.step: event.value for event in events.Scalars("loss")} == pytest.approx(expected)
    assert len(events.Scalars("loss")) == len(expected) == 3
    assert [event.step for event in events.Scalars("val_loss")] == [0, 3]
    assert {"learning_rate", "grad_norm", "tokens_per_second", "memory_gb"} <= set(events.Tags()["scalars"])


@pytest.mark.parametrize("name", [name for name in OPENERS if find_spec(name) is None] or ["none"])
def test_missing_package_is_one_sentence_before_anything_is_read(name, tmp_path, capsys):
    if name == "none":
        pytest.skip("all loggers are installed")
    arguments = ["--checkpoint_dir", "nowhere", "--data_dir", "nowhere", "--out_dir", str(tmp_path / "out")]
    assert main(["finetune_lora", *arguments, "--logger_name", name]) == 1
    expected = f"litlora: --logger_name {name} needs a package: pip install 'litlora[{name}]'"
    assert capsys.readouterr().err.splitlines()[-1] == expected
    assert not (tmp_path / "out").exists()


def test_secrets_are_hidden_and_settings_have_dotted_names():
    settings = {"train": {"epochs": 3}, "prompt_style_variables": {"note": f"say {TOKEN}"}, "logger_name": ["csv"]}
    assert loggable(settings) == {
        "train.epochs": 3,
        "prompt_style_variables.note": "say hf_...",
        "logger_name": "['csv']",
    }


class Failing:
    """A logger whose server is gone."""

    def log_metrics(self, *_: object) -> None:
        raise ConnectionError(f"no connection for\n{TOKEN}")


def test_failing_logger_is_closed_with_a_warning(capsys):
    loggers = Loggers({"mlflow": Failing()})
    loggers.log({"step": 1, "loss": 2.0})
    loggers.log({"step": 2, "loss": 2.0})
    loggers.close()
    assert capsys.readouterr().err == "warning: --logger_name mlflow stops logging: no connection for hf_...\n"


@pytest.mark.filterwarnings("ignore")  # of sqlalchemy, in mlflow
@pytest.mark.skipif(find_spec("mlflow") is None, reason="mlflow is an extra")
def test_mlflow_has_the_metrics(tmp_path):
    from mlflow import MlflowClient

    log_two_steps("mlflow", tmp_path)
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (found,) = client.search_runs([client.get_experiment_by_name("litlora").experiment_id])
    assert (found.data.metrics, found.data.params["train.epochs"]) == ({"loss": 1.5}, "3")
    assert [point.value for point in client.get_metric_history(found.info.run_id, "loss")] == [2.5, 1.5]


@pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is an extra")
def test_wandb_logs_offline_and_without_the_machine(tmp_path):
    log_two_steps("wandb", tmp_path)
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    content = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert b"train.epochs" in content
    assert TOKEN.encode() not in content
    assert str(Path.cwd()).encode() not in content


def log_two_steps(name: str, out_dir: Path) -> None:
    loggers = Loggers.open([name], Place(out_dir, 0), {"train": {"epochs": 3}, "note": TOKEN})
    loggers.log({"step": 1, "loss": 2.5, "val_loss": None})
    loggers.log({"step": 2, "loss": 1.5, "val_loss": None})
    loggers.close()
    assert name in loggers.opened
