"""All weights of a checkpoint are loaded, of models too whose saved weights have other names than those in memory."""

import families
import pytest
import torch
from fakes import ragged_examples, words
from loop import arguments, same, weights
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from understudy.methods.sft import SFT
from understudy.training import checkpoint
from understudy.training.trainer import StudentTrainer

EVERY_STEP = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}


def trainer(folder, model, **changed):
    examples = ragged_examples(8, families.VOCABULARY)
    data = {"processing_class": words(families.VOCABULARY), "train_dataset": examples, "eval_dataset": examples}
    return StudentTrainer(model, None, SFT(), args=arguments(folder, **EVERY_STEP, **changed), **data)


def test_a_mixture_of_experts_resumes_to_the_bit_and_ends_with_its_best_weights(tmp_path):
    def experts():
        return families.model("mixtral", tie_word_embeddings=True)

    def saved(step):
        return weights(AutoModelForCausalLM.from_pretrained(tmp_path / f"checkpoint-{step}"))

    whole = trainer(tmp_path, experts(), max_steps=2, learning_rate=1.0, load_best_model_at_end=True)
    whole.train()
    assert whole.state.best_global_step == 1, "the second step makes it worse"
    first, second = saved(1), saved(2)
    assert same(weights(whole.model), first)
    resumed = trainer(tmp_path, experts(), max_steps=2, learning_rate=1.0)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert same(weights(resumed.model), second)


def test_a_checkpoint_that_lacks_weights_is_refused_with_their_names(tmp_path):
    trainer(tmp_path, families.model("mixtral"), max_steps=1).train()
    folder = tmp_path / "checkpoint-1"
    saved = load_file(folder / "model.safetensors")
    gate = next(name for name in saved if name.endswith("gate.weight"))
    save_file({name: x for name, x in saved.items() if name != gate}, folder / "model.safetensors", {"format": "pt"})
    checkpoint.complete(folder)
    with pytest.raises(ValueError, match=r"1 weights are missing \(model\.layers\.0\.mlp\.gate\.weight"):
        trainer(tmp_path, families.model("mixtral"), max_steps=2).train(resume_from_checkpoint=True)


def test_a_checkpoint_of_a_module_of_one_s_own_with_other_names_is_refused(tmp_path):
    run = trainer(tmp_path, families.model("llama"), max_steps=1)
    run.model = torch.nn.Linear(2, 2, bias=False)
    run._issue_warnings_after_load(run.model.load_state_dict({"other": torch.zeros(1)}, strict=False))
    with pytest.raises(ValueError, match="does not hold the weights of this student: weight is in only one"):
        run._load_by_saved_names(str(tmp_path))
