from functools import partial

import pytest
import torch
from torch import nn

from accel_train.config.sections import ModelConfig
from accel_train.errors import Interrupted
from accel_train.model import generation, transformer
from accel_train.model.generation import (
    _cumulative,
    _sample,
    _Sampling,
    _UncachedLogits,
    default_batch,
    generate,
    keep_recordings,
    stream,
)
from accel_train.model.transformer import TransformerLM

VOCAB, CONTEXT = 11, 12
CPU = torch.device("cpu")


@pytest.fixture
def as_on_gpu(monkeypatch):
    """Sums of probabilities are taken as on a GPU."""
    monkeypatch.setattr(generation, "_is_on_cpu", lambda _: False)


def test_sums_of_probabilities_on_a_gpu_are_those_of_a_cpu(as_on_gpu):
    probability = torch.rand(5, 1000, dtype=torch.float64, generator=seeded()).softmax(dim=-1)
    sums = _cumulative(probability)
    torch.testing.assert_close(sums, probability.cumsum(dim=-1), atol=1e-12, rtol=0)
    assert torch.equal(sums, sums.cummax(dim=-1).values)
    assert torch.equal(_cumulative(probability.flip(-1))[:, -1], sums[:, -1]), "exact in any order"


@pytest.mark.parametrize("top_p", [None, 0.3, 0.9])
def test_samples_on_a_gpu_are_those_of_a_cpu(top_p, request):
    model, prompts = tiny(), some_prompts(num=50)
    sampled = partial(generate, model, prompts, 3 * CONTEXT, temperature=1.0, top_p=top_p)
    expected = sampled(generator=seeded())
    request.getfixturevalue("as_on_gpu")
    assert torch.equal(sampled(generator=seeded()), expected)


def tiny(positions="learned", dropout=0.0):
    torch.manual_seed(0)
    config = ModelConfig(d_model=16, n_layers=2, n_heads=2, max_seq_len=CONTEXT, positions=positions, dropout=dropout)
    model = TransformerLM(config, VOCAB).double()
    with torch.no_grad():
        for parameter in model.parameters():  # Far from uniform, so that outputs differ between prompts.
            parameter.mul_(8)
    return model


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def some_prompts(num=6, length=3):
    return torch.randint(VOCAB, (num, length), generator=seeded(1))


class CacheFree(nn.Module):
    """A model that offers nothing but a forward pass and its context."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, tokens):
        return self.model(tokens)


class Bigram(nn.Module):
    """Logits of the next token from the last one alone."""

    def __init__(self, table):
        super().__init__()
        self.table = nn.Parameter(table)

    def forward(self, tokens):
        return self.table[tokens]


class TestGreedy:
    @pytest.mark.parametrize("positions", ["learned", "rotary"])
    @pytest.mark.parametrize("length", [CONTEXT, CONTEXT + 1, 3 * CONTEXT])
    def test_cached_and_cache_free_outputs_agree(self, positions, length):
        model, prompts = tiny(positions), some_prompts()
        assert len(prompts) * model.config.n_heads < transformer._MANY_SINGLE_QUERIES
        cached, plain = generate(model, prompts, length), generate(CacheFree(model), prompts, length)
        assert len(torch.unique(cached, dim=0)) > 3
        assert torch.equal(cached, plain)

    @pytest.mark.parametrize("positions", ["learned", "rotary"])
    def test_so_do_those_of_many_sequences(self, positions, monkeypatch):
        """Their attention takes another way on a CPU: its logits are those of the kernel to the last digits."""
        model, prompts = tiny(positions), some_prompts(num=600)
        assert len(prompts) * model.config.n_heads >= transformer._MANY_SINGLE_QUERIES
        many = generate(model, prompts, 3 * CONTEXT)
        assert len(torch.unique(many, dim=0)) > 100
        cache = model.new_cache(len(prompts), CONTEXT)
        model.extend(many[:, :5], cache)
        logits = model.extend(many[:, 5:6], cache)
        torch.testing.assert_close(logits, model(many[:, :6])[:, -1], atol=1e-10, rtol=1e-10)
        monkeypatch.setattr(transformer, "_MANY_SINGLE_QUERIES", 1 << 30)
        assert torch.equal(many, generate(model, prompts, 3 * CONTEXT))

    @pytest.mark.parametrize("positions", ["learned", "rotary"])
    @pytest.mark.parametrize("length", [CONTEXT, 3 * CONTEXT])
    @pytest.mark.parametrize("batch_size", [6, 4], ids=["one chunk", "two chunks"])
    def test_so_do_recorded_ones(self, positions, length, batch_size, monkeypatch):
        """As on a GPU, with a stand-in for the graph that runs the same work again into the same place."""
        counted = {"recorded": 0, "replayed": 0}

        def capture(work, device):
            for _ in range(3):
                work()
            counted["recorded"] += 1
            outputs = work()

            def replay():
                counted["replayed"] += 1
                outputs.copy_(work())

            return outputs, replay

        model, prompts = tiny(positions), some_prompts()
        expected = generate(model, prompts, length)
        monkeypatch.setattr(generation, "_should_record", lambda *_: True)
        monkeypatch.setattr(generation, "capture", capture)
        found = generate(model, prompts, length, batch_size=batch_size)
        assert torch.equal(found, expected)
        chunks = 6 // batch_size + (6 % batch_size > 0)  # of two sizes: each has a recording
        prefills = 1 + len(range(CONTEXT + 1, length, CONTEXT // 2 + 1))
        assert counted == {"recorded": chunks, "replayed": chunks * (length - 3 - prefills)}

    def test_batches_and_calls_share_recordings_while_they_are_kept(self, monkeypatch):
        recorded = []

        def capture(work, device):
            recorded.append(1)
            outputs = work()
            return outputs, lambda: outputs.copy_(work())

        model, other, prompts = tiny(), tiny("rotary"), some_prompts()
        expected, greedy = generate(model, prompts, CONTEXT), partial(generate, prompts=prompts, length=CONTEXT)
        monkeypatch.setattr(generation, "_should_record", lambda *_: True)
        monkeypatch.setattr(generation, "capture", capture)
        assert torch.equal(greedy(model, batch_size=2), expected)
        assert len(recorded) == 1, "three batches of one size"
        with keep_recordings():
            for _ in range(2):
                assert torch.equal(greedy(model, batch_size=3), expected)
            assert len(recorded) == 2
            greedy(other, batch_size=3)
            greedy(model, batch_size=3, length=CONTEXT - 1)
            assert len(recorded) == 4, "another model, another capacity"
        assert not generation._kept.get()

    def test_out_of_memory_halves_the_batch(self, monkeypatch, caplog):
        sizes = []
        extend = TransformerLM.extend

        def scarce(model, tokens, cache):
            sizes.append(len(tokens))
            if len(tokens) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return extend(model, tokens, cache)

        model, prompts = tiny(), some_prompts()
        expected = generate(model, prompts, CONTEXT)
        monkeypatch.setattr(TransformerLM, "extend", scarce)
        assert torch.equal(generate(model, prompts, CONTEXT), expected)
        assert sizes[:3] == [6, 3, 1]
        assert [record.getMessage() for record in caplog.records] == [
            "out of memory while 6 sequences were generated at a time: now 3",
            "out of memory while 3 sequences were generated at a time: now 1",
        ]

    def test_memory_that_runs_out_while_recording_halves_the_batch_too(self, monkeypatch):
        sizes = []

        def capture(work, device):
            sizes.append(len(work()))
            if sizes[-1] > 3:
                raise torch.OutOfMemoryError("CUDA out of memory")
            outputs = work()
            return outputs, lambda: outputs.copy_(work())

        model, prompts = tiny(), some_prompts()
        expected = generate(model, prompts, CONTEXT)
        monkeypatch.setattr(generation, "_should_record", lambda *_: True)
        monkeypatch.setattr(generation, "capture", capture)
        assert torch.equal(generate(model, prompts, CONTEXT), expected)
        assert sizes == [6, 3]

    def test_out_of_memory_with_one_sequence_is_an_error(self, monkeypatch):
        def scarce(model, tokens, cache):
            raise torch.OutOfMemoryError("CUDA out of memory")

        monkeypatch.setattr(TransformerLM, "extend", scarce)
        with pytest.raises(torch.OutOfMemoryError):
            generate(tiny(), some_prompts(), CONTEXT)

    def test_what_cannot_be_recorded_is_launched(self, monkeypatch, caplog):
        def capture(work, device):
            work()
            raise RuntimeError("operation not permitted when stream is capturing")

        model, prompts = tiny(), some_prompts()
        expected = generate(model, prompts, 3 * CONTEXT)
        monkeypatch.setattr(generation, "_should_record", lambda *_: True)
        monkeypatch.setattr(generation, "capture", capture)
        assert torch.equal(generate(model, prompts, 3 * CONTEXT), expected)
        assert [record.getMessage() for record in caplog.records] == [
            "tokens are generated kernel by kernel, since a token cannot be recorded: "
            "operation not permitted when stream is capturing"
        ]

    @pytest.mark.parametrize(
        ("device", "to_come", "worth"), [("cuda", 16, True), ("cuda", 15, False), ("cpu", 99, False)]
    )
    def test_recording_has_to_pay(self, device, to_come, worth):
        assert generation._should_record(torch.device(device), to_come) is worth

    def test_every_token_is_the_most_likely_one(self):
        model = tiny()
        tokens = generate(model, some_prompts(), CONTEXT)
        assert torch.equal(tokens[:, 3:], model(tokens)[:, 2:-1].argmax(-1))

    def test_the_prompt_stands_in_front(self):
        prompts = some_prompts()
        tokens = generate(tiny(), prompts, 9)
        assert tokens.dtype == torch.int64
        assert tokens.shape == (6, 9)
        assert torch.equal(tokens[:, :3], prompts)

    def test_a_prompt_of_full_length_comes_back(self):
        prompts = some_prompts(length=5)
        assert torch.equal(generate(tiny(), prompts, 5), prompts)

    @pytest.mark.parametrize("batch_size", [1, 4, 6, 100])
    def test_the_size_of_batches_does_not_matter(self, batch_size):
        model, prompts = tiny(), some_prompts()
        assert torch.equal(generate(model, prompts, 9, batch_size=batch_size), generate(model, prompts, 9))

    def test_equals_go_to_the_lowest_id(self):
        table = torch.zeros(VOCAB, VOCAB)
        table[:, [4, 7]] = 1.0
        assert generate(Bigram(table), some_prompts(), 6)[:, 3:].eq(4).all()

    def test_works_for_a_bigram_model(self):
        successor = torch.roll(torch.eye(VOCAB), 1, dims=1)
        assert generate(Bigram(successor), torch.tensor([[8]]), 6).tolist() == [[8, 9, 10, 0, 1, 2]]

    def test_no_prompts_give_no_tokens(self):
        assert generate(tiny(), some_prompts(num=0), 9).shape == (0, 9)


class TestDefaultBatch:
    def test_is_the_fastest_where_memory_allows(self):
        assert default_batch(tiny(), 9, CPU) == 1024
        assert default_batch(Bigram(torch.zeros(3, 3)), 9, CPU) == 1024

    def test_keys_and_values_take_at_most_a_gibibyte(self):
        config = ModelConfig(d_model=256, n_layers=8, n_heads=2, max_seq_len=1024)
        model = TransformerLM(config, 1000)
        size = default_batch(model, 4000, CPU)
        cache = model.new_cache(2, 1024)
        stored = sum(tensor[0].nbytes for tensor in (*cache.keys, *cache.values)) + 4 * 1000
        assert size * stored <= 2**30 < (size + 1) * stored
        assert default_batch(model, 100, CPU) > size

    def test_on_a_gpu_an_eighth_of_its_memory(self, monkeypatch):
        class Properties:
            total_memory = 8 * 1000

        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
        model = tiny()
        cache = model.new_cache(1, 9)
        stored = sum(tensor.nbytes for tensor in (*cache.keys, *cache.values)) + 8 * VOCAB
        assert default_batch(model, 9, torch.device("cuda")) == max(1, 1000 // stored)
        Properties.total_memory = 8 * 3 * stored
        assert default_batch(model, 9, torch.device("cuda")) == 3
        Properties.total_memory = 2**40
        assert default_batch(model, 9, torch.device("cuda")) == 4096


class TestWindow:
    def test_past_the_context_the_last_half_is_read_again(self):
        starts = []

        class Watched(CacheFree):
            def forward(self, tokens):
                starts.append(tokens.shape[1])
                return super().forward(tokens)

        generate(Watched(tiny()), some_prompts(1, 10), 22)
        assert starts == [10, 11, 12, 6, 7, 8, 9, 10, 11, 12, 6, 7]

    def test_a_prompt_beyond_the_context_is_cut_to_its_last_half(self):
        model, prompts = tiny(), some_prompts(length=20)
        assert torch.equal(generate(model, prompts, 24)[:, 20:], generate(model, prompts[:, -6:], 10)[:, 6:])


class TestSampling:
    def test_the_same_seed_gives_the_same_tokens(self):
        def sample(seed):
            return generate(tiny(), some_prompts(), 9, temperature=1.0, generator=seeded(seed))

        assert torch.equal(sample(3), sample(3))
        assert not torch.equal(sample(3), sample(4))

    @pytest.mark.parametrize("batch_size", [1, 4])
    def test_the_size_of_batches_does_not_matter(self, batch_size):
        def sample(size):
            return generate(tiny(), some_prompts(), 9, temperature=1.0, generator=seeded(), batch_size=size)

        assert torch.equal(sample(batch_size), sample(None))

    def test_follows_the_distribution(self):
        probabilities = torch.tensor([0.5, 0.0, 0.3, 0.2])
        model = Bigram(probabilities.log().expand(4, 4).clone())
        tokens = generate(model, torch.zeros(20_000, 1, dtype=torch.int64), 2, temperature=1.0, generator=seeded())
        found = torch.bincount(tokens[:, 1], minlength=4) / 20_000
        assert found[1] == 0
        torch.testing.assert_close(found, probabilities, rtol=0, atol=0.015)

    def test_temperature_sharpens(self):
        model = Bigram(torch.tensor([[0.0, 1.0]]).expand(2, 2).clone())
        prompts = torch.zeros(2000, 1, dtype=torch.int64)

        def share(temperature):
            tokens = generate(model, prompts, 2, temperature=temperature, generator=seeded())
            return tokens[:, 1].double().mean().item()

        assert share(1.0) == pytest.approx(0.731, abs=0.03)
        assert share(0.25) == pytest.approx(0.982, abs=0.015)

    @pytest.mark.parametrize(("draw", "token"), [(0.0, 1), (0.5, 3), (1 - 2**-53, 3)])
    def test_a_token_of_no_probability_is_never_taken(self, draw, token):
        logits = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]]).log()
        assert _sample(logits, torch.tensor([draw], dtype=torch.float64)).item() == token


class TestSideEffects:
    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    def test_the_global_random_state_is_untouched(self, temperature):
        model = tiny(dropout=0.5)
        before = torch.get_rng_state()
        generate(model, some_prompts(), 9, temperature=temperature, generator=seeded())
        assert torch.equal(torch.get_rng_state(), before)

    def test_dropout_is_off_and_every_mode_is_restored(self):
        model = tiny(dropout=0.5)
        model.blocks[0].eval()
        modes = [module.training for module in model.modules()]
        assert torch.equal(generate(model, some_prompts(), 9), generate(model, some_prompts(), 9))
        assert [module.training for module in model.modules()] == modes

    def test_modes_are_restored_after_an_interruption(self):
        model = tiny()
        with pytest.raises(Interrupted):
            generate(model, some_prompts(), 9, should_stop=lambda: True)
        assert all(module.training for module in model.modules())

    def test_no_graph_is_built_and_the_result_can_be_trained_on(self):
        model = tiny()
        tokens = generate(model, some_prompts(), 9)
        model(tokens).sum().backward()
        assert not tokens.is_inference()

    def test_the_prompts_are_not_written_to(self):
        prompts = some_prompts()
        before = prompts.clone()
        generate(tiny(), prompts, 9)
        assert torch.equal(prompts, before)


def test_is_asked_to_stop_before_every_token():
    calls = []
    generate(tiny(), some_prompts(), 9, batch_size=3, should_stop=lambda: bool(calls.append(None)))
    assert len(calls) == 2 * 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"length": 2}, "length = 2 is shorter than the prompts of 3 tokens"),
        ({"temperature": 1.0}, "needs a generator"),
        ({"temperature": -1.0}, "must not be negative"),
        ({"temperature": float("nan")}, "must not be negative"),
        ({"batch_size": 0}, "at least 1"),
        ({"prompts": torch.zeros(3, dtype=torch.int64)}, "prompts must be"),
        ({"prompts": torch.zeros(3, 0, dtype=torch.int64)}, "at least one token"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        generate(tiny(), **{"prompts": some_prompts(), "length": 9, **arguments})


def test_outputs_of_hugging_face_models_are_read():
    class Output:
        logits = torch.zeros(1, 2, VOCAB)

    assert _UncachedLogits(lambda tokens: Output, some_prompts(1, 2))(2).shape == (1, VOCAB)


class TestRestrictedSampling:
    LOGITS = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.25, 0.25, 0.25, 0.25]]).log()

    @pytest.mark.parametrize(
        ("top_k", "top_p", "left"),
        [
            (None, None, [[0, 1, 2, 3], [0, 1, 2, 3]]),
            (2, None, [[1, 3], [0, 1, 2, 3]]),  # equals stay together
            (1, None, [[1], [0, 1, 2, 3]]),
            (None, 0.6, [[1, 3], [0, 1, 2]]),
            (None, 0.05, [[1], [0]]),
            (None, 1.0, [[0, 1, 2, 3], [0, 1, 2, 3]]),
            (3, 0.6, [[1, 3], [0, 1, 2]]),
        ],
    )
    def test_only_the_likely_tokens_are_left(self, top_k, top_p, left):
        restricted = _Sampling(1.0, top_k, top_p, seeded()).restricted(self.LOGITS)
        assert [row.isfinite().nonzero().flatten().tolist() for row in restricted] == left

    def test_the_temperature_comes_first(self):
        # At temperature 2 the distribution is flatter: more tokens are needed for the same probability.
        left = [_Sampling(t, None, 0.62, seeded()).restricted(self.LOGITS)[0].isfinite().sum() for t in (1.0, 2.0)]
        assert left == [2, 3]

    def test_top_1_is_greedy(self):
        model, prompts = tiny(), some_prompts()
        sampled = generate(model, prompts, CONTEXT, temperature=1.0, top_k=1, generator=seeded())
        assert torch.equal(sampled, generate(model, prompts, CONTEXT))

    @pytest.mark.parametrize(("name", "value"), [("top_k", 0), ("top_p", 0.0), ("top_p", 1.5)])
    def test_a_value_out_of_range_is_refused(self, name, value):
        with pytest.raises(ValueError, match=name):
            generate(tiny(), some_prompts(), CONTEXT, temperature=1.0, generator=seeded(), **{name: value})


class TestStream:
    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    def test_it_hands_out_what_generate_returns(self, temperature):
        model, prompts = tiny(), some_prompts(num=1)
        options = {"temperature": temperature, "top_k": 5, "top_p": 0.9}
        whole = generate(model, prompts, 2 * CONTEXT, generator=seeded(3), **options)
        count = 2 * CONTEXT - prompts.shape[1]
        streamed = list(stream(model, prompts[0].tolist(), count, generator=seeded(3), **options))
        assert streamed == whole[0, prompts.shape[1] :].tolist()

    def test_stream_leaves_the_callers_gradient_mode(self):
        for _ in stream(tiny(), [1, 2], 3, temperature=0.0):
            assert torch.is_grad_enabled()

    def test_the_mode_of_the_model_is_put_back(self):
        model = tiny()
        model.train()
        tokens = stream(model, [1, 2], 3, temperature=0.0)
        next(tokens)
        tokens.close()
        assert model.training
