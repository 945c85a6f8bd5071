"""The smallest tenant project: a function, and one that streams. It needs no GPU and no model."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from gen_worker import ActionContext, worker_function


class Name(msgspec.Struct):
    name: str


class Greeting(msgspec.Struct):
    greeting: str


class Text(msgspec.Struct):
    text: str


class Word(msgspec.Struct):
    word: str


@worker_function()
def greet(ctx: ActionContext, payload: Name) -> Greeting:
    """Greet somebody."""
    ctx.progress(0.5, stage="thinking")
    return Greeting(greeting=f"Hello, {payload.name}!")


@worker_function()
def words(ctx: ActionContext, payload: Text) -> Iterator[Word]:
    """Give a text back word by word."""
    for word in payload.text.split():
        if ctx.is_canceled():
            return
        yield Word(word=word)
