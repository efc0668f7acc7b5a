"""Every family of models: fused and plain losses, soft prompts, and responses generated alone and in a batch."""

import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import families
import pytest
import torch
from fakes import BigramTeacher, ragged_examples, some_examples, words
from gradients import assert_same, loss_and_gradients

from understudy.batch import Batch
from understudy.divergences import JensenShannon
from understudy.generation.cache_support import CacheSupport, cache_support
from understudy.models.forward import score_no_grad
from understudy.models.parity import can_fuse
from understudy.models.soft_prompt import check_soft_prompt, token_embeddings
from understudy.rollouts.generate import GenerateRollout
from understudy.sampling import Sampling
from understudy.step import Step

EXAMPLES = some_examples(families.VOCABULARY)
BATCH = Batch.from_examples(EXAMPLES, 0)
HARD = [5, 6, 7]
LONGER = Batch.from_examples([replace(e, prompt=HARD + e.prompt) for e in EXAMPLES], 0)
PROMPTS = ragged_examples(5, families.VOCABULARY, seed=3, responses=False)
TEACHER = BigramTeacher(families.VOCABULARY).score(BATCH)
PAGE = (Path(__file__).parents[2] / "docs" / "models.md").read_text("utf-8")


def listed(heading, number=0):
    """The families in a list of the documentation's page, the first or another one below a heading."""
    lists = re.findall(r"(?:^- `.*`\n)+", PAGE.partition(f"## {heading}\n")[2].partition("\n## ")[0], re.MULTILINE)
    return set(re.findall(r"`(.*)`", lists[number]))


NO_SOFT_PROMPT, PLAIN = listed("Soft prompts"), listed("Logits of all positions")
NO_CACHE, ROWS_STAY = listed("Key-value caches"), listed("Key-value caches", 1)
every_family = pytest.mark.parametrize("family", families.FAMILIES)


@cache
def model(family):
    own = families.model(family)
    with torch.no_grad():
        for name, parameter in own.named_parameters():
            if name.endswith("correct_output_scale"):
                parameter.fill_(1)  # at 0, as in a new model, Gemma 3n's embeddings of layers have no effect
    return own


@every_family
def test_the_fused_loss_equals_the_plain_one_in_value_and_every_gradient(family):
    own = model(family)
    assert can_fuse(own) == (family not in PLAIN)
    weights = BATCH.weights("token")
    fused, plain = (
        loss_and_gradients(own, TEACHER, JensenShannon(0.3), BATCH, "token", weights, fused=fused)
        for fused in (can_fuse(own), False)
    )
    own.zero_grad()
    assert_same(fused, plain, rtol=1e-4, atol=1e-5)


@every_family
def test_a_soft_prompt_of_tokens_is_those_tokens_in_front(family):
    own = model(family)
    if family in NO_SOFT_PROMPT:
        with pytest.raises(ValueError, match=r"a soft prompt cannot .* choose a teacher of another family"):
            check_soft_prompt(own)
        return
    check_soft_prompt(own)
    for ids, batch in ((HARD, LONGER), ([], BATCH)):
        soft = score_no_grad(own, BATCH, fused=False, soft_prompt=token_embeddings(own, ids)).log_probs
        hard = score_no_grad(own, batch, fused=False).log_probs
        torch.testing.assert_close(soft, hard, rtol=1e-4, atol=1e-4)


@every_family
def test_a_greedy_response_generated_alone_is_the_same_in_a_batch(family):
    """Rows end at different times, so that they are dropped from the batch where the cache can drop them."""
    support = CacheSupport(family not in NO_CACHE, family not in ROWS_STAY)
    assert cache_support(model(family), families.VOCABULARY) == support
    rollout = GenerateRollout().bind(model(family), words(families.VOCABULARY))
    sampling = Sampling(max_new_tokens=6, temperature=0, stop_ids=tuple(range(4, families.VOCABULARY, 5)))
    together = rollout.generate(PROMPTS, sampling, Step(0))
    assert [rollout.generate([prompt], sampling, Step(0))[0] for prompt in PROMPTS] == together
