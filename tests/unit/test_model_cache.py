"""The public ledger: where models are, who is evicted, and what it says of that; and what the worker asks of it."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gen_worker.model_cache import ModelCache, ModelLocation


@pytest.fixture
def cache() -> ModelCache:
    return ModelCache(max_vram_gb=10)


def test_locations_are_words() -> None:
    assert [location.value for location in ModelLocation] == ["vram", "disk", "downloading"]
    assert ModelLocation("vram") is ModelLocation.VRAM


def test_an_empty_ledger(cache: ModelCache) -> None:
    assert cache.get_all_models() == cache.get_vram_models() == cache.get_available_models() == []
    assert cache.get_pipeline("a") is None
    assert not cache.has_model("a")
    assert cache.get_download_progress("a") is None
    assert not cache.unload_model("a")
    assert cache.are_models_available([])
    assert cache.get_max_concurrent_downloads() == 2


def test_a_model_in_vram(cache: ModelCache) -> None:
    pipeline = object()
    cache.mark_loaded_to_vram("a", pipeline, 4)
    assert cache.is_in_vram("a")
    assert not cache.is_on_disk("a")
    assert cache.get_pipeline("a") is pipeline
    assert cache.size_gb("a") == cache.vram_used_gb == 4
    assert cache.can_fit_in_vram(6)
    assert not cache.can_fit_in_vram(6.1)
    assert cache.unload_model("a")
    assert not cache.has_model("a"), "without files it is forgotten"
    assert not cache.unload_model("a")


def test_the_least_recently_used_leaves_first(cache: ModelCache) -> None:
    for name in "abc":
        cache.mark_loaded_to_vram(name, name.upper(), 3)
    assert cache.get_vram_models() == ["a", "b", "c"]
    cache.get_pipeline("a")
    assert cache.get_vram_models() == ["b", "c", "a"]
    assert cache.mark_loaded_to_vram("d", "D", 3) == ["b"]
    assert cache.get_vram_models() == ["c", "a", "d"]
    assert cache.mark_loaded_to_vram("e", "E", 7) == ["c", "a"]
    assert cache.vram_used_gb == 10


def test_a_model_larger_than_all_is_recorded_and_alone(cache: ModelCache) -> None:
    cache.mark_loaded_to_vram("a", None, 3)
    assert cache.mark_loaded_to_vram("huge", None, 30) == ["a"]
    assert cache.get_vram_models() == ["huge"]
    assert cache.get_stats().vram_available_gb == 0


def test_loading_again_counts_once(cache: ModelCache) -> None:
    cache.mark_loaded_to_vram("a", "old", 8)
    assert cache.mark_loaded_to_vram("a", "new", 9) == []
    assert (cache.vram_used_gb, cache.get_pipeline("a")) == (9, "new")


def test_an_evicted_model_with_files_falls_back_to_disk(cache: ModelCache, tmp_path: Path) -> None:
    cache.mark_cached_to_disk("a", tmp_path, 4)
    assert cache.is_on_disk("a")
    cache.mark_loaded_to_vram("a", object(), 6)
    cache.mark_loaded_to_vram("b", object(), 6)
    assert cache.is_on_disk("a")
    assert cache.get_pipeline("a") is None
    assert cache.get_disk_models() == ["a"]
    assert cache.are_models_available(["a", "b"])
    assert not cache.are_models_available(["a", "c"])


def test_downloads(cache: ModelCache, tmp_path: Path) -> None:
    cache.mark_downloading("a")
    assert cache.get_downloading_models() == ["a"]
    assert cache.get_download_progress("a") == 0
    cache.update_download_progress("a", 0.5)
    cache.update_download_progress("unheard of", 0.5)
    assert cache.get_download_progress("a") == 0.5
    cache.update_download_progress("a", 7)
    assert cache.get_download_progress("a") == 1
    assert cache.get_available_models() == []
    cache.mark_cached_to_disk("a", str(tmp_path))
    assert cache.get_download_progress("a") is None
    assert cache.get_available_models() == ["a"]
    cache.mark_downloading("b", 0.3)
    cache.mark_download_failed("b")
    assert not cache.has_model("b")


def test_registering(cache: ModelCache, tmp_path: Path) -> None:
    cache.register_model("a")
    assert cache.has_model("a")
    assert cache.get_available_models() == []
    cache.register_model("b", ModelLocation.DISK, 2, tmp_path)
    cache.register_model("c", "vram", 3, pipeline="C")
    cache.register_model("d", "downloading")
    assert (cache.get_disk_models(), cache.get_vram_models(), cache.get_downloading_models()) == (["b"], ["c"], ["d"])
    assert cache.get_pipeline("c") == "C"
    assert sorted(cache.get_all_models()) == ["a", "b", "c", "d"]


def test_stats(cache: ModelCache, tmp_path: Path) -> None:
    cache.mark_loaded_to_vram("a", object(), 4)
    cache.mark_cached_to_disk("b", tmp_path)
    cache.mark_downloading("c")
    stats = cache.get_stats().to_dict()
    assert stats == {
        "vram_models": ["a"],
        "disk_models": ["b"],
        "downloading_models": ["c"],
        "vram_used_gb": 4,
        "vram_total_gb": 10,
        "vram_available_gb": 6,
        "total_models": 3,
        "vram_model_count": 1,
        "disk_model_count": 1,
    }
    assert json.loads(json.dumps(stats)) == stats


def test_without_a_cap_everything_fits() -> None:
    cache = ModelCache()
    cache.mark_loaded_to_vram("a", object(), 1e6)
    assert cache.mark_loaded_to_vram("b", object(), 1e6) == []
    assert cache.can_fit_in_vram(1e9)
    assert json.dumps(cache.get_stats().to_dict())


# -- what the worker asks -----------------------------------------------------------------------


def test_models_in_use_never_leave(cache: ModelCache) -> None:
    cache.mark_loaded_to_vram("a", object(), 5)
    cache.mark_loaded_to_vram("b", object(), 5)
    cache.pin("a")
    cache.pin("a")
    assert cache.evictable() == ["b"]
    assert cache.mark_loaded_to_vram("c", object(), 5) == ["b"]
    assert not cache.unload_model("a")
    cache.unpin("a")
    assert cache.is_pinned("a")
    cache.unpin("a")
    assert cache.unload_model("a")
    with pytest.raises(ValueError, match="a is not in use"):
        cache.unpin("a")


def test_a_reservation_counts_until_the_load_ends(cache: ModelCache) -> None:
    cache.reserve("a", 8)
    assert cache.get_vram_models() == []
    assert not cache.can_fit_in_vram(3)
    cache.mark_loaded_to_vram("a", object(), 6)
    assert cache.vram_used_gb == 6
    cache.reserve("b", 4)
    cache.cancel_reservation("b")
    assert cache.vram_used_gb == 6
    assert not cache.has_model("b")


@pytest.mark.parametrize(
    ("size", "free", "keep", "plan"),
    [
        (1.0, None, "", []),
        (3.0, None, "", ["b"]),
        (7.0, None, "", ["b", "c"]),
        (7.0, None, "b", None),
        (11.0, None, "", None),
        (1.0, 3.0, "", []),
        (1.0, 2.0, "", ["b"]),
        (1.0, -4.0, "", ["b", "c"]),
        (1.0, -9.0, "", None),
    ],
)
def test_plans(size: float, free: float | None, keep: str, plan: list[str] | None) -> None:
    cache = ModelCache(10, vram_safety_margin_gb=2)
    cache.mark_loaded_to_vram("nothing", object(), 0)
    for name, taken in [("b", 4), ("c", 3), ("a", 1)]:
        cache.mark_loaded_to_vram(name, object(), taken)
    cache.pin("a")
    assert cache.plan_eviction(size, free, keep) == plan
    assert len(cache.get_vram_models()) == 4, "a plan is only a plan"


def test_copies_in_host_memory(cache: ModelCache) -> None:
    cache = ModelCache(10, max_host_gb=5)
    for name in "ab":
        cache.mark_loaded_to_vram(name, object(), 2)
        assert cache.plan_host_eviction(2) == []
        cache.mark_moved_to_host(name, 2)
    assert cache.get_vram_models() == cache.get_available_models() == []
    assert cache.get_host_models() == ["a", "b"]
    assert (cache.host_used_gb, cache.vram_used_gb) == (4, 0)
    assert cache.plan_host_eviction(3) == ["a"]
    assert cache.plan_host_eviction(5) == ["a", "b"]
    assert cache.plan_host_eviction(5.1) is None
    assert cache.plan_host_eviction(3, keep=["a"]) == ["b"]
    assert cache.plan_host_eviction(3, keep=["a", "b"]) is None
    assert cache.plan_host_eviction(0) is None, "what takes nothing is not kept"
    cache.mark_loaded_to_vram("a", object(), 2)
    assert not cache.is_in_host("a")
    cache.drop_from_host("b")
    assert not cache.has_model("b")
    assert ModelCache().plan_host_eviction(1) is None, "off by default"


@given(
    st.lists(st.tuples(st.sampled_from("abcdef"), st.sampled_from(["load", "use", "unload", "disk"]), st.floats(0, 9)))
)
def test_no_history_exceeds_the_cap_by_what_could_leave(history: list[tuple[str, str, float]]) -> None:
    cache = ModelCache(10)
    for name, what, size in history:
        if what == "load":
            cache.mark_loaded_to_vram(name, name, size)
            assert cache.get_vram_models()[-1] == name
        elif what == "use":
            cache.get_pipeline(name)
        elif what == "unload":
            cache.unload_model(name)
        else:
            cache.mark_cached_to_disk(name, "/nowhere")
        stats = cache.get_stats()
        assert stats.vram_used_gb <= 10
        assert stats.vram_used_gb == pytest.approx(sum(cache.size_gb(model) for model in stats.vram_models))
        assert set(stats.vram_models).isdisjoint(stats.disk_models)


def test_many_threads() -> None:
    cache = ModelCache(5)

    def work(number: int) -> None:
        for step in range(300):
            name = f"m{(number + step) % 7}"
            cache.mark_loaded_to_vram(name, name, 1)
            cache.pin(name)
            assert cache.get_pipeline(name) in {name, None}
            cache.unpin(name)
            cache.get_stats()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    assert not any(cache.is_pinned(name) for name in cache.get_all_models())
    cache.mark_loaded_to_vram("last", "last", 1)
    assert cache.vram_used_gb <= 5
