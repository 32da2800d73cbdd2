"""Fine-tune a model to answer whether the user takes the candidate (section 4.3): RUN/adapter/

    python train.py                                             # data/demo, models/tiny
    python train.py --data data/mind --model owner/llama --run runs/mind
    torchrun --nproc_per_node 8 train.py --model owner/llama --run-dir runs/mind    # FSDP2

The loss is the next-token loss over the whole prompt (equation 1), averaged over the tokens of an
optimizer step on all processes, so 1 and 8 processes train the same model up to rounding. A user's
positive and negatives are in the same step, where their shared prefix is computed once. The epoch
with the best validation recall is kept. After an interruption the same command resumes from
RUN/checkpoint/.
"""

import launch.waiting  # noqa: F401  # before torch
import math
import signal
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

import trsr
from batches.positions import ALL, Targets, prompts_to_learn
from batches.prompts import Batching, Prompts, Ranking, tokenize
from batches.steps import Step, check_batch_size, make_step, step_batches
from batches.stream import user_packs
from evaluate import Validation, make_recommender
from launch import announce, numbers
from launch.command import Shared, option, parse_settings, tell_next
from launch.embedded import DATA, MODEL, make_missing
from launch.estimate import is_short
from launch.processes import (
    all_reduce,
    join_processes,
    peak_memory,
    prefetch,
    ranks,
    run_script,
    same_bits,
    sum_gradients,
)
from launch.progress import StepBar, StepLog
from launch.together import check_together
from llama import Llama, compile_layers
from lora import LoRAConfig, apply_lora
from models.chat import Form
from models.hub import DTYPES, attention_names, find_model, load_form, load_model
from ops.checkpoint import fingerprint
from ops.graph import Graphs, wanted
from ops.packs import Pack, Tree
from ops.transfer import HostCopy
from prepare.dataset import (
    default_model,
    drawn_in_training,
    load_dataset,
    warn_of_cut_histories,
)
from prepare.domains import wording
from state.checkpoint import (
    Progress,
    epochs_done,
    gather_full,
    load_checkpoint,
    save_best,
    save_checkpoint,
    trainable,
)
from state.lending import lender_of, summarized
from state.metrics import drop_lines_after
from state.origin import learned_from
from state.settings import claim_config, locked, read_config
from state.summaries import share_summaries
from trsr import Example, InputError, Recommender

# ---- Settings: the defaults are those of the paper and its authors' code

LOSSES, SHARDS = ("prompt", "answer"), ("zero2", "zero3", "replicate")


@dataclass(frozen=True)
class Settings(Shared):
    """What is trained, and how: the flags."""

    paradigm: str | None = option(
        None, "what the prompt shows (unset: the run's)", choices=trsr.PARADIGMS, group="prompt"
    )
    history_items: int = option(3, "recent items in the prompt", numbers.natural)
    summaries: Path | None = option(None, "run folder that lends its summaries", Path)
    chat: bool = option(False, "ask in the form of the model's chat template")
    max_length: int = option(2048, "longest prompt with its answer, in tokens", numbers.positive)

    targets: int = option(
        1, "per user: last, all, or the last so many", partial(numbers.count_or, last=1, all=ALL)
    )
    negatives: int | None = option(None, "per target (unset: the dataset's)", numbers.positive)
    negatives_past: bool = option(False, "negatives of a position may come later in the history")

    epochs: int = option(8, "passes over the training users", numbers.positive, "optimization")
    lr: float = option(1e-4, "learning rate, constant", numbers.positive_real)
    batch_size: int = option(64, "examples per step, over all processes", numbers.positive)
    betas: tuple = option((0.9, 0.95), "AdamW's decay rates", numbers.fraction, nargs=2)
    weight_decay: float = option(5e-4, "AdamW's weight decay", numbers.real)
    max_grad_norm: float = option(1.0, "larger gradients are scaled to it; 0: none", numbers.real)
    loss: str = option("prompt", "of every token, or of Yes and No alone", choices=LOSSES)
    seed: int = option(0, "seed of users' order, adapter, dropout", numbers.seed_number)

    lora_r: int = option(8, "rank; 0 trains the whole model", numbers.natural, "adapter")
    lora_alpha: float = option(16.0, "the adapter is scaled by alpha / r", numbers.positive_real)
    lora_dropout: float = option(0.05, "on the adapter's input", numbers.fraction)
    lora_targets: tuple | None = option(None, "layers to adapt (unset: attention's)", nargs="+")

    pack_tokens: int | None = option(
        None, "tokens per pass (unset: 8192, on CPUs 4096)", numbers.positive, "running"
    )
    fp8: bool = option(False, "frozen matrices in 8-bit floating point; GPUs from Ada on")
    shard: str = option("zero2", "zero2: gradients; zero3: weights too", choices=SHARDS)
    activation_checkpointing: bool = option(False, "less memory, a third more time")
    cuda_graphs: bool | None = option(None, "on a GPU, launch passes whole (unset: if it pays)")
    deterministic: bool = option(False, "on a GPU, the same bits each time; slower")
    dry_run: bool = option(False, "report what the run will take, and stop")
    save_every: int = option(50, "steps between checkpoints within an epoch", numbers.positive)
    k: tuple = option((3, 5, 10), "cut-offs of validation recall", numbers.positive, nargs="+")

    @property
    def which(self) -> Targets:
        """The positions to learn from."""
        return Targets(self.targets, self.negatives_past, self.negatives)

    @property
    def autocast(self) -> bool:
        """Whether bf16 is for computing only: full fine-tuning keeps its weights in fp32."""
        return self.dtype == "bf16" and not self.lora_r

    @property
    def lora(self) -> LoRAConfig:
        """The adapter's configuration."""
        return LoRAConfig(self.lora_r, self.lora_alpha, self.lora_dropout, self.lora_targets)

    def recorded(self) -> dict:
        """Return what determines the result: a run resumes only with the same."""
        unset = {"fp8": False, "negatives": None}  # which older runs do not know
        said = {name: value for name, value in vars(self).items() if name not in MAY_CHANGE}
        return {n: value for n, value in said.items() if n not in unset or value != unset[n]}


CPU = torch.device("cpu")  # where processes agree without waiting for a GPU

# These say how to compute, not what.
MAY_CHANGE = ("run", "shard", "activation_checkpointing", "save_every", "no_compile", "dry_run")
MAY_CHANGE += ("timeout", "given", "summaries", "cuda_graphs", "deterministic")


def resolve(flags: Settings, device: torch.device) -> Settings:
    """Return the settings; what is unset comes from the run, its summaries, then from defaults."""
    flags = flags.inherit(read_config(flags.run).get("train", {}))
    check_together(flags, ranks()[1])
    lent = summarized(flags.summaries, flags.run)  # empty without summaries
    data = flags.data or lent.get("data", DATA)
    paradigm = flags.paradigm or lent.get("paradigm", "hierarchical")
    make_missing(flags, data, summaries=paradigm in trsr.SUMMARIZED and not flags.summaries)
    model = flags.model or lent.get("model") or default_model(data, MODEL)
    targets = flags.lora_targets or attention_names(find_model(model, flags.revision))
    return replace(
        flags,
        data=data,
        model=model,
        dtype=flags.dtype_on(device.type),
        paradigm=paradigm,
        lora_targets=tuple(targets),
        pack_tokens=flags.pack_tokens or (8192 if device.type == "cuda" else 4096),
    )


# ---- One optimizer step: FSDP2 if torchrun started several processes


def shard(model: Llama, device: torch.device, mode: str) -> None:
    """Shard parameters, gradients and optimizer state over the processes, layer by layer (FSDP2).

    zero2: every process holds the frozen weights whole, so they are never gathered; only what is
    trained is sharded. zero3: all weights are, and a layer's are gathered while it is computed.
    """
    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    whole = {p for p in model.parameters() if not p.requires_grad} if mode == "zero2" else set()
    options = {"mesh": mesh, "ignored_params": whole}
    # A layer is the unit of gathering; what is outside of layers is one more.
    for layer in model.model.layers:
        fully_shard(layer, reshard_after_forward=mode == "zero3", **options)
    fully_shard(model, reshard_after_forward=False, **options)
    register_fsdp_forward_method(model, "loss")  # so that calling it gathers weights too


class Passes:
    """A model's passes over packs: forward, and backward into the gradients."""

    def __init__(self, model: Llama, mode: str = "zero2", autocast=False, graphs=None):
        self.model, self.mode, self.autocast = model, mode, autocast
        self.device, (_, self.world) = next(model.parameters()).device, ranks()
        self.sharded = isinstance(model, FSDPModule)
        fuses = self.device.type == "cuda" and not self.sharded
        self.fused = True if fuses else None  # the optimizer's kernels; None: its own choice
        # Recomputed layers restore the state of random numbers, which no graph can.
        possible = not model.model.checkpointing
        self.graphs = Graphs(self.device, possible and wanted(graphs, model))
        if self.graphs.enabled:  # graphs add to gradients where they were
            for parameter in trainable(model).values():
                parameter.grad = torch.zeros_like(parameter)

    def loss(self, weight: Tensor, *tensors: Tensor) -> Tensor:
        """Return weight * a pack's loss, and add its gradients."""
        # A graph would read casts of weights again that autocast had kept for later.
        options = {"enabled": self.autocast, "cache_enabled": not self.graphs.enabled}
        with torch.autocast(self.device.type, torch.bfloat16, **options):
            loss = self.model.loss(Pack.of(*tensors)) * weight
        # FSDP averages the gradients, but the targets are those of all processes.
        (loss * (self.world if self.sharded else 1)).backward()
        return loss.detach()

    def over(self, step: Step) -> Tensor:
        """Add up the gradients of the step's mean loss; return this process's share of it."""
        n = len(step.packs)  # of this process
        # FSDP's processes must run equally often: those with fewer packs repeat one with weight 0.
        rounds = int(all_reduce(n, CPU, dist.ReduceOp.MAX)) if self.sharded else n
        loss = torch.zeros((), device=self.device)  # stays there, so that no pack waits
        for i in range(rounds):
            weight = 1 / step.targets if step.targets and i < n else 0.0
            last = i == rounds - 1
            if self.sharded:  # reduce gradients, and drop gathered weights, at the step's end
                self.model.set_requires_gradient_sync(last)
                self.model.set_reshard_after_backward(last or self.mode == "zero3")
            tensors = step.packs[min(i, n - 1)].tensors()
            loss += self.graphs.run(self.loss, torch.tensor(weight), *tensors.values())
        return loss


@dataclass(frozen=True)
class Outcome:
    """Loss and gradient norm of a step of all processes, on their way from the device."""

    values: HostCopy

    def read(self) -> tuple[float, float]:
        """Wait for them and return them; FloatingPointError if one is not finite."""
        loss, norm = self.values.tolist()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise FloatingPointError(f"loss {loss}, gradient norm {norm}")
        return loss, norm


def train_step(
    passes: Passes, optimizer: torch.optim.Optimizer, step: Step, max_grad_norm: float = 1.0
) -> Outcome:
    """Update the model, unless the loss or the gradient is not finite; return their outcome.

    On a GPU it is still on its way. Without a fused optimizer it is read here, which raises
    FloatingPointError.
    """
    # Gradients of this process's packs, then of all processes'; FSDP adds them up by itself.
    loss, parameters = passes.over(step), trainable(passes.model).values()
    if dist.is_initialized():
        dist.all_reduce(loss)
        if not passes.sharded:
            sum_gradients(list(parameters))

    # A fused update looks by itself whether all is finite, so that the host need not wait.
    limit = max_grad_norm or math.inf
    norm = gather_full(torch.nn.utils.clip_grad_norm_(parameters, limit))
    both = torch.stack((loss, norm))
    outcome = Outcome(HostCopy(both))
    if optimizer.defaults["fused"]:
        optimizer.found_inf = 1.0 - both.isfinite().all().float()
    else:
        outcome.read()
    optimizer.step()
    optimizer.zero_grad(set_to_none=not passes.graphs.enabled)  # frees their memory
    return outcome


# ---- The loop


class Trainer:
    """Trains for settings.epochs, from wherever the run's checkpoint is."""

    def __init__(
        self,
        settings: Settings,
        model: Llama,
        trees: list[Tree],  # of the training users
        users: list[Example],
        batching: Batching,
        validation: Validation,
    ):
        self.settings, self.model = settings, model
        short = is_short(model, trees, settings.epochs)  # then compiling counts
        self.batching = replace(batching, few_lengths=short)
        self.trees, self.users, self.validation = trees, users, validation
        self.device, (self.rank, _) = next(model.parameters()).device, ranks()
        self.passes = Passes(model, settings.shard, settings.autocast, settings.cuda_graphs)
        options = {"lr": settings.lr, "betas": tuple(settings.betas)}
        options |= {"weight_decay": settings.weight_decay, "fused": self.passes.fused}
        self.optimizer = torch.optim.AdamW(trainable(model).values(), **options)
        show = self.rank == 0
        found = load_checkpoint(settings.run, model, self.optimizer, self.device, show)
        self.progress = found or Progress()
        self.signals: list[int] = []  # received: SIGTERM and Ctrl-C

    def fit(self) -> None:
        """Train, with a line in metrics.jsonl per step and per epoch."""
        if self.rank == 0:
            drop_lines_after(self.settings.run, self.progress.step, self.progress.epoch)
        # A signal is only noted here; the loop stops after the step, when all agree.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, _frame: self.signals.append(number))

        settings, sizes = self.settings, [len(tree.leaves) for tree in self.trees]
        shape = sizes, settings.batch_size, settings.seed
        epochs = [step_batches(*shape, epoch) for epoch in range(settings.epochs)]
        bar = None
        if self.rank == 0:
            tokens = sum(tree.size for tree in self.trees)
            bar = StepBar(sum(map(len, epochs)), self.progress.step, tokens, self.device)
        self.log = StepLog(settings, self.users, bar)
        for batches in epochs[self.progress.epoch :]:
            self.train_epoch(batches[self.progress.batch :])  # what is left of it
            self.end_epoch()

    def train_epoch(self, batches: list[list[int]]) -> None:
        """Make the epoch's remaining steps; stop between two if a signal came."""
        settings, progress = self.settings, self.progress
        self.log.begin()
        steps = (make_step(self.trees, b, settings.loss, self.batching) for b in batches)
        for step in prefetch(steps):  # packs are filled while the GPU works on the last ones
            self.log.launch(progress.step + 1, progress.epoch + 1, step, partial(self.update, step))
            progress.step += 1
            progress.batch += 1  # where a resumed epoch begins

            # Checkpoint now and then, and before stopping.
            stop = all_reduce(len(self.signals), CPU, dist.ReduceOp.MAX)
            if stop or progress.step % settings.save_every == 0:
                self.log.settle()
                self.save()
                self.log.begin()
            if stop:
                what = f"stopped after step {progress.step}"
                raise InputError(f"{what}; the same command resumes from there")
        self.log.settle()

    def update(self, step: Step) -> Outcome:
        """Make one optimizer step."""
        # Dropout depends on the step alone, so that a resumed run has the same.
        seed = (self.settings.seed * 1_000_003 + self.progress.step) * 4096 + self.rank
        torch.manual_seed(seed % 2**64)
        return train_step(self.passes, self.optimizer, step, self.settings.max_grad_norm)

    def end_epoch(self) -> None:
        """Validate, and keep the model if it is the best so far."""
        progress, recall = self.progress, self.validate()
        total = sum(recall.values())
        best = total > progress.best  # a tie keeps the earlier epoch
        self.log.validated(progress.step, progress.epoch + 1, recall, best)
        # The checkpoint comes last, so that a run killed here validates again.
        progress.epoch, progress.batch = progress.epoch + 1, 0
        progress.best = max(progress.best, total)
        if best:
            settings = self.settings
            base = find_model(settings.model, settings.revision)
            adapter = settings.lora if settings.lora_r else None
            save_best(settings.run, self.model, adapter, settings.model, base, settings.dtype)
        self.save()

    def validate(self) -> dict[str, float]:
        """Return the validation recall at each k."""
        self.model.eval()  # without dropout
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.autocast):
            recall = self.validation.recall(self.model, self.settings.k)
        self.model.train()
        # Without a backward pass nothing else drops the weights that FSDP has gathered.
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        return recall

    def save(self) -> None:
        """Write a checkpoint."""
        save_checkpoint(self.settings.run, self.model, self.optimizer, self.progress, self.rank)


# ---- The command


def main() -> None:
    """Train on the dataset's training users."""
    flags = parse_settings(Settings, __doc__)
    rank, _, device = join_processes(flags.timeout)
    settings = resolve(flags, device)  # nothing is decided after this line
    same_bits(device.type == "cpu" or settings.deterministic)
    batching = Batching.on(device, settings.pack_tokens, on_gpus=8192)

    # The users, the model with a new adapter, and what makes the prompts.
    domain, items, splits = load_dataset(settings.data, ("train", "val"))
    train, val = settings.which.limited(splits["train"]), splits["val"]
    check_batch_size(settings.batch_size, train, settings.targets)
    folder = find_model(settings.model, settings.revision)
    form = load_form(folder, settings.chat)
    recommender, answers = make_recommender(settings, folder, form, domain, items, train + val)
    model = load_base(settings, folder)

    with locked(settings.run, hold=rank == 0):
        if rank == 0:
            claim(settings, folder, form, recommender, train, val)
        if (epochs_done(settings.run) or 0) >= settings.epochs:
            return conclude(settings, f"done    {settings.run}: all epochs were trained before")
        if rank == 0:
            announce.training(settings, model, len(train), len(val), recommender.budget.tokens)

        # Every prompt as token ids: trees to learn from, packs to validate on.
        prompts = training_prompts(settings, recommender, train, answers)
        trees = list(tokenize(prompts, batching.workers, show=rank == 0))
        ranking = Ranking.of(recommender, val)
        packs = user_packs(ranking, range(len(val)), batching, show=rank == 0)
        validation = Validation(ranking, list(packs), answers, settings.cuda_graphs)
        if rank == 0:
            announce.cost_of_training(settings, model, trees, recommender.budget, device)
        if settings.dry_run:  # after the estimate, before anything is written
            return

        place(model, settings, device)
        Trainer(settings, model, trees, train, batching, validation).fit()
        wrote = settings.run / ("adapter" if settings.lora_r else "model")
        conclude(settings, f"wrote   {wrote}; peak {peak_memory(device)}")


def training_prompts(
    settings: Settings, recommender: Recommender, train: list[Example], answers: tuple[int, int]
) -> Prompts:
    """Return what makes the prompts to learn from, for each of the users' targets."""
    warn_of_cut_histories(settings.data, drawn=settings.targets > 1 and ranks()[0] == 0)
    pool = drawn_in_training(settings.data, recommender.items, train)
    return prompts_to_learn(recommender, train, answers, settings.which, lender_of(settings), pool)


def load_base(settings: Settings, folder: Path) -> Llama:
    """Return the model to train, on the CPU, with a new adapter unless --lora-r is 0."""
    if not settings.lora_r and folder.resolve() == (settings.run / "model").resolve():
        what = "the trained model would replace it; move it, or choose another --run"
        raise InputError(f"{folder}: {what}")
    # Full fine-tuning keeps fp32 weights; an adapter's frozen base can be in bf16.
    dtype = DTYPES[settings.dtype] if settings.lora_r else torch.float32
    model = load_model(folder, torch.device("cpu"), dtype, fp8=settings.fp8 and "training")
    torch.manual_seed(settings.seed)  # of the adapter's start
    return apply_lora(model, settings.lora) if settings.lora_r else model


def claim(
    settings: Settings, folder: Path, form: Form, recommender: Recommender, train: list, val: list
) -> None:
    """Record the settings and hashes of all that is used; InputError if the run has others."""
    run, texts = settings.run, [recommender.items, recommender.summaries]
    content = trsr.content_hash([*texts, [vars(example) for example in train + val]])
    recorded = settings.recorded() | {"fingerprint": fingerprint(folder), "content": content}
    recorded |= learned_from(train, recommender.items)
    words = wording(settings.paradigm, recommender.domain, form.show)
    recorded["prompt"] = words["recommend"]
    started = any((run / kind).is_dir() for kind in ("checkpoint", "adapter", "model"))
    if not settings.dry_run:  # which leaves nothing behind
        claim_config(run, "train", recorded, started)
        if settings.summaries:
            share_summaries(settings.summaries, run)


def conclude(settings: Settings, what: str) -> None:
    """Print the outcome and the next command."""
    if ranks()[0] == 0:
        print(what)
        tell_next(f"python evaluate.py --run {settings.run}")


def place(model: Llama, settings: Settings, device: torch.device) -> None:
    """Put the model on its device, sharded and compiled as the settings ask."""
    if dist.is_initialized() and settings.shard != "replicate":
        shard(model, device, settings.shard)
    model.to(device)  # after sharding, so that a GPU never holds what it does not keep
    if device.type == "cuda" and not settings.no_compile:
        compile_layers(model)
    model.model.checkpointing = settings.activation_checkpointing
    model.train()


if __name__ == "__main__":
    run_script(main)
