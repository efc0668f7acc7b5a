"""Every recipe of the repository is built, and one of each method and architecture trains, with small random models.

The recipes are not changed. The models and files that they name lie below the working directory, in folders of the same
names (`Qwen/Qwen3-0.6B`, `runs/sft/student`), which go before the hub; `load_dataset` is replaced by one that knows the
columns, splits and configurations of the hub's datasets. The models have two layers, a token for every byte, and the
architecture, context length, special tokens and chat template of the real models' family.
"""

import gzip
import json
import os
import re
import shlex
import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from accelerate.state import AcceleratorState
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from understudy.models.load import load_tokenizer
from understudy.playground.names import is_playground
from understudy.recipe import Recipe, RecipeError, load
from understudy.run.arguments import training_arguments
from understudy.run.build import Run, build
from understudy.teachers import TEACHERS

ROOT = Path(__file__).resolve().parents[1]
RECIPES = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "recipes").rglob("*.yaml"))]
PAPERS = [path for path in RECIPES if "papers" in path]
PAGE = (ROOT / "docs" / "papers.md").read_text("utf-8")
COMMANDS = re.findall(r"^(?:torchrun .*|understudy distill .*)$", PAGE, re.MULTILINE)

# Qwen3's, as far as it concerns two turns: an answer has an empty thought before it, and so has the prompt of one that
# is not to think.
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


@dataclass(frozen=True)
class Family:
    """What all models of one family have in common, as far as recipes depend on it."""

    model_type: str
    context_length: int
    eos: str
    bos: str | None = None  # put before every text
    pad: str | None = None
    chat_template: str | None = None
    tied: bool = True


FAMILIES = {
    r"gpt2": Family("gpt2", 1024, eos="<|endoftext|>"),
    r"opt-\d": Family("opt", 2048, eos="</s>", bos="</s>", pad="<pad>"),
    r"pythia-\d": Family("gpt_neox", 2048, eos="<|endoftext|>", tied=False),
    r"llama-(7|13)b": Family("llama", 2048, eos="</s>", bos="<s>", tied=False),
    r"[Ll]lama-3\.\d": Family("llama", 131072, eos="<|end_of_text|>", bos="<|begin_of_text|>"),
    r"Qwen3-": Family("qwen3", 40960, eos="<|im_end|>", pad="<|endoftext|>", chat_template=CHATML),
}
LOCAL = Family("llama", 512, eos="</s>", bos="<s>", pad="<pad>")  # of a model that is not on the hub

SENTENCES = ("Who learns the part?", "Nobody yet; the star is well.", "Über Nacht kann sich das ändern.")


@dataclass(frozen=True)
class Columns:
    """A public dataset's columns, each with a value, and how many rows its splits have."""

    row: dict[str, Any]
    splits: dict[str, int]
    name: str | None = None


HUB = {
    "wmt/wmt14": Columns(
        {"translation": {"de": SENTENCES[2], "en": SENTENCES[1]}},
        {"train": 4508785, "validation": 3000, "test": 3003},
        "de-en",
    ),
    "databricks/databricks-dolly-15k": Columns(
        {"instruction": SENTENCES[0], "context": "", "response": SENTENCES[1], "category": "open_qa"}, {"train": 15011}
    ),
    "openai/gsm8k": Columns(
        {"question": SENTENCES[0], "answer": "She has <<2+2=4>>4.\n#### 4"}, {"train": 7473, "test": 1319}, "main"
    ),
}
FILES = {
    "xsum": {"document": " ".join(SENTENCES), "summary": SENTENCES[1], "id": "1"},
    "flan2021": {"inputs": SENTENCES[0], "targets": SENTENCES[1], "task": "a_10templates"},
    "openwebtext": {"text": "\n".join(SENTENCES)},
}


def teacher_models(recipe):
    """The names of the recipe's teachers, if it has any."""
    parts = {} if recipe.teacher is None else recipe.build("teacher", TEACHERS).parts()
    return [part.model_name for part in parts.values()]


def bytewise(family: Family) -> PreTrainedTokenizerFast:
    """A token for every byte, and the family's special tokens."""
    marks = ["<|im_start|>", "<|im_end|>"] if family.chat_template else []
    special = list(dict.fromkeys(filter(None, [family.bos, family.eos, family.pad, *marks])))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate([*special, *alphabet])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    if family.bos:
        first = (family.bos, special.index(family.bos))
        backend.post_processor = processors.TemplateProcessing(single=f"{first[0]} $A", special_tokens=[first])
    names = {"bos_token": family.bos or family.eos, "eos_token": family.eos, "pad_token": family.pad}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        additional_special_tokens=marks,
        clean_up_tokenization_spaces=False,
        **{name: token for name, token in names.items() if token},
    )
    tokenizer.chat_template = family.chat_template
    return tokenizer


def family_of(name: str) -> Family:
    matches = [family for pattern, family in FAMILIES.items() if re.search(pattern, name)]
    on_the_hub = name.count("/") == 1 and not name.startswith((".", "/"))
    assert matches or not on_the_hub, f"{name} looks like a model of the hub: add its family to FAMILIES"
    return matches[0] if matches else LOCAL


def put_model(name: str, family: Family, tokenizer: Any, width: int, layers: int) -> None:
    """A random model of the family, with its tokenizer, in the folder of this name."""
    shape = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "max_position_embeddings": family.context_length,
        "vocab_size": len(tokenizer) + 3,  # padded, as many are
        "tie_word_embeddings": family.tied,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if family.model_type == "opt":
        shape |= {"ffn_dim": 2 * width, "word_embed_proj_dim": width}
    elif family.model_type != "gpt2":
        shape |= {"intermediate_size": 2 * width}
    if family.model_type in ("llama", "qwen3"):
        shape |= {"num_key_value_heads": 1 if family.tied else 2, "head_dim": width // 2}
    AutoModelForCausalLM.from_config(AutoConfig.for_model(family.model_type, **shape)).save_pretrained(name)
    tokenizer.save_pretrained(name)


def put_rows(dataset: str, row: dict[str, str], count: int = 6) -> None:
    """A dataset of one's own at this path: a file, or a folder with one in it."""
    path = Path(dataset)
    if not path.suffix:
        path = path / "0000.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for _ in range(count))
    if ".txt" in path.suffixes:
        text = "\n<|endoftext|>\n".join([row["text"]] * count)
    elif path.suffix == ".parquet":
        datasets.Dataset.from_list([row] * count).to_parquet(path)
        return
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


def row_of(dataset: str, block: Any) -> dict[str, str]:
    """A row of a local dataset: of a public collection, or with the columns that the data block names."""
    on_the_hub = dataset.count("/") == 1 and not Path(dataset).suffix and dataset[0] != "."
    assert not on_the_hub, f"{dataset} looks like a dataset of the hub: add its columns to HUB"
    row = next((row for name, row in FILES.items() if name in dataset), None)
    if row:
        return row
    if ".txt" in Path(dataset).suffixes:
        return {"text": "\n".join(SENTENCES)}
    fields = [field for _, field, _, _ in string.Formatter().parse(block.template or "") if field]
    columns = [*fields, *(block.columns or {}).values()] or ["prompt", "completion"]
    return dict(zip(columns, ["Who plays?", "The star.", *columns], strict=False))


def load_dataset(path: str, name: str | None = None, split: str | None = None) -> datasets.Dataset:
    """Replaces the function of that name in `datasets`."""
    assert path in HUB, f"{path} is not in HUB: add its columns to HUB"
    dataset = HUB[path]
    assert name == dataset.name, f"{path} has the configuration {dataset.name}, and not {name}"
    [part] = datasets.ReadInstruction.from_spec(str(split)).to_absolute(dataset.splits)
    begins, ends = part.from_ or 0, part.to or dataset.splits[part.splitname]
    assert 0 <= begins < ends <= dataset.splits[part.splitname], f"{path} has no rows {split}"
    return datasets.Dataset.from_list([dataset.row] * 6)


def families(recipe: Recipe) -> dict[str, Family]:
    """The family of each model and tokenizer that the recipe names, the student's first.

    A local folder beside a model of the hub holds a model of the same family.
    """
    names = [recipe.student.model, *teacher_models(recipe), recipe.student.tokenizer]
    by_name = {name: family_of(name) for name in names if name}
    hub_family = next((family for family in by_name.values() if family != LOCAL), LOCAL)
    return {name: hub_family if family == LOCAL else family for name, family in by_name.items()}


def create_files(recipe: Recipe) -> None:
    """Create every model and file that the recipe names below the working directory."""
    by_name, teachers = families(recipe), teacher_models(recipe)
    playground = next((name for name in by_name if is_playground(name)), None)
    layers = max([2, *(layer + 1 for layer in recipe.student.layers or [])])
    for name, family in by_name.items():
        tokenizer = load_tokenizer(playground) if playground else bytewise(family)
        if not is_playground(name):
            put_model(name, family, tokenizer, *((32, layers) if name in teachers else (16, 2)))
    for dataset in filter(None, (recipe.data.dataset, recipe.evaluate.dataset)):
        if dataset not in HUB and not is_playground(dataset):
            put_rows(dataset, row_of(dataset, recipe.data))
    if recipe.corpus is not None:
        put_rows(recipe.corpus.dataset, row_of(recipe.corpus.dataset, recipe.corpus))


@pytest.fixture
def built(tmp_path, monkeypatch):
    """Builds a recipe in a folder with its files, and afterwards resets what TrainingArguments set in the process."""
    before = dict(os.environ)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)

    def build_it(path: str, *overrides: str) -> Run:
        overrides = ("training.use_cpu=true", *overrides)  # without a GPU, bf16 is an error unless the CPU is chosen
        recipe = load(ROOT / path, overrides)
        training_arguments(recipe)
        if recipe.training.get("fsdp"):
            overrides += ("training.fsdp=false",)  # needs several processes
        if is_playground(recipe.data.dataset):
            overrides += ("data.limit=6",)  # of hundreds of thousands, which take long to generate
        recipe = load(ROOT / path, overrides)
        create_files(recipe)
        return build(recipe, training_arguments(recipe))

    yield build_it
    os.environ.clear()
    os.environ.update(before)
    AcceleratorState._reset_state()


def effective_batch(path: str) -> list[int]:
    """(batch, per device, accumulated, processes) from the comment at the top of a recipe."""
    head = " ".join(line[1:].strip() for line in (ROOT / path).read_text("utf-8").splitlines() if line[:1] == "#")
    match = re.search(r"Effective batch (\d+) = (\d+) per device × (\d+) accumulated × (\d+) process", head)
    assert match, f"the comment at the top of {path} does not name its effective batch"
    return [int(number) for number in match.groups()]


@pytest.mark.parametrize("path", RECIPES)
def test_a_recipe_can_be_built(path, built):
    run = built(path)
    recipe, arguments = run.recipe, run.trainer.args
    assert len(run.train) > 0
    assert run.train.skipped == 0
    if not is_playground(recipe.data.dataset):  # whose problems are real; other rows are short
        assert run.train.cut_prompts == run.train.cut_responses == 0
    room = 0 if run.trainer.method.authors == {"dataset"} else recipe.rollout[1].get("max_new_tokens", 256)
    assert all(len(example.prompt) + room <= recipe.data.max_length for example in run.train.examples)
    total = arguments.max_steps if arguments.max_steps > 0 else 1000
    run.trainer.create_optimizer_and_scheduler(total)
    rates = [run.trainer.lr_scheduler.lr_lambdas[0](step) for step in range(total)]
    assert max(rates) == pytest.approx(1)
    assert min(rates) >= 0


def by_kind() -> dict[str, str]:
    """One recipe for every method and student's architecture, those of papers first."""
    paths: dict[str, str] = {}
    for path in [*PAPERS, *RECIPES]:
        try:
            recipe = load(ROOT / path)
            fresh = (recipe.student.fresh or {}).get("model_type")
            kind = fresh or next(iter(families(recipe).values())).model_type
        except (RecipeError, AssertionError):
            continue  # test_a_recipe_can_be_built reports it
        paths.setdefault(f"{recipe.method[0]}-{kind}", path)
    return paths


class StopAfterTwo(TrainerCallback):
    """The first step of a warm-up has a learning rate of 0; the second is the first that changes anything."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 2


SMALL = (
    *(
        "training.per_device_train_batch_size=1",
        "training.gradient_accumulation_steps=1",
        "rollout.generate.max_new_tokens=4",
    ),
    *('training.save_strategy="no"', 'training.eval_strategy="no"', "training.logging_steps=1", "evaluate.show=0"),
    "training.disable_tqdm=true",
)


@pytest.mark.parametrize(("kind", "path"), by_kind().items(), ids=by_kind())
def test_each_method_trains_each_architecture(kind, path, built):
    run = built(path, *SMALL)
    assert kind.endswith(run.trainer.model.config.model_type)
    before = {name: weight.detach().clone() for name, weight in run.trainer.model.named_parameters()}
    run.trainer.add_callback(StopAfterTwo())
    run.trainer.train()
    assert run.trainer.state.global_step == 2
    losses = [line["loss"] for line in run.trainer.state.log_history if "loss" in line]
    assert torch.tensor(losses).isfinite().all()
    assert any(not torch.equal(weight, before[name]) for name, weight in run.trainer.model.named_parameters())


@pytest.mark.parametrize("path", PAPERS)
def test_a_papers_recipe_names_its_effective_batch(path):
    batch, device, accumulated, processes = effective_batch(path)
    training = load(ROOT / path).training
    assert training["per_device_train_batch_size"] == device
    assert training["gradient_accumulation_steps"] == accumulated
    assert batch == device * accumulated * processes


def test_the_page_has_every_papers_recipe_and_its_command():
    for path in PAPERS:
        assert f"](../{path})" in PAGE, f"docs/papers.md has no row for {path}"
        commands = [command for command in COMMANDS if path in command and "method=" not in command]
        assert commands, f"docs/papers.md has no command for {path}"


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_page_can_be_built(command, built):
    launcher, arguments = command.split("understudy distill ")
    path, *overrides = shlex.split(arguments)
    run = built(path, *overrides)
    assert len(run.train) > 0
    if launcher:
        assert int(re.findall(r"--nproc_per_node (\d+)", launcher)[0]) == effective_batch(path)[3]
