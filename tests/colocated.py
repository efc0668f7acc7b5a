"""Rollout vllm with vLLM in its own process: `PYTHON colocated.py MODEL whole|lora PATHS`, by vLLM's interpreter.

That environment has vLLM and PyTorch; what else the package needs comes from PATHS. It prints a line of JSON for each
of three versions of the weights.
"""

import json
import sys

if __name__ == "__main__":  # vLLM starts a process that imports this file
    sys.path += sys.argv[3].split(":")
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from understudy.batch import Example
    from understudy.rollouts.vllm import VLLMRollout
    from understudy.sampling import Sampling
    from understudy.step import Step

    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
    if sys.argv[2] == "lora":
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    options = {"enforce_eager": True, "max_model_len": 256}
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
    rollout = VLLMRollout(colocate=True, options=options).bind(model, tokenizer)
    prompts = [Example([5 + row, 9, 13], [], row=row) for row in range(6)]
    sampling = Sampling(16, temperature=0.9, top_k=50, logprobs=True)
    for number in range(3):
        errors, responses = [], rollout.generate(prompts, sampling, Step(number))
        with torch.no_grad():
            for example in responses:
                logits = model(torch.tensor([example.prompt + example.response])).logits[
                    0, len(example.prompt) - 1 : -1
                ]
                own = logits.log_softmax(-1).gather(-1, torch.tensor(example.response)[:, None])[:, 0]
                errors.append(float((own - torch.tensor(example.streams["sampled_logprob"])).abs().max()))
        again = rollout.generate(prompts, sampling, Step(number))
        same = [e.response for e in again] == [e.response for e in responses]
        print(json.dumps({"version": responses[0].columns["weight_version"], "error": max(errors), "same": same}))
        with torch.no_grad():
            for weight in model.parameters():
                if weight.requires_grad:
                    weight.add_(torch.randn_like(weight), alpha=0.1 * float(weight.std()) + 0.01)
        rollout.sync(Step(number + 1))
