"""FSDP2 and DeepSpeed ZeRO: the settings under which a student's weights, gradients and optimizer state are sharded."""

import os
from typing import Any

from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from transformers import Trainer
from transformers.integrations.deepspeed import unset_hf_deepspeed_config


class ShardedTrainer(Trainer):
    """`transformers.Trainer` that shards on a CPU as well.

    Accelerate starts FSDP and DeepSpeed for accelerators only: processes on a CPU would silently train with DDP.
    """

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        unset_hf_deepspeed_config()  # or further models, such as one that was saved, would be loaded in shards
        state = self.accelerator.state
        if state.distributed_type != DistributedType.MULTI_CPU:
            return
        precision = self.accelerator.mixed_precision
        if self.args.deepspeed_plugin is not None:
            state.deepspeed_plugins = self.args.deepspeed_plugin
            state.distributed_type = PartialState().distributed_type = DistributedType.DEEPSPEED
            self.args.deepspeed_plugin.set_mixed_precision(precision)
            self.args.deepspeed_plugin.select(_from_accelerator_state=True)
            state._mixed_precision, self.is_deepspeed_enabled = "no", True
            unset_hf_deepspeed_config()
        elif uses_fsdp(self.args):
            state.fsdp_plugin = FullyShardedDataParallelPlugin(**(self.args.fsdp_plugin_args or {}))
            state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
            if precision != "no":
                state.fsdp_plugin.set_mixed_precision(precision)
            self.is_fsdp_enabled = True


def uses_fsdp(args: Any) -> bool:
    """Do the arguments, or the environment that `accelerate launch` has set, ask for FSDP?"""
    return bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
