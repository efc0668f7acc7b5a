"""Every method: the examples that it collects, its loss, its state and its errors."""

import dataclasses

import pytest
import torch
from fakes import BigramTeacher, ScriptedRollout, ragged_examples, words
from loop import arguments, short_sampling, student, teacher, trainer, weights

from understudy.batch import Batch
from understudy.divergences import JensenShannon, ReverseKL
from understudy.method import Method
from understudy.methods import METHODS
from understudy.methods.gkd import GKD
from understudy.methods.kd import KD
from understudy.methods.seqkd import SeqKD
from understudy.methods.sft import SFT
from understudy.models.forward import score
from understudy.rollout import Writer, Writers
from understudy.rollouts.generate import GenerateRollout
from understudy.step import Step
from understudy.teacher import Capability, Teacher
from understudy.training.trainer import StudentTrainer

EXAMPLES = ragged_examples(8)
PROMPTS = ragged_examples(8, responses=False)


class Forbidden(ScriptedRollout):
    """A rollout that must not be called."""

    def generate(self, prompts, sampling, step):
        raise AssertionError("nothing may be generated here")


def collected(method, examples, step, student=None, teacher=None):
    """What the method trains on, with these rollouts of student and teacher."""
    writers = (None if rollout is None else Writer(rollout, short_sampling()) for rollout in (student, teacher))
    return method.collect(list(examples), Writers(*writers), step)


def test_gkd_without_own_responses_never_generates(tmp_path):
    for mix in ("step", "example"):
        method = GKD(on_policy=0.0, mix=mix)
        for number in range(50):
            assert collected(method, EXAMPLES, Step(number), student=Forbidden()) == EXAMPLES
        assert method.authors == {"dataset"}
    trainer(tmp_path, GKD(on_policy=0.0), rollout=Forbidden()).train()


@pytest.mark.parametrize("mix", ["step", "example"])
def test_gkd_on_own_responses_never_reads_the_dataset_s(mix, tmp_path):
    method = GKD(on_policy=1.0, mix=mix)
    assert method.authors == {"student"}
    for number in range(50):
        responses = collected(method, EXAMPLES, Step(number), student=ScriptedRollout())
        assert {e.author for e in responses} == {"student"}
        assert responses == collected(method, PROMPTS, Step(number), student=ScriptedRollout())
    runs = [trainer(tmp_path, GKD(mix=mix), examples=examples) for examples in (EXAMPLES, PROMPTS)]
    for run in runs:
        run.train()
    assert all(torch.equal(a, b) for a, b in zip(*(weights(run.model).values() for run in runs), strict=True))


@pytest.mark.parametrize("share", [0.25, 0.5, 0.9])
def test_gkd_is_on_policy_as_often_as_asked(share):
    """Within four standard deviations over 2000 draws."""
    margin = 4 * (share * (1 - share) / 2000) ** 0.5
    by_step = GKD(on_policy=share)
    own = [collected(by_step, EXAMPLES, Step(n), student=ScriptedRollout())[0].author == "student" for n in range(2000)]
    assert abs(sum(own) / 2000 - share) < margin
    by_example = GKD(on_policy=share, mix="example")
    responses = [e for n in range(250) for e in collected(by_example, EXAMPLES, Step(n), student=ScriptedRollout())]
    assert abs(sum(e.author == "student" for e in responses) / 2000 - share) < margin


def test_gkd_draws_once_for_a_step_or_once_for_each_example():
    def authors(mix, number):
        responses = collected(GKD(on_policy=0.5, mix=mix), EXAMPLES, Step(number), student=ScriptedRollout())
        return {e.author for e in responses}

    assert all(len(authors("step", number)) == 1 for number in range(30))
    assert sum(len(authors("example", number)) == 2 for number in range(30)) > 20


def test_gkd_s_draw_does_not_depend_on_which_examples_a_process_has():
    for number in range(30):
        for mix in ("step", "example"):
            method, writer = GKD(on_policy=0.5, mix=mix), ScriptedRollout()
            all_examples = collected(method, EXAMPLES, Step(number), student=writer)
            parts = [
                e
                for half in (EXAMPLES[::2], EXAMPLES[1::2])
                for e in collected(method, half, Step(number), student=writer)
            ]
            assert sorted(all_examples, key=lambda e: e.row) == sorted(parts, key=lambda e: e.row)


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_every_process_generates_equally_often(share):
    """A sharded student can generate only if all processes call it, including those without an on-policy example."""
    for mix in ("step", "example"):
        for number in range(30):
            halves = []
            for half in (EXAMPLES[:1], EXAMPLES[1:]):
                writer = ScriptedRollout()
                collected(GKD(on_policy=share, mix=mix), half, Step(number), student=writer)
                halves.append(len(writer.calls))
            assert halves[0] == halves[1]


def test_no_example_is_lost_or_repeated():
    for number in range(30):
        responses = collected(GKD(on_policy=0.5, mix="example"), EXAMPLES, Step(number), student=ScriptedRollout())
        assert sorted(e.row for e in responses) == list(range(8))


def gradient(method, examples, with_teacher):
    model, batch = student(), Batch.from_examples(examples, 0)
    teacher_scores = with_teacher.score(batch) if method.requires else None
    score(
        model,
        batch,
        lambda scores: method.loss(teacher_scores, scores, batch).sum(),
        weights=torch.ones(len(batch.tokens)),
    ).backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("divergence", [JensenShannon(0.5), ReverseKL()])
def test_a_gradient_on_sampled_ids_is_that_on_the_same_ids_as_data(divergence):
    """Nothing of the gradient comes through sampling."""
    method = GKD(divergence=divergence)
    model = student()
    responses = collected(method, PROMPTS, Step(0), student=GenerateRollout().bind(model, words()))
    as_data = [dataclasses.replace(e, author="dataset") for e in responses]
    one, two = gradient(method, responses, teacher()), gradient(KD(divergence=divergence), as_data, teacher())
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert max(float(g.abs().max()) for g in one.values()) > 1e-3


def test_sft_is_the_mean_negative_log_likelihood_of_transformers():
    model, examples = student(), EXAMPLES
    batch = Batch.from_examples(examples, 0)
    loss = score(
        model, batch, lambda scores: SFT().loss(None, scores, batch).mean(), weights=torch.ones(len(batch.tokens))
    )
    labels = batch.input_ids.clone()
    for row, example in enumerate(examples):
        labels[row, : len(example.prompt)] = -100
        labels[row, len(example) :] = -100
    expected = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels).loss
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_kd_mixes_in_the_labels_by_weight(share):
    model, local, batch = student(), teacher(), Batch.from_examples(EXAMPLES, 0)
    values = {}
    for name, method in {"mixed": KD(sft_weight=share), "kd": KD(), "sft": SFT()}.items():
        values[name] = score(model, batch, lambda s, m=method: m.loss(local.score(batch), s, batch).sum()).detach()
    torch.testing.assert_close(values["mixed"], (1 - share) * values["kd"] + share * values["sft"])


def test_seqkd_trains_only_on_the_teacher_s_responses():
    responses = collected(SeqKD(), EXAMPLES, Step(0), teacher=ScriptedRollout(author="teacher"), student=Forbidden())
    assert {e.author for e in responses} == {"teacher"}
    assert SeqKD().authors == {"teacher"}
    assert SeqKD().requires == frozenset()
    assert SeqKD(soft_weight=0.5).requires == {Capability.TOP_K}


def test_seqkd_s_teacher_generates_in_the_training_loop(tmp_path):
    run = trainer(tmp_path, SeqKD(), examples=PROMPTS, max_steps=1, per_device_train_batch_size=8)
    run.train()
    expected = GenerateRollout().bind(teacher().model, run.processing_class, "teacher")
    responses = expected.generate(PROMPTS, short_sampling(), Step(0, run.args.seed))
    assert run.tokens_seen == sum(len(e.response) for e in responses)
    assert run.writers.teacher is not run.writers.student


@pytest.mark.parametrize(
    ("who", "sentence"),
    [
        ("student", "student's own responses: give it a rollout"),
        ("teacher", "teacher's responses: give it a rollout and a"),
    ],
)
def test_a_missing_writer_has_an_error_with_a_remedy(who, sentence):
    with pytest.raises(ValueError, match=sentence):
        getattr(Writers(), who)


def test_sft_needs_no_teacher(tmp_path):
    run = StudentTrainer(
        student(), None, SFT(), processing_class=words(), args=arguments(tmp_path), train_dataset=EXAMPLES
    )
    before = weights(run.model)
    run.train()
    assert any(not torch.equal(before[name], after) for name, after in weights(run.model).items())


class Terse(Teacher):
    """Provides the log-probability of the chosen tokens, and nothing else."""

    provides = frozenset({Capability.CHOSEN})

    def score(self, batch):
        raise AssertionError("must be refused before it scores")


def test_a_teacher_that_provides_too_little_is_refused_with_a_sentence(tmp_path):
    sentence = (
        "GKD requires a teacher that provides top_k, and this teacher provides chosen; choose another method, or one "
        "of the teachers that provide it: .*local"
    )
    with pytest.raises(ValueError, match=sentence):
        trainer(tmp_path, GKD(), with_teacher=Terse())
    trainer(tmp_path, SFT(), with_teacher=Terse())


def test_a_method_that_needs_a_live_teacher_refuses_one_without_a_model(tmp_path):
    class Inside(Method):
        requires = frozenset({Capability.MODEL})

        def loss(self, teacher, student, batch):
            return student.chosen

    with pytest.raises(
        ValueError,
        match="Inside requires a teacher that provides model, and this teacher provides chosen and full and top_k",
    ):
        trainer(tmp_path, Inside(), with_teacher=BigramTeacher())


def test_a_missing_teacher_is_refused_with_a_sentence(tmp_path):
    with pytest.raises(ValueError, match="KD requires a teacher that provides top_k, and there is no teacher"):
        StudentTrainer(student(), None, KD(), processing_class=words(), args=arguments(tmp_path))


@pytest.mark.parametrize("method", [KD(), GKD(), SeqKD(soft_weight=0.5)], ids=["kd", "gkd", "seqkd"])
def test_the_teacher_stays_as_it_is(method, tmp_path):
    frozen = teacher()
    before = weights(frozen.model)
    trainer(tmp_path, method, with_teacher=frozen).train()
    assert all(torch.equal(before[name], after) for name, after in weights(frozen.model).items())
    assert all(p.grad is None and not p.requires_grad for p in frozen.model.parameters())
    assert not frozen.model.training


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: GKD(on_policy=1.5), "on_policy between 0 and 1, not 1.5"),
        (lambda: GKD(on_policy=-0.1), "on_policy between 0 and 1"),
        (lambda: GKD(mix="epoch"), "mix of step or example, not 'epoch'"),
        (lambda: KD(sft_weight=1.0), "for labels alone use the method sft"),
        (lambda: SeqKD(soft_weight=2.0), "soft_weight between 0 and 1"),
    ],
)
def test_settings_out_of_range_are_refused(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


@pytest.mark.parametrize("name", METHODS.names())
def test_every_method_is_a_dataclass_with_a_paper(name):
    method = METHODS.get(name)
    assert dataclasses.is_dataclass(method)
    assert method.__mro__[1] is Method, "no method inherits from a method"
    assert method.paper
    assert METHODS.get(name)() == METHODS.get(name)()


@pytest.mark.parametrize("name", METHODS.names())
def test_every_method_s_state_comes_back(name):
    method = METHODS.get(name)()
    method.load_state_dict(method.state_dict())


def test_gkd_has_the_paper_s_defaults():
    assert GKD() == GKD(on_policy=1.0, mix="step", divergence=JensenShannon(0.5), reduction="sequence")
