"""Flags that do not go together."""

from trsr import InputError


def check_together(settings, world: int) -> None:
    """Raise InputError for settings of train.py that contradict each other in `world` processes."""
    sharded = world > 1 and settings.shard != "replicate"
    wrong = {
        "--negatives-past is for earlier positions; add --targets all, or their number": (
            settings.negatives_past and settings.targets == 1
        ),
        "--fp8 is for frozen matrices, and --lora-r 0 trains them; leave one of them out": (
            settings.fp8 and not settings.lora_r
        ),
        "--fp8 does not shard its matrices; choose --shard zero2 or replicate": (
            settings.fp8 and sharded and settings.shard == "zero3"
        ),
        "--cuda-graphs cannot hold what processes exchange; choose --shard replicate": (
            settings.cuda_graphs and sharded
        ),
        "--cuda-graphs cannot recompute layers; leave --activation-checkpointing out": (
            settings.cuda_graphs and settings.activation_checkpointing
        ),
    }
    for what, is_so in wrong.items():
        if is_so:
            raise InputError(what)
