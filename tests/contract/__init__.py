# SPDX-License-Identifier: Apache-2.0
"""What a fake and the real thing must both pass."""
