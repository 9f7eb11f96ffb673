"""The slow, obvious computations that the early-exit forward is checked against: full hidden states, no cache."""

from __future__ import annotations

import math
from operator import attrgetter

import torch

from lm_eval_adainfer.strategies.features import FEATURES

# family -> (blocks, attention in a block, feed-forward output in a block, final norm), by hand
PARTS = {
    "llama": ("model.layers", "self_attn", "mlp", "model.norm"),
    "gptj": ("transformer.h", "attn", "mlp", "transformer.ln_f"),
    "opt": ("model.decoder.layers", "self_attn", "fc2", "model.decoder.final_layer_norm"),
    "gpt2": ("transformer.h", "attn", "mlp", "transformer.ln_f"),
    "gpt_neox": ("gpt_neox.layers", "attention", "mlp", "gpt_neox.final_layer_norm"),
    "falcon": ("transformer.h", "self_attention", "mlp", "transformer.ln_f"),
    "bloom": ("transformer.h", "self_attention", "mlp", "transformer.ln_f"),
    "mixtral": ("model.layers", "self_attn", "mlp", "model.norm"),
}


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


def run_of_equals(values):
    """How many of the last values are the last one, without a break."""
    run = 1
    while run < len(values) and values[-1 - run] == values[-1]:
        run += 1
    return run


def cosine(a, b):
    return (a @ b / (a.norm() * b.norm())).item()


def among(probabilities, tokens):
    """Those of a vocabulary's probabilities that are of these tokens, divided by their sum."""
    picked = [probabilities[token] for token in tokens]
    return [p / sum(picked) for p in picked]


def slow_features(model, family, context, choices=()):
    """Feature -> its value after each of the L blocks, at the last token of ``context`` run alone.

    ``choices`` are the tokens of its choices; none: features among the choices are NaN.
    """
    blocks, attn, mlp, norm = PARTS[family]
    seen = {"attn": [], "mlp": [], "out": [], "in": []}
    handles = []

    def keep(name):
        def hook(module, args, out):
            out = out[0] if isinstance(out, tuple) else out
            seen[name].append(out.reshape(len(context), -1)[-1].clone())

        return hook

    def keep_input(module, args, kwargs):
        x = args[0] if args else kwargs["hidden_states"]
        seen["in"].append(x[0, -1].clone())

    for n, block in enumerate(attrgetter(blocks)(model)):
        handles += [
            getattr(block, attn).register_forward_hook(keep("attn")),
            getattr(block, mlp).register_forward_hook(keep("mlp")),
            block.register_forward_hook(keep("out")),
        ]
        if n == 0:
            handles.append(block.register_forward_pre_hook(keep_input, with_kwargs=True))
    with torch.no_grad():
        model(input_ids=torch.tensor([context]), use_cache=False)
        for handle in handles:
            handle.remove()
        head = [model.get_output_embeddings()(attrgetter(norm)(model)(h)) for h in seen["out"]]
    found = {name: [] for name in FEATURES}
    tokens, best = [], []
    for k, logits in enumerate(head):
        first, second = sorted(logits.float().softmax(-1).tolist(), reverse=True)[:2]
        found["gap"].append(first - second)
        found["top_prob"].append(first)
        p = logits.double().softmax(-1)
        found["entropy"].append((-(p * p.log()).sum() / math.log(len(p))).item())
        tokens.append(logits.argmax().item())
        found["agreement"].append(run_of_equals(tokens))
        found["depth"].append((k + 1) / len(head))
        found["top_prob_change"].append(found["top_prob"][k] - found["top_prob"][k - 1] if k else 0.0)
        if not choices:
            for name in ("choice_gap", "choice_top_prob", "choice_entropy", "choice_agreement"):
                found[name].append(math.nan)
        else:
            shares = among(p.tolist(), choices)
            first, second = sorted(shares, reverse=True)[:2]
            best.append(shares.index(first))
            found["choice_gap"].append(first - second)
            found["choice_top_prob"].append(first)
            found["choice_entropy"].append(-sum(q * math.log(q) for q in shares) / math.log(len(shares)))
            found["choice_agreement"].append(run_of_equals(best))
        found["cos_hidden"].append(cosine(seen["out"][k], seen["out"][k - 1] if k else seen["in"][0]))
        found["cos_attn"].append(cosine(seen["attn"][k], seen["attn"][k - 1]) if k else 0.0)
        found["cos_mlp"].append(cosine(seen["mlp"][k], seen["mlp"][k - 1]) if k else 0.0)
    return found


def read_logits(model, blocks, reader, ids, prompt, k):
    """[len(ids) - prompt + 1, V] logits at the prompt's last token and behind it, read after block k.

    ``reader`` is ``head``, ``copy:W`` or ``sim:W``, as ``docs/readers.md`` defines them, for one row of token ids whose
    first ``prompt`` are the prompt: one plain forward after the other, and hooks that put states in their places.
    """
    kind, _, window = reader.partition(":")
    window, n_blocks = int(window or 1), len(blocks)
    if kind == "head" or k == n_blocks:
        return logits_after_block(model, blocks, ids, k)[prompt - 1 :]
    away = max(0, prompt - window)
    left = states_after_blocks(model, blocks, ids)[k - 1]
    run = list(range(len(ids)))
    if kind == "sim" and away:
        run = [0, *range(away, len(ids))]
    handles = []

    def put(n):
        def hook(module, args, out):
            hidden = (out if isinstance(out, torch.Tensor) else out[0]).clone()
            if n == k:
                hidden[0] = left[run]
            elif kind == "copy":
                hidden[0, :away] = left[:away]
            return hidden if isinstance(out, torch.Tensor) else (hidden, *out[1:])

        return hook

    for n in range(k, n_blocks + 1):
        handles.append(blocks[n - 1].register_forward_hook(put(n)))
    given = {"input_ids": torch.tensor([[ids[t] for t in run]])}
    if kind == "sim":
        given |= {"position_ids": torch.tensor([run]), "attention_mask": torch.ones(1, len(run), dtype=torch.long)}
    with torch.no_grad():
        logits = model(**given, use_cache=False).logits[0]
    for handle in handles:
        handle.remove()
    return logits[-(len(ids) - prompt + 1) :]


def read_score(model, blocks, reader, context, continuation, k, window):
    """:func:`score` under a reader."""
    tokens = (context + continuation)[-(window + 1) :][:-1]
    logits = read_logits(model, blocks, reader, tokens, len(tokens) - len(continuation) + 1, k)
    logprobs, top = logits.log_softmax(-1), logits.argmax(-1).tolist()
    total = sum(logprobs[j, token].item() for j, token in enumerate(continuation))
    return total, top == continuation, top[0] == continuation[0]
