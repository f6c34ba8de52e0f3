"""The checkpoint's chat template in a process of its own, whose limits hold in C code as well."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

from litlora.data.prompts.chat_template import ChatTemplate, ChatTemplateError
from litlora.errors import LitLoraError
from litlora.utils.limited_process import LimitedProcess, serve


class IsolatedTemplate:
    """A chat template that another process compiles and renders; its arguments are those of ChatTemplate."""

    def __init__(
        self,
        source: str,
        tokens: Mapping[str, str | None],
        variables: Mapping[str, Any] | None = None,
        date: datetime | None = None,
    ) -> None:
        self.reads_date = "strftime_now" in source
        self._arguments = [source, dict(tokens), variables, date.isoformat() if date else None]
        self._ask()

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool, tools: Sequence[Any] | None = None
    ) -> str:
        """Return the text of a conversation."""
        return self._ask(messages=messages, add_generation_prompt=add_generation_prompt, tools=tools)

    def _ask(self, **conversation: object) -> str:
        """Render a conversation, or only compile the template."""
        try:
            answer = PROCESS.ask({"template": self._arguments, "conversation": conversation})
        except (MemoryError, TimeoutError) as error:
            # Not as a ChatTemplateError, after which a style tries other conversations.
            raise LitLoraError(str(ChatTemplateError(f"cannot be used: {error}"))) from error
        if "limit" in answer:
            raise LitLoraError(str(ChatTemplateError(answer["limit"])))
        if "error" in answer:
            raise ChatTemplateError(answer["error"])
        return str(answer["text"])


PROCESS = LimitedProcess("litlora.data.prompts.template_process")


@lru_cache(maxsize=8)
def _compiled(arguments: str) -> ChatTemplate:
    source, tokens, variables, date = json.loads(arguments)
    return ChatTemplate(source, tokens, variables, datetime.fromisoformat(date) if date else None)


def _answer(request: dict[str, Any]) -> dict[str, str]:
    try:
        template = _compiled(json.dumps(request["template"]))
        conversation = request["conversation"]
        return {"text": template.render(**conversation) if conversation else ""}
    except ChatTemplateError as error:
        is_limit = isinstance(error.__cause__, MemoryError | TimeoutError)
        return {"limit" if is_limit else "error": error.reason}


if __name__ == "__main__":
    serve(_answer)
