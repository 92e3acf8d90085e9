# SPDX-License-Identifier: Apache-2.0
"""What both ends of a wire must agree on. Imports nothing of vmloop's but itself.

Read errors, names, states and cursor first, then wire and majordomo (the frames), page (the status page), paths and settings.
"""
