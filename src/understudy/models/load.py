"""Load models, tokenizers and configurations by name or folder, and check that they belong together."""

import errno
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from ..playground.names import resolve as resolve_playground
from ..recipe import RecipeError
from .origin import tokens_of_invalid_config
from .vocabulary import vocabulary_size
from .weights import adapter_config, load_weights

logger = logging.getLogger(__name__)
PROBE = "The quick brown fox, aged 1234.5: naïve café — 東京 ∑ \n\t def f(x): return x**2"

_REMOTE_CODE = (
    "code that comes with a model is never run; to use such a model, read its code, load it in Python yourself "
    "and give it to StudentTrainer or LocalTeacher"
)


@dataclass(frozen=True)
class ModelSource:
    """What a model is loaded from, and how, before it is."""

    name: str  # or folder
    dtype: str = "auto"
    device: str | None = None  # None: the student's
    quantization: Mapping[str, Any] | None = None  # fields of transformers' BitsAndBytesConfig
    options: Mapping[str, Any] = field(default_factory=dict)  # further arguments of from_pretrained


@contextmanager
def loading(what: str, name: str) -> Iterator[None]:
    """Turn transformers' errors while loading into one sentence with a remedy.

    Raises:
        RecipeError: with the name, the reason and the remedy.
    """
    try:
        yield
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RuntimeError,
        ImportError,
        SafetensorError,
    ) as error:
        if isinstance(error, RecipeError) or getattr(error, "errno", None) == errno.ENOSPC or "memory" in str(error):
            raise
        raise RecipeError(
            f'no {what} can be loaded from "{name}" ({reason(error)}); {_remedy(resolve(name), error)}'
        ) from error


def resolve(name: str) -> str:
    """The folder or hub name that a name stands for.

    That is the playground's folder, the path with `~` expanded, or student/ of a run's folder.
    """
    path = Path(resolve_playground(name)).expanduser()
    if not path.is_dir():
        return str(path) if name.startswith("~") else resolve_playground(name)
    configs = ("config.json", "adapter_config.json")
    if not any((path / file).exists() for file in configs) and any((path / "student" / f).exists() for f in configs):
        path = path / "student"
    return str(path)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """A tokenizer by name or folder; for adapters that come without one, that of the model below them.

    Raises:
        RecipeError: if there is none, saying what to do.
    """
    path = resolve(name)
    with loading("tokenizer", name):
        adapters = adapter_config(path) if Path(path).is_dir() else None
        if adapters is not None and not any(Path(path).glob("tokenizer*")):
            return load_tokenizer(adapters["base_model_name_or_path"])
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        if not len(tokenizer):  # transformers returns this for a folder with a model and no tokenizer
            raise ValueError("it has no tokens")
    return tokenizer


def load_model(name: str, auto_class: Any = AutoModelForCausalLM, trainable: bool = False, **options: Any) -> Any:
    """A causal language model (or one of another class) by name or folder, which may hold adapters.

    Args:
        trainable: of adapters; otherwise they are frozen.
        options: further arguments of `from_pretrained`.

    Raises:
        RecipeError: if there is none, or some of its weights are missing, saying what to do.
    """
    path = resolve(name)
    with loading("model", name):
        return load_weights(auto_class, path, trainable, **without_remote_code(options))


def load_config(name: str) -> Any:
    """A model's configuration by name or folder; for adapters that of the model below them.

    Raises:
        RecipeError: if there is none, saying what to do.
    """
    path = resolve(name)
    with loading("model", name):
        adapters = adapter_config(path)
        if adapters is not None:
            return load_config(adapters["base_model_name_or_path"])
        return AutoConfig.from_pretrained(path, trust_remote_code=False).get_text_config()


def load_generation_config(name: str) -> GenerationConfig:
    """A model's generation config by name or folder, without its weights; for adapters that of the model below them.

    Raises:
        RecipeError: if there is no such model.
    """
    path = resolve(name)
    with loading("model", name):
        if (generation := tokens_of_invalid_config(path)) is not None:
            return generation
        try:
            return GenerationConfig.from_pretrained(path)
        except OSError:  # it has no file of its own
            adapters = adapter_config(path)
            if adapters is not None:
                return load_generation_config(adapters["base_model_name_or_path"])
            return GenerationConfig.from_model_config(load_config(name))


def without_remote_code(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of from_pretrained that run no code of the model's own; transformers would ask on the terminal.

    Raises:
        RecipeError: for options that allow such code.
    """
    if options.get("trust_remote_code"):
        raise RecipeError(f"trust_remote_code is not supported: {_REMOTE_CODE}")
    return {**options, "trust_remote_code": False}


def holds_adapters(name: str) -> bool:
    """Are these adapters, rather than a whole model?"""
    with loading("model", name):
        return adapter_config(resolve(name)) is not None


def is_soft_prompt(name: str) -> bool:
    """Are these adapters of a kind that adds tokens to the prompt (or keys and values), and no weights?"""
    kind = (adapter_config(resolve(name)) or {}).get("peft_type")
    return kind in ("PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "CPT", "ADAPTION_PROMPT")


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, config: Any, whose: str) -> None:
    """Refuse a model with fewer embeddings than its tokenizer has tokens; further embeddings are padding.

    Raises:
        RecipeError: with both numbers.
    """
    rows, size = getattr(config, "vocab_size", None), vocabulary_size(tokenizer)
    if rows is not None and rows < size:
        raise RecipeError(
            f"the tokenizer has {size} tokens and {whose} embeddings for {rows} only: "
            f"use the tokenizer that belongs to the model, or a model that belongs to this tokenizer"
        )


def check_tokenizers(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    """Refuse a teacher whose tokenizer differs from the student's, and log other differences as warnings.

    Raises:
        RecipeError: naming the first difference.
    """
    refuse_other_tokens(student, teacher)
    if student.eos_token_id != teacher.eos_token_id:
        logger.warning(
            "student and teacher end their responses differently (%r and %r), like a base and a chat model; watch "
            "the share of truncated responses",
            student.eos_token,
            teacher.eos_token,
        )
    if not student.chat_template and teacher.chat_template:
        logger.warning(
            "the teacher has a chat template and the student has none, like a chat and a base model; to render "
            "conversations as the teacher reads them, name the teacher's tokenizer in student.tokenizer"
        )
    elif student.chat_template != teacher.chat_template:
        logger.warning("student and teacher have different chat templates; the student's is used")


def refuse_other_tokens(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    """Refuse a teacher whose tokenizer gives other tokens than the student's: its scores would be of these.

    The models' vocabularies may be padded differently.

    Raises:
        RecipeError: naming the first difference.
    """
    ids, teacher_ids = student.get_vocab(), teacher.get_vocab()
    remedy = "choose a teacher and a student of one family, whose tokens are the same"
    differing = sorted(t for t in ids.keys() | teacher_ids.keys() if ids.get(t) != teacher_ids.get(t))
    if differing:
        token = differing[0]
        raise RecipeError(
            f"the tokenizers of student and teacher differ in {len(differing)} of {len(ids)} and {len(teacher_ids)} "
            f"tokens ({token!r} is {ids.get(token, 'absent')} for the student and {teacher_ids.get(token, 'absent')} "
            f"for the teacher): {remedy}"
        )
    if student.encode(PROBE, add_special_tokens=False) != teacher.encode(PROBE, add_special_tokens=False):
        raise RecipeError(
            f"the tokenizers of student and teacher have the same tokens but split text differently: {remedy}"
        )


def reason(error: Exception) -> str:
    """The first line of an exception's message, or its class's name if the message is empty."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return (text.strip().split("\n")[0] or type(error).__name__).rstrip(".:")


def _remedy(path: str, error: Exception) -> str:
    if "trust_remote_code" in str(error):
        return _REMOTE_CODE
    if isinstance(error, ImportError):
        return "install what is missing"
    if isinstance(error, SafetensorError):
        return "a file of weights is damaged: copy or download it again"
    if isinstance(error, ValueError) and "do not fit together" in str(error):
        return "copy or export the model again, with all of its weights"
    if Path(path).exists() and any(Path(path).glob("checkpoint-*")):
        return "it is the folder of an unfinished run: finish the run, or name one of its checkpoints"
    if Path(path).exists():
        return "the folder must hold a model and its tokenizer as save_pretrained writes them"
    return "there is no such folder here, and the hub gave none: check the name, the path and the network"
