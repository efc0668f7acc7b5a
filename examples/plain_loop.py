"""On-policy distillation (GKD) in a training loop of your own, without a trainer.

python examples/plain_loop.py
"""

from functools import partial

import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from understudy import Batch, Example, GenerateRollout, JensenShannon, LocalTeacher, Sampling, Scores, Step, score


def tiny(width: int, spread: float) -> LlamaForCausalLM:
    """A model with random weights."""
    shape = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=12, **shape, eos_token_id=0, initializer_range=spread))


def distance(teacher: Scores, weights: Tensor, student: Scores) -> Tensor:
    """The mean JSD over the response tokens, computed inside the student's forward, in place of its logits."""
    return (weights * teacher.divergence_to(student, JensenShannon(beta=0.5))).sum()


def main(steps: int = 60) -> list[float]:
    """Distil a random teacher into a smaller random student; returns the losses."""
    torch.manual_seed(0)
    backend = Tokenizer(models.WordLevel({"<eos>": 0, **{f"w{i}": i for i in range(1, 12)}}, unk_token="<eos>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    prompts = [Example(torch.randint(1, 12, (4,)).tolist(), [], row=row) for row in range(64)]

    student, teacher = tiny(32, 0.02), LocalTeacher(tiny(64, 0.2))
    rollout, sampling = GenerateRollout().bind(student, tokenizer), Sampling(max_new_tokens=8)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    losses = []
    for number in range(steps):
        examples = [prompts[(16 * number + i) % len(prompts)] for i in range(16)]
        responses = rollout.generate(examples, sampling, Step(number))  # the student's own, as token ids
        batch = Batch.from_examples(responses, pad=0)
        weights = batch.weights("token") / batch.normalizer("token")
        loss = score(student, batch, partial(distance, teacher.score(batch), weights), weights=weights)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    for number, loss in enumerate(main()):
        if number % 10 == 0:
            print(f"step {number:3d}  loss {loss:.4f}")
