"""Limits of what a chat template may compute: it comes with a model, and may be endless or fill the memory."""

import ctypes
import queue
import re
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, ParamSpec, TypeVar

import jinja2
from jinja2 import nodes

from .errors import DataError

P = ParamSpec("P")
T = TypeVar("T")

SECONDS = 10.0  # for one conversation; templates need about a ten-thousandth of a second
LARGEST_FACTOR = 10**6


def check_template(template: str) -> None:
    """Refuse a template with powers or products with large numbers, which Python could compute for hours.

    Raises:
        DataError: naming the operation.
    """
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        tree = environment.parse(re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template))
    except (jinja2.TemplateSyntaxError, RecursionError):
        return  # reported when it is rendered
    if tree.find(nodes.Pow):
        raise DataError("the chat template computes a power (**), which chat templates have no use for: mend it")
    for product in tree.find_all(nodes.Mul):
        factor = 1
        for constant in product.find_all(nodes.Const):
            factor *= abs(constant.value) if isinstance(constant.value, int) else 1
        if factor > LARGEST_FACTOR:
            raise DataError(f"the chat template multiplies by more than {LARGEST_FACTOR:,}: mend it")


def within_limit(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """The function's result, computed in another thread, which is ended after `SECONDS`.

    Raises:
        DataError: if there is no result by then; and whatever the function raises.
    """
    while _idle and not _idle[-1].is_alive():  # threads do not survive a fork
        _idle.pop()
    worker = _idle.pop() if _idle else _Worker()
    worker.tasks.put(lambda: function(*args, **kwargs))
    try:
        value, error = worker.results.get(timeout=SECONDS)
    except queue.Empty:
        worker.end()
        raise DataError(f"the chat template is still rendering a conversation after {SECONDS:g} s: mend it") from None
    except BaseException:  # Ctrl-C: this worker's result is of no use to the next caller
        worker.end()
        raise
    _idle.append(worker)
    if error is not None:
        raise error
    return value


class _Worker(threading.Thread):
    """A thread that computes one task after another."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.tasks: queue.SimpleQueue[Callable[[], Any] | None] = queue.SimpleQueue()
        self.results: queue.SimpleQueue[tuple[Any, Exception | None]] = queue.SimpleQueue()
        self.start()

    def run(self) -> None:
        with suppress(SystemExit):  # of `end`
            while (task := self.tasks.get()) is not None:
                try:
                    result = task(), None
                except Exception as error:
                    result = None, error
                self.results.put(result)
                del task, result

    def end(self) -> None:
        """Raise SystemExit in the thread, at its next instruction, or end it when its task is done."""
        self.tasks.put(None)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self.ident or 0), ctypes.py_object(SystemExit))


_idle: list[_Worker] = []
