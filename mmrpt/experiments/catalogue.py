"""The experiments that there are, by name: a new one is a module and a line here, and a page in docs/experiments/."""

from __future__ import annotations

from mmrpt.experiments.arms import Experiment
from mmrpt.experiments.controls import CONTROLS
from mmrpt.experiments.language_bias import LANGUAGE_BIAS
from mmrpt.experiments.long import LONG
from mmrpt.experiments.sparsity import SPARSITY
from mmrpt.experiments.vppo import VPPO

EXPERIMENTS: dict[str, Experiment] = {one.name: one for one in (CONTROLS, VPPO, SPARSITY, LONG, LANGUAGE_BIAS)}
