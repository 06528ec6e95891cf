"""Splitting a module into trained and frozen trees and back, and the small tree helpers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from jaxprompt import trees
from jaxprompt.model import PromptedT5
from jaxprompt.prompts.soft import SoftPrompt
from jaxprompt.t5.layers import abstract_params, param_specs
from jaxprompt.t5.model import T5

CONFIG = tiny.CONFIG
D = CONFIG.d_model


def _model(params: dict, prompt: object) -> PromptedT5:
    return PromptedT5(T5(CONFIG, params), SoftPrompt(prompt))


@pytest.fixture(params=[True, False], ids=["graph", "tree"])
def nnx_mode(request):
    """Both ways NNX can see modules; tree mode is announced as the coming default."""
    if not hasattr(nnx, "set_graph_mode"):
        pytest.skip("this flax has one mode only")
    with nnx.set_graph_mode(request.param):
        yield


def test_the_prompt_alone_is_trained(nnx_mode):
    params = tiny.make_params(CONFIG)
    prompt = jnp.ones((4, D))
    _, trained, frozen = trees.split(_model(params, prompt))
    assert list(trees.flatten(trained)) == ["method/prompt"]
    assert frozen["backbone"]["params"].keys() == params.keys()
    jax.tree.map(np.testing.assert_array_equal, frozen["backbone"]["params"], params)


def test_everything_is_trained_when_asked(nnx_mode):
    model = PromptedT5(T5(CONFIG, tiny.make_params(CONFIG)))
    _, trained, frozen = trees.split(model, ...)
    assert frozen == {}
    assert trees.count(trained) == sum(np.prod(spec.shape) for spec in _specs())


def _specs() -> list:
    return jax.tree.leaves(param_specs(CONFIG), is_leaf=lambda leaf: hasattr(leaf, "axes"))


def test_merge_is_the_inverse_of_split(nnx_mode):
    model = _model(tiny.make_params(CONFIG), jnp.arange(2.0 * D).reshape(2, D))
    graphdef, trained, frozen = trees.split(model)
    again = trees.split(trees.merge(graphdef, trained, frozen))
    assert again[0] == graphdef
    jax.tree.map(np.testing.assert_array_equal, again[1:], (trained, frozen))


def test_trees_are_plain_dicts_of_arrays():
    _, trained, frozen = trees.split(_model(tiny.make_params(CONFIG), jnp.ones((2, D))))
    for leaf in jax.tree.leaves((trained, frozen)):
        assert isinstance(leaf, np.ndarray | jax.Array)

    def only_dicts(tree: object) -> bool:
        return not hasattr(tree, "keys") or (
            type(tree) is dict and all(map(only_dicts, tree.values()))
        )

    assert only_dicts(trained) and only_dicts(frozen)


def test_an_abstract_module_splits_and_its_values_may_come_later():
    abstract = _model(abstract_params(CONFIG), jax.ShapeDtypeStruct((2, D), jnp.float32))
    graphdef, trained, frozen = trees.split(abstract)
    assert trees.size_in_bytes(trained) == 2 * D * 4
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (trained, frozen))
    model = trees.merge(graphdef, *zeros)
    assert model.method.prompt[...].shape == (2, D)


def test_flatten_names_every_leaf_and_unflatten_inverts_it():
    tree = {"b": {"x": 1, "a": {"y": 2}}, "a": 3}
    flat = trees.flatten(tree)
    assert flat == {"a": 3, "b/a/y": 2, "b/x": 1}
    assert list(flat) == sorted(flat)
    assert trees.unflatten(flat) == tree


def test_map_with_path_sees_every_leaf_once():
    seen = []

    def double(path: str, leaf: int) -> int:
        seen.append(path)
        return 2 * leaf

    assert trees.map_with_path(double, {"a": {"b": 1}, "c": 2}) == {"a": {"b": 2}, "c": 4}
    assert seen == ["a/b", "c"]


def test_count_and_bytes():
    tree = {
        "a": jnp.zeros((2, 3), jnp.bfloat16),
        "b": jax.ShapeDtypeStruct((5,), jnp.float32),
        "c": jnp.zeros(()),
    }
    assert trees.count(tree) == 6 + 5 + 1
    assert trees.size_in_bytes(tree) == 6 * 2 + 5 * 4 + 4
