"""chat: a conversation in a terminal; a line that begins with a slash is a command."""

import json
import re
from contextlib import suppress
from pathlib import Path

from litlora.args.inference import ChatArgs
from litlora.commands.prompt import find_for_chat
from litlora.errors import LitLoraError
from litlora.generation.conversation import Conversation
from litlora.generation.llm import LLM
from litlora.generation.model_files import ModelFiles
from litlora.utils.console import log, log_error, printable, write
from litlora.utils.files import check_absent, write_atomically
from litlora.utils.signals import interruptible

HELP = """\
/reset         forget the conversation
/system TEXT   set the system message; without TEXT, remove it
/save FILE     write the conversation as a row of JSONL
/help          show this
/quit          end, as Ctrl-D does; Ctrl-C stops an answer"""
COMMAND = re.compile(r"(/[a-z]+)(?:\s+(.*))?", re.DOTALL)


def chat(args: ChatArgs, files: ModelFiles | None = None) -> None:
    """Answer what a person types, until they quit; `files` is given if they have been read."""
    files = files or find_for_chat(args)
    from prompt_toolkit import PromptSession  # an extra

    llm = LLM.open(files)
    llm.prepare(args.max_new_tokens)
    conversation = Conversation(llm.gpt, files, args, args.system)
    log("/help lists the commands, /quit ends")
    typed: PromptSession[str] = PromptSession("> ")
    with suppress(EOFError):  # Ctrl-D
        while True:
            try:
                if (line := typed.prompt().strip()) == "/quit":
                    return
                respond(conversation, line)
            except KeyboardInterrupt:  # while a line is typed, or before an answer begins
                conversation.session.rewind(0)


def respond(conversation: Conversation, line: str) -> None:
    """Carry out a command or answer a message; an error of the user's is printed."""
    command = COMMAND.fullmatch(line)
    try:
        if command:
            carry_out(conversation, command[1], (command[2] or "").strip())
        elif line:
            answer(conversation, line)
    except LitLoraError as error:
        log_error(str(error))


def carry_out(conversation: Conversation, command: str, text: str) -> None:
    """Carry out a command."""
    match command:
        case "/help":
            log(HELP)
        case "/reset":
            conversation.reset()
            log("the conversation starts anew")
        case "/system":
            conversation.system = text
            log("the system message is set" if text else "there is no system message")
        case "/save":
            save(conversation, text)
        case _:
            raise LitLoraError(f"there is no {command}: /help lists the commands")


def save(conversation: Conversation, name: str) -> None:
    """Write a conversation as a row that `prepare_json` reads."""
    if not name:
        raise LitLoraError("/save needs the name of a file")
    if not conversation.messages:
        raise LitLoraError("there is nothing to save yet")
    path = Path(name).expanduser()
    check_absent(path, "/save")
    row = {"messages": [message.to_json() for message in conversation.all_messages]}
    write_atomically({path: (json.dumps(row, ensure_ascii=False) + "\n").encode()})
    log(f"conversation in {path}")


def answer(conversation: Conversation, text: str) -> None:
    """Print the answer to a message as it is generated, until Ctrl-C."""
    pieces = conversation.say(text)
    with interruptible() as is_interrupted:
        for piece in pieces:
            write(shown(piece))
            if is_interrupted():
                break
    pieces.close()
    write("\n")


def shown(text: str) -> str:
    """Return a text that cannot control the terminal."""
    return "\n".join(printable(line) for line in text.expandtabs(4).split("\n"))
