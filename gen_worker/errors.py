"""The one tree of errors that tenant code raises and meets.

Owns: which error means what to the scheduler. `error_type` and `retryable` are class attributes, so turning an
error into what goes on the wire (failures.py) is reading them, and a tenant's own subclass inherits them.

    Exception
    `-- WorkerError                  internal     base of all below
        |-- ValidationError          validation   the request is at fault; is a ValueError too
        |-- RetryableError           retryable    the same request may succeed elsewhere or later
        |-- ResourceError            resource     memory, disk or another limit of this worker
        |-- CanceledError            canceled     the function gives up because the run was canceled
        |-- AuthError                auth         a credential was refused
        `-- FatalError               fatal        no retry helps: the function or its project is at fault
            |-- SignatureError                    a function breaks the rules for worker functions
            |-- ProjectError                      pyproject.toml or the import of a module is wrong
            |   `-- ManifestError                 the manifest is
            `-- ArtifactNotFoundError             a model lacks a file; is a KeyError too
    BaseException
    `-- RunCanceled                               raised into a run's thread; see below
"""

from __future__ import annotations

from typing import ClassVar

from gen_worker.pipe.messages import ErrorType


class WorkerError(Exception):
    """Base of every error of this package. Its message is shown to end users, with URLs, paths and secrets cut out."""

    error_type: ClassVar[ErrorType] = "internal"
    retryable: ClassVar[bool] = False


class ValidationError(WorkerError, ValueError):
    """The request can't be served as it is: raise it for bad input that the payload's types don't catch."""

    error_type = "validation"


class RetryableError(WorkerError):
    """The request is fine and this attempt failed: the scheduler may try again."""

    error_type = "retryable"
    retryable = True


class ResourceError(WorkerError):
    """The worker lacks memory, disk or something else that the request needs."""

    error_type = "resource"


class CanceledError(WorkerError):
    """Raised by a function that saw `ctx.is_canceled()` and stops."""

    error_type = "canceled"


class AuthError(WorkerError):
    """A store or hub refused the credential."""

    error_type = "auth"


class FatalError(WorkerError):
    """No retry can help."""

    error_type = "fatal"


class SignatureError(FatalError):
    """A worker function or websocket handler breaks a rule; the message names function, parameter and rule."""


class ProjectError(FatalError):
    """The tenant's project can't be used: its pyproject.toml, or a module that does not import."""


class ManifestError(ProjectError):
    """A manifest can't be read; the message names the file and the place in it."""


class ArtifactNotFoundError(FatalError, KeyError):
    """A model has no file under the asked key."""

    __str__ = Exception.__str__  # KeyError's own prints the repr of the message


class RunCanceled(BaseException):
    """Raised into the thread of a run that was canceled or is past its deadline.

    Not an Exception, so that a function's `except Exception` can't swallow it; `finally` blocks do run.
    """
