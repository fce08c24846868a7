"""Models of a job are shared evenly between the workers."""

from hypothesis import given
from hypothesis import strategies as st

from ray_jobs.even_parts import evenly


@given(st.integers(1, 500), st.integers(1, 60), st.integers(1, 9))
def test_workers_get_equally_many_batches_of_all_models(models: int, most: int, workers: int) -> None:
    workers = min(workers, models)
    parts = evenly(range(models), most, workers)
    assert [model for part in parts for model in part] == list(range(models))
    sizes = [len(part) for part in parts]
    assert 1 <= min(sizes) <= max(sizes) <= most
    assert max(sizes) - min(sizes) <= 1
    assert len(parts) % workers == 0 or max(sizes) == 1
