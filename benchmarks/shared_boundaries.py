"""The share of tokens at which teachers with other tokenizers can be compared, on the few sentences of the tests.

PYTHONPATH=tests python benchmarks/shared_boundaries.py
"""

from itertools import permutations

from rows_of_text import MIXED, byte_level, sentencepiece, wordpiece

from understudy.batch import Example
from understudy.data.retokenize import Retokenizer
from understudy.data.tokenize import TextEncoder

tokenizers = {"byte-level BPE": byte_level(), "SentencePiece": sentencepiece(), "WordPiece": wordpiece()}
for (mine, student), (theirs, teacher) in permutations(tokenizers.items(), 2):
    texts = TextEncoder(student).encode_responses([f" {text}" for text in MIXED])
    responses = [[*ids, student.eos_token_id] for ids in texts]
    read = Retokenizer(student, teacher)
    indices = [i for part in read.retokenize([Example([5], ids) for ids in responses]) for i in part.indices]
    share = sum(i is not None for i in indices) / len(indices)
    print(f"| {mine} | {theirs} | {len(read.shared_tokens())} of {len(student)} | {share:.2f} |")
