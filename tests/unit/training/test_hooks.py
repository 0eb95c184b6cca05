import sys
from types import ModuleType

import pytest
import torch
from torch import nn

from accel_train.config.sections import HooksConfig, ModelConfig
from accel_train.errors import ConfigError
from accel_train.model.generation import generate
from accel_train.model.transformer import TransformerLM
from accel_train.training.hooks import ForwardHook, build_hooks

TOKENS = torch.randint(11, (3, 8), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return TransformerLM(ModelConfig(d_model=16, n_layers=2, n_heads=2, max_seq_len=8), 11)


@pytest.fixture
def my_hooks(monkeypatch):
    """An importable module of a user's own hooks."""
    module = ModuleType("my_hooks")
    monkeypatch.setitem(sys.modules, "my_hooks", module)
    return module


def forward_and_backward(model):
    logits = model(TOKENS)
    model.zero_grad()
    logits.logsumexp(-1).sum().backward()
    return logits, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def apply_update(hooks, model, step=0):
    hooks.apply_update(step, list(model.parameters()))


class TestNothingRegistered:
    def test_is_false_and_touches_nothing(self, model):
        hooks = build_hooks(HooksConfig(), model)
        assert not hooks
        assert hooks.names == ()
        assert hooks.scalars() == {}
        assert all(not module._forward_hooks for module in model.modules())


class TestForwardHooks:
    def test_leave_outputs_and_gradients_bit_for_bit(self, model):
        logits, gradients = forward_and_backward(model)
        hooks = build_hooks(HooksConfig(forward=("activation_stats",)), model)
        assert hooks
        observed_logits, observed_gradients = forward_and_backward(model)
        assert hooks.scalars()
        assert torch.equal(observed_logits, logits)
        assert all(torch.equal(observed_gradients[name], gradients[name]) for name in gradients)

    def test_activation_stats_are_those_of_every_block(self, model):
        outputs = {}
        for name, block in model.blocks.named_children():
            block.register_forward_hook(lambda _m, _i, output, name=name: outputs.update({name: output.detach()}))
        hooks = build_hooks(HooksConfig(forward=("activation_stats",)), model)
        model(TOKENS)
        expected = {}
        for name, output in outputs.items():
            expected[f"activations/blocks.{name}/mean"] = output.mean().item()
            expected[f"activations/blocks.{name}/std"] = output.std(correction=0).item()
        assert len(expected) == 4
        assert hooks.scalars() == pytest.approx(expected, abs=1e-6)

    def test_there_are_no_stats_before_the_first_step(self, model):
        assert build_hooks(HooksConfig(forward=("activation_stats",)), model).scalars() == {}

    def test_evaluation_and_generation_are_not_observed(self, model):
        hooks = build_hooks(HooksConfig(forward=("activation_stats",)), model)
        generate(model, TOKENS[:, :2], 6)
        model.eval()(TOKENS)
        assert hooks.scalars() == {}

    def test_closing_detaches_them(self, model):
        hooks = build_hooks(HooksConfig(forward=("activation_stats",)), model)
        hooks.close()
        hooks.close()
        model(TOKENS)
        assert hooks.scalars() == {}

    def test_what_they_return_is_dropped(self, model, my_hooks):
        class Greedy(ForwardHook):
            def observe(self, name, output):
                return torch.zeros_like(output)

        my_hooks.Greedy = lambda model: Greedy()
        logits = model(TOKENS)
        build_hooks(HooksConfig(forward=("my_hooks:Greedy",)), model)
        assert torch.equal(model(TOKENS), logits)

    def test_writing_to_an_output_is_an_error_that_names_the_hook(self, model, my_hooks):
        class Vandal(ForwardHook):
            def observe(self, name, output):
                output.zero_()

        my_hooks.Vandal = lambda model: Vandal()
        build_hooks(HooksConfig(forward=("my_hooks:Vandal",)), model)
        with pytest.raises(RuntimeError, match=r"my_hooks:Vandal.*blocks\.0"):
            model(TOKENS)

    def test_choose_their_modules(self, model, my_hooks):
        seen = []

        class Norms(ForwardHook):
            def selects(self, name, module):
                return isinstance(module, nn.LayerNorm)

            def observe(self, name, output):
                seen.append(name)

        my_hooks.Norms = lambda model: Norms()
        build_hooks(HooksConfig(forward=("my_hooks:Norms",)), model)
        model(TOKENS)
        assert len(seen) == 5
        assert seen[-1] == "final_norm"

    def test_a_hook_that_finds_nothing_is_refused(self):
        with pytest.raises(
            ConfigError, match=r"hooks\.forward: 'activation_stats' finds nothing to observe in a Linear"
        ):
            build_hooks(HooksConfig(forward=("activation_stats",)), nn.Linear(2, 2))

    def test_work_in_a_compiled_model(self, model):
        hooks = build_hooks(HooksConfig(forward=("activation_stats",)), model)
        logits = model(TOKENS)
        expected = hooks.scalars()
        compiled = torch.compile(model, backend="eager")
        assert torch.equal(compiled(TOKENS), logits)
        assert hooks.scalars() == expected


class TestUpdateHooks:
    def test_identity_leaves_the_gradients_bit_for_bit(self, model):
        hooks = build_hooks(HooksConfig(update=("identity",)), model)
        _, before = forward_and_backward(model)
        apply_update(hooks, model)
        assert all(torch.equal(p.grad, before[name]) for name, p in model.named_parameters())

    def test_get_step_and_gradients_by_name_and_may_change_them_in_place(self, model, my_hooks):
        steps = []

        def scaling(model):
            def hook(step, gradients):
                steps.append(step)
                gradients["head.weight"].mul_(2)

            return hook

        my_hooks.scaling = scaling
        hooks = build_hooks(HooksConfig(update=("my_hooks:scaling",)), model)
        _, before = forward_and_backward(model)
        apply_update(hooks, model, step=17)
        before["head.weight"] *= 2
        assert steps == [17]
        assert all(torch.equal(p.grad, before[name]) for name, p in model.named_parameters())

    def test_run_in_the_order_of_the_configuration(self, model, my_hooks):
        calls = []
        my_hooks.first = lambda model: lambda step, gradients: calls.append("first")
        my_hooks.second = lambda model: lambda step, gradients: calls.append("second")
        hooks = build_hooks(HooksConfig(update=("my_hooks:second", "my_hooks:first")), model)
        apply_update(hooks, model)
        assert calls == ["second", "first"]

    def test_see_only_parameters_that_have_a_gradient(self, model, my_hooks):
        seen = []
        my_hooks.names = lambda model: lambda step, gradients: seen.extend(gradients)
        model.token_embedding.weight.requires_grad_(False)
        hooks = build_hooks(HooksConfig(update=("my_hooks:names",)), model)
        model.head.weight.grad = torch.zeros_like(model.head.weight)
        hooks.apply_update(0, [p for p in model.parameters() if p.requires_grad])
        assert seen == ["head.weight"]


class TestConfiguration:
    def test_names_are_kept_for_the_record(self, model):
        hooks = build_hooks(HooksConfig(forward=("activation_stats",), update=("identity",)), model)
        assert hooks.names == ("activation_stats", "identity")

    @pytest.mark.parametrize("field", ["forward", "update"])
    @pytest.mark.parametrize(
        ("name", "rule"),
        [
            ("stats", "is no hook; use one of"),
            (":factory", "is no hook; use one of"),
            ("no_such_module:factory", "cannot be imported: No module named 'no_such_module'"),
            ("json:no_such_factory", "names nothing: json has no 'no_such_factory'"),
            ("math:pi", "is no factory: 'pi' cannot be called"),
            ("builtins:id", "makes a int"),
        ],
    )
    def test_a_bad_name_is_refused_with_field_and_value(self, model, field, name, rule):
        with pytest.raises(ConfigError) as caught:
            build_hooks(HooksConfig(**{field: (name,)}), model)
        assert (caught.value.field, caught.value.value) == (f"hooks.{field}", name)
        assert rule in str(caught.value)
