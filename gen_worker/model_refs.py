"""Model refs: the names of models, and their one canonical spelling.

Owns: the grammar. `cozy:org/repo[:tag]`, `cozy:org/repo@sha256:<hex>`, `hf:org/repo[@revision]`; no scheme means
cozy and the default tag is `latest`. Everything that compares or stores model ids uses the canonical form.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Literal

from gen_worker.errors import ValidationError

DEFAULT_TAG: Final = "latest"
ACCEPTED_FORMS: Final = "cozy:org/repo[:tag], cozy:org/repo@sha256:<hex> or hf:org/repo[@revision]"

_NAME: Final = r"[A-Za-z0-9_][A-Za-z0-9._-]*"
_REPO: Final = rf"(?P<org>{_NAME})/(?P<repo>{_NAME})"
_COZY: Final = re.compile(rf"(?:cozy:)?{_REPO}(?::(?P<tag>{_NAME})|@sha256:(?P<digest>[0-9a-fA-F]+))?")
_HF: Final = re.compile(rf"hf:{_REPO}(?:@(?P<revision>{_NAME}(?:/{_NAME})*))?")


@dataclass(frozen=True, slots=True)
class ParsedModelRef:
    """The parts of a ref. A cozy ref has a tag or a digest (lower-case hex), a Hugging Face ref may have a revision."""

    scheme: Literal["cozy", "hf"]
    org: str
    repo: str
    tag: str | None = None
    digest: str | None = None
    revision: str | None = None

    @property
    def repo_id(self) -> str:
        """`org/repo`."""
        return f"{self.org}/{self.repo}"

    @property
    def canonical(self) -> str:
        """The one spelling by which models are compared and stored."""
        if self.scheme == "hf":
            return f"hf:{self.repo_id}@{self.revision}" if self.revision else f"hf:{self.repo_id}"
        return f"cozy:{self.repo_id}@sha256:{self.digest}" if self.digest else f"cozy:{self.repo_id}:{self.tag}"


def parse_model_ref(text: str) -> ParsedModelRef:
    """The parts of a ref. Raises ValidationError (a ValueError) that quotes it and says the accepted forms."""
    if found := _HF.fullmatch(text):
        return ParsedModelRef("hf", found["org"], found["repo"], revision=found["revision"])
    if found := _COZY.fullmatch(text):
        digest = found["digest"]
        tag = None if digest else found["tag"] or DEFAULT_TAG
        return ParsedModelRef("cozy", found["org"], found["repo"], tag=tag, digest=digest and digest.lower())
    raise ValidationError(f"{text!r} is not a model ref: accepted are {ACCEPTED_FORMS}")


def canonical_ref(text: str) -> str:
    """The canonical form of a ref. Raises ValidationError as parse_model_ref does."""
    return parse_model_ref(text).canonical


def canonical_name(name: str) -> str:
    """The canonical form of a ref; a name that is none, as a local model may have, stays as it is."""
    return canonical_ref(name) if is_model_ref(name) else name


def is_model_ref(text: str) -> bool:
    """Whether the text is a ref, and so not a label."""
    return bool(_HF.fullmatch(text) or _COZY.fullmatch(text))
