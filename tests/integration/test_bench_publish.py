"""`bench publish`: every way brings the same weights to the workers, and the figures are of the same bytes."""

import io
import json

import pytest
from rich.console import Console

from latent_grpo.common.transport import TRANSPORTS
from latent_grpo.deploy.bench.publish import OLD, measure, parameters, show, write_json

pytestmark = [pytest.mark.integration, pytest.mark.slow]  # each way starts processes of its own


def test_every_way_is_measured_on_the_same_bytes_and_verified(ray_session, tmp_path):
    found = measure(["3M"], workers=1, rounds=1)
    assert [(cost.way, cost.frozen) for cost in found] == [
        (OLD, False),
        *((name, frozen) for name in sorted(TRANSPORTS) for frozen in (False, True)),
    ]
    size = sum(tensor.nbytes for _, tensor in parameters("3M")) / 1e9
    for cost in found:
        assert cost.gigabytes == size
        assert cost.ratio == cost.whole_s / cost.memcpy_s
        assert cost.whole_s >= max(cost.publish_s, cost.receive_s + cost.load_s)
    shown = io.StringIO()
    show(found, Console(file=shown, width=200))
    assert shown.getvalue().count("3M") == len(found)
    write_json(found, tmp_path / "found.json")
    assert [row["way"] for row in json.loads((tmp_path / "found.json").read_text())] == [cost.way for cost in found]
