"""A model as a network of operators, as the coordinator's REST API tells it."""

import msgspec


class GraphTensor(msgspec.Struct, frozen=True):
    """A tensor that goes in or comes out. ``datatype`` as the Open Inference Protocol names it, empty where that has no name for it;
    ``shape`` has a name for an axis that is free, "?" where it has none."""

    name: str
    datatype: str
    shape: list[int | str]


class GraphNode(msgspec.Struct, frozen=True):
    """One operator. ``inputs`` and ``outputs`` are tensors by name, weights left out; ``parameters`` is how many numbers its weights have,
    ``weights`` their shapes as text; ``shape`` is that of its first output where the file says so; ``inner`` counts the operators in its
    branches."""

    op: str
    name: str
    inputs: list[str] = []
    outputs: list[str] = []
    parameters: int = 0
    weights: list[str] = []
    shape: str = ""
    inner: int = 0


class ModelGraph(msgspec.Struct, frozen=True):
    """What is in a file. ``is_cut``: it has more operators than are listed. ``labels`` is what an index of its last axis stands for, where
    the file's metadata says so."""

    producer: str
    opset: int
    inputs: list[GraphTensor]
    outputs: list[GraphTensor]
    nodes: list[GraphNode]
    operators: dict[str, int]
    parameters: int
    weight_bytes: int
    is_cut: bool = False
    labels: list[str] = []
