"""Tokenizers, chat templates and stop tokens of student and teachers, side by side."""

import hashlib
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from ...data.chat import ResponseEnd
from ...generation.stop_tokens import stop_ids
from ...models.context_window import context_window
from ...models.load import load_config, load_generation_config, load_tokenizer
from ...models.vocabulary import vocabulary_size
from ...recipe import Recipe
from ..prepare import Prepared, teacher_parts
from .findings import Section, green, yellow

_ROWS = ("tokenizer", "tokens", "embeddings", "context window", "BOS", "EOS", "PAD", "chat template")
_ENDS = ("ends a message", "generation config")


@dataclass(frozen=True)
class _Side:
    """A student or teacher: what it reads and ends with; None where that is unknown."""

    name: str
    origin: str  # name or folder of the tokenizer
    tokenizer: Any
    config: Any
    generation: Any

    @property
    def end(self) -> str | None:
        """The token with which the chat template ends a message."""
        return None if self.tokenizer is None else ResponseEnd.of(self.tokenizer).token

    @property
    def generation_ids(self) -> list[int]:
        ids = getattr(self.generation, "eos_token_id", None)
        return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def tokens(recipe: Recipe, prepared: Prepared) -> Section:
    """The section about tokens; what is refused or warned of while a run is prepared is not repeated."""
    section = Section("tokens")
    sides = _sides(recipe, prepared)
    section.heads = ("", *(side.name for side in sides))
    for label in (*_ROWS, *_ENDS):
        section.rows.append((label, *(_cell(side, label) for side in sides)))
    student, teachers = sides[0], sides[1:]
    if student.tokenizer is None:
        return section
    for teacher in teachers:
        _compare(section, student, teacher)
    _ends(section, recipe, prepared, sides)
    return section


def _sides(recipe: Recipe, prepared: Prepared) -> list[_Side]:
    configs, teacher = prepared.configs, prepared.teacher
    origin = recipe.student.model or (None if teacher is None or recipe.student.layers is None else teacher.model_name)
    generation = None if origin is None else _try(load_generation_config, origin)
    name = recipe.student.tokenizer or recipe.student.model or (None if teacher is None else teacher.tokenizer_name)
    sides = [_Side("student", name or "", configs.tokenizer, configs.student, generation)]
    parts = {} if teacher is None else teacher_parts(recipe, teacher)
    for key, part in parts.items():
        name = "teacher" if key == "teacher" else key.rpartition(".")[2]
        model = part.model_name or (None if part.source is None else part.source.name)
        loaded = [_try(load_config, model), _try(load_generation_config, model)] if model else [None, None]
        sides.append(_Side(name, part.own_tokenizer or "unknown", _try(load_tokenizer, part.own_tokenizer), *loaded))
    return sides


def _try(load: Any, name: str | None) -> Any:
    """What is loaded, or None: `prepare` has refused it already."""
    try:
        return None if name is None else load(name)
    except ValueError:
        return None


def _cell(side: _Side, label: str) -> str:
    tokenizer, config = side.tokenizer, side.config
    if label in ("embeddings", "context window"):
        value = None if config is None else config.vocab_size if label == "embeddings" else context_window(config)
        return "unknown" if config is None else "no limit" if value is None else f"{value:,}"
    if label == "tokenizer":
        return side.origin or "unknown"
    if label == "generation config" and side.generation is None:
        return "unknown" if side.config is None else "none"
    if label == "generation config":
        return ", ".join(_token(tokenizer, i) for i in side.generation_ids) or "names no end"
    if tokenizer is None:
        return "unknown"
    template = tokenizer.chat_template
    values = {
        "tokens": f"{vocabulary_size(tokenizer):,}",
        "chat template": "none" if not template else hashlib.sha256(str(template).encode()).hexdigest()[:8],
        "ends a message": (side.end or "unknown token") if template else "no template",
    }
    return values.get(label) or str(getattr(tokenizer, f"{label.lower()}_token", None) or "none")


def _token(tokenizer: Any, index: int) -> str:
    """A token's text with its id."""
    if tokenizer is None or not 0 <= index < vocabulary_size(tokenizer):
        return str(index)
    return f"{tokenizer.convert_ids_to_tokens(index)} ({index})"


def _compare(section: Section, student: _Side, teacher: _Side) -> None:
    """What is as it should be between student and teacher; `check_tokenizers` warns of the rest."""
    if teacher.tokenizer is None:
        return
    same = student.tokenizer.get_vocab() == teacher.tokenizer.get_vocab()
    count = vocabulary_size(student.tokenizer)
    if same:
        section.findings.append(green(f"student and {teacher.name} have the same {count:,} tokens"))
    if same and student.config is not None and teacher.config is not None:
        rows = sorted({student.config.vocab_size, teacher.config.vocab_size})
        if rows != [count] and rows[0] >= count:
            text = " and ".join(f"{number:,}" for number in rows)
            section.findings.append(green(f"embeddings have {text} rows: those beyond {count:,} take no part"))


def _ends(section: Section, recipe: Recipe, prepared: Prepared, sides: list[_Side]) -> None:
    """How a response ends, and what other programs would do."""
    student, tokenizer, add = sides[0], sides[0].tokenizer, section.findings.append
    if tokenizer.eos_token_id is None:
        return  # which is refused
    models = [SimpleNamespace(generation_config=side.generation) for side in sides]
    ids = list(prepared.sampling.stop_ids) if prepared.sampling is not None and prepared.sampling.stop_ids else None
    ids = ids or stop_ids(tokenizer, *models)
    several = "any of " if len(ids) > 1 else ""
    add(green(f"a response ends with {several}{', '.join(_token(tokenizer, i) for i in ids)}"))
    if student.end is not None and student.end != tokenizer.eos_token:
        end_id = tokenizer.convert_tokens_to_ids(student.end)
        message = f"the chat template ends a message with {student.end}, and the tokenizer's EOS is "
        message += f"{tokenizer.eos_token}: a response of the data ends with "
        message += "the former in conversations and with the latter elsewhere, and generation stops at both"
        if recipe.student.model is not None and end_id not in student.generation_ids:
            message += "; the untrained student may not know the former: watch the share of truncated responses"
            add(yellow(f"{message}, or begin with sft on conversations"))
        else:
            add(green(message))
    if tokenizer.chat_template and student.end is None:
        message = "the chat template ends a message with no token of its own, so that EOS is the only end of a response"
        add(yellow(f"{message}: give the tokenizer another template, or check the first example below"))
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        what = "there is no padding token" if tokenizer.pad_token_id is None else "padding and EOS are the same token"
        add(green(f"{what}, which is fine: masks come from lengths, so EOS is trained"))
