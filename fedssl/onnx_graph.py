"""An encoder as an ONNX graph: a history in, scores of all items out, without torch. The only file that imports onnx.

Written out, not traced: a device asks for one history at a time, so there is no users axis and no padding, and what a tracer would
unroll, a position at a time, is one operator. The tests hold each graph to `fedssl.recommender.Recommender`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from fedssl.config import EncoderConfig
from fedssl.errors import ConfigError

ITEMS = "items"
NEVER = -1e9
OPSET, IR_VERSION = 18, 9
"""Old enough for an onnxruntime of 2023."""


class _Graph:
    """Nodes in order, and the arrays they read. Every operation returns the name of its result."""

    def __init__(self, weights: Mapping[str, NDArray[np.float32]]):
        self.nodes: list[Any] = []
        self.arrays: dict[str, Any] = {}
        self._numbers = itertools.count()
        for name, leaf in weights.items():
            self.array(np.ascontiguousarray(leaf, dtype=np.float32), name)

    def array(self, value: Any, name: str = "", dtype: Any = None) -> str:
        name = name or f"constant{next(self._numbers)}"
        self.arrays[name] = numpy_helper.from_array(np.asarray(value, dtype=dtype), name)
        return name

    def floats(self, value: Any) -> str:
        return self.array(value, dtype=np.float32)

    def ints(self, *values: int) -> str:
        return self.array(values, dtype=np.int64)

    def __call__(self, kind: str, *inputs: str, **attributes: Any) -> str:
        return self.many(kind, 1, *inputs, **attributes)[0]

    def many(self, kind: str, results: int, *inputs: str, **attributes: Any) -> list[str]:
        names = [f"value{len(self.nodes)}.{number}" for number in range(results)]
        self.nodes.append(helper.make_node(kind, list(inputs), names, **attributes))
        return names

    def linear(self, x: str, weight: str, bias: str | None = None) -> str:
        product = self("MatMul", x, weight)
        return product if bias is None else self("Add", product, bias)

    def layer_norm(self, x: str, name: str) -> str:
        return self("LayerNormalization", x, f"{name}.gain", f"{name}.bias", axis=-1, epsilon=1e-5)


def encoder_graph(
    config: EncoderConfig,
    weights: Mapping[str, NDArray[np.float32]],
    about: Mapping[str, str] | None = None,
    *,
    history: float = 0.0,
    adapts: bool = False,
) -> bytes:
    """A model file. ``weights``: the encoder's leaves and the table "items" (I + 1, D). ``about``: words that stand in its metadata.

    Inputs: ``rows`` (L,) int64, the newest events, oldest first, 1 <= L <= window, a single 0 where there is none; ``head`` (D,), added to
    the hidden state; and where ``history`` (of `[head]`) is not 0 ``met`` (H,) int64, the whole history, a single 0 where there is none.
    Outputs: ``scores`` (I + 1,), of which the first means nothing, and ``hidden`` (D,), without heads.

    ``adapts``: also an input ``target`` (), an item that may be left out, and an output ``step`` (D,): minus the slope by ``head`` of the cross entropy
    of the target among all items, which is its vector less the vector expected. Without a target it is zero, and costs nothing.

    Raises ConfigError for an encoder that does not ship: nobody wrote its graph.
    """
    build = _GRAPHS.get(config.name)
    if build is None:
        raise ConfigError(f"encoder '{config.name}' has no ONNX graph, only {', '.join(_GRAPHS)} have; a device cannot recommend with it")
    graph = _Graph(weights)
    hidden = build(graph, config)
    # Nothing was met: no hidden state, as in a simulation.
    newest = graph("Gather", "rows", graph.array(-1, dtype=np.int64), axis=0)
    has_history = graph("Cast", graph("Greater", newest, graph.array(0, dtype=np.int64)), to=TensorProto.FLOAT)
    hidden = graph("Mul", hidden, has_history)
    graph.nodes.append(helper.make_node("Identity", [hidden], ["hidden"]))
    inputs = [helper.make_tensor_value_info("rows", TensorProto.INT64, ["L"]), helper.make_tensor_value_info("head", TensorProto.FLOAT, [config.width])]
    personal = graph("Add", hidden, "head")
    if history:
        inputs.append(helper.make_tensor_value_info("met", TensorProto.INT64, ["H"]))
        mean = graph("ReduceMean", graph("Gather", ITEMS, "met", axis=0), graph.ints(0), keepdims=0)
        personal = graph("Add", personal, graph("Mul", graph("Mul", mean, graph.floats(history)), has_history))
    scores_I1 = graph("MatMul", ITEMS, graph("Unsqueeze", personal, graph.ints(1)))
    graph.nodes.append(helper.make_node("Squeeze", [scores_I1, graph.ints(1)], ["scores"]))
    rows, width = len(weights[ITEMS]), config.width
    outputs = [helper.make_tensor_value_info("scores", TensorProto.FLOAT, [rows]), helper.make_tensor_value_info("hidden", TensorProto.FLOAT, [width])]
    if adapts:
        inputs.append(helper.make_tensor_value_info("target", TensorProto.INT64, []))
        outputs.append(helper.make_tensor_value_info("step", TensorProto.FLOAT, [width]))
        _add_step(graph, scores_I1, width)
    made = helper.make_graph(graph.nodes, "encoder", inputs, outputs, list(graph.arrays.values()))
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="fedssl")
    helper.set_model_props(model, dict(about or {}))
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def _add_step(graph: _Graph, scores_I1: str, width: int) -> None:
    """The output "step", in a branch that runs only where there is a target: onnxruntime computes every output, asked for or not."""
    graph.array(0, "target", np.int64)
    is_asked = graph("Greater", "target", graph.array(0, dtype=np.int64))
    first = len(graph.nodes)
    share_I1 = graph("Softmax", graph("Slice", scores_I1, graph.ints(1), graph.ints(np.iinfo(np.int64).max), graph.ints(0)), axis=0)
    # The table is the first factor, which is never packed into a second copy.
    expected_D1 = graph("Gemm", ITEMS, graph("Pad", share_I1, graph.ints(1, 0, 0, 0)), transA=1)
    step = graph("Sub", graph("Gather", ITEMS, "target", axis=0), graph("Squeeze", expected_D1, graph.ints(1)))
    asked, graph.nodes = graph.nodes[first:], graph.nodes[:first]
    other = helper.make_node("Identity", [graph.floats(np.zeros(width))], ["no step"])
    branches = [
        helper.make_graph(nodes, name, [], [helper.make_tensor_value_info(result, TensorProto.FLOAT, [width])])
        for nodes, name, result in ((asked, "step", step), ([other], "none", "no step"))
    ]
    graph.nodes.append(helper.make_node("If", [is_asked], ["step"], then_branch=branches[0], else_branch=branches[1]))


def _rows(graph: _Graph, config: EncoderConfig) -> str:
    """The vectors of the history, (L, D), scaled."""
    return graph("Mul", graph("Gather", ITEMS, "rows", axis=0), graph.floats(math.sqrt(config.width)))


def _last(graph: _Graph, hidden_LD: str) -> str:
    return graph("Gather", hidden_LD, graph.array(-1, dtype=np.int64), axis=0)


def _transformer(graph: _Graph, config: EncoderConfig, *, is_causal: bool) -> str:
    """`fedssl.encoders.sasrec.transformer` for one history."""
    D, heads = config.width, config.heads
    hidden = _rows(graph, config)
    if not is_causal:
        mask = graph("Unsqueeze", graph("Mul", "mask", graph.floats(math.sqrt(D))), graph.ints(0))
        hidden = graph("Concat", hidden, mask, axis=0)
    length = graph("Shape", hidden, start=0, end=1)
    far = graph.ints(np.iinfo(np.int64).max)
    # Position 0 of the table's right edge is the newest event.
    hidden = graph("Add", hidden, graph("Slice", "positions", graph("Neg", length), far, graph.ints(0)))
    forbidden = None
    if is_causal:
        never = graph.floats(np.triu(np.full((config.window, config.window), NEVER), 1))
        forbidden = graph("Slice", never, graph.ints(0, 0), graph("Concat", length, length, axis=0), graph.ints(0, 1))
    for block in range(config.blocks):
        name = f"block{block}."
        normal = graph.layer_norm(hidden, name + "norm1")
        split = graph("Reshape", graph("MatMul", normal, name + "qkv"), graph.ints(0, 3, heads, D // heads))
        query, keys, values = graph.many("Split", 3, graph("Transpose", split, perm=[1, 2, 0, 3]), axis=0, num_outputs=3)
        scores = graph("Mul", graph("MatMul", query, graph("Transpose", keys, perm=[0, 1, 3, 2])), graph.floats((D // heads) ** -0.5))
        if forbidden is not None:
            scores = graph("Add", scores, forbidden)
        read = graph("MatMul", graph("Softmax", scores, axis=-1), values)
        read = graph("Reshape", graph("Transpose", read, perm=[0, 2, 1, 3]), graph.ints(-1, D))
        hidden = graph("Add", hidden, graph("MatMul", read, name + "out"))
        normal = graph.layer_norm(hidden, name + "norm2")
        wide = graph("Relu", graph.linear(normal, name + "up", name + "up.bias"))
        hidden = graph("Add", hidden, graph.linear(wide, name + "down", name + "down.bias"))
    return graph.layer_norm(_last(graph, hidden), "norm")


def _sasrec(graph: _Graph, config: EncoderConfig) -> str:
    return _transformer(graph, config, is_causal=True)


def _bert4rec(graph: _Graph, config: EncoderConfig) -> str:
    return _transformer(graph, config, is_causal=False)


def _gru4rec(graph: _Graph, config: EncoderConfig) -> str:
    """`fedssl.encoders.gru4rec` for one history: ONNX's GRU has our cell, its gates in another order (update, reset, candidate)."""
    hidden = _rows(graph, config)
    for layer in range(config.blocks):
        name, H = f"layer{layer}.", config.hidden

        def reordered(leaf: str, H: int = H) -> NDArray[np.float32]:
            reset, update, candidate = np.split(numpy_helper.to_array(graph.arrays.pop(leaf)), [H, 2 * H], axis=-1)
            return np.concatenate([update, reset, candidate], axis=-1).T[None]

        weight, recurrent, bias = (reordered(name + leaf) for leaf in ("input", "recurrent", "bias"))
        both = np.concatenate([bias.reshape(1, -1), np.zeros((1, 3 * H))], axis=1)
        states = graph(
            "GRU",
            graph("Unsqueeze", hidden, graph.ints(1)),
            graph.floats(weight),
            graph.floats(recurrent),
            graph.floats(both),
            hidden_size=H,
            linear_before_reset=1,
        )
        hidden = graph("Reshape", states, graph.ints(-1, H))
    return graph.layer_norm(graph("MatMul", _last(graph, hidden), "out"), "norm")


def _hgrn(graph: _Graph, config: EncoderConfig) -> str:
    """`fedssl.encoders.hgrn` for one history. The last block is asked for the newest position alone."""
    D = config.width
    hidden = _rows(graph, config)
    for block in range(config.blocks):
        name, is_last = f"block{block}.", block == config.blocks - 1
        normal = graph.layer_norm(hidden, name + "norm")
        weight, bias = (numpy_helper.to_array(graph.arrays.pop(name + leaf)) for leaf in ("in", "in.bias"))
        through_time = graph.linear(normal, graph.floats(weight[:, : 2 * D]), graph.floats(bias[: 2 * D]))
        forget, value = graph.many("Split", 2, through_time, axis=-1, num_outputs=2)
        if is_last:
            hidden, normal = _newest(graph, hidden), _newest(graph, normal)
        gate = graph.linear(normal, graph.floats(weight[:, 2 * D :]), graph.floats(bias[2 * D :]))
        keep = graph("Sigmoid", forget)
        new = graph("Mul", graph("Sub", graph.floats(1.0), keep), value)
        mean = _last_mean(graph, keep, new) if is_last else _running_mean(graph, keep, new, config)
        read = graph("Mul", mean, graph("Mul", gate, graph("Sigmoid", gate)))
        hidden = graph("Add", hidden, graph("MatMul", read, name + "out"))
    return graph.layer_norm(_last(graph, hidden), "norm")


def _newest(graph: _Graph, hidden_LD: str) -> str:
    return graph("Gather", hidden_LD, graph.ints(-1), axis=0)


def _running_mean(graph: _Graph, keep: str, new: str, config: EncoderConfig) -> str:
    """mean[t] = keep[t] * mean[t - 1] + new[t] at all positions: within pieces of about the square root of the window, all at once, then from piece to piece.

    A Scan of ONNX would take three operators a position.
    """
    length = graph("Shape", new, start=0, end=1)
    piece = math.isqrt(config.window - 1) + 1
    pieces = -(-config.window // piece)
    # Zeros before the history, of which nothing is kept.
    pads = graph("Concat", graph("Sub", graph.ints(piece * pieces), length), graph.ints(0, 0, 0), axis=0)
    keeps, news = (
        graph.many("Split", piece, graph("Reshape", graph("Pad", each, pads), graph.ints(pieces, piece, -1)), axis=1, num_outputs=piece) for each in (keep, new)
    )
    means, kept = news[:1], keeps[:1]
    for keep_PD, new_PD in zip(keeps[1:], news[1:], strict=True):
        means.append(graph("Add", graph("Mul", keep_PD, means[-1]), new_PD))
        kept.append(graph("Mul", keep_PD, kept[-1]))
    ends, shares = (graph.many("Split", pieces, each[-1], axis=0, num_outputs=pieces) for each in (means, kept))
    carried = [graph.floats(np.zeros((1, 1, config.width))), ends[0]]
    for end, share in zip(ends[1:-1], shares[1:-1], strict=True):
        carried.append(graph("Add", graph("Mul", share, carried[-1]), end))
    mean = graph("Add", graph("Concat", *means, axis=1), graph("Mul", graph("Concat", *kept, axis=1), graph("Concat", *carried[:pieces], axis=0)))
    flat = graph("Reshape", mean, graph.ints(piece * pieces, -1))
    return graph("Slice", flat, graph("Neg", length), graph.ints(np.iinfo(np.int64).max), graph.ints(0))


def _last_mean(graph: _Graph, keep: str, new: str) -> str:
    """The newest of `_running_mean`, (1, D): each event by the product of what was kept since."""
    logarithm = graph("Log", keep)
    since = graph("CumSum", logarithm, graph.array(0, dtype=np.int64), exclusive=1, reverse=1)
    return graph("ReduceSum", graph("Mul", graph("Exp", since), new), graph.ints(0), keepdims=1)


_GRAPHS: dict[str, Callable[[_Graph, EncoderConfig], str]] = {"sasrec": _sasrec, "bert4rec": _bert4rec, "gru4rec": _gru4rec, "hgrn": _hgrn}
