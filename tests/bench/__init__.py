# SPDX-License-Identifier: Apache-2.0
"""Measurements against the numbers of the design; make bench runs them."""
