"""Responses of teacher, warm start and students to the same prompts, and token-level disagreement with the teacher.

A student's response is scored by both models. The disagreement at a token is log q(token) − log p(token): 0 where both
give it the same probability, large where only the student is likely to generate it. Its mean over sampled responses is
the reverse KL.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..batch import Batch, Example
from ..evaluation.evaluate_model import LoadedModel, evaluate_loaded, load_for_evaluation, with_lengths
from ..evaluation.settings import EvalSettings
from ..models.forward import score_no_grad
from ..models.load import check_tokenizers, load_config
from ..models.parity import can_fuse
from ..models.vocabulary import vocabulary_size
from ..recipe import Data, load
from ..scores import Scores, divergence_metrics
from .content import finite, reference_folders, reference_models
from .folders import RunRecord, dig

MOST = 6  # students whose responses are shown


def side_by_side(runs: Sequence[RunRecord], places: Sequence[Path], count: int, skip: str = "") -> dict[str, Any]:
    """The responses to `count` prompts: generated now, or saved ones if there is a reason to `skip` that.

    Returns `about`, a sentence about their origin, and `prompts`, each with its `responses`; a response has a `text`
    and, if both models have scored it, `tokens`.

    Args:
        runs: the ones with the best students first, if that is known.
        places: folders in which a comparison may have saved responses of its teacher and warm start.
    """
    students = list({run.name: run for run in reversed(runs) if run.has_student}.values())[::-1][:MOST]
    reason = skip or ("" if students else "no student is saved yet")
    if not reason:
        try:
            return finite(_generate(students, count))
        except (ValueError, OSError, RuntimeError, ImportError) as error:
            reason = " ".join(str(error).split())
    saved = _evaluated(runs, places, count) or _samples(runs, count)
    tokens = f"No models were loaded ({reason}), so that no token-level disagreement is shown."
    if not saved:
        return {"about": f"{tokens} The runs' folders hold no responses either.", "prompts": []}
    return finite({**saved, "about": f"{saved['about']} {tokens}"})


def _generate(runs: Sequence[RunRecord], count: int) -> dict[str, Any]:
    """Greedy responses of teacher, warm start and students, one model after the other, all scored by the teacher.

    Raises:
        ValueError: if a model or the data is missing. No model is downloaded for a report.
    """
    models = reference_models(runs)
    names = {name: models[name] for name in ("teacher", "warm start") if name in models}
    names |= {run.name: run.student for run in runs}
    settings, about = _settings(runs[0], count)
    limits = [load_config(name) for name in (runs[0].student, models.get("teacher")) if name is not None]
    settings = with_lengths(settings, *limits)
    prompts: list[dict[str, Any]] = []
    teacher: LoadedModel | None = None
    for name, model in names.items():
        model_settings = replace(settings, dtype=_teacher_dtype(runs[0])) if name == "teacher" else settings
        loaded = load_for_evaluation(model, model_settings, local_files_only=True)
        if teacher is not None:
            check_tokenizers(loaded.tokenizer, teacher.tokenizer)
        if not prompts:
            rows = loaded.examples.rows
            references = [next(iter(row.references), None) for row in rows]
            prompts = [
                {"prompt": row.prompt, "reference": reference, "responses": []}
                for row, reference in zip(rows, references, strict=True)
            ]
        for prompt, response in zip(prompts, _responses(name, loaded, teacher, model_settings), strict=True):
            prompt["responses"].append(response)
        teacher = loaded if name == "teacher" else teacher
    by = f" of {len(runs)} students" if len(runs) > 1 else ""
    return {"about": f"Greedy responses{by} to {about}, generated for this report.", "prompts": prompts}


def _responses(
    name: str, loaded: LoadedModel, teacher: LoadedModel | None, settings: EvalSettings
) -> list[dict[str, Any]]:
    """A model's response to every prompt, with its token-level disagreement with the teacher."""
    responses = []
    for line in evaluate_loaded(loaded, settings).responses:
        response = {"by": name, "text": line["response"], "truncated": line["truncated"]}
        if teacher is not None:
            example = replace(loaded.examples[line["row"]].last_turn(), response=line["tokens"])
            response["tokens"] = disagreement(loaded.model, teacher.model, example, loaded.tokenizer)
        responses.append(response)
    return responses


def _teacher_dtype(run: RunRecord) -> str:
    return next((dig(fields, "dtype") for fields in (dig(run.recipe, "teacher") or {}).values()), None) or "auto"


def _settings(run: RunRecord, count: int) -> tuple[EvalSettings, str]:
    """Greedy settings for the first prompts of a run's data, and the name of that data.

    The data is that on which the run was evaluated, else its held-out data, else its training data.
    """
    recipe = load(run.folder.recipe)
    evaluated = next(iter((dig(run.evaluation, "settings") or {}).values()), None)
    if evaluated is not None:
        data, about = Data(**evaluated["data"]), "the first prompts on which students were evaluated"
    elif recipe.evaluate.dataset is not None:
        block = recipe.evaluate
        changes = {"dataset": block.dataset, "split": block.split, "name": block.name}
        data, about = recipe.data.model_copy(update=changes), "the first held-out prompts"
    else:
        data, about = recipe.data, "the first prompts of the training data"
    settings = EvalSettings(data.model_copy(update={"limit": count}))
    if evaluated is not None:
        settings = settings.changed(**{n: evaluated.get(n) for n in ("max_new_tokens", "max_prompt_length")})
    return settings, f"{about} ({data.dataset}, {data.split})"


@torch.no_grad()
def disagreement(student: Any, teacher: Any, response: Example, tokenizer: Any) -> list[dict[str, Any]]:
    """Log-probabilities and divergences of student and teacher at every token of the student's response.

    Returns for each piece of text `student` and `teacher`, its log-probabilities in nats, `forward_kl` and
    `reverse_kl` of the whole distributions there, and `likeliest` and `likeliest_p`, the teacher's own choice. A
    character of several tokens is one piece, whose numbers are sums by the chain rule.
    """
    batch = Batch.from_examples([response], 0, student.get_input_embeddings().weight.device)
    size = vocabulary_size(tokenizer)
    p: Scores = score_no_grad(teacher, batch, vocabulary=size, fused=can_fuse(teacher))
    q: Scores = score_no_grad(student, batch, vocabulary=size, fused=can_fuse(student))
    divergences = {name: values.tolist() for name, values in divergence_metrics(p, q).items() if name.endswith("kl")}
    top = p.log_probs.max(-1)
    per_token = {"student": q.chosen.tolist(), "teacher": p.chosen.tolist(), **divergences}
    pieces: list[dict[str, Any]] = []
    sums: dict[str, float] = {}
    start = length = 0
    for index in range(len(response.response)):
        sums = {name: sums.get(name, 0.0) + values[index] for name, values in per_token.items()}
        text = tokenizer.decode(response.response[: index + 1], clean_up_tokenization_spaces=False)
        if text.endswith("\N{REPLACEMENT CHARACTER}") and index + 1 < len(response.response):
            continue  # the first bytes of a character
        likeliest = int(top.indices[start])
        pieces.append(
            {
                "text": text[length:],
                **sums,
                "agrees": likeliest == response.response[start],
                "likeliest": tokenizer.decode([likeliest], clean_up_tokenization_spaces=False),
                "likeliest_p": float(top.values[start].exp()),
            }
        )
        sums, start, length = {}, index + 1, len(text)
    return pieces


def _evaluated(runs: Sequence[RunRecord], places: Sequence[Path], count: int) -> dict[str, Any] | None:
    """Saved responses of an evaluation: of teacher and warm start, and of the first run of each name."""
    first = list({run.name: run for run in reversed(runs) if run.responses}.values())[::-1][:MOST]
    if not first:
        return None
    finished = [name for name in dig(first[0].evaluation, "results") or {} if name in first[0].responses]
    protocol = next(iter(finished or first[0].responses))
    references = {name: folder.read_responses() for name, folder in reference_folders(runs, places).items()}
    by_model = {name: responses.get(protocol, []) for name, responses in references.items()}
    by_model |= {run.name: run.responses.get(protocol, []) for run in first}
    prompts = []
    for line in first[0].responses[protocol][:count]:
        same = {
            name: next((other for other in lines if other.get("prompt") == line.get("prompt")), None)
            for name, lines in by_model.items()
        }
        responses = [_saved(name, saved.get("response"), saved) for name, saved in same.items() if saved]
        reference = _first(line.get("references"))
        prompts.append({"prompt": line.get("prompt"), "reference": reference, "responses": responses})
    return {"about": f"Responses that were evaluated ({protocol}).", "prompts": prompts}


def _samples(runs: Sequence[RunRecord], count: int) -> dict[str, Any] | None:
    """Saved responses of the latest samples during training."""
    prompts = []
    for run in runs:
        last = run.samples[-1].get("step") if run.samples else None
        for line in [line for line in run.samples if line.get("step") == last][:count] if run.samples else []:
            response = _saved(f"{run.name}, step {last}", line.get("student"), {})
            prompts.append({"prompt": line.get("prompt"), "reference": line.get("reference"), "responses": [response]})
    return {"about": "Responses that were shown in training.", "prompts": prompts[:count]} if prompts else None


def _saved(name: str, text: Any, line: Mapping[str, Any]) -> dict[str, Any]:
    return {"by": name, "text": str(text), "correct": line.get("correct"), "truncated": bool(line.get("truncated"))}


def _first(references: Any) -> Any:
    return references[0] if isinstance(references, list) and references else None
