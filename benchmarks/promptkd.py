"""What PromptKD's backward pass through the teacher costs: peak memory and seconds of a step, with and without
activation checkpointing, beside GKD, which needs no such pass. Every setting has a process of its own, whose peak is
what the operating system counted.

    python benchmarks/promptkd.py [--layers 12 --width 768 --batch 8 --tokens 256]
"""

import argparse
import json
import resource
import subprocess
import sys
import time

SETTINGS = {
    "gkd": ("GKD", {}),
    "promptkd": ("PromptKD", {"initialize": "random"}),
    "promptkd, checkpointing": ("PromptKD", {"initialize": "random", "checkpointing": True}),
}


def measure(setting: str, options: argparse.Namespace) -> dict[str, float]:
    """One setting's peak memory over that before the step, in MiB, and the median seconds of three steps."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    import understudy
    from understudy import Batch, Example, LocalTeacher, MethodContext, Step, score

    torch.manual_seed(0)
    window = options.tokens + 16

    def model(layers: int, width: int, heads: int) -> GPT2LMHeadModel:
        return GPT2LMHeadModel(GPT2Config(n_layer=layers, n_embd=width, n_head=heads, n_positions=window))

    name, fields = SETTINGS[setting]
    method = getattr(understudy, name)(**fields)
    student = model(2, 128, 2)
    plain = LocalTeacher(model(options.layers, options.width, options.width // 64))
    teacher = method.setup(MethodContext(plain, None, 50257, learning_rate=1e-3))
    ids = torch.randint(0, 50257, (options.batch, options.tokens)).tolist()
    batch = Batch.from_examples([Example(row[:32], row[32:], "student", i) for i, row in enumerate(ids)], 0)
    weights = batch.weights(method.reduction)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for number in range(3):
        start = time.perf_counter()
        method.before_step([batch], teacher, student, Step(number, total=10))
        teacher_scores = teacher.score(batch)

        def loss(student_scores, teacher_scores=teacher_scores):
            return (weights * method.loss(teacher_scores, student_scores, batch)).sum()

        score(student, batch, loss, weights=weights).backward()
        seconds.append(time.perf_counter() - start)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) / 1024
    return {"peak_mib": round(grown), "seconds": round(sorted(seconds)[1], 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"layers": 12, "width": 768, "batch": 8, "tokens": 256}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--only", choices=SETTINGS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(measure(options.only, options)))
        return
    for setting in SETTINGS:
        command = [sys.executable, __file__, *sys.argv[1:], "--only", setting]
        line = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
        print(f"{setting:26}", line, flush=True)


if __name__ == "__main__":
    main()
