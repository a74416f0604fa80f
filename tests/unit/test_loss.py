"""The fused head and loss against plain cross entropy on whole logits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import trainer.loss
from trainer.loss import linear_cross_entropy
from trainer.model.kernels.cross_entropy import cross_entropy_


def reference(hidden, weight, targets):
    return F.cross_entropy((hidden @ weight.t()).float(), targets, reduction="sum")


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(0, 40), vocab=st.integers(2, 50), chunk=st.integers(1, 200), seed=st.integers(0, 2**20))
def test_loss_and_both_gradients_equal_plain_cross_entropy(rows, vocab, chunk, seed):
    generator = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(n, 8, generator=generator, dtype=torch.float64).float() for n in (rows, vocab)]
    targets = torch.randint(vocab, (rows,), generator=generator)
    ours, plain = [[t.clone().requires_grad_() for t in inputs] for _ in range(2)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.loss, "LOGITS_PER_CHUNK", chunk)
        loss = linear_cross_entropy(*ours, targets)
        (loss * 0.25).backward()
    expected = reference(*plain, targets)
    (expected * 0.25).backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-4)
    for mine, theirs in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-5)


def test_a_frozen_head_gets_no_gradient_and_evaluation_builds_no_graph():
    hidden, weight = torch.randn(5, 8, requires_grad=True), torch.randn(11, 8)
    targets = torch.arange(5)
    linear_cross_entropy(hidden, weight, targets).backward()
    assert hidden.grad is not None and weight.grad is None
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, weight, targets)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, reference(hidden, weight, targets))


def test_a_tiny_scale_does_not_underflow_in_float16():
    """Dividing by the token count happens in float32: 1e-7 alone is below float16's smallest normal number."""
    hidden = torch.randn(3, 8, dtype=torch.float16, requires_grad=True)
    weight = torch.randn(7, 8, dtype=torch.float16)
    (linear_cross_entropy(hidden, weight, torch.arange(3)) * 1e-4).backward()
    assert (hidden.grad != 0).float().mean() > 0.9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bad", [0, 3, 10])
def test_nan_among_logits_shows_in_its_row_alone(dtype, bad):
    logits = torch.randn(3, 11, dtype=dtype)
    logits[1, bad] = float("nan")
    targets = torch.tensor([0, 5, 10])
    wanted = F.cross_entropy(logits.float(), targets, reduction="none")
    losses = cross_entropy_(logits, targets, True)
    torch.testing.assert_close(losses, wanted, equal_nan=True)
    assert losses.isnan().tolist() == [False, True, False]
    assert logits[1].isnan().all() and logits[::2].isfinite().all()


def test_logits_and_targets_that_are_no_rows_of_their_own_are_refused():
    """The kernel steps from row to row by the vocabulary's size."""
    with pytest.raises(AssertionError):
        cross_entropy_(torch.randn(11, 3).t(), torch.arange(3), True)
    with pytest.raises(AssertionError):
        cross_entropy_(torch.randn(3, 11), torch.arange(6)[::2], True)


@pytest.mark.parametrize("target", [-100, 11])
def test_a_target_beyond_the_vocabulary_is_refused(target):
    with pytest.raises(RuntimeError):
        cross_entropy_(torch.randn(1, 11), torch.tensor([target]), True)
