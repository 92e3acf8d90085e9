# SPDX-License-Identifier: Apache-2.0
"""The whole: broker, zygote, workers and VMs as processes."""
