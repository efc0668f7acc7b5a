"""Teachers, one file per kind; the file's name is the teacher's name in a recipe."""

from collections.abc import Callable, Set
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from ..batch import Author
from ..models.load import check_tokenizers, check_vocabulary, load_config, load_tokenizer
from ..recipe import RecipeError
from ..registry import Registry
from ..teacher import Capability, Teacher, TeacherError, covers, describe

TEACHERS: Registry[Teacher] = Registry("teacher", __name__, Teacher)


def check_teacher(teacher: Teacher | None, required: frozenset[Capability], authors: Set[Author], method: str) -> None:
    """Refuse a teacher that cannot give `method` what it requires, for responses of these authors.

    Raises:
        ValueError: with the remedy.
    """
    check_provides(teacher, required, method)
    if required:
        check_scores_responses(teacher, authors, method)


def check_provides(teacher: Teacher | None, required: frozenset[Capability], method: str) -> None:
    """Refuse a teacher that does not provide what a method requires.

    Raises:
        ValueError: naming what the method requires, and the teachers that provide it.
    """
    if covers(frozenset() if teacher is None else teacher.provides, required):
        return
    provided = "there is no teacher" if teacher is None else f"this teacher provides {describe(teacher.provides)}"
    classes = {name: TEACHERS.get(name) for name in TEACHERS.builtin_names()}
    suitable = [
        f"{name} with other arguments" if isinstance(teacher, cls) else name
        for name, cls in classes.items()
        if covers(cls.provides, required)
    ]
    raise ValueError(
        f"{method} requires a teacher that provides {describe(required)}, and {provided}; choose another method, or "
        f"one of the teachers that provide it: {', '.join(suitable)}"
    )


def check_scores_responses(teacher: Teacher | None, authors: Set[Author], method: str) -> None:
    """Refuse a teacher that has scores of stored examples only, where a method trains on responses generated anew.

    Raises:
        ValueError: naming the responses, with the remedy.
    """
    if teacher is None or teacher.scores_new_responses or not (new := authors - {"dataset", "corpus"}):
        return
    writers = " and ".join(sorted(new))
    raise ValueError(
        f"{method} trains on responses of the {writers} that are generated during the run, and this teacher has only "
        f"stored scores: write them before with `understudy cache … --responses {min(new)}` and train on its "
        "responses.jsonl with kd, or use a local teacher"
    )


def check_tokens(
    teacher: Teacher,
    tokenizer: Any,
    scores: bool = True,
    attempt: Callable[[str], AbstractContextManager[object]] = lambda topic: nullcontext(),
) -> Any:
    """Refuse a teacher that does not have the student's tokens, and connect with one outside this process.

    Args:
        teacher: one without parts.
        tokenizer: the student's; None where it could not be loaded: what does not depend on it is checked.
        scores: is the teacher asked at all? If not, tokenizers alone are compared.
        attempt: of the topic "tokens" or "teacher": the context of each check, which may go on after an error.

    Returns:
        The configuration of the teacher's model, without weights; None for one that is not loaded by name.

    Raises:
        RecipeError: naming the first difference, or why a teacher outside this process cannot be used.
    """
    config = None
    if tokenizer is not None and teacher.tokenizer_name is not None:
        with attempt("tokens"):
            check_tokenizers(tokenizer, load_tokenizer(teacher.tokenizer_name))
    if scores and teacher.model_name is not None:
        with attempt("teacher"):
            config = load_config(teacher.model_name)
            if tokenizer is not None:
                check_vocabulary(tokenizer, config, "the teacher has")
    if scores and tokenizer is not None:
        with attempt("teacher"):
            try:
                teacher.setup(tokenizer)
            except (ValueError, TeacherError) as error:
                raise error if isinstance(error, RecipeError) else RecipeError(str(error)) from None
    return config
