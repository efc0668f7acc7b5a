"""Evaluate models with the same settings, save the evaluation in a folder, and read it back as a result.

`evaluation.json` contains the settings and the results by name: greedy, T=1, exposure. The name of a file of responses
contains a digest of everything that they depend on, so that responses of the same settings and weights are resumed and
those of others are not overwritten.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..evaluation.evaluate import Evaluation
from ..evaluation.evaluate_model import LoadedModel, evaluate_loaded, load_for_evaluation
from ..evaluation.responses import identity
from ..evaluation.settings import EvalSettings
from ..files import file_digest, write_atomic
from ..playground.names import resolve
from ..recipe import Recipe
from ..run import marker
from ..run.folder import EVALUATION, RunFolder
from .statistics import Result

EXPOSURE = "exposure"  # the name of the settings that measure exposure bias
_FORMAT = ("name", "columns", "template", "chat_template_kwargs", "text_prompt", "on_bad_row", "on_long_prompt")

NamedSettings = Mapping[str, EvalSettings]


def named_settings(
    settings: EvalSettings, temperatures: Sequence[float] = (0.0,), exposure: int = 0, teacher: str | None = None
) -> dict[str, EvalSettings]:
    """Settings for each temperature, and for exposure bias against `teacher` on the first `exposure` prompts."""
    named = {"greedy" if t == 0 else f"T={t:g}": replace(settings, temperature=t) for t in temperatures}
    if exposure:
        data = settings.data.model_copy(update={"limit": exposure})
        changes = {"data": data, "temperature": 1.0, "metrics": (), "teacher": teacher, "exposure_bias": True}
        named[EXPOSURE] = replace(settings, **changes)
    return named


def with_format_of(settings: NamedSettings, recipe: Recipe) -> dict[str, EvalSettings]:
    """The settings with the recipe's own options for reading a row: columns, templates, handling of bad rows."""
    fields = {name: getattr(recipe.data, name) for name in _FORMAT if name in recipe.data.model_fields_set}
    return {name: replace(each, data=each.data.model_copy(update=fields)) for name, each in settings.items()}


def reference_folder(output: Path, model: str) -> RunFolder:
    """The folder in which a comparison saves the evaluation of a model that it did not train."""
    return RunFolder(output / "reference" / hashlib.sha256(model.encode("utf-8", "surrogatepass")).hexdigest()[:8])


def evaluate_into(folder: RunFolder, model: str, settings: NamedSettings) -> None:
    """Evaluate a model with all settings; write evaluation.json and the responses.

    Exposure bias of a teacher against itself is left out. A hash of the files of models and data says for how long the
    evaluation counts: until one of them changes.

    Raises:
        ValueError: for a folder with an evaluation.json that understudy did not write; and as `evaluate_model`.
    """
    claim(folder)
    inputs = {name: input_files(model, each) for name, each in settings.items()}
    results: dict[str, Any] = {}
    loaded: LoadedModel | None = None
    for name, each in settings.items():
        if each.exposure_bias and each.teacher == model:
            continue
        loaded = load_for_evaluation(model, each, loaded)
        file = folder.responses(name, _digest(loaded, each))
        results[name] = _content(evaluate_loaded(loaded, each, file), each) | {"responses": file.name}
    content = {
        "settings": {name: each.as_dict() for name, each in settings.items()},
        "inputs": inputs,
        "results": results,
    }
    write_atomic(folder.evaluation, json.dumps(content, indent=1))


def claim(folder: RunFolder) -> None:
    """Create a folder if it is missing, and mark it as one with an evaluation."""
    marker.check(folder.path, EVALUATION, "give another folder")
    folder.path.mkdir(parents=True, exist_ok=True)
    marker.mark(folder.path, EVALUATION)


def input_files(model: str, settings: EvalSettings) -> dict[str, str]:
    """Hashes of the files that an evaluation reads: of the model, the teacher and the data, where they are local."""
    places = {"model": resolve(model), "data": settings.data.dataset}
    places |= {"teacher": resolve(settings.teacher)} if isinstance(settings.teacher, str) else {}
    return {name: digest for name, place in places.items() if (digest := _digest_of_files(Path(place))) is not None}


def _digest_of_files(place: Path) -> str | None:
    """A hash of a file, or of the files in a folder; None where there is neither."""
    if not place.exists():
        return None
    files = [place] if place.is_file() else sorted(path for path in place.iterdir() if path.is_file())
    content = [(path.name, file_digest(path)) for path in files]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def read_result(folder: RunFolder, model: str, settings: NamedSettings) -> Result | str:
    """The result of a folder's evaluation of this model with these settings, or why there is none."""
    try:
        evaluation = folder.read_evaluation()
        if evaluation is None:
            reason = "the process was killed"
        elif evaluation.get("settings") != {name: each.as_dict() for name, each in settings.items()}:
            reason = "evaluated with other settings"
        elif evaluation.get("inputs") != {name: input_files(model, each) for name, each in settings.items()}:
            reason = "model or data have changed since the evaluation"
        else:
            return result_of(evaluation["results"], folder.read_run_json())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        reason = f"{folder.evaluation} is damaged"
    return folder.read_failed() or reason


def result_of(results: Mapping[str, Any], run: Mapping[str, Any] | None) -> Result:
    """A Result from the content of evaluation.json and run.json.

    Raises:
        ValueError, TypeError, KeyError, AttributeError: for content of another form.
    """
    names = ("seconds", "cpu_seconds", "tokens")
    costs = _numbers({name: (run or {}).get(name) for name in names})
    return Result(
        metrics={str(name): _numbers(part["metrics"]) for name, part in results.items()},
        scores={
            str(name): {str(metric): [float(score) for score in of] for metric, of in part["scores"].items()}
            for name, part in results.items()
        },
        **{name: costs.get(name) for name in names},
        budget=_budget((run or {}).get("budget")),
    )


def _numbers(content: Mapping[str, Any]) -> dict[str, float]:
    """The metrics that are finite numbers."""
    numbers = {str(name): float(value) for name, value in content.items() if value is not None}
    return {name: value for name, value in numbers.items() if math.isfinite(value)}


def _budget(content: Any) -> dict[str, Any] | None:
    """A budget's record; None for content of another form."""
    if not isinstance(content, Mapping):
        return None
    numbers = {k: content[k] for k in ("tokens", "seconds", "spent") if isinstance(content.get(k), int | float)}
    return {**numbers, "ended_by": str(content.get("ended_by"))} if len(numbers) == 2 and "spent" in numbers else None


def _content(evaluation: Evaluation, settings: EvalSettings) -> dict[str, Any]:
    content = {"metrics": evaluation.metrics, "scores": {} if settings.exposure_bias else evaluation.scores}
    return content | ({"curves": evaluation.curves} if evaluation.curves else {})


def _digest(loaded: LoadedModel, settings: EvalSettings) -> str:
    """A hash of everything that the responses of model and teacher depend on: 8 hexadecimal digits."""
    models = [loaded.model, *([loaded.teacher.model] if settings.exposure_bias and loaded.teacher else [])]
    identities = [identity(model, loaded.rollout, loaded.sampling, "student") for model in models]
    prompts = [example.prompt for example in loaded.examples.examples]
    content = json.dumps([settings.seeds, identities, prompts], default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:8]
