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
