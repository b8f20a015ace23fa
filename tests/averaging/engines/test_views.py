"""Flat views follow the storage that their tensors have now."""

from __future__ import annotations

import pytest
import torch

from swaft.averaging.engines.replicated import FlatViews

pytestmark = pytest.mark.unit


def test_the_list_is_the_same_one_while_no_storage_has_moved():
    tensors = [torch.rand(2, 3), torch.rand(4)]
    views = FlatViews(lambda: tensors)
    first = views()
    tensors[0].fill_(7.0)
    assert views() is first
    assert torch.equal(first[0], torch.full((6,), 7.0))


def test_a_tensor_with_other_storage_is_viewed_anew():
    tensors = [torch.zeros(2, 3), torch.zeros(4)]
    views = FlatViews(lambda: tensors)
    first = views()
    tensors[1].data = torch.ones(4)
    assert views() is not first
    assert torch.equal(views()[1], torch.ones(4))
    assert torch.equal(first[1], torch.zeros(4))


def test_one_tensor_may_be_cut_into_several_views():
    tensors = [torch.arange(6.0), torch.arange(2.0)]
    views = FlatViews(lambda: tensors, numels=[[1, 5], [2]])
    assert [view.tolist() for view in views()] == [[0.0], [1.0, 2.0, 3.0, 4.0, 5.0], [0.0, 1.0]]


def test_views_want_no_gradient():
    parameter = torch.nn.Parameter(torch.ones(2, 2))
    assert not FlatViews(lambda: [parameter])()[0].requires_grad
