import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accel_train.config.sections import ModelConfig
from accel_train.model.size import count_parameters
from accel_train.model.transformer import TransformerLM

VOCAB = 11
POSITIONS = ("learned", "rotary")


def tiny(seed=0, **changes):
    torch.manual_seed(seed)
    return TransformerLM(
        ModelConfig(**{"d_model": 16, "n_layers": 2, "n_heads": 2, "max_seq_len": 12, **changes}), VOCAB
    )


def some_tokens(batch=3, time=12):
    return torch.randint(VOCAB, (batch, time), generator=torch.Generator().manual_seed(1))


def gpt2_with_the_weights_of(model):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = model.config
    gpt2 = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=model.vocab_size,
            n_positions=config.max_seq_len,
            n_embd=config.d_model,
            n_layer=config.n_layers,
            n_head=config.n_heads,
            n_inner=config.feed_forward_width,
            tie_word_embeddings=config.tie_embeddings,
            bos_token_id=None,
            eos_token_id=None,
        )
    ).eval()
    ours = model.state_dict()
    theirs = {"transformer.wte": "token_embedding", "transformer.wpe": "position_embedding"}
    theirs |= {"transformer.ln_f": "final_norm", "lm_head": "token_embedding" if config.tie_embeddings else "head"}
    state = {
        f"{new}.{kind}": ours[f"{old}.{kind}"]
        for new, old in theirs.items()
        for kind in ("weight", "bias")
        if f"{old}.{kind}" in ours
    }
    parts = {
        "ln_1": "attention_norm",
        "attn.c_attn": "attention.qkv",
        "attn.c_proj": "attention.output",
        "ln_2": "feed_forward_norm",
        "mlp.c_fc": "feed_forward.up",
        "mlp.c_proj": "feed_forward.output",
    }
    for layer in range(config.n_layers):
        for new, old in parts.items():
            weight = ours[f"blocks.{layer}.{old}.weight"]
            # GPT-2 stores its linear layers as (in, out).
            state[f"transformer.h.{layer}.{new}.weight"] = weight.T if weight.dim() == 2 else weight
            state[f"transformer.h.{layer}.{new}.bias"] = ours[f"blocks.{layer}.{old}.bias"]
    gpt2.load_state_dict(state, strict=True)
    return gpt2


@pytest.mark.parametrize("positions", POSITIONS)
def test_logits_have_one_row_per_position(positions):
    assert tiny(positions=positions)(some_tokens(3, 7)).shape == (3, 7, VOCAB)


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": True}, {"d_ff": 24}, {"n_heads": 4}])
def test_computes_what_gpt2_computes(changes):
    model = tiny(**changes).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # Zero biases and unit norms would hide a mix-up.
            parameter.add_(0.3 * torch.randn_like(parameter))
    gpt2 = gpt2_with_the_weights_of(model)
    tokens = some_tokens()
    torch.testing.assert_close(model(tokens), gpt2(tokens).logits, rtol=1e-5, atol=1e-5)
    assert count_parameters(model) == gpt2.num_parameters()


@pytest.mark.parametrize("positions", POSITIONS)
@settings(max_examples=25)
@given(data=st.data())
def test_a_later_token_never_changes_an_earlier_logit(positions, data):
    model = tiny(positions=positions)
    tokens = some_tokens()
    cut = data.draw(st.integers(1, 11))
    changed = tokens.clone()
    changed[:, cut:] = torch.tensor(
        data.draw(st.lists(st.integers(0, VOCAB - 1), min_size=12 - cut, max_size=12 - cut))
    )
    assert torch.equal(model(tokens)[:, :cut], model(changed)[:, :cut])


@pytest.mark.parametrize("positions", POSITIONS)
def test_an_earlier_token_changes_later_logits(positions):
    model, tokens = tiny(positions=positions), some_tokens()
    changed = tokens.clone()
    changed[:, 0] = (tokens[:, 0] + 1) % VOCAB
    assert not torch.allclose(model(tokens)[:, -1], model(changed)[:, -1])


@pytest.mark.parametrize("positions", POSITIONS)
def test_order_matters(positions):
    model, tokens = tiny(positions=positions), some_tokens()
    tokens[:, 0], tokens[:, 1] = 1, 2
    swapped = tokens[:, [1, 0, *range(2, 12)]]
    assert not torch.allclose(model(tokens)[:, -1], model(swapped)[:, -1])


def test_rotary_attention_depends_on_distance_only():
    model = tiny(positions="rotary", n_layers=1)
    attention = model.blocks[0].attention
    from accel_train.model.transformer import _rotate, rotary_angles

    query, key = torch.randn(2, 1, 8).unbind(0)
    assert attention.n_heads * 8 == 16

    def score(query_at, key_at):
        rotated_query = _rotate(query, *rotary_angles(query_at, query_at + 1, 8, query))
        return (rotated_query @ _rotate(key, *rotary_angles(key_at, key_at + 1, 8, key)).T).item()

    assert score(5, 3) == pytest.approx(score(11, 9), abs=1e-5)
    assert score(5, 3) != pytest.approx(score(5, 4), abs=1e-3)


def test_the_same_seed_gives_the_same_weights():
    first, second, other = tiny(0).state_dict(), tiny(0).state_dict(), tiny(1).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


def test_initial_weights_are_those_of_gpt2():
    state = tiny(d_model=128, n_layers=8, n_heads=4).state_dict()
    for name, weight in state.items():
        if name.endswith("bias"):
            assert not weight.any(), name
        elif "norm" in name:
            assert torch.equal(weight, torch.ones_like(weight)), name
        else:
            expected = 0.02 / math.sqrt(16) if ".output." in name else 0.02
            assert weight.std().item() == pytest.approx(expected, rel=0.1), name


def test_an_untrained_model_is_near_the_uniform_distribution():
    model, tokens = tiny(), some_tokens()
    loss = torch.nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    assert loss.item() == pytest.approx(math.log(VOCAB), abs=0.1)


def test_tied_weights_are_one_parameter():
    assert count_parameters(tiny()) - count_parameters(tiny(tie_embeddings=True)) == VOCAB * 16
    assert "head.weight" not in tiny(tie_embeddings=True).state_dict()


@pytest.mark.parametrize("changes", [{}, {"positions": "rotary"}, {"tie_embeddings": True}])
def test_every_parameter_gets_a_gradient_without_buffers(changes):
    model = tiny(**changes)
    model(some_tokens()).logsumexp(-1).sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    assert list(model.buffers()) == []


def test_dropout_acts_in_training_only():
    model, tokens = tiny(dropout=0.5), some_tokens()
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


@pytest.mark.parametrize("positions", POSITIONS)
def test_too_many_tokens_are_refused(positions):
    with pytest.raises(ValueError, match="13 tokens do not fit into the context of 12"):
        tiny(positions=positions)(some_tokens(1, 13))


@pytest.mark.parametrize("positions", POSITIONS)
def test_is_one_graph_for_the_compiler(positions):
    """Of any length: from the second on the compiler takes it for a variable."""
    torch.compiler.reset()
    model = tiny(positions=positions)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for length in (12, 7, 9, 1):
        tokens = some_tokens(2, length)
        assert torch.equal(compiled(tokens), model(tokens))


@pytest.mark.parametrize("positions", POSITIONS)
def test_runs_under_autocast(positions):
    model, tokens = tiny(positions=positions), some_tokens()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(tokens)
    torch.testing.assert_close(logits.float(), model(tokens), rtol=0.1, atol=0.02)


class TestCache:
    @pytest.mark.parametrize("positions", POSITIONS)
    @pytest.mark.parametrize("prompt_length", [1, 5, 12])
    def test_gives_the_logits_of_the_whole_sequence(self, positions, prompt_length):
        model, tokens = tiny(positions=positions).double().eval(), some_tokens()
        whole = model(tokens)
        cache = model.new_cache(3, 12)
        logits = [model.extend(tokens[:, :prompt_length], cache)]
        logits += [model.extend(tokens[:, i : i + 1], cache) for i in range(prompt_length, 12)]
        torch.testing.assert_close(torch.stack(logits, dim=1), whole[:, prompt_length - 1 :])

    def test_ends_with_the_context(self):
        model = tiny()
        cache = model.new_cache(3, 12)
        model.extend(some_tokens(), cache)
        with pytest.raises(ValueError, match="13 tokens"):
            model.extend(some_tokens(3, 1), cache)

    def test_takes_one_token_at_a_time_once_in_use(self):
        model = tiny()
        cache = model.new_cache(3, 12)
        model.extend(some_tokens(3, 2), cache)
        with pytest.raises(ValueError, match="one token at a time"):
            model.extend(some_tokens(3, 2), cache)
