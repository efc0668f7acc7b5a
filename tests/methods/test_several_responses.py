"""Several responses to a prompt, n > 1, and the same row several times in a step: right in every method, or refused."""

from dataclasses import replace

import pytest
from fakes import ScriptedRollout, ragged_examples, words
from loop import logged, short_sampling, trainer

from understudy.batch import Batch, Example, groups
from understudy.divergences import ReverseKL
from understudy.method import MethodContext
from understudy.methods.dpkd import DPKD
from understudy.methods.gkd import GKD
from understudy.methods.kd import KD
from understudy.methods.promptkd import PromptKD
from understudy.methods.seqkd import SeqKD
from understudy.methods.sft import SFT
from understudy.reward import Reward
from understudy.rollout import Writer, Writers
from understudy.step import Step

CORPUS = [Example([1], [4 + i, 2], "corpus", row=i) for i in range(20)]


def short(prompts, responses, rows):
    return [-float(len(r.split())) for r in responses]


GENERATE = {
    "gkd": GKD,
    "gkd by step": lambda: GKD(on_policy=0.9),
    "gkd with a reward": lambda: GKD(distillation=0.5, divergence=ReverseKL(), reward=Reward([short])),
    "seqkd": SeqKD,
    "promptkd": lambda: PromptKD(prompt_tokens=0),
    "dpkd": DPKD,
    "dpkd that keeps responses": lambda: DPKD(refresh=2),
    "dpkd by token": lambda: DPKD(level="token"),
}


@pytest.mark.parametrize("name", GENERATE)
def test_the_loss_is_the_mean_over_all_responses(name, tmp_path):
    """Of each example or pair by itself, however the step is cut."""
    run = trainer(
        tmp_path,
        GENERATE[name](),
        sampling=short_sampling(n=3),
        examples=ragged_examples(4),
        options={"corpus": CORPUS},
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=1,
    )
    step = Step(0, run.args.seed, 1)
    collected = run.method.collect(ragged_examples(4), run.writers, step)
    by_author = {author: sum(e.author == author for e in collected) for author in ("student", "teacher", "corpus")}
    assert set(by_author.values()) <= {0, 12}
    total, normalizer = 0.0, 0
    for group in groups(collected):
        batch = Batch.from_examples(group, 0)
        total += float(run.weighted_loss(run.model, batch, run.method, diagnose=False))
        normalizer += batch.normalizer(run.method.reduction)
    run.train()
    assert logged(run) == pytest.approx([total / normalizer], rel=1e-5)


@pytest.mark.parametrize("method", [SFT(), KD(), GKD(on_policy=0.0)], ids=["sft", "kd", "gkd"])
def test_several_responses_are_refused_where_none_is_generated(method, tmp_path):
    sentence = "trains on the dataset's responses, of which there is one per row: set the rollout's n to 1, not 2"
    with pytest.raises(ValueError, match=sentence):
        trainer(tmp_path, method, sampling=short_sampling(n=2))


def test_a_mix_by_example_would_count_prompts_unequally(tmp_path):
    with pytest.raises(ValueError, match="would count a student's prompt 4 times"):
        trainer(tmp_path, GKD(on_policy=0.5, mix="example"), sampling=short_sampling(n=4))
    trainer(tmp_path, GKD(mix="example"), sampling=short_sampling(n=4))


@pytest.mark.parametrize(("refresh", "expected"), [(1, [0, 1, 2]), (2, [0, 0, 2]), (0, [0, 0, 0])])
def test_dpkd_keeps_every_response_of_every_draw_of_a_row(refresh, expected):
    """The row 0 is drawn twice; each draw has responses of its own, also after a resume."""
    rows = [replace(ragged_examples(2)[i], response=[]) for i in (0, 1, 0)]
    writers = Writers(*(Writer(ScriptedRollout(author=a), short_sampling(n=2)) for a in ("student", "teacher")))
    method, resumed, seen = DPKD(refresh=refresh), DPKD(refresh=refresh), []
    for number in range(3):
        examples = method.collect(rows, writers, Step(number))
        assert examples == resumed.collect(rows, writers, Step(number))
        resumed = DPKD(refresh=refresh)
        resumed.load_state_dict(method.state_dict())
        own = [e.response for e in examples if e.author == "student"]
        assert len(own) == 6
        seen.append(own)
    assert [seen.index(own) for own in seen] == expected
    if refresh == 1:
        assert method.state_dict() == {}


def test_a_kept_response_stands_in_the_example_of_the_step():
    """Columns and the teacher's own prompt come from the dataset, also after a resume."""
    method, resumed = DPKD(refresh=0), DPKD(refresh=0)
    prompt = Example([4, 5], [], row=0, teacher_prompt=[6, 4, 5], columns={"answer": "w7"})
    writers = Writers(*(Writer(ScriptedRollout(author=a), short_sampling()) for a in ("student", "teacher")))
    method.collect([prompt], writers, Step(0))
    resumed.load_state_dict(method.state_dict())
    [_, loser] = resumed.collect([prompt], writers, Step(1))
    assert (loser.teacher_prompt, loser.columns) == ([6, 4, 5], {"answer": "w7"})


def test_a_text_of_the_corpus_joins_every_pair_whatever_the_process_or_batch():
    method = DPKD()
    method.setup(MethodContext(None, words(), 53, 1e-3, CORPUS))
    writers = Writers(*(Writer(ScriptedRollout(author=a), short_sampling(n=2)) for a in ("student", "teacher")))

    def texts(rows):
        return [e.row for e in method.collect(rows, writers, Step(3)) if e.author == "corpus"]

    rows = ragged_examples(6)
    assert texts(rows) == texts(rows[:2]) + texts(rows[2:])
    assert len(texts(rows)) == 12
    assert len(set(texts(rows))) > 4


def advantages_of(rows, n):
    method = GKD(distillation=0.5, reward=Reward([short]))
    method.setup(MethodContext(None, words(), 53, 1e-3))
    writers = Writers(Writer(ScriptedRollout(), short_sampling(n=n)))
    collected = method.collect([replace(ragged_examples(4)[i], response=[]) for i in rows], writers, Step(0))
    return [(e.streams["reward"][0], e.streams["advantage"][0]) for e in collected]


def test_a_row_that_is_drawn_twice_is_two_groups_of_n():
    pairs = advantages_of([0, 1, 0], n=2)
    for start in range(0, 6, 2):
        (r, a), (other, b) = pairs[start : start + 2]
        assert (a, b) == (pytest.approx(r - other), pytest.approx(other - r))


def test_with_one_response_per_draw_all_are_compared_also_where_a_row_is_drawn_twice():
    pairs = advantages_of([0, 1, 0, 2], n=1)
    rewards = [reward for reward, _ in pairs]
    assert [a for _, a in pairs] == pytest.approx([r - (sum(rewards) - r) / 3 for r in rewards])
    assert any(a for _, a in pairs)
