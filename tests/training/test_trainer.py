"""The trainer: a loss that does not depend on micro-batches, correct logs, and only the student is trained.

Runs on several processes are in test_distributed.py, interrupted ones in test_resume.py.
"""

import math
import time
from dataclasses import dataclass, field, replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from fakes import BigramTeacher, ragged_examples, tiny, words
from loop import arguments, difference, logged, same, short_sampling, student, teacher, trainer, weights
from torch.utils.data import IterableDataset
from transformers import AutoModelForCausalLM, TrainerCallback, TrainingArguments

from understudy.batch import Batch, Reduction
from understudy.divergences import Divergence, ForwardKL, ReverseKL
from understudy.method import Method
from understudy.methods.gkd import GKD
from understudy.methods.kd import KD
from understudy.methods.seqkd import SeqKD
from understudy.methods.sft import SFT
from understudy.rollouts.generate import GenerateRollout
from understudy.scores import divergence_metrics
from understudy.step import Step
from understudy.teachers.local import LocalTeacher
from understudy.training.trainer import StudentTrainer

METHODS = {
    "sft": lambda reduction: SFT(reduction),
    "kd": lambda reduction: KD(sft_weight=0.3, reduction=reduction),
    "gkd, its own responses": lambda reduction: GKD(reduction=reduction),
    "gkd, mixed by step": lambda reduction: GKD(on_policy=0.5, reduction=reduction),
    "gkd, mixed by example": lambda reduction: GKD(on_policy=0.5, mix="example", reduction=reduction),
    "seqkd": lambda reduction: SeqKD(soft_weight=0.5, reduction=reduction),
}
CUTS = ((8, 1), (4, 2), (2, 4), (1, 8))


def cut(folder, method, size, parts, double, **changed):
    """Weights after three steps of eight examples, in `parts` micro-batches of `size`."""
    models = [student(), tiny("llama", width=24, seed=2)]
    student_model, local = [model.double() for model in models] if double else models
    run = trainer(
        folder,
        method,
        student_model,
        LocalTeacher(local),
        None,
        short_sampling(stop_ids=[2, *range(5, 15)]),
        ragged_examples(24),
        max_steps=3,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=parts,
        **changed,
    )
    run.train()
    assert len(logged(run)) == 3
    return weights(run.model), logged(run)


@pytest.mark.parametrize("reduction", ["token", "sequence"])
@pytest.mark.parametrize("name", METHODS)
def test_a_step_does_not_depend_on_how_it_is_accumulated(name, reduction, tmp_path):
    """With AdamW, in float64: Adam divides by gradients as small as rounding, which float32 turns into whole steps."""
    reference, *variants = [cut(tmp_path, METHODS[name](reduction), *sizes, double=True) for sizes in CUTS]
    assert difference(reference[0], weights(student().double())) > 1e-3
    for changed, losses in variants:
        assert difference(reference[0], changed) < 1e-10
        assert losses == pytest.approx(reference[1], rel=1e-6)


@pytest.mark.parametrize("name", ["sft", "gkd, its own responses"])
def test_a_step_in_float32_does_not_depend_on_how_it_is_accumulated(name, tmp_path):
    """Plain gradient descent shows the gradients as they are."""
    sgd = {"double": False, "optim": "sgd", "learning_rate": 0.1}
    reference, *variants = [cut(tmp_path, METHODS[name]("token"), *sizes, **sgd)[0] for sizes in CUTS]
    assert difference(reference, weights(student())) > 1e-3
    assert max(difference(reference, changed) for changed in variants) < 1e-6


@pytest.mark.parametrize("reduction", ["token", "sequence", "sum"])
def test_one_step_equals_autograd_of_the_formula(reduction, tmp_path):
    examples = ragged_examples(8)
    run = trainer(tmp_path, KD(reduction=reduction), examples=examples, max_steps=1, per_device_train_batch_size=2,
                   gradient_accumulation_steps=4, optim="sgd", learning_rate=1.0, max_grad_norm=0)  # fmt: skip
    run.train()
    by_hand, local = student(), teacher().model
    divided = {"token": sum(len(e.response) for e in examples), "sequence": len(examples), "sum": len(examples)}
    total = torch.zeros(())
    for example in examples:
        rows = slice(len(example.prompt) - 1, len(example) - 1)
        ids = torch.tensor([example.prompt + example.response])
        log_p, log_q = (model(ids).logits[0, rows].log_softmax(-1) for model in (local, by_hand))
        value = (log_p.exp() * (log_p - log_q)).sum()
        total = total + value / (len(example.response) if reduction == "sequence" else 1)
    total = total / divided[reduction]
    total.backward()
    assert logged(run) == pytest.approx([float(total.detach())], rel=1e-5)
    expected = {name: p.detach() - p.grad for name, p in by_hand.named_parameters()}
    assert difference(weights(run.model), expected) < 2e-6


def test_an_epoch_s_last_incomplete_step_is_normalised_by_what_it_has(tmp_path):
    """Eleven examples, four to a step: the third step has two micro-batches, one of a single example."""
    runs = []
    for size, parts in ((2, 2), (4, 1)):
        run = trainer(tmp_path, KD(), student().double(), LocalTeacher(tiny("llama", width=24, seed=2).double()),
                       examples=ragged_examples(11), num_train_epochs=2, max_steps=-1,
                       per_device_train_batch_size=size, gradient_accumulation_steps=parts)  # fmt: skip
        run.train()
        assert run.state.global_step == 6
        runs.append((weights(run.model), logged(run)))
    assert difference(runs[0][0], runs[1][0]) < 1e-10
    assert runs[0][1] == pytest.approx(runs[1][1], rel=1e-6)


def test_every_example_is_seen_once_in_an_epoch(tmp_path):
    collected = []

    @dataclass
    class Watched(Method):
        requires = frozenset()

        def collect(self, examples, writers, step):
            collected.append((step, [e.row for e in examples]))
            return examples

        def loss(self, teacher, student, batch):
            return -student.chosen

    trainer(tmp_path, Watched(), examples=ragged_examples(16), num_train_epochs=2, max_steps=-1, seed=5,
            gradient_accumulation_steps=2).train()  # fmt: skip
    assert [step for step, _ in collected] == [Step(number, 5, 4) for number in range(4)]
    rows = [row for _, rows in collected for row in rows]
    assert sorted(rows[:16]) == sorted(rows[16:]) == list(range(16))
    assert rows[:16] != rows[16:]


@pytest.mark.parametrize("method", [KD(), GKD()], ids=["kd", "gkd"])
def test_logged_numbers_equal_their_definitions(method, tmp_path):
    examples = ragged_examples(8)
    sampling = short_sampling(stop_ids=[2, *range(5, 25)])
    run = trainer(tmp_path, method, sampling=sampling, examples=examples, max_steps=1, per_device_train_batch_size=2,
                   gradient_accumulation_steps=4)  # fmt: skip
    if isinstance(method, GKD):
        untrained = GenerateRollout().bind(student(), words())
        examples = untrained.generate(examples, sampling, Step(0, run.args.seed))
        assert 0 < sum(e.truncated for e in examples) < 8
    run.train()
    line = run.state.log_history[0]
    tokens = sum(len(e.response) for e in examples)
    assert line["tokens"] == tokens
    assert run.tokens_seen == tokens
    assert line["response_length"] == tokens / 8
    assert line["truncated"] == sum(e.truncated for e in examples) / 8
    p, q = [], []
    for example in examples:
        rows, ids = slice(len(example.prompt) - 1, len(example) - 1), torch.tensor([example.prompt + example.response])
        for model, log_probs in ((teacher().model, p), (student(), q)):
            log_probs.append(model(ids).logits[0, rows].log_softmax(-1).detach())
    p, q = torch.cat(p), torch.cat(q)
    expected = {
        "forward_kl": (p.exp() * (p - q)).sum(-1),
        "reverse_kl": (q.exp() * (q - p)).sum(-1),
        "student_entropy": -(q.exp() * q).sum(-1),
        "teacher_entropy": -(p.exp() * p).sum(-1),
    }
    for name, values in expected.items():
        assert line[name] == pytest.approx(float(values.mean()), rel=1e-4), name


def test_a_log_line_counts_every_step_since_the_last(tmp_path):
    every, pairs = (trainer(tmp_path, KD(), max_steps=4, logging_steps=n) for n in (1, 2))
    every.train()
    pairs.train()
    one, two = logged(every, "tokens"), logged(pairs, "tokens")
    assert two == [one[0] + one[1], one[2] + one[3]]
    assert every.tokens_seen == pairs.tokens_seen == sum(one)


def test_seconds_add_up_to_the_time_that_passed(tmp_path):
    run = trainer(tmp_path, GKD(), max_steps=6, logging_steps=6)
    start = time.perf_counter()
    run.train()
    passed = time.perf_counter() - start
    line = run.state.log_history[0]
    seconds = [line[f"seconds_{activity}"] for activity in ("generate", "score", "learn", "other")]
    assert min(seconds) > 0
    assert 0.6 * passed < sum(seconds) <= passed
    assert line["tokens_per_second"] == pytest.approx(line["tokens"] / sum(seconds))


def test_models_are_compared_on_logged_steps_only(tmp_path, monkeypatch):
    from understudy.training import trainer as module

    compared = []

    def recorded(*scores):
        compared.append(run.state.global_step)
        return divergence_metrics(*scores)

    monkeypatch.setattr(module, "divergence_metrics", recorded)

    run = trainer(tmp_path, KD(), max_steps=7, logging_steps=3, logging_first_step=True)
    run.train()
    assert compared == [0, 2, 5]
    assert len(logged(run, "forward_kl")) == 3


def test_a_method_that_needs_no_distribution_is_not_compared(tmp_path):
    run = trainer(tmp_path, SFT(), with_teacher=BigramTeacher())
    run.train()
    assert not logged(run, "forward_kl")
    assert not any(logged(run, "seconds_score"))


@pytest.mark.parametrize("method", [KD(), GKD()], ids=["kd", "gkd"])
def test_evaluation_gives_the_objective_on_a_fixed_set_the_same_every_time(method, tmp_path):
    examples = ragged_examples(7, seed=9)
    run = trainer(tmp_path, method, options={"eval_dataset": examples})
    first, second = run.evaluate(), run.evaluate()
    assert {k: v for k, v in first.items() if "second" not in k} == {
        k: v for k, v in second.items() if "second" not in k
    }
    collected = method.collect(examples, run.writers, Step(0, run.args.seed))
    total, normalizer = 0.0, 0
    for example in collected:
        batch = Batch.from_examples([example], 0)
        value = float(run.weighted_loss(run.model, batch, run.method, diagnose=False))
        total, normalizer = total + value, normalizer + batch.normalizer(method.reduction)
    assert first["eval_loss"] == pytest.approx(total / normalizer, rel=1e-5)
    assert first["eval_tokens"] == sum(len(e.response) for e in collected)


def test_evaluation_draws_the_same_at_every_step(tmp_path):
    """A student that does not change has the same evaluation at every step."""
    often = {"eval_strategy": "steps", "eval_steps": 1}
    run = trainer(tmp_path, GKD(), options={"eval_dataset": ragged_examples(5)}, learning_rate=0.0, **often)
    run.train()
    assert len(set(logged(run, "eval_loss"))) == 1


def test_evaluation_does_not_depend_on_its_batch_size(tmp_path):
    losses = [
        trainer(tmp_path, GKD(), options={"eval_dataset": ragged_examples(7)}, per_device_eval_batch_size=n).evaluate()
        for n in (1, 3, 8)
    ]
    assert losses[0]["eval_loss"] == pytest.approx(losses[1]["eval_loss"], rel=1e-5)
    assert losses[0]["eval_forward_kl"] == pytest.approx(losses[2]["eval_forward_kl"], rel=1e-5)


@dataclass
class Hoarding(Method):
    """Trains on everything it ever collected, as methods with a replay buffer do."""

    examples: list = field(default_factory=list)

    def collect(self, examples, writers, step):
        self.examples += examples
        return self.examples[-6:]

    def loss(self, teacher, student, batch):
        return teacher.divergence_to(student, ForwardKL())

    def state_dict(self):
        return {"rows": torch.tensor([e.row for e in self.examples])}

    def load_state_dict(self, state):
        by_row = {e.row: e for e in reversed(self.examples)}  # the first of a row is training's
        self.examples = [by_row[row] for row in state["rows"].tolist()]


@pytest.mark.parametrize("make", [KD, GKD, Hoarding])
def test_evaluation_does_not_disturb_training(make, tmp_path):
    """Neither do its random numbers, its dropout mode, its counts, or a method's state."""
    runs = []
    for changed in ({}, {"eval_strategy": "steps", "eval_steps": 1}):
        model = student("gpt2")
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.2
        options = {"eval_dataset": ragged_examples(5, seed=9)} if changed else {}
        run = trainer(tmp_path, make(), model, options=options, logging_steps=2, **changed)
        run.train()
        runs.append((weights(run.model), logged(run), logged(run, "tokens"), run.tokens_seen))
    assert len(logged(run, "eval_loss")) == 4
    assert same(runs[0][0], runs[1][0])
    assert runs[0][1:] == runs[1][1:]


def test_evaluation_without_a_dataset_has_an_error_with_a_remedy(tmp_path):
    with pytest.raises(ValueError, match="eval_dataset"):
        trainer(tmp_path, KD()).evaluate()
    with pytest.raises(ValueError, match="the eval_dataset is empty"):
        trainer(tmp_path, KD()).evaluate([])


@dataclass
class Broken(Method):
    """A loss that is not finite at the third micro-batch."""

    value: float = math.nan
    micro_batches: int = 0

    def loss(self, teacher, student, batch):
        self.micro_batches += 1
        return -student.chosen * (self.value if self.micro_batches == 3 else 1.0)


@pytest.mark.parametrize(("value", "remedy"), [(math.nan, "a lower learning_rate$"), (math.inf, "jensen_shannon$")])
def test_a_loss_that_is_no_number_ends_the_run_before_weights_change(value, remedy, tmp_path):
    run = trainer(tmp_path, Broken(value), per_device_train_batch_size=2, gradient_accumulation_steps=2)
    after = []

    class Remember(TrainerCallback):
        def on_step_end(self, *_, **__):
            after.append(weights(run.model))

    run.add_callback(Remember())
    with pytest.raises(
        FloatingPointError, match=rf"the loss became (nan|inf) at step 1; nothing was updated.*{remedy}"
    ):
        run.train()
    assert len(after) == 1
    assert same(after[0], weights(run.model))


@dataclass
class Steep(Method):
    """A finite loss with a gradient that is NaN."""

    def loss(self, teacher, student, batch):
        return (student.chosen - student.chosen.detach()).abs().sqrt() + 0 * student.chosen


def test_a_gradient_that_is_no_number_ends_the_run_before_weights_change(tmp_path):
    run = trainer(tmp_path, Steep())
    with pytest.raises(FloatingPointError, match="the gradient became nan at step 0"):
        run.train()
    assert same(weights(run.model), weights(student()))


def test_several_gpus_without_a_process_each_are_refused(tmp_path):
    args = arguments(tmp_path)
    args._n_gpu = 2
    with pytest.raises(ValueError, match="one process each: start with torchrun or accelerate launch"):
        StudentTrainer(student(), None, SFT(), processing_class=words(), args=args)


def test_gradients_are_clipped_as_a_whole_step(tmp_path):
    """Plain gradient descent with rate 1: the step is as long as the clipped gradient."""
    run = trainer(tmp_path, SFT(), max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=4,
                   optim="sgd", learning_rate=1.0, max_grad_norm=0.05)  # fmt: skip
    before = weights(run.model)
    run.train()
    after = weights(run.model)
    step = math.sqrt(sum(float((after[name] - before[name]).square().sum()) for name in before))
    assert step == pytest.approx(0.05, rel=1e-3)
    assert logged(run, "grad_norm")[0] > 0.05


def test_bfloat16_autocast_trains(tmp_path):
    run = trainer(tmp_path, KD(), max_steps=6, learning_rate=3e-2, bf16=True)
    run.train()
    losses = logged(run)
    assert {p.dtype for p in run.model.parameters()} == {torch.float32}
    assert losses[-1] < 0.8 * losses[0]
    plain = trainer(tmp_path, KD(), max_steps=1)
    plain.train()
    cast = trainer(tmp_path, KD(), max_steps=1, bf16=True)
    cast.train()
    assert logged(cast)[0] != logged(plain)[0]
    assert logged(cast)[0] == pytest.approx(logged(plain)[0], rel=2e-2)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_gradient_checkpointing_trains_the_same(kind, tmp_path):
    """Also with dropout, which GPT-2 has; a trainer sets its seed when it is made."""
    runs = []
    for checkpointing in (False, True):
        run = trainer(tmp_path, GKD(), student(kind), gradient_checkpointing=checkpointing)
        run.train()
        runs.append(weights(run.model))
    assert difference(*runs) < 1e-6
    assert difference(runs[0], weights(student(kind))) > 1e-3


def test_only_adapters_are_trained_and_load_back(tmp_path):
    base = tmp_path / "base"
    student().save_pretrained(base)
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, task_type="CAUSAL_LM"))
    before = weights(model)
    run = trainer(tmp_path / "run", GKD(), model, max_steps=3)
    run.train()
    after = weights(model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "lora_" in name}
    run.save_model(str(tmp_path / "adapters"))
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "adapters")
    ids = torch.tensor([[4, 5, 6]])
    torch.testing.assert_close(back(ids).logits, model.eval()(ids).logits)
    assert (back(ids).logits - student()(ids).logits).abs().max() > 1e-4


def test_tied_embeddings_stay_tied_and_learn_from_both_ends(tmp_path):
    run = trainer(tmp_path, KD(), student(tied=True), max_steps=1, optim="sgd", learning_rate=1.0, max_grad_norm=0)
    run.train()
    assert run.model.lm_head.weight is run.model.model.embed_tokens.weight
    by_hand, local = student(tied=True), teacher().model
    batch = ragged_examples()
    first_step = [batch[row] for row in rows_of_the_first_step(tmp_path)]
    total = torch.zeros(())
    for example in first_step:
        rows, ids = slice(len(example.prompt) - 1, len(example) - 1), torch.tensor([example.prompt + example.response])
        log_p, log_q = (model(ids).logits[0, rows].log_softmax(-1) for model in (local, by_hand))
        total = total + (log_p.exp() * (log_p - log_q)).sum()
    (total / sum(len(e.response) for e in first_step)).backward()
    expected = {name: p.detach() - p.grad for name, p in by_hand.named_parameters()}
    assert difference(weights(run.model), expected) < 2e-6


def rows_of_the_first_step(folder):
    rows = []

    class Watched(Method):
        requires = frozenset()

        def collect(self, examples, writers, step):
            rows.extend(e.row for e in examples)
            return examples

        def loss(self, teacher, student, batch):
            return -student.chosen

    trainer(folder, Watched(), max_steps=1).train()
    return rows


@pytest.mark.parametrize("sizes", [(53, 64), (64, 53), (56, 64), (64, 56)])
def test_vocabularies_padded_differently_train_as_unpadded_ones_would(sizes, tmp_path):
    size, teacher_size = sizes
    padded = trainer(tmp_path, GKD(), widened(student(), size), LocalTeacher(widened(teacher().model, teacher_size)))
    plain = trainer(tmp_path, GKD())
    padded.train()
    plain.train()
    assert logged(padded) == pytest.approx(logged(plain), rel=1e-4)
    assert logged(padded, "forward_kl") == pytest.approx(logged(plain, "forward_kl"), rel=1e-4)
    cut_head = padded.model.lm_head.weight[:53]
    assert (cut_head - plain.model.lm_head.weight).abs().max() < 1e-4
    assert torch.equal(padded.model.lm_head.weight[53:], widened(student(), size).lm_head.weight[53:])


def widened(model, vocabulary):
    """The same model with large weights for tokens that no text has."""
    wide = tiny("llama", vocabulary=vocabulary, width=model.config.hidden_size, seed=8)
    own = model.state_dict()
    state = {
        name: torch.cat([own[name], 3 * value[len(own[name]) :]]) if value.shape != own[name].shape else own[name]
        for name, value in wide.state_dict().items()
    }
    wide.load_state_dict(state)
    return wide


@dataclass
class Preferring(Method):
    """As DPKD: the teacher's response should be the likelier one, −log σ(mean log q_w − mean log q_l)."""

    reduction: Reduction = "sequence"

    @property
    def authors(self):
        return frozenset({"teacher", "student"})

    def collect(self, examples, writers, step):
        pairs = zip(writers.teacher(examples, step), writers.student(examples, step), strict=True)
        return [replace(e, pair=number) for number, pair in enumerate(pairs) for e in pair]

    def loss(self, teacher, student, batch):
        means = batch.per_sequence(student.chosen) / batch.lengths
        sign = torch.tensor([1.0 if e.author == "teacher" else -1.0 for e in batch.examples])
        numbers = sorted({e.pair for e in batch.examples})
        which = torch.tensor([numbers.index(e.pair) for e in batch.examples])
        assert torch.bincount(which).tolist() == [2] * len(numbers), "a pair was torn apart"
        margin = means.new_zeros(len(numbers)).index_add(0, which, sign * means)
        return -torch.nn.functional.logsigmoid(margin)[which][batch.sequence_ids]


def test_pairs_stay_together_however_a_step_is_cut(tmp_path):
    reference, *variants = [cut(tmp_path, Preferring(), *sizes, double=True) for sizes in CUTS]
    for changed, losses in variants:
        assert difference(reference[0], changed) < 1e-10
        assert losses == pytest.approx(reference[1], rel=1e-6)


def test_examples_may_come_from_an_iterable_dataset(tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(ragged_examples(16))

    run = trainer(tmp_path, KD(), examples=Stream())
    run.train()
    assert len(logged(run)) == 4
    assert run.tokens_seen == sum(len(e.response) for e in ragged_examples(16))


def test_a_method_s_schedule_moves_once_per_optimizer_step(tmp_path):
    steps = []

    class Scheduled(Method):
        requires = frozenset()

        def after_step(self, step):
            steps.append(step.number)

        def loss(self, teacher, student, batch):
            return -student.chosen

    trainer(tmp_path, Scheduled(), max_steps=3, per_device_train_batch_size=1, gradient_accumulation_steps=4).train()
    assert steps == [1, 2, 3]


def test_a_method_may_train_something_of_its_own_first(tmp_path):
    calls = []

    class Prompting(Method):
        def before_step(self, batches, teacher, student, step):
            calls.append((step.number, len(batches), sum(len(b.examples) for b in batches), student, teacher))

        def loss(self, teacher, student, batch):
            return teacher.divergence_to(student, ReverseKL())

    run = trainer(tmp_path, Prompting(), max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=3)
    run.train()
    assert calls == [(0, 3, 6, run.model, run.teacher), (1, 3, 6, run.model, run.teacher)]


def test_a_student_equal_to_its_teacher_has_nothing_to_learn(tmp_path):
    run = trainer(tmp_path, GKD(), student(), LocalTeacher(student()), optim="sgd")
    run.train()
    assert logged(run) == pytest.approx([0] * 4, abs=1e-6)
    assert max(logged(run, "forward_kl")) < 1e-5
    assert difference(weights(run.model), weights(student())) < 1e-5


def test_a_teacher_that_is_the_student_itself_is_refused(tmp_path):
    model = student()
    with pytest.raises(ValueError, match="the teacher is the student itself"):
        trainer(tmp_path, KD(), model, LocalTeacher(model))


def test_training_arguments_may_be_left_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = StudentTrainer(student(), None, SFT(), processing_class=words(), train_dataset=ragged_examples())
    assert isinstance(run.args, TrainingArguments)
    assert run.writers == type(run.writers)()


@pytest.mark.parametrize("divergence", [ForwardKL(), ReverseKL(temperature=2.0)])
def test_a_teacher_without_a_model_teaches(divergence: Divergence, tmp_path):
    run = trainer(tmp_path, KD(divergence), with_teacher=BigramTeacher(), max_steps=25, learning_rate=3e-2)
    run.train()
    assert logged(run)[-1] < 0.7 * logged(run)[0]


def test_log_lines_are_in_order_and_carry_the_step(tmp_path):
    run = trainer(tmp_path, KD(), options={"eval_dataset": ragged_examples(3)}, eval_strategy="steps", eval_steps=2)
    run.train()
    steps = [line["step"] for line in run.state.log_history]
    assert all(a <= b for a, b in pairwise(steps))
    assert [line["step"] for line in run.state.log_history if "eval_loss" in line] == [2, 4]
    assert SimpleNamespace(**run.state.log_history[0]).step == 1


def test_a_method_whose_setup_returns_nothing_gets_the_run_s_teacher(tmp_path):
    class Remembers(Method):
        def setup(self, context):
            self.tokenizer = context.tokenizer

        def loss(self, teacher, student, batch):
            return teacher.divergence_to(student, ReverseKL())

    made = trainer(tmp_path, Remembers(), max_steps=1)
    made.train()
    assert made.teacher is not None
    assert len(logged(made)) == 1


def test_a_method_without_a_teacher_logs_its_metrics(tmp_path):
    class Teacherless(Method):
        requires = frozenset()

        def loss(self, teacher, student, batch):
            return -student.chosen

        def metrics(self, teacher, student, batch):
            return {"surprise": -student.chosen}

    made = trainer(tmp_path, Teacherless(), max_steps=2)
    made.train()
    assert logged(made, "surprise") == pytest.approx(logged(made), rel=1e-4)
