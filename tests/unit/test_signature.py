"""The inspector: what a function is understood as, and a clear error for each broken rule.

The annotations of this module are strings (the import below), as those of most tenant modules are.
"""

from __future__ import annotations

import datetime as dt
import decimal
import enum
import functools
import types
import uuid
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Generator,
    Iterable,
    Iterator,
)
from typing import TYPE_CHECKING, Annotated, Any, Generic, Literal, NamedTuple, Optional, TypedDict, TypeVar

import msgspec
import pytest

from gen_worker import (
    ActionContext,
    Asset,
    ModelArtifacts,
    ModelRef,
    ModelRefSource,
    RealtimeSocket,
    ResourceRequirements,
    worker_function,
    worker_websocket,
)
from gen_worker.errors import SignatureError
from gen_worker.signature import FunctionSpec, collect_functions, inspect_function

if TYPE_CHECKING:
    from collections.abc import Hashable as OnlyForTypeCheckers

T = TypeVar("T")
DEPLOYMENT, PAYLOAD = ModelRefSource.DEPLOYMENT, ModelRefSource.PAYLOAD


class In(msgspec.Struct):
    prompt: str
    steps: int = 20
    model: str = "base"
    style: str | None = None
    size: Literal["small", "large"] = "small"
    renamed: str = msgspec.field(default="", name="otherName")


class Out(msgspec.Struct):
    text: str


class Box(msgspec.Struct, Generic[T]):
    item: T


class Row(msgspec.Struct, array_like=True):
    a: int


class Odd(msgspec.Struct):
    value: complex


class Dangling(msgspec.Struct):
    value: OnlyForTypeCheckers


class Pipe:
    pass


# -- what is understood ---------------------------------------------------------------------------


@worker_function(ResourceRequirements(max_concurrency=3))
def sync(ctx: ActionContext, payload: In) -> Out:
    return Out(payload.prompt)


@worker_function()
async def coroutine(ctx: ActionContext, payload: In) -> Out:
    return Out(payload.prompt)


@worker_function()
def generator(ctx: ActionContext, payload: In) -> Iterator[Out]:
    yield Out(payload.prompt)


@worker_function()
def iterable(ctx: ActionContext, payload: In) -> Iterable[Out]:
    return [Out(payload.prompt)]


@worker_function()
def full_generator(ctx: ActionContext, payload: In) -> Generator[Out, None, None]:
    yield Out(payload.prompt)


@worker_function()
async def async_generator(ctx: ActionContext, payload: In) -> AsyncIterator[Out]:
    yield Out(payload.prompt)


@worker_function()
async def async_iterable(ctx: ActionContext, payload: In) -> AsyncIterable[Annotated[Out, "delta"]]:
    yield Out(payload.prompt)


@worker_function()
async def full_async_generator(ctx: ActionContext, payload: In) -> AsyncGenerator[Out, None]:
    yield Out(payload.prompt)


@worker_function()
def injected(
    context: ActionContext,
    /,
    pipe: Annotated[Pipe, "first", ModelRef(DEPLOYMENT, "sdxl")],
    files: Annotated[ModelArtifacts, ModelRef(PAYLOAD, "model")],
    body: Annotated[In, "documented"],
    *,
    lora: Annotated[ModelArtifacts, ModelRef(PAYLOAD, "style")],
    vae: Annotated[Pipe, ModelRef(PAYLOAD, "size")],
) -> Annotated[Out, "documented"]:
    return Out(body.prompt)


@worker_websocket()
async def socket(ctx: ActionContext, pipe: Annotated[Pipe, ModelRef(DEPLOYMENT, "sdxl")], sock: RealtimeSocket) -> None:
    await sock.close()


@worker_websocket()
async def socket_without_return(ctx: ActionContext, sock: RealtimeSocket):  # type: ignore[no-untyped-def]
    await sock.close()


@pytest.mark.parametrize(
    ("func", "mode"),
    [
        (sync, "sync"),
        (coroutine, "async"),
        (generator, "generator"),
        (iterable, "generator"),
        (full_generator, "generator"),
        (async_generator, "async_generator"),
        (async_iterable, "async_generator"),
        (full_async_generator, "async_generator"),
    ],
)
def test_modes(func: Callable[..., Any], mode: str) -> None:
    spec = inspect_function(func)
    assert spec.mode == mode
    assert (spec.payload_param, spec.payload_type, spec.output_type, spec.socket_param) == ("payload", In, Out, "")
    assert spec.incremental is mode.endswith("generator")
    assert spec.delta_schema == (spec.output_schema if spec.incremental else b"")
    assert spec.func is func
    assert (spec.name, spec.module) == (func.__name__, __name__)
    assert spec.qualified_name == f"{__name__}.{func.__name__}"


def test_resources() -> None:
    assert inspect_function(sync).resources == ResourceRequirements(max_concurrency=3)
    assert inspect_function(coroutine).resources == ResourceRequirements()


def test_injections_in_any_order() -> None:
    spec = inspect_function(injected)
    assert (spec.ctx_param, spec.payload_param, spec.payload_type, spec.output_type) == ("context", "body", In, Out)
    assert [(i.param, i.type, i.ref.key) for i in spec.injections] == [
        ("pipe", Pipe, "sdxl"),
        ("files", ModelArtifacts, "model"),
        ("lora", ModelArtifacts, "style"),
        ("vae", Pipe, "size"),
    ]
    assert spec.injection_json.startswith(
        b'[{"model_ref":{"key":"sdxl","source":"deployment"},"param":"pipe","type":"' + __name__.encode() + b'.Pipe"},'
        b'{"model_ref":{"key":"model","source":"payload"},"param":"files",'
        b'"type":"gen_worker.injection.ModelArtifacts"},'
    )


@pytest.mark.parametrize("func", [socket, socket_without_return])
def test_websockets(func: Callable[..., Any]) -> None:
    spec = inspect_function(func)
    assert (spec.mode, spec.socket_param, spec.payload_param) == ("websocket", "sock", "")
    assert (spec.payload_type, spec.output_type) == (None, None)
    assert (spec.input_schema, spec.output_schema, spec.delta_schema) == (b"", b"", b"")


def test_schemas_are_compact_and_sorted() -> None:
    spec = inspect_function(sync)
    assert spec.output_schema == (
        b'{"$defs":{"Out":{"properties":{"text":{"type":"string"}},"required":["text"],"title":"Out",'
        b'"type":"object"}},"$ref":"#/$defs/Out"}'
    )
    assert msgspec.json.decode(spec.input_schema) == msgspec.json.schema(In)
    assert b"otherName" in spec.input_schema
    assert b" " not in spec.input_schema


class Color(enum.Enum):
    RED = "red"


class Point(NamedTuple):
    x: int


class Options(TypedDict):
    a: int


class Circle(msgspec.Struct, tag=True):
    r: float


class Square(msgspec.Struct, tag=True):
    a: float


class Everything(msgspec.Struct):
    """All kinds of types that msgspec has."""

    a: bool | int | str | None
    b: bytes
    c: bytearray
    d: dt.datetime
    e: dt.date
    f: dt.timedelta
    g: uuid.UUID
    h: decimal.Decimal
    i: Color
    j: Point
    k: Options
    l: list[int]  # noqa: E741
    m: tuple[int, str]
    n: dict[str, list[Asset]]
    o: set[int]
    p: Circle | Square
    q: Annotated[int, msgspec.Meta(ge=0, le=10)]
    r: Box[int]
    s: Row
    t: msgspec.Raw
    u: Any
    v: Everything | None = None
    w: int | msgspec.UnsetType = msgspec.UNSET


@worker_function()
def everything(ctx: ActionContext, payload: Everything) -> Everything:
    return payload


def test_every_type_that_msgspec_has() -> None:
    spec = inspect_function(everything)
    assert set(msgspec.json.decode(spec.input_schema)["$defs"]["Everything"]["properties"]) == set(
        "abcdefghijklmnopqrstuvw"
    )


def timed(func: Callable[..., T]) -> Callable[..., T]:
    @functools.wraps(func)
    def wrapper(*args: Any, **kwargs: Any) -> T:
        return func(*args, **kwargs)

    return wrapper


@worker_function()
@timed
def wrapped_inside(ctx: ActionContext, payload: In) -> Out:
    return Out(payload.prompt)


@worker_function()
@timed
def wrapped_generator(ctx: ActionContext, payload: In) -> Iterator[Out]:
    yield Out(payload.prompt)


def test_a_decorator_below_ours() -> None:
    assert inspect_function(wrapped_inside).mode == "sync"
    assert inspect_function(wrapped_generator).mode == "generator"


def test_the_function_stays_itself() -> None:
    def plain(ctx: ActionContext, payload: In) -> Out:
        return Out(payload.prompt)

    assert worker_function()(plain) is plain
    assert inspect_function(plain).name == "plain"


# -- what is refused ------------------------------------------------------------------------------


def no_parameters() -> Out: ...
def no_ctx(payload: In) -> Out: ...
def ctx_second(payload: In, ctx: ActionContext) -> Out: ...
def ctx_unannotated(ctx, payload: In) -> Out: ...  # type: ignore[no-untyped-def]
def ctx_keyword(*, ctx: ActionContext, payload: In) -> Out: ...
def var_args(ctx: ActionContext, payload: In, *args: In) -> Out: ...
def var_kwargs(ctx: ActionContext, payload: In, **kwargs: In) -> Out: ...
def positional(ctx: ActionContext, payload: In, /) -> Out: ...
def no_payload(ctx: ActionContext) -> Out: ...
def two_payloads(ctx: ActionContext, a: In, b: Out) -> Out: ...
def two_contexts(ctx: ActionContext, other: ActionContext, payload: In) -> Out: ...
def unannotated(ctx: ActionContext, payload) -> Out: ...  # type: ignore[no-untyped-def]
def plain_int(ctx: ActionContext, payload: In, steps: int = 3) -> Out: ...
def optional_payload(ctx: ActionContext, payload: In | None) -> Out: ...
def old_optional_payload(ctx: ActionContext, payload: Optional[In] = None) -> Out: ...  # noqa: UP045
def union_payload(ctx: ActionContext, payload: In | Out) -> Out: ...
def generic_payload(ctx: ActionContext, payload: Box[int]) -> Out: ...
def dict_payload(ctx: ActionContext, payload: dict[str, int]) -> Out: ...
def array_payload(ctx: ActionContext, payload: Row) -> Out: ...
def odd_payload(ctx: ActionContext, payload: Odd) -> Out: ...
def dangling_payload(ctx: ActionContext, payload: Dangling) -> Out: ...
def socket_param(ctx: ActionContext, payload: In, sock: RealtimeSocket) -> Out: ...
def no_return(ctx: ActionContext, payload: In): ...  # type: ignore[no-untyped-def]
def return_none(ctx: ActionContext, payload: In) -> None: ...
def return_dict(ctx: ActionContext, payload: In) -> dict[str, int]: ...
def return_optional(ctx: ActionContext, payload: In) -> Out | None: ...
def return_awaitable(ctx: ActionContext, payload: In) -> Awaitable[Out]: ...
def return_bare_iterator(ctx: ActionContext, payload: In) -> Iterator: ...
def return_str_iterator(ctx: ActionContext, payload: In) -> Iterator[str]: ...
def return_optional_iterator(ctx: ActionContext, payload: In) -> Iterator[Out | None]: ...
def return_odd(ctx: ActionContext, payload: In) -> Odd: ...
def unresolved(ctx: ActionContext, payload: OnlyForTypeCheckers) -> Out: ...
def unresolved_model(
    ctx: ActionContext, payload: In, pipe: Annotated[OnlyForTypeCheckers, ModelRef(DEPLOYMENT, "m")]
) -> Out: ...
def bad_syntax(ctx: ActionContext, payload: In) -> Out: ...


bad_syntax.__annotations__["payload"] = "In["


def two_refs(
    ctx: ActionContext, payload: In, pipe: Annotated[Pipe, ModelRef(DEPLOYMENT, "a"), ModelRef(DEPLOYMENT, "b")]
) -> Out: ...
def empty_key(ctx: ActionContext, payload: In, pipe: Annotated[Pipe, ModelRef(DEPLOYMENT, "")]) -> Out: ...
def optional_model(ctx: ActionContext, payload: In, pipe: Annotated[Pipe | None, ModelRef(DEPLOYMENT, "a")]) -> Out: ...
def annotated_without_ref(ctx: ActionContext, payload: In, pipe: Annotated[Pipe, "sdxl"]) -> Out: ...
def key_not_there(ctx: ActionContext, payload: In, pipe: Annotated[Pipe, ModelRef(PAYLOAD, "nope")]) -> Out: ...
def key_not_str(ctx: ActionContext, payload: In, pipe: Annotated[Pipe, ModelRef(PAYLOAD, "steps")]) -> Out: ...
def key_renamed(ctx: ActionContext, payload: In, pipe: Annotated[Pipe, ModelRef(PAYLOAD, "renamed")]) -> Out: ...
def yields_but_single(ctx: ActionContext, payload: In) -> Out:  # type: ignore[misc]
    yield Out("")


async def async_yields_but_single(ctx: ActionContext, payload: In) -> Out:  # type: ignore[misc]
    yield Out("")


async def async_yields_iterator(ctx: ActionContext, payload: In) -> Iterator[Out]:  # type: ignore[misc]
    yield Out("")


def yields_async_iterator(ctx: ActionContext, payload: In) -> AsyncIterator[Out]:  # type: ignore[misc]
    yield Out("")


async def never_yields(ctx: ActionContext, payload: In) -> AsyncIterator[Out]: ...
@timed
async def async_in_sync(ctx: ActionContext, payload: In) -> Out: ...


@pytest.mark.parametrize(
    ("func", "rule"),
    [
        (no_parameters, "takes no parameters: the first must be ctx: ActionContext"),
        (no_ctx, "parameter 'payload' is In: the first parameter must be ctx: ActionContext"),
        (ctx_second, "parameter 'payload' is In: the first parameter must be ctx"),
        (ctx_unannotated, "parameter 'ctx' has no annotation: the first parameter must be ctx: ActionContext"),
        (ctx_keyword, "parameter 'ctx' is keyword-only: ctx is passed by position"),
        (var_args, "parameter '*args' is not allowed: every parameter must be named and annotated"),
        (var_kwargs, "parameter '**kwargs' is not allowed"),
        (positional, "parameter 'payload' is positional-only: parameters after ctx are passed by keyword"),
        (no_payload, "has no payload: exactly one parameter must be a msgspec.Struct"),
        (two_payloads, "has 2 payloads, 'a' and 'b': exactly one parameter is a msgspec.Struct"),
        (two_contexts, "parameter 'other' is ActionContext: it must be the payload"),
        (unannotated, "parameter 'payload' has no annotation"),
        (plain_int, "parameter 'steps' is int: it must be the payload (a msgspec.Struct) or Annotated[T, ModelRef"),
        (optional_payload, "parameter 'payload' is " + str(In | None) + ": a payload always comes"),
        (old_optional_payload, ": a payload always comes, so annotate it with the struct alone"),
        (union_payload, ": it must be the payload (a msgspec.Struct)"),
        (generic_payload, "make a subclass of the generic struct"),
        (dict_payload, "parameter 'payload' is dict[str, int]: it must be the payload"),
        (array_payload, "uses Row in parameter 'payload', which is array_like: it must encode as a map"),
        (odd_payload, "uses Odd in parameter 'payload', which has no schema: "),
        (
            dangling_payload,
            "uses Dangling in parameter 'payload', whose fields name 'OnlyForTypeCheckers', not defined",
        ),
        (socket_param, "parameter 'sock' is a RealtimeSocket: only a @worker_websocket() handler gets one"),
        (no_return, "has no return annotation: it must be a msgspec.Struct or an Iterator of one"),
        (return_none, "returns None: it must be a msgspec.Struct or an Iterator of one"),
        (return_dict, "returns dict[str, int]: it must be a msgspec.Struct"),
        (return_optional, ": an output is never None, so annotate it with the struct alone"),
        (return_awaitable, "it must be a msgspec.Struct or an Iterator of one"),
        (return_bare_iterator, "what it yields must be one msgspec.Struct type"),
        (return_str_iterator, "what it yields must be one msgspec.Struct type"),
        (return_optional_iterator, "what it yields must be one msgspec.Struct type"),
        (return_odd, "uses Odd in the return annotation, which has no schema: "),
        (unresolved, "has an annotation that names 'OnlyForTypeCheckers', which is not defined at run time: import it"),
        (unresolved_model, "has an annotation that names 'OnlyForTypeCheckers'"),
        (bad_syntax, "has an annotation that can't be resolved: "),
        (two_refs, "parameter 'pipe' has more than one ModelRef"),
        (empty_key, "parameter 'pipe' has a ModelRef without a key"),
        (optional_model, "parameter 'pipe' injects "),
        (annotated_without_ref, "parameter 'pipe' is Pipe: it must be the payload"),
        (
            key_not_there,
            "parameter 'pipe' takes its model from payload field 'nope', which In has not; it has: prompt,",
        ),
        (key_not_str, "takes its model from payload field 'steps', which is int: it must be str or str | None"),
        (key_renamed, "takes its model from payload field 'renamed', which is renamed to 'otherName'"),
        (yields_but_single, "yields but returns Out: annotate it -> Iterator[Out]"),
        (async_yields_but_single, "yields but returns Out: annotate it -> AsyncIterator[Out]"),
        (async_yields_iterator, "is an async generator but returns"),
        (yields_async_iterator, "is a plain generator but returns"),
        (never_yields, "never yields: yield the deltas"),
        (async_in_sync, "is an async function inside a decorator that is not: the decorator must be async too"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_broken_functions(func: Callable[..., Any], rule: str) -> None:
    with pytest.raises(SignatureError) as caught:
        inspect_function(worker_function()(func))
    message = str(caught.value)
    assert message.startswith(f"{__name__}.{func.__name__}")
    assert rule in message
    assert "\n" not in message


def plain_handler(ctx: ActionContext, sock: RealtimeSocket) -> None: ...
async def yielding_handler(ctx: ActionContext, sock: RealtimeSocket) -> AsyncIterator[Out]:
    yield Out("")


async def no_socket(ctx: ActionContext) -> None: ...
async def two_sockets(ctx: ActionContext, a: RealtimeSocket, b: RealtimeSocket) -> None: ...
async def handler_payload(ctx: ActionContext, sock: RealtimeSocket, payload: In) -> None: ...
async def handler_returns(ctx: ActionContext, sock: RealtimeSocket) -> Out: ...
async def handler_from_payload(
    ctx: ActionContext, sock: RealtimeSocket, pipe: Annotated[Pipe, ModelRef(PAYLOAD, "model")]
) -> None: ...


@pytest.mark.parametrize(
    ("func", "rule"),
    [
        (plain_handler, "is a websocket handler, so it must be `async def`"),
        (yielding_handler, "is a websocket handler, so it must be `async def` and not yield"),
        (no_socket, "has 0 RealtimeSocket parameters: a websocket handler has exactly one"),
        (two_sockets, "has 2 RealtimeSocket parameters"),
        (handler_payload, "parameter 'payload' is a struct: a websocket handler has no payload"),
        (handler_returns, "returns Out: a websocket handler returns None"),
        (handler_from_payload, "parameter 'pipe' takes its model from the payload: a websocket handler has none"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_broken_handlers(func: Callable[..., Any], rule: str) -> None:
    with pytest.raises(SignatureError) as caught:
        inspect_function(worker_websocket()(func))
    assert str(caught.value).startswith(f"{__name__}.{func.__name__}")
    assert rule in str(caught.value)


@pytest.mark.parametrize("limit", [0, -1, True, 1.5, "2"])
def test_bad_limits(limit: Any) -> None:
    @worker_function(ResourceRequirements(max_concurrency=limit))
    def limited(ctx: ActionContext, payload: In) -> Out: ...

    with pytest.raises(SignatureError, match=r"limited has max_concurrency=.*at least 1, or None"):
        inspect_function(limited)


# -- what can't be decorated ----------------------------------------------------------------------


def test_an_undecorated_function() -> None:
    with pytest.raises(SignatureError, match="has neither @worker_function"):
        inspect_function(no_ctx_undecorated)


def no_ctx_undecorated(ctx: ActionContext, payload: In) -> Out: ...


def test_forgotten_parentheses() -> None:
    with pytest.raises(
        SignatureError,
        match=rf"write @worker_function\(\) with parentheses above {__name__}.test_forgotten_parentheses",
    ):

        @worker_function  # type: ignore[arg-type]
        def f(ctx: ActionContext, payload: In) -> Out: ...


def test_wrong_resources() -> None:
    with pytest.raises(SignatureError, match="takes a ResourceRequirements, got 3"):
        worker_function(3)  # type: ignore[arg-type]


def test_what_is_not_a_function() -> None:
    class Callable_:  # noqa: N801
        def __call__(self, ctx: ActionContext, payload: In) -> Out: ...

    with pytest.raises(SignatureError, match="only plain functions"):
        inspect_function(worker_function()(Callable_()))
    with pytest.raises(SignatureError, match=r"can't mark .*: it is not a function"):
        worker_function()(len)


def test_a_decorator_above_ours() -> None:
    above = timed(wrapped_inside)
    with pytest.raises(SignatureError, match="must be the topmost"):
        inspect_function(above)


# -- collecting -----------------------------------------------------------------------------------


def module(name: str, **members: Any) -> types.ModuleType:
    made = types.ModuleType(name)
    vars(made).update(members)
    return made


def names(specs: tuple[FunctionSpec, ...]) -> list[str]:
    return [spec.name for spec in specs]


def test_each_function_once_however_often_it_is_exported() -> None:
    one = module("one", sync=sync, alias=sync, other=3, Pipe=Pipe, struct=In)
    two = module("two", sync=sync, socket=socket)
    assert names(collect_functions([one, two])) == ["sync", "socket"]
    assert collect_functions([]) == ()


def test_two_functions_of_one_name() -> None:
    def make() -> Callable[..., Any]:
        @worker_function()
        def sync(ctx: ActionContext, payload: In) -> Out: ...

        return sync

    with pytest.raises(SignatureError) as caught:
        collect_functions([module("one", sync=sync), module("two", sync=make())])
    assert f"two functions are called 'sync': {__name__}.sync and {__name__}.test_two" in str(caught.value)


@pytest.mark.parametrize("wrap", [lambda f: f, staticmethod, classmethod])
def test_methods(wrap: Callable[[Any], Any]) -> None:
    def method(ctx: ActionContext, payload: In) -> Out: ...

    method.__qualname__ = "Service.method"
    owner = type("Service", (), {"method": wrap(worker_function()(method)), "__module__": "one"})
    with pytest.raises(SignatureError, match=r"Service\.method is a method: only functions at module level"):
        collect_functions([module("one", Service=owner)])
