"""On-policy distillation (GKD) with nothing hidden: the library's pieces in a loop of one's own, without a trainer.

python examples/plain_loop.py
"""

import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from understudy.batch import Batch, Example
from understudy.divergences import JensenShannon
from understudy.models.forward import score
from understudy.rollouts.generate import GenerateRollout
from understudy.sampling import Sampling
from understudy.step import Step
from understudy.teachers.local import LocalTeacher


def tiny(width: int, spread: float) -> LlamaForCausalLM:
    """A model of random weights; from_pretrained does as well."""
    shape = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=12, **shape, eos_token_id=0, initializer_range=spread))


def main(steps: int = 60) -> list[float]:
    """Distil a random teacher into a smaller random student; returns the losses."""
    torch.manual_seed(0)
    backend = Tokenizer(models.WordLevel({"<eos>": 0, **{f"w{i}": i for i in range(1, 12)}}, unk_token="<eos>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    prompts = [Example(torch.randint(1, 12, (4,)).tolist(), [], row=row) for row in range(64)]

    student, teacher = tiny(32, 0.02), LocalTeacher(tiny(64, 0.2))
    rollout, sampling = GenerateRollout().bind(student, tokenizer), Sampling(max_new_tokens=8)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    divergence = JensenShannon(beta=0.5)
    losses = []
    for number in range(steps):
        asked = [prompts[(16 * number + i) % len(prompts)] for i in range(16)]
        batch = Batch.from_examples(
            rollout.generate(asked, sampling, Step(number)), pad=0
        )  # what the student writes, as ids
        judged = teacher.score(batch)  # what the teacher thinks of every token of it
        weights = batch.weights("token") / batch.normalizer("token")
        loss = score(
            student, batch, lambda own: (weights * judged.divergence_to(own, divergence)).sum(), weights=weights
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    for number, loss in enumerate(main()):
        if number % 10 == 0:
            print(f"step {number:3d}  loss {loss:.4f}")
