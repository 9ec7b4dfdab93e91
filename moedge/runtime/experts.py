"""The experts implementation that plugs into transformers: same maths as its eager one, weights from an expert store.

Results are bit-equal to eager at equal input shapes: each expert sees its tokens in eager's order, and outputs are
added in expert-index order whatever the order in which the experts arrived. Knows hidden states and experts, no disk.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moedge.errors import ModelError
from moedge.models.anatomy import Anatomy, MoeLayer, expert_modules
from moedge.runtime.product import product
from moedge.runtime.store import ExpertStore, Parameters

if TYPE_CHECKING:
    from moedge.runtime.coded import CodedLayer

Shapes = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
Multiply = Callable[[Tensor, Parameters, str, bool], Tensor]
Rows = tuple[Tensor, Tensor]  # token and position in its top-k, [N] each
Observer = Callable[[int, Tensor, Rows | None], None]  # expert, its output [N, H]; rows None: as `choices` has them
_CLOSED = "this model was closed: load it again with moedge.load"
IMPLEMENTATION = "moedge"  # the name in transformers' registry of experts implementations


def experts_forward(module: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """What transformers calls in place of the module's eager forward: [T, H], [T, k], [T, k] -> [T, H]."""
    source: ExpertSource = module._moedge_source
    if torch.is_grad_enabled() and (hidden.requires_grad or weights.requires_grad):
        return _Reread.apply(module, source, hidden, index, weights)  # type: ignore[no-any-return, no-untyped-call]
    return _mix(module, source, hidden, index, weights)


class ExpertSource:
    """One layer's view of the store, which it has not after LM.close: using the model then is an error, not a crash."""

    def __init__(self, layer: MoeLayer) -> None:
        self.store: ExpertStore | None = None
        self.coded: CodedLayer | None = None  # where the experts are not plain
        self.observer: Observer | None = None  # sees what each expert gives, before the router's weight
        self._layer, self._num_experts, self._shapes = layer.index, layer.num_experts, layer.parameters
        self._sum_dtypes: dict[tuple[torch.dtype, torch.dtype], torch.dtype] = {}

    def sum_dtype(self, module: Any, hidden: Tensor, weights: Tensor) -> torch.dtype:
        """In which dtype the eager forward adds its experts' outputs: Nemotron-H and Inkling 2 take float32."""
        key = hidden.dtype, weights.dtype
        if key not in self._sum_dtypes:
            self._sum_dtypes[key] = _eager_sum_dtype(module, self._num_experts, self._shapes, hidden, weights)
        return self._sum_dtypes[key]

    def fetch(self, index: Tensor, weights: Tensor | None) -> Iterator[tuple[int, Parameters]]:
        """The experts that `index` ([T, k]) names, each once; ids beyond the layer's experts mean "none"."""
        store, experts, probabilities = self._asked(index, weights)
        fetched = store.fetch(self._layer, experts, probabilities)
        return fetched if self.coded is None else self.coded.decode(fetched)

    def mix(self, coded: "CodedLayer", hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """The layer's result straight from the extents of its experts."""
        store, experts, probabilities = self._asked(index, weights)
        batches = store.batches(self._layer, experts, probabilities)
        if len(index) == 1 and len(experts) == index.shape[1] and probabilities:  # none twice: the lists say it all
            return coded.mix_token(hidden, experts, probabilities, batches)
        return coded.mix(hidden, index, weights, experts, batches)

    def mix_token(self, hidden: Tensor, experts: list[int], weights: list[float]) -> Tensor:
        """The same for one token whose distinct experts are known, in ascending order; [1, H] -> [1, H]."""
        if self.store is None:
            raise ModelError(_CLOSED)
        assert self.coded is not None
        return self.coded.mix_token(hidden, experts, weights, self.store.batches(self._layer, experts, weights))

    def _asked(self, index: Tensor, weights: Tensor | None) -> tuple[ExpertStore, list[int], list[float] | None]:
        if self.store is None:
            raise ModelError(_CLOSED)
        return self.store, *_distinct(index, weights, self._num_experts)


def _distinct(index: Tensor, weights: Tensor | None, num_experts: int) -> tuple[list[int], list[float] | None]:
    """The distinct experts of `index` in ascending order and the router weight that each carries over all tokens."""
    if weights is None:
        return [e for e in torch.unique(index).tolist() if e < num_experts], None
    if len(index) == 1:  # decode; a table from token to experts (DeepSeek V4) may name one twice
        of_expert: dict[int, float] = {}
        for expert, weight in sorted(zip(index[0].tolist(), weights[0].tolist(), strict=True)):
            if expert < num_experts:
                of_expert[expert] = of_expert.get(expert, 0.0) + weight
        return list(of_expert), list(of_expert.values())
    mass = torch.zeros(int(index.max()) + 1, dtype=torch.float32)
    mass.index_add_(0, index.reshape(-1).long(), weights.reshape(-1).float())
    experts = [e for e in torch.unique(index).tolist() if e < num_experts]
    return experts, mass[experts].tolist()


def _rows(index: Tensor, expert: int) -> tuple[Tensor, Tensor]:
    """(position in the top-k, token) of the rows routed to `expert`, in eager's order."""
    position, token = torch.where((index == expert).T)
    return position, token


def _mix(module: Any, source: ExpertSource, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    # [T, H], [T, k], [T, k] -> [T, H]
    if source.coded is not None and source.coded.kernel is not None and source.observer is None:
        return source.mix(source.coded, hidden, index, weights)
    if len(hidden) == 1 and source.observer is None:
        return _mix_one(module, source, hidden, index, weights)
    done: dict[int, tuple[Tensor, Tensor]] = {}  # expert -> tokens [N], weighted outputs [N, H]
    for expert, parameters in source.fetch(index, weights):
        position, token = _rows(index, expert)
        value = feed_forward(module, parameters, hidden[token])
        if source.observer is not None:
            source.observer(expert, value, (token, position))
        done[expert] = token, value * weights[token, position, None]
    out = torch.zeros_like(hidden, dtype=source.sum_dtype(module, hidden, weights))
    for expert in sorted(done):
        token, value = done[expert]
        out.index_add_(0, token, value.to(out.dtype))
    return out.to(hidden.dtype)


def _mix_one(module: Any, source: ExpertSource, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """As _mix for a single token, without looking for each expert's rows: these take longer than some experts."""
    places: dict[int, list[int]] = {}  # a table from token to experts (DeepSeek V4) may name one twice
    for place, expert in enumerate(index[0].tolist()):
        places.setdefault(expert, []).append(place)
    once, columns = hidden.clone(), weights.T.unbind()  # as eager's own row: its address is aligned
    done: dict[int, Tensor] = {}
    for expert, parameters in source.fetch(index, weights):
        first, *more = places[expert]
        rows = hidden.repeat(1 + len(more), 1) if more else once
        done[expert] = feed_forward(module, parameters, rows) * (weights.T[places[expert]] if more else columns[first])
    out = torch.zeros_like(hidden, dtype=source.sum_dtype(module, hidden, weights))
    for expert in sorted(done):
        for value in done[expert].to(out.dtype).unbind():
            out += value
    return out.to(hidden.dtype)


def _eager_sum_dtype(module: Any, num_experts: int, shapes: Shapes, hidden: Tensor, weights: Tensor) -> torch.dtype:
    """Run the eager forward on one token, with zeros that take no memory for weights, and see in what it adds."""
    for name, (shape, dtype) in shapes.items():
        setattr(module, name, torch.zeros((), dtype=dtype).expand(num_experts, *shape))
    try:
        with torch.no_grad(), _SeeSum() as seen:
            index = torch.zeros(1, weights.shape[1], dtype=torch.long)
            type(module).forward.__wrapped__(module, torch.zeros_like(hidden[:1]), index, torch.zeros_like(weights[:1]))
    finally:
        for name in shapes:
            delattr(module, name)
    return seen.dtype or hidden.dtype


class _SeeSum(TorchFunctionMode):
    """Notes the dtype of the tensor that index_add_ adds to."""

    dtype: torch.dtype | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.index_add_:
            self.dtype = args[0].dtype
        return func(*args, **(kwargs or {}))


def multiply(x: Tensor, parameters: Parameters, name: str, transposed: bool) -> Tensor:
    """The rows [N, I] by one matrix of an expert, [O, I] or transposed [I, O] -> [N, O]."""
    return torch.matmul(x, parameters[name]) if transposed else product(x, parameters, name)


def feed_forward(module: Any, parameters: Parameters, x: Tensor, multiply: Multiply = multiply) -> Tensor:
    """One expert on its rows, [N, H] -> [N, H], as the flags of transformers' decorator on `module` say."""
    up = "gate_up_proj" if module.has_gate else "up_proj"
    x = multiply(x, parameters, up, module.is_transposed)
    if module.has_bias:
        x = x + parameters[f"{up}_bias"]
    x = module._apply_gate(x) if module.has_gate else module.act_fn(x)
    x = multiply(x, parameters, "down_proj", module.is_transposed)
    if module.has_bias:
        x = x + parameters["down_proj_bias"]
    return module.post_expert_norm(x) if module.has_post_expert_norm else x


class _Reread(torch.autograd.Function):
    """Keeps no expert for backward, as slots are reused: backward fetches them again. Experts get no gradient."""

    @staticmethod
    def forward(ctx: Any, module: Any, source: ExpertSource, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        ctx.module, ctx.source = module, source
        ctx.save_for_backward(hidden, index, weights)
        return _mix(module, source, hidden, index, weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_out,) = grads
        hidden, index, weights = ctx.saved_tensors
        done: dict[int, tuple[Tensor, Tensor]] = {}
        grad_weights = torch.zeros_like(weights)
        for expert, parameters in ctx.source.fetch(index, None):
            position, token = _rows(index, expert)
            with torch.enable_grad():
                x = hidden[token].detach().requires_grad_()
                w = weights[token, position, None].detach().requires_grad_()
                y = feed_forward(ctx.module, parameters, x) * w  # [N, H] * [N, 1]
                grad_x, grad_w = torch.autograd.grad(y, (x, w), grad_out[token].to(y.dtype))
            grad_weights[token, position] = grad_w[:, 0]
            done[expert] = token, grad_x
        grad_hidden = torch.zeros_like(hidden)
        for expert in sorted(done):
            grad_hidden.index_add_(0, *done[expert])
        return None, None, grad_hidden, None, grad_weights


class LazyExpert(nn.Module):
    """Stands for one expert of a family that holds a module per expert (Switch Transformers, NLLB-MoE).

    `skeleton` is the expert's module on the meta device; each call is an event of one expert.
    """

    def __init__(self, skeleton: nn.Module, source: ExpertSource, expert: int) -> None:
        super().__init__()
        object.__setattr__(self, "_skeleton", skeleton.eval())  # not a submodule: its parameters are not the model's
        self._source, self._expert = source, torch.tensor([[expert]], device="cpu")

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            return _RereadModule.apply(self, x)  # type: ignore[no-any-return, no-untyped-call]
        return self.run(x)

    def run(self, x: Tensor) -> Tensor:
        for _, parameters in self._source.fetch(self._expert, None):
            result: Tensor = torch.func.functional_call(self._skeleton, dict(parameters), (x,))  # type: ignore[arg-type]
        if self._source.observer is not None:
            self._source.observer(int(self._expert), result, None)
        return result


class _RereadModule(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, expert: LazyExpert, x: Tensor) -> Tensor:
        ctx.expert = expert
        ctx.save_for_backward(x)
        return expert.run(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        (x,) = ctx.saved_tensors
        for _, parameters in ctx.expert._source.fetch(ctx.expert._expert, None):
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                y = torch.func.functional_call(ctx.expert._skeleton, dict(parameters), (x,))
                (grad_x,) = torch.autograd.grad(y, (x,), grads)
        return None, grad_x


def take_out_experts(model: nn.Module, anatomy: Anatomy) -> list[ExpertSource]:
    """Remove the expert parameters of a meta model and put sources in their place, to be filled by `connect`."""
    sources = []
    for layer in anatomy.layers:
        module: Any = model.get_submodule(layer.experts)
        source = ExpertSource(layer)
        sources.append(source)
        if layer.kind.modular:
            for expert, (name, skeleton) in enumerate(expert_modules(module).items()):
                module[name] = LazyExpert(skeleton, source, expert)
            _mark_initialised(model.get_submodule(layer.block))
        else:
            for name in layer.parameters:
                delattr(module, name)
            module._moedge_source = source
        _mark_initialised(module)
    return sources


def _mark_initialised(module: nn.Module) -> None:
    """Keep transformers from initialising the weights that are not there."""
    module._is_hf_initialized = True  # type: ignore[assignment]


def source_of(experts: nn.Module) -> ExpertSource:
    """The source that take_out_experts gave to the experts module of a layer."""
    holder: Any = next(iter(expert_modules(experts).values()), None)
    source: ExpertSource = experts._moedge_source if holder is None else holder._source  # type: ignore[assignment]
    return source


def connect(sources: Sequence[ExpertSource], store: ExpertStore | None) -> None:
    """Give every layer its store, or none when it is closed."""
    for source in sources:
        source.store = store


def register() -> None:
    """Make the implementation known to transformers; doing it again changes nothing."""
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)
