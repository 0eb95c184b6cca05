import math

import pytest
import torch

from accel_train.config.sections import ModelConfig
from accel_train.model.extraction import ExtractionMode
from accel_train.model.transformer import TransformerLM

BATCH, TIME, HEADS, WIDTH, LAYERS = 2, 7, 2, 16, 3
SINGLE = [ExtractionMode.SCORES, ExtractionMode.WEIGHTS, ExtractionMode.VALUES, ExtractionMode.RESIDUAL]


@pytest.fixture(params=["learned", "rotary"])
def model(request):
    torch.manual_seed(0)
    config = ModelConfig(d_model=WIDTH, n_layers=LAYERS, n_heads=HEADS, max_seq_len=8, positions=request.param)
    return TransformerLM(config, 11)


@pytest.fixture
def tokens():
    return torch.randint(11, (BATCH, TIME), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("mode", [*SINGLE, ExtractionMode.SCORES | ExtractionMode.RESIDUAL, ExtractionMode.ALL])
def test_every_mode_gives_the_same_logits_bit_for_bit(model, tokens, mode):
    assert torch.equal(model(tokens, mode).logits, model(tokens))


def test_none_gives_logits_alone(model, tokens):
    assert isinstance(model(tokens, ExtractionMode.NONE), torch.Tensor)


@pytest.mark.parametrize("mode", SINGLE)
def test_a_mode_gives_what_it_names_and_nothing_else(model, tokens, mode):
    extraction = model(tokens, mode)
    found = {field for field in ("scores", "weights", "values", "residual") if getattr(extraction, field)}
    assert found == {mode.name.lower()}


def test_shapes(model, tokens):
    extraction = model(tokens, ExtractionMode.ALL)
    assert [tuple(t.shape) for t in extraction.scores] == [(BATCH, HEADS, TIME, TIME)] * LAYERS
    assert [tuple(t.shape) for t in extraction.weights] == [(BATCH, HEADS, TIME, TIME)] * LAYERS
    assert [tuple(t.shape) for t in extraction.values] == [(BATCH, HEADS, TIME, WIDTH // HEADS)] * LAYERS
    assert [tuple(t.shape) for t in extraction.residual] == [(BATCH, TIME, WIDTH)] * (LAYERS + 1)


def test_scores_are_masked_above_the_diagonal_only(model, tokens):
    later = torch.ones(TIME, TIME, dtype=torch.bool).triu(1)
    for scores in model(tokens, ExtractionMode.SCORES).scores:
        assert (scores[..., later] == -math.inf).all()
        assert scores[..., ~later].isfinite().all()


def test_weights_are_the_softmax_of_the_scores(model, tokens):
    extraction = model(tokens, ExtractionMode.ALL)
    for scores, weights in zip(extraction.scores, extraction.weights, strict=True):
        assert torch.equal(scores.softmax(-1), weights)


def test_what_is_extracted_explains_the_residual_stream(model, tokens):
    extraction = model(tokens, ExtractionMode.ALL)
    for layer, block in enumerate(model.blocks):
        mixed = (extraction.weights[layer] @ extraction.values[layer]).transpose(1, 2).reshape(BATCH, TIME, WIDTH)
        middle = extraction.residual[layer] + block.attention.output(mixed)
        after = middle + block.feed_forward(block.feed_forward_norm(middle))
        torch.testing.assert_close(after, extraction.residual[layer + 1])


def test_the_last_residual_gives_the_logits(model, tokens):
    extraction = model(tokens, ExtractionMode.RESIDUAL)
    assert torch.equal(model.head(model.final_norm(extraction.residual[-1])), extraction.logits)
