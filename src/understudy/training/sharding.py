"""FSDP2 and DeepSpeed ZeRO: the settings under which a student's weights, gradients and optimizer state are sharded."""

import io
import os
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import Trainer, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from ..models.sharding import is_sharded
from ..registry import did_you_mean
from ..teacher import Teacher

# The keys of fsdp_config that transformers reads for FSDP2.
_FSDP2 = (
    "version",
    "reshard_after_forward",
    "cpu_offload",
    "activation_checkpointing",
    "cpu_ram_efficient_loading",
    "state_dict_type",
    "auto_wrap_policy",
    "transformer_layer_cls_to_wrap",
    "min_num_params",
)


class ShardedTrainer(Trainer):
    """`transformers.Trainer` that shards on a CPU as well.

    Accelerate starts FSDP and DeepSpeed for accelerators only: processes on a CPU would silently train with DDP.
    """

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        state: Any = self.accelerator.state
        precision, plugin = self.accelerator.mixed_precision, self.args.deepspeed_plugin
        if plugin is not None and state.distributed_type == DistributedType.MULTI_CPU:
            plugin.set_mixed_precision(precision)
            plugin.select(_from_accelerator_state=True)
            state.deepspeed_plugins, state._mixed_precision, self.is_deepspeed_enabled = plugin, "no", True
            state.distributed_type = PartialState().distributed_type = DistributedType.DEEPSPEED
        elif uses_fsdp(self.args) and state.distributed_type == DistributedType.MULTI_CPU:
            state.fsdp_plugin = FullyShardedDataParallelPlugin(**cast(Any, self.args.fsdp_plugin_args or {}))
            state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
            self.is_fsdp_enabled = True
        if self.is_fsdp_enabled and precision in ("bf16", "fp16"):
            # By default the output of the model, which is the loss here, and the sums of gradients would be rounded.
            compute = torch.bfloat16 if precision == "bf16" else torch.float16
            policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
            state.fsdp_plugin.mixed_precision_policy = policy
        unset_hf_deepspeed_config()  # or further models, such as one that was saved, would be loaded in shards

    def train(self, resume_from_checkpoint: Any = None, **kwargs: Any) -> Any:
        if self.is_deepspeed_enabled and resume_from_checkpoint:
            config = cast(Any, self.args.deepspeed_plugin).deepspeed_config
            universal = converted(Path(str(resume_from_checkpoint)), self.args.world_size, _stage(self.args))
            config["checkpoint"] = {**config.get("checkpoint", {}), "load_universal": universal}
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _load_best_model(self) -> None:
        if self.is_deepspeed_enabled:
            best = Path(str(self.state.best_model_checkpoint))
            universal = converted(best, self.args.world_size, _stage(self.args))
            cast(Any, self.deepspeed)._config.load_universal_checkpoint = universal
        super()._load_best_model()


def check_sharding(args: TrainingArguments) -> None:
    """Refuse settings of FSDP or DeepSpeed that would be ignored or would fail, and complete DeepSpeed's.

    Models that are loaded afterwards are whole in every process: their weights are compared, hashed and checked before
    the student's are sharded.

    Raises:
        ValueError: with the remedy.
    """
    unset_hf_deepspeed_config()
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != args.world_size:
        raise ValueError(
            f"{started} processes were started, and each would train alone: there is no accelerator, so set use_cpu"
        )
    if uses_fsdp(args):
        _check_fsdp(args)
    if args.deepspeed_plugin is not None:
        if args.device.type == "cpu" and args.world_size == 1:
            raise ValueError("deepspeed needs several processes on a CPU: start with torchrun, or leave it out")
        _complete_deepspeed(args, args.deepspeed_plugin.deepspeed_config)


def _check_fsdp(args: TrainingArguments) -> None:
    given: dict[str, Any] = dict(cast(Any, args.fsdp_config) or {})
    for name, value in given.items():
        if name not in _FSDP2 and value:
            raise ValueError(f"FSDP2 does not read fsdp_config.{name}: leave it out{did_you_mean(name, _FSDP2)}")
    launcher = {name.removeprefix("FSDP_").lower(): value for name, value in os.environ.items()}
    launcher["cpu_offload"] = launcher.get("offload_params", "")
    config = given if args.fsdp else {**launcher, **given}
    if int(config.get("version", 2)) != 2:
        raise ValueError("FSDP1 gives no access to single weights: leave fsdp_config.version out, which is FSDP2")
    if _is_true(config.get("cpu_ram_efficient_loading", launcher.get("cpu_ram_efficient_loading"))):
        raise ValueError(
            "fsdp_config.cpu_ram_efficient_loading would leave student and teacher without weights in all processes "
            "but the first, which check them before they are sharded: set it to false"
        )
    if _is_true(config.get("cpu_offload")):
        raise ValueError(
            "fsdp_config.cpu_offload keeps the student's weights on the CPU, and responses would be generated there: "
            "leave it out, or use deepspeed with zero_optimization.offload_optimizer"
        )
    kind = str(config.get("state_dict_type", "FULL_STATE_DICT" if args.fsdp else "SHARDED_STATE_DICT"))
    if kind.upper() != "FULL_STATE_DICT":
        raise ValueError(f"state_dict_type {kind} of FSDP would save student/ without weights: set FULL_STATE_DICT")
    if args.device.type == "cpu" and torch.accelerator.is_available():
        raise ValueError("FSDP shards over the accelerators of this machine: leave use_cpu out")


def _is_true(value: Any) -> bool:
    return str(value).lower() in ("true", "1", "yes", "on", "y", "t")


def _complete_deepspeed(args: TrainingArguments, config: dict[str, Any]) -> None:
    """What DeepSpeed's configuration leaves out is as the arguments say; by default it would ignore them."""
    for key, instead in (("optimizer", "optim"), ("scheduler", "lr_scheduler_type")):
        if key in config:
            raise ValueError(f"deepspeed.{key} would replace the one that is checked and resumed here: set {instead}")
    zero = config.setdefault("zero_optimization", {})
    config.setdefault("train_micro_batch_size_per_gpu", args.per_device_train_batch_size)
    config.setdefault("gradient_accumulation_steps", args.gradient_accumulation_steps)
    config.setdefault("gradient_clipping", args.max_grad_norm)
    for name in ("bf16", "fp16"):
        if getattr(args, name):
            config.setdefault(name, {"enabled": True})
    if zero.get("stage") == 3 and not zero.setdefault("stage3_gather_16bit_weights_on_model_save", True):
        raise ValueError("the student could not be saved: leave stage3_gather_16bit_weights_on_model_save out")


def converted(checkpoint: Path, processes: int, stage: int) -> bool:
    """Must DeepSpeed load this checkpoint in its universal form, as it was saved by another number of processes?

    By default DeepSpeed loads as many shares of weights and optimizer state as were saved. The universal form is saved
    beside them, and has neither the number of processes nor the hyperparameters of all parameter groups, which
    `hyperparameters.given_hyperparameters` keeps. All processes must call it together.

    Raises:
        ValueError: for ZeRO-3, which does not restore the universal form exactly (DeepSpeed 0.19.8).
    """
    tag = checkpoint / "latest"
    folder = checkpoint / tag.read_text().strip() if tag.is_file() else checkpoint
    shares = len(list(folder.glob("*_optim_states.pt")))
    if shares in (0, processes):
        return False
    if stage == 3 or any(folder.glob("zero_pp_rank_*_model_states.pt")):
        raise ValueError(
            f"{checkpoint} was saved by {shares} processes, and ZeRO-3 cannot resume it with {processes}: start "
            f"{shares} processes; checkpoints of ZeRO-2 and FSDP2 have no such limit"
        )
    if PartialState().is_main_process:
        from deepspeed.checkpoint import ds_to_universal  # pyright: ignore[reportMissingImports]

        workers = {"num_extract_workers": 1, "num_merge_workers": 1}
        checks = {"keep_temp_folder": False, "strict": True, "inject_missing_state": True}
        folders = {"input_folder": str(folder), "output_folder": f"{folder}_universal"}
        with redirect_stdout(io.StringIO()):
            ds_to_universal.main(SimpleNamespace(**folders, **workers, **checks))
    PartialState().wait_for_everyone()
    return True


def _stage(args: Any) -> int:
    return args.deepspeed_plugin.deepspeed_config["zero_optimization"].get("stage", 0)


def check_whole(student: nn.Module) -> None:
    """Refuse a student that is sharded before the trainer shards it.

    Raises:
        ValueError: with the remedy.
    """
    if is_sharded(student):
        raise ValueError(
            "the student's weights are sharded already, and this trainer shards them itself: give the student's name, "
            "or load it before the TrainingArguments, which have DeepSpeed shard whatever is loaded after them"
        )


def check_followed(teacher: Teacher | None, args: TrainingArguments) -> None:
    """Refuse a teacher whose weights follow those of a student that FSDP2 or DeepSpeed will shard or move.

    Raises:
        ValueError: with the remedy.
    """
    follows = teacher is not None and any(part.follows_student for part in teacher.parts().values())
    if follows and (uses_fsdp(args) or args.deepspeed_plugin is not None):
        raise ValueError(
            "the teacher student follows the student's whole weights with weights: average and current, and FSDP2 and "
            "DeepSpeed shard or move them: use weights: start, or leave fsdp and deepspeed out"
        )


def uses_fsdp(args: Any) -> bool:
    """Do the arguments, or the environment that `accelerate launch` has set, ask for FSDP?"""
    return bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
