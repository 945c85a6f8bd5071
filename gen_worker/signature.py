"""The one inspector of tenant functions: what a marked function takes, returns and how it runs.

Owns: the rules. Discovery, the executor and the test harness all learn a function from here, so that a broken
signature is a SignatureError that names function, parameter and rule before any request comes.

1. `collect_functions` finds what the decorators marked in modules that are already imported.
2. `inspect_function` resolves the annotations and sorts the parameters: ctx first, then one payload struct (or one
   RealtimeSocket) and the injected models in any order. A host calls `func(ctx, **{payload_param: payload, **models})`.
3. FunctionSpec is the product; its schemas are built, and so checked, at once.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType, NoneType
from typing import Any, Final, Literal, get_args, get_origin, get_type_hints

import msgspec

from gen_worker.annotations import is_a, optional_of, show, split_annotated
from gen_worker.context import ActionContext
from gen_worker.decorators import Definition, ResourceRequirements, definition_of
from gen_worker.errors import SignatureError
from gen_worker.injection import ModelRef, ModelRefSource, qualified_name
from gen_worker.pipe.messages import FunctionMode
from gen_worker.realtime import RealtimeSocket

_SYNC_STREAMS: Final = (Iterator, Iterable, Generator)
_ASYNC_STREAMS: Final = (AsyncIterator, AsyncIterable, AsyncGenerator)
_MISSING: Final = inspect.Parameter.empty


@dataclass(frozen=True)
class InjectionSpec:
    """One injected model parameter."""

    param: str
    type: Any
    ref: ModelRef

    @property
    def type_name(self) -> str:
        """`module.QualName` of the injected type."""
        return qualified_name(self.type)


@dataclass(frozen=True)
class FunctionSpec:
    """Everything a host needs to know of one tenant function. Schemas are compact, sorted JSON."""

    name: str
    module: str
    func: Callable[..., Any]
    mode: FunctionMode
    ctx_param: str
    payload_param: str
    """Empty for a websocket handler."""
    payload_type: type[msgspec.Struct] | None
    output_type: type[msgspec.Struct] | None
    """Of the output, or of one delta when `incremental`; None for a websocket handler."""
    socket_param: str
    """Empty unless this is a websocket handler."""
    injections: tuple[InjectionSpec, ...]
    resources: ResourceRequirements
    input_schema: bytes = field(repr=False)
    output_schema: bytes = field(repr=False)

    @property
    def qualified_name(self) -> str:
        """`module.qualname` of the function, as errors name it."""
        return _describe(self.func)

    @property
    def incremental(self) -> bool:
        """Whether the output comes as a stream of deltas."""
        return self.mode in {"generator", "async_generator"}

    @property
    def delta_schema(self) -> bytes:
        """That of one delta (the same as output_schema) when incremental, else empty."""
        return self.output_schema if self.incremental else b""

    @property
    def injection_json(self) -> bytes:
        """The list of `{"param", "type", "model_ref": {"source", "key"}}` that the scheduler gets."""
        entries = [
            {"param": i.param, "type": i.type_name, "model_ref": {"source": i.ref.source.value, "key": i.ref.key}}
            for i in self.injections
        ]
        return msgspec.json.encode(entries, order="sorted")


def collect_functions(modules: Iterable[ModuleType]) -> tuple[FunctionSpec, ...]:
    """The marked functions of imported modules, in order, each once however often it is re-exported.

    Raises SignatureError: for a broken signature, a marked method, and two functions of one name.
    """
    found: dict[str, FunctionSpec] = {}
    for module in modules:
        for candidate in _marked(module):
            spec = inspect_function(candidate)
            other = found.setdefault(spec.name, spec)
            if other.func is not candidate:
                raise SignatureError(
                    f"two functions are called {spec.name!r}: {other.qualified_name} and {spec.qualified_name}; "
                    "the scheduler knows a function by its bare name, so rename one"
                )
    return tuple(found.values())


def inspect_function(func: Callable[..., Any]) -> FunctionSpec:
    """The spec of one marked function; runs none of its code. Raises SignatureError."""
    definition = definition_of(func)
    fail = partial(_failure, func)
    if definition is None:
        raise fail("has neither @worker_function() nor @worker_websocket()")
    _check_target(func, definition)
    parameters = list(inspect.signature(func).parameters.values())
    hints = _resolve_hints(func)
    ctx_param = _check_context(func, parameters, hints)
    rest = _Parameters(func, parameters[1:], hints)
    payload_param, payload_type, output_type, socket_param = "", None, None, ""
    mode: FunctionMode = "websocket"
    if definition.kind == "websocket":
        socket_param = _check_websocket(func, rest, hints)
    else:
        payload_param, payload_type = _check_payload(func, rest)
        mode, output_type = _check_return(func, hints.get("return", _MISSING))
    return FunctionSpec(
        name=func.__name__,
        module=func.__module__,
        func=func,
        mode=mode,
        ctx_param=ctx_param,
        payload_param=payload_param,
        payload_type=payload_type,
        output_type=output_type,
        socket_param=socket_param,
        injections=rest.injections,
        resources=definition.resources,
        input_schema=_schema(func, payload_type, f"parameter {payload_param!r}"),
        output_schema=_schema(func, output_type, "the return annotation"),
    )


# -- finding --------------------------------------------------------------------------------------


def _marked(module: ModuleType) -> Iterator[Callable[..., Any]]:
    for value in vars(module).values():
        if definition_of(value) is not None:
            yield value
        elif isinstance(value, type) and value.__module__ == module.__name__:
            for member in vars(value).values():
                function = getattr(member, "__func__", member)
                if definition_of(function) is not None:
                    yield function


def _check_target(func: Callable[..., Any], definition: Definition) -> None:
    fail = partial(_failure, func)
    if definition.func is not func:
        raise fail("is wrapped by a decorator above the worker decorator: the worker decorator must be the topmost")
    if not inspect.isfunction(func):
        raise fail(f"is a {type(func).__name__}: only plain functions can be worker functions")
    owner = func.__qualname__.rpartition(".")[0]
    if owner and not owner.endswith("<locals>"):
        raise fail("is a method: only functions at module level can be worker functions")
    inner = inspect.unwrap(func)
    if inspect.iscoroutinefunction(inner) and not inspect.iscoroutinefunction(func):
        raise fail("is an async function inside a decorator that is not: the decorator must be async too")
    limit = definition.resources.max_concurrency
    if limit is not None and (type(limit) is not int or limit < 1):
        raise fail(f"has max_concurrency={limit!r}: it must be a whole number of at least 1, or None")


# -- parameters -----------------------------------------------------------------------------------


class _Parameters:
    """The parameters after ctx, sorted by what their annotations ask for."""

    def __init__(self, func: Callable[..., Any], parameters: list[inspect.Parameter], hints: dict[str, Any]) -> None:
        self.payloads: dict[str, type[msgspec.Struct]] = {}
        self.sockets: list[str] = []
        injections: list[InjectionSpec] = []
        for parameter in parameters:
            name, hint = parameter.name, hints.get(parameter.name, _MISSING)
            _check_kind(func, parameter)
            if hint is _MISSING:
                raise _failure(func, "has no annotation", name)
            plain, extras = split_annotated(hint)
            refs = [extra for extra in extras if isinstance(extra, ModelRef)]
            if refs:
                injections.append(_injection(func, name, plain, refs))
            elif is_a(plain, RealtimeSocket):
                self.sockets.append(name)
            else:
                self.payloads[name] = _struct(func, plain, name)
        self.injections = tuple(injections)


def _check_context(func: Callable[..., Any], parameters: list[inspect.Parameter], hints: dict[str, Any]) -> str:
    if not parameters:
        raise _failure(func, "takes no parameters: the first must be ctx: ActionContext")
    first = parameters[0]
    hint = hints.get(first.name, _MISSING)
    if not is_a(hint, ActionContext):
        found = "has no annotation" if hint is _MISSING else f"is {show(hint)}"
        raise _failure(func, f"{found}: the first parameter must be ctx: ActionContext", first.name)
    if first.kind not in {first.POSITIONAL_ONLY, first.POSITIONAL_OR_KEYWORD}:
        raise _failure(func, f"is {first.kind.description}: ctx is passed by position", first.name)
    return first.name


def _check_kind(func: Callable[..., Any], parameter: inspect.Parameter) -> None:
    if parameter.kind in {parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD}:
        stars = "*" if parameter.kind is parameter.VAR_POSITIONAL else "**"
        raise _failure(func, "is not allowed: every parameter must be named and annotated", stars + parameter.name)
    if parameter.kind is parameter.POSITIONAL_ONLY:
        raise _failure(func, "is positional-only: parameters after ctx are passed by keyword", parameter.name)


def _struct(func: Callable[..., Any], hint: Any, name: str) -> type[msgspec.Struct]:
    if optional_of(hint) is not None:
        rule = f"is {show(hint)}: a payload always comes, so annotate it with the struct alone"
        raise _failure(func, rule, name)
    if is_a(get_origin(hint), msgspec.Struct):
        raise _failure(func, f"is {show(hint)}: make a subclass of the generic struct and use that", name)
    if not is_a(hint, msgspec.Struct):
        rule = f"is {show(hint)}: it must be the payload (a msgspec.Struct) or Annotated[T, ModelRef(source, key)]"
        raise _failure(func, rule, name)
    return hint


def _injection(func: Callable[..., Any], name: str, hint: Any, refs: list[ModelRef]) -> InjectionSpec:
    if len(refs) > 1:
        raise _failure(func, "has more than one ModelRef", name)
    if not isinstance(hint, type) or get_origin(hint) is not None:
        raise _failure(func, f"injects {show(hint)}: what is injected must be a class", name)
    if not refs[0].key:
        raise _failure(func, "has a ModelRef without a key", name)
    return InjectionSpec(name, hint, refs[0])


def _check_payload(func: Callable[..., Any], rest: _Parameters) -> tuple[str, type[msgspec.Struct]]:
    if rest.sockets:
        raise _failure(func, "is a RealtimeSocket: only a @worker_websocket() handler gets one", rest.sockets[0])
    if not rest.payloads:
        raise _failure(func, "has no payload: exactly one parameter must be a msgspec.Struct")
    if len(rest.payloads) > 1:
        names = " and ".join(repr(name) for name in rest.payloads)
        raise _failure(func, f"has {len(rest.payloads)} payloads, {names}: exactly one parameter is a msgspec.Struct")
    (name, payload_type), = rest.payloads.items()  # fmt: skip
    for injection in rest.injections:
        if injection.ref.source is ModelRefSource.PAYLOAD:
            _check_payload_key(func, injection, payload_type)
    return name, payload_type


def _check_payload_key(func: Callable[..., Any], injection: InjectionSpec, payload_type: type[msgspec.Struct]) -> None:
    fail, key, struct = partial(_failure, func, param=injection.param), injection.ref.key, payload_type.__qualname__
    fields = {item.name: item for item in msgspec.structs.fields(payload_type)}
    if key not in fields:
        raise fail(f"takes its model from payload field {key!r}, which {struct} has not; it has: {', '.join(fields)}")
    if fields[key].encode_name != key:
        raise fail(f"takes its model from payload field {key!r}, which is renamed to {fields[key].encode_name!r}")
    hint = split_annotated(fields[key].type)[0]
    inner = optional_of(hint) or hint
    named = get_origin(inner) is Literal and all(isinstance(value, str) for value in get_args(inner))
    if inner is not str and not named:
        raise fail(f"takes its model from payload field {key!r}, which is {show(hint)}: it must be str or str | None")


def _check_websocket(func: Callable[..., Any], rest: _Parameters, hints: dict[str, Any]) -> str:
    fail = partial(_failure, func)
    if not inspect.iscoroutinefunction(func):
        raise fail("is a websocket handler, so it must be `async def` and not yield")
    if len(rest.sockets) != 1:
        raise fail(f"has {len(rest.sockets)} RealtimeSocket parameters: a websocket handler has exactly one")
    if rest.payloads:
        raise fail("is a struct: a websocket handler has no payload", next(iter(rest.payloads)))
    for injection in rest.injections:
        if injection.ref.source is ModelRefSource.PAYLOAD:
            raise fail("takes its model from the payload: a websocket handler has none", injection.param)
    if hints.get("return", NoneType) is not NoneType:
        raise fail(f"returns {show(hints['return'])}: a websocket handler returns None")
    return rest.sockets[0]


# -- output ---------------------------------------------------------------------------------------


def _check_return(func: Callable[..., Any], hint: Any) -> tuple[FunctionMode, type[msgspec.Struct]]:
    fail = partial(_failure, func)
    if hint is _MISSING:
        raise fail("has no return annotation: it must be a msgspec.Struct or an Iterator of one")
    plain = split_annotated(hint)[0]
    origin = get_origin(plain) or plain
    if origin in _SYNC_STREAMS or origin in _ASYNC_STREAMS:
        arguments = get_args(plain)
        item: Any = split_annotated(arguments[0])[0] if arguments else None
        if not is_a(item, msgspec.Struct):
            raise fail(f"returns {show(hint)}: what it yields must be one msgspec.Struct type")
        return _stream_mode(func, hint, is_async=origin in _ASYNC_STREAMS), item
    if optional_of(plain) is not None:
        raise fail(f"returns {show(hint)}: an output is never None, so annotate it with the struct alone")
    if not is_a(plain, msgspec.Struct):
        raise fail(f"returns {show(hint)}: it must be a msgspec.Struct or an Iterator of one")
    if inspect.isgeneratorfunction(func) or inspect.isasyncgenfunction(func):
        kind = "AsyncIterator" if inspect.isasyncgenfunction(func) else "Iterator"
        raise fail(f"yields but returns {show(hint)}: annotate it -> {kind}[{plain.__name__}]")
    return ("async" if inspect.iscoroutinefunction(func) else "sync"), plain


def _stream_mode(func: Callable[..., Any], hint: Any, *, is_async: bool) -> FunctionMode:
    if inspect.iscoroutinefunction(func):
        raise _failure(func, f"is async and returns {show(hint)} but never yields: yield the deltas")
    if inspect.isasyncgenfunction(func) and not is_async:
        raise _failure(func, f"is an async generator but returns {show(hint)}: annotate it -> AsyncIterator[...]")
    if inspect.isgeneratorfunction(func) and is_async:
        raise _failure(func, f"is a plain generator but returns {show(hint)}: make it `async def`, or use Iterator")
    return "async_generator" if is_async else "generator"


# -- resolving and schemas ------------------------------------------------------------------------


def _resolve_hints(func: Callable[..., Any]) -> dict[str, Any]:
    try:
        return get_type_hints(func, include_extras=True)
    except NameError as error:
        rule = f"has an annotation that names {error.name!r}, which is not defined at run time"
        advice = "import it outside of `if TYPE_CHECKING:` and define it at module level"
        raise _failure(func, f"{rule}: {advice}") from error
    except (TypeError, SyntaxError, AttributeError) as error:
        raise _failure(func, f"has an annotation that can't be resolved: {error}") from error


def _schema(func: Callable[..., Any], struct: type[msgspec.Struct] | None, where: str) -> bytes:
    if struct is None:
        return b""
    if struct.__struct_config__.array_like:
        raise _failure(func, f"uses {struct.__qualname__} in {where}, which is array_like: it must encode as a map")
    try:
        msgspec.msgpack.Decoder(struct)
        return msgspec.json.encode(msgspec.json.schema(struct), order="sorted")
    except NameError as error:
        rule = f"uses {struct.__qualname__} in {where}, whose fields name {error.name!r}, not defined at run time"
        raise _failure(func, rule) from error
    except (TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise _failure(func, f"uses {struct.__qualname__} in {where}, which has no schema: {reason}") from error


def _describe(func: Callable[..., Any]) -> str:
    return f"{func.__module__}.{getattr(func, '__qualname__', func)}"


def _failure(func: Callable[..., Any], rule: str, param: str = "") -> SignatureError:
    where = f"{_describe(func)}: parameter {param!r} " if param else f"{_describe(func)} "
    return SignatureError(where + rule)
