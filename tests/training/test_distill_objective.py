"""The student's objective against dense formulas, where every id of the vocabulary is kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_jax.distill.objective import Distill

VOCAB = 128


@pytest.fixture(scope="module")
def taught(make_batch):
    """A batch with the whole teacher distribution as its targets, and that distribution."""
    batch = make_batch(1)
    shape = batch["tokens"].shape
    logits = 2 * jax.random.normal(jax.random.key(5), (*shape, VOCAB))
    logprobs = jax.nn.log_softmax(logits)
    label = jnp.take_along_axis(logprobs, batch["labels"][..., None], axis=-1)[..., 0]
    ids = jnp.broadcast_to(jnp.arange(VOCAB, dtype=jnp.int32), logits.shape)
    extra = {
        "target_ids": ids,
        "target_weights": jnp.exp(logprobs),
        "teacher_label_logprob": label,
        "teacher_entropy": -(jnp.exp(logprobs) * logprobs).sum(-1),
    }
    return batch | extra, logprobs


def dense(model, params, batch, logprobs, hard_weight):
    hidden = model.hidden(params, batch["tokens"], batch["positions"], batch["segment_ids"])
    student = jax.nn.log_softmax(hidden @ model.output_embedding(params).T)
    mask, teacher = batch["loss_mask"], jnp.exp(logprobs)
    kl = (teacher * (logprobs - student)).sum(-1)
    entropy = -(teacher * logprobs).sum(-1)
    hard = -jnp.take_along_axis(student, batch["labels"][..., None], axis=-1)[..., 0]
    loss = (mask * ((1 - hard_weight) * (kl + entropy) + hard_weight * hard)).sum()
    agree = (student.argmax(-1) == teacher.argmax(-1)).astype(jnp.float32)
    metrics = {
        "loss": loss,
        "kl": (mask * kl).sum(),
        "cross_entropy": (mask * hard).sum(),
        "agreement": (mask * agree).sum(),
        "teacher_cross_entropy": -(mask * batch["teacher_label_logprob"]).sum(),
    }
    return loss, metrics


@pytest.mark.parametrize("hard_weight", [0.0, 0.3])
def test_all_ids_kept_is_dense_distillation(model, params, taught, hard_weight):
    batch, logprobs = taught
    objective = Distill(shards="unused", hard_weight=hard_weight).build(model)
    ours = jax.jit(jax.value_and_grad(lambda p: objective(p, batch, None), has_aux=True))
    theirs = jax.jit(
        jax.value_and_grad(lambda p: dense(model, p, batch, logprobs, hard_weight), has_aux=True)
    )
    (loss, sums), gradient = ours(params)
    (dense_loss, metrics), dense_gradient = theirs(params)
    np.testing.assert_allclose(loss, dense_loss, rtol=1e-5)
    for name, value in metrics.items():
        total, weight = sums[name]
        np.testing.assert_allclose(total, value, rtol=1e-4, err_msg=name)
        assert float(weight) == float(batch["loss_mask"].sum())
    for x, y in zip(jax.tree.leaves(gradient), jax.tree.leaves(dense_gradient), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-4 * float(jnp.abs(y).max() + 1e-3))
