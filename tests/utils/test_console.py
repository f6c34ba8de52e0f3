import pytest

from litlora.utils.console import log, log_error, output, printable


def test_messages_go_to_stderr_and_results_to_stdout(capsys):
    log("loading")
    output("done")
    assert capsys.readouterr() == ("done\n", "loading\n")


def test_lines_of_a_message_stay_lines_and_those_of_an_error_do_not(capsys):
    log("one\ntwo")
    log_error("one\ntwo")
    assert capsys.readouterr().err == "one\ntwo\nlitlora: one\\ntwo\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [("\x1b[2J", "\\x1b[2J"), ("a\rb", "a\\rb"), ("\u202e", "\\u202e"), ("\ud800", "\\ud800"), ("é 🚪", "é 🚪"),
     ("می\u200cخواهم", "می\u200cخواهم"), ("👩\u200d🚀", "👩\u200d🚀")],
    ids=ascii,
)  # fmt: skip
def test_control_characters_are_escaped_and_letters_are_not(text, expected):
    assert printable(text) == expected


def test_an_error_quotes_no_hub_token(capsys):
    log_error("--config hf_aBcDeFgHiJkLmN cannot be read")
    assert capsys.readouterr().err == "litlora: --config hf_... cannot be read\n"
