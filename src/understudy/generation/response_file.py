"""An append-only JSONL file of responses, each with an id of everything that it depends on.

A response is a function of model, sampling, seed and prompt, and its line carries a digest of these (`id`): a response
in the file need not be generated again, and one of another model, sampling, seed or prompt is recognised.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..batch import Example
from ..files import append_jsonl, split_lines

_LINE_START = b'{"seed": '  # of every line
_REMEDY = "give another file for the responses, or delete this one to have them generated again"


class ResponseFile:
    """Responses in a file, as lines with `seed`, `row`, `tokens`, `truncated`, `id` and further columns.

    Args:
        path: of the file; None: nothing is saved.
        depends_on: everything that a response depends on besides seed and prompt, such as weights and sampling.
    """

    def __init__(self, path: Path | None, depends_on: Mapping[str, Any]) -> None:
        self.path = path
        self._depends_on = json.dumps(depends_on, sort_keys=True, default=str)

    def id(self, seed: int, prompt: Example) -> str:
        """16 hexadecimal digits that change with anything that the response to a prompt depends on."""
        content = f"{self._depends_on}{seed} {prompt.row} {prompt.prompt} {prompt.teacher_prompt}"
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def line(self, seed: int, example: Example, **columns: Any) -> dict[str, Any]:
        """The line of a response, with further `columns`."""
        head = {"seed": seed, "row": example.row}
        tail = {"truncated": example.truncated, "tokens": example.response, "id": self.id(seed, example)}
        return head | columns | tail

    def append(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Add lines to the file, in one write."""
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            append_jsonl(self.path, *map(dict, lines))

    def load(self) -> list[dict[str, Any]]:
        """The lines of the file, without a torn last line; does not change the file.

        Raises:
            ValueError: for a file that contains anything but responses. A torn last line is taken for part of a
                response only after complete responses, and if it begins like one.
        """
        if self.path is None or not self.path.is_file():
            return []
        lines, torn = split_lines(self.path.read_bytes())
        values = [self._parse(number, line) for number, line in enumerate(lines, 1)]
        if torn and not (lines and (torn.startswith(_LINE_START) or _LINE_START.startswith(torn))):
            raise self.error(len(lines) + 1, "not a response that understudy generated")
        return values

    def drop_torn_line(self) -> None:
        """Remove a torn last line. Call it only after `load`, which checks that the file is one of responses."""
        if self.path is not None and self.path.exists():
            content = self.path.read_bytes()
            _, torn = split_lines(content)
            if torn:
                with self.path.open("rb+") as file:
                    file.truncate(len(content) - len(torn))

    def error(self, number: int, what: str) -> ValueError:
        """An error about a line of the file, with the remedy."""
        return ValueError(f"{self.path}:{number} is {what}: {_REMEDY}")

    def _parse(self, number: int, text: bytes) -> dict[str, Any]:
        try:
            line = json.loads(text)
            types = {"seed": int, "row": int, "id": str, "truncated": bool}
            line |= {name: kind(line[name]) for name, kind in types.items()}
            return line | {"tokens": [int(token) for token in line["tokens"]]}
        except (ValueError, KeyError, TypeError):
            raise self.error(number, "not a response that understudy generated") from None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the file against other processes; the lock of a killed process is released.

        Raises:
            ValueError: while another process holds the lock, if `path` is a folder, or if the lock is not empty.
        """
        if self.path is None:
            yield
            return
        if self.path.is_dir():
            raise ValueError(
                f"{self.path} is a folder: name a file for the responses, such as {self.path / 'responses.jsonl'}"
            )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self._lock.exists() and self._lock.stat().st_size:
            raise ValueError(f"{self._lock} is not a lock, which is empty: give another file for the responses")
        lock = FileLock(self._lock, timeout=0)
        try:
            lock.acquire()
        except Timeout:
            message = f"another process is writing responses to {self.path}: let it end, or give another file"
            raise ValueError(message) from None
        try:
            yield
        finally:
            lock.release()

    @property
    def has_lock(self) -> bool:
        """Is there a lock beside the file? Every process that appends to the file leaves one."""
        return self.path is not None and self._lock.exists()

    @property
    def _lock(self) -> Path:
        assert self.path is not None
        return self.path.with_name(f"{self.path.name}.lock")
