"""The teacher that reads scores from a folder, and the folder. For all teachers see contracts/."""

from dataclasses import replace

import pytest
import torch
from caches import write_cache
from fakes import VOCABULARY, BigramTeacher, TopKOnlyTeacher, ragged_examples, tiny
from loop import logged, student, trainer

from understudy.batch import Batch, Example
from understudy.divergences import AlphaBeta, ForwardKL, JensenShannon, ReverseKL, SkewKL, TotalVariation
from understudy.methods.gkd import GKD
from understudy.methods.kd import KD
from understudy.models.forward import score
from understudy.scores import Scores
from understudy.teacher import Capability
from understudy.teachers.cached import CachedTeacher, example_key
from understudy.teachers.local import LocalTeacher

EXAMPLES = ragged_examples(9)
BATCH = Batch.from_examples(EXAMPLES, pad=0)
DIVERGENCES = [ForwardKL(), ReverseKL(), JensenShannon(0.3), TotalVariation(), SkewKL(), AlphaBeta()]


def files(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def loss_and_gradients(teacher, divergence, vocabulary=VOCABULARY):
    model = tiny("llama", seed=1)
    scores = teacher.score(BATCH).cut(VOCABULARY)
    loss = score(model, BATCH, lambda q: scores.divergence_to(q, divergence).mean(), vocabulary=VOCABULARY)
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters()}}


@pytest.mark.parametrize(
    ("kind", "vocabulary"), [("llama", 64), ("phi", VOCABULARY), ("gemma2", VOCABULARY), ("granite", VOCABULARY)]
)
def test_hidden_rows_give_the_losses_and_gradients_of_the_live_teacher(kind, vocabulary, tmp_path):
    """With a padded vocabulary, with a bias, soft-capped and scaled logits; another batch size wrote the cache."""
    local = LocalTeacher(tiny(kind, vocabulary=vocabulary, seed=2))
    cached = write_cache(tmp_path, local, EXAMPLES)
    for divergence in DIVERGENCES:
        expected, actual = (loss_and_gradients(teacher, divergence) for teacher in (local, cached))
        for name, value in expected.items():
            torch.testing.assert_close(actual[name], value, atol=1e-5, rtol=1e-5, msg=f"{divergence} {name}")


def test_divergences_rise_with_k_to_those_of_all_tokens(tmp_path):
    """Merging events never raises an f-divergence. With K = V "any other token" is impossible for both."""
    local = LocalTeacher(tiny("llama", seed=2))
    student_scores = LocalTeacher(tiny("llama", seed=1)).score(BATCH)
    full = [local.score(BATCH).divergence_to(student_scores, d) for d in DIVERGENCES[:5]]  # the last is none
    before = [torch.zeros_like(value) for value in full]
    for k in (1, 3, 10, VOCABULARY - 1, VOCABULARY):
        scores = write_cache(tmp_path / str(k), local, EXAMPLES, top_k=k).score(BATCH)
        values = [scores.divergence_to(student_scores, d) for d in DIVERGENCES[:5]]
        for value, smaller, largest in zip(values, before, full, strict=True):
            assert (value >= smaller - 1e-4).all()
            assert (value <= largest + 1e-4).all()
        before = values
    torch.testing.assert_close(before, full, atol=1e-4, rtol=0)


def test_half_precision_is_normalised_when_it_is_read(tmp_path):
    """Rounding moves each event, the tail included, by 2⁻¹¹ of its log-probability, and not by that of the largest."""
    teacher = BigramTeacher()
    exact = write_cache(tmp_path / "exact", teacher, EXAMPLES, top_k=5).score(BATCH)
    half = write_cache(tmp_path / "half", teacher, EXAMPLES, top_k=5, dtype="float16").score(BATCH)
    torch.testing.assert_close(half.log_probs.exp().sum(-1), torch.ones(len(BATCH.tokens)))
    torch.testing.assert_close(half.log_probs, exact.log_probs, rtol=1e-3, atol=1e-3)
    assert torch.equal(half.distribution.support, exact.distribution.support)
    torch.testing.assert_close(exact.chosen, teacher.score(BATCH).chosen)


def test_a_top_k_teacher_is_cached_too_and_gives_no_more_than_it_has(tmp_path):
    teacher = TopKOnlyTeacher(k=5)
    scores = write_cache(tmp_path / "3", teacher, EXAMPLES, top_k=3).score(BATCH)
    of_all = write_cache(tmp_path / "all", BigramTeacher(), EXAMPLES, top_k=3).score(BATCH)
    torch.testing.assert_close(scores.log_probs, of_all.log_probs)
    assert torch.equal(scores.distribution.support, of_all.distribution.support)
    with pytest.raises(ValueError, match="gives 5 tokens, and 6 are to be saved"):
        write_cache(tmp_path / "6", teacher, EXAMPLES, top_k=6)
    with pytest.raises(ValueError, match="no hidden rows"):
        write_cache(tmp_path / "hidden", BigramTeacher(), EXAMPLES)


class Killed(BigramTeacher):
    """Fails at the fourth batch, as a killed process would end there."""

    batches = 0

    def score(self, batch: Batch) -> Scores:
        self.batches += 1
        if self.batches == 4:
            raise KeyboardInterrupt
        return super().score(batch)


def test_an_interrupted_cache_is_completed_with_the_same_bytes(tmp_path):
    """Files of one or two batches; torn files, half-written ones and missing ones in the middle are made up for."""
    options = {"top_k": 5, "batch_size": 2, "shard_mb": 0.001}
    examples = ragged_examples(20)
    write_cache(tmp_path / "whole", BigramTeacher(), examples, **options)
    whole = files(tmp_path / "whole")
    assert len(whole) > 4
    folder = tmp_path / "killed"
    with pytest.raises(KeyboardInterrupt):
        write_cache(folder, Killed(), examples, **options)
    assert 0 < len(files(folder)) < len(whole)
    (folder / "scores-00003.safetensors.partial").write_bytes(b"half")
    write_cache(folder, BigramTeacher(), examples, **options)
    assert files(folder) == whole
    (folder / "scores-00001.safetensors").unlink()
    last = folder / max(whole)
    last.write_bytes(whole[last.name][:-40])
    with pytest.raises(ValueError, match=f"{last.name} is damaged: run `understudy cache`"):
        CachedTeacher(str(folder)).score(Batch.from_examples(examples, 0))
    write_cache(folder, BigramTeacher(), examples, **options)
    assert files(folder) == whole


def test_examples_are_added_once_and_found_in_any_batch(tmp_path):
    write_cache(tmp_path, BigramTeacher(), EXAMPLES[:4], top_k=5)
    cached = write_cache(tmp_path, BigramTeacher(), [*EXAMPLES, *EXAMPLES], top_k=5)
    assert [len(x["ids"]) for x in cached.shards.tensors] == [
        sum(len(e.response) for e in EXAMPLES[i:j]) for i, j in ((0, 4), (4, 9))
    ]
    shuffled = [replace(e, row=99) for e in reversed(EXAMPLES)]
    scores = cached.score(Batch.from_examples(shuffled, pad=3))
    expected = BigramTeacher().score(Batch.from_examples(shuffled, pad=0))
    torch.testing.assert_close(scores.chosen, expected.chosen)


def test_a_key_is_of_what_the_teacher_reads_and_of_which_tokens_are_trained_on():
    example = Example([4, 5], [6, 7, 2], row=3)
    keys = {
        example_key(replace(example, **changes))
        for changes in (
            {},
            {"prompt": [4, 5, 6], "response": [7, 2]},
            {"response": [6, 7]},
            {"trained": [True, False, True]},
            {"teacher_prompt": [9]},
            {"inputs": {"pixel_values": torch.ones(1, 2)}},
            {"inputs": {"pixel_values": torch.zeros(1, 2)}},
        )
    }
    assert len(keys) == 7
    same = replace(
        example, row=8, author="student", trained=[True] * 3, teacher_prompt=[4, 5], streams={"x": [1.0] * 3}
    )
    assert example_key(same) == example_key(example)


def test_an_example_that_is_not_in_the_cache_is_refused_by_its_row(tmp_path):
    cached = write_cache(tmp_path, BigramTeacher(), EXAMPLES, top_k=5)
    for changes, reason in (
        ({"response": [5, 2]}, "it has another response or other trained tokens there"),
        ({"prompt": [5, 6, 7, 8, 9, 10, 11]}, "its prompt is not there"),
    ):
        with pytest.raises(
            ValueError, match=f"the example of row 4 is not in the cache .*: {reason}; run `understudy c"
        ):
            cached.score(Batch.from_examples([replace(EXAMPLES[4], **changes)], pad=0))


def test_what_it_provides_depends_on_the_folder(tmp_path):
    full = frozenset({Capability.CHOSEN, Capability.TOP_K, Capability.FULL})
    assert write_cache(tmp_path / "hidden", LocalTeacher(tiny("llama")), []).provides == full
    assert write_cache(tmp_path / "k", BigramTeacher(), [], top_k=5).provides == full - {Capability.FULL}
    assert write_cache(tmp_path / "only", TopKOnlyTeacher(), [], top_k=5).provides == {Capability.TOP_K}
    with pytest.raises(ValueError, match="is not a cache of a teacher's scores: `understudy cache` writes one"):
        CachedTeacher(str(tmp_path / "nothing"))
    hidden = write_cache(tmp_path / "hidden", LocalTeacher(tiny("llama")), EXAMPLES)
    (tmp_path / "hidden" / "head.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"head\.safetensors is missing or damaged: write the cache again"):
        hidden.score(BATCH)
    (tmp_path / "k" / "cache.json").write_text('{"kind": "top_k"}')
    with pytest.raises(ValueError, match=r"cache.json is not what `understudy cache` writes"):
        CachedTeacher(str(tmp_path / "k"))


def test_training_with_it_is_training_with_the_live_teacher(tmp_path):
    local, examples = LocalTeacher(tiny("llama", width=24, seed=2)), ragged_examples(16)
    cached = write_cache(tmp_path / "cache", local, examples)
    runs = [
        trainer(tmp_path, KD(), with_teacher=teacher, examples=examples, max_steps=6) for teacher in (local, cached)
    ]
    losses = []
    for run in runs:
        run.train()
        losses.append(logged(run))
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert len(losses[0]) == 6  # more than an epoch


def test_methods_that_generate_responses_refuse_it(tmp_path):
    cached = write_cache(tmp_path / "cache", BigramTeacher(), EXAMPLES, top_k=5)
    with pytest.raises(ValueError, match="GKD trains on responses of the student that are generated during the run"):
        trainer(tmp_path, GKD(), with_teacher=cached)
    run = trainer(
        tmp_path,
        GKD(on_policy=0.0),
        model=student(),
        with_teacher=cached,
        examples=EXAMPLES,
        options={"eval_dataset": EXAMPLES},
        max_steps=1,
    )
    assert "eval_loss_dataset" in run.evaluate()
