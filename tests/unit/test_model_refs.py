"""The grammar of model refs."""

from __future__ import annotations

import pytest

from gen_worker.model_refs import canonical_ref, is_model_ref, parse_model_ref


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("org/repo", "cozy:org/repo:latest"),
        ("org/repo:v1.2", "cozy:org/repo:v1.2"),
        ("cozy:org/repo", "cozy:org/repo:latest"),
        ("cozy:org/repo:nightly", "cozy:org/repo:nightly"),
        ("cozy:org/repo@sha256:ABCDEF01", "cozy:org/repo@sha256:abcdef01"),
        ("hf:stabilityai/sd-xl.base_1", "hf:stabilityai/sd-xl.base_1"),
        ("hf:org/repo@main", "hf:org/repo@main"),
        ("hf:org/repo@refs/pr/1", "hf:org/repo@refs/pr/1"),
    ],
)
def test_canonical_form(text: str, canonical: str) -> None:
    assert canonical_ref(text) == canonical
    assert canonical_ref(canonical) == canonical
    assert is_model_ref(text)


@pytest.mark.parametrize(
    "text",
    [
        "", "sdxl", "org/", "/repo", "a/b/c", "hf:repo", "hf:org/repo:tag", "hf:org/repo@", "hf:org/repo@../x",
        "cozy:org/repo:", "cozy:org/repo@sha256:", "cozy:org/repo@sha256:xyz", "cozy:org/repo@md5:00",
        "cozy:org/repo:tag@sha256:00", "s3:org/repo", "cozy:../repo", "cozy:org/..", " org/repo", "org/repo\n",
    ],
)  # fmt: skip
def test_anything_else_is_refused_by_name(text: str) -> None:
    with pytest.raises(ValueError, match="accepted are cozy:org/repo") as caught:
        parse_model_ref(text)
    assert repr(text) in str(caught.value)
    assert not is_model_ref(text)


def test_parts() -> None:
    ref = parse_model_ref("hf:org/repo@abc")
    assert (ref.scheme, ref.repo_id, ref.revision, ref.tag, ref.digest) == ("hf", "org/repo", "abc", None, None)
    pinned = parse_model_ref("org/repo@sha256:00")
    assert (pinned.scheme, pinned.digest, pinned.tag) == ("cozy", "00", None)
