"""Dropout masks of published implementations in place of random ones."""

import contextlib


@contextlib.contextmanager
def replay_masks(monkeypatch, masks, family):
    """Have dropout take these masks, in order, and check that all of them are taken.

    Args:
        masks (iterable): of which elements are kept, in a shape that spreads over the dropped
            tensor's, and the rate
        family (str): the module of the model
    """
    left = list(masks)

    def replay(x, p, training=True, shared=()):
        if not training or p == 0:
            return x
        kept, rate = left.pop(0)
        assert abs(rate - p) < 1e-6
        expected = [1 if i in shared else size for i, size in enumerate(x.shape)]
        assert list(kept.shape) == expected
        return x * kept / (1 - rate)

    with monkeypatch.context() as patch:
        for module in ("segment_decoder", family):
            patch.setattr(f"fairseq_sha.models.{module}.dropout", replay)
        yield
    assert not left
