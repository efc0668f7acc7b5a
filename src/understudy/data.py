"""Examples: a dataset as token ids, ready to train on.

The one idea: prompt and response are tokenised apart and meet as ids. The response begins exactly where generation
would begin, and ends with a token that says so, unless it was cut; what is cut away is counted and reported.

`rows.py` finds the rows, `formats.py` says what their columns mean; here texts become ids of bounded length.
"""

import hashlib
import logging
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import batched
from pathlib import Path
from typing import Any, Literal

from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from understudy.batch import Example
from understudy.formats import Document, Format, Row, stop_ids
from understudy.rows import BadRow, DataError, SourceRow, read_rows

__all__ = ["BadRow", "DataError", "Examples", "Row", "examples_from_rows", "load_examples", "stop_ids"]

logger = logging.getLogger(__name__)
