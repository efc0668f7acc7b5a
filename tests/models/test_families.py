"""Every family of models: some of its layers, saved and loaded again, with adapters merged, is the same model.

The families and what is refused for them are listed in docs/models.md.
"""

import re
from pathlib import Path

import pytest
import torch
from families import FAMILIES, model, probe
from huggingface_hub.errors import StrictDataclassError
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from understudy.models.adapters import merged
from understudy.models.layers import config_of_layers, skipped, take_layers
from understudy.models.origin import Origin
from understudy.models.saved import check_saved, probe_log_probs

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
# Where PEFT cannot adapt all linear layers: recurrent ones that read weights directly, and routers.
TARGETS = {
    "falcon_h1": ["q_proj", "v_proj"],
    "falcon_mamba": ["x_proj"],
    "jamba": ["gate_proj", "down_proj"],
    "mamba": ["x_proj"],
    "mamba2": ["in_proj"],
    "phimoe": ["q_proj", "v_proj"],
}
STACKS = re.compile(r"\.(layers|layer|h|blocks)$")


def listed(heading: str) -> set[str]:
    """The families that docs/models.md names below a heading."""
    section = PAGE.read_text("utf-8").partition(f"## {heading}\n")[2].partition("\n## ")[0]
    return set(re.findall(r"`([\w-]+)`", section)) & FAMILIES.keys()


def log_probs(model):
    with torch.no_grad():
        return model(input_ids=probe(), use_cache=False).logits.log_softmax(-1)


def cut(teacher, layers):
    """The shorter model, or None where it is refused."""
    refusal = ""
    try:
        shorter = AutoModelForCausalLM.from_config(config_of_layers(teacher.config, layers), dtype="float32").eval()
        take_layers(teacher, shorter, layers)
    except (ValueError, StrictDataclassError) as error:
        refusal = str(error)
    assert not refusal or re.search(r"depends on its index|at least one|cannot be identified", refusal)
    return None if refusal else shorter


def stack(whole):
    """The list of the model's layers."""
    depth = whole.config.num_hidden_layers
    lists = [(name, part) for name, part in whole.named_modules() if isinstance(part, torch.nn.ModuleList)]
    [layers] = [part for name, part in lists if STACKS.search(name) and len(part) == depth]
    return layers


@pytest.mark.parametrize("family", FAMILIES)
def test_first_and_last_layer_are_the_model_without_the_others_also_saved_with_merged_adapters(family, tmp_path):
    teacher = model(family)
    depth = teacher.config.num_hidden_layers
    student = cut(teacher, [0, depth - 1])
    assert (student is None) == (family in listed("Layers of a teacher")), "docs/models.md lists what is refused"
    if student is None:
        student = teacher  # saved and loaded all the same
    else:
        with skipped(stack(teacher), range(1, depth - 1)):
            expected = log_probs(teacher)
        torch.testing.assert_close(log_probs(student), expected, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(expected, log_probs(teacher), atol=1e-2), "the layers between matter"
    targets = TARGETS.get(family, "all-linear")
    config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
    result = merged(get_peft_model(student, config))
    Origin(torch.float32, True).restore(result, "auto", [2, 5], 0)
    result.save_pretrained(tmp_path)
    check_saved(tmp_path, probe_log_probs(result), result)


def test_there_are_at_least_forty_families_and_most_may_be_cut():
    assert len(FAMILIES) >= 90
    assert len(listed("Layers of a teacher")) < 15
