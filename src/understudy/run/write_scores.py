"""Write a teacher's scores of examples to the files that the teacher `cached` reads.

Shapes: N response tokens, C rows of a tile, V vocabulary, K tokens of the top K.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from itertools import count
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from ..batch import Batch, Example
from ..files import write_atomic
from ..fused_linear.distributions import Projected
from ..fused_linear.merged import TopK
from ..fused_linear.tiles import rows_per_tile
from ..scores import Scores
from ..teacher import Teacher
from ..teachers.cached import KEY_BYTES, Manifest, Shards


def write_scores(
    folder: Path,
    manifest: Manifest,
    teacher: Teacher,
    by_key: Mapping[bytes, Example],
    batch_size: int,
    shard_mb: float,
    advance: Callable[[int], None] = lambda number: None,
) -> int:
    """Score the examples that are not in the folder yet, longest first; returns how many these are.

    Which examples share a batch and a file follows from which are missing, and a file ends where a batch ends. So after
    a process was killed the next one goes on at the end of the last complete file, as the first one would have.
    """
    shards = Shards(folder)
    for path in shards.damaged:
        path.unlink()
    missing = [key for key in by_key if key not in shards.places]
    missing.sort(key=lambda key: (-_length(by_key[key]), key))
    advance(len(by_key) - len(missing))
    parts: list[dict[str, Tensor]] = []
    for start in range(0, len(missing), batch_size):
        keys = missing[start : start + batch_size]
        batch = Batch.from_examples([by_key[key] for key in keys], pad=0)
        try:
            scores = teacher.score(batch).cut(manifest.vocabulary)
        except torch.OutOfMemoryError:
            what = f"the memory is full with {len(keys)} sequences of up to {batch.input_ids.shape[1]} tokens at once"
            raise ValueError(f"{what}: lower --batch-size, and run the same command again") from None
        if not parts:
            save_head(folder, manifest, scores)
        index = torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).reshape(-1, KEY_BYTES)
        parts.append({"keys": index, "lengths": batch.lengths, **saved_rows(scores, manifest)})
        advance(len(keys))
        is_last = start + batch_size >= len(missing)
        if is_last or sum(x.nbytes for part in parts for x in part.values()) >= shard_mb * 2**20:
            content = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
            write_atomic(_free_name(folder), save(content))
            parts = []
    return len(missing)


def saved_rows(scores: Scores, manifest: Manifest) -> dict[str, Tensor]:
    """What is saved of the scores of N tokens, by name (N, …), on the CPU.

    Raises:
        ValueError: for hidden rows of a teacher that gives none, and for more tokens than a top-K teacher gives.
    """
    dtype, distribution = getattr(torch, manifest.dtype), scores.distribution
    if manifest.top_k is None:
        if not isinstance(distribution, Projected):
            raise ValueError("this teacher gives log-probabilities and no hidden rows: save its top_k instead")
        return {"hidden": distribution.hidden.to(dtype).cpu()}
    if isinstance(distribution, TopK) and distribution.values.shape[-1] < manifest.top_k:
        known = distribution.values.shape[-1]
        raise ValueError(f"this teacher gives {known} tokens, and {manifest.top_k} are to be saved: lower --top-k")
    parts: list[tuple[Tensor, Tensor]] = []
    size = rows_per_tile(manifest.vocabulary, scores.tokens.device)
    for start in range(0, len(scores.tokens), size):
        rows = slice(start, start + size)
        events = distribution.log_probs(rows)  # (C, V), or (C, K'+1) of a top-K' teacher
        is_top_k = isinstance(distribution, TopK)
        values, ids = (events[:, :-1] if is_top_k else events).topk(manifest.top_k)
        log_probs = TopK(values, ids).merge(events)
        ids = distribution.support[rows].gather(-1, ids) if isinstance(distribution, TopK) else ids
        parts.append((log_probs.to(dtype).cpu(), ids.int().cpu()))
    log_probs, ids = map(torch.cat, zip(*parts, strict=True))
    chosen = {"chosen": scores.chosen.to(dtype).cpu()} if manifest.chosen else {}
    return {"log_probs": log_probs, "ids": ids, **chosen}


def save_head(folder: Path, manifest: Manifest, scores: Scores) -> None:
    """Save the head of hidden rows and what the model does to its logits, if that is not done yet."""
    path, distribution = folder / "head.safetensors", scores.distribution
    if manifest.kind == "hidden" and isinstance(distribution, Projected) and not path.is_file():
        head = distribution.head
        tensors = {name: x.cpu().contiguous() for name, x in head.tensors().items()}
        write_atomic(path, save(tensors, metadata={"transform": json.dumps(asdict(head.transform))}))


def _length(example: Example) -> int:
    """The number of tokens that the teacher reads."""
    return len(example.prompt_for_teacher) + len(example.response)


def _free_name(folder: Path) -> Path:
    names = (folder / f"scores-{number:05}.safetensors" for number in count())
    return next(path for path in names if not path.exists())
