# SPDX-License-Identifier: Apache-2.0
"""Set-up of the unit tests: how hypothesis runs, and nothing else."""

from __future__ import annotations

from hypothesis import settings

# No deadline per example: a busy machine is no defect of the code under test. The number of examples keeps the whole folder within seconds.
settings.register_profile("vmloop", deadline=None, max_examples=100)
settings.load_profile("vmloop")
