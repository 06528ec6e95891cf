"""Partition and combine: the only file that knows how NNX keeps variables.

Everything outside works on plain nested dicts of arrays ("trees") with T5X's words as keys.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx

from jaxprompt.typing import ArrayTree


class PromptParam(nnx.Param):
    """A variable of a prompt method: the only kind that `tune: prompt` trains."""


def split(model: nnx.Module, trained: Any = PromptParam) -> tuple[Any, dict, dict]:
    """Takes a module apart, once, at the edge.

    Args:
      model: the module (abstract or with arrays).
      trained: NNX filter of what an optimizer will see; `...` for all parameters.
    Returns: (graph definition, trained tree, frozen tree), the trees plain nested dicts.
    """
    if trained is ...:
        graphdef, state = nnx.split(model)
        return graphdef, nnx.to_pure_dict(state), {}
    graphdef, trained_state, frozen_state = nnx.split(model, trained, ...)
    return graphdef, nnx.to_pure_dict(trained_state), nnx.to_pure_dict(frozen_state)


def merge(graphdef: Any, *trees: dict) -> Any:
    """Puts a module together again from what `split` returned; inverse of `split`."""
    return nnx.merge(graphdef, *(nnx.State(tree) for tree in trees))


def flatten(tree: ArrayTree) -> dict[str, Any]:
    """Nested dict -> {"a/b/c": leaf}, keys sorted as jax sorts them; what is no dict is a leaf."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda node: not isinstance(node, dict)
    )
    return {"/".join(str(key.key) for key in path): leaf for path, leaf in leaves}


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{"a/b/c": leaf} -> nested dict; inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *rooms, name = path.split("/")
        node = tree
        for room in rooms:
            node = node.setdefault(room, {})
        node[name] = leaf
    return tree


def map_with_path(function: Callable[[str, Any], Any], tree: ArrayTree) -> dict[str, Any]:
    """Applies function("a/b/c", leaf) to every leaf of a nested dict."""
    return unflatten({path: function(path, leaf) for path, leaf in flatten(tree).items()})


def count(tree: ArrayTree) -> int:
    """Number of scalars in all leaves; a quantised array has those that it stands for."""
    leaves = jax.tree.leaves(tree, is_leaf=lambda node: hasattr(node, "shape"))
    return sum(math.prod(leaf.shape) for leaf in leaves)


def size_in_bytes(tree: ArrayTree) -> int:
    """Bytes of all leaves (arrays or ShapeDtypeStructs); two int4 share one on a device."""

    def size(leaf: Any) -> int:
        count = math.prod(leaf.shape)
        return -(-count // 2) if leaf.dtype.name == "int4" else count * leaf.dtype.itemsize

    return sum(size(leaf) for leaf in jax.tree.leaves(tree))
