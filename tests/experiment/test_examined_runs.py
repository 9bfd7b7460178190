"""The coverage of a run is printed before anything is computed, and stored in its manifest."""

import json

import pytest


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_run_says_and_stores_which_share_of_the_weights_it_rounds(cli, tiny, tmp_path, method):
    done = cli(f"method={method}", "bits=3", *tiny, f"out={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr
    coverage = json.loads((tmp_path / "out" / "results.json").read_text())["manifest"]["coverage"]
    assert coverage["share"] == 1.0
    assert {(each["kind"], each["in_share"]) for each in coverage["left"]} == {
        ("embeddings", False),
        ("output head", False),
    }
    line = f"100.0% of {coverage['weights']:,} weights in the layers will be rounded; left: 1 embeddings"
    assert line in " ".join(done.stderr.split())
