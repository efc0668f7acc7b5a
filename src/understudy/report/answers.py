"""Teacher, warm start and students answering the same prompts, and where a student and its teacher disagree.

The one idea: a student's answer is read by both models, and every token gets the logarithm of how much likelier it is
to the student than to the teacher, log q(token) − log p(token): 0 where they agree, large where only the student would
have said it. Its mean over sampled answers is the reverse KL.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..batch import Batch, Example
from ..models.student import all_stop_ids, check_tokenizers, load_config, load_model, load_tokenizer, window_of
from ..recipe import Recipe, load
from ..rollouts.generate import GenerateRollout
from ..run.distill import load_data
from ..scores import Scores, can_project, compare, opinion
from ..step import Step
from .content import finite, reference_folders, reference_models
from .folders import RunFolder, dig, read_answers

MOST = 6  # students that are asked


def side_by_side(runs: Sequence[RunFolder], places: Sequence[Path], count: int, why_not: str = "") -> dict[str, Any]:
    """The answers to `count` prompts: written now, unless something says `why_not`, else those that were kept.

    Returns `about`, where they come from in a sentence, and `prompts`, each with its `answers`; an answer has a `text`
    and, where two models have read it, `tokens`.

    Args:
        runs: those whose students are best first, where that is known.
        places: where to look for what a comparison's teacher and warm start answered.
    """
    asked = list({run.name: run for run in reversed(runs) if run.has_student}.values())[::-1][:MOST]
    reason = why_not or ("" if asked else "no student is saved yet")
    if not reason:
        try:
            return finite(_ask(asked, count))
        except (ValueError, OSError, RuntimeError, ImportError) as error:
            reason = " ".join(str(error).split())
    kept = _judged(runs, places, count) or _shown(runs, count)
    tokens = f"No models were asked ({reason}), so that no token-level disagreement is shown."
    if not kept:
        return {"about": f"{tokens} The runs' folders hold no answers either.", "prompts": []}
    return finite({**kept, "about": f"{kept['about']} {tokens}"})


def _ask(runs: Sequence[RunFolder], count: int) -> dict[str, Any]:
    """Let teacher, warm start and students answer greedily, one model after the other; the teacher reads along.

    Raises:
        ValueError: if a model or the data is not there. No model is fetched for a report.
    """
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    known = reference_models(runs)
    recipe = load(runs[0].path / "recipe.yaml")
    tokenizer = load_tokenizer(str(runs[0].path / "student"))
    longest = recipe.rollout[1].get("max_new_tokens", GenerateRollout.max_new_tokens)
    teacher = _load(known["teacher"], _dtype(recipe), device) if "teacher" in known else None
    window = window_of(load_config(str(runs[0].path / "student")))
    examples, about = _prompts(runs[0], recipe, tokenizer, window, longest, count)

    def write(model: Any) -> list[Example]:
        stop = all_stop_ids(tokenizer, *filter(None, (model, teacher)))
        rollout = GenerateRollout(max_new_tokens=longest, temperature=0.0, stop_ids=stop)
        return rollout.follow(model, tokenizer).generate(examples.examples, Step(0, 0))

    prompts: list[dict[str, Any]] = [
        {"prompt": row.prompt, "reference": next(iter(row.references), None), "answers": []} for row in examples.rows
    ]

    def add(name: str, model: Any, reader: Any) -> None:
        for prompt, answer in zip(prompts, write(model), strict=True):
            found = {"by": name, "text": tokenizer.decode(answer.response, skip_special_tokens=True)}
            if reader is not None:
                found["tokens"] = disagreement(model, reader, answer, tokenizer)
            prompt["answers"].append({**found, "truncated": answer.truncated})

    if teacher is not None:
        add("teacher", teacher, None)
    if "warm start" in known:
        add("warm start", _load(known["warm start"], "auto", device), teacher)
    for run in runs:
        check_tokenizers(tokenizer, load_tokenizer(str(run.path / "student")))
        add(run.name, _load(str(run.path / "student"), "auto", device), teacher)
    whose = f" by {len(runs)} students" if len(runs) > 1 else ""
    return {"about": f"Greedy answers{whose} to {about}, written for this report.", "prompts": prompts}


def _load(name: str, dtype: str, device: torch.device) -> Any:
    return load_model(name, dtype=dtype, local_files_only=True).eval().to(device)


def _dtype(recipe: Recipe) -> str:
    return "auto" if recipe.teacher is None else recipe.teacher[1].get("dtype", "auto")


def _prompts(
    run: RunFolder, recipe: Recipe, tokenizer: Any, window: int | None, longest: int, count: int
) -> tuple[Any, str]:
    """The first prompts of what the run was judged on, else of what it held out, else of what it was trained on."""
    trial, held_out = dig(run.evaluation, "trial"), recipe.evaluate.dataset
    if trial:
        place = {"dataset": trial.get("dataset") or recipe.data.dataset, "split": trial["split"]}
        about = "the first prompts that students were judged on"
    elif held_out:
        place = {"dataset": held_out, "split": recipe.evaluate.split, "name": recipe.evaluate.name}
        about = "the first held-out prompts"
    else:
        place, about = {}, "the first prompts of the training data"
    block = recipe.data.model_copy(update={**place, "limit": count})
    return load_data(block, tokenizer, window, longest), f"{about} ({block.dataset}, {block.split})"


@torch.no_grad()
def disagreement(student: Any, teacher: Any, answer: Example, tokenizer: Any) -> list[dict[str, Any]]:
    """What student and teacher think of every token of the student's answer.

    Returns for each piece of text `student` and `teacher`, its log-probabilities in nats, `forward_kl` and
    `reverse_kl` of the whole distributions there, and `likeliest` and `likeliest_p`, the teacher's own choice. A
    character of several tokens is one piece, whose numbers are sums: the chain rule's.
    """
    batch = Batch.of([answer], 0, student.get_input_embeddings().weight.device)
    size = len(tokenizer)
    p: Scores = opinion(teacher, batch, vocabulary=size, project=can_project(teacher))
    q: Scores = opinion(student, batch, vocabulary=size, project=can_project(student))
    apart = {name: values.tolist() for name, values in compare(p, q).items() if name.endswith("kl")}
    top = p.log_probs.max(-1)
    chosen = {"student": q.chosen.tolist(), "teacher": p.chosen.tolist(), **apart}
    pieces: list[dict[str, Any]] = []
    held: dict[str, float] = {}
    start = done = 0
    for index in range(len(answer.response)):
        held = {name: held.get(name, 0.0) + values[index] for name, values in chosen.items()}
        text = tokenizer.decode(answer.response[: index + 1], clean_up_tokenization_spaces=False)
        if text.endswith("\N{REPLACEMENT CHARACTER}") and index + 1 < len(answer.response):
            continue  # the first bytes of a character
        likeliest = int(top.indices[start])
        pieces.append(
            {
                "text": text[done:],
                **held,
                "agrees": likeliest == answer.response[start],
                "likeliest": tokenizer.decode([likeliest], clean_up_tokenization_spaces=False),
                "likeliest_p": float(top.values[start].exp()),
            }
        )
        held, start, done = {}, index + 1, len(text)
    return pieces


def _judged(runs: Sequence[RunFolder], places: Sequence[Path], count: int) -> dict[str, Any] | None:
    """The answers that were judged: of teacher and warm start, and of the first run of each name."""
    first = list({run.name: run for run in reversed(runs) if run.answers}.values())[::-1][:MOST]
    if not first:
        return None
    judged = [name for name in dig(first[0].evaluation, "found") or {} if name in first[0].answers]
    protocol = next(iter(judged or first[0].answers))
    beside = {name: read_answers(folder) for name, folder in reference_folders(runs, places).items()}
    kept = {name: of.get(protocol, []) for name, of in [*beside.items(), *((r.name, r.answers) for r in first)]}
    prompts = []
    for line in first[0].answers[protocol][:count]:
        same = {name: next((a for a in of if a.get("prompt") == line.get("prompt")), None) for name, of in kept.items()}
        answers = [_kept(name, answer.get("answer"), answer) for name, answer in same.items() if answer]
        prompts.append({"prompt": line.get("prompt"), "reference": _first(line.get("references")), "answers": answers})
    return {"about": f"Answers as they were judged ({protocol}).", "prompts": prompts}


def _shown(runs: Sequence[RunFolder], count: int) -> dict[str, Any] | None:
    """The latest answers that were shown as a student learned."""
    prompts = []
    for run in runs:
        last = run.samples[-1].get("step") if run.samples else None
        for line in [line for line in run.samples if line.get("step") == last][:count] if run.samples else []:
            answer = _kept(f"{run.name}, step {last}", line.get("student"), {})
            prompts.append({"prompt": line.get("prompt"), "reference": line.get("reference"), "answers": [answer]})
    return {"about": "Answers as they were shown while training.", "prompts": prompts[:count]} if prompts else None


def _kept(name: str, text: Any, line: Mapping[str, Any]) -> dict[str, Any]:
    return {"by": name, "text": str(text), "correct": line.get("correct"), "truncated": bool(line.get("truncated"))}


def _first(references: Any) -> Any:
    return references[0] if isinstance(references, list) and references else None
