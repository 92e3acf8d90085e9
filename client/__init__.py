# SPDX-License-Identifier: Apache-2.0
"""For programs and people: session (blocking), aio (asyncio), vm (typed verbs), subscription (events), cli/ (the command line)."""
