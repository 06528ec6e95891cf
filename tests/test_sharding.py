"""Logical axes to mesh axes: closed rules, sizes that divide, eight simulated devices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import AxisType, PartitionSpec

from jaxprompt import sharding
from jaxprompt.t5.layers import ParamSpec, param_specs
from jaxprompt.trees import flatten
from jaxprompt.typing import UserError

CONFIG = tiny.CONFIG


def test_a_mesh_has_auto_axes_and_the_devices_in_order():
    mesh = sharding.make_mesh(data=2, model=4)
    assert mesh.axis_names == ("data", "model")
    assert mesh.axis_types == (AxisType.Auto, AxisType.Auto)
    assert mesh.devices.tolist() == np.asarray(jax.devices()).reshape(2, 4).tolist()


@pytest.mark.parametrize(("model", "data"), [(1, 8), (2, 4), (8, 1)])
def test_data_takes_what_model_leaves(model: int, data: int):
    assert dict(sharding.make_mesh(-1, model).shape) == {"data": data, "model": model}


def test_a_mesh_may_be_smaller_than_the_machine():
    mesh = sharding.make_mesh(data=2, model=1, devices=jax.devices()[3:])
    assert [device.id for device in mesh.devices.flat] == [3, 4]


@pytest.mark.parametrize(("data", "model"), [(3, 3), (0, 1), (1, 0), (-1, 9), (-1, 0), (-2, 1)])
def test_a_mesh_that_the_devices_do_not_fill_is_refused(data: int, model: int):
    with pytest.raises(UserError, match="8 are here"):
        sharding.make_mesh(data, model)


def test_an_axis_without_a_rule_is_an_error():
    with pytest.raises(UserError, match="no sharding rule for axis 'widht'"):
        sharding.partition_spec(("embed", "widht"))


def test_two_axes_on_one_mesh_axis_are_an_error():
    with pytest.raises(UserError, match="twice"):
        sharding.partition_spec(("heads", "mlp"))


def test_a_size_that_does_not_divide_names_those_that_would():
    mesh = sharding.make_mesh(data=2, model=4)
    with pytest.raises(UserError, match=r"axis 'heads' of size 6 .* would: \[1, 2, 3\]"):
        sharding.named_sharding(mesh, ("layers", "embed", "heads", "kv"), (2, 8, 6, 4))


def test_axes_and_shape_must_have_one_length():
    with pytest.raises(ValueError, match="zip"):
        sharding.named_sharding(sharding.make_mesh(), ("embed",), (2, 3))


FAMILIES: dict[str, dict] = {
    "t5-1.0": {"gated": False, "activation": "relu", "tie_word_embeddings": True},
    "t5-1.1": {},
    "umt5": {"model_type": "umt5", "per_layer_relative_bias": True},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_has_a_rule_and_its_own_sharding(family: str):
    """Model parallel: every kernel of attention and MLP, and the vocabulary, is divided by 4."""
    config = dataclasses.replace(CONFIG, **FAMILIES[family])
    specs = flatten(param_specs(config))
    shardings = flatten(sharding.tree_shardings(sharding.make_mesh(2, 4), param_specs(config)))
    assert shardings.keys() == specs.keys()
    for path, spec in specs.items():
        divided = np.prod(shardings[path].shard_shape(spec.shape)) * 4 == np.prod(spec.shape)
        assert divided == ("scale" not in path), path


def test_weights_placed_by_the_rules_are_the_same_weights():
    params = tiny.make_params(CONFIG)
    shardings = sharding.tree_shardings(sharding.make_mesh(2, 4), param_specs(CONFIG))
    placed = jax.device_put(params, shardings)
    query = placed["encoder"]["layers"]["attention"]["query"]["kernel"]
    assert query.sharding.spec == PartitionSpec(None, None, "model", None)
    assert {shard.data.shape for shard in query.addressable_shards} == {(3, 12, 1, 5)}
    jax.tree.map(np.testing.assert_array_equal, placed, params)


def test_rows_of_a_batch_go_over_data():
    mesh = sharding.make_mesh(data=4, model=2)
    batch = {"ids": np.arange(24).reshape(8, 3), "weights": np.arange(8.0, dtype=np.float32)}
    placed = sharding.shard_batch(mesh, batch)
    assert {shard.data.shape for shard in placed["ids"].addressable_shards} == {(2, 3)}
    jax.tree.map(np.testing.assert_array_equal, placed, batch)


def test_rows_that_do_not_divide_are_refused():
    with pytest.raises(UserError, match="batch of 6 rows does not divide over 4"):
        sharding.shard_batch(sharding.make_mesh(data=4), {"ids": jnp.zeros((6, 2))})


def test_a_spec_says_all_of_its_axes():
    for path, spec in flatten(param_specs(CONFIG)).items():
        assert isinstance(spec, ParamSpec)
        assert len(spec.axes) == len(spec.shape), path
