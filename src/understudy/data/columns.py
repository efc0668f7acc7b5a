"""Column names: which format a row has, by the names of its columns. This is the only file that knows them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..registry import did_you_mean
from .errors import BadRow

PAIRS = {"prompt": "completion", "instruction": "output", "question": "answer"}  # prompt column: answer column
COLUMNS = ["messages", "prompt", "completion", "instruction", "input", "output", "question", "answer", "text", "tools"]
FORMATS = "messages, prompt (+ completion), instruction (+ input, output), question (+ answer), text"

# Other names, which are recognised where only one column can be meant.
CONVERSATIONS = ("messages", "conversations", "conversation")
PROMPTS = ("prompt", "instruction", "question", "query", "problem", "input")
ANSWERS = ("completion", "output", "answer", "response", "solution")
CONTEXTS = ("input", "context")  # of an instruction
SYSTEMS = ("system", "system_prompt")
MEANINGFUL = {*CONVERSATIONS, *PROMPTS, *ANSWERS, *CONTEXTS, *SYSTEMS, "tools", "history", "images", "image"}
MEANINGFUL |= {"chosen", "rejected", "targets", "text"}
DEEPEST = 8  # levels of columns with dotted names


@dataclass(frozen=True)
class Recognized:
    """The columns that are read, each None where there is none, and the format that they make."""

    kind: str  # messages, prompt, instruction, question or text
    prompt: str
    answer: str | None = None
    context: str | None = None
    system: str | None = None

    def columns(self, is_chat: bool) -> set[str | None]:
        """The columns that are read, where the chat template does or does not render them."""
        return {self.prompt, self.answer, self.context, *((self.system, "tools") if is_chat else ())}

    def other_names(self) -> dict[str, str]:
        """The columns that have other names than the format's own: from the format's name to the column's."""
        own = {"messages": (self.prompt, "messages"), "text": (self.prompt, "text")}
        names = [
            own.get(self.kind, (self.prompt, self.kind)),
            (self.answer, PAIRS.get(self.kind)),
            (self.context, "input"),
        ]
        return {own: column for column, own in names if column is not None and own is not None and column != own}


def recognize(where: str, columns: Iterable[str], renamed: Mapping[str, str]) -> Recognized:
    """The format of a row with these columns, of which those in `renamed` were named by the user.

    A format with an answer takes precedence over one without. A row with a prompt column and an answer column that
    belong to different formats is understood if it has only one of each. Capitals and spaces around a name are ignored.

    Raises:
        BadRow: if there is no such format, or if several columns could be the prompt or the answer.
    """
    own_names = by_usual_names(columns)
    recognized = _recognize(where, own_names, renamed)
    parts = {name: getattr(recognized, name) for name in ("prompt", "answer", "context", "system")}
    return replace(recognized, **{name: own_names.get(usual, usual) for name, usual in parts.items()})


def by_usual_names(columns: Iterable[str]) -> dict[str, str]:
    """The columns by the names that formats know: "Prompt" and " prompt " by prompt, where no other column could be it.

    Columns that no format knows have their own names.
    """
    names = list(columns)
    usual = [name.strip().casefold() for name in names]
    return {
        known if known in MEANINGFUL and known not in names and usual.count(known) == 1 else name: name
        for name, known in zip(names, usual, strict=True)
    }


def _recognize(where: str, own_names: Mapping[str, str], renamed: Mapping[str, str]) -> Recognized:
    """As `recognize`, of columns by their usual names; the result has usual names too."""
    present = list(own_names)
    kinds = ["messages", *PAIRS, "text"]
    # Formats with a column in `renamed` take precedence over formats whose columns happen to be there.
    kinds = [kind for kind in kinds if not renamed.keys().isdisjoint(columns_of(kind))] or kinds
    conversations = [] if renamed and "messages" not in renamed else [x for x in CONVERSATIONS if x in present]
    if conversations and "messages" in kinds:
        return Recognized("messages", conversations[0], system=_first(SYSTEMS, present))
    for kind in kinds:
        if kind in present and PAIRS.get(kind) in present:
            return _pair(kind, kind, PAIRS[kind], present)
    if not renamed:
        recognized = _by_other_names(where, own_names)
        if recognized is not None:
            return recognized
    for kind in kinds:
        if kind in present:
            return Recognized("text", "text") if kind == "text" else _pair(kind, kind, None, present)
    names = [column for kind in kinds for column in columns_of(kind)]
    guesses = [guess for column in present if (guess := did_you_mean(column, names))]
    raise BadRow(
        f"{where}: no supported format ({FORMATS}) has the columns {quoted(own_names.values())}; "
        f"name yours with columns or template{guesses[0] if guesses else ''}"
    )


def answer_column(columns: Mapping[str, Any], renamed: Mapping[str, str]) -> str | None:
    """The column of the answer to a template's prompt: one that the user named, or the first of those there."""
    names = [*(name for name in ANSWERS if name in renamed), *ANSWERS]
    own_names = by_usual_names(columns)
    return next((own_names[name] for name in names if name in own_names), None)


def columns_of(kind: str) -> set[str]:
    """The names that a format's columns have."""
    return {kind, *([PAIRS[kind]] if kind in PAIRS else []), *(["input"] if kind == "instruction" else [])}


def quoted(columns: Iterable[str]) -> str:
    """The names in quotes, for errors; of many, the first ones."""
    names = list(columns)
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return (", ".join(f'"{column}"' for column in names[:20]) or "(none)") + more


def dotted_columns(columns: Mapping[str, Any], depth: int = 1) -> dict[str, Any]:
    """The values inside columns that hold objects, by dotted names such as translation.de."""
    values: dict[str, Any] = {}
    for name, value in columns.items():
        if isinstance(value, Mapping) and depth < DEEPEST:
            inner = {str(key): x for key, x in value.items()}
            values |= {f"{name}.{key}": x for key, x in {**inner, **dotted_columns(inner, depth + 1)}.items()}
    return values


def _by_other_names(where: str, own_names: Mapping[str, str]) -> Recognized | None:
    """The format of a prompt and an answer of other names or of different formats; None without both."""
    present = list(own_names)
    prompts = [name for name in PROMPTS if name in present]
    if "instruction" in prompts and "input" in prompts:
        prompts.remove("input")
    answers = [name for name in ANSWERS if name in present]
    if not prompts:
        return None
    if answers and (len(prompts) > 1 or len(answers) > 1):
        role, names = ("prompt", prompts) if len(prompts) > 1 else ("answer", answers)
        raise BadRow(
            f"{where}: several columns could be the {role}: {quoted(own_names[name] for name in names)}; name the one "
            f"you mean, such as columns: {{prompt: {own_names[prompts[0]]}, completion: {own_names[answers[0]]}}}"
        )
    if not answers and prompts[0] in PAIRS:
        return None
    kind = prompts[0] if prompts[0] in PAIRS else "prompt"
    return _pair(kind, prompts[0], answers[0] if answers else None, present)


def _pair(kind: str, prompt: str, answer: str | None, present: list[str]) -> Recognized:
    context = _first(CONTEXTS, present) if kind == "instruction" else None
    return Recognized(kind, prompt, answer, context, _first(SYSTEMS, present))


def _first(names: Iterable[str], present: list[str]) -> str | None:
    return next((name for name in names if name in present), None)
