"""What the comparisons share: the same random weights for both sides, prompts, and timing.

Prompts have the paper's lengths: a user's share a prefix of 410 tokens on MIND and of 750 on
Amazon-M2, and the candidate adds 53 or 155, each varied by up to 25 %. The first 100 tokens are the
instruction, which is the same for every user.
"""

import math
import random
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from bench.shapes import LLAMA_FIELDS, SHAPES
from launch.command import option
from launch.numbers import positive, seed_number
from llama import Config, Llama
from ops.packs import Pack, Tree

WORK = {"mind": (410, 53), "amazon": (750, 155)}  # tokens of the prefix, and of a candidate
INSTRUCTION, VARIED, CANDIDATES = 100, 0.25, 21


@dataclass(frozen=True)
class Settings:
    """The flags that all comparisons share; each adds its own."""

    shape: str = option("100m", "shape of the models", choices=tuple(SHAPES))
    layers: int | None = option(None, "number of layers (unset: the shape's)", positive)
    work: str = option("mind", "the dataset whose prompt lengths to use", choices=tuple(WORK))
    repeats: int = option(3, "timings; the median counts", positive)
    seed: int = option(0, "seed of the weights and the prompts", seed_number)
    fp8: bool = option(False, "this project with the layers' matrices in fp8, as in the scripts")
    json: bool = option(False, "print one JSON object at the end")

    @property
    def fields(self) -> dict:
        """The shape, as fields of config.json; what it leaves open is as in Llama 2."""
        shape = SHAPES[self.shape] | ({"num_hidden_layers": self.layers} if self.layers else {})
        heads = shape["num_attention_heads"]
        derived = {"num_key_value_heads": heads, "head_dim": shape["hidden_size"] // heads}
        shared = ("vocab_size", "tie_word_embeddings", "rms_norm_eps", "max_position_embeddings")
        return derived | {name: LLAMA_FIELDS[name] for name in shared} | shape

    @property
    def vocabulary(self) -> int:
        """The rows of the embedding."""
        return self.fields["vocab_size"]

    def precision(self, dtype: torch.dtype) -> str:
        """Return what this project computes in, in words."""
        return str(dtype).split(".")[1] + (" with fp8 matrices" if self.fp8 else "")


@dataclass(frozen=True)
class PackSettings(Settings):
    """The flags of what computes packs: training and scoring."""

    pack_tokens: int | None = option(
        None, "tokens in a forward pass (unset: as in the script)", positive
    )
    cuda_graphs: bool | None = option(
        None, "on a GPU, launch passes whole, as in the script (unset: if it pays)"
    )
    no_compile: bool = option(False, "on a GPU, do not compile the layers")


# ---- Models


def make_models(
    settings: Settings, device: torch.device, dtype: torch.dtype, peer: bool
) -> tuple[Llama, LlamaForCausalLM | None]:
    """Return this project's model and, if peer, transformers', with the same random weights."""
    fields = settings.fields
    with torch.device("meta"):
        ours = Llama(Config(**fields))
    weights = random_weights(ours, settings.seed, device, dtype)
    ours.load_state_dict(weights, strict=False, assign=True)
    if fields["tie_word_embeddings"]:
        ours.lm_head.weight = ours.model.embed_tokens.weight
    return ours.eval(), transformers_model(fields, weights, device) if peer else None


def random_weights(
    model: Llama, seed: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return random weights by name: matrices with a standard deviation of 0.02, norms of 1."""
    generator = torch.Generator(device).manual_seed(seed)
    weights = {}
    for name, parameter in model.named_parameters():
        weights[name] = torch.ones(parameter.shape, device=device, dtype=dtype)
        if parameter.dim() > 1:
            weights[name].normal_(0, 0.02, generator=generator)
    return weights


def transformers_model(
    fields: dict, weights: dict[str, Tensor], device: torch.device
) -> LlamaForCausalLM:
    """Return transformers' model with these weights."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**fields))
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    # Its rotary tables are not among the weights, so they are still on meta.
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config).to(device)
    return model.eval()


def layer_matrices(model: nn.Module) -> list[Tensor]:
    """Return the layers' matrices: the weights that every token is multiplied with."""
    return [p for name, p in model.named_parameters() if ".layers." in name and p.dim() > 1]


def optimizer_of(model: nn.Module, fused: bool | None) -> torch.optim.Optimizer:
    """Return an optimizer with a rate of 0: it does all of its work and changes nothing.

    fused: whether to use torch's fused kernels; None leaves the choice to torch.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(parameters, lr=0.0, fused=fused)


# ---- Prompts


def random_trees(settings: Settings, users: int, branches: int) -> list[Tree]:
    """Return users' prompts as trees of random tokens; seeded."""
    rng = random.Random(f"bench {settings.seed} {settings.work}")
    prefix, tail = WORK[settings.work]

    def exactly(n: int) -> list[int]:
        return [rng.randrange(3, settings.vocabulary) for _ in range(n)]

    def about(n: int) -> list[int]:
        return exactly(round(n * rng.uniform(1 - VARIED, 1 + VARIED)))

    instruction = exactly(INSTRUCTION)
    trees = []
    for _ in range(users):
        beginning = instruction + about(prefix - INSTRUCTION)
        trees.append(Tree(beginning, [about(tail) for _ in range(branches)]))
    return trees


def padded_left(prompts: list[list[int]], width: int, device: torch.device) -> tuple:
    """Return token ids and mask (B, width) of prompts, padded on the left."""
    rows = [[0] * (width - len(p)) + p for p in prompts]
    mask = [[0] * (width - len(p)) + [1] * len(p) for p in prompts]
    return torch.tensor(rows, device=device), torch.tensor(mask, device=device)


@dataclass(frozen=True)
class Filling:
    """How full packs are."""

    tokens: int
    places: int  # padding included
    leaves: int

    @classmethod
    def of(cls, shares: list[list[Pack]]) -> "Filling":
        """Return how full the packs are; shares: those of each process."""
        packs = [pack for share in shares for pack in share]
        places = sum(len(pack.ids) for pack in packs)
        return cls(sum(p.tokens for p in packs), places, sum(len(p.leaves) for p in packs))

    @property
    def share(self) -> float:
        """The share of places that hold a token."""
        return self.tokens / self.places


# ---- Time


def seconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Return the median time of work in seconds, after one warm-up.

    With several processes, the work ends when the last one has finished.
    """

    def together() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        if dist.is_initialized():
            dist.barrier()
        return time.perf_counter()

    times = []
    for _ in range(repeats + 1):
        began = together()
        work()
        times.append(together() - began)
    return statistics.median(times[1:])


def ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s that a large matrix product reaches on the device."""
    gpu = device.type == "cuda"
    n, inner = (8192, 20) if gpu else (2048, 3)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 * inner / seconds(lambda: [a @ b for _ in range(inner)], device, 5)


def copy_rate(device: torch.device) -> float:
    """Return the bytes per second that a large copy reads and writes, together."""
    size = (1 << 30) if device.type == "cuda" else (1 << 27)
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    took = seconds(lambda: [target.copy_(source) for _ in range(5)], device, 5)
    return 2 * size * 5 / took


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Return the length of the union of spans (start, end)."""
    length, reached = 0.0, -math.inf
    for start, end in sorted(spans):
        length += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return length


def device_name(device: torch.device, world: int) -> str:
    """Return what the comparison runs on, in words."""
    name = f"cpu, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
    return f"{world} x {name}" if world > 1 else name
