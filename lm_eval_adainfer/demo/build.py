"""Builds the demo model: `python -m lm_eval_adainfer.demo.build --output DIR`, about half an hour on one core.

Generates the data, trains the tokenizer and a small Llama on the `train` documents, prints what each block already
knows of the `test` documents, saves the folder, and fits the paper's SVM (`stoppers/svm.yaml`); `adainfer tune` makes
the other stopper that is shown with it (`stoppers/demo.yaml`). Training is plain next-token prediction at the last
block: no auxiliary loss at intermediate blocks, so what early exit finds there has grown by itself.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import math
import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lm_eval_adainfer import paths
from lm_eval_adainfer.demo import data
from lm_eval_adainfer.structure.private import model_from_config

log = logging.getLogger(__name__)

BOS = "<|endoftext|>"
SHARES = {
    "sentiment": 0.7, "topic": 0.7, "fact": 1.2, "plural": 1.2, "odd_one_out": 1.7,
}  # fmt: skip
"""How often each task is drawn in training; `odd_of_six` never is."""
LENGTHS = {128: 0.7, 256: 0.2, 512: 0.1}
"""Sequence lengths and how often a step uses each: short ones are cheap, long ones teach many shots."""
TOKENS_PER_STEP = 3072
ANSWER, SEPARATOR, REST = 1.0, 0.3, 0.1
REST_KEPT = 0.25
"""The share of the remaining tokens whose loss is computed: the head is a large part of so small a model's work."""


@dataclasses.dataclass
class Budget:
    """What a training run may use: it ends at `steps` or after `minutes`, and the schedule follows the nearer end."""

    steps: int
    minutes: float
    learning_rate: float = 3e-3
    warmup: int = 200

    def __post_init__(self) -> None:
        self.started = time.monotonic()

    def spent(self, step: int) -> float:
        """The share of the budget used before `step`, 1 at its end."""
        return min(1.0, max(step / self.steps, (time.monotonic() - self.started) / (60 * self.minutes)))

    def rate(self, step: int) -> float:
        """Learning rate: a linear start, then half a cosine down to a fiftieth."""
        low = 0.02
        cosine = low + (1 - low) * (1 + math.cos(math.pi * self.spent(step))) / 2
        return self.learning_rate * min(1.0, (step + 1) / self.warmup) * cosine


def train_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of `size` tokens on the `train` documents; it puts BOS first, as Llama's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[BOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )

    def texts() -> Iterator[str]:
        for task in SHARES:
            rows = data.load(task)["train"]
            # Small tasks are repeated, or the words of the large ones would take every merge.
            for _ in range(max(1, 6000 // len(rows))):
                yield from (f"{data.prompt(row['question'])} {row['answer']}\n\n" for row in rows)

    tokenizer.train_from_iterator(texts(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=BOS, pad_token=BOS, model_max_length=1024
    )


def new_model(vocabulary: int, blocks: int = 12, hidden: int = 128) -> LlamaForCausalLM:
    """Make the untrained model, tied embeddings, 12 blocks of 128."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden // 4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    # On this size and without a GPU, plain attention trains twice as fast as the fused one.
    return model_from_config(LlamaForCausalLM, config, "eager")


class Batches:
    """Draws training batches: each sequence is BOS and then shots of one task, cut where the length is reached.

    So a sequence's first example is the zero-shot case, the second has one shot, and so on.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        """Tokenize every `train` document once, with the loss weight of each token."""
        self.rng = random.Random(seed)
        self.examples = {}
        for task in SHARES:
            rows = data.load(task)["train"]
            questions = tokenizer([data.prompt(q) for q in rows["question"]], add_special_tokens=False)["input_ids"]
            answers = tokenizer([f" {a}" for a in rows["answer"]], add_special_tokens=False)["input_ids"]
            end = tokenizer("\n\n", add_special_tokens=False)["input_ids"]
            self.examples[task] = [
                (q + a + end, [REST] * len(q) + [ANSWER] * len(a) + [SEPARATOR] * len(end))
                for q, a in zip(questions, answers, strict=True)
            ]

    def draw(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw `(tokens, weights)`, both `[sequences, length]`."""
        length = self.rng.choices(list(LENGTHS), list(LENGTHS.values()))[0]
        tasks = self.rng.choices(list(SHARES), list(SHARES.values()), k=TOKENS_PER_STEP // length)
        rows = [self._sequence(self.examples[task], length) for task in tasks]
        return torch.tensor([r[0] for r in rows]), torch.tensor([r[1] for r in rows])

    def _sequence(self, examples: list, length: int) -> tuple[list[int], list[float]]:
        tokens, weights = [0], [0.0]
        while len(tokens) < length:
            more_tokens, more_weights = self.rng.choice(examples)
            tokens += more_tokens
            weights += more_weights
        return tokens[:length], weights[:length]


def train(
    model: LlamaForCausalLM, batches: Batches, budget: Budget, checkpoint: Path | None = None, every: int = 500
) -> None:
    """Train in place by next-token prediction, and log the loss on answer tokens."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}], betas=(0.9, 0.98)
    )
    generator = torch.Generator().manual_seed(batches.rng.randrange(2**31))
    model.train()
    mean, tokens_seen, bar = None, 0, tqdm(total=budget.steps, mininterval=10)
    for step in range(budget.steps):
        if budget.spent(step) >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = budget.rate(step)
        tokens, weights = batches.draw()
        wanted = weights[:, 1:].clone()
        # Fewer of the cheap tokens, each counting for more: the same gradient on average.
        rest = wanted == REST
        kept = torch.rand(wanted.shape, generator=generator) < REST_KEPT
        wanted[rest] = REST / REST_KEPT * kept[rest]
        rows, columns = wanted.nonzero(as_tuple=True)
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state
            logits = model.lm_head(hidden[rows, columns]).float()
        losses = torch.nn.functional.cross_entropy(logits, tokens[rows, columns + 1], reduction="none")
        (losses @ wanted[rows, columns] / wanted.sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        answer = losses.detach()[wanted[rows, columns] == ANSWER].mean().item()
        mean = answer if mean is None else 0.98 * mean + 0.02 * answer
        tokens_seen += tokens.numel()
        bar.set_postfix(answer_loss=f"{mean:.3f}", refresh=False)
        bar.update()
        if checkpoint is not None and (step + 1) % every == 0:
            torch.save(model.state_dict(), checkpoint)
    bar.close()
    seconds = time.monotonic() - budget.started
    log.info("%d steps, %d tokens, %.0f s, %.0f tokens/s", bar.n, tokens_seen, seconds, tokens_seen / seconds)


@torch.inference_mode()
def accuracy_per_block(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, task: str, shots: int = 0, limit: int = 320
) -> list[float]:
    """First-token accuracy on the `test` documents after each block, through the final norm and the head."""
    model.eval()
    splits = data.load(task)
    rng = random.Random(shots)
    train_rows = list(splits["train"].select(range(min(1000, len(splits["train"])))))
    right, n = torch.zeros(model.config.num_hidden_layers), 0
    for row in splits["test"].select(range(min(limit, len(splits["test"])))):
        drawn = rng.sample(train_rows, shots)
        text = "".join(f"{data.prompt(r['question'])} {r['answer']}\n\n" for r in drawn) + data.prompt(row["question"])
        gold = tokenizer(f" {row['answer']}", add_special_tokens=False)["input_ids"][0]
        states = model.model(
            **tokenizer(text, return_tensors="pt", return_token_type_ids=False), output_hidden_states=True
        ).hidden_states
        last = torch.stack([state[0, -1] for state in states[1:]])
        # The last of them is already normed.
        last = torch.cat([model.model.norm(last[:-1]), last[-1:]])
        right += (model.lm_head(last).argmax(-1) == gold).float()
        n += 1
    return (right / n).tolist()


def report(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> dict[str, dict[str, list[float]]]:
    """Print and return the accuracy of every task after every block, with 0 and with 3 shots."""
    table: dict[str, dict[str, list[float]]] = {}
    for shots in (0, 3):
        print(f"{shots} shots: first-token accuracy on test documents after block 1..{model.config.num_hidden_layers}")
        for task in data.TASKS:
            accuracies = accuracy_per_block(model, tokenizer, task, shots)
            table.setdefault(f"{shots} shots", {})[task] = [round(a, 3) for a in accuracies]
            print(f"{task:12}", *(f"{a:.2f}" for a in accuracies), flush=True)
    return table


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, table: dict, output: Path) -> None:
    """Write the folder beside `output` in float16, then swap it in: a reader never sees half of it."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as beside:
        new, old = Path(beside) / "new", Path(beside) / "old"
        model.half().save_pretrained(new)
        tokenizer.save_pretrained(new)
        (new / "accuracy.json").write_text(json.dumps(table, indent=1) + "\n")
        if output.exists():
            output.rename(old)
        new.rename(output)
        shutil.rmtree(old, ignore_errors=True)


def fit_stopper(model_dir: Path, recipe: Path, output: Path) -> None:
    """Trace the demo's `train` documents and fit the stopper that ships, as its recipe says."""
    import yaml

    from lm_eval_adainfer.fitting import fit
    from lm_eval_adainfer.harness import model
    from lm_eval_adainfer.registration import install
    from lm_eval_adainfer.strategies import files
    from lm_eval_adainfer.traces import recording

    install()
    from lm_eval.tasks import TaskManager

    steps = yaml.safe_load(recipe.read_text())
    traced, fitted = dict(steps["trace"]), dict(steps["fit"])
    manager = TaskManager(include_path=str(paths.task_configs()), include_defaults=False)
    tasks = manager.load(traced.pop("tasks"))["tasks"]
    lm = model.AdaInferLM(pretrained=str(model_dir), dtype="float32", device="cpu", batch_size=8)
    with tempfile.TemporaryDirectory() as folder:
        recording.trace(lm, tasks, folder, **traced)
        fitted.pop("kind")
        stopper = fit.fit_svm([folder], **fitted)
    stopper.info["model"] = model.DEMO
    files.save(stopper, output)
    log.info("saved %s", output)


def build(output: Path, budget: Budget, seed: int, start: Path | None = None) -> None:
    """Make the demo model and save it to `output`; `start` is a checkpoint to go on from."""
    torch.manual_seed(seed)
    tokenizer = train_tokenizer(2048)
    model = new_model(len(tokenizer))
    if start is not None:
        model.load_state_dict(torch.load(start))
    log.info("%.2fM parameters", model.num_parameters() / 1e6)
    checkpoint = output.parent / f"{output.name}.checkpoint.pt"
    output.parent.mkdir(parents=True, exist_ok=True)
    train(model, Batches(tokenizer, seed), budget, checkpoint)
    # float16 is what ships, so that is what the table is about; computed in float32, as CPUs do it fastest.
    model.half().float()
    save(model, tokenizer, report(model, tokenizer), output)
    checkpoint.unlink(missing_ok=True)
    log.info("saved %s", output)


def main(argv: list[str] | None = None) -> None:
    """Run the build from the command line."""
    parser = argparse.ArgumentParser(prog="python -m lm_eval_adainfer.demo.build", description=__doc__)
    parser.add_argument("--output", type=Path, default=paths.demo_model(), help="folder (default: the package's)")
    parser.add_argument("--minutes", type=float, default=28, help="training time at most")
    parser.add_argument("--steps", type=int, default=100_000, help="training steps at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--start", type=Path, help="a checkpoint to go on from")
    stopper = paths.stoppers() / "svm.stopper"
    parser.add_argument("--stopper", type=Path, default=stopper, help="file of the stopper fitted on the model")
    parser.add_argument("--stopper_only", action="store_true", help="keep the model, fit the stopper again")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(arguments.threads)
    if not arguments.stopper_only:
        build(arguments.output, Budget(arguments.steps, arguments.minutes), arguments.seed, arguments.start)
    fit_stopper(arguments.output, paths.stoppers() / "svm.yaml", arguments.stopper)


if __name__ == "__main__":
    main()
