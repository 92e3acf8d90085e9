# SPDX-License-Identifier: Apache-2.0
"""One module of ours at a time, in this process; a test module per module, and the house rules (test_architecture)."""
