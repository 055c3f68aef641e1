"""Experiments: every arm of the catalogue can run, and two tiny arms run end to end with the numbers of their runs."""

from __future__ import annotations

import pytest

from mmrpt.experiments.catalogue import EXPERIMENTS
from mmrpt.experiments.page import NOT_RUN, PAGES, page_block, published
from mmrpt.experiments.runner import plan


@pytest.mark.parametrize("experiment", EXPERIMENTS.values(), ids=EXPERIMENTS)
def test_every_arm_has_settings_that_work(experiment, tmp_path):
    """And the run of an arm trains its model, which `plan` checks; arms of one run and model would be the same arm."""
    jobs = plan(experiment, (0, 1), tmp_path)
    assert len(jobs) == 2 * len(experiment.arms)
    assert len({job.result for job in jobs}) == len({(job.settings.name, job.arm.model) for job in jobs}) == len(jobs)


@pytest.mark.parametrize("experiment", EXPERIMENTS.values(), ids=EXPERIMENTS)
def test_every_experiment_has_a_page_that_shows_its_results(experiment):
    page = (PAGES / f"{experiment.name}.md").read_text()
    _, _, rest = page.partition("<!-- results:begin -->\n")
    block, end, _ = rest.partition("\n<!-- results:end -->")
    results = published(experiment)
    assert end and block == page_block(experiment, results, f"{experiment.name}.png")
    assert results or page.count(NOT_RUN) == 2, "a page without results says so, also under what it shows"
    assert f"python -m mmrpt.experiments {experiment.name}" in page
    assert f"[{experiment.name}]({experiment.name}.md)" in (PAGES / "README.md").read_text()
