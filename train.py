"""Fine-tune a language model to answer whether the user takes the candidate (section 4.3): summaries -> RUN/adapter/

    python train.py                                             # the embedded default, after summarize.py
    python train.py --data data/mind --model owner/llama --run runs/mind
    torchrun --nproc_per_node 8 train.py --data data/mind --model owner/llama --run-dir runs/mind       # FSDP2

The loss is the next-token loss over the whole prompt (equation 1), averaged over the tokens of an optimizer step on
all processes, so that 1 and 8 processes train the same model. A user's positive and negative stand in one step
together, so that their common prefix is computed once. The epoch with the best validation recall is kept.
After an interruption the same command goes on from RUN/checkpoint/.
"""

import math
import signal
import time
from collections import Counter
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from tqdm import tqdm

import llama
import trsr
from llama import Llama
from lora import LoRAConfig, apply_lora
from models.hub import find_model, load_model
from models.packs import Pack, Tree, pack_length, pack_trees
from models.tokenizer import Tokenizer
from prepare.dataset import append_jsonl, load_dataset, read_jsonl, write_jsonl
from runfolder.checkpoint import full, load_checkpoint, save_best, save_checkpoint, trainable
from runfolder.command import natural, positive, script_parser
from runfolder.estimate import preflight
from runfolder.processes import ahead, gather, host_workers, join_processes, peak_memory, run_script, share_out
from runfolder.prompts import Prompts, tokenized, user_packs
from runfolder.state import claim_config, fingerprint, load_summaries, locked, read_config

# Settings with which a run may go on in another way than it began.
NOT_KEPT = ("run", "autocast", "pad_to", "save_every", "workers", "shard", "activation_checkpointing", "dry_run")
NOT_KEPT += ("no_compile",)


def parse_arguments():
    """Return the command line's settings; the defaults are the paper's and its authors' code's."""
    parser = script_parser(__doc__)
    flag = parser.add_argument_group("prompt").add_argument
    flag("--paradigm", choices=trsr.PARADIGMS, help="what the prompt tells of the user (without it: the run's summary)")
    flag("--history-items", type=natural, default=3, help="recent items in the prompt")
    flag("--max-length", type=positive, default=2048, help="longest prompt with its answer, in tokens")
    flag = parser.add_argument_group("optimization").add_argument
    flag("--epochs", type=positive, default=8, help="passes over the training users")
    flag("--lr", type=float, default=1e-4, help="learning rate, constant")
    flag("--batch-size", type=positive, default=64, help="examples in an optimizer step, over all processes")
    flag("--betas", type=float, nargs=2, default=(0.9, 0.95), help="AdamW's decay rates")
    flag("--weight-decay", type=float, default=5e-4, help="AdamW's weight decay")
    flag("--max-grad-norm", type=float, default=1.0, help="larger gradients are scaled down to this norm")
    flag("--loss", choices=["prompt", "answer"], default="prompt", help="prompt: equation 1; answer: Yes or No alone")
    flag("--seed", type=natural, default=0, help="of the data's order, the adapter's start and dropout")
    flag = parser.add_argument_group("adapter").add_argument
    flag("--lora-r", type=natural, default=8, help="rank; 0 trains the whole model")
    flag("--lora-alpha", type=float, default=16.0, help="the adapter counts alpha / r")
    flag("--lora-dropout", type=float, default=0.05, help="on the adapter's input")
    flag("--lora-targets", nargs="+", help="linear layers to adapt (without it: all of attention's)")
    flag = parser.add_argument_group("running").add_argument
    flag("--pack-tokens", type=positive, help="tokens in a forward pass (without it: 8192 on GPUs, 4096 on CPUs)")
    help = "processes hold: zero2 a part of gradients and optimizer, zero3 of the weights too, replicate all of them"
    flag("--shard", choices=["zero2", "zero3", "replicate"], default="zero2", help=help)
    flag("--activation-checkpointing", action="store_true", help="less memory, a third more time")
    flag("--dry-run", action="store_true", help="tell what the run will take, and stop")
    flag("--save-every", type=positive, default=50, help="steps between checkpoints; an epoch ends with one too")
    flag("--k", type=positive, nargs="+", default=[3, 5, 10], help="validation recall is summed over these")
    return parser.parse_args()


# ---- Which users make a step


def target_count(tree: Tree, loss: str) -> int:
    """Return how many next-token targets the tree's examples have, counted as if they were apart."""
    n = len(tree.branches)
    return n if loss == "answer" else n * (len(tree.prefix) - 1) + sum(map(len, tree.branches))


def step_batches(n_users: int, users_a_step: int, seed: int, epoch: int) -> list[list[int]]:
    """Return the epoch's steps, a list of users each, in an order that only seed and epoch determine."""
    order = torch.randperm(n_users, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).tolist()
    return [order[i : i + users_a_step] for i in range(0, n_users, users_a_step)]


# ---- Scoring, in validation here and in evaluate.py


def make_recommender(args, config, folder: Path, domain, items, summaries) -> tuple[trsr.Recommender, tuple]:
    """Return what makes the prompts for a model of that configuration, and the token ids of Yes and No."""
    tokenizer = Tokenizer(folder, config.vocab_size)
    context = min(args.max_length, config.max_position_embeddings)
    budget = trsr.Budget(context - 1, tokenizer.encode, Counter())  # one token is the answer's
    answers = trsr.answer_ids(tokenizer.encode, domain)
    return trsr.Recommender(args.paradigm, domain, items, summaries, args.history_items, budget), answers


def validation_recall(model: Llama, examples, candidates, packs: list[Pack], answers, args) -> dict[str, float]:
    """Return the recall at each k; the packs are shared out over the processes, equally many to each for FSDP."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mine = (packs[rank::world] + packs[:1])[: -(-len(packs) // world)]  # scoring one twice does no harm
    with tqdm(total=len(mine), desc="score", unit="pack", leave=False, disable=rank > 0) as bar:
        parts = gather(llama.score_packs(model, mine, answers, lambda _: bar.update()))
    scores = {key: value for part in reversed(parts) for key, value in part.items()}
    _, ranks = trsr.rank_users(examples, candidates, scores)
    return {name: float(v.mean()) for name, v in trsr.metrics_at(ranks, args.k).items() if "Recall" in name}


# ---- One optimizer step: FSDP2 where torchrun started several processes, nothing of it otherwise


def shard(model: Llama, device: torch.device, mode: str) -> None:
    """Shard parameters, gradients and optimizer state over the processes, layer by layer (FSDP2).

    zero2: every process has the frozen weights whole, so that these are never gathered; only what is trained is
    sharded. zero3: all weights are, and a layer's are gathered for as long as it is computed.
    """
    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    whole = {p for p in model.parameters() if not p.requires_grad} if mode == "zero2" else set()
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=mode == "zero3", ignored_params=whole)
    fully_shard(model, mesh=mesh, reshard_after_forward=False, ignored_params=whole)
    register_fsdp_forward_method(model, "loss")


def sum_gradients(model: Llama) -> None:
    """Make every process's gradients the sum over all, in one message."""
    parameters = list(trainable(model).values())
    flat = torch.cat([p.grad.flatten() for p in parameters])
    dist.all_reduce(flat)
    for parameter, grad in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = grad.view_as(parameter)


def reduced(value: float, device: torch.device, op: dist.ReduceOp = dist.ReduceOp.SUM) -> float:
    """Return value reduced over the processes."""
    if not dist.is_initialized():
        return value
    tensor = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, op)
    return tensor.item()


def train_step(model: Llama, optimizer, packs: list[Pack], count: int, args, device) -> tuple[float, float]:
    """Update the model on this process's packs; return (loss, gradient norm) of the whole step on all processes.

    count: the targets of the whole step, over which the loss is averaged; 0 means that these packs do not count.
    Raises FloatingPointError before the update where loss or gradient are not finite.
    """
    sharded = isinstance(model, FSDPModule)
    rounds = int(reduced(len(packs), device, dist.ReduceOp.MAX)) if sharded else len(packs)
    world = dist.get_world_size() if dist.is_initialized() else 1
    loss = torch.zeros((), device=device)
    for i in range(rounds):
        # FSDP's processes must run equally often: one that has fewer packs repeats its last without weight.
        weight = 1 / count if count and i < len(packs) else 0.0
        if sharded:  # reduce gradients and drop the gathered weights once a step, at its end
            model.set_requires_gradient_sync(i == rounds - 1)
            model.set_reshard_after_backward(i == rounds - 1 or args.shard == "zero3")
        with torch.autocast(device.type, torch.bfloat16, enabled=args.autocast):
            part = model.loss(packs[min(i, len(packs) - 1)].to(device)) * weight
        (part * (world if sharded else 1)).backward()  # FSDP averages gradients; count is that of all processes
        loss += part.detach()
    if world > 1 and not sharded:
        sum_gradients(model)
    loss = reduced(loss.item(), device)
    norm = full(torch.nn.utils.clip_grad_norm_(trainable(model).values(), args.max_grad_norm)).item()
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise FloatingPointError(f"loss {loss}, gradient norm {norm}")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss, norm


# ---- The run


def step_packs(trees: list[Tree], batch: list[int], rank: int, world: int, args) -> tuple:
    """Return (users of the step, this process's packs, tokens of the step, targets of the step).

    The targets are 0 where the process has no share of the step: then its packs are another's and do not count.
    """
    together = [trees[u] for u in batch]
    mine = [together[i] for i in share_out([tree.size for tree in together], world)[rank]]
    held = mine or together[:1]
    length = pack_length(held, args.pack_tokens) if args.pad_to > 1 else args.pack_tokens
    packs = pack_trees(held, length, min(length, args.pad_to), args.loss == "answer")
    count = sum(target_count(tree, args.loss) for tree in together) if mine else 0
    return batch, packs, sum(tree.size for tree in together), count


def fit(args, model, optimizer, folder, device, trees: list[Tree], users: list[str], recall_of) -> None:
    """Train for args.epochs, a line in metrics.jsonl a step, and keep the epoch with the best sum of recall_of()."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    start = {"step": 0, "epoch": 0, "batch": 0, "best": -1.0}
    progress = load_checkpoint(args.run, model, optimizer, device, show=rank == 0) or start
    metrics = args.run / "metrics.jsonl"
    if rank == 0:
        lines = [r for _, r in read_jsonl(metrics, {"step": int, "epoch": int}, torn=True)] if metrics.is_file() else []
        lines = [r for r in lines if r["step"] <= progress["step"]]  # what came after the checkpoint is done again
        lines = [r for r in lines if "validation" not in r or r["epoch"] <= progress["epoch"]]
        write_jsonl(metrics, lines)
    interrupts, speeds = [], []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _frame: interrupts.append(number))
    users_a_step = args.batch_size // len(trees[0].branches)
    steps = args.epochs * -(-len(trees) // users_a_step)

    def log(**record) -> None:
        if rank == 0:
            append_jsonl(metrics, {"step": progress["step"], "epoch": epoch + 1} | record)

    with tqdm(total=steps, initial=progress["step"], unit="step", disable=rank > 0) as bar:
        for epoch in range(progress["epoch"], args.epochs):
            batches = step_batches(len(trees), users_a_step, args.seed, epoch)[progress["batch"] :]
            for batch, packs, size, count in ahead(step_packs(trees, batch, rank, world, args) for batch in batches):
                began = time.perf_counter()
                # Dropout is a matter of the step alone, so that a resumed run has the same.
                torch.manual_seed((args.seed * 1_000_003 + progress["step"]) * 4096 + rank)
                try:
                    loss, norm = train_step(model, optimizer, packs, count, args, device)
                except torch.OutOfMemoryError:
                    way = "lower --pack-tokens, or add --activation-checkpointing"
                    what = f"a pack of {len(packs[0].ids)} tokens, {len(packs)} of them in a batch of {args.batch_size}"
                    raise trsr.InputError(f"out of memory with {what}; {way}") from None
                except FloatingPointError as error:
                    who = ", ".join(users[u] for u in batch)
                    way = f"lower --lr, or look at the data of its users: {who}"
                    raise trsr.InputError(f"step {progress['step'] + 1}: {error}; {way}") from None
                progress |= {"step": progress["step"] + 1, "batch": progress["batch"] + 1}
                speed = size / (time.perf_counter() - began)
                log(loss=loss, grad_norm=norm, lr=args.lr, tokens_per_second=speed)
                shown = f"epoch {epoch + 1}, loss {loss:.4f}, lr {args.lr:g}, {speed:.0f} tokens/s, "
                bar.set_postfix_str(shown + peak_memory(device))
                bar.update()
                speeds.append(speed)
                if len(speeds) == 10 and rank == 0:
                    minutes = sum(tree.size for tree in trees) / median(speeds) / 60
                    bar.write(f"after ten steps {median(speeds):.0f} tokens/s, so {minutes:.1f} minutes an epoch")
                stop = reduced(len(interrupts), device, dist.ReduceOp.MAX)
                if stop or progress["step"] % args.save_every == 0:
                    save_checkpoint(args.run, model, optimizer, progress, rank)
                if stop:
                    raise trsr.InputError(f"stopped after step {progress['step']}; the same command goes on from there")
            recall = recall_of()
            best = sum(recall.values()) > progress["best"]
            progress |= {"epoch": epoch + 1, "batch": 0, "best": max(progress["best"], sum(recall.values()))}
            log(validation=recall)
            if best:
                save_best(args.run, model, folder, args, rank)
            save_checkpoint(args.run, model, optimizer, progress, rank)
            values = ", ".join(f"{name} {value:.4f}" for name, value in recall.items())
            if rank == 0:
                bar.write(f"epoch {epoch + 1}: validation {values}{', best so far' if best else ''}")


def main() -> None:
    """Train on the dataset's training users."""
    args = parse_arguments()
    rank, world, device = join_processes()
    summarized = read_config(args.run).get("summarize", {})
    args.data = args.data or summarized.get("data", "data/demo")
    args.model = args.model or summarized.get("model", "models/tiny")
    args.paradigm = args.paradigm or summarized.get("paradigm", "hierarchical")
    half = args.dtype == "bf16" or (args.dtype == "auto" and device.type == "cuda")
    args.dtype, args.autocast = "bf16" if half else "fp32", half and not args.lora_r
    args.pack_tokens = args.pack_tokens or (8192 if device.type == "cuda" else 4096)
    args.pad_to = args.pack_tokens if device.type == "cuda" else 1  # one length, so that kernels are compiled once
    args.workers = host_workers(device)
    domain, items, splits = load_dataset(args.data, ("train", "val"))
    train, val = splits["train"], splits["val"]
    summaries = load_summaries(args.run, items, train + val) if args.paradigm in trsr.SUMMARIZED else {}
    folder = find_model(args.model, args.revision)
    if not args.lora_r and folder.resolve() == (args.run / "model").resolve():
        raise trsr.InputError(f"{folder}: the trained model would take its place; move it, or choose another --run")
    if args.batch_size % (1 + len(train[0].negatives)):
        raise trsr.InputError(f"--batch-size is no multiple of the {1 + len(train[0].negatives)} examples of a user")
    # Full fine-tuning keeps fp32 weights and computes under autocast; an adapter's frozen base can be bf16.
    model = load_model(folder, torch.device("cpu"), torch.bfloat16 if half and args.lora_r else torch.float32)
    args.lora_targets = args.lora_targets or [name for name, _ in model.model.layers[0].self_attn.named_children()]
    settings = {f: v for f, v in vars(args).items() if f not in NOT_KEPT}
    args.lora = LoRAConfig(args.lora_r, args.lora_alpha, args.lora_dropout, tuple(args.lora_targets))
    torch.manual_seed(args.seed)
    if device.type == "cpu":  # or threads add up the gradients of a pack's rows in the order in which they come
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    if args.lora_r:
        apply_lora(model, args.lora)
    recommender, answers = make_recommender(args, model.config, folder, domain, items, summaries)
    with locked(args.run, hold=rank == 0):
        if rank == 0:
            started = any((args.run / name).is_dir() for name in ("checkpoint", "adapter", "model"))
            settings["fingerprint"] = fingerprint(folder)
            settings["content"] = trsr.content_hash([items, summaries, [vars(e) for e in train + val]])
            if not args.dry_run:
                claim_config(args.run, "train", settings, started)
            n, n_trained = (sum(p.numel() for p in ps) for ps in (model.parameters(), trainable(model).values()))
            print(f"data    {args.data}: {len(train)} users to train on, {len(val)} to validate on")
            print(f"model   {args.model}: {n / 1e6:.1f}M parameters, {n_trained / 1e6:.2f}M trained, {args.dtype}")
            print(f"prompt  {args.paradigm}, {args.history_items} recent items, {recommender.budget.tokens} tokens")
            print(f"steps   {args.epochs} epochs, {args.batch_size} examples a step, on {world} x {device.type}")
        users = [(example, [example.positive, *example.negatives]) for example in train]
        trees = list(tokenized(Prompts(recommender, users, answers), args, show=rank == 0))
        candidates = [trsr.shuffled_candidates(example) for example in val]
        val_packs = list(user_packs(recommender, val, candidates, range(len(val)), args, show=rank == 0))
        for what, number in recommender.budget.trimmed.items() if rank == 0 else ():
            print(f"trimmed to the context: {number} {what}")
        if rank == 0:
            preflight(model, args, trees, world, device)
        if args.dry_run:
            return
        if world > 1 and args.shard != "replicate":
            shard(model, device, args.shard)
        model.to(device)
        if device.type == "cuda" and not args.no_compile:
            llama.compile_layers(model)
        model.model.checkpointing = args.activation_checkpointing
        options = {"lr": args.lr, "betas": tuple(args.betas), "weight_decay": args.weight_decay}
        optimizer = torch.optim.AdamW(trainable(model).values(), **options)

        def recall_of() -> dict[str, float]:
            model.eval()
            with torch.autocast(device.type, torch.bfloat16, enabled=args.autocast):
                recall = validation_recall(model, val, candidates, val_packs, answers, args)
            model.train()
            for module in model.modules():  # without a backward pass nothing else drops the gathered weights
                if isinstance(module, FSDPModule):
                    module.reshard()
            return recall

        model.train()
        fit(args, model, optimizer, folder, device, trees, [example.user for example in train], recall_of)
        if rank == 0:
            print(f"wrote   {args.run / ('adapter' if args.lora_r else 'model')}; peak {peak_memory(device)}")
            print(f"next    python evaluate.py --run {args.run}")


if __name__ == "__main__":
    run_script(main)
