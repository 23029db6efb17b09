"""Slow, obvious forms of what runs in production, for tests and benchmarks to compare with.

Production code never imports this module. Each form follows its equations step by step and shares
no code with the form that it checks; autograd computes its gradients.
"""

import torch


def attend_reference(queries, keys, values, bias):
    """:func:`fairseq_sha.ops.attend` without dropout, for one query at a time."""
    length, heads, width = queries.shape
    bias = bias.expand(heads, length, len(keys))
    mixes = []
    for t in range(length):
        for n in range(heads):
            scores = keys[:, n] @ queries[t, n] / width**0.5 + bias[n, t]
            mixes.append(scores.softmax(0) @ values[:, n])
    return torch.stack(mixes).view(length, heads, -1)


def sparse_mask(pattern, total, heads, stride, summary=0, num_summaries=1):
    """Which keys each query sees in :mod:`fairseq_sha.ops.sparse_attention`, one pair of positions
    after another: bool ``[heads, total, total]``. Patterns are fixed, local, strided and dense."""
    mask = torch.zeros(heads, total, total, dtype=torch.bool)
    for h in range(heads):
        last = stride - h % num_summaries * summary
        for i in range(total):
            for j in range(i + 1):
                mask[h, i, j] = {
                    "fixed": i // stride == j // stride or last - summary <= j % stride < last,
                    "local": i - j < stride,
                    "strided": (i - j) % stride == 0,
                    "dense": True,
                }[pattern]
    return mask


def sparse_attention_reference(queries, keys, values, mask):
    """Attention as in :mod:`fairseq_sha.ops.sparse_attention`, with the scores of all pairs of
    positions; ``mask [heads, K, K]``."""
    scores = torch.einsum("tbnd,kbnd->bntk", queries, keys) / queries.size(-1) ** 0.5
    scores = scores.masked_fill(~mask[:, -len(queries) :], float("-inf"))
    return torch.einsum("bntk,kbnd->tbnd", scores.softmax(-1), values)


def masked_softmax_reference(scores, mask):
    """:func:`fairseq_sha.ops.masked_softmax`."""
    masked = scores.softmax(-1) * mask
    return masked / (masked.sum(-1, keepdim=True) + 1e-8)


def linear_recurrence_reference(a, b, h0):
    """:func:`fairseq_sha.ops.linear_recurrence`, one step after the other."""
    wide = torch.promote_types(b.dtype, torch.float32)
    h, states = h0.to(wide), []
    for a_t, b_t in zip(a.to(wide), b.to(wide)):
        h = a_t * h + b_t
        states.append(h)
    return torch.stack(states).to(b.dtype), h


def sru_reference(u, x, weight, bias, c0, mask=None):
    """:func:`fairseq_sha.ops.sru`, one step after the other."""
    wide = torch.promote_types(u.dtype, torch.float32)
    mask = torch.ones_like(c0) if mask is None else mask
    u, weight, bias, c, mask = (tensor.to(wide) for tensor in (u, weight, bias, c0, mask))
    (v_f, v_r), (b_f, b_r), outputs = weight, bias, []
    for u_t, x_t in zip(u, x.to(wide)):
        u0, u1, u2 = u_t.unbind(1)
        f = torch.sigmoid(u1 + v_f * c + b_f)
        r = torch.sigmoid(u2 + v_r * c + b_r)
        c = u0 + (c - u0) * f
        outputs.append(x_t + (c - x_t) * mask * r)
    return torch.stack(outputs).to(x.dtype), c


def lstm_reference(x, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh):
    """:func:`fairseq_sha.ops.lstm`, one step after the other."""
    h, c, outputs = h0[0], c0[0], []
    for x_t in x:
        gates = weight_ih @ x_t.t() + weight_hh @ h.t() + (bias_ih + bias_hh).unsqueeze(1)
        i, f, g, o = gates.t().chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        outputs.append(h)
    return torch.stack(outputs), h.unsqueeze(0), c.unsqueeze(0)


def mogrifier_lstm_reference(
    x, h0, c0, weight_x, weight_h, bias, rounds=(), mask=None, gates=("capped", 0.0)
):
    """:func:`fairseq_sha.ops.mogrifier_lstm`, one step after the other."""
    input_gate, clip = gates
    wide = torch.promote_types(x.dtype, torch.float32)
    h, c, outputs = h0.to(wide), c0.to(wide), []
    for x_t in x.to(wide):
        y = h if mask is None else h * mask
        for r, (a, b, offset) in enumerate(rounds):
            source = x_t if r % 2 else y
            if a is not None:
                source = source @ a.t().to(wide)
            factor = 2 * torch.sigmoid(source @ b.t().to(wide) + offset)
            if r % 2:
                y = y * factor
            else:
                x_t = x_t * factor
        total = x_t @ weight_x.t().to(wide) + y @ weight_h.t().to(wide) + bias
        j, f, *i, o = total.split(h.size(1), 1)
        f, j = torch.sigmoid(f), torch.tanh(j)
        if input_gate == "coupled":
            i = 1 - f
        elif input_gate == "capped":
            i = torch.minimum(1 - f, torch.sigmoid(i[0]))
        else:
            i = torch.sigmoid(i[0])
        c = f * c + i * j
        h = torch.sigmoid(o) * torch.tanh(c)
        if clip > 0:
            c = c.clamp(-clip, clip)
        outputs.append(h)
    return torch.stack(outputs).to(x.dtype), h, c


def recurrent_highway_reference(from_x, s0, weights, biases, mask=None):
    """:func:`fairseq_sha.ops.recurrent_highway`, one micro-step after the other."""
    wide = torch.promote_types(from_x.dtype, torch.float32)
    s, outputs = s0.to(wide), []
    for from_x_t in from_x.to(wide):
        for d in range(len(weights)):
            dropped = s if mask is None else s * mask
            total = dropped @ weights[d].t().to(wide) + biases[d]
            if d == 0:
                total = total + from_x_t
            h, t = total.chunk(2, 1)
            t = torch.sigmoid(t)
            s = torch.tanh(h) * t + s * (1 - t)
        outputs.append(s)
    return torch.stack(outputs).to(from_x.dtype), s


def min_trust_lamb_reference(w, g, m, v, lr, beta1, beta2, eps, weight_decay, min_trust):
    """A step of :class:`fairseq_sha.optim.min_trust_lamb.MinTrustLAMB` for one tensor: returns the
    new ``w``, ``m`` and ``v``, and the trust ratio."""
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g**2
    update = m / (v.sqrt() + eps) + weight_decay * w
    weight_norm, update_norm = w.norm().clamp(max=10.0), update.norm()
    if weight_norm == 0 or update_norm == 0:
        trust = torch.ones(())
    else:
        trust = weight_norm / update_norm
    trust = trust.clamp(min=min_trust)
    return w - lr * trust * update, m, v, trust


def clipped_adagrad_reference(w, g, total, lr, eps, clip):
    """A step of :class:`fairseq_sha.optim.clipped_adagrad.ClippedAdagrad` for one tensor: returns
    the new ``w`` and ``total``."""
    total = total + g**2
    norm = g.norm()
    scale = clip / norm if 0 < clip < norm else 1.0
    return w - lr * scale * g / (total.sqrt() + eps), total


def layer_norm_lstm_reference(from_input, h0, c0, weight, norm_hidden, norm_cell, eps=1e-5):
    """:func:`fairseq_sha.ops.layer_norm_lstm`, one step after the other."""

    def norm(x, gain, bias):
        centred = x - x.mean(-1, keepdim=True)
        return gain * centred / (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt() + bias

    h, c, outputs = h0, c0, []
    for from_input_t in from_input:
        i, f, g, o = (from_input_t + norm(h @ weight.t(), *norm_hidden)).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * norm(c, *norm_cell).tanh()
        outputs.append(h)
    return torch.stack(outputs), h, c
