"""The logs of a run's folder: what a resumed run forgets, what a crash tore."""

from __future__ import annotations

import torch

from mmrpt.corpus import read_jsonl
from mmrpt.run_folder import RunFolder, environment


def test_rewinding_forgets_a_phases_later_steps_and_later_phases(tmp_path):
    log = RunFolder(tmp_path)
    for phase in ("warmup", "rl", "control"):
        for number in range(4):
            log.metrics(phase, number, loss=1.0)
    for number in range(4):
        log.write("samples.jsonl", {"step": number})
        log.write("perception.jsonl", {"step": number})
    log.rewind("rl", 2)
    rows = [(r["phase"], r["step"]) for r in read_jsonl(tmp_path / "metrics.jsonl")]
    assert rows == [("warmup", n) for n in range(4)] + [("rl", 0), ("rl", 1)]
    for name in ("samples.jsonl", "perception.jsonl"):
        assert [r["step"] for r in read_jsonl(tmp_path / name)] == [0, 1]
    log.metrics("rl", 2, loss=0.5)  # and goes on at the end of what is left
    assert read_jsonl(tmp_path / "metrics.jsonl")[-1]["loss"] == 0.5
    log.rewind("warmup", 0)
    assert all(read_jsonl(tmp_path / name) == [] for name in ("metrics.jsonl", "samples.jsonl", "perception.jsonl"))


def test_a_torn_row_is_forgotten_when_writing_goes_on(tmp_path):
    log = RunFolder(tmp_path)
    log.metrics("rl", 0, loss=1.0)
    log.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"phase": "rl", "st')
    log = RunFolder(tmp_path)
    log.rewind("rl", 1)
    log.metrics("rl", 1, loss=2.0)
    log.close()
    assert [r["step"] for r in read_jsonl(tmp_path / "metrics.jsonl")] == [0, 1]


def test_the_environment_names_what_a_number_depends_on():
    found = environment("cuda:0 (some GPU)")
    assert found["torch"] == torch.__version__ and found["threads"] == torch.get_num_threads()
    assert found["device"] == "cuda:0 (some GPU)"
    assert {"date", "mmrpt", "python", "transformers", "machine", "cores", "device", "commit"} <= found.keys()
