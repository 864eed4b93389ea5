"""Several processes must give what one gives, and none may wait for one that is gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import assert_equal, crew, mean_of, source_of, spec_of, write_texts

from mergekit_pave.algebra.second_moment import SecondMoment
from mergekit_pave.calibration.load import Resources
from mergekit_pave.calibration.processes import Workers
from mergekit_pave.calibration.run import calibrate_to
from mergekit_pave.errors import PaveError
from mergekit_pave.storage.covariances import MANIFEST, CovarianceStore

CPU = torch.device("cpu")
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
          "--main_process_port", "0"]
# One window per site, and the second process dies in the third.
DIES = """
import os, signal
from mergekit_pave import cli
from mergekit_pave.calibration import run
real, seen = run.collect_window, []
def collect_window(*args):
    seen.append(args)
    if os.environ["RANK"] == "1" and len(seen) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args)
run.collect_window = collect_window
cli.main()
"""


def launch(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*LAUNCH, *map(str, arguments)], capture_output=True, text=True, timeout=300)


def test_accelerate_launch_gives_what_one_process_gives(families, texts, tmp_path):
    path, folder = families("llama")["expert0"], tmp_path / "two"
    ended = launch("-m", "mergekit_pave", "-v", "calibrate", path, "--dataset", texts[0],
                   "--num-calibration-samples", 41, "--statistics-memory", "16000", "-o", folder)
    assert ended.returncode == 0, ended.stderr
    one = calibrate_to(source_of(path), spec_of(texts[0], num_samples=41), tmp_path / "one",
                       Resources(statistics_memory=16_000))
    assert_equal(CovarianceStore(folder), one)
    assert len(list(folder.glob("covariance-*"))) == len(list((tmp_path / "one").glob("cov*"))) > 1
    # One line, one progress bar, one log: all from the main process.
    assert ended.stdout.count("covariances for") == 1
    assert ended.stderr.count("Calibrating expert0: 100%") == 1, ended.stderr
    assert ended.stderr.count("First sample of") == 1


def test_a_process_that_dies_ends_the_job_and_the_rest_is_resumed(families, texts, tmp_path):
    path, folder = families("llama")["expert0"], tmp_path / "s"
    script = tmp_path / "dies.py"
    script.write_text(DIES)
    arguments = ("calibrate", path, "--dataset", texts[0], "--num-calibration-samples", 40,
                 "--statistics-memory", "1", "-o", folder)
    start = time.monotonic()
    ended = launch(script, *arguments)
    assert ended.returncode != 0 and time.monotonic() - start < 200
    assert ended.stderr.count("Error: Another process of this calibration has ended") == 1
    assert "goes on after the last finished window" in ended.stderr
    assert not (folder / MANIFEST).exists()
    before = {file: file.stat().st_mtime_ns for file in folder.glob("covariance-*")}
    assert len(before) == 2
    resumed = calibrate_to(
        source_of(path), spec_of(texts[0]), folder, Resources(statistics_memory=1))
    assert before.items() <= {f: f.stat().st_mtime_ns for f in folder.iterdir()}.items()
    assert_equal(resumed, calibrate_to(source_of(path), spec_of(texts[0]), tmp_path / "one",
                                       Resources()))


@pytest.mark.slow
def test_a_launched_job_tells_an_error_once(families, tmp_path):
    ended = launch("-m", "mergekit_pave", "calibrate", families("llama")["expert0"], "--dataset",
                   tmp_path / "none.jsonl", "-o", tmp_path / "s")
    assert ended.returncode != 0 and ended.stderr.count("Error: ") == 1 + ended.stderr.count(
        "ChildFailedError: "), ended.stderr
    assert "none.jsonl" in ended.stderr


def _calibrate(workers: Workers, path: Path, data: Path, samples: int, folder: Path):
    spec = spec_of(data, num_samples=samples)
    resources = Resources(statistics_memory=16_000)
    return calibrate_to(source_of(path), spec, folder, resources, workers) is not None


def test_more_processes_than_samples(families, texts, tmp_path):
    path = families("llama")["expert0"]
    assert crew(3, _calibrate, path, texts[0], 2, tmp_path / "s") == [True, False, False]
    one = calibrate_to(
        source_of(path), spec_of(texts[0], num_samples=2), tmp_path / "one", Resources())
    assert_equal(CovarianceStore(tmp_path / "s"), one)


def test_bad_data_is_told_by_the_main_process_alone(families, tmp_path):
    path, data = families("llama")["expert0"], tmp_path / "none.jsonl"
    found = crew(2, _calibrate, path, data, 2, tmp_path / "s")
    assert found[0].startswith("PaveError") and found[1].startswith("Elsewhere")
    assert "none.jsonl" in found[0] and not (tmp_path / "s").exists()


def _second_fails(workers: Workers):
    with workers.together():
        if not workers.main:
            raise PaveError("what went wrong in the second.")


def _second_is_killed(workers: Workers):
    if not workers.main:
        os.kill(os.getpid(), signal.SIGKILL)
    workers.gather(1)


def test_an_error_in_another_process_is_told_by_the_main_one():
    message = "what went wrong in the second."
    assert crew(2, _second_fails) == [f"PaveError: {message}", f"Elsewhere: {message}"]


def test_the_others_do_not_wait_for_a_process_that_is_gone():
    found, _ = crew(2, _second_is_killed, silent=(1,))
    assert "Another process of this calibration has ended" in found


def _one_sided(workers: Workers):
    """Sites that were seen by the main process, by the other one, by both, and by none."""
    rows = torch.arange(6.0).reshape(2, 3) + workers.rank
    moments = {name: SecondMoment(3) for name in ("main", "other", "both", "none")}
    for name in ("main" if workers.main else "other", "both"):
        moments[name].add(rows)
    workers.total(moments)
    return {name: (m.count, m.count and mean_of(m).tolist()) for name, m in moments.items()}


def test_sites_that_one_process_has_not_seen():
    total, _ = crew(2, _one_sided)
    a = torch.arange(6.0).reshape(2, 3)
    expected = {"main": a, "other": a + 1, "both": torch.cat([a, a + 1])}
    assert total["none"] == (0, 0)
    for name, rows in expected.items():
        assert total[name][0] == len(rows)
        torch.testing.assert_close(torch.tensor(total[name][1]), rows.T @ rows / len(rows))


def test_samples_are_dealt_without_overlap(families, texts):
    from mergekit_pave.calibration.samples import load_samples

    source = source_of(families("llama")["expert0"])
    samples = load_samples(spec_of(texts[0]), source.path, source.config())
    shares = [Workers(rank, 3, rank, 3, CPU).deal(samples).items for rank in range(3)]
    dealt = [id(item["input_ids"]) for share in shares for item in share]
    assert sorted(dealt) == sorted(id(item["input_ids"]) for item in samples.items)
    lengths = [sum(len(item["input_ids"]) for item in share) for share in shares]
    assert max(lengths) <= 1.2 * min(lengths)


def test_free_memory_is_shared_by_the_processes_of_a_machine():
    limited = Workers(0, 4, 0, 4, CPU).limit(Resources())
    alone = Resources()
    assert limited.max_memory < 0.4 * alone.weights_budget()
    assert limited.statistics_memory < 0.4 * alone.statistics_budget()
    given = Workers(0, 4, 0, 4, CPU).limit(Resources(CPU, 100, 10))
    assert (given.max_memory, given.statistics_memory) == (100, 10)


def test_a_launcher_that_starts_one_process_is_explained(monkeypatch, caplog):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("MASTER_PORT", "29500")
    with Workers.launched(CPU) as workers:
        assert workers.count == 1 and workers.main
    assert "--multi_gpu" in caplog.text


def test_two_calibrations_into_one_folder(families, texts, tmp_path):
    from filelock import FileLock

    folder = tmp_path / "s"
    folder.mkdir()
    with FileLock(folder / ".lock"), pytest.raises(PaveError, match="Another process is writing"):
        calibrate_to(source_of(families("llama")["expert0"]), spec_of(texts[0]), folder,
                     Resources())


def test_an_unfinished_distributed_run_needs_the_same_data(families, texts, tmp_path):
    path, other = families("llama")["expert0"], write_texts(tmp_path / "o.jsonl", seed=9)
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "calibration.json").write_text("{}")
    found = crew(2, _calibrate, path, other, 4, tmp_path / "s")
    assert "unfinished calibration of another model or other data" in found[0]
    assert found[1].startswith("Elsewhere")
