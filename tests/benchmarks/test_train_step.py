"""Each benchmark runs and prints its line; what it measures is no assertion."""

import re

from conftest import execute


def test_train_step_prints_its_line():
    run = execute(["python3", "benchmarks/train_step.py", "--network=cifar_quick", "--image_size=32", "--per_batch_size=4",
                   "--steps=2"])
    assert run.status == 0, run
    assert re.fullmatch(r"train_step network=cifar_quick block=base ranks=1 per_batch_size=4 images_per_second=[\d.]+ "
                        r"forward_backward_s=[\d.]+ allreduce_s=[\d.]+ optimizer_s=[\d.]+", run.out.strip()), run
