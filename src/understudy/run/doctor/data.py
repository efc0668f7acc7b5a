"""Lengths of prompts and responses against context windows, and what a micro-batch and a rollout consist of."""

from transformers import TrainingArguments

from ...recipe import Recipe
from ..overview import lengths
from ..prepare import Prepared
from .findings import FirstExample, Section, green, yellow
from .one_step import Lengths


def data(recipe: Recipe, prepared: Prepared) -> Section:
    """The section about data; prompts and responses that are cut are warned of while it is loaded."""
    section, train = Section("data"), prepared.train
    add = section.findings.append
    window = prepared.configs.context_length
    unknown = "unknown" if prepared.configs.student is None else "no limit"
    section.rows.append(("context", unknown if window is None else f"{window:,} tokens of prompt and response"))
    section.rows.append(("max_length", f"{_max_length(recipe, window):,} tokens"))
    if prepared.sampling is not None and _generates(prepared):
        section.rows.append(("max_new_tokens", f"{prepared.sampling.max_new_tokens:,} tokens, reserved"))
    for title, examples in (("training", train), ("held-out", prepared.held_out), ("corpus", prepared.corpus)):
        if examples is None:
            continue
        section.rows.append((title, f"{len(examples):,} rows of {examples.source}"))
        section.rows += list(lengths(examples))
        if not (examples.cut_prompts or examples.cut_responses):
            add(green(f"no text of the {title} data is cut"))
    if train is None:
        return section
    if _generates(prepared) and prepared.sampling is not None:
        longest = prepared.sampling.max_new_tokens
        written = [len(example.response) for example in train.examples if example.response]
        longer = sum(count > longest for count in written)
        if longer:
            message = f"{longer:,} of {len(written):,} responses of the data have more than max_new_tokens {longest:,} "
            add(yellow(f"{message}tokens: generated ones that are as long are truncated; raise max_new_tokens"))
    return section


def _max_length(recipe: Recipe, window: int | None) -> int:
    return recipe.data.max_length if window is None else min(recipe.data.max_length, window)


def _generates(prepared: Prepared) -> bool:
    return prepared.method is not None and bool(prepared.method.authors - {"dataset", "corpus"})


def step_lengths(prepared: Prepared, arguments: TrainingArguments) -> Lengths | None:
    """The longest sequences of a run, and how many are trained on and generated at once; None without data."""
    train, method, sampling = prepared.train, prepared.method, prepared.sampling
    if train is None or method is None or sampling is None:
        return None
    examples, generates = train.examples, _generates(prepared)
    prompt, response = max(len(e.prompt) for e in examples), max(len(e.response) for e in examples)
    whole = max(len(e.prompt) + len(e.response) for e in examples) if "dataset" in method.authors else 0
    response = response if "dataset" in method.authors else 0
    if generates:
        whole, response = max(whole, prompt + sampling.max_new_tokens), max(response, sampling.max_new_tokens)
    sequences, generated = arguments.train_batch_size, 0
    if generates:
        step = sequences * arguments.gradient_accumulation_steps * sampling.n
        size = None if prepared.rollout is None else prepared.rollout.batch_size
        generated = min(step, size or step)
    return Lengths(max(1, whole - response), max(1, response), sequences, generated)


def first_example(prepared: Prepared) -> FirstExample | None:
    """The first example and whose responses are trained on, where there are data and a method."""
    if prepared.train is None or prepared.method is None:
        return None
    return FirstExample(prepared.train, sorted(prepared.method.authors), prepared.configs.tokenizer)
