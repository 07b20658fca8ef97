"""Runs a function of tiles on pieces of them: Triton knows tensors of powers of two only.

A block of 384 elements padded to 512 costs a third more arithmetic, and a mask in every statistic.
As three of 128 beside each other it costs neither. The function is traced on whole blocks and then
evaluated with every value as its pieces: operations element by element act on each; what is reduced
along the blocks is first joined element by element, so that threads wait for each other once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend.core import Jaxpr, Literal, Primitive, Var

_JOIN = {
    jax.lax.reduce_sum_p: jax.lax.add,
    jax.lax.reduce_max_p: jax.lax.max,
    jax.lax.reduce_min_p: jax.lax.min,
}
# All that Triton computes element by element.
_ARITHMETIC = {"abs", "add", "clamp", "div", "max", "min", "mul", "neg", "rem", "sign", "sub"}
_POWERS = {"cbrt", "exp", "exp2", "expm1", "integer_pow", "log", "log1p", "pow", "rsqrt", "sqrt"}
_FUNCTIONS = {"ceil", "cos", "erf", "floor", "logistic", "nextafter", "sin", "square", "tan"}
_INVERSE = {"acos", "asin", "atan", "atan2"}
_HYPERBOLIC = {"acosh", "asinh", "atanh", "cosh", "sinh", "tanh"}
_CONDITIONS = {"and", "eq", "ge", "gt", "is_finite", "le", "lt", "ne", "not", "or", "select_n"}
_CASTS = {"bitcast_convert_type", "convert_element_type", "copy", "stop_gradient"}
_BY_ELEMENT = (
    _ARITHMETIC | _POWERS | _FUNCTIONS | _INVERSE | _HYPERBOLIC | _CONDITIONS | _CASTS | {"xor"}
)
_NESTED = ("jaxpr", "call_jaxpr")  # where an equation keeps the function that it calls
_MOST, _SMALLEST = 7, 32


class _Pieces(tuple[Any, ...]):
    """The pieces of one value."""


def sizes_of(length: int) -> tuple[int, ...]:
    """Equal powers of two that make up a length; where they would be many or small, one beyond."""
    size = length & -length
    count = length // size
    return (
        (size,) * count
        if count == 1 or (count <= _MOST and size >= _SMALLEST)
        else (1 << length.bit_length(),)
    )


class Cut(NamedTuple):
    """How tiles, of two axes, are cut.

    Attributes:
        axis: of the blocks.
        sizes: of the pieces along it, all equal.
    """

    axis: int
    sizes: tuple[int, ...]

    def run(self, function: Callable[..., Sequence[Any]], *tiles: Sequence[Any]) -> list[list[Any]]:
        """What `function` makes of tiles, given and returned as the pieces of each.

        Args:
            function: takes tiles, returns tiles and what there is one of for every block, which is
                a single piece. It may work on elements and reduce along blocks.
            tiles: pieces of each.

        Raises:
            NotImplementedError: the function does something else with a tile.
        """
        if len(self.sizes) == 1:
            return [[made] for made in function(*(tile[0] for tile in tiles))]
        length = sum(self.sizes)
        whole = [jax.ShapeDtypeStruct(self._shape(t[0].shape, length), t[0].dtype) for t in tiles]
        traced = jax.make_jaxpr(function)(*whole)
        made = self._evaluate(traced.jaxpr, traced.consts, [_Pieces(tile) for tile in tiles])
        return [list(one) if isinstance(one, _Pieces) else [one] for one in made]

    def _shape(self, shape: tuple[int, ...], size: int) -> tuple[int, ...]:
        return (*shape[: self.axis], size, *shape[self.axis + 1 :])

    def _is_cut(self, variable: Var) -> bool:
        shape = variable.aval.shape
        return len(shape) == 2 and shape[self.axis] == sum(self.sizes)

    def _evaluate(self, jaxpr: Jaxpr, constants: Sequence[Any], given: Sequence[Any]) -> list[Any]:
        known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*constants, *given], strict=True))

        def value(of: Any) -> Any:
            return of.val if isinstance(of, Literal) else known[of]

        for equation in jaxpr.eqns:
            made = self._step(equation, [value(one) for one in equation.invars])
            known.update(zip(equation.outvars, made, strict=True))
        return [value(one) for one in jaxpr.outvars]

    def _step(self, equation: Any, given: list[Any]) -> list[Any]:
        """Evaluates one equation."""
        nested = next((equation.params[name] for name in _NESTED if name in equation.params), None)
        if nested is not None:
            return self._evaluate(nested.jaxpr, nested.consts, given)
        primitive, params, (out, *_) = equation.primitive, equation.params, equation.outvars
        cut = [one for one in given if isinstance(one, _Pieces)]
        if not self._is_cut(out):
            return [
                self._joined(primitive, params, *cut) if cut else primitive.bind(*given, **params)
            ]
        allowed = _BY_ELEMENT if cut else ("broadcast_in_dim",)
        if primitive.name not in allowed:
            raise self._refused(primitive)
        made = []
        for index, size in enumerate(self.sizes):
            here = [one[index] if isinstance(one, _Pieces) else one for one in given]
            shape = {} if cut else {"shape": self._shape(out.aval.shape, size)}
            made.append(primitive.bind(*here, **params | shape))
        return [_Pieces(made)]

    def _joined(self, primitive: Primitive, params: dict[str, Any], *cut: _Pieces) -> Any:
        """What a primitive that reduces along the blocks makes of all pieces."""
        if (join := _JOIN.get(primitive)) is None or params["axes"] != (self.axis,):
            raise self._refused(primitive)
        return primitive.bind(functools.reduce(join, cut[0]), **params)

    @staticmethod
    def _refused(primitive: Primitive) -> NotImplementedError:
        return NotImplementedError(
            "A kernel on pieces of blocks works on elements and reduces along the blocks. "
            f"Received: {primitive}. Set KERAS_RQ_KERNELS=0 to do without kernels."
        )
