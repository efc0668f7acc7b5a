"""A teacher whose scores were computed before, by `understudy cache`, and are read from a folder: no model in memory.

Scores are looked up by a hash of what the teacher read: its prompt, the response and which tokens are trained on. So
they do not depend on the order of the data, on batches, epochs or seeds, and several students share them. A folder has

    cache.json                  what was scored and by whom
    tokenizer/                  the tokenizer, which is compared with the student's
    head.safetensors            the teacher's head over the tokenizer's V tokens, if hidden rows are saved
    scores-00000.safetensors …  examples and their tokens' scores, each file complete or not there

and per token either the log-probabilities of the K likeliest tokens, of all others together and of the chosen token, or
the last hidden row, from which every token's log-probability is computed.

Shapes: E examples of a file, N their response tokens, V vocabulary, K tokens of the top K, D width.
"""

import hashlib
import json
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..batch import Batch, Example
from ..data.examples import Examples
from ..files import write_atomic
from ..fused_linear.distributions import Projected
from ..fused_linear.head import Head, Transform
from ..fused_linear.merged import TopK
from ..scores import Scores
from ..teacher import Capability, Teacher

DTYPES = {"top_k": ("float16", "float32"), "hidden": ("bfloat16", "float32")}  # by kind, the default one first
Kind = Literal["top_k", "hidden"]
KEY_BYTES = 16  # of an example
_PROMPT_BYTES = 8  # of a key, its first ones, are of the prompt alone
_REMEDY = "run `understudy cache` with the recipe and --output {folder} to add what is missing"


@dataclass(frozen=True)
class Manifest:
    """What a cache holds: the content of its cache.json."""

    kind: Kind
    dtype: str
    vocabulary: int  # V
    top_k: int | None  # K; None for hidden rows
    chosen: bool  # are the log-probabilities of the chosen tokens known?
    teacher: str  # the recipe's block
    weights: str | None  # hashes, None where there is no live model
    tokenizer: str
    data: tuple[dict[str, Any], ...] = ()  # the settings of each dataset, and whose responses were scored

    @property
    def provides(self) -> frozenset[Capability]:
        if self.kind == "hidden":
            return frozenset({Capability.CHOSEN, Capability.TOP_K, Capability.FULL})
        return frozenset({Capability.TOP_K, *([Capability.CHOSEN] if self.chosen else [])})

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """The manifest of a cache.

        Raises:
            ValueError: if there is none, or one that this version does not read.
        """
        path = folder / "cache.json"
        if not path.is_file():
            raise ValueError(f"{folder} is not a cache of a teacher's scores: `understudy cache` writes one")
        try:
            content = json.loads(path.read_text("utf-8"))
            return cls(**{**content, "data": tuple(content["data"])})
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not what `understudy cache` writes ({error}): write the cache again") from None

    def write(self, folder: Path) -> None:
        write_atomic(folder / "cache.json", json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n")

    def check_same(self, other: "Manifest", folder: Path) -> None:
        """Refuse to add scores of another kind or of another teacher, described by `other`, to those in the folder.

        Raises:
            ValueError: naming everything that differs.
        """
        titles = {field.name: field.name.replace("_", " ") for field in fields(self) if field.name != "data"}
        titles |= {"weights": "the teacher's weights", "tokenizer": "the tokenizer"}
        if self.weights is not None:
            del titles["teacher"]  # the same weights under another name are the same teacher
        both = {title: (getattr(self, name), getattr(other, name)) for name, title in titles.items()}
        if differing := [f"{title} ({old} there, now {new})" for title, (old, new) in both.items() if old != new]:
            message = f"the cache {folder} was written by another teacher or with other settings"
            raise ValueError(f"{message}: {', '.join(differing)}; give another --output")


class Shards:
    """The files of scores in a folder, memory-mapped, and where each example's tokens are."""

    def __init__(self, folder: Path) -> None:
        self.tensors: list[dict[str, Tensor]] = []  # of each file, by name (N, …)
        self.places: dict[bytes, tuple[int, int, int]] = {}  # by key: file, first row, row after the last
        self.damaged: list[Path] = []
        for path in sorted(folder.glob("scores-*.safetensors")):
            try:
                with safe_open(path, "pt") as file:
                    self.add({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
            except SafetensorError:
                self.damaged.append(path)

    def add(self, tensors: dict[str, Tensor]) -> None:
        keys, width = tensors["keys"].numpy().tobytes(), KEY_BYTES
        start = 0
        for index, length in enumerate(tensors["lengths"].tolist()):
            self.places[keys[index * width : (index + 1) * width]] = len(self.tensors), start, start + length
            start += length
        self.tensors.append({name: x for name, x in tensors.items() if name not in ("keys", "lengths")})

    def rows(self, keys: Iterable[bytes]) -> dict[str, Tensor]:
        """The scores of examples, one after the other, by name (N, …)."""
        places = [self.places[key] for key in keys]
        names = self.tensors[places[0][0]]
        return {name: torch.cat([self.tensors[file][name][start:end] for file, start, end in places]) for name in names}


class CachedTeacher(Teacher):
    """Reads scores that `understudy cache` computed before; no model is loaded, and nothing can be scored anew.

    Args:
        folder: what `understudy cache` wrote. All scores are memory-mapped.
        model: name or folder of the model, for students that are made from it (`fresh`, `layers`).
    """

    provides = frozenset({Capability.CHOSEN, Capability.TOP_K, Capability.FULL})  # the most; see `Manifest.provides`

    def __init__(self, folder: str, *, model: str | None = None) -> None:
        self.folder, self.model_name = Path(folder).expanduser(), model
        self.manifest = Manifest.read(self.folder)
        self.provides = self.manifest.provides
        self._head: Head | None = None

    @property
    def scores_new_responses(self) -> bool:
        return False

    @property
    def tokenizer_name(self) -> str:
        return str(self.folder / "tokenizer")

    @property
    def fingerprint(self) -> str:
        content = {**asdict(self.manifest), "teacher": "", "data": ()}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    @cached_property
    def shards(self) -> Shards:
        shards = Shards(self.folder)
        if shards.damaged:
            remedy = _REMEDY.format(folder=self.folder).replace("add what is missing", "write it again")
            raise ValueError(f"{shards.damaged[0]} is damaged: {remedy}")
        return shards

    def check_data(self, examples: Examples, settings: Mapping[str, Any]) -> None:
        missing = [i for i, example in enumerate(examples.examples) if example_key(example) not in self.shards.places]
        if missing:
            first = missing[0]
            reason = self._reason(examples.examples[first], settings)
            raise ValueError(
                f"{len(missing)} of {len(examples)} rows of {examples.source} are not in the cache {self.folder}, the "
                f"first of them {examples.rows[first].where}: {reason}"
            )

    def score(self, batch: Batch) -> Scores:
        """See `Teacher`.

        Raises:
            ValueError: for an example that is not in the cache, naming its row.
        """
        keys = [example_key(example) for example in batch.examples]
        for key, example in zip(keys, batch.examples, strict=True):
            if key not in self.shards.places:
                raise ValueError(
                    f"the example of row {example.row} is not in the cache {self.folder}: {self._reason(example, {})}"
                )
        rows = {name: x.to(batch.tokens.device) for name, x in self.shards.rows(keys).items()}
        if self.manifest.kind == "top_k":
            return Scores(batch.tokens, _top_k(rows, batch.tokens))
        if self._head is None or self._head.weight.device != batch.tokens.device:
            self._head = read_head(self.folder, batch.tokens.device)
        return Scores(batch.tokens, Projected(rows["hidden"], self._head, constant=True))

    def _reason(self, example: Example, settings: Mapping[str, Any]) -> str:
        """Why an example is not there, as far as can be known, and what to do."""
        prompt, remedy = example_key(example)[:_PROMPT_BYTES], _REMEDY.format(folder=self.folder)
        reason = "its prompt is not there"
        if any(key.startswith(prompt) for key in self.shards.places):
            reason = "it has another response or other trained tokens there"
        differing = [
            [name for name in settings if name not in e or e[name] != settings[name]] for e in self.manifest.data
        ]
        if not settings or not differing or not (names := min(differing, key=len)):
            return f"{reason}; {remedy}"
        entry = self.manifest.data[differing.index(names)]
        values = [f"{name} is {settings[name]!r:.60}, and was {entry.get(name)!r:.60}" for name in names]
        return f"{reason} ({', '.join(values)}); {remedy}"


def _top_k(rows: Mapping[str, Tensor], tokens: Tensor) -> TopK:
    """The distributions of saved log-probabilities (N, K+1), normalised again after their rounding."""
    log_probs = rows["log_probs"].float().log_softmax(-1)
    values, rest, support = log_probs[:, :-1], log_probs[:, -1], rows["ids"].long()
    if "chosen" not in rows:
        return TopK(values, support, rest=rest)
    is_chosen = support == tokens[:, None]
    among = values.masked_fill(~is_chosen, 0).sum(-1)
    return TopK(values, support, among.where(is_chosen.any(-1), rows["chosen"].float().minimum(rest)), rest)


def example_key(example: Example) -> bytes:
    """A hash of what the teacher reads and of which tokens are trained on: 16 bytes, of which 8 are of the prompt."""
    content = array("q", example.prompt_for_teacher).tobytes()
    for name, value in sorted(example.inputs.items()):
        tensor = torch.as_tensor(value).cpu().contiguous()
        content += f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode()
        content += tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    trained = bytes([True] * len(example.response) if example.trained is None else map(bool, example.trained))
    first = hashlib.blake2b(content, digest_size=_PROMPT_BYTES).digest()
    response = array("q", example.response).tobytes() + trained
    return first + hashlib.blake2b(first + response, digest_size=KEY_BYTES - _PROMPT_BYTES).digest()


def read_head(folder: Path, device: torch.device) -> Head:
    """The head of a cache of hidden rows, memory-mapped on a CPU.

    Raises:
        ValueError: if it is missing or damaged.
    """
    path = folder / "head.safetensors"
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            transform = Transform(**json.loads(file.metadata()["transform"]))
    except (SafetensorError, OSError):
        raise ValueError(f"{path} is missing or damaged: write the cache again, to another folder") from None
    return Head(tensors["weight"], tensors.get("bias"), transform).to(device)
