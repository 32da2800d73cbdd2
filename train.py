"""Fine-tune a language model to answer whether the user takes the candidate (section 4.3): summaries -> RUN/adapter/

    python train.py                                             # the embedded default, after summarize.py
    python train.py --data data/mind --model owner/llama --run runs/mind
    torchrun --nproc_per_node 8 train.py --data data/mind --model owner/llama --run-dir runs/mind       # FSDP2

The loss is the next-token loss over the whole prompt (equation 1), averaged over the tokens of an optimizer step on
all processes, so that 1 and 8 processes train the same model. A user's positive and negative stand in one step
together, so that their common prefix is computed once. The epoch with the best validation recall is kept.
After an interruption the same command goes on from RUN/checkpoint/.
"""

import json
import math
import os
import shutil
import signal
import time
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from tqdm import tqdm

import trsr
from llama import CheckpointError, Llama, Pack, Tokenizer, Tree, load_model, make_tree, pack_trees, score_packs

from llama import find_model, fingerprint, pick_device  # isort: skip
from lora import ATTENTION, AdapterError, LoRAConfig, apply_lora, save_adapter


def parse_arguments():
    """Return the command line's settings; the defaults are the paper's and its authors' code's."""
    parser = trsr.script_parser(__doc__)
    flag = parser.add_argument_group("prompt").add_argument
    flag("--paradigm", choices=trsr.PARADIGMS, help="what the prompt tells of the user (without it: the run's summary)")
    flag("--history-items", type=trsr.natural, default=3, help="recent items in the prompt")
    flag("--max-length", type=trsr.positive, default=2048, help="longest prompt with its answer, in tokens")
    flag = parser.add_argument_group("optimization").add_argument
    flag("--epochs", type=trsr.positive, default=8, help="passes over the training users")
    flag("--lr", type=float, default=1e-4, help="learning rate, constant")
    flag("--batch-size", type=trsr.positive, default=64, help="examples in an optimizer step, over all processes")
    flag("--betas", type=float, nargs=2, default=(0.9, 0.95), help="AdamW's decay rates")
    flag("--weight-decay", type=float, default=5e-4, help="AdamW's weight decay")
    flag("--max-grad-norm", type=float, default=1.0, help="larger gradients are scaled down to this norm")
    flag("--loss", choices=["prompt", "answer"], default="prompt", help="prompt: equation 1; answer: Yes or No alone")
    flag("--seed", type=trsr.natural, default=0, help="of the data's order, the adapter's start and dropout")
    flag = parser.add_argument_group("adapter").add_argument
    flag("--lora-r", type=trsr.natural, default=8, help="rank; 0 trains the whole model")
    flag("--lora-alpha", type=float, default=16.0, help="the adapter counts alpha / r")
    flag("--lora-dropout", type=float, default=0.05, help="on the adapter's input")
    flag("--lora-targets", nargs="+", default=list(ATTENTION), help="linear layers to adapt")
    flag = parser.add_argument_group("running").add_argument
    flag("--pack-tokens", type=trsr.positive, help="tokens in a forward pass (without it: 8192 on GPUs, 2048 on CPUs)")
    flag("--save-every", type=trsr.positive, default=50, help="steps between checkpoints; an epoch ends with one too")
    flag("--k", type=trsr.positive, nargs="+", default=[3, 5, 10], help="validation recall is summed over these")
    return parser.parse_args()


# ---------------------------------------------------------------------------------------------------------------------
# What is trained on: a tree for each user, and which users make a step


def training_tree(recommender: trsr.Recommender, example: trsr.Example, answers: tuple[int, int]) -> Tree:
    """Return the user's training examples: the positive's prompt answered Yes, the negatives' answered No."""
    prompts = recommender.prompt_ids(example, [example.positive, *example.negatives])
    return make_tree([[*ids, answers[min(i, 1)]] for i, ids in enumerate(prompts)])


def target_count(tree: Tree, loss: str) -> int:
    """Return how many next-token targets the tree's examples have, counted as if they were apart."""
    n = len(tree.branches)
    return n if loss == "answer" else n * (len(tree.prefix) - 1) + sum(map(len, tree.branches))


def step_batches(n_users: int, users_a_step: int, seed: int, epoch: int) -> list[list[int]]:
    """Return the epoch's steps, a list of users each, in an order that only seed and epoch determine."""
    order = torch.randperm(n_users, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).tolist()
    return [order[i : i + users_a_step] for i in range(0, n_users, users_a_step)]


def share_out(sizes: list[int], shares: int) -> list[list[int]]:
    """Return the indices of sizes in `shares` groups of about equal sum: the largest first, to the lightest group."""
    groups: list[list[int]] = [[] for _ in range(shares)]
    loads = [0] * shares
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        lightest = loads.index(min(loads))
        groups[lightest].append(i)
        loads[lightest] += sizes[i]
    return groups


# ---------------------------------------------------------------------------------------------------------------------
# Processes: FSDP2 where torchrun started several, nothing at all otherwise


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def reduced(value: float, device: torch.device, op: dist.ReduceOp = dist.ReduceOp.SUM) -> float:
    """Return value reduced over the processes."""
    if not dist.is_initialized():
        return value
    tensor = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, op)
    return tensor.item()


def shard(model: Llama, device: torch.device) -> None:
    """Shard each layer's parameters, gradients and optimizer state over the processes (ZeRO stage 2) on device."""
    mesh = dist.init_device_mesh(device.type, (world_size(),))
    for module in (*model.model.layers, model):
        fully_shard(module, mesh=mesh, reshard_after_forward=False)
    register_fsdp_forward_method(model, "loss")


def trainable(model: Llama) -> dict[str, Tensor]:
    """Return the parameters that are trained, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def full(tensor: Tensor) -> Tensor:
    """Return a sharded tensor whole, another as it is. Every process must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


# ---------------------------------------------------------------------------------------------------------------------
# One optimizer step, and validation


def train_step(model: Llama, optimizer, packs: list[Pack], count: int, args, device) -> tuple[float, float]:
    """Update the model on this process's packs; return (loss, gradient norm) of the whole step on all processes.

    count: the targets of the whole step, over which the loss is averaged; 0 means that these packs do not count.
    Raises FloatingPointError before the update where loss or gradient are not finite.
    """
    rounds = int(reduced(len(packs), device, dist.ReduceOp.MAX))
    loss = torch.zeros((), device=device)
    for i in range(rounds):
        # FSDP's processes must run equally often: one that has fewer packs repeats its last without weight.
        weight = 1 / count if count and i < len(packs) else 0.0
        pack = packs[min(i, len(packs) - 1)].to(device)
        if isinstance(model, FSDPModule):  # reduce gradients and drop the gathered weights once a step, at its end
            model.set_requires_gradient_sync(i == rounds - 1)
            model.set_reshard_after_backward(i == rounds - 1)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.autocast):
            part = model.loss(pack.ids[None], pack.positions[None], pack.mask(), pack.targets) * weight
        (part * world_size()).backward()  # FSDP averages gradients over the processes; weight is already of all
        loss += part.detach()
    loss = reduced(loss.item(), device)
    norm = full(torch.nn.utils.clip_grad_norm_(trainable(model).values(), args.max_grad_norm)).item()
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise FloatingPointError(f"loss {loss}, gradient norm {norm}")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss, norm


def validate(model: Llama, examples, candidates, packs: list[Pack], answers, args, device) -> dict[str, float]:
    """Return Recall at each k of the examples; packs hold their prompts and are shared out over the processes."""
    rank, world = int(os.environ.get("RANK", 0)), world_size()
    mine = (packs[rank::world] + packs[:1])[: -(-len(packs) // world)]  # equally many; scoring one twice does no harm
    model.eval()
    with (
        torch.autocast(device.type, torch.bfloat16, enabled=args.autocast),
        tqdm(total=len(mine), desc="validate", unit="pack", leave=False, disable=rank > 0) as bar,
    ):
        parts = [score_packs(model, mine, answers, lambda _: bar.update())]
    model.train()
    if world > 1:
        gathered = [None] * world
        dist.all_gather_object(gathered, parts[0])
        parts = gathered
    _, ranks = trsr.rank_users(examples, candidates, {key: v for part in reversed(parts) for key, v in part.items()})
    return {name: float(v.mean()) for name, v in trsr.metrics_at(ranks, args.k).items() if name.startswith("Recall")}


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: one safetensors file with what is trained, the optimizer's state and, in its header, the progress


def save_checkpoint(run: Path, model: Llama, optimizer, progress: dict) -> None:
    """Write the state after progress["step"] steps, whole or not at all, then remove older ones."""
    tensors = {}
    for name, parameter in trainable(model).items():
        state = optimizer.state[parameter]
        tensors[f"parameter/{name}"] = full(parameter).detach().cpu().contiguous()
        for key in ("step", "exp_avg", "exp_avg_sq") if state else ():
            tensors[f"{key}/{name}"] = full(state[key]).cpu().contiguous()
    if int(os.environ.get("RANK", 0)) == 0:
        folder = run / "checkpoint"
        folder.mkdir(exist_ok=True)
        path = folder / f"step-{progress['step']:08d}.safetensors"
        with trsr.atomic_write(path, "wb") as file:
            save_file(tensors, file.name, metadata={"progress": json.dumps(progress)})
        for old in folder.iterdir():
            if old != path:
                old.unlink()


def load_checkpoint(run: Path, model: Llama, optimizer) -> dict | None:
    """Put the newest whole checkpoint into model and optimizer; return its progress, None where there is none."""
    for path in sorted((run / "checkpoint").glob("step-*.safetensors"), reverse=True):
        try:
            with safe_open(path, framework="pt") as file:
                progress = json.loads(file.metadata()["progress"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            print(f"{path}: ignored, it is not whole ({error})")
            continue
        for name, parameter in trainable(model).items():

            def like(tensor: Tensor, parameter: Tensor = parameter) -> Tensor:
                tensor = tensor.to(parameter.device)
                sharded = isinstance(parameter, DTensor)
                return distribute_tensor(tensor, parameter.device_mesh, parameter.placements) if sharded else tensor

            parameter.data.copy_(like(tensors[f"parameter/{name}"]))
            if f"step/{name}" in tensors:
                optimizer.state[parameter] = {"step": tensors[f"step/{name}"]} | {
                    key: like(tensors[f"{key}/{name}"]) for key in ("exp_avg", "exp_avg_sq")
                }
        return progress
    return None


def save_best(run: Path, model: Llama, folder: Path, args) -> Path:
    """Write what evaluate.py needs: the adapter, or with --lora-r 0 the whole model; return where."""
    tensors = {name: full(parameter) for name, parameter in trainable(model).items()}
    target = run / ("adapter" if args.lora_r else "model")
    if int(os.environ.get("RANK", 0)) == 0 and args.lora_r:
        save_adapter(target, tensors, lora_config(args), args.model)
    elif int(os.environ.get("RANK", 0)) == 0:
        target.mkdir(exist_ok=True)
        for source in (*folder.glob("*config.json"), *folder.glob("tokenizer*")):
            shutil.copyfile(source, target / source.name)
        with trsr.atomic_write(target / "model.safetensors", "wb") as file:
            tensors = {name: t.detach().cpu().to(args.weight_dtype).contiguous() for name, t in tensors.items()}
            save_file(tensors, file.name, metadata={"format": "pt"})
    return target


def lora_config(args) -> LoRAConfig:
    """Return the adapter that the arguments describe."""
    return LoRAConfig(args.lora_r, args.lora_alpha, args.lora_dropout, tuple(args.lora_targets))


# ---------------------------------------------------------------------------------------------------------------------
# The run


def fit(args, model, optimizer, folder, device, trees: list[Tree], users: list[str], check) -> None:
    """Train for args.epochs, with a line in metrics.jsonl a step, and keep the epoch with the best check() recall."""
    rank, world, run = int(os.environ.get("RANK", 0)), world_size(), args.run
    progress = load_checkpoint(run, model, optimizer) or {"step": 0, "epoch": 0, "batch": 0, "best": -1.0}
    metrics = run / "metrics.jsonl"
    if rank == 0:
        lines = [r for _, r in trsr.read_jsonl(metrics, {}, torn=True)] if metrics.is_file() else []
        with trsr.atomic_write(metrics) as file:  # what came after the checkpoint is done again
            file.writelines(json.dumps(r) + "\n" for r in lines if r["step"] <= progress["step"])
    interrupted = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _frame: interrupted.append(number))
    users_a_step = args.batch_size // len(trees[0].branches)
    steps = -(-len(trees) // users_a_step)
    bar = tqdm(total=args.epochs * steps, initial=progress["step"], unit="step", disable=rank > 0)

    def log(record: dict) -> None:
        if rank == 0:
            with open(metrics, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": progress["step"]} | record) + "\n")

    while progress["epoch"] < args.epochs:
        epoch = progress["epoch"]
        for batch in step_batches(len(trees), users_a_step, args.seed, epoch)[progress["batch"] :]:
            start = time.perf_counter()
            step_trees = [trees[u] for u in batch]
            mine = [step_trees[i] for i in share_out([tree.size for tree in step_trees], world)[rank]]
            packs = pack_trees(mine or step_trees[:1], args.pack_tokens, args.pad_to, args.loss == "answer")
            count = sum(target_count(tree, args.loss) for tree in step_trees)
            torch.manual_seed((args.seed * 1_000_003 + progress["step"]) * 4096 + rank)  # dropout, also when resumed
            try:
                loss, norm = train_step(model, optimizer, packs, count if mine else 0, args, device)
            except FloatingPointError as error:
                who = ", ".join(users[u] for u in batch[:4])
                message = f"step {progress['step'] + 1}: {error}; users {who}, ...; lower --lr, or look at their data"
                raise trsr.InputError(message) from None
            progress |= {"step": progress["step"] + 1, "batch": progress["batch"] + 1}
            speed = sum(tree.size for tree in step_trees) / (time.perf_counter() - start)
            log({"epoch": epoch + 1, "loss": loss, "grad_norm": norm, "lr": args.lr, "tokens_per_second": speed})
            memory = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0
            gpu = f", {memory:.1f} GiB" if memory else ""
            bar.set_postfix_str(f"epoch {epoch + 1}, loss {loss:.4f}, lr {args.lr:g}, {speed:.0f} tokens/s{gpu}")
            bar.update()
            if reduced(len(interrupted), device, dist.ReduceOp.MAX):
                save_checkpoint(run, model, optimizer, progress)
                raise trsr.InputError(f"stopped after step {progress['step']}; the same command goes on from there")
            if progress["step"] % args.save_every == 0:
                save_checkpoint(run, model, optimizer, progress)
        recall = check()
        log({"epoch": epoch + 1, "validation": recall})
        best = sum(recall.values()) > progress["best"]
        progress |= {"epoch": epoch + 1, "batch": 0, "best": max(progress["best"], sum(recall.values()))}
        if best:
            save_best(run, model, folder, args)
        save_checkpoint(run, model, optimizer, progress)
        if rank == 0:
            values = ", ".join(f"{name} {value:.4f}" for name, value in recall.items())
            tqdm.write(f"epoch {epoch + 1}: loss {loss:.4f}, validation {values}{', best so far' if best else ''}")
    bar.close()


def main() -> None:
    """Train on the dataset's training users."""
    args = parse_arguments()
    rank, world, device = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), pick_device()
    if world > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    summarized = trsr.read_config(args.run).get("summarize", {})
    args.data = args.data or summarized.get("data", "data/demo")
    args.model = args.model or summarized.get("model", "models/tiny")
    args.paradigm = args.paradigm or summarized.get("paradigm", "hierarchical")
    half = args.dtype == "bf16" or (args.dtype == "auto" and device.type == "cuda")
    args.autocast, args.dtype = half and not args.lora_r, "bf16" if half else "fp32"
    args.weight_dtype = torch.bfloat16 if half else torch.float32
    args.pack_tokens = args.pack_tokens or (8192 if device.type == "cuda" else 2048)
    args.pad_to = args.pack_tokens if device.type == "cuda" else 1  # one length, so that kernels are compiled once
    domain, items, splits = trsr.load_dataset(args.data, ("train", "val"))
    train, val = splits["train"], splits["val"]
    summaries = trsr.load_summaries(args.run, items, train + val) if args.paradigm in trsr.SUMMARIZED else {}
    folder = find_model(args.model, args.revision)
    examples_a_user = 1 + len(train[0].negatives)
    if args.batch_size % examples_a_user:
        raise trsr.InputError(f"--batch-size {args.batch_size} is no multiple of a user's {examples_a_user} examples")

    with trsr.locked(args.run, hold=rank == 0):
        unset = ("run", "weight_dtype", "autocast", "pad_to", "save_every")
        settings = {name: value for name, value in vars(args).items() if name not in unset}
        if rank == 0:
            trsr.claim_config(args.run, "train", settings | {"fingerprint": fingerprint(folder)})
        # Full fine-tuning keeps fp32 weights and computes under autocast; an adapter's frozen base can be bf16.
        dtype = torch.bfloat16 if half and args.lora_r else torch.float32
        model = load_model(folder, torch.device("cpu"), dtype)
        torch.manual_seed(args.seed)
        if args.lora_r:
            apply_lora(model, lora_config(args))
        if world > 1:
            shard(model, device)
        model.to(device).train()
        tokenizer = Tokenizer(folder, model.config.vocab_size)
        answers = trsr.answer_ids(tokenizer.encode, domain)
        context = min(args.max_length, model.config.max_position_embeddings)
        budget = trsr.Budget(context - 1, tokenizer.encode, Counter())  # one token is the answer's
        recommender = trsr.Recommender(args.paradigm, domain, items, summaries, args.history_items, budget)
        parameters = trainable(model)
        if rank == 0:
            n, n_trained = sum(p.numel() for p in model.parameters()), sum(p.numel() for p in parameters.values())
            print(f"data    {args.data}: {len(train)} users to train on, {len(val)} to validate on")
            print(f"model   {args.model}: {n / 1e6:.1f}M parameters, {n_trained / 1e6:.2f}M trained, {args.dtype}")
            print(f"prompt  {args.paradigm}, {args.history_items} recent items, context {context} tokens")
            print(f"steps   {args.epochs} epochs, {args.batch_size} examples a step, on {world} x {device.type}")
        trees = [training_tree(recommender, e, answers) for e in tqdm(train, "tokenize", disable=rank > 0)]
        candidates = [trsr.shuffled_candidates(e) for e in val]
        val_trees = [make_tree(recommender.prompt_ids(e, c)) for e, c in zip(val, candidates, strict=True)]
        val_packs = pack_trees(val_trees, args.pack_tokens, args.pad_to)
        for what, number in budget.trimmed.items() if rank == 0 else ():
            print(f"trimmed to the context of {context} tokens: {number} {what}")
        optimizer = torch.optim.AdamW(
            parameters.values(), lr=args.lr, betas=tuple(args.betas), weight_decay=args.weight_decay
        )
        users = [example.user for example in train]
        fit(
            args, model, optimizer, folder, device, trees, users,
            lambda: validate(model, val, candidates, val_packs, answers, args, device),
        )  # fmt: skip
        if rank == 0:
            print(f"wrote   {args.run / ('adapter' if args.lora_r else 'model')}, {args.run / 'metrics.jsonl'}")
            print(f"next    python evaluate.py --run {args.run}")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    trsr.run_main(main, CheckpointError, AdapterError)
