# SPDX-FileCopyrightText: the rbd_export authors
# SPDX-License-Identifier: BSD-3-Clause
"""A few rounds of tests/stress/run.sh: nothing that was promised is lost in a crash."""

import pytest
from conftest import CACHES, running_cluster
from stress.crash import FAULTS, Bench


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    directory = tmp_path_factory.mktemp("crash")
    with running_cluster(directory / "cluster", "--store", "bluestore") as cluster:
        bench = Bench(cluster, directory, seed=None)
        yield bench
        bench.close()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("fault", FAULTS)
def test_nothing_that_was_promised_is_lost(bench, fault):
    rounds = len(CACHES) if fault == "nbdkit killed" else 1
    _, _, acknowledged, lost, _, recovered = bench.play(fault, rounds)
    assert acknowledged
    assert not lost
    assert recovered == "yes"
