"""A Keras model as a torch module: the same layers in the same graph, with the same weights."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from recurd_export.errors import ExportError
from recurd_export.keras import layers, operations, shaping
from recurd_export.keras.arrays import is_operation, own_name
from recurd_export.keras.built import Built
from recurd_export.keras.place import Place, label
from recurd_export.keras.recurrent import RECURRENT


@dataclass(frozen=True)
class Call:
    """One call of a module: values by number."""

    module: str
    inputs: tuple[int, ...]
    finish: Callable[[Any], Any]
    outputs: tuple[int, ...]


@dataclass
class Notes:
    """What is noted down about the Keras model on the way; owned by who translates."""

    #: By path in the torch module, names of the Keras layers that lead to a recurrent one.
    recurrent: dict[str, tuple[str, ...]] = field(default_factory=dict)
    #: By ``id`` of Reshape layers over time, the sizes of a step behind them.
    reshaped: dict[int, tuple[int, ...]] = field(default_factory=dict)
    #: Layers, by their label, that torch does not have (by their activations, or reset_after=False).
    unusual: list[str] = field(default_factory=list)
    #: What the model computes in, where that is not float32.
    coarse: str = ""


class Twin(nn.Module):
    """Takes the model's input; gives its outputs: by name, or, inside another one, as Keras does."""

    def __init__(self, model: Any, timed: Sequence[bool], notes: Notes, lead: tuple[tuple[str, str], ...] = ()) -> None:
        """``lead``: names of the models around this one, in torch and in Keras."""
        super().__init__()
        graph = _Graph(self, model, timed, notes, lead)
        numbers = tuple(map(graph.number, model.outputs))
        self._results = numbers
        self._names = None if lead else _output_names(model)
        self.calls = tuple(graph.calls)
        #: Of every output, whether it has a time axis.
        self.timed = tuple(graph.timed[number] for number in numbers)
        #: Whether the first input goes into embeddings and nowhere else.
        self.takes_ids = graph.takes_ids

    def forward(self, *inputs: Tensor) -> Any:
        """See the class."""
        values: dict[int, Any] = dict(enumerate(inputs))
        for call in self.calls:
            result = call.finish(self.get_submodule(call.module)(*(values[number] for number in call.inputs)))
            each = result if isinstance(result, tuple) else (result,)
            values |= zip(call.outputs, each, strict=True)
        results = [values[number] for number in self._results]
        if self._names is not None:
            return dict(zip(self._names, results, strict=True))
        return results[0] if len(results) == 1 else tuple(results)


class _Graph:
    """Follows a model from its outputs to its inputs, and registers a module for every call. Owned by one twin."""

    def __init__(
        self, twin: Twin, model: Any, timed: Sequence[bool], notes: Notes, lead: tuple[tuple[str, str], ...]
    ) -> None:
        self._twin = twin
        self._notes = notes
        self._lead = lead
        self._numbers: dict[int, int] = {id(tensor): number for number, tensor in enumerate(model.inputs)}
        self._keep = list(model.inputs)  # ids are of living tensors
        self.timed = dict(enumerate(timed))
        self.calls: list[Call] = []
        self._consumers: list[bool] = []

    @property
    def takes_ids(self) -> bool:
        """See :class:`Twin`."""
        return bool(self._consumers) and all(self._consumers)

    def number(self, tensor: Any) -> int:
        """The number of a symbolic tensor's value, whatever makes it being called first."""
        if id(tensor) not in self._numbers:
            operation, node_index, _ = tensor._keras_history
            self._call(operation, operation._inbound_nodes[node_index])
        return self._numbers[id(tensor)]

    def _call(self, operation: Any, node: Any) -> None:
        given = list(node.input_tensors)
        if not given:
            raise ExportError(f"{label(operation)} makes something of nothing, which cannot be exported")
        inputs = tuple(map(self.number, given))
        self._note_type(operation)
        place = Place(operation, tuple(tuple(t.shape) for t in given), tuple(self.timed[n] for n in inputs))
        name = _free_name(self._twin, operation.name)
        built = self._build(place, node, name)
        self._twin.add_module(name, built.module)
        outputs = []
        timed = built.timed or (place.is_timed,)
        for index, tensor in enumerate(node.outputs):
            outputs.append(len(self._numbers))
            self._numbers[id(tensor)] = outputs[-1]
            self._keep.append(tensor)
            self.timed[outputs[-1]] = timed[index]
        if 0 in inputs:
            inner = built.module
            self._consumers.append(inner.takes_ids if isinstance(inner, Twin) else own_name(operation) == "Embedding")
        self.calls.append(Call(name, inputs, built.finish, tuple(outputs)))

    def _build(self, place: Place, node: Any, name: str) -> Built:
        operation = place.layer
        if is_operation(operation):
            return operations.build(place, node)
        if own_name(operation) == "TimeDistributed":
            # The layer inside counts its axes without time, and works on them from the end.
            inner = Place(operation.layer, ((place.shape[0], *place.shape[2:]),), (False,))
            built = self._build(inner, node, name)
            return Built(built.module, built.finish, place.timed)
        if is_graph(operation):
            nested = Twin(operation, place.timed, self._notes, (*self._lead, (name, operation.name)))
            return Built(nested, timed=nested.timed)
        built = layers.build(place)
        kind = own_name(operation)
        if kind in RECURRENT:
            self._note_recurrent(place, name)
            if hasattr(built.module, "onnx_options"):
                self._notes.unusual.append(place.label)
        if kind == "Reshape" and place.is_timed:
            self._notes.reshaped[id(operation)] = shaping.reshaped_step(place)
        return built

    def _note_type(self, operation: Any) -> None:
        policy = getattr(operation, "dtype_policy", None)
        if policy is None or policy.name == "float32":
            return
        if getattr(policy, "quantization_mode", None):
            raise ExportError(
                f"{label(operation)} is quantised ({policy.name}); export the model as it was before quantize()"
            )
        self._notes.coarse = policy.name

    def _note_recurrent(self, place: Place, name: str) -> None:
        path, lead = zip(*self._lead, (name, place.layer.name), strict=True)
        if lead in self._notes.recurrent.values():
            raise ExportError(
                f"{place.label} is called twice, and as a stateful layer it has one state only; make it two layers"
            )
        self._notes.recurrent[".".join(path)] = lead


def is_graph(layer: Any) -> bool:
    """Whether it is a Sequential or functional model, whose layers can be seen."""
    import keras

    functional = _functional()
    if isinstance(layer, keras.Sequential):
        return hasattr(layer, "inputs")  # once it is built
    return isinstance(layer, functional) and type(layer).call is functional.call


def _functional() -> Any:
    """The class of functional models, which Keras does not export."""
    import keras

    x = keras.Input((1,))
    return type(keras.Model(x, x))


def ends(model: Any) -> tuple[Any, Any]:
    """The symbolic input and output of a model in the nests they were given in."""
    import keras

    if isinstance(model, keras.Sequential):
        return model.inputs[0], model.outputs[0]
    return model.input, model.output


def _output_names(model: Any) -> list[str]:
    """Keys of a dictionary of outputs, else the names of the layers they come from, made unique."""
    _, struct = ends(model)
    names = [tensor._keras_history.operation.name for tensor in model.outputs]
    if isinstance(struct, dict) and len(struct) == len(names):
        names = sorted(struct)
    unique: list[str] = []
    for name in names:
        count = sum(other.partition("@")[0] == name for other in unique)
        unique.append(f"{name}@{count + 1}" if count else name)
    return unique


def _free_name(twin: nn.Module, name: str) -> str:
    """A name torch takes, that is not taken."""
    name = name.replace(".", "_")
    while hasattr(twin, name):
        name += "_"
    return name
