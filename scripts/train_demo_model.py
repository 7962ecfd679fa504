"""Train the demo model: a small Qwen3-VL that answers questions about drawn scenes and finds them by caption.

Two stages: the vision tower alone, with throw-away heads that tell what lies in each row; then everything, on answers
and on matching captions with pictures. The same seed and steps give the same weights on the same machine. A run that
was stopped goes on from its last checkpoint with `--resume`.

    python scripts/train_demo_model.py --outdir train --steps 4400 --decay 1500
"""

import argparse
import random
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, distributed, nn
from torch.nn import functional

from demo_model.batch import KINDS, Step, make_pairs, make_questions, make_tower_batch
from demo_model.checkpoint import SHAPE, export_pair, save_checkpoint
from demo_model.network import collate, look, read, tower_rows
from demo_model.prompt import PromptMaker
from demo_model.vocabulary import train_vocabulary
from lookonce.gguf_type import FILE_TYPES
from lookonce.synthetic.pair import TEXT_TYPES
from lookonce.synthetic.vocabulary import Vocabulary
from parity_reference import make_fresh_network, make_tokenizer

_SCALE = 20.0
_HEAD_SCALE = 12.0

# Of the rate in stage 2: what the text model reads must not change faster than it learns to read, nor the words' own
# embeddings, near which the tower's rows were taught to lie. That is also why these start large: embeddings of the
# usual size (0.02) would be carried anywhere by Adam's first hundred steps.
_TOWER_SHARE = 0.2
_EMBEDDING_SHARE = 0.3
_EMBEDDING_SCALE = 5.0
_CHECKPOINT = "checkpoint.pt"


@dataclass(frozen=True, slots=True)
class Plan:
    """How long and how hard to train.

    Stage 2 keeps its peak rate until the last `decay` steps. Each of its steps asks about `scenes` and compares `pairs`
    of them, but every `match_every`-th matches `matched` scenes and their twins with captions.
    """

    seed: int = 0
    tower_steps: int = 1900
    aligned_steps: int = 300
    crowded_from: int = 1200
    tower_batch: int = 48
    steps: int = 4400
    decay: int = 1500
    warm_up: int = 100
    tower_rate: float = 1e-3
    rate: float = 1e-3
    scenes: int = 8
    pairs: int = 2
    budget: int = 130
    match_every: int = 6
    matched: int = 16
    score_every: int = 400
    save_every: int = 50
    final_rounds: int = 16


# The whole way in little time, to see that it can be gone.
_SMOKE = Plan(
    tower_steps=12,
    aligned_steps=8,
    crowded_from=10,
    tower_batch=16,
    steps=6,
    decay=3,
    warm_up=2,
    scenes=4,
    match_every=2,
    matched=4,
    score_every=4,
    save_every=5,
    final_rounds=1,
)
_PLAN = Plan()


class Heads(nn.Module):  # type: ignore[misc, unused-ignore]  # where torch is not installed
    """Throw-away heads that tell by angle what lies in a row: each class is the direction of its words' embeddings.

    So a row that holds a star lies near the word "star", and attention from a question's word to the rows that it is
    about is a matter of likeness. With directions of their own, a question's words found their rows only after long
    training. Only "none", the first class of each kind, has a direction of its own.
    """

    def __init__(self, encode: Callable[[str], Sequence[int]], width: int) -> None:
        super().__init__()
        self.nones = nn.Parameter(torch.randn(len(KINDS), width))
        self._tokens = [[list(encode(f" {word}")) for word in words] for words in KINDS.values()]

    def forward(self, rows: Tensor, embeddings: Tensor) -> list[Tensor]:
        """Give each kind's logits (rows, classes). `embeddings` are the text model's (tokens, width)."""
        directions = functional.normalize(rows, dim=-1)
        logits = []
        for none, words in zip(self.nones, self._tokens, strict=True):
            classes = torch.stack([none, *(embeddings[tokens].sum(0) for tokens in words)])
            logits.append(_HEAD_SCALE * directions @ functional.normalize(classes, dim=-1).T)
        return logits


class Trainee:
    """The network, its throw-away heads, its prompts, and the optimiser of the stage that it is in."""

    def __init__(self, seed: int, device: str) -> None:
        torch.manual_seed(seed)
        self.vocabulary: Vocabulary = train_vocabulary(SHAPE.text.vocab_size)
        self.network: Any = make_fresh_network(SHAPE, self.vocabulary).to(device).train()
        with torch.no_grad():
            self.embeddings.mul_(_EMBEDDING_SCALE)
        tokenizer = make_tokenizer("qwen3vl", self.vocabulary)
        known: dict[str, list[int]] = {}

        def encode(text: str) -> list[int]:
            if text not in known:
                known[text] = tokenizer(text, add_special_tokens=False)["input_ids"]
            return known[text]

        self.maker = PromptMaker(encode, self.vocabulary.id_of("<|image_pad|>"))
        self.heads = Heads(encode, SHAPE.text.hidden_size).to(device)
        self.device = device
        self.optimizer: Any = None
        self.stage, self.step = 1, 0

    @property
    def embeddings(self) -> Tensor:
        """The text model's token embeddings (tokens, width), which are its LM head too."""
        return torch.as_tensor(self.network.model.language_model.embed_tokens.weight)

    def start_stage(self, stage: int) -> None:
        """Begin a stage with a fresh optimiser."""
        self.stage, self.step = stage, 0
        self._make_optimizer()

    def _make_optimizer(self) -> None:
        groups = [
            {"params": [*self.network.model.visual.parameters()], "share": 1.0 if self.stage == 1 else _TOWER_SHARE},
            {"params": [*self.heads.parameters()], "share": 1.0},
        ]
        if self.stage == 2:
            others = [one for one in self.network.model.language_model.parameters() if one is not self.embeddings]
            groups += [{"params": others, "share": 1.0}, {"params": [self.embeddings], "share": _EMBEDDING_SHARE}]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01, fused=True)

    def save(self, path: Path) -> None:
        """Write a checkpoint, whole or not at all."""
        partial = path.with_suffix(".part")
        state = {
            "stage": self.stage,
            "step": self.step,
            "network": self.network.state_dict(),
            "heads": self.heads.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        torch.save(state, partial)
        partial.replace(path)

    def load(self, path: Path) -> None:
        """Go on where a checkpoint was written."""
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.stage, self.step = state["stage"], state["step"]
        self.network.load_state_dict(state["network"])
        self.heads.load_state_dict(state["heads"])
        self._make_optimizer()
        self.optimizer.load_state_dict(state["optimizer"])

    def weights(self) -> dict[str, NDArray[np.float32]]:
        """Give all weights under transformers' names."""
        state = self.network.state_dict()
        return {name: tensor.detach().float().cpu().contiguous().numpy() for name, tensor in state.items()}

    def learn(self, loss: Tensor, rate: float) -> None:
        """Make one step of the optimiser, on the mean of all workers' gradients."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["share"]
        loss.backward()
        learned = [one for group in self.optimizer.param_groups for one in group["params"] if one.grad is not None]
        if distributed.is_initialized():
            _average([one.grad for one in learned])
        nn.utils.clip_grad_norm_(learned, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def _average(gradients: list[Tensor]) -> None:
    flat = torch.cat([one.reshape(-1) for one in gradients])
    distributed.all_reduce(flat)
    flat /= distributed.get_world_size()
    for one, mean in zip(gradients, flat.split([one.numel() for one in gradients]), strict=True):
        one.copy_(mean.view_as(one))


def _rank() -> int:
    return distributed.get_rank() if distributed.is_initialized() else 0


def _name(plan: Plan, stage: str, step: int) -> str:
    """Name the generator of one step; every worker has scenes of its own."""
    return f"{plan.seed} {stage} {step}" + (f" {_rank()}" if _rank() else "")


def tower_loss(trainee: Trainee, rows: Tensor, labels: Tensor) -> tuple[Tensor, list[float]]:
    """Give the heads' loss over rows, and the share of rows with something in them that each head tells rightly."""
    losses, shares = [], []
    for index, logits in enumerate(trainee.heads(rows, trainee.embeddings.detach())):
        losses.append(functional.cross_entropy(logits, labels[:, index]))
        filled = labels[:, index] > 0
        shares.append((logits.argmax(-1) == labels[:, index])[filled].float().mean().item())
    return torch.stack(losses).sum(), shares


def train_tower(trainee: Trainee, plan: Plan, after_step: Callable[[str], None]) -> None:
    """Stage 1."""
    while trainee.step < plan.tower_steps:
        batch = make_tower_batch(
            random.Random(_name(plan, "tower", trainee.step)),
            plan.tower_batch,
            aligned=trainee.step < plan.aligned_steps,
            crowded=trainee.step >= plan.crowded_from,
        )
        rows, _ = look(trainee.network.model.visual, batch.pixels)
        loss, shares = tower_loss(trainee, rows, torch.from_numpy(batch.labels).to(trainee.device))
        left = 1 - trainee.step / plan.tower_steps
        trainee.learn(loss, plan.tower_rate * min(1.0, (trainee.step + 1) / 50, 4 * left + 0.02))
        trainee.step += 1
        told = " ".join(f"{name} {share:.3f}" for name, share in zip(KINDS, shares, strict=True))
        after_step(f"loss {loss.item():.4f} {told}")


def step_loss(trainee: Trainee, step: Step) -> tuple[Tensor, dict[str, float]]:
    """Give the whole loss of a step of stage 2, and its parts: of questions, of pairs, or of both."""
    rows, stacked = tower_rows(trainee.network.model.visual, step.pictures)
    labels = torch.cat([torch.from_numpy(one) for one in step.labels]).to(trainee.device)
    seeing, _ = tower_loss(trainee, rows, labels)
    loss, parts = 0.2 * seeing, {"seeing": seeing.item()}
    if step.questions:
        answering = answer_loss(trainee, step, rows, stacked)
        loss, parts["answers"] = loss + answering, answering.item()
    if step.captions:
        pictures, captions = vectors(trainee, step, rows, stacked)
        similar = _SCALE * pictures @ captions.T
        pairs = torch.arange(len(similar), device=trainee.device)
        matching = (functional.cross_entropy(similar, pairs) + functional.cross_entropy(similar.T, pairs)) / 2
        loss, parts["matching"] = loss + matching, matching.item()
    return loss, parts


def answer_loss(trainee: Trainee, step: Step, rows: Tensor, stacked: list[Tensor]) -> Tensor:
    """Give the mean loss over the answers' tokens."""
    batch = collate(step.questions, step.counts, trainee.maker.image_token)
    hidden = read(trainee.network.model.language_model, batch, rows, stacked)
    logits = trainee.network.lm_head(hidden[batch.target_places.to(trainee.device)])
    each = functional.cross_entropy(logits, batch.targets.to(trainee.device), reduction="none")
    weights = batch.target_weights.to(trainee.device)
    return (each * weights).sum() / weights.sum()


def vectors(trainee: Trainee, step: Step, rows: Tensor, stacked: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Give the vectors of a step's pictures and captions, each (n, width) of length one."""
    language, image_token = trainee.network.model.language_model, trainee.maker.image_token
    seen = collate(step.seen, step.counts, image_token)
    pictures = read(language, seen, rows, stacked)[seen.lasts.to(trainee.device)]
    # Short captions apart from long ones: less padding.
    order = sorted(range(len(step.captions)), key=lambda place: len(step.captions[place]))
    captions = torch.empty_like(pictures)
    for places in (order[: len(order) // 2], order[len(order) // 2 :]):
        told = collate([step.captions[place] for place in places], [], image_token)
        states = read(language, told, None, [])[told.lasts.to(trainee.device)]
        captions = captions.index_copy(0, torch.tensor(places, device=trainee.device), states)
    return functional.normalize(pictures, dim=-1), functional.normalize(captions, dim=-1)


def train_all(trainee: Trainee, plan: Plan, after_step: Callable[[str], None]) -> None:
    """Stage 2."""
    while trainee.step < plan.steps:
        rng = random.Random(_name(plan, "all", trainee.step))
        if trainee.step % plan.match_every:
            step = make_questions(rng, trainee.maker, scenes=plan.scenes, pairs=plan.pairs, budget=plan.budget)
        else:
            step = make_pairs(rng, trainee.maker, scenes=plan.matched)
        loss, parts = step_loss(trainee, step)
        left = (plan.steps - trainee.step) / plan.decay
        trainee.learn(loss, plan.rate * min(1.0, (trainee.step + 1) / plan.warm_up, left))
        trainee.step += 1
        after_step(" ".join(f"{name} {value:.4f}" for name, value in parts.items()))


def held_out(trainee: Trainee, *, seed: str = "held out", rounds: int = 2) -> str:
    """Score scenes that training never sees: exact answers by task, recall@1 with hard negatives."""
    trainee.network.eval()
    right: dict[str, list[bool]] = defaultdict(list)
    found: list[bool] = []
    for number in range(rounds):
        rng = random.Random(f"{seed} {number}")
        with torch.no_grad():
            _score_answers(trainee, make_questions(rng, trainee.maker, scenes=32, pairs=16, budget=160), right)
            found += _score_pairs(trainee, make_pairs(rng, trainee.maker, scenes=32))
    trainee.network.train()
    everything = [one for task in right.values() for one in task]
    shares = " ".join(f"{task} {sum(one) / len(one):.3f}" for task, one in right.items())
    return f"right {sum(everything) / len(everything):.3f} recall {sum(found) / len(found):.3f} | {shares}"


def _score_answers(trainee: Trainee, step: Step, right: dict[str, list[bool]]) -> None:
    rows, stacked = tower_rows(trainee.network.model.visual, step.pictures)
    batch = collate(step.questions, step.counts, trainee.maker.image_token)
    hidden = read(trainee.network.model.language_model, batch, rows, stacked)
    # The whole answer is right where each of its tokens is the likeliest after those before it.
    told = trainee.network.lm_head(hidden).argmax(-1).reshape(batch.tokens.shape).cpu()
    for index, sequence in enumerate(step.questions):
        for task, start, stop in sequence.questions:
            right[task].append(bool((told[index, start - 1 : stop - 1] == batch.tokens[index, start:stop]).all()))


def _score_pairs(trainee: Trainee, step: Step) -> list[bool]:
    """Give which captions found their picture, and which pictures their caption."""
    pictures, captions = vectors(trainee, step, *tower_rows(trainee.network.model.visual, step.pictures))
    similar = (pictures @ captions.T).cpu()
    pairs = torch.arange(len(similar))
    return [*(similar.argmax(0) == pairs).tolist(), *(similar.argmax(1) == pairs).tolist()]


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--outdir", type=Path, required=True, help="folder for checkpoints and the two files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tower-steps", type=int, default=_PLAN.tower_steps, help="steps of stage 1")
    parser.add_argument("--steps", type=int, default=_PLAN.steps, help="steps of stage 2")
    parser.add_argument("--decay", type=int, default=_PLAN.decay, help="last steps, in which the rate falls to zero")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread, each with scenes of its own")
    parser.add_argument("--type", choices=TEXT_TYPES, default="Q4_K_M", help="type of the text model's file")
    parser.add_argument("--mmproj-type", choices=list(FILE_TYPES), default="Q8_0", help="type of the projector file")
    parser.add_argument("--smoke", action="store_true", help="go the whole way in under two minutes, learning little")
    parser.add_argument("--resume", action="store_true", help="go on from the folder's checkpoint")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """Run the command line."""
    options = _parse(arguments)
    options.outdir.mkdir(parents=True, exist_ok=True)
    if options.workers == 1:
        return _train(options)
    meeting = options.outdir / "meeting"
    meeting.unlink(missing_ok=True)
    torch.multiprocessing.spawn(_work, (options, meeting), nprocs=options.workers)
    return 0


def _work(rank: int, options: argparse.Namespace, meeting: Path) -> None:
    distributed.init_process_group("gloo", init_method=meeting.as_uri(), rank=rank, world_size=options.workers)
    _train(options)
    distributed.destroy_process_group()


def _train(options: argparse.Namespace) -> int:
    torch.set_num_threads(1)
    plan = replace(_PLAN, seed=options.seed, tower_steps=options.tower_steps, steps=options.steps, decay=options.decay)
    if options.smoke:
        plan = replace(_SMOKE, seed=options.seed)
    checkpoint = options.outdir / _CHECKPOINT
    trainee = Trainee(plan.seed, "cuda" if torch.cuda.is_available() else "cpu")
    trainee.start_stage(1)
    if options.resume and checkpoint.exists():
        trainee.load(checkpoint)
    started = time.monotonic()

    def after_step(told: str) -> None:
        chief = _rank() == 0
        if chief and trainee.step % 20 == 0:
            print(f"{time.monotonic() - started:7.0f} s  stage {trainee.stage} step {trainee.step}  {told}", flush=True)
        if chief and trainee.stage == 2 and trainee.step % plan.score_every == 0:
            print(f"{time.monotonic() - started:7.0f} s  held out: {held_out(trainee)}", flush=True)
        if chief and trainee.step % plan.save_every == 0:
            trainee.save(checkpoint)

    if trainee.stage == 1:
        train_tower(trainee, plan, after_step)
        trainee.start_stage(2)
    train_all(trainee, plan, after_step)
    if _rank() == 0:
        trainee.save(checkpoint)
        save_checkpoint(options.outdir, trainee.weights(), trainee.vocabulary)
        files = export_pair(options.outdir, options.outdir, type=options.type, mmproj_type=options.mmproj_type)
        print(*files, sep="\n")
        scores = held_out(trainee, rounds=plan.final_rounds)
        print(f"{time.monotonic() - started:7.0f} s  at the end: {scores}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
