"""The slow, obvious computation that the early-exit forward is checked against: full hidden states, no cache."""

from __future__ import annotations

import torch
from lm_eval.api.instance import Instance


def states_after_blocks(model, blocks, ids):
    """Outputs of every block for one row of token ids, each [S, h], by a plain forward."""
    states, handles = [], []
    for block in blocks:
        handles.append(
            block.register_forward_hook(
                lambda m, a, out: states.append((out if isinstance(out, torch.Tensor) else out[0])[0].clone())
            )
        )
    with torch.no_grad():
        model(input_ids=torch.tensor([ids]), use_cache=False)
    for handle in handles:
        handle.remove()
    return states


def logits_after_block(model, blocks, ids, k):
    """[S, V] logits of block k's output: the model is run with blocks k+1..L replaced by the identity."""
    handles = []
    for block in blocks[k:]:

        def identity(m, args, kwargs, out):
            hidden = args[0] if args else kwargs["hidden_states"]
            return hidden if isinstance(out, torch.Tensor) else (hidden, *out[1:])

        handles.append(block.register_forward_hook(identity, with_kwargs=True))
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    for handle in handles:
        handle.remove()
    return logits


def score(model, blocks, context, continuation, k, window):
    """(log-probability, is_greedy, top1) of a tokenised continuation after block k."""
    tokens = (context + continuation)[-(window + 1) :][:-1]
    logits = logits_after_block(model, blocks, tokens, k)[-len(continuation) :]
    logprobs = logits.log_softmax(-1)
    top = logits.argmax(-1).tolist()
    total = sum(logprobs[j, token].item() for j, token in enumerate(continuation))
    return total, top == continuation, top[0] == continuation[0]


def gap_after_block(model, blocks, context, k):
    """P(top 1) - P(top 2) at the last token of ``context`` after block k."""
    top = logits_after_block(model, blocks, context, k)[-1].softmax(-1).topk(2).values
    return (top[0] - top[1]).item()


def instance(context, continuation, doc_id, task="t", idx=0, kind="loglikelihood"):
    arguments = (context, continuation) if continuation is not None else (context,)
    return Instance(kind, {"id": doc_id}, arguments, idx, (task, doc_id, 1))
