"""What `replay` takes for rounding: less in float32 than in bfloat16, and of advantages the same in both."""

import pyarrow as pa
import pytest
from fake_run import fake_run

from latent_grpo.deploy.replay.recorded import RecordedRun
from latent_grpo.deploy.replay.replay import COMPARED, TOLERANCES, deviations


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    folder = fake_run(tmp_path_factory.mktemp("run") / "run", steps=1)
    return RecordedRun(folder, folder.config()).step(1).records


def moved(records, column, by):
    """The records with one response step of the column moved."""
    lists = records.column(column).to_pylist()
    lists[1][-1] += by
    place = records.schema.get_field_index(column)
    return records.set_column(place, records.schema.field(place), pa.array(lists, records.schema.field(place).type))


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_the_same_records_do_not_deviate(records, dtype):
    assert list(deviations(records, records, TOLERANCES[dtype])) == []


@pytest.mark.parametrize(
    ("column", "by", "deviating"),
    [
        ("old_log_probs", 0.06, {"float32"}),
        ("new_log_probs", 0.06, {"float32"}),
        ("ratios", 0.09, {"float32"}),
        ("ratios", 0.5, {"float32", "bfloat16"}),
        ("old_log_probs", 5e-5, set()),
        ("step_advantages", 0.01, {"float32", "bfloat16"}),
    ],
)
def test_a_difference_beyond_rounding_is_found_at_its_place(records, column, by, deviating):
    assert column in COMPARED
    for dtype, tolerance in TOLERANCES.items():
        found = list(deviations(records, moved(records, column, by), tolerance))
        assert bool(found) == (dtype in deviating)
        for deviation in found:
            assert (deviation.column, deviation.steps) == (column, 1)
            assert deviation.replayed - deviation.recorded == pytest.approx(by, abs=1e-5)
            assert deviation.sample_index == records.column("sample_index")[1].as_py()
