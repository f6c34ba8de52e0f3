"""The scaling table is computed from the bytes that a run sends; test_docs compares it with docs/distributed.md."""

import pytest
import scaling


def test_reported_global_batch_is_the_smallest_that_suffices():
    for training in scaling.TRAININGS[::2]:
        for cluster in scaling.CLUSTERS:
            share = scaling.sufficient_batch(training, cluster) // cluster.gpus
            assert scaling.utilization(training, cluster, share) >= scaling.UTILIZATION - 1e-9
            assert share == 1 or scaling.utilization(training, cluster, share - 1) < scaling.UTILIZATION


def test_computed_and_sent_bytes_by_hand():
    training = scaling.Training("7B (Llama 2)", "bfloat16", "query, value")
    matrices = 32 * 2 * 2 * 8 * 4096
    frozen = 6_738_415_616 - 32000 * 4096
    assert training.gradients(8) == 4 * matrices * 2 * 7 / 8
    assert training.weights(8) == 0
    assert training.example == pytest.approx(200 * (4 * frozen + 6 * matrices) / 400e12)
    shared = scaling.Training("7B (Llama 2)", "bfloat16", "query, value", is_sharded=True)
    assert shared.weights(8) == 2 * 2 * 6_738_415_616 * 7 / 8
