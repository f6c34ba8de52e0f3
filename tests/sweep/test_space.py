"""The search space of a sweep: which combinations it stands for, and what is refused."""

import pytest

from litlora.args.sweep import SweepArgs
from litlora.cli.parser import Call, parse
from litlora.errors import LitLoraError
from litlora.sweep.plan import Plan
from litlora.sweep.space import Space, words

BASE = {"checkpoint_dir": "base", "data_dir": "data"}


def combinations(search: dict[str, object]) -> list[dict[str, object]]:
    space = Space.of(search)
    return [space.settings(point) for point in space.grid()]


def plan(search: dict[str, object], **settings: object) -> Plan:
    return Plan.read(SweepArgs(search=search, base=BASE, **settings))


def test_grid_holds_every_combination_once():
    found = combinations({"lora_r": [8, 16], "lora_mlp": [False, True], "lora_targets": [["q_proj", "k_proj"]]})
    targets = ["q_proj", "k_proj"]
    assert found == [{"lora_r": r, "lora_mlp": mlp, "lora_targets": targets} for r in (8, 16) for mlp in (False, True)]


def test_a_multiple_follows_its_flag_wherever_it_stands():
    search = {"lora_alpha": {"times": "lora_r", "values": [0.5, 2]}, "lora_r": [8, 16]}
    assert [(each["lora_r"], each["lora_alpha"]) for each in combinations(search)] == [
        (8, 4),
        (16, 8),
        (8, 16),
        (16, 32),
    ]
    assert all(isinstance(each["lora_alpha"], int) for each in combinations(search))
    space = Space.of(search)
    assert [space.shown(point)["lora_alpha"] for point in space.grid()] == [4, 8, 16, 32]


def test_alternatives_bring_settings_of_their_own():
    search = {"layers": {"mlp": {"lora_mlp": True}, "long": {"lora_r": 4, "train": {"epochs": 2}}}}
    assert combinations(search) == [{"lora_mlp": True}, {"lora_r": 4, "train.epochs": 2}]


def test_an_optimizer_comes_before_what_sets_a_part_of_it():
    search = {"optimizer.init_args.weight_decay": [0.1], "optimizer": ["SGD"]}
    first = plan(search).first
    assert first.optimizer == {"class_path": "SGD", "init_args": {"weight_decay": 0.1}}


def test_random_draws_lie_within_the_ranges_and_repeat_with_the_command():
    search = {"train.learning_rate": {"low": 1e-5, "high": 1e-3, "log": True}, "lora_r": {"low": 2, "high": 5}}
    points = Space.of(search).draws(200)
    assert points == Space.of(search).draws(200)
    assert points[:50] == Space.of(search).draws(50)
    assert {point["lora_r"] for point in points} == {2, 3, 4, 5}
    rates = [float(point["train.learning_rate"]) for point in points]
    assert all(1e-5 <= rate <= 1e-3 for rate in rates)
    assert 0.35 < sum(rate < 1e-4 for rate in rates) / len(rates) < 0.65  # the middle of the logarithms


def test_random_draws_of_lists_repeat_no_combination():
    points = Space.of({"lora_r": [1, 2, 3], "lora_mlp": [True, False]}).draws(100)
    assert len({tuple(point.items()) for point in points}) == len(points) == 6


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("train.max_norm", None), ("lora_mlp", True), ("train.learning_rate", 1e-05), ("lora_r", 7),
        ("lora_targets", ["q_proj", "v_proj"]), ("lora_rank_pattern", {"q_proj": 4}), ("prompt_style", "a b"),
        ("prompt_style", "--x"), ("prompt_style", "# y"),
    ],
)  # fmt: skip
def test_words_give_the_parser_the_value_back(name, value):
    call = parse(["finetune_lora", *words({**BASE, name: value})])
    assert isinstance(call, Call)
    section, _, key = name.rpartition(".")
    assert getattr(getattr(call.args, section) if section else call.args, key) == value


@pytest.mark.parametrize(
    ("search", "sentence"),
    [
        ({"lora_rr": [8]}, "--search: unrecognized --lora_rr: did you mean --lora_r?"),
        ({"lora_r": [8, "many"]}, "--search: --lora_r (many) must be a whole number"),
        ({"lora_r": [8, 0]}, "--search: --lora_r (0) must be at least 1"),
        ({"layers": {"a": {"lora_mpl": True}}}, "--search: unrecognized --lora_mpl: did you mean --lora_mlp?"),
        ({"lora_r": []}, "--search, lora_r: it must be a list of values"),
        ({"lora_r": 8}, "--search, lora_r: it must be a list of values"),
        ({"lora_r": [8, 8]}, "--search, lora_r: a value is listed twice"),
        ({"lora_r": {"low": 2, "high": 9}}, "--search, lora_r: a grid needs a list of values"),
        ({"lora_r": {"low": 9, "high": 2}}, "--search, lora_r: low (9) and high (2) must be numbers"),
        ({"lora_r": {"low": 0, "high": 2, "log": True}}, "--search, lora_r: beside low and high"),
        ({"lora_alpha": {"times": "lora_r", "values": [2]}}, "lora_alpha: times (lora_r) must be another flag"),
        ({"lora_alpha": {"times": "lora_r", "values": ["x"]}, "lora_r": [8]}, "lora_alpha: the values (x) must be"),
        ({"lora_alpha": {"times": "quantize", "values": [2]}, "quantize": [None]}, "a number in all combinations"),
        ({"seed": [1, 2]}, "--search, seed: it cannot vary: list the seeds in seeds"),
        ({"a": {"b": {"out_dir": "x"}}}, "--search, out_dir: it cannot vary"),
    ],
)  # fmt: skip
def test_a_wrong_search_space_is_refused_in_one_sentence(search, sentence):
    with pytest.raises(LitLoraError) as caught:
        plan(search)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code in (1, 2)


def test_optuna_is_named_where_it_is_not_installed(monkeypatch):
    monkeypatch.setattr("litlora.sweep.plan.find_spec", {}.get)
    with pytest.raises(LitLoraError, match=r"sweep needs optuna: install it with: pip install 'litlora\[sweep\]'"):
        plan({"lora_r": [8]})


def test_flags_of_evaluate_are_checked():
    with pytest.raises(LitLoraError, match=r"--evaluate: --metrics \(f3\) must be some of loss, exact_match"):
        plan({"lora_r": [8]}, evaluate={"metrics": ["loss", "f3"]})
    with pytest.raises(LitLoraError, match="--evaluate: --metrics accuracy needs --choices"):
        plan({"lora_r": [8]}, evaluate={"metrics": "accuracy"})
    assert plan({"lora_r": [8]}, evaluate={"metrics": "exact_match,loss"}).metrics == (
        "loss",
        "perplexity",
        "exact_match",
    )
