"""Which model a run means: labels, refs, the allowlist, and payload fields that name one.

Owns: the labels and the allowlist. Whether a model is here, or could be fetched, is the source's to say.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec

from gen_worker.model_refs import canonical_name
from gen_worker.pipe.messages import FunctionInfo, InjectionInfo
from supervisor.model_source import ModelSource
from supervisor.runs import Refused, invalid

Models = tuple[tuple[str, str], ...]
"""(injected parameter, model id), in the order of the function's parameters."""

_FIELDS: Final = msgspec.msgpack.Decoder(dict[str, msgspec.Raw])
_TEXT: Final = msgspec.msgpack.Decoder(str | None)


class ModelNames:
    """See the module. `labels` are those of the tenant's project."""

    def __init__(self, labels: Mapping[str, str], source: ModelSource) -> None:
        self._own_labels = dict(labels)
        self._labels = self._own_labels
        self._source = source
        self._allowed: frozenset[str] = frozenset()

    def configure(self, supported: Sequence[str], labels: Mapping[str, str]) -> None:
        """What deployment_model_config says, in place of the last. An empty `supported` lifts the allowlist."""
        self._allowed = frozenset(canonical_name(model_id) for model_id in supported)
        self._labels = {**self._own_labels, **labels}

    def wanted(self) -> list[str]:
        """The models that are likely to be asked for and could be had: what is allowed, else what labels name."""
        named = self._allowed or {canonical_name(ref) for ref in self._labels.values()}
        return sorted(model_id for model_id in named if self._source.knows(model_id))

    def resolve(self, info: FunctionInfo, required: Sequence[str], payload: bytes | memoryview) -> Models:
        """The model of each injected parameter. Raises Refused.

        `required` (the request's required_models) overrides by position. The payload is only looked into for a
        function whose model is named by a payload field.
        """
        return tuple(
            (injection.param, self._choose(info, injection, position, required, payload))
            for position, injection in enumerate(info.injections)
        )

    def meant_by(self, name: str) -> str:
        """The id that a label or ref stands for, whether it may be had or not."""
        return canonical_name(self._labels.get(name, name))

    def model_id(self, name: str) -> str:
        """The same of a model that may be had. Raises Refused."""
        model_id = self.meant_by(name)
        if self._allowed and model_id not in self._allowed:
            raise Refused(invalid("model not allowed", f"model {model_id} is not on this deployment's allowlist"))
        if not self._source.knows(model_id):
            how = "nor can it be fetched, and WORKER_MODEL_ARTIFACTS_JSON does not name it"
            detail = f"model {model_id} is not on this host, {how}"
            raise Refused(invalid("model not available", detail))
        return model_id

    def types_of(self, model_id: str, functions: Mapping[str, FunctionInfo]) -> set[str]:
        """The types that functions inject this model as."""
        exact, any_type = set(), set()
        for info in functions.values():
            for injection in info.injections:
                any_type.add(injection.type_name)
                label = injection.key
                if injection.source == "deployment" and canonical_name(self._labels.get(label, label)) == model_id:
                    exact.add(injection.type_name)
        return exact or any_type

    def _choose(
        self,
        info: FunctionInfo,
        injection: InjectionInfo,
        position: int,
        required: Sequence[str],
        payload: bytes | memoryview,
    ) -> str:
        if position < len(required) and required[position]:
            return self.model_id(required[position])
        if injection.source == "deployment":
            return self.model_id(injection.key)
        safe = f"payload field '{injection.key}' must name a model"
        try:
            written = _FIELDS.decode(payload).get(injection.key)
            name = None if written is None else _TEXT.decode(written)
        except (ValueError, RecursionError) as error:  # ValueError: msgspec's and UnicodeDecodeError
            raise Refused(invalid(safe, f"{info.name}: {safe}: {error!r}")) from error
        name = name or _default_of(info.input_schema, injection.key)
        if not name:
            raise Refused(invalid(safe, f"{info.name}: {safe}: it is absent or null, and its default is no name"))
        return self.model_id(name)


@functools.lru_cache(maxsize=256)
def _default_of(input_schema: bytes, field: str) -> str | None:
    """The default of a payload field, as the schema of its struct has it; None when that is no text."""
    if not input_schema:
        return None
    schema: dict[str, Any] = msgspec.json.decode(input_schema)
    name = str(schema.get("$ref", "")).rpartition("/")[2]
    struct = schema.get("$defs", {}).get(name, schema)
    default = struct.get("properties", {}).get(field, {}).get("default")
    return default if isinstance(default, str) else None
