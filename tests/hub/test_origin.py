import json

import pytest

from litlora.errors import LitLoraError
from litlora.hub.origin import Origin, origin, write_origin

SOURCE = Origin("org/name", "0123abc", "apache-2.0")


def test_origin_round_trip(tmp_path):
    assert origin(tmp_path) is None
    write_origin(tmp_path, SOURCE)
    assert origin(tmp_path) == SOURCE


def test_origin_without_license(tmp_path):
    (tmp_path / ".litlora.json").write_text(json.dumps({"repo_id": "org/name", "revision": "1"}))
    assert origin(tmp_path) == Origin("org/name", "1", None)


@pytest.mark.parametrize("content", [{}, {"repo_id": 1, "revision": "1"}, {**SOURCE._asdict(), "license": 2}])
def test_origin_of_another_kind_is_refused(tmp_path, content):
    (tmp_path / ".litlora.json").write_text(json.dumps(content))
    with pytest.raises(LitLoraError, match=r"\.litlora\.json must have the texts repo_id and revision"):
        origin(tmp_path)
