"""What StudentTrainer accepts: names, bare models, datasets of rows, adapters, a rollout of the teacher alone."""

import re
from pathlib import Path

import datasets
import pytest
import torch
from fakes import BigramTeacher, ScriptedRollout, ragged_examples, words
from folders import llama, sums
from loop import arguments, logged, same, short_sampling, student, teacher, trainer, weights
from peft import LoraConfig
from torch import nn

from understudy.batch import Example
from understudy.data.examples import load_examples
from understudy.data.rows import DataError
from understudy.methods.dpkd import DPKD
from understudy.methods.gkd import GKD
from understudy.methods.kd import KD
from understudy.methods.seqkd import SeqKD
from understudy.methods.sft import SFT
from understudy.models.load import load_tokenizer
from understudy.rollouts.generate import GenerateRollout
from understudy.teachers.local import LocalTeacher
from understudy.training.trainer import StudentTrainer

PAGE = Path(__file__).resolve().parents[2] / "docs" / "getting-started.md"
ROWS = {
    "prompt and completion": [{"prompt": f"{i}+1=", "completion": f"{i + 1}"} for i in range(8)],
    "text": [{"text": f"{i}+1={i + 1}\n" * 3} for i in range(8)],
    "messages": [
        {"messages": [{"role": "user", "content": f"{i}+1"}, {"role": "assistant", "content": f"{i + 1}"}]}
        for i in range(8)
    ],
}
TEMPLATE = "{% for m in messages %}{{ m.content }}={% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    llama(folder / "teacher", hidden_size=24)
    llama(folder / "student", seed=1)
    sums(folder / "sums.jsonl")
    return folder


def test_names_load_student_teacher_and_tokenizer(home, tmp_path):
    names = StudentTrainer(
        str(home / "student"),
        home / "teacher",
        KD(),
        args=arguments(tmp_path),
        train_dataset=[dict(row) for row in ROWS["prompt and completion"]],
    )
    tokenizer = load_tokenizer(str(home / "student"))
    objects = StudentTrainer(
        names.model.__class__.from_pretrained(home / "student", dtype=torch.float32),
        LocalTeacher(str(home / "teacher")),
        KD(),
        processing_class=tokenizer,
        args=arguments(tmp_path),
        train_dataset=load_examples(home / "sums.jsonl", tokenizer),
    )
    assert names.processing_class.get_vocab() == tokenizer.get_vocab()
    assert same(weights(names.model), weights(objects.model))
    assert same(weights(names.teacher.model), weights(objects.teacher.model))
    names.train()
    assert len(logged(names)) == 4


def test_a_bare_model_is_a_frozen_teacher(tmp_path):
    bare = teacher().model
    for parameter in bare.parameters():
        parameter.requires_grad_(True)
    runs = [trainer(tmp_path, GKD(), with_teacher=one) for one in (bare, teacher())]
    for run in runs:
        run.train()
    assert isinstance(runs[0].teacher, LocalTeacher)
    assert same(*(weights(run.model) for run in runs))
    assert not any(p.requires_grad for p in bare.parameters())


@pytest.mark.parametrize("columns", ROWS)
def test_a_dataset_of_rows_trains_as_its_examples_do(columns, home, tmp_path):
    rows = ROWS[columns]
    tokenizer = load_tokenizer(str(home / "student"))
    tokenizer.chat_template = TEMPLATE
    dataset = datasets.Dataset.from_list(rows)
    options = {"text_prompt": 4} if columns == "text" else {}
    run = StudentTrainer(
        str(home / "student"),
        None,
        SFT(),
        processing_class=tokenizer,
        args=arguments(tmp_path),
        train_dataset=dataset,
        eval_dataset={"one": rows, "two": dataset},
        data_options=options,
    )
    run.train()
    metrics = run.evaluate()
    assert metrics["eval_one_loss"] == metrics["eval_two_loss"] < logged(run)[0]
    assert [e.row for e in run.train_dataset] == list(range(8))
    assert all(e.response[-1] == tokenizer.eos_token_id for e in run.train_dataset)


def test_prompts_of_rows_leave_room_for_new_tokens(home, tmp_path):
    rows = [{"prompt": "1+" * 30 + "1="}] * 2
    run = StudentTrainer(
        str(home / "student"),
        home / "teacher",
        GKD(),
        GenerateRollout(),
        short_sampling(),
        args=arguments(tmp_path),
        train_dataset=rows,
    )
    assert {len(e.prompt) for e in run.train_dataset} == {64 - 6}


def test_rows_that_do_not_serve_the_method_are_refused(home, tmp_path):
    def start(**data):
        StudentTrainer(str(home / "student"), home / "teacher", KD(), args=arguments(tmp_path), **data)

    with pytest.raises(DataError, match="KD trains on responses, and no row of train_dataset has one"):
        start(train_dataset=[{"prompt": "1+1="}])
    splits = datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS["text"]))
    with pytest.raises(ValueError, match=re.escape("train_dataset has the splits train: choose one, such as")):
        start(train_dataset=splits)
    with pytest.raises(ValueError, match=r"train_dataset\[1\]: the example of row 7 has an empty response"):
        start(train_dataset=[Example([4], [5, 2]), Example([4], [], row=7)])
    with pytest.raises(ValueError, match=r"eval_dataset\[0\]: the example of row 3 has no response token to train on"):
        start(eval_dataset=[Example([4], [5, 2], row=3, trained=[False, False])])


def test_adapters_are_added_and_are_the_same_for_a_seed(home, tmp_path):
    runs = [
        StudentTrainer(
            str(home / "student"),
            None,
            SFT(),
            args=arguments(tmp_path, seed=seed),
            train_dataset=ROWS["prompt and completion"],
            peft_config=LoraConfig(r=2),
        )
        for seed in (1, 1, 2)
    ]
    one, again, other = (weights(run.model) for run in runs)
    assert same(one, again)
    assert not same(one, other)
    assert {name for name, p in runs[0].model.named_parameters() if p.requires_grad} == {n for n in one if "lora_" in n}
    runs[0].save_model(str(tmp_path / "adapters"))
    again = StudentTrainer(str(tmp_path / "adapters"), None, SFT(), args=arguments(tmp_path))
    assert {n for n, p in again.model.named_parameters() if p.requires_grad} == {n for n in one if "lora_" in n}
    with pytest.raises(ValueError, match="adapters already"):
        trainer(tmp_path, KD(), runs[0].model, options={"peft_config": LoraConfig(r=2)})


def test_a_student_without_a_name_needs_a_tokenizer(tmp_path):
    with pytest.raises(ValueError, match="give a processing_class"):
        StudentTrainer(student(), None, SFT(), args=arguments(tmp_path))


def seqkd(folder, local, engine):
    """A run of SeqKD without a rollout of the student."""
    return StudentTrainer(
        student(),
        local,
        SeqKD(),
        None,
        short_sampling(),
        processing_class=words(),
        args=arguments(folder),
        train_dataset=ragged_examples(responses=False),
        teacher_rollout=engine,
    )


@pytest.mark.parametrize("is_bound", [False, True])
def test_seqkd_needs_a_rollout_of_the_teacher_only(is_bound, tmp_path):
    local = teacher()
    engine = GenerateRollout().bind(local.model, words(), "teacher") if is_bound else GenerateRollout()
    alone = seqkd(tmp_path, local, engine)
    both = trainer(tmp_path, SeqKD())
    alone.train()
    both.train()
    assert same(weights(alone.model), weights(both.model))


def test_seqkd_trains_on_an_engine_without_a_teacher_here(tmp_path):
    run = seqkd(tmp_path, None, ScriptedRollout(author="teacher"))
    run.train()
    assert len(logged(run)) == 4


@pytest.mark.parametrize(
    ("method", "teacher_here", "sentence"),
    [
        (GKD(), teacher, "student's own responses: give it a rollout"),
        (SeqKD(), BigramTeacher, "a teacher that can generate, or a teacher_rollout"),
        (DPKD(), teacher, "student's own responses: give it a rollout"),
    ],
)
def test_a_missing_rollout_is_refused_before_training(method, teacher_here, sentence, tmp_path):
    options = {} if not isinstance(method, DPKD) else {"teacher_rollout": ScriptedRollout()}
    with pytest.raises(ValueError, match=sentence):
        StudentTrainer(student(), teacher_here(), method, processing_class=words(), args=arguments(tmp_path), **options)


def test_the_example_of_the_page_runs(home, tmp_path, monkeypatch):
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    [code] = [block for block in blocks if "peft_config" in block]
    for written, here in {
        "Qwen/Qwen3-0.6B": home / "student",
        "Qwen/Qwen3-8B": home / "teacher",
        "train.jsonl": home / "sums.jsonl",
        "runs/names": tmp_path,
    }.items():
        assert written in code
        code = code.replace(written, str(here))
    code = code.replace("max_steps=1000", "max_steps=2, use_cpu=True, report_to='none'").replace("512", "8")
    monkeypatch.chdir(tmp_path)
    content: dict = {}
    exec(code, content)
    assert isinstance(content["trainer"].model, nn.Module)
    assert (tmp_path / "student" / "adapter_model.safetensors").is_file()
