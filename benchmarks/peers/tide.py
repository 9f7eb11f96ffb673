"""TIDE (``tide-inference`` 0.2.1): small networks after every fourth block say which tokens are finished.

    pip install tide-inference==0.2.1
    python -m benchmarks.peers.tide

TIDE has no lm-eval model; its runtime's forward is put in the place of the model's. Settings are ``TIDEConfig``'s
defaults (threshold 0.85, not before block 8). Its networks are fitted on prompts of training documents; ``--texts
wikitext`` takes what it recommends, 2,000 texts of WikiText-103, and needs the network. (Where it can't read its texts
it falls back to one sentence over and over; that is refused here.)

With transformers 5 the last of the hidden states that TIDE reads is behind the final norm, which TIDE applies again,
and its labels compare states before the norm with states behind it. ``--before_norm`` gives it the state that its
comments describe ("after last layer, before norm").
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

from benchmarks.peers import measuring


class TideLM(HFLM):
    """Stock ``hf`` with the forward of a TIDE runtime."""

    def __init__(self, engine: Any, **given: Any):
        super().__init__(**given)
        self.engine, self.left, self.seen = engine, 0, 0

    def _model_call(self, inps: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        logits = self.engine(inps)
        self.left += self.engine.last_stats.total_exited
        self.seen += self.engine.last_stats.total_tokens
        return logits

    def said(self) -> str:
        """What TIDE's own statistics say."""
        return f"{self.left / max(self.seen, 1):.1%} of the tokens leave early"


class BeforeNorm:
    """While it is entered, the last hidden state that the model returns is its last block's output."""

    def __init__(self, model: Any):
        self.model = model

    def __enter__(self) -> None:
        last: list[torch.Tensor] = []

        def keep(module: torch.nn.Module, given: tuple, out: torch.Tensor | tuple) -> None:
            last[:] = [out if isinstance(out, torch.Tensor) else out[0]]

        def replace(module: torch.nn.Module, given: tuple, out: Any) -> None:
            if out.hidden_states is not None:
                out.hidden_states = (*out.hidden_states[:-1], last[0])

        self.hooks = [self.model.model.layers[-1].register_forward_hook(keep),
                      self.model.register_forward_hook(replace)]  # fmt: skip

    def __exit__(self, *_: Any) -> None:
        for hook in self.hooks:
            hook.remove()


def maker(texts: str | None, before_norm: bool):
    def make(loaded: measuring.Loaded) -> TideLM:
        import TIDE
        from datasets import load_dataset

        torch.manual_seed(0)
        if before_norm:
            BeforeNorm(loaded.model).__enter__()  # for as long as this process lives; stock hf reads no hidden states
        with tempfile.TemporaryDirectory() as place:
            lines = [json.dumps({"text": prompt}) for prompt in loaded.prompts]
            Path(place, "train.jsonl").write_text("\n".join(lines) + "\n")
            if texts is None:
                next(iter(load_dataset(place, split="train", streaming=True)))
            config = TIDE.TIDEConfig(calibration_dataset=texts or place)
            router = Path(place, "router.pt")
            if loaded.tokenizer.pad_token is None:
                loaded.tokenizer.pad_token = loaded.tokenizer.eos_token
            TIDE.calibrate(loaded.model, loaded.tokenizer, config=config, save_path=str(router))
            engine = TIDE.TIDE(loaded.model, router_path=str(router), config=config)
        return TideLM(engine, **loaded.given)

    return make


if __name__ == "__main__":
    parser = measuring.parser("python -m benchmarks.peers.tide", __doc__)
    parser.add_argument("--texts", help="a data set with a column text (default: prompts of training documents)")
    parser.add_argument("--before_norm", action="store_true", help="give it the hidden state that it expects")
    options = parser.parse_args()
    name = "TIDE, given the state before the norm" if options.before_norm else "TIDE"
    measuring.main(name, maker(options.texts, options.before_norm), options)
