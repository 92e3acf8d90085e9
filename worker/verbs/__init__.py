# SPDX-License-Identifier: Apache-2.0
"""The operations of a VM, one file per family; table.py lists them all."""
