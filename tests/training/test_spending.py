"""A run with a budget equals a run whose max_steps is where the budget ends: same rates, same weights."""

import io
import itertools

import pytest
import torch
from fakes import ragged_examples
from loop import difference, logged, same, trainer, weights
from rich.console import Console
from safetensors.torch import load_file
from transformers import TrainerCallback

from understudy.batch import Example
from understudy.budget import Budget
from understudy.method import Method
from understudy.methods.kd import KD
from understudy.training.display import ShowProgress
from understudy.training.spending import Spending, follow_budget

STEPS = 8
EVEN = [Example([4, 5, 6 + row], [7 + row, 8, 2], row=row) for row in range(20)]  # twelve tokens to a step of four


@pytest.fixture
def clock(monkeypatch):
    """A clock that advances by a second whenever it is read: a step takes one, and so does the time between steps."""
    monkeypatch.setattr("understudy.training.spending.perf_counter", itertools.count().__next__)


def new_run(folder, budget=None, method=None, options=None, **changed):
    defaults = {"max_steps": 40, "lr_scheduler_type": "linear"}
    return trainer(
        folder,
        method or KD(),
        examples=EVEN,
        options={"budget": None if budget is None else Budget(**budget), **(options or {})},
        **{**defaults, **changed},
    )


def trained(folder, budget=None, method=None, options=None, **changed):
    run = new_run(folder, budget, method, options, **changed)
    run.train()
    return run


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize(
    ("budget", "schedule"),
    [
        *(({"tokens": 12 * STEPS}, name) for name in ("linear", "cosine", "constant_with_warmup")),
        ({"seconds": float(STEPS)}, "linear"),
    ],
    ids=str,
)
@pytest.mark.parametrize("warmup", [0, 2, 0.25], ids=["no warm-up", "steps of warm-up", "a share of warm-up"])
def test_a_run_with_a_budget_equals_a_run_of_as_many_steps(warmup, budget, schedule, tmp_path):
    options = {"lr_scheduler_type": schedule, "warmup_steps": warmup}
    steps = trained(tmp_path, max_steps=STEPS, **options)
    run = trained(tmp_path, budget, **options)
    assert run.state.global_step == STEPS
    expected = logged(steps, "learning_rate")
    assert len(expected) == STEPS
    assert logged(run, "learning_rate") == pytest.approx(expected, rel=1e-9, abs=1e-18)
    assert difference(weights(run.model), weights(steps.model)) < 1e-5


@pytest.mark.parametrize(("tokens", "steps"), [(1, 1), (12, 1), (13, 2), (95, 8), (10_000, 9)])
def test_the_run_ends_with_the_first_step_that_reaches_the_budget_and_never_after_its_steps(tokens, steps, tmp_path):
    run = trained(tmp_path, {"tokens": tokens}, max_steps=9)
    assert run.state.global_step == steps
    assert run.tokens_seen == 12 * steps


def test_a_run_that_max_steps_ends_has_the_schedule_of_max_steps(tmp_path):
    plain, run = trained(tmp_path, max_steps=4), trained(tmp_path, {"tokens": 10_000}, max_steps=4)
    assert same(weights(plain.model), weights(run.model))


@pytest.mark.usefixtures("clock")
def test_evaluation_checkpoints_and_callbacks_cost_no_seconds(tmp_path):
    """The clock advances during them as well."""

    class Ask(TrainerCallback):
        def on_step_end(self, *_, **__):
            from understudy.training.spending import perf_counter

            perf_counter()

    options = {"eval_dataset": EVEN[:4], "callbacks": [Ask()]}
    run = trained(
        tmp_path, {"seconds": 3.0}, options=options, eval_strategy="steps", eval_steps=1, save_strategy="steps"
    )
    assert run.state.global_step == 3
    assert run.spending.seconds == 3.0


def test_the_last_step_is_logged_evaluated_and_saved_as_the_last_of_max_steps_is(tmp_path):
    options = {"eval_dataset": EVEN[:4]}
    often = {"eval_strategy": "steps", "eval_steps": 4, "logging_steps": 4, "save_strategy": "steps", "save_steps": 4}
    run = trained(tmp_path, {"tokens": 12 * 6}, options=options, **often)
    lines = run.state.log_history
    assert [line["step"] for line in lines if "eval_loss" in line] == [4, 6]
    assert [line["step"] for line in lines if "loss" in line] == [4, 6]
    assert sum(logged(run, "tokens")) == run.tokens_seen
    assert (tmp_path / "checkpoint-6").is_dir()


class Total(Method):
    """Records the expected number of steps of the run."""

    requires = frozenset()

    def __init__(self):
        self.before, self.after = [], []

    def collect(self, examples, writers, step):
        self.before.append(step.total)
        return examples

    def loss(self, teacher, student, batch):
        return -student.chosen

    def after_step(self, step):
        self.after.append((step.number, step.total))


def test_a_method_s_own_schedule_gets_the_expected_number_of_steps(tmp_path):
    method = Total()
    trained(tmp_path, {"tokens": 12 * 5 - 1}, method)
    assert method.before == [40, 5, 5, 5, 5]
    assert method.after == [(1, 5), (2, 5), (3, 5), (4, 5), (5, 5)]


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("budget", [{"tokens": 12 * STEPS - 5}, {"seconds": STEPS - 0.5}], ids=["tokens", "seconds"])
@pytest.mark.parametrize("stop", [1, 4, STEPS], ids=["in the warm-up", "after it", "at the end"])
def test_a_resumed_run_does_not_get_its_budget_again(budget, stop, tmp_path):
    common = {"save_strategy": "steps", "save_steps": 1, "warmup_steps": 2, "per_device_train_batch_size": 4}
    uninterrupted = trained(tmp_path, budget, **common)
    assert uninterrupted.state.global_step == STEPS
    saved = load_file(tmp_path / f"checkpoint-{stop}" / "distillation.safetensors")["spent"]
    assert saved[:2].tolist() == [12 * stop, stop]
    resumed = new_run(tmp_path, budget, **common)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop}"))
    assert resumed.state.global_step == STEPS
    assert same(weights(uninterrupted.model), weights(resumed.model))
    assert (resumed.tokens_seen, resumed.spending.seconds) == (12 * STEPS, STEPS)


def test_a_run_resumed_at_its_last_step_has_no_more(tmp_path):
    common = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3, "lr_scheduler_type": "constant"}
    uninterrupted, resumed = trained(tmp_path, **common), new_run(tmp_path, **common)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 3
    assert same(weights(uninterrupted.model), weights(resumed.model))


def test_a_second_training_has_the_whole_budget_again(tmp_path):
    run = new_run(tmp_path, {"tokens": 24})
    for _ in range(2):
        run.train()
        assert (run.state.global_step, run.tokens_seen) == (2, 24)


def test_a_layer_wise_optimizer_is_refused_since_its_rates_cannot_follow():
    from transformers.trainer_pt_utils import LayerWiseDummyScheduler

    with pytest.raises(ValueError, match=r"cannot follow a budget: choose another training\.optim"):
        follow_budget(object.__new__(LayerWiseDummyScheduler), Spending(Budget(tokens=5)), 10, 0)


def test_a_schedule_that_follows_a_metric_is_left_alone(tmp_path):
    plateau = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 1}
    run = trained(tmp_path, {"tokens": 24}, options={"eval_dataset": EVEN[:4]}, **plateau)
    assert run.state.global_step == 2


def test_progress_says_how_much_is_spent_and_how_many_steps_that_makes():
    out = io.StringIO()
    spending = Spending(Budget(tokens=100_000))
    bar = ShowProgress(Console(file=out, force_terminal=True, width=160), spending)
    state = type("State", (), {"global_step": 0, "max_steps": 1000, "is_world_process_zero": True})()
    bar.on_train_begin(None, state, None)
    assert bar.progress.tasks[0].total == 1000
    spending.tokens, state.global_step = 26_000, 13
    bar.on_step_end(None, state, None)
    assert bar.progress.tasks[0].total == 50
    bar.on_train_end(None, state, None)
    assert "13/50" in out.getvalue()
    assert "26% of 100,000 response tokens" in out.getvalue()


def test_a_ragged_budget_s_rates_fall_with_the_tokens(tmp_path):
    """Steps of different sizes: after each the rate is what is left of the budget."""
    run = trainer(tmp_path, KD(), examples=ragged_examples(16), options={"budget": Budget(tokens=80)},
                  max_steps=100, lr_scheduler_type="linear")  # fmt: skip
    run.train()
    spent = list(itertools.accumulate(logged(run, "tokens"), initial=0.0))
    expected = [1e-2 * (1 - tokens / 80) for tokens in spent[:-1]]
    assert len({b - a for a, b in itertools.pairwise(spent)}) > 1
    assert logged(run, "learning_rate") == pytest.approx(expected)
    assert spent[-2] < 80 <= spent[-1]
    assert torch.isfinite(torch.tensor(expected)).all()
