"""Tensors that wait in host memory."""

import torch

from armt_dist.runtime import activation_store
from armt_dist.runtime.activation_store import HostStore, pieces_of


def test_a_tensor_comes_back_whole_whatever_its_pieces(monkeypatch):
    monkeypatch.setattr(activation_store, "PIECE_BYTES", 4 * 7)
    store, kept = HostStore(None), {}
    for layer, shape in enumerate([(2, 5, 3), (1, 7), (4, 0), (3, 14)]):
        # Cut out of a larger one, as the rows of a chunk are.
        x = torch.randn(shape[0], *shape[1:], 2)[..., 0]
        kept[0, layer] = x.clone()
        store.put((0, layer), x)
        x.fill_(torch.nan)
    assert max(len(piece) for stored in store.kept.values() for piece in stored.pieces) == 7
    for key in reversed(kept):
        assert torch.equal(store.take(key), kept[key])
    assert not store.kept and not store.fetched


def test_pieces_are_views_of_a_whole_tensor():
    x = torch.zeros(3, 5)
    for piece in pieces_of(x):
        piece += 1
    assert x.eq(1).all()
