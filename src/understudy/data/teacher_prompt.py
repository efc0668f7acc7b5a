"""The prompt that only the teacher reads: a hint, the solution, documents, a system prompt (privileged context)."""

from dataclasses import replace

from .chat import ChatTemplate
from .errors import BadRow, SourceRow, check_text
from .formats import Document, Row
from .messages import Message, is_conversation, read_messages
from .prompt_template import PromptTemplate, row_columns


class TeacherPrompt:
    """Writes the teacher's prompts of rows.

    In a template `{prompt}` is the student's prompt (in a chat the last message of the user), `{completion}` the first
    reference, and any other name a column.

    Args:
        prompt: a template, or the name of a column that holds a text or messages. In a chat a text takes the place of
            the last message of the user, and messages that of the conversation.
        system: a template of a system message, in place of the student's; for chats.

    Raises:
        DataError: for what is not a format string.
    """

    def __init__(self, prompt: str | None, system: str | None = None) -> None:
        self.prompt, self.system = prompt, system
        self._templates = {text: PromptTemplate(text) for text in (prompt, system) if text is not None and "{" in text}

    def add_to(self, row: Row | Document, chat_template: ChatTemplate) -> Row:
        """The row with its teacher's prompt.

        Raises:
            BadRow: for a column that is missing or holds no text, and for a row whose prompt cannot be replaced.
        """
        if isinstance(row, Document):
            raise BadRow(f"{row.where}: a teacher's prompt is for rows with a prompt, and this is running text")
        if row.ids is not None:
            raise BadRow(f"{row.where}: a teacher's prompt is for rows of texts, and this one holds token ids")
        if row.turns:
            raise BadRow(f"{row.where}: a teacher's prompt is for one answer: set train_on: last")
        if row.conversation is not None:
            messages = self._messages(row, row.conversation["messages"])
            prompt = chat_template.render_prompt(row.where, messages, row.conversation["tools"])
            return replace(row, teacher_prompt=prompt)
        if self.system is not None:
            raise BadRow(f"{row.where}: teacher_system is for chats, and this prompt is plain text: use teacher_prompt")
        assert self.prompt is not None
        return replace(row, teacher_prompt=self._text(row, self.prompt, row.prompt))

    def _messages(self, row: Row, messages: list[Message]) -> list[Message]:
        places = [place for place, message in enumerate(messages) if message["role"] == "user"]
        if self.prompt is not None and is_conversation(row.columns.get(self.prompt)):
            messages = read_messages(row.where, self.prompt, row.columns[self.prompt], ("user", "tool"))
        elif self.prompt is not None:
            if not places:
                raise BadRow(f"{row.where}: teacher_prompt replaces the user's last message, and there is none")
            last = places[-1]
            text = self._text(row, self.prompt, messages[last]["content"])
            messages = [*messages[:last], {**messages[last], "content": text}, *messages[last + 1 :]]
        if self.system is None:
            return messages
        text = self._text(row, self.system, messages[places[-1]]["content"] if places else "", constant=True)
        has_system = messages[0]["role"] in ("system", "developer")
        return [{"role": "system", "content": text}, *messages[has_system:]]

    def _text(self, row: Row, text: str, prompt: str, constant: bool = False) -> str:
        """The filled template; without braces the column of that name, or the text itself if it may be `constant`."""
        template = self._templates.get(text)
        if template is not None:
            texts = {"prompt": prompt, **({"completion": row.references[0]} if row.references else {})}
            return template.fill(SourceRow(row.where, {**row.columns, **texts}))
        if constant:
            return text
        if text not in row.columns:
            columns = row_columns(SourceRow(row.where, row.columns), text)
            raise BadRow(f'{row.where}: teacher_prompt names the column "{text}", but {columns}; a template has braces')
        return check_text(row.where, text, row.columns[text])
