"""The experiments that there are, by name: a new one is a module and a line here, and a page in docs/experiments/."""

from __future__ import annotations

from mmrpt.experiments.arms import Experiment
from mmrpt.experiments.controls import CONTROLS
from mmrpt.experiments.easy_vqa import EASY_VQA
from mmrpt.experiments.language_bias import LANGUAGE_BIAS
from mmrpt.experiments.long import LONG
from mmrpt.experiments.masking import MASKING
from mmrpt.experiments.rendered import RENDERED
from mmrpt.experiments.robustness import ROBUSTNESS
from mmrpt.experiments.sparsity import SPARSITY
from mmrpt.experiments.visual_reward import VISUAL_REWARD
from mmrpt.experiments.vppo import VPPO

ALL = (CONTROLS, MASKING, VPPO, VISUAL_REWARD, SPARSITY, LONG, LANGUAGE_BIAS, RENDERED, ROBUSTNESS, EASY_VQA)
EXPERIMENTS: dict[str, Experiment] = {one.name: one for one in ALL}
