"""Analyses computed in NumPy and float64, and tiny models of all families over bytes."""

import dataclasses

import jax
import numpy as np
from tiny_families import CONFIGS, params_of

from robust_ft.analysis import examples
from robust_ft.models.model import Model
from robust_ft.objectives import CrossEntropy
from robust_ft.predictor import Predictor
from robust_ft.trainable import flatten
from robust_ft.vocabulary import ByteVocabulary

VOCABULARY = ByteVocabulary(extra_ids=0)


def of_family(family, *peft):
    """Returns a tiny model of a family over bytes."""
    config = dataclasses.replace(CONFIGS[family], vocab_size=264)
    return Model(config, peft, separator_id=1 if config.decoder_only else None)


def predictor(model, seed=0):
    return Predictor(model, params_of(model, seed), VOCABULARY)


def log_probs(predictor, batch):
    # Jitted: op by op it would compile each of them.
    logits = np.asarray(jax.jit(predictor.model.logits)(predictor.params, batch), np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def batch_of(evaluation, predictor, rows=6):
    inputs = examples.read(evaluation)
    targets = examples.targets(inputs)
    (batch,) = examples.batches(evaluation, inputs, targets, predictor, rows)
    return batch


def drift_of(evaluation, model, pretrained):
    """Returns KL(pretrained || model) in nats a target token, on a task of six examples."""
    batch = batch_of(evaluation, model)
    p, q = log_probs(pretrained, batch), log_probs(model, batch)
    weights = np.asarray(batch["decoder_loss_weights"])
    kl = (np.exp(p) * (p - q)).sum(-1)
    return (kl * weights).sum() / weights.sum()


def gradients_of(evaluation, model, seed=0):
    """Returns the gradients on a task's own targets and on shuffled ones, {path: array}."""
    inputs = examples.read(evaluation)
    targets = examples.targets(inputs)
    order = np.random.default_rng(seed).permutation(len(targets))
    gradients = []
    for each in (targets, [targets[i] for i in order]):
        (batch,) = examples.batches(evaluation, inputs, each, model, len(inputs))
        loss = lambda params, batch=batch: CrossEntropy()(model.model, params, batch, None)[0]  # noqa: E731
        gradients.append(flatten(jax.jit(jax.grad(loss))(model.params)))
    return gradients


def cosine_of(gradients, paths):
    full, form = (
        np.concatenate([np.ravel(np.asarray(g[path], np.float64)) for path in paths])
        for g in gradients
    )
    return full @ form / np.sqrt((full @ full) * (form @ form))
