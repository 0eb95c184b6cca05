from types import SimpleNamespace

import pytest
import torch
from torch import nn

from accel_train.training.losses import next_token_cross_entropy

VOCAB = 5


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Embedding(VOCAB, VOCAB)


@pytest.fixture
def pair():
    tokens = torch.randint(VOCAB, (3, 7), generator=torch.Generator().manual_seed(1))
    return tokens[:, :-1], tokens[:, 1:]


def mean_negative_log_likelihood(model, inputs, targets):
    log_probabilities = model(inputs).log_softmax(-1)
    return -log_probabilities.gather(-1, targets.unsqueeze(-1)).mean()


@pytest.mark.parametrize("form", [tuple, list, lambda pair: dict(zip(("inputs", "targets"), pair, strict=True))])
def test_is_the_mean_over_tokens(model, pair, form):
    loss = next_token_cross_entropy(model, form(pair))
    assert loss.shape == ()
    torch.testing.assert_close(loss, mean_negative_log_likelihood(model, *pair))


def test_labels_of_transformers_stand_at_their_tokens_and_are_shifted_here(model, pair):
    tokens = torch.cat((pair[0], pair[1][:, -1:]), dim=1)
    loss = next_token_cross_entropy(model, {"input_ids": tokens, "labels": tokens, "attention_mask": None})
    torch.testing.assert_close(loss, next_token_cross_entropy(model, pair))


def test_targets_of_minus_100_are_left_out(model, pair):
    inputs, targets = pair[0], pair[1].clone()
    targets[1:] = -100
    loss = next_token_cross_entropy(model, (inputs, targets))
    torch.testing.assert_close(loss, mean_negative_log_likelihood(model, inputs[:1], targets[:1]))


def test_reads_logits_from_an_output_object(model, pair):
    loss = next_token_cross_entropy(lambda inputs: SimpleNamespace(logits=model(inputs)), pair)
    assert torch.equal(loss, next_token_cross_entropy(model, pair))


@pytest.mark.parametrize(
    ("batch", "found"),
    [
        ({"text": 1, "label": 2}, "a dictionary with \\['label', 'text'\\]"),
        ((1, 2, 3), "a tuple of 3 items"),
        (torch.zeros(2, 3), "a Tensor"),
    ],
)
def test_another_form_of_batch_is_refused_and_named(model, batch, found):
    with pytest.raises(TypeError, match=f"not {found}; let the dataset"):
        next_token_cross_entropy(model, batch)
