import pytest

import bundles


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return bundles.run_executorch_child(tmp_path_factory.mktemp("executorch"))


@pytest.mark.parametrize("check", bundles.executorch_checks("CHECKS"))
def test_programs(results, check):
    bundles.assert_passed(results, check)
