"""Training in transformers + PEFT, plain and with Liger's kernels: what bench.train compares with.

Liger (https://github.com/linkedin/Liger-Kernel) replaces the norms, the rotation, the MLP and the
loss by fused Triton kernels, so that the logits are never held. It needs a GPU and the package
`liger-kernel`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from bench.common import optimizer_of, seconds
from lora import ATTENTION, LoRAConfig, adapter_tensors
from ops.packs import Tree
from trsr import InputError

IGNORED = -100  # a target that does not count


def sequences_of(trees: list[Tree]) -> list[list[int]]:
    """Return all examples, each with its prefix."""
    return [sequence for tree in trees for sequence in tree.sequences()]


def peft_model(model: nn.Module, ours: nn.Module, config: LoRAConfig) -> nn.Module:
    """Return transformers' model with this project's adapter."""
    theirs = LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=list(ATTENTION),
        bias="none",
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, theirs)
    found = {}
    for name, parameter in model.named_parameters():
        found[name.replace("base_model.model.", "").replace(".default", "")] = parameter
    with torch.no_grad():
        for name, parameter in adapter_tensors(ours).items():
            found[name].copy_(parameter)
    return model


def why_no_liger(gpu: bool) -> str | None:
    """Return why Liger's kernels are left out; None if they can be used."""
    if not gpu:
        return "they need a GPU"
    return None if find_spec("liger_kernel") else "pip install liger-kernel"


@dataclass(frozen=True)
class Peer:
    """A model of transformers + PEFT that makes optimizer steps."""

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    liger: bool = False

    @classmethod
    def plain(cls, model: nn.Module) -> "Peer":
        """Return the peer as transformers and PEFT make it."""
        fused = next(model.parameters()).is_cuda or None  # as in transformers' own Trainer
        return cls("transformers + PEFT", model, optimizer_of(model, fused))

    def with_liger(self) -> "Peer":
        """Return the same model with Liger's kernels; the plain one is of no use afterwards."""
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama(model=self.model.get_base_model())
        return replace(self, name=f"{self.name} + Liger", liger=True)

    def loss(self, rows: list[list[int]], count: int) -> Tensor:
        """Return the loss of a padded batch: the sum over its targets, divided by count."""
        device, longest = next(self.model.parameters()).device, max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)
        mask = [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
        mask = torch.tensor(mask, device=device)
        labels = ids.masked_fill(mask == 0, IGNORED)
        inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
        if self.liger:  # the loss is fused with the output head; it shifts the labels itself
            fused = {"num_items_in_batch": count, "skip_logits": True}
            return self.model(**inputs, labels=labels, **fused).loss

        logits = self.model(**inputs).logits[:, :-1].float().flatten(0, 1)
        due = labels[:, 1:].flatten()
        return F.cross_entropy(logits, due, ignore_index=IGNORED, reduction="sum") / count

    def step(self, rows: list[list[int]], batch: int) -> float:
        """Make one optimizer step on padded batches of similar length; return the loss."""
        rows = sorted(rows, key=len)
        count, total = sum(len(row) - 1 for row in rows), 0.0
        for start in range(0, len(rows), batch):
            loss = self.loss(rows[start : start + batch], count)
            loss.backward()
            total += loss.detach()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(total)

    def check_loss(self, rows: list[list[int]], ours: float, rough: bool) -> float:
        """Return the peer's loss without dropout; InputError if this project's differs.

        rough: whether either is computed in less than fp32.
        """
        self.model.eval()
        theirs = self.step(rows, 4)
        if not abs(ours - theirs) <= (2e-2 if rough else 1e-4) * theirs:  # nor if one is NaN
            losses = f"the losses are {ours:.6f} and {theirs:.6f} ({self.name})"
            raise InputError(f"{losses}, so the times mean nothing")
        return theirs

    def measure(
        self, rows: list[list[int]], sizes: Sequence[int], repeats: int
    ) -> Iterator[tuple[str, float]]:
        """Yield the name and the examples/s of each batch size that fits."""
        device = next(self.model.parameters()).device
        self.model.train()
        for batch in sizes:
            try:
                took = seconds(partial(self.step, rows, batch), device, repeats)
            except torch.OutOfMemoryError:
                print(f"{self.name}: a batch of {batch} does not fit", flush=True)
                self.optimizer.zero_grad(set_to_none=True)
                continue
            name = f"{batch} a batch" if batch > 1 else "1 example a forward"
            yield f"{self.name}, {name}", len(rows) / took
